"""Rows that `python -m distillery.evaluate` measured after a run, for the card of an export: evaluation/rows.jsonl.

They are no part of metrics.jsonl: that is what the run itself wrote, and it is cut back where a run goes on.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from distillery.evaluate.by_class import FOLDER
from distillery.system.files import make_directory, write_atomic
from distillery.training.log import read_rows

# what a row is about: a later one of the same takes its place
_KEY = ("dataset", "model", "step", "weights")


def kept_rows(run_dir: Path) -> list[dict[str, Any]]:
    """The rows kept in a run folder; [] where there are none."""
    return read_rows(run_dir / FOLDER / "rows.jsonl")


def keep_rows(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows of `evaluate_run`, of the run's own checkpoints, with the time (Unix, s).

    A run folder that may only be read is no reason to lose the evaluation.
    """
    rows = [row | {"time": round(time.time(), 3)} for row in rows]
    found = {tuple(row.get(key) for key in _KEY): row for row in [*kept_rows(run_dir), *rows]}
    path = run_dir / FOLDER / "rows.jsonl"
    lines = (json.dumps({"kind": "eval"} | row, allow_nan=False) for row in found.values())
    try:
        make_directory(path.parent)
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    except OSError as error:
        print(f"{path}: not written ({error.strerror}): the card of an export will not have these", file=sys.stderr)
