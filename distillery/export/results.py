"""Tables of a model card: what a run's evaluations say about the weights that are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from distillery.evaluate.columns import STUDENT, STUDENT_EMA, TEACHER, UNTRAINED, format_cell
from distillery.evaluate.kept_rows import kept_rows
from distillery.training.log import METRICS_NAME, read_rows

# (name in a row, title, format)
_CLASSES = (
    ("knn_top1", "k-NN", ".1%"),
    ("linear_top1", "linear probe", ".1%"),
    ("linear_top1_1shot", "1-shot linear probe", ".1%"),
    ("linear_top1_5shot", "5-shot", ".1%"),
    ("linear_top1_10shot", "10-shot", ".1%"),
)
_SEGMENTS = (
    ("miou", "mIoU", ".1%"),
    ("pixel_accuracy", "pixel accuracy", ".1%"),
    ("knn_miou", "mIoU of k-NN", ".1%"),
)
# (name in the student's row, name in the teacher's or None, title, format)
_CLOSENESS = (
    ("cosine_in_teacher_space", None, "cosine with the teacher's features", ".3f"),
    ("cka_in_teacher_space", None, "CKA with them", ".3f"),
    ("knn_top1_in_teacher_bank", "knn_top1", "k-NN among the teacher's training features", ".1%"),
    ("linear_top1_on_teacher_probe", "linear_top1", "the teacher's linear probe", ".1%"),
)


def rows_of(run_dir: Path, step: int, weights: str) -> list[dict[str, Any]]:
    """The last evaluation of each model on each data set, where the student's is of the exported weights.

    Args:
        run_dir: the run.
        step: of the exported checkpoint.
        weights: "averaged" or "last".
    Returns:
        Rows of metrics.jsonl and of later evaluations, of data sets on which the student was measured.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    rows = [*read_rows(run_dir / METRICS_NAME), *kept_rows(run_dir)]
    for row in sorted(rows, key=lambda row: row.get("time", 0)):
        model = row.get("model")
        is_student = model in (STUDENT, STUDENT_EMA)
        if row.get("kind") != "eval" or not (is_student or model in (UNTRAINED, TEACHER)):
            continue
        # rows of earlier versions do not say: their student has the last weights
        of = row.get("weights") or ("averaged" if model == STUDENT_EMA else "last")
        if not is_student or (row.get("step"), of) == (step, weights):
            found[row.get("dataset"), STUDENT if is_student else model] = row
    measured = {dataset for dataset, model in found if model == STUDENT}
    order = [UNTRAINED, STUDENT, TEACHER]
    keys = sorted(found, key=lambda key: order.index(key[1]))
    return [found[key] for dataset in sorted(measured) for key in keys if key[0] == dataset]


def results(rows: list[dict[str, Any]]) -> str:
    """A table for classification and one for segmentation; '' without rows of either."""
    tables = [_table(rows, _CLASSES), _table(rows, _SEGMENTS)]
    protocols = dict.fromkeys(row["protocol"] for row in rows if row.get("protocol"))
    return "\n\n".join([*filter(None, tables), *protocols])


def _table(rows: list[dict[str, Any]], columns: tuple[tuple[str, str, str], ...]) -> str:
    """The rows that have a figure of these columns, and the columns that have one in a row."""
    columns = tuple(column for column in columns if any(row.get(column[0]) is not None for row in rows))
    rows = [row for row in rows if any(row.get(name) is not None for name, _, _ in columns)]
    if not rows:
        return ""
    titles = ["data set", "model", *(title for _, title, _ in columns)]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for row in rows:
        cells = [row.get("dataset"), row.get("model"), *(format_cell(row, name, form) for name, _, form in columns)]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def closeness(rows: list[dict[str, Any]]) -> str:
    """How close the student in its teacher's space is to the teacher, on test images; '' where it was not measured."""
    lines = ["| data set | measure | student | teacher |", "|---|---|---|---|"]
    teachers = {row.get("dataset"): row for row in rows if row.get("model") == TEACHER}
    for row in rows:
        if row.get("model") in (STUDENT, STUDENT_EMA):
            for name, of_teacher, title, form in _CLOSENESS:
                if row.get(name) is not None:
                    theirs = format_cell(teachers.get(row.get("dataset"), {}), of_teacher or "", form)
                    lines.append(f"| {row.get('dataset')} | {title} | {format_cell(row, name, form)} | {theirs} |")
    return "\n".join(lines) if len(lines) > 2 else ""
