"""The columns of every table of results: the models and the figures. This file does not import torch."""

from typing import Any

UNTRAINED, STUDENT, STUDENT_EMA, TEACHER = "untrained", "student", "student_ema", "teacher"
# name in a row -> name for people, in the order of a table
MODELS = {UNTRAINED: "untrained student", STUDENT: "student", STUDENT_EMA: "student (EMA)", TEACHER: "teacher"}
# (name in a row, title, format)
COLUMNS = (
    ("knn_top1", "k-NN", ".1%"),
    ("knn_share", "of teacher", ".0%"),
    ("linear_top1", "linear probe", ".1%"),
    ("neighbour_overlap", "teacher overlap@10", ".3f"),
    ("cka", "teacher CKA", ".3f"),
    ("teacher_cosine", "teacher cosine", ".3f"),
    ("effective_rank", "effective rank", ".1f"),
    ("feature_std", "feature std", ".2f"),
)


def format_cell(row: dict[str, Any], name: str, form: str) -> str:
    """A figure of a row as text; - where there is none."""
    value = row.get(name)
    return format(value, form) if isinstance(value, int | float) else "-"
