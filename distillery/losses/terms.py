"""The loss functions: pure functions of the student's and the teacher's features. The teacher gets no gradient.

Every function computes in float32, whatever the dtype of its arguments. Every loss is zero where the student
equals the teacher, but `barlow`, and `similarity_queue` with two different temperatures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from distillery.system.errors import UserError

# of a loss between the images of a batch: two are one pair, whose normalised distance is a constant, the gradient zero;
# registry.py, which imports no torch, states the same number as least_batch
LEAST_BATCH = 3


def check_same_shape(name: str, student: Tensor, teacher: Tensor, *, remedy: str) -> None:
    """Refuse two tensors that do not match: broadcasting or cutting would compare unlike things in silence.

    Raises:
        UserError: the shapes differ.
    """
    if student.shape != teacher.shape:
        raise UserError(f"{name}: student {list(student.shape)} and teacher {list(teacher.shape)} differ: {remedy}")


REMEDY = "project the student to the teacher's width (StudentWithHeads) and resample the grid (align_teacher)"


def _check_batch(name: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape[:-1] != teacher.shape[:-1] or len(student) < LEAST_BATCH:
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
    student, teacher = student.float(), teacher.float()  # once for both
    return 0.5 * (cosine(student, teacher) + smooth_l1(student, teacher, beta=beta))


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


def similarity_queue(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor | None = None,
    *,
    student_temperature: float = 0.04,
    teacher_temperature: float = 0.04,
) -> Tensor:
    """KL between each image's softened cosine similarities to past teacher features; [B, D] each.

    Args:
        student: projected to the teacher's width.
        teacher: receives no gradient.
        queue: teacher features of earlier batches, [K, D] (EmbeddingQueue); None or empty, as in a run's first step:
            the other images of the batch, of which there must be 3 or more.
        student_temperature: > 0, no unit; SEED has 0.2.
        teacher_temperature: likewise; SEED has 0.01. Where the two differ, the loss is not zero at student = teacher.
    Source: CompRess, arXiv:2010.14713 (both 0.04, 128,000 anchors); SEED, arXiv:2101.04731.
    """
    check_same_shape("similarity_queue", student, teacher, remedy=REMEDY)
    is_empty = queue is None or not len(queue)
    if is_empty:
        _check_batch("similarity_queue", student, teacher)
    anchors = F.normalize((teacher if is_empty else queue).detach().float(), dim=-1)
    similarity_s = F.normalize(student.float(), dim=-1) @ anchors.T  # [B, K]
    similarity_t = F.normalize(teacher.detach().float(), dim=-1) @ anchors.T
    if is_empty:
        similarity_s, similarity_t = _without_diagonal(similarity_s), _without_diagonal(similarity_t)
    return _softmax_kl(similarity_s / student_temperature, similarity_t / teacher_temperature, 1.0)


def barlow(student: Tensor, teacher: Tensor, *, off_diagonal: float = 5e-3) -> Tensor:
    """Squared distance of the channels' cross-correlation from the identity, over D; [B, D] each, B >= 3.

    The student's features are of one view of the images, the teacher's of another. Every channel is brought to mean 0
    and deviation 1 over the batch (of this process). The weight does not depend on the width: the paper's sum is
    divided by D. Never quite zero: the frozen teacher's own channels correlate.

    Args:
        student: projected to the teacher's width.
        teacher: receives no gradient.
        off_diagonal: > 0, no unit; the weight of the squared correlations of unlike channels.
    Source: Zbontar et al. 2021, arXiv:2103.03230, equations 1 and 2.
    """
    check_same_shape("barlow", student, teacher, remedy=REMEDY)
    _check_batch("barlow", student, teacher)
    unit_s, unit_t = (F.batch_norm(x.float(), None, None, training=True) for x in (student, teacher.detach()))
    correlation = unit_s.T @ unit_t / len(student)  # [D, D]
    diagonal = correlation.diagonal()
    others = correlation.square().sum() - diagonal.square().sum()
    return ((1 - diagonal).square().sum() + off_diagonal * others) / len(diagonal)


def layers(student: Sequence[Tensor], teacher: Sequence[Tensor], *, beta: float = 1.0) -> Tensor:
    """`cosine_smooth_l1` of each pair of intermediate layers, mean over the pairs; [B, P, D] each.

    Source: UNIC, arXiv:2408.05088, section 3, for the terms; FitNets, arXiv:1412.6550, for hints from inner layers.
    """
    if len(student) != len(teacher):
        raise UserError(f"layers: {len(student)} of the student, {len(teacher)} of the teacher: give as many of each")
    pairs = zip(student, teacher, strict=True)
    return torch.stack([cosine_smooth_l1(own, target, beta=beta) for own, target in pairs]).mean()


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
