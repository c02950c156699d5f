"""What the student is pulled towards: pure functions of its features and the teacher's, and their weighted sum.

A loss is one function `(student, teacher, *, options) -> scalar` and one line in LOSSES. Every one is zero where the
student equals the teacher, gives no gradient to the teacher and computes in float32 whatever it is handed.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from distillery.process import UserError

# norms at the first step: a constant written as a loss 1e-15 to 3e-8 (rounding), the weakest working loss 2e-5
ZERO_GRADIENT_NORM = 1e-7


@dataclass(frozen=True)
class Features:
    """What a model says about a batch: B images, P = h * w patches in row-major order, D channels, C classes."""

    pooled: Tensor  # [B, D]: class token or pooled map
    tokens: Tensor  # [B, P, D]: patch tokens or the cells of a feature map
    grid: tuple[int, int]  # (h, w)
    logits: Tensor | None = None  # [B, C]


def check_same_shape(name: str, student: Tensor, teacher: Tensor, *, remedy: str) -> None:
    """Refuse two tensors that do not match: broadcasting or cutting would compare unlike things in silence.

    Raises:
        UserError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise UserError(f"{name}: student {list(student.shape)} and teacher {list(teacher.shape)} differ: {remedy}")


REMEDY = "project the student to the teacher's width (StudentWithHeads) and resample the grid (align_teacher)"


def _check_batch(name: str, student: Tensor, teacher: Tensor) -> None:
    # with two images there is one pair: its normalised distance or similarity is a constant, the gradient zero
    if student.shape[:-1] != teacher.shape[:-1] or len(student) < 3:
        raise UserError(
            f"{name} compares the images of a batch with each other: it needs the same 3 or more of student and "
            f"teacher, got {list(student.shape)} and {list(teacher.shape)}: raise batch_size"
        )


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine similarity along the last axis, mean over the others; [..., D] each."""
    check_same_shape("cosine", student, teacher, remedy=REMEDY)
    return (1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)).mean()


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over all elements; [..., D] each."""
    check_same_shape("mse", student, teacher, remedy=REMEDY)
    return F.mse_loss(student.float(), teacher.detach().float())


def smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Mean Huber-like difference, quadratic below `beta` (in the features' unit); [..., D] each.

    Source: Girshick 2015, arXiv:1504.08083.
    """
    check_same_shape("smooth_l1", student, teacher, remedy=REMEDY)
    return F.smooth_l1_loss(student.float(), teacher.detach().float(), beta=beta)


def cosine_smooth_l1(student: Tensor, teacher: Tensor, *, beta: float = 1.0) -> Tensor:
    """Half `cosine`, half `smooth_l1`: direction and size at once; [..., D] each, the teacher's standardised.

    Source: UNIC, arXiv:2408.05088, section 3; also DUNE, arXiv:2503.14405.
    """
    return 0.5 * cosine(student, teacher) + 0.5 * smooth_l1(student, teacher, beta=beta)


def kl_logits(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    """KL(teacher || student) over softened class probabilities.

    Args:
        student: raw logits, [B, C].
        teacher: raw logits, [B, C]; receives no gradient.
        temperature: > 0, no unit; softens both sides.
    Returns:
        Scalar in nats, mean over B, times temperature**2 so the gradient scale does not shrink with it.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """
    check_same_shape("kl_logits", student, teacher, remedy="the student's head must have the teacher's num_classes")
    return _softmax_kl(student.float(), teacher.detach().float(), temperature) * temperature**2


def patch_similarity(student: Tensor, teacher: Tensor, *, temperature: float = 0.07) -> Tensor:
    """KL between the rows of both models' token Gram matrices; [B, P, D] each, the widths may differ.

    Each patch's cosine similarities to all patches of its image, softened by `temperature`; mean over B and P.
    Source: LightlyTrain distillationv3.
    """
    if student.shape[:-1] != teacher.shape[:-1]:
        raise UserError(
            f"patch_similarity: student {list(student.shape)} and teacher {list(teacher.shape)} have different "
            "batches or grids: resample the teacher's with align_teacher"
        )
    gram_s = _cosine_gram(student.float())  # [B, P, P]
    gram_t = _cosine_gram(teacher.detach().float())
    return _softmax_kl(gram_s.flatten(0, 1), gram_t.flatten(0, 1), temperature)


def similarity(student: Tensor, teacher: Tensor, *, temperature: float = 0.07) -> Tensor:
    """KL between each image's softened cosine similarities to the batch's other images; [B, D], B >= 3.

    CompRess and SEED compare with a queue of past images; here the batch is the whole set of anchors, so that the loss
    stays a pure function. Large batches make it sharper.
    Source: CompRess, arXiv:2010.14713; SEED, arXiv:2101.04731.
    """
    _check_batch("similarity", student, teacher)
    gram_s = _without_diagonal(_cosine_gram(student.float()))  # [B, B-1]
    gram_t = _without_diagonal(_cosine_gram(teacher.detach().float()))
    return _softmax_kl(gram_s, gram_t, temperature)


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """SmoothL1 between the batch's pairwise distances, each in units of its model's mean distance; [B, D], B >= 3.

    Source: Park et al. 2019, arXiv:1904.05068, section 3.2.1.
    """
    _check_batch("rkd_distance", student, teacher)
    return F.smooth_l1_loss(_relative_distances(student.float()), _relative_distances(teacher.detach().float()))


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """SmoothL1 between the cosines of the angles of all triplets of the batch; [B, D], B >= 3.

    Memory grows as B * B * (B + D) floats: 3 GB at B = 1024 and D = 768 before autograd's copies.
    Source: Park et al. 2019, arXiv:1904.05068, section 3.2.2.
    """
    _check_batch("rkd_angle", student, teacher)
    return F.smooth_l1_loss(_triplet_cosines(student.float()), _triplet_cosines(teacher.detach().float()))


def _softmax_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softmax(x / temperature) along the last axis; mean over the rows of [N, C]."""
    log_s = F.log_softmax(student / temperature, dim=-1)
    log_t = F.log_softmax(teacher / temperature, dim=-1)
    # batchmean: dividing by C as well would tie the loss weight to the class or patch count
    return F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)


