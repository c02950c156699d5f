"""A small set of cases in which every two values of two factors meet."""

import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence

Case = dict[str, Hashable]


def pairwise(
    factors: Mapping[str, Sequence[Hashable]], allowed: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Cases {factor: value} that hold every allowed pair of values of two factors; always the same ones.

    Greedy: a case starts with the first pair that is not covered yet, then each factor takes the value that covers the
    most further pairs.

    Args:
        factors: name -> its values.
        allowed: whether values can go together; asked of unfinished cases too, which lack factors.
    """
    names = list(factors)
    left = {
        frozenset([(a, x), (b, y)]): None  # a dict keeps its order, a set does not
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
        if allowed({a: x, b: y})
    }
    cases = []
    while left:
        case: Case = dict(next(iter(left)))
        for name in names:
            if name not in case:
                possible = [value for value in factors[name] if allowed(case | {name: value})]
                # of equals the one that most is still to be seen with
                case[name] = max(possible, key=lambda value: (_new(case, name, value, left), _seen(name, value, left)))
        for pair in itertools.combinations(case.items(), 2):
            left.pop(frozenset(pair), None)
        cases.append({name: case[name] for name in names})
    return cases


def _new(case: Case, name: str, value: Hashable, left: Mapping) -> int:
    return sum(frozenset([(name, value), other]) in left for other in case.items())


def _seen(name: str, value: Hashable, left: Mapping) -> int:
    return sum((name, value) in pair for pair in left)
