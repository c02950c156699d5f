"""The row of metrics.jsonl of a model on an evaluation set with labels: k-NN, probes, and the teacher beside it.

A student is measured in two spaces: by its own features, and in its teacher's space, where its head's outputs stand
for the teacher's features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillery.evaluate import measures
from distillery.evaluate.features import batches_of, extract_features
from distillery.evaluate.linear import Probe, few_shot_measures, fit_probe
from distillery.losses.targets import Targets
from distillery.models.backbone import Features
from distillery.reading.datasets import LabelledBatches
from distillery.system.errors import UserError

# the numbers of neighbours that a row has beside the run's own
CALIBRATION_KS = (1, 5, 20)
# rows of the label-free comparison with the teacher: overlap@10 depends on their number, so it is fixed
MAX_COMPARED_ROWS = 5000

Labelled = tuple[Tensor, Tensor]  # features float32 [N, D] and labels int64 [N], on the CPU


@dataclass(frozen=True)
class Measured:
    """What was found of a model's features of both splits.

    predicted: int64 [M], what its k-NN says of the test rows with a label; probe: fitted on all training rows that have
    one, None where it was not asked for; row: the fields of metrics.jsonl.
    """

    predicted: Tensor
    probe: Probe | None
    row: dict[str, Any]


@dataclass(frozen=True)
class TeacherFeatures:
    """A teacher's features of the rows of both splits, float32 [N, Dt] and [M, Dt], and the probe fitted on them."""

    train_x: Tensor
    test_x: Tensor
    probe: Probe | None = None

    def with_probe(self, train_y: Tensor, device: torch.device | str) -> "TeacherFeatures":
        """The same with its probe, fitted where it is not there yet."""
        if self.probe:
            return self
        return replace(self, probe=fit_probe(*labelled(self.train_x, train_y), device=device))


def labelled(x: Tensor, y: Tensor) -> Labelled:
    """The rows of features [N, D] and labels [N] that have a label."""
    return (x, y) if (y >= 0).all() else (x[y >= 0], y[y >= 0])


class WithHead(nn.Module):
    """A backbone and its head for the pooled feature, in one pass: [B, D + Dt].

    Args:
        backbone: images -> Features.
        head: pooled -> what the run trains it towards: the teacher's feature, standardised where the run does so.
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Own feature and head's output of images [B, 3, H, W], float32, beside each other."""
        pooled = self.backbone(images).pooled
        return torch.cat([pooled.float(), self.head(pooled).float()], dim=1)


def to_teacher_space(outputs: Tensor, targets: Targets) -> Tensor:
    """A head's outputs [N, Dt] in the units of the teacher's own features: as losses.teacher_space folds a head.

    Here the head itself is not changed: its outputs may come from arithmetic in bfloat16, and the teacher's mean would
    be rounded with them.
    """
    matrix, mean = targets.way_back("pooled")
    return (outputs.double() @ matrix + mean).float()


def to_targets(features: Tensor, targets: Targets) -> Tensor:
    """The teacher's features [N, Dt] as what a head is trained towards."""
    device = next(targets.buffers(), features).device
    return targets.standardise(Features(features.to(device), None, (0, 0))).pooled.cpu()


def evaluate_features(
    train: Labelled, test: Labelled, *, k: int = 20, linear: bool = False, device: torch.device | str = "cpu"
) -> Measured:
    """What a row of metrics.jsonl says about one model's features on one data set.

    Args:
        train: the bank of the k-NN and the probes' training rows, [N, D] and [N]; rows without a label (negative) are
            left out.
        test: of the same model, [M, D] and [M]; likewise.
        k: neighbours.
        linear: fit linear probes too, on all training rows and on a few of each class (seconds to minutes).
        device: where the measures are computed.
    Returns:
        A row with knn_top1, knn_top1_k1, knn_top1_k5, knn_top1_k20; linear_top1, None where not computed, and with it
        linear_top1_1shot, linear_top1_1shot_std and so on; feature_std and effective_rank of the test rows; collapsed:
        what these two say. Accuracies are in 0..1.
    Raises:
        UserError: no row of a split has a label.
        FloatingPointError: a feature is not finite.
    """
    for part, (x, y) in (("train", train), ("test", test)):
        if not (y >= 0).any():
            raise UserError(
                f"evaluation: none of the {len(y):,} images of the {part} split has a label; choose a split that has "
                "labels"
            )
        check_finite(x, part)
    train, test = labelled(*train), labelled(*test)
    on_device = test[0].to(device)
    std, rank = measures.feature_std(on_device), measures.effective_rank(on_device)
    predicted = measures.knn_predictions(*train, test[0], ks={*CALIBRATION_KS, k}, device=device)
    probe = fit_probe(*train, device=device) if linear else None
    row = {
        "knn_top1": measures.accuracy(predicted[k], test[1]),
        **{f"knn_top1_k{other}": measures.accuracy(predicted[other], test[1]) for other in CALIBRATION_KS},
        "linear_top1": probe and probe.top1(*test, device),
        **(few_shot_measures(train, test, device) if linear else {}),
        "feature_std": std,
        "effective_rank": rank,
        "collapsed": measures.is_collapsed(std, rank),
    }
    return Measured(predicted[k], probe, row)


