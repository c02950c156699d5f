"""What a student lost against its teacher, class by class, and what it takes their images for: evaluation/NAME.json.

This file does not import torch: reports read it.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillery.cache.folder import load_index
from distillery.system.files import make_directory, write_atomic

if TYPE_CHECKING:
    from torch import Tensor

    from distillery.evaluate.sets import EvalSet

FOLDER = "evaluation"
MAX_CONFUSIONS, MAX_EXAMPLES = 20, 5


def compare_by_class(of: EvalSet, student: Tensor, teacher: Tensor, labels: Tensor, k: int) -> dict[str, Any]:
    """The content of evaluation/NAME.json, but for the student's step.

    Args:
        of: the set.
        student: what its k-NN says of the test rows that have a label, int64 [L].
        teacher: likewise.
        labels: of all test rows, int64 [M], negative where there is none.
        k: neighbours.
    Returns:
        `classes`, those of most loss first: class, name, images, student and teacher (accuracy in 0..1), difference
        (student minus teacher). `confusions`, the most frequent first: images that the teacher has right and the
        student takes for one other class; class, name, said, said_name, count, images (global_idx of a few in the
        cache of the test split).
    """
    student, teacher, labels = (of_rows.numpy() for of_rows in (student, teacher, labels))
    has_label = labels >= 0
    labels = labels[has_label]
    classes = []
    for number in np.unique(labels).tolist():
        rows = labels == number
        right, expected = (float((said[rows] == number).mean()) for said in (student, teacher))
        classes.append({
            "class": number, "name": of.name_of(number), "images": int(rows.sum()), "student": right,
            "teacher": expected, "difference": right - expected,
        })  # fmt: skip
    classes.sort(key=lambda entry: (entry["difference"], entry["class"]))
    lost = np.flatnonzero((teacher == labels) & (student != labels))
    counts = Counter(zip(labels[lost].tolist(), student[lost].tolist(), strict=True))
    confusions = []
    global_idx = global_indices(of.test)[has_label]
    for (number, said), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MAX_CONFUSIONS]:
        rows = lost[(labels[lost] == number) & (student[lost] == said)]
        confusions.append({
            "class": number, "name": of.name_of(number), "said": said, "said_name": of.name_of(said),
            "count": count, "images": global_idx[rows[:MAX_EXAMPLES]].tolist(),
        })  # fmt: skip
    return {
        "dataset": of.name, "test": identity_of(of.test), "k": k, "num_images": len(labels), "num_lost": len(lost),
        "classes": classes, "confusions": confusions,
    }  # fmt: skip


def identity_of(cache_dir: Path) -> str:
    """Which images a cache holds: what was found of others does not fit its rows."""
    index = load_index(cache_dir)
    return f"{index.num_samples} of {index.fingerprint}"


def global_indices(cache_dir: Path) -> np.ndarray:
    """global_idx of every valid row of a cache, int64 [M], in order."""
    from distillery.reading.datasets import CachedTensorDataset

    dataset = CachedTensorDataset(cache_dir)
    layouts = (dataset.rows.files.layout(shard) for shard in range(len(dataset.index.shard_names)))
    starts = dataset.index.shard_starts.tolist()
    return np.concatenate([start + np.flatnonzero(of.valid) for start, of in zip(starts, layouts, strict=True)])


def by_class_path(run_dir: Path, name: str) -> Path:
    """Where the comparison of an evaluation set is kept."""
    return run_dir / FOLDER / f"{name}.json"


def write_by_class(run_dir: Path, content: dict[str, Any]) -> None:
    """Write evaluation/NAME.json; a run folder that may only be read is no reason to lose the evaluation."""
    path = by_class_path(run_dir, content["dataset"])
    try:
        make_directory(path.parent)
        write_atomic(path, json.dumps(content, indent=1, allow_nan=False).encode() + b"\n")
    except OSError as error:
        print(f"{path}: the comparison by class was not written ({error.strerror})", file=sys.stderr)


def read_by_class(run_dir: Path, name: str) -> dict[str, Any] | None:
    """What was written of a set; None where nothing was, or where it cannot be read."""
    try:
        content = json.loads(by_class_path(run_dir, name).read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and {"classes", "confusions"} <= content.keys() else None
