"""Evaluate the models of a run side by side: the teacher, the untrained student and each checkpoint."""

import itertools
import sys
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from distillery.config.load import Configs
from distillery.evaluate.by_class import write_by_class
from distillery.evaluate.columns import (
    COLUMNS,
    DETAILS,
    STUDENT,
    STUDENT_EMA,
    TEACHER,
    UNTRAINED,
    columns_of,
    format_cell,
)
from distillery.evaluate.measuring import Measuring, Space, Subject
from distillery.evaluate.sets import EvalSet, eval_sets
from distillery.evaluate.teacher_features import TeacherStore
from distillery.evaluate.text import TextEmbeddings
from distillery.losses.registry import fields_needed
from distillery.losses.targets import FrozenTeacher
from distillery.models.configured import choose_precision
from distillery.system.errors import UserError
from distillery.system.files import expand_path
from distillery.training.build import build_models
from distillery.training.checkpoints import latest_checkpoint, load_checkpoint
from distillery.training.trained import check_teacher


@dataclass(frozen=True)
class Candidate:
    """One row of the table. step, checkpoint, weights ("last" or "averaged"): of a trained student."""

    subject: Subject
    step: int | None = None
    checkpoint: str | None = None
    weights: str | None = None

    @property
    def label(self) -> str:
        """Its name for the console."""
        return self.subject.name if self.step is None else f"{self.subject.name} at step {self.step}"


def load_candidates(
    configs: Configs, checkpoints: list[Path], device: torch.device, space: Space = "backbone"
) -> tuple[Candidate, FrozenTeacher, Iterator[Candidate]]:
    """A run's models, built as the trainer builds them.

    Args:
        configs: the run's.
        checkpoints: files of the run.
        device: where the models go.
        space: as of Subject.
    Returns:
        the teacher; the targets it sets; and the untrained student, then each checkpoint's student and its average:
        these share one module, so each is valid until the next.
    Raises:
        UserError: a student was trained towards a teacher of other weights.
    """
    # all at once: a run that is going on may delete its older files while the first models are measured
    states = {path: load_checkpoint(path) for path in checkpoints}
    for state in states.values():
        del state["optimizer"]  # twice the student's size
    teacher, student = build_models(configs, device)
    check_teacher(teacher.backbone, states)

    def load_statistics(state: dict[str, Any]) -> None:
        if state.get("target_statistics"):
            teacher.load_statistics(state["target_statistics"])

    if space == "teacher" and states:  # the untrained student needs them too
        load_statistics(next(iter(states.values())))

    def candidates() -> Iterator[Candidate]:
        # an untrained head says nothing, unless it is what is asked for
        yield Candidate(Subject(UNTRAINED, student.student, student.heads if space == "teacher" else {}, space))
        for path in checkpoints:
            state = states[path]
            load_statistics(state)
            own = (STUDENT, "last", state["student"], state["heads"])
            # runs of earlier versions averaged the backbone alone
            average = (STUDENT_EMA, "averaged", state.get("ema"), state.get("ema_heads") or state["heads"])
            for name, which, weights, heads in (own, average):
                if weights is not None:
                    student.student.model.load_state_dict(weights)
                    student.heads.load_state_dict(heads)
                    subject = Subject(name, student.student, student.heads, space)
                    yield Candidate(subject, state["progress"]["step"], str(path), which)

    return Candidate(Subject(TEACHER, teacher.backbone, space=space)), teacher, candidates()


