"""The console table of python -m distillery.evaluate."""

from typing import Any

COLUMNS = (
    ("k-NN", "knn_top1", ".1%"),
    ("of teacher", "knn_share", ".0%"),
    ("linear", "linear_top1", ".1%"),
    ("rank", "effective_rank", ".1f"),
    ("std", "feature_std", ".2f"),
    ("cosine", "teacher_cosine", ".3f"),
    ("CKA", "cka", ".3f"),
    ("overlap@10", "neighbour_overlap", ".3f"),
)


def format_table(rows: list[dict[str, Any]]) -> str:
    """The rows of `evaluate_run` as text, one block per data set, with a warning for collapsed features."""
    labels = [row["model"] if row["step"] is None else f"{row['model']} @ {row['step']}" for row in rows]
    width = max(len(label) for label in labels)
    lines: list[str] = []
    dataset = None
    for row, label in zip(rows, labels, strict=True):
        if row["dataset"] != dataset:
            dataset = row["dataset"]
            header = "  ".join(f"{title:>10}" for title, _, _ in COLUMNS)
            lines += [*([""] if lines else []), dataset, f"{'':{width}}  {header}"]
        cells = "  ".join(
            f"{'-' if row[field] is None else format(row[field], spec):>10}" for _, field, spec in COLUMNS
        )
        lines.append(f"{label:{width}}  {cells}{'  COLLAPSED: features say nothing' if row['collapsed'] else ''}")
    return "\n".join(lines)
