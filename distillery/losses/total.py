"""The training loss: the weighted sum of the chosen losses, and a check that each of them can teach the student.

A loss is one function `(student, teacher, *, options) -> scalar` in terms.py and one line in registry.py.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distillery.losses.explained import explained_variance
from distillery.losses.registry import EXPLAINED, LOSSES, QUEUE_SIZE, LossTerm, check_losses
from distillery.models.backbone import Backbone, Features
from distillery.system.errors import UserError

# norms at the first step: a constant written as a loss 1e-15 to 3e-8 (rounding), the weakest working loss 2e-5
ZERO_GRADIENT_NORM = 1e-7
FIELD_REMEDIES = {
    "tokens": "have patch tokens stored (teacher_cache.tokens)",
    "logits": "take a teacher with a classifier",
    "layers": "set teacher_out_indices and student_out_indices",
}


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
        {"loss": the sum, "loss/<name>": the term before its weight, ..., "explained/<name>": the share of the targets'
        variance that the student explains, for each loss that compares row by row}, float32 scalars on the device.
    Raises:
        UserError: unknown names or options, a field that one of the models does not give, shapes that differ.
    """
    return sum_losses(student, teacher, bind_losses(weights, options), second_view=second_view, queue=queue)


@dataclass(frozen=True)
class BoundLoss:
    """A loss of the configuration, looked up once: its functions take the tensors alone."""

    name: str
    weight: float
    function: Callable[..., Tensor]
    explained: Callable[[Any, Any], Tensor] | None  # of student and targets; None: it does not compare row by row


def bind_losses(
    weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]] | None = None
) -> list[BoundLoss]:
    """The losses of non-zero weight; arguments and errors as of check_losses."""
    check_losses(weights, options)
    bound = []
    for name, weight in weights.items():
        if weight:
            own_options = dict((options or {}).get(name) or {})
            own_options.pop(QUEUE_SIZE, None)
            function = functools.partial(LOSSES[name].function, **own_options)
            bound.append(BoundLoss(name, weight, function, _explained_by(LOSSES[name])))
    return bound


def _explained_by(loss: LossTerm) -> Callable[[Any, Any], Tensor] | None:
    if not loss.row_by_row:
        return None
    return functools.partial(explained_variance, by_direction=loss.fixes == "directions")


def sum_losses(
    student: Features,
    teacher: Features,
    losses: Iterable[BoundLoss],
    *,
    second_view: Features | None = None,
    queue: Tensor | None = None,
) -> dict[str, Tensor]:
    """total_loss of bound losses: what a step calls."""
    terms, explained, total = {}, {}, None
    # autocast would run the Gram matrices in bfloat16: 3 digits are not enough under a softmax at temperature 0.07
    with torch.autocast(device_type=student.pooled.device.type, enabled=False):
        for loss in losses:
            arguments = _arguments_of(loss.name, student, teacher, second_view, queue)
            term = loss.function(*arguments)
            weighted = term if loss.weight == 1 else loss.weight * term
            terms[f"loss/{loss.name}"] = term
            total = weighted if total is None else total + weighted
            if loss.explained is not None:
                explained[f"{EXPLAINED}{loss.name}"] = loss.explained(*arguments)
    return {"loss": total} | terms | explained


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
        terms: what total_loss returned, its graph still alive; what is explained has no gradient, and is left out.
        parameters: the student's own weights; heads alone could learn while the student stands still.
    Returns:
        The norm of each term's gradient.
    Raises:
        FloatingPointError: a term or its gradient is not finite.
        UserError: a term's gradient into the student is zero.
    """
    parameters = [p for p in parameters if p.requires_grad]
    norms = {}
    losses = {name: term for name, term in terms.items() if not name.startswith(EXPLAINED)}
    for name, term in losses.items():
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


def check_tokens(backbone: Backbone, role: str, weights: Mapping[str, float], stored_tokens: str) -> None:
    """Raise UserError where a model without patch tokens (PiT, or a pooled feature alone) is to give them.

    Args:
        backbone: of either model.
        role: teacher or student.
        weights: distill_loss_weights.
        stored_tokens: teacher_cache.tokens.
    """
    if backbone.token_width is not None:
        return
    if role == "teacher" and stored_tokens not in ("auto", "none"):
        raise UserError(
            f"teacher_cache.tokens is {stored_tokens}, and the teacher gives no patch tokens: set it to auto or to none"
        )
    compared = [n for n, weight in weights.items() if weight and LOSSES[n].field == "tokens"]
    if compared:
        name = ", ".join(compared)
        raise UserError(
            f"the {role} gives no patch tokens, and distill_loss_weights.{name} compares them: leave {name} out of "
            f"distill_loss_weights (cls compares the pooled feature), or take another {role}"
        )