def evaluate_run(
    configs: Configs,
    checkpoints: list[Path],
    device: torch.device,
    *,
    linear: bool = True,
    space: Space = "backbone",
    texts: TextEmbeddings | None = None,
    by_class_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Evaluate a run's models on all of its evaluation sets.

    Args:
        configs: the run's.
        checkpoints: files of the run.
        device: where the models run.
        linear: fit linear probes.
        space: "teacher": the student's features are those of its heads, in the units of the teacher's own.
        texts: embeddings of class names, for zero-shot accuracy.
        by_class_dir: run folder to write evaluation/NAME.json into, of the last student.
    Returns:
        One row per data set and model: the fields of Measuring.row; model, step, checkpoint, weights, space; and
        knn_share, linear_share, rank_share: the figure as a share of the teacher's.
    Raises:
        UserError: no evaluation sets, or what a set needs is not there.
    """
    sets = eval_sets(configs.data)
    if not sets:
        raise UserError(
            "this run's data configuration has no eval_datasets. Add one to the run's config.yaml, "
            "and run stage 1 with the same entry to cache it."
        )
    if texts is not None and all(of.is_segmentation for of in sets):
        raise UserError("--text_embeddings is for sets with labels; all eval_datasets of this run have masks")
    # mistakes are found before minutes of work
    for of in sets:
        if space == "teacher" or (texts is not None and not of.is_segmentation):
            _check_head(of, fields_needed(configs.train.distill_loss_weights))
        if texts is not None and of.class_names and not of.is_segmentation:
            texts.for_set(of, max(of.class_names) + 1)
    teacher, targets, students = load_candidates(configs, checkpoints, device, space)
    if texts is not None:
        texts.check_width(teacher.subject.backbone.pooled_width)
    measuring = Measuring(
        targets, lambda: teacher.subject.backbone, TeacherStore(None), k=configs.train.knn_k, device=device,
        precision=choose_precision(configs.train.precision, device), texts=texts,
    )  # fmt: skip
    rows: dict[str, list[dict[str, Any]]] = {of.name: [] for of in sets}
    for candidate in itertools.chain([teacher], students):
        for of in sets:
            print(f"{of.name}: {candidate.label}", file=sys.stderr, flush=True)
            is_kept = by_class_dir is not None and candidate.step is not None
            measured, by_class = measuring.row(of, candidate.subject, linear=linear, by_class=is_kept)
            facts = {"step": candidate.step, "checkpoint": candidate.checkpoint, "weights": candidate.weights}
            if by_class is not None:
                write_by_class(by_class_dir, by_class | {"step": candidate.step, "weights": candidate.weights})
            row = {"dataset": of.name, "model": candidate.subject.name, "space": space} | facts | measured
            rows[of.name].append(with_shares(row, rows[of.name][0] if rows[of.name] else row))
    # the teacher is evaluated first and shown last
    return [row for of_set in rows.values() for row in (*of_set[1:], of_set[0])]


def _check_head(of: EvalSet, fields: Container[str]) -> None:
    """UserError where the run has no head for what a set is measured on; fields: those that its losses compare."""
    field, what, loss = ("tokens", "patches", "patch") if of.is_segmentation else ("pooled", "pooled features", "cls")
    if field not in fields:
        raise UserError(
            f"{of.name}: this run has no head for {what} (no loss of its distill_loss_weights compares them; {loss} "
            "does): its student cannot take its teacher's place there. Use --space backbone, without --text_embeddings"
        )


def with_shares(measured: dict[str, Any], teacher: dict[str, Any]) -> dict[str, Any]:
    """A model's measures with their share of the teacher's."""
    shares: dict[str, float | None] = {}
    for share, name in (("knn_share", "knn_top1"), ("linear_share", "linear_top1"), ("rank_share", "effective_rank")):
        if name in measured:
            value, whole = measured[name], teacher[name]
            shares[share] = value / whole if value is not None and whole else None
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
    """The rows of `evaluate_run` as text, a block for each data set: the columns that it has, then further figures."""
    blocks = []
    for dataset, group in itertools.groupby(rows, key=lambda row: row["dataset"]):
        of_set = list(group)
        blocks.append([dataset, *_lines(of_set, COLUMNS)])
        if columns_of(of_set, DETAILS):
            blocks[-1] += ["", *_lines(of_set, DETAILS)]
        blocks[-1] += [row["protocol"] for row in of_set[:1] if row.get("protocol")]
    return "\n\n".join("\n".join(lines) for lines in blocks)


def _lines(rows: list[dict[str, Any]], offered: Any) -> list[str]:
    """A header and a line for each row; in the main table with a warning for collapsed features."""
    shown, warning = columns_of(rows, offered), "  COLLAPSED: features say nothing" if offered is COLUMNS else ""
    labels = [row["model"] if row["step"] is None else f"{row['model']} @ {row['step']}" for row in rows]
    width = max(len(label) for label in labels)
    widths = [max(10, len(title), *(len(format_cell(row, name, form)) for row in rows)) for name, title, form in shown]
    lines = [f"{'':{width}}" + "".join(f"  {title:>{size}}" for (_, title, _), size in zip(shown, widths, strict=True))]
    for row, label in zip(rows, labels, strict=True):
        cells = [format_cell(row, name, form) for name, _, form in shown]
        line = label.ljust(width) + "".join(f"  {cell:>{size}}" for cell, size in zip(cells, widths, strict=True))
        lines.append(f"{line}{warning if row.get('collapsed') else ''}")
    return lines
