"""The log of a run: rows of metrics.jsonl, and the same values in TensorBoard and Weights & Biases.

metrics.jsonl is the record; the other two show the same rows. A row is one JSON object with its kind: "train" and
"eval" from the trainer, "epoch" for the shards of an epoch, "start" for a new run, "resume" for every start from a
checkpoint, "end" for the way a process ended, if it had time to write one.
"""

import itertools
import json
import math
import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from distillery.system.console import format_field
from distillery.system.errors import UserError
from distillery.system.files import write_atomic

METRICS_NAME = "metrics.jsonl"
TENSORBOARD_NAME = "tensorboard"
WANDB_ID_NAME = "wandb_id.txt"
# rows that make curves: the others hold facts, and a plot of the number of images there are says nothing
CURVE_KINDS = ("train", "eval")
# the one number that stands for an eval row, the first of these that it has: every evaluation measures them
_QUALITIES = ("knn_top1", "knn_miou", "miou")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, in order; [] where there is none. A line that a kill left torn is no row."""
    return [row for _, row in _lines_with_rows(path)]


def _lines_with_rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and line.endswith(b"\n"):
            found.append((line, row))
    return found


def quality_of(row: dict[str, Any]) -> tuple[str, float] | None:
    """Name and value of the number that stands for an eval row; None where it has none."""
    return next(((name, row[name]) for name in _QUALITIES if row.get(name) is not None), None)


def plain_value(value: Any) -> Any:
    """A value as JSON can hold it: tensors and numpy numbers become numbers, NaN and infinities become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(name): plain_value(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value]
    return value


def pack_numbers(numbers: Iterable[int]) -> list[int | list[int]]:
    """Ascending whole numbers, runs of three and more as [first, last]: an epoch over all shards may name thousands."""
    packed: list[int | list[int]] = []
    for _, group in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        packed += [[run[0], run[-1]]] if len(run) > 2 else run
    return packed


def unpack_numbers(packed: list[int | list[int]]) -> list[int]:
    """What `pack_numbers` was given."""
    parts = (range(part[0], part[1] + 1) if isinstance(part, list) else [part] for part in packed)
    return list(itertools.chain.from_iterable(parts))


class RunLog:
    """Writes a run's metrics, on rank 0 only: elsewhere every method does nothing.

    Args:
        run_dir: the run folder; it must exist on rank 0.
        tensorboard: write event files into run_dir/tensorboard as well.
        wandb_project: Weights & Biases project, or None; the run's id is kept in the run folder, so that a resumed run
            goes on with the same curves.
        is_main: whether this process is rank 0.
    Raises:
        UserError: as import_wandb.
    """

    def __init__(self, run_dir: Path, *, tensorboard: bool, wandb_project: str | None, is_main: bool) -> None:
        self.run_dir, self.path = Path(run_dir), Path(run_dir) / METRICS_NAME
        self._is_main = is_main
        self._file = None
        self._writer = None
        self._wandb = None
        self._tensorboard = tensorboard and is_main
        self._purge_step: int | None = None
        self._evaluations: list[dict] | None = None
        if is_main and wandb_project is not None:
            self._wandb = self._open_wandb(wandb_project)

    def truncate_after(self, step: int) -> None:
        """Drop what a run that goes on from `step` will write again, and note that it went on.

        Train and eval rows of later steps go, the rows of epochs that begin at `step` or later, and a line torn by a
        kill; what happened to the run itself stays, byte for byte. The file is replaced atomically. The resume row says
        when the last row before it was written (stopped, Unix, s) and how many logged steps were lost.
        """
        if not self._is_main:
            return
        self._close_file()
        self._evaluations = None
        self._purge_step = step + 1
        found = _lines_with_rows(self.path)
        if self.path.exists():
            write_atomic(self.path, b"".join(line for line, row in found if not _is_repeated(row, step)))
        if step > 0:
            last = max((row.get("step", 0) for _, row in found if row.get("kind") == "train"), default=step)
            stopped = {"stopped": found[-1][1]["time"]} if found and "time" in found[-1][1] else {}
            self.write("resume", step=step, lost_steps=max(0, last - step), **stopped)

    def write(self, kind: str, **fields: Any) -> None:
        """Append one row, readable by others at once, with the time (Unix, s) unless `fields` has one.

        Args:
            kind: "train", "eval", or any other name.
            fields: the row; NaN and infinities are written as null. Numbers of train and eval rows go to TensorBoard
                and Weights & Biases too.
        """
        if not self._is_main:
            return
        row = {"kind": kind} | {name: plain_value(value) for name, value in fields.items()}
        row.setdefault("time", round(time.time(), 3))
        if self._file is None:
            self._file = self._open_file()
        self._file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if kind == "eval" and self._evaluations is not None:
            self._evaluations.append(row)
        scalars = _scalars(row)
        if kind in CURVE_KINDS and "step" in row and scalars:
            self._write_tensorboard(scalars, row["step"])
            if self._wandb is not None:
                self._wandb.log(scalars | {"step": row["step"]})

    def write_epoch(self, epoch: int, step: int, **fields: Any) -> None:
        """Append the row of an epoch that begins at `step`, once: a run resumed in its middle comes by again."""
        rows = read_rows(self.path) if self._is_main else []
        if not any(row.get("kind") == "epoch" and (row["epoch"], row["step"]) == (epoch, step) for row in rows):
            self.write("epoch", epoch=epoch, step=step, **fields)

    def write_end(self, step: int, reason: str) -> None:
        """Append how this process ends, unless the last one ended so at the same step and did nothing since."""
        last = (read_rows(self.path) if self._is_main else [])[-1:]
        if [(row.get("kind"), row.get("step"), row.get("reason")) for row in last] != [("end", step, reason)]:
            self.write("end", step=step, reason=reason)

    def write_image(self, name: str, pixels: Any, step: int) -> None:
        """Show an image in TensorBoard: uint8 [H, W, 3], a numpy array or tensor."""
        if (writer := self._tensorboard_writer()) is not None:
            writer.add_image(name, pixels, step, dataformats="HWC")
            writer.flush()

    def write_histograms(self, tensors: dict[str, Any], step: int) -> None:
        """Show the values of tensors (name -> tensor) as histograms in TensorBoard."""
        if (writer := self._tensorboard_writer()) is not None:
            for name, values in tensors.items():
                writer.add_histogram(name, values, step)
            writer.flush()

    def best_step(self, steps: Collection[int]) -> int | None:
        """Which of these steps has the student's eval rows with the highest mean quality_of over data sets, or None.

        The mean is over the data sets of the newest step, and only the steps that have all of them count.
        """
        if self._evaluations is None:  # read once: every checkpoint needs it
            rows = read_rows(self.path) if self._is_main else []
            self._evaluations = [row for row in rows if row.get("kind") == "eval"]
        rows = [row for row in self._evaluations if row.get("model") == "student"]
        newest = max((row["step"] for row in rows), default=None)
        values: dict[int, dict[str, float]] = {}
        for row in rows:
            if (found := quality_of(row)) is not None and row["step"] in steps:
                values.setdefault(row["step"], {})[row.get("dataset")] = found[1]
        sets = {row.get("dataset") for row in rows if row["step"] == newest} & set().union(*values.values())
        sums = {step: sum(map(found.get, sets)) for step, found in values.items() if sets <= found.keys()}
        return max(sums, key=sums.get, default=None)

    def close(self) -> None:
        """Flush and close everything; a later write opens it again."""
        self._close_file()
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def _open_file(self) -> Any:
        file = open(self.path, "ab+")  # noqa: SIM115 - stays open from row to row
        # a kill may have torn the last line: the next row must not be glued to it
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                file.write(b"\n")
        return file

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _tensorboard_writer(self) -> Any:
        """TensorBoard's writer, None where it is off or on other ranks."""
        if self._tensorboard and self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # events of later steps are left over from before the resume; without this they would show as a zigzag
            self._writer = SummaryWriter(str(self.run_dir / TENSORBOARD_NAME), purge_step=self._purge_step)
        return self._writer

    def _write_tensorboard(self, scalars: dict[str, float], step: int) -> None:
        if (writer := self._tensorboard_writer()) is not None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            writer.flush()

    def _open_wandb(self, project: str) -> Any:
        wandb = import_wandb(project)
        id_path = self.run_dir / WANDB_ID_NAME
        if not id_path.exists():
            write_atomic(id_path, uuid.uuid4().hex[:12].encode() + b"\n")
        run = wandb.init(
            project=project,
            id=id_path.read_text().strip(),
            name=self.run_dir.name,
            dir=str(self.run_dir),
            resume="allow",
        )
        # its own counter only ever grows, and would drop what a resumed run repeats
        run.define_metric("*", step_metric="step")
        return run


