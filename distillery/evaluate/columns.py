"""The columns of every table of results: the models and the figures. This file does not import torch."""

from collections.abc import Iterable, Sequence
from typing import Any

from distillery.training.log import quality_of

UNTRAINED, STUDENT, STUDENT_EMA, TEACHER = "untrained", "student", "student_ema", "teacher"
# name in a row -> name for people, in the order of a table
MODELS = {UNTRAINED: "untrained student", STUDENT: "student", STUDENT_EMA: "student (EMA)", TEACHER: "teacher"}
# (name in a row, title, format): a table shows those that one of its rows has
COLUMNS = (
    ("knn_top1", "k-NN", ".1%"),
    ("knn_share", "of teacher", ".0%"),
    ("knn_top1_in_teacher_bank", "teacher's bank", ".1%"),
    ("linear_top1", "linear probe", ".1%"),
    ("linear_top1_on_teacher_probe", "teacher's probe", ".1%"),
    ("zero_shot_top1", "zero-shot", ".1%"),
    ("miou", "mIoU", ".1%"),
    ("pixel_accuracy", "pixel accuracy", ".1%"),
    ("knn_miou", "k-NN mIoU", ".1%"),
    ("neighbour_overlap", "teacher overlap@10", ".3f"),
    ("cka", "teacher CKA", ".3f"),
    ("effective_rank", "effective rank", ".1f"),
)
# what a table has no room for, in one of its own
DETAILS = (
    ("linear_top1_1shot", "1-shot", ".1%"),
    ("linear_top1_5shot", "5-shot", ".1%"),
    ("linear_top1_10shot", "10-shot", ".1%"),
    ("knn_top1_k1", "k-NN, k 1", ".1%"),
    ("knn_top1_k5", "k 5", ".1%"),
    ("knn_top1_k20", "k 20", ".1%"),
    ("teacher_cosine", "teacher cosine", ".3f"),
    ("cosine_in_teacher_space", "cosine in its space", ".3f"),
    ("cka_in_teacher_space", "CKA in its space", ".3f"),
    ("feature_std", "feature std", ".2f"),
)


def title_of(name: str) -> str:
    """What people call a figure of COLUMNS."""
    return next(title for column, title, _ in COLUMNS if column == name)


def columns_of(rows: Iterable[dict[str, Any]], offered: Sequence[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Those of COLUMNS or DETAILS that at least one of the rows has a number of."""
    rows = list(rows)
    return [column for column in offered if any(isinstance(row.get(column[0]), int | float) for row in rows)]


def names_of(models: Iterable[str]) -> list[str]:
    """The names for people of some of MODELS."""
    return [MODELS[model] for model in models]


def format_cell(row: dict[str, Any], name: str, form: str) -> str:
    """A figure of a row as text; - where there is none."""
    value = row.get(name)
    if not isinstance(value, int | float):
        return "-"
    deviation = row.get(f"{name}_std")
    return format(value, form) + (f" ±{100 * deviation:.1f}" if isinstance(deviation, int | float) else "")


def headline(row: dict[str, Any]) -> str:
    """The number that stands for a row, with its name."""
    found = quality_of(row)
    return "no figure" if found is None else f"{title_of(found[0])} {found[1]:.1%}"
