"""Compute features of labelled images, and the row of metrics.jsonl that describes them."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillery.evaluate import measures
from distillery.models.backbone import eval_mode
from distillery.reading.datasets import load_labelled
from distillery.system.errors import UserError

BATCH_SIZE = 256
# rows of the label-free comparison with the teacher: overlap@10 depends on their number, so it is fixed
MAX_COMPARED_ROWS = 5000


def extract_features(
    model_fn: Callable[[Tensor], Any], batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """Image features of every row, in order.

    Args:
        model_fn: from normalised images [B, 3, H, W] on the device to [B, D], or to Features, whose pooled is taken. A
            module is put into eval mode for the time and then back into the mode it was in.
        batches: (images, labels) on any device; labels int64 [B].
        device: where the model is.
    Returns:
        features float32 [N, D] and labels int64 [N], on the CPU.
    Raises:
        UserError: there are no rows.
    """
    features, labels = [], []
    with torch.no_grad(), eval_mode(model_fn) if isinstance(model_fn, nn.Module) else nullcontext():
        for images, batch_labels in batches:
            out = model_fn(images.to(device, non_blocking=True))
            features.append(getattr(out, "pooled", out).float().cpu())
            labels.append(batch_labels.cpu())
    if not features:
        raise UserError("evaluation: the data set has no valid row; look at failures.jsonl of its cache")
    return torch.cat(features), torch.cat(labels)


def evaluate_features(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    linear: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """What a row of metrics.jsonl says about one model's features on one data set.

    Args:
        train_x: the bank of the k-NN and the probe's training rows, float32 [N, D].
        train_y: int64 [N].
        test_x: of the same model, [M, D].
        test_y: int64 [M].
        k: neighbours.
        linear: fit the linear probe too (seconds to minutes).
        device: where the k-NN is computed.
    Returns:
        knn_top1 and linear_top1 (None where not computed) in 0..1; feature_std and effective_rank of the test rows;
        collapsed: what these two say.
    Raises:
        UserError: a label is negative: a split without labels.
        FloatingPointError: a feature is not finite.
    """
    for part, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if y.min() < 0:
            raise UserError(f"evaluation: label {int(y.min())} in the {part} split; choose a split that has labels")
        if not x.isfinite().all():
            raise FloatingPointError(f"evaluation: {int((~x.isfinite().all(dim=1)).sum())} {part} features not finite")
    std, rank = measures.feature_std(test_x), measures.effective_rank(test_x)
    return {
        "knn_top1": measures.knn_top1(train_x, train_y, test_x, test_y, k=k, device=device),
        "linear_top1": measures.linear_top1(train_x, train_y, test_x, test_y) if linear else None,
        "feature_std": std,
        "effective_rank": rank,
        "collapsed": measures.is_collapsed(std, rank),
    }


def evaluate_on_folders(
    model_fn: Callable[[Tensor], Any],
    train: Path,
    test: Path,
    *,
    k: int = 20,
    linear: bool = False,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """`evaluate_features` of one model on the caches of an evaluation set's two splits."""
    train_x, train_y = extract_features(model_fn, load_labelled(train, BATCH_SIZE), device)
    test_x, test_y = extract_features(model_fn, load_labelled(test, BATCH_SIZE), device)
    return evaluate_features(train_x, train_y, test_x, test_y, k=k, linear=linear, device=device)


def compare_with_teacher(
    student_x: Tensor,
    teacher_x: Tensor,
    projected: Tensor | None = None,
    target: Tensor | None = None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """How far a student agrees with its teacher on the same images, without labels; all are 1 for the teacher itself.

    Args:
        student_x: the student's own features, [N, D]; the first 5,000 rows are compared.
        teacher_x: the teacher's, [N, Dt].
        projected: the student's after its head, [N, Dt], where there is a head.
        target: what it is trained towards, [N, Dt]: the teacher's, standardised where the run does so.
        device: where neighbours are searched.
    Returns:
        teacher_cosine (None without `projected`), cka, neighbour_overlap.
    """
    student_x, teacher_x = student_x[:MAX_COMPARED_ROWS], teacher_x[:MAX_COMPARED_ROWS]
    has_head = projected is not None and target is not None
    return {
        "teacher_cosine": measures.mean_cosine(projected, target) if has_head else None,
        "cka": measures.linear_cka(student_x, teacher_x),
        "neighbour_overlap": measures.neighbour_overlap(student_x, teacher_x, device=device),
    }
