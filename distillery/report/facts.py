"""Read the record of a run from its folder, finished or not, and put it into plain words."""

import itertools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distillery.config.load import dataset_label
from distillery.evaluate.columns import MODELS, TEACHER, headline
from distillery.report.style import datasets_of, is_number, of_kind
from distillery.system.errors import MissingFileError
from distillery.training.learning import explained_until, in_words
from distillery.training.log import CURVE_KINDS, METRICS_NAME, quality_of, read_rows

PLOTS_NAME = "plots"
# made where there are models (distillery/report/pictures.py), shown where there are none
PCA_NAME, NEIGHBOURS_NAME = "pca.png", "neighbours.png"
SHOWN_CLASSES = 15
PASSING_NOTE = (
    "Here the student scores above its teacher. That happens on narrow or easy data: the teacher's features describe "
    "far more than these images ask for, while the student was trained on these very images and kept what tells them "
    "apart. It does not make the student the better model elsewhere."
)


@dataclass
class RunRecord:
    """A run folder as read: the rows of its metrics and its configuration, whatever of them is there.

    plan: what rows of kind "start" say of the whole run (total_steps, num_images, global_batch_size,
    student_parameters, teacher_parameters), as far as there are any; shard_rows: images in each shard.
    """

    run_dir: Path
    rows: list[dict[str, Any]]
    config: dict[str, dict[str, Any]]
    num_shards: int | None
    plan: dict[str, Any] = field(default_factory=dict)
    shard_rows: list[int] | None = None

    @property
    def train_rows(self) -> list[dict[str, Any]]:
        """Rows of kind train."""
        return of_kind(self.rows, "train")

    @property
    def step(self) -> int:
        """The last step of a train or eval row: a run that was set back keeps no later ones of these."""
        rows = (row for row in self.rows if row.get("kind") in CURVE_KINDS)
        return max((row["step"] for row in rows if is_number(row.get("step"))), default=0)

    @property
    def total_steps(self) -> int | None:
        """Optimiser steps of the whole run, where the run's log has it."""
        return self.plan.get("total_steps")

    @property
    def is_finished(self) -> bool:
        """Whether the last step or the evaluation after the last epoch has been logged."""
        if self.total_steps:
            return self.step >= self.total_steps
        num_epochs = self.get("train", "num_epochs")
        return bool(num_epochs) and any(row.get("epoch") == num_epochs for row in of_kind(self.rows, "eval"))

    @property
    def resumes(self) -> list[dict[str, Any]]:
        """Every time the run went on from a checkpoint and then trained further."""
        last = self.train_rows[-1].get("time", 0) if self.train_rows else 0
        return [row for row in of_kind(self.rows, "resume") if row.get("time", 0) <= last]

    @property
    def interruptions(self) -> list[dict[str, Any]]:
        """For each of `resumes`: stopped (Unix, s), reason, step and time of the resume, lost_steps (None: unknown)."""
        found, resumes = [], self.resumes
        for before, row in itertools.pairwise(self.rows):
            if row.get("kind") != "resume" or row not in resumes:
                continue
            reason = before.get("reason") if before.get("kind") == "end" else None
            found.append(
                {
                    "stopped": row.get("stopped", before.get("time")),
                    "reason": reason or "not said: killed, or the machine went down",
                    "step": row["step"],
                    "time": row["time"],
                    "lost_steps": row.get("lost_steps"),
                }
            )
        return found

    @property
    def seconds(self) -> float:
        """Time spent training: from the first row to the last, without the pauses after an end and before resumes."""
        rows = [row for row in self.rows if is_number(row.get("time"))]
        steps = [(then, now) for then, now in itertools.pairwise(rows) if then["kind"] != "end"]
        return sum(max(0.0, now["time"] - then["time"]) for then, now in steps if now["kind"] != "resume")

    def get(self, section: str, key: str) -> Any:
        """A value of the configuration, None where it is not known."""
        return self.config.get(section, {}).get(key)

    def evaluation(self, dataset: str) -> dict[str, dict[str, Any]]:
        """model -> its last row on a data set, in the order of MODELS, with its k-NN as a share of the teacher's."""
        rows = [row for row in of_kind(self.rows, "eval") if row.get("dataset") == dataset]
        last = {model: found[-1] for model in MODELS if (found := [r for r in rows if r.get("model") == model])}
        whole = last.get(TEACHER, {}).get("knn_top1")
        if not is_number(whole) or not whole:
            return last
        shares = {model: row["knn_top1"] / whole for model, row in last.items() if is_number(row.get("knn_top1"))}
        return {model: row | {"knn_share": shares.get(model)} for model, row in last.items()}


def load_run(run_dir: Path) -> RunRecord:
    """Read what a run folder holds; every file in it may still be missing.

    Raises:
        MissingFileError: the folder is not there, or holds neither configuration nor metrics.
    """
    config_path, metrics_path, shards_path = (run_dir / name for name in ("config.yaml", METRICS_NAME, "shards.json"))
    if not config_path.exists() and not metrics_path.exists():
        raise MissingFileError(
            f"{run_dir} is not a run folder: neither config.yaml nor {METRICS_NAME} is in it. "
            "Give the checkpoint_dir of a run: python -m distillery.report RUN_DIR"
        )
    config = yaml.safe_load(config_path.read_text()) if config_path.exists() else {}
    frozen = json.loads(shards_path.read_bytes()) if shards_path.exists() else {}
    num_shards = len(frozen["shards"]) if "shards" in frozen else None
    rows = read_rows(metrics_path)
    plan: dict[str, Any] = {}
    for row in of_kind(rows, "start"):
        plan |= row
    return RunRecord(run_dir, rows, config or {}, num_shards, plan, frozen.get("rows"))