def _cosine_gram(features: Tensor) -> Tensor:
    """Cosine similarities of the rows of [..., N, D] -> [..., N, N]."""
    unit = F.normalize(features, dim=-1)
    return unit @ unit.transpose(-1, -2)


def _without_diagonal(square: Tensor) -> Tensor:
    """[N, N] -> [N, N - 1]: an image's similarity to itself says nothing and would outweigh all the rest."""
    n = len(square)
    return square.flatten()[:-1].view(n - 1, n + 1)[:, 1:].reshape(n, n - 1)


def _relative_distances(features: Tensor) -> Tensor:
    # differences, not the matrix product: the latter loses all digits of the distance of two close points
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")  # [B, B]
    n = len(features)
    return distances / (distances.sum() / (n * (n - 1))).clamp(min=1e-12)


def _triplet_cosines(features: Tensor) -> Tensor:
    edges = F.normalize(features.unsqueeze(0) - features.unsqueeze(1), dim=-1)  # [B, B, D]
    return edges @ edges.transpose(1, 2)  # [B, B, B]


@dataclass(frozen=True)
class LossTerm:
    """A loss and the field of Features that it compares."""

    function: Callable[..., Tensor]
    field: str  # "pooled", "tokens" or "logits"

    @property
    def options(self) -> list[str]:
        """Names of the options it takes; each is a number above zero."""
        parameters = inspect.signature(self.function).parameters.values()
        return [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]


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
    "similarity": LossTerm(similarity, "pooled"),
    "rkd_distance": LossTerm(rkd_distance, "pooled"),
    "rkd_angle": LossTerm(rkd_angle, "pooled"),
    "kl_logits": LossTerm(kl_logits, "logits"),
}


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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def fields_needed(weights: Mapping[str, float]) -> set[str]:
    """The fields of Features that losses of non-zero weight compare; unknown names as in check_loss_names."""
    check_loss_names(weights)
    return {LOSSES[name].field for name, weight in weights.items() if weight}


def total_loss(
    student: Features,
    teacher: Features,
    weights: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Tensor]:
    """The weighted sum of the chosen losses, and each of them unweighted.

    Args:
        student: projected to the teacher's widths.
        teacher: on the student's grid; receives no gradient.
        weights: loss name -> weight; a weight of zero is not computed.
        options: loss name -> its options, e.g. {"kl_logits": {"temperature": 2}}.
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
                field = LOSSES[name].field
                pair = _field_of(student, field, name, "student"), _field_of(teacher, field, name, "teacher")
                terms[name] = LOSSES[name].function(*pair, **((options or {}).get(name) or {}))
        total = sum(weights[name] * term for name, term in terms.items())
    return {"loss": total} | {f"loss/{name}": term for name, term in terms.items()}


def _field_of(features: Features, field: str, loss: str, role: str) -> Tensor:
    value = getattr(features, field)
    if value is None:
        raise UserError(
            f"{loss} needs {field}, which the {role} does not give: take a teacher with a classifier, "
            f"or leave {loss} out of distill_loss_weights"
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
