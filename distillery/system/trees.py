"""Nested dicts, lists and tuples with tensors in them: states of models, optimisers and runs."""

import copy
from collections.abc import Callable
from typing import Any


def map_leaves(tree: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The same tree with function(value) in the place of every value of a type; the rest is shared, not copied.

    A dict keeps its own type and attributes: a state_dict carries the versions of its modules. Subclasses of list and
    tuple are values like any other.
    """
    if isinstance(tree, kind):
        return function(tree)
    if isinstance(tree, dict):
        mapped = copy.copy(tree)
        mapped.update({key: map_leaves(value, kind, function) for key, value in tree.items()})
        return mapped
    if type(tree) in (list, tuple):
        return type(tree)(map_leaves(value, kind, function) for value in tree)
    return tree
