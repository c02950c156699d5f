"""Evaluate the models of a run side by side: the teacher, the untrained student and each checkpoint."""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillery.config.load import Configs
from distillery.evaluate.columns import COLUMNS, STUDENT, STUDENT_EMA, TEACHER, UNTRAINED, format_cell
from distillery.evaluate.features import (
    compare_with_teacher,
    evaluate_features,
    extract_features,
    labelled_batches,
)
from distillery.models.configured import choose_precision
from distillery.models.weights import weights_hash
from distillery.system.errors import UserError
from distillery.system.files import expand_path
from distillery.training.build import build_models, eval_folders
from distillery.training.checkpoints import latest_checkpoint, load_checkpoint


@dataclass(frozen=True)
class Candidate:
    """One row of the table. own: images -> its own Features; aligned: -> Features in the teacher's widths, or None."""

    model: str
    own: Callable[[Tensor], Any]
    aligned: Callable[[Tensor], Any] | None = None
    step: int | None = None
    checkpoint: str | None = None

    @property
    def label(self) -> str:
        """Its name for the console."""
        return self.model if self.step is None else f"{self.model} at step {self.step}"


def load_candidates(
    configs: Configs, checkpoints: list[Path], device: torch.device
) -> tuple[Candidate, Callable, Iterator[Candidate]]:
    """A run's models, built as the trainer builds them.

    Args:
        configs: the run's.
        checkpoints: files of the run.
        device: where the models go.
    Returns:
        the teacher; the targets it sets (images -> Features, standardised where the run does so); and the untrained
        student, then each checkpoint's student and its EMA: these share one module, so each is valid until the next.
    Raises:
        UserError: a student was trained towards a teacher of other weights.
    """
    teacher, student = build_models(configs, device)
    _check_teacher(teacher.backbone.model, checkpoints)
    aligned = student if "pooled" in student.heads else None  # without a loss on pooled features there is no such head

    def candidates() -> Iterator[Candidate]:
        yield Candidate(UNTRAINED, student.student)
        for path in checkpoints:
            state = load_checkpoint(path)
            if state.get("target_statistics"):
                teacher.load_statistics(state["target_statistics"])
            student.heads.load_state_dict(state["heads"])
            for name, weights in ((STUDENT, state["student"]), (STUDENT_EMA, state.get("ema"))):
                if weights is not None:
                    student.student.model.load_state_dict(weights)
                    yield Candidate(name, student.student, aligned, state["progress"]["step"], str(path))

    return Candidate(TEACHER, teacher.backbone), teacher, candidates()


def _check_teacher(teacher: torch.nn.Module, checkpoints: list[Path]) -> None:
    """Raise UserError unless the students were trained towards a teacher of these weights."""
    now = weights_hash(teacher)
    for path in checkpoints:
        trained = load_checkpoint(path).get("teacher_hash")
        if trained not in (None, now):
            raise UserError(
                f"{path}: its student was trained towards a teacher of other weights ({trained}) than there are now "
                f"({now}). Put the teacher's files (teacher_name, teacher_repo, teacher_checkpoint) back."
            )


def evaluate_candidate(
    candidate: Candidate,
    folders: tuple[Path, Path],
    reference: tuple[dict[str, Any], Tensor] | None = None,
    targets: Callable[[Tensor], Any] | None = None,
    *,
    k: int,
    linear: bool,
    device: torch.device,
    precision: str,
) -> tuple[dict[str, Any], Tensor]:
    """One row of `evaluate_run`, and the candidate's test features.

    Args:
        candidate: the model.
        folders: caches of the train and test split.
        reference: the teacher's own row and test features; None for the teacher itself.
        targets: what the student is trained towards, images -> Features.
        k: neighbours.
        linear: fit the linear probe.
        device: where the models run.
        precision: as extract_features.
    """

    def extract(model: Callable[[Tensor], Any], folder: Path) -> tuple[Tensor, Tensor]:
        return extract_features(model, labelled_batches(folder, device), device, precision=precision)

    train, test = (extract(candidate.own, folder) for folder in folders)
    measured = evaluate_features(*train, *test, k=k, linear=linear, device=device)
    teacher_row, teacher_x = reference or (measured, test[0])
    aligned = []
    if candidate.aligned is not None:
        for model in (candidate.aligned, targets):
            aligned.append(extract(model, folders[1])[0])
    row = {"model": candidate.model, "step": candidate.step, "checkpoint": candidate.checkpoint}
    agreement = compare_with_teacher(test[0], teacher_x, *aligned, device=device)
    return row | with_shares(measured, teacher_row) | agreement, test[0]