def evaluate_on_folders(
    model_fn: Callable[[Tensor], Any],
    train: Path,
    test: Path,
    *,
    k: int = 20,
    linear: bool = False,
    device: torch.device | str = "cpu",
    precision: str = "fp32",
) -> dict[str, Any]:
    """The row of `evaluate_features` of a model on the caches of a set's two splits.

    precision: as of extract_features.
    """
    splits = (
        extract_features(model_fn, batches_of(LabelledBatches, folder, device), device, precision=precision)
        for folder in (train, test)
    )
    return evaluate_features(*splits, k=k, linear=linear, device=device).row


def check_finite(x: Tensor, part: str) -> None:
    """FloatingPointError where one of the features [N, D] of a split is not finite."""
    if not x.isfinite().all():
        raise FloatingPointError(f"evaluation: {int((~x.isfinite().all(dim=1)).sum())} {part} features not finite")


def compare_with_teacher(
    student_x: Tensor,
    teacher_x: Tensor,
    outputs: Tensor | None = None,
    targets: Targets | None = None,
    *,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """How far a student agrees with its teacher on the same images, without labels; all are 1 for the teacher itself.

    Args:
        student_x: the student's own features, [N, D]; the first 5,000 rows are compared.
        teacher_x: the teacher's, [N, Dt].
        outputs: the head's, [N, Dt], where there is a head.
        targets: with the statistics that the head is trained with; with `outputs`.
        device: where the measures are computed.
    Returns:
        teacher_cosine (of the head's outputs and their targets; None without a head), cka, neighbour_overlap; with a
        head also cosine_in_teacher_space and cka_in_teacher_space.
    """
    student_x, teacher_x = (features[:MAX_COMPARED_ROWS].to(device) for features in (student_x, teacher_x))
    row = {
        "teacher_cosine": None,
        "cka": measures.linear_cka(student_x, teacher_x),
        "neighbour_overlap": measures.neighbour_overlap(student_x, teacher_x, device=device),
    }
    if outputs is None:
        return row
    outputs = outputs[:MAX_COMPARED_ROWS]
    in_space = to_teacher_space(outputs, targets).to(device)
    return row | {
        "teacher_cosine": measures.mean_cosine(outputs, to_targets(teacher_x, targets)),
        "cosine_in_teacher_space": measures.mean_cosine(in_space, teacher_x),
        "cka_in_teacher_space": measures.linear_cka(in_space, teacher_x),
    }


def measure_in_teacher_space(
    in_space: Tensor,
    teacher: TeacherFeatures,
    train_y: Tensor,
    test_y: Tensor,
    *,
    k: int,
    linear: bool,
    device: torch.device | str,
) -> dict[str, Any]:
    """How a student does in its teacher's place: what was made with the teacher's features is not made anew.

    Args:
        in_space: the student's test features in the teacher's space, [M, Dt].
        teacher: its features; with its probe where `linear`.
        train_y: labels of the bank, [N].
        test_y: [M].
        k: neighbours.
        linear: whether the probe that was fitted on the teacher's features is applied.
        device: where the measures are computed.
    Returns:
        knn_top1_in_teacher_bank and, where `linear`, linear_top1_on_teacher_probe, in 0..1.
    """
    check_finite(in_space, "test")
    bank, queries = labelled(teacher.train_x, train_y), labelled(in_space, test_y)
    row = {"knn_top1_in_teacher_bank": measures.knn_top1(*bank, *queries, k=k, device=device)}
    if linear:
        row["linear_top1_on_teacher_probe"] = teacher.probe.top1(*queries, device)
    return row
