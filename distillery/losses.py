"""What the student is pulled towards: the losses by name, their weighted sum, and what they need.

A loss is one function `(student, teacher, *, options) -> scalar` in losses_terms.py and one line in LOSSES.
"""

import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillery.losses_terms import (
    LEAST_BATCH,
    barlow,
    cosine,
    cosine_smooth_l1,
    kl_logits,
    layers,
    mse,
    patch_similarity,
    rkd_angle,
    rkd_distance,
    similarity,
    similarity_queue,
    smooth_l1,
)
from distillery.process import UserError

# norms at the first step: a constant written as a loss 1e-15 to 3e-8 (rounding), the weakest working loss 2e-5
ZERO_GRADIENT_NORM = 1e-7
# an option, but of the queue that the training keeps: no function sees it
QUEUE_SIZE = "queue_size"
FIELD_REMEDIES = {
    "tokens": "have patch tokens stored (teacher_cache.tokens)",
    "logits": "take a teacher with a classifier",
    "layers": "set teacher_out_indices and student_out_indices",
}


@dataclass(frozen=True)
class Features:
    """What a model says about a batch: B images, P = h * w patches in row-major order, D channels, C classes."""

    pooled: Tensor  # [B, D]: class token or pooled map
    tokens: Tensor | None  # [B, P, D]: patch tokens or the cells of a feature map; None: not stored
    grid: tuple[int, int]  # (h, w)
    logits: Tensor | None = None  # [B, C]
    layers: tuple[Tensor, ...] = ()  # [B, P, D] each: intermediate layers
    layer_grids: tuple[tuple[int, int], ...] = ()  # (h, w) of each of them

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor there is by name; the layers as layers_0, layers_1 and so on."""
        named = {"pooled": self.pooled, "tokens": self.tokens, "logits": self.logits}
        named |= {f"layers_{i}": layer for i, layer in enumerate(self.layers)}
        return {name: value for name, value in named.items() if value is not None}

    def with_tensors(self, named: Mapping[str, Tensor]) -> "Features":
        """The same with some tensors changed, named as in tensors()."""
        changed = tuple(named.get(f"layers_{i}", layer) for i, layer in enumerate(self.layers))
        fields = {name: value for name, value in named.items() if not name.startswith("layers_")}
        return dataclasses.replace(self, layers=changed, **fields)


@dataclass(frozen=True)
class LossTerm:
    """A loss and the field of Features that it compares."""

    function: Callable[..., Tensor]
    field: str  # "pooled", "tokens", "logits" or "layers"
    second_view: bool = False  # whether the teacher's side is of another view than the student's
    least_batch: int = 1  # images of one process that it needs to compare
    queue_size: int | None = None  # past teacher rows it is handed as a third argument unless told; None: none

    @property
    def options(self) -> list[str]:
        """Names of the options it takes; each is a number above zero."""
        parameters = inspect.signature(self.function).parameters.values()
        names = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
        return names if self.queue_size is None else [*names, QUEUE_SIZE]


LOSSES = {
    "cls": LossTerm(cosine_smooth_l1, "pooled"),
    "patch": LossTerm(cosine_smooth_l1, "tokens"),
    "cosine": LossTerm(cosine, "pooled"),
    "mse": LossTerm(mse, "pooled"),
    "smooth_l1": LossTerm(smooth_l1, "pooled"),
    "patch_cosine": LossTerm(cosine, "tokens"),
    "patch_mse": LossTerm(mse, "tokens"),
    "patch_smooth_l1": LossTerm(smooth_l1, "tokens"),
    "patch_similarity": LossTerm(patch_similarity, "tokens"),
    "layers": LossTerm(layers, "layers"),
    "similarity": LossTerm(similarity, "pooled", least_batch=LEAST_BATCH),
    "similarity_queue": LossTerm(similarity_queue, "pooled", least_batch=LEAST_BATCH, queue_size=8192),
    "rkd_distance": LossTerm(rkd_distance, "pooled", least_batch=LEAST_BATCH),
    "rkd_angle": LossTerm(rkd_angle, "pooled", least_batch=LEAST_BATCH),
    "barlow": LossTerm(barlow, "pooled", second_view=True, least_batch=LEAST_BATCH),
    "kl_logits": LossTerm(kl_logits, "logits"),
}


def check_batch_size(weights: Mapping[str, float], batch_size: int) -> None:
    """Refuse a batch too small for a loss that compares its images with each other.

    Raises:
        UserError: there is one of non-zero weight.
    """
    for name, weight in weights.items():
        if weight and batch_size < LOSSES[name].least_batch:
            raise UserError(
                f"batch_size is {batch_size}, and distill_loss_weights.{name} compares the images of a batch with each "
                f"other: it needs {LOSSES[name].least_batch} or more. Raise batch_size, or set {name}: 0"
            )


def check_loss_names(weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None) -> None:
    """Refuse weights and options that no loss would use as written.

    Raises:
        UserError: an unknown loss or option, a weight or option that is no usable number, or no weight above zero.
    """
    for name, weight in weights.items():
        if name not in LOSSES:
            near = difflib.get_close_matches(name, LOSSES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise UserError(f"distill_loss_weights: unknown loss {name!r}{hint} Known: {', '.join(sorted(LOSSES))}")
        if not _is_number(weight) or weight < 0:
            raise UserError(f"distill_loss_weights: {name}: {weight!r} is not a number of 0 or more")
    if not any(weights.values()):
        raise UserError(f"distill_loss_weights {dict(weights)}: at least one weight must be above zero")
    for name, chosen in (options or {}).items():
        if name not in weights:
            raise UserError(f"loss_options: {name!r} is not among distill_loss_weights ({', '.join(weights)})")
        for option, value in (chosen or {}).items():
            known = LOSSES[name].options
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
    """The fields of Features that losses of non-zero weight compare; unknown names as in check_loss_names."""
    check_loss_names(weights)
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


def total_loss(
    student: Features,
    teacher: Features,
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    second_view: Features | None = None,
    queue: Tensor | None = None,
) -> dict[str, Tensor]:
    """The weighted sum of the chosen losses, and each of them unweighted.

    Args:
        student: projected to the teacher's widths.
        teacher: on the student's grid; receives no gradient.
        weights: loss name -> weight; a weight of zero is not computed.
        options: loss name -> its options, e.g. {"kl_logits": {"temperature": 2}}.
        second_view: the teacher's features of another view of the same images, where needs_second_view says so.
        queue: pooled teacher features of earlier batches, [K, D], where queue_size_of gives a number.
    Returns:
        {"loss": the sum, "loss/<name>": the term before its weight, ...}, float32 scalars on the device.
    Raises:
        UserError: unknown names or options, a field that one of the models does not give, shapes that differ.
    """
    check_loss_names(weights, options)
    terms = {}
    # autocast would run the Gram matrices in bfloat16: 3 digits are not enough under a softmax at temperature 0.07
    with torch.autocast(device_type=student.pooled.device.type, enabled=False):
        for name, weight in weights.items():
            if weight:
                own_options = dict((options or {}).get(name) or {})
                own_options.pop(QUEUE_SIZE, None)
                terms[name] = LOSSES[name].function(
                    *_arguments_of(name, student, teacher, second_view, queue), **own_options
                )
        total = sum(weights[name] * term for name, term in terms.items())
    return {"loss": total} | {f"loss/{name}": term for name, term in terms.items()}


def _arguments_of(
    name: str, student: Features, teacher: Features, second_view: Features | None, queue: Tensor | None
) -> tuple[Any, ...]:
    """What a loss compares, in its own order."""
    loss = LOSSES[name]
    if loss.second_view and second_view is None:
        raise UserError(f"{name} needs the teacher's features of a second view, and was given none")
    targets = second_view if loss.second_view else teacher
    pair = _field_of(student, loss.field, name, "student"), _field_of(targets, loss.field, name, "teacher")
    return pair if loss.queue_size is None else (*pair, queue)


def _field_of(features: Features, field: str, loss: str, role: str) -> Any:
    value = getattr(features, field)
    if value is None or (field == "layers" and not value):
        raise UserError(
            f"{loss} needs {field}, which the {role} does not give: {FIELD_REMEDIES[field]}, or leave {loss} out of "
            "distill_loss_weights"
        )
    return value


def check_gradients(terms: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> dict[str, float]:
    """See at the first step that every loss term really teaches: finite, and with a gradient into the student.

    Call it outside DistributedDataParallel (on the module it wraps): no gradient is left in `.grad`.

    Args:
        terms: what total_loss returned, its graph still alive.
        parameters: the student's own weights; heads alone could learn while the student stands still.
    Returns:
        The norm of each term's gradient.
    Raises:
        FloatingPointError: a term or its gradient is not finite.
        UserError: a term's gradient into the student is zero.
    """
    parameters = [p for p in parameters if p.requires_grad]
    norms = {}
    for name, term in terms.items():
        norms[name] = _gradient_norm(term, parameters) if term.requires_grad and parameters else 0.0
        if not math.isfinite(term.item()) or not math.isfinite(norms[name]):
            raise FloatingPointError(f"{name} is {term.item()} at the first step, its gradient norm {norms[name]}")
        if norms[name] < ZERO_GRADIENT_NORM:
            raise UserError(
                f"{name} = {term.item():.3g} has no gradient into the student (norm {norms[name]:.1e}): it cannot "
                "teach anything. Leave it out of distill_loss_weights, or look for a frozen student or constant output"
            )
    return norms


def _gradient_norm(term: Tensor, parameters: list[Tensor]) -> float:
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return float(sum(g.double().square().sum() for g in gradients if g is not None)) ** 0.5
