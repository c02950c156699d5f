"""The table of losses: the name of each and what it needs.

A loss is one function in terms.py and one line in LOSSES. This file does not import torch, so a misspelt name raises
an error at once.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# an option of the queue that training keeps, not of the loss function
QUEUE_SIZE = "queue_size"
# what a step returns beside "loss/<name>" begins so: the share of the targets' variance that the student explains
EXPLAINED = "explained/"


@dataclass(frozen=True)
class LossTerm:
    """A loss and the field of Features that it compares."""

    name: str  # of the function in terms.py
    field: str  # "pooled", "tokens", "logits" or "layers"
    second_view: bool = False  # whether the teacher's side is of another view than the student's
    least_batch: int = 1  # images of one process that it needs to compare
    queue_size: int | None = None  # default number of past teacher rows, its third argument; None: no such argument
    # what of the targets it makes the head give: their values, their directions alone, each channel up to scale and
    # shift, or only how images or patches relate to each other, in a space of the head's own
    fixes: Literal["values", "directions", "channels", "relations"] = "values"
    # whether it brings each row of the student to the same row of the targets: a step then also says how much of them
    # the student explains (explained.py)
    row_by_row: bool = False

    @property
    def function(self) -> Callable[..., "Tensor"]:
        """(student, teacher, *, options) -> float32 scalar."""
        return getattr(importlib.import_module("distillery.losses.terms"), self.name)

    @property
    def options(self) -> list[str]:
        """Names of the options it takes; each is a number above zero."""
        parameters = inspect.signature(self.function).parameters.values()
        names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        return names if self.queue_size is None else [*names, QUEUE_SIZE]


LOSSES = {
    "cls": LossTerm("cosine_smooth_l1", "pooled", row_by_row=True),
    "patch": LossTerm("cosine_smooth_l1", "tokens", row_by_row=True),
    "cosine": LossTerm("cosine", "pooled", fixes="directions", row_by_row=True),
    "mse": LossTerm("mse", "pooled", row_by_row=True),
    "smooth_l1": LossTerm("smooth_l1", "pooled", row_by_row=True),
    "patch_cosine": LossTerm("cosine", "tokens", fixes="directions", row_by_row=True),
    "patch_mse": LossTerm("mse", "tokens", row_by_row=True),
    "patch_smooth_l1": LossTerm("smooth_l1", "tokens", row_by_row=True),
    "patch_similarity": LossTerm("patch_similarity", "tokens", fixes="relations"),
    "layers": LossTerm("layers", "layers", row_by_row=True),
    "similarity": LossTerm("similarity", "pooled", least_batch=3, fixes="relations"),
    "similarity_queue": LossTerm("similarity_queue", "pooled", least_batch=3, queue_size=8192, fixes="directions"),
    "rkd_distance": LossTerm("rkd_distance", "pooled", least_batch=3, fixes="relations"),
    "rkd_angle": LossTerm("rkd_angle", "pooled", least_batch=3, fixes="relations"),
    "barlow": LossTerm("barlow", "pooled", second_view=True, least_batch=3, fixes="channels"),
    "kl_logits": LossTerm("kl_logits", "logits"),
}


def check_losses(
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    batch_size: int | None = None,
) -> None:
    """Refuse weights and options that no loss would use as written, and a batch too small for one of them.

    Args:
        weights: loss name -> weight, as the key distill_loss_weights.
        options: loss name -> its options, as the key loss_options.
        batch_size: images of one process; None: not looked at.
    Raises:
        UserError: an unknown loss or option, a weight or option that is no usable number, no weight above zero, or a
            loss of non-zero weight that compares the images of a batch, of which there are too few.
    """
    for name, weight in weights.items():
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"distill_loss_weights: unknown loss {name!r}{hint} Known: {', '.join(sorted(LOSSES))}")
        if not _is_number(weight) or weight < 0:
            raise UserError(f"distill_loss_weights: {name}: {weight!r} is not a number of 0 or more")
        if weight and batch_size is not None and batch_size < LOSSES[name].least_batch:
            raise UserError(
                f"batch_size is {batch_size}, and distill_loss_weights.{name} compares the images of a batch with each "
                f"other: it needs {LOSSES[name].least_batch} or more. Raise batch_size, or set {name}: 0"
            )
    if not any(weights.values()):
        raise UserError(f"distill_loss_weights {dict(weights)}: at least one weight must be above zero")
    for name, chosen in (options or {}).items():
        if name not in weights:
            raise UserError(f"loss_options: {name!r} is not among distill_loss_weights ({', '.join(weights)})")
        _check_options(name, chosen or {})


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    known = LOSSES[name].options if options else []
    for option, value in options.items():
        if option not in known:
            takes = f"its options: {', '.join(known)}" if known else "it takes none"
            raise UserError(f"loss_options: {name} has no option {option!r}; {takes}")
        if not _is_number(value) or value <= 0:
            raise UserError(f"loss_options: {name}: {option} {value!r} is not a number above 0")
        if option == QUEUE_SIZE and not isinstance(value, int):
            raise UserError(f"loss_options: {name}: {option} {value!r} is not a whole number")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fields_needed(weights: Mapping[str, float]) -> set[str]:
    """The fields of Features that losses of non-zero weight compare; unknown names as in check_losses."""
    check_losses(weights)
    return {LOSSES[name].field for name, weight in weights.items() if weight}


def needs_second_view(weights: Mapping[str, float]) -> bool:
    """Whether a loss of non-zero weight compares the student with the teacher's features of another view."""
    return any(LOSSES[name].second_view for name, weight in weights.items() if weight)


def queue_size_of(weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None) -> int | None:
    """How many past teacher rows losses of non-zero weight want at most; None: no loss wants any."""
    wanted = [
        ((options or {}).get(name) or {}).get(QUEUE_SIZE, LOSSES[name].queue_size)
        for name, weight in weights.items()
        if weight and LOSSES[name].queue_size is not None
    ]
    return max(wanted, default=None)