def _is_repeated(row: dict[str, Any], step: int) -> bool:
    """Whether a run that goes on from `step` writes this row again."""
    if row.get("kind") == "epoch":
        return row.get("step", 0) >= step
    return row.get("kind") in CURVE_KINDS and row.get("step", 0) > step


def _scalars(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row under the names they have in TensorBoard: train/loss, eval/<dataset>/<model>/knn_top1."""
    if row["kind"] == "eval":
        prefix = f"eval/{row.get('dataset', 'data')}/{row.get('model', 'student')}"
    else:
        prefix = row["kind"]
    return {
        f"{prefix}/{name}": value
        for name, value in row.items()
        if name not in ("step", "time") and isinstance(value, int | float) and not isinstance(value, bool)
    }


def import_wandb(project: str) -> Any:
    """Import the package that wandb_project needs.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            f"wandb_project is {project!r}, and the package wandb is not installed. "
            "Run: pip install wandb, or set wandb_project: null"
        ) from error
    return wandb


def training_fields(row: dict[str, float]) -> dict[str, object]:
    """What a train row says on the console: loss, learning rate, images/s, where the time went (per cent)."""
    names = ("data_wait_fraction", "teacher_fraction", "student_fraction", "optimizer_fraction")
    shares = "/".join(f"{100 * row[name]:.0f}" for name in names)
    return {
        "loss": row["loss"],
        "lr": row["lr"],
        "images/s": row["images_per_second"],
        "data/teacher/student/optimizer": f"{shares} %",
    }


def epoch_line(epoch: int, num_epochs: int, step: int, rows: Sequence[dict[str, float]]) -> str:
    """One line about an epoch, from its train rows (mean over them; the last learning rate).

    epoch: how many are done; step: the last one; rows: [] where none was logged.
    """
    text = f"epoch {epoch} of {num_epochs}: step {step:,}"
    if not rows:
        return text
    # not every row has every loss: in a hybrid run, steps that take stored outputs may have fewer
    common = [name for name in rows[-1] if all(name in row for row in rows)]
    mean = {name: sum(row[name] for row in rows) / len(rows) for name in common}
    fields = training_fields(mean | {"lr": rows[-1]["lr"]})
    return " | ".join([text, *(f"{name} {format_field(value)}" for name, value in fields.items())])