def confusions_name(dataset: str) -> str:
    """The picture of an evaluation set's worst confusions, in plots/."""
    return f"confusions_{dataset}.png"


def protocol_of(models: dict[str, dict[str, Any]]) -> str:
    """How a segmentation set was measured, in the words of the student's row; "" of a set with labels."""
    said = {model: row["protocol"] for model, row in models.items() if row.get("protocol")}
    return said.get("student") or next(iter(said.values()), "")


def class_ious(models: dict[str, dict[str, Any]]) -> list[tuple[int, list[float | None]]]:
    """(class, IoU of each model; None where not measured) of a segmentation set.

    Those on which the student is furthest below its teacher come first; classes that the test masks do not have are
    left out. Between the first evaluation and the last the student has those of k-NN, which do not stand beside the
    others' of a linear probe. [] without such rows.
    """
    is_by_knn = models.get("student", {}).get("miou") is None
    lists = [(row.get("class_iou") or []) if (row.get("miou") is None) == is_by_knn else [] for row in models.values()]
    found = []
    for number in range(max(map(len, lists), default=0)):
        values = [of[number] if number < len(of) and is_number(of[number]) else None for of in lists]
        if any(value is not None for value in values):
            found.append((number, values))
    places = [list(models).index(name) if name in models else None for name in ("student", "teacher")]

    def loss(entry: tuple[int, list[float | None]]) -> float:
        student, teacher = (None if place is None else entry[1][place] for place in places)
        return 0.0 if student is None or teacher is None else student - teacher

    return sorted(found, key=loss)


def passes_teacher(models: dict[str, dict[str, Any]]) -> bool:
    """Whether the student's k-NN accuracy (of patches: mIoU) is above its teacher's."""
    student, teacher = (quality_of(models.get(model, {})) for model in ("student", "teacher"))
    return None not in (student, teacher) and student[0] == teacher[0] and student[1] > teacher[1]


def summary_sentences(run: RunRecord) -> list[str]:
    """What was distilled into what, on how much data, what came out: in plain words."""
    sentences = []
    student, teacher = run.get("model", "student_name"), run.get("model", "teacher_name")
    if student and teacher:
        start = "with pretrained weights" if run.get("model", "student_pretrained") else "from scratch"
        sizes = [_parameters(run.plan.get(f"{side}_parameters")) for side in ("student", "teacher")]
        sentences.append(
            f"The student {student}{sizes[0]}, started {start}, is trained to produce the features that the teacher "
            f"{teacher}{sizes[1]} gives for the same images; no labels are used."
        )
    sentences += _data_sentences(run)
    shares = [f"{share:.0%} ({name})" for name, share in explained_until(run.rows, run.step).items()]
    if shares:
        sentences.append(f"On training images the student explains {in_words(shares)} of the variance of its targets.")
    for dataset in datasets_of(run.rows):
        sentences += _result_sentences(dataset, run.evaluation(dataset))
    return sentences or ["Nothing has been logged yet."]


def _parameters(count: int | None) -> str:
    return f" ({count / 1e6:.3g} M parameters)" if count else ""


def _data_sentences(run: RunRecord) -> list[str]:
    seen = images_seen(run)
    source = dataset_label(run.config.get("data", {}))
    if not seen:
        return [f"The images come from {source}."] if source else []
    num_images = run.plan.get("num_images")
    text = f"It has seen {seen:,} images" + (f" from {source}" if source else "")
    if not num_images:
        return [text + "."]
    text += f", {seen / num_images:.2g} times the {num_images:,} there are"
    if seen < num_images:
        text += f": at least {1 - seen / num_images:.0%} of them it has never seen"
    return [text + "."]


def images_seen(run: RunRecord) -> int:
    """Training images up to the last step, each view counted; 0 where the batch size is not known."""
    batch, accumulation = run.get("train", "batch_size"), run.get("train", "grad_accumulation_steps") or 1
    per_step = run.plan.get("global_batch_size") or (batch * accumulation if batch else 0)
    return run.step * per_step


def _result_sentences(dataset: str, models: dict[str, dict[str, Any]]) -> list[str]:
    found = {model: quality for model, row in models.items() if (quality := quality_of(row)) is not None}
    if "student" not in found:
        return []
    name, value = found["student"]
    values = {model: of_model for model, (measure, of_model) in found.items() if measure == name}
    text = f"On {dataset} its features classify {value:.1%} of the test images by k-NN"
    if name != "knn_top1":
        text = f"On {dataset} its patch features segment the test images with {headline(models['student'])}"
    before, teacher = values.get("untrained"), values.get("teacher")
    others = [f"{before:.1%} untrained"] if before is not None else []
    others += [f"{teacher:.1%} for the teacher"] if teacher is not None else []
    return [text + (f", against {' and '.join(others)}." if others else ".")]