def evaluate_run(
    configs: Configs, checkpoints: list[Path], device: torch.device, *, linear: bool = True
) -> list[dict[str, Any]]:
    """Evaluate a run's models on all of its evaluation sets.

    Args:
        configs: the run's.
        checkpoints: files of the run.
        device: where the models run.
        linear: fit linear probes.
    Returns:
        One row per data set and model: the fields of `evaluate_features`, those of `compare_with_teacher`, and
        knn_share, linear_share, rank_share: the figure as a share of the teacher's.
    """
    folders = eval_folders(configs.data)
    if not folders:
        raise UserError(
            "this run's data configuration has no eval_datasets. Add one to the run's config.yaml, "
            "and run stage 1 with the same entry to cache it."
        )
    teacher, targets, students = load_candidates(configs, checkpoints, device)
    precision = choose_precision(configs.train.precision, device)
    options = {"k": configs.train.knn_k, "linear": linear, "device": device, "precision": precision}
    references: dict[str, tuple[dict[str, Any], Tensor]] = {}
    rows: dict[str, list[dict[str, Any]]] = {dataset: [] for dataset in folders}
    for candidate in itertools.chain([teacher], students):
        for dataset, parts in folders.items():
            print(f"{dataset}: {candidate.label}", file=sys.stderr, flush=True)
            row, test_x = evaluate_candidate(candidate, parts, references.get(dataset), targets, **options)
            rows[dataset].append({"dataset": dataset} | row)
            if candidate is teacher:
                references[dataset] = (row, test_x)
    # the teacher is evaluated first and shown last
    return [row for of_dataset in rows.values() for row in (*of_dataset[1:], of_dataset[0])]


def with_shares(measured: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """A model's measures with their share of the teacher's."""
    shares = {}
    for share, name in (("knn_share", "knn_top1"), ("linear_share", "linear_top1"), ("rank_share", "effective_rank")):
        shares[share] = measured[name] / teacher[name] if measured[name] is not None and teacher[name] else None
    return measured | shares


def find_checkpoints(run_dir: Path, given: list[Path] | None) -> list[Path]:
    """The checkpoints to evaluate: those given, else the newest complete one.

    Raises:
        UserError: the run has none.
    """
    if given:
        return [expand_path(path) for path in given]
    latest = latest_checkpoint(run_dir)
    if latest is None:
        raise UserError(
            f"{run_dir} has no complete checkpoint. Start distill_trainer.py, or name one: --checkpoint PATH"
        )
    return [latest]


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `evaluate_run` as text, one block per data set, with a warning for collapsed features."""
    labels = [row["model"] if row["step"] is None else f"{row['model']} @ {row['step']}" for row in rows]
    width = max(len(label) for label in labels)
    widths = [max(10, len(title)) for _, title, _ in COLUMNS]
    lines: list[str] = []
    dataset = None
    for row, label in zip(rows, labels, strict=True):
        if row["dataset"] != dataset:
            dataset = row["dataset"]
            header = "".join(f"  {title:>{size}}" for (_, title, _), size in zip(COLUMNS, widths, strict=True))
            lines += [*([""] if lines else []), dataset, f"{'':{width}}{header}"]
        cells = [format_cell(row, name, form) for name, _, form in COLUMNS]
        line = label.ljust(width) + "".join(f"  {cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
        lines.append(f"{line}{'  COLLAPSED: features say nothing' if row['collapsed'] else ''}")
    return "\n".join(lines)
