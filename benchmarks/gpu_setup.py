"""What the parts of benchmarks.gpu share: sizes, data made by stage 1, configurations, the trainer's own steps, clocks.

The lines that know how the engine is put together stand in Trainer, those that know a batch in images_and_rows.
"""

import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from data_loader import build_pretraining_dataloader
from distillery.config.load import Configs, load_configs
from distillery.models.configured import choose_device
from distillery.reading.loader import DevicePrefetcher
from distillery.system.errors import run_command
from distillery.system.signals import StopFlag
from distillery.teacher_cache.opening import open_teacher_cache
from distillery.training import build
from distillery.training.batches import StepLoader
from distillery.training.checkpoints import CheckpointWriter
from distillery.training.engine import batches_by_step, train_one_epoch, train_step
from distillery.training.run import compile_step, save
from distillery.training.task import Position

# a process is forked where nothing has touched CUDA yet: it then has torch and timm without importing them again
FORK = multiprocessing.get_context("fork")
for _module in ("distill_trainer", "precompute_cache", "distillery.evaluate.during", "distillery.training.run",
                "timm", "torch._dynamo", "torchvision", "huggingface_hub"):  # fmt: skip
    importlib.import_module(_module)
# data sets, each made by the real stage 1
IMAGES, FLOATS, OUTPUTS, LABELLED = "uint8 images", "float32 images", "teacher's outputs", "labelled images"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    image_px: height and width; images: of the training cache; shard: images of one; batch: images a step;
    other_batches: measured as well, the most telling first; warmup, steps: of a timing; short_epochs: after which
    memory must be flat; loader_batches: compared with known values; curve: steps of a loss curve; save_every: steps
    between checkpoints, and with one at least; labelled: images of either split.
    """

    image_px: int
    teacher: str
    student: str
    convolutional: str
    images: int
    shard: int
    batch: int
    other_batches: tuple[int, ...]
    warmup: int
    steps: int
    short_epochs: int
    loader_batches: int
    curve: int
    save_every: int
    labelled: int


FULL = Sizes(
    image_px=224, teacher="vit_base_patch14_dinov2.lvd142m", student="vit_small_patch16_224",
    convolutional="resnet18", images=4096, shard=2048, batch=64, other_batches=(256, 512, 128), warmup=3, steps=20,
    short_epochs=40, loader_batches=2000, curve=100, save_every=16, labelled=2048,
)  # fmt: skip
SMOKE = Sizes(
    image_px=32, teacher="test_vit", student="test_vit", convolutional="test_resnet", images=96, shard=24, batch=8,
    other_batches=(), warmup=1, steps=2, short_epochs=3, loader_batches=12, curve=4, save_every=2, labelled=48,
)  # fmt: skip


@dataclass
class Bench:
    """Where and how a part measures.

    folder: for data and runs, removed in the end; num_gpus: that can be used; deadline: time.monotonic() at which the
    part is ended; earlier: what the parts before it have found.
    """

    folder: Path
    is_smoke: bool
    num_gpus: int
    deadline: float
    earlier: dict[str, dict] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU to measure."""
        return self.num_gpus > 0

    @property
    def sizes(self) -> Sizes:
        """What is measured at all."""
        return SMOKE if self.is_smoke else FULL

    def device(self) -> torch.device:
        """The device, as the trainer chooses it; no command can be started from this process after this."""
        if not self.on_cuda:
            torch.set_num_threads(1)  # tiny tensors: threads cost more than they bring
            torch.compiler.set_stance("force_eager")  # compiling for a CPU would take minutes
        return choose_device("cuda" if self.on_cuda else "cpu")

    def seconds_left(self) -> float:
        """Time until the part is ended."""
        return self.deadline - time.monotonic()

    def settings(
        self, train: dict | None = None, model: dict | None = None, data: dict | None = None, dtype: str = "uint8"
    ) -> dict[str, dict]:
        """The three YAML files' content: the default recipe on the training cache of a dtype, with changes."""
        sizes = self.sizes
        return {
            "data": {
                "dataset_name": "parquet", "data_files": str(self.folder / "images.parquet"),
                "image_size": sizes.image_px, "cache_dir": str(self.folder / f"cache_{dtype}"), "cache_dtype": dtype,
                "cache_shard_size": sizes.shard, **(data or {}),
            },
            # a long run at any batch size: what `compile: auto` decides by
            "train": {
                "batch_size": sizes.batch, "checkpoint_dir": str(self.folder / "run"), "tensorboard": False,
                "max_steps_per_epoch": None, "num_epochs": 4 if self.is_smoke else 10_000,
                "teacher_cache": {"views": 2}, **(train or {}),
            },
            "model": {
                "teacher_name": sizes.teacher, "teacher_pretrained": False, "student_name": sizes.student,
                **(model or {}),
            },
        }  # fmt: skip

    def configs(self, **changes: Any) -> Configs:
        """The configuration of `settings`."""
        return load_configs(*self.settings(**changes).values())

    def start(
        self, program: str, name: str, *flags: str, environment: dict[str, str] | None = None, **changes: Any
    ) -> "Command":
        """Start precompute_cache or distill_trainer in a process of its own.

        name: of its YAML files and of what it prints, in the folder; flags: more of the command line; changes: as of
        settings.
        """
        for kind, content in self.settings(**changes).items():
            (self.folder / f"{name}_{kind}.yaml").write_text(yaml.safe_dump(content))
            flags = (*flags, f"--{kind}_config", str(self.folder / f"{name}_{kind}.yaml"))
        if program == "distill_trainer" and not self.on_cuda:
            flags = (*flags, "--device", "cpu")
        return Command(program, [*flags], self.folder / f"{name}.txt", environment or {})

    def make(self, what: str) -> None:
        """Make one of the data sets, in this process."""
        sizes = self.sizes
        if not (self.folder / "images.parquet").exists():
            write_images(self.folder / "images.parquet", sizes.images)
        changes: dict[str, Any] = {"dtype": "float32"} if what == FLOATS else {}
        changes["data"] = {"num_workers": 1} if self.is_smoke else {}
        if what == LABELLED:
            for split in ("train", "test"):
                write_images(self.folder / f"{split}.parquet", sizes.labelled, seed=len(split), classes=16)
            files = {"train": str(self.folder / "train.parquet"), "test": str(self.folder / "test.parquet")}
            changes["data"] |= {"eval_datasets": {"made": {"dataset_name": "parquet", "data_files": files}}}
        self.start("precompute_cache", what.replace(" ", "_"), *["--teacher"] * (what == OUTPUTS), **changes).succeed()


class Command:
    """A program of this repository in a forked process; path: what it prints."""

    def __init__(self, program: str, flags: list[str], path: Path, environment: dict[str, str]) -> None:
        self.path = path
        self.process = FORK.Process(target=_run_program, args=(program, flags, path, environment))
        self.process.start()

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit status, minus a signal's number; None while it runs."""
        self.process.join(seconds)
        return self.process.exitcode

    def kill_when(self, is_so: Callable[[], Any]) -> None:
        """Wait until something is so, then kill it with SIGKILL.

        Raises:
            RuntimeError: it ended before.
        """
        while not is_so():
            if self.wait(0.02) is not None:
                raise RuntimeError(f"exit status {self.process.exitcode} too early: {self.last_lines()}")
        self.process.kill()
        self.process.join()

    def last_lines(self) -> str:
        """The end of what it printed."""
        return "\n".join(self.path.read_text().splitlines()[-8:])

    def succeed(self) -> None:
        """Wait for its end.

        Raises:
            RuntimeError: it failed; the message has its last lines.
        """
        if self.wait() != 0:
            raise RuntimeError(f"exit status {self.process.exitcode}: {self.last_lines()}")


def _run_program(program: str, flags: list[str], path: Path, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with open(path, "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    sys.argv = [f"{program}.py", *flags]
    torch.set_num_threads(1)  # the work is done by the GPU, or tiny
    run_command(importlib.import_module(program).main)


def write_images(path: Path, count: int, *, seed: int = 0, classes: int = 0) -> None:
    """A parquet file of different JPEGs of 64 px; with classes they have labels, and a class has a shape in common."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    rng = np.random.default_rng(seed)
    shapes = np.random.default_rng(0).integers(0, 256, (max(1, classes), 6, 6, 3))
    labels = rng.integers(0, max(1, classes), count)
    rows = []
    for label in labels:
        coarse = (shapes[label] * bool(classes) + rng.integers(0, 256, (6, 6, 3))) // (1 + bool(classes))
        buffer = io.BytesIO()
        Image.fromarray(coarse.astype(np.uint8)).resize((64, 64)).save(buffer, "JPEG", quality=90)
        rows.append({"bytes": buffer.getvalue(), "path": None})
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns = {"image": image} | ({"label": pa.array(labels, pa.int64())} if classes else {})
    pq.write_table(pa.table(columns), path)


class Trainer:
    """The objects of a run and its own steps, as distill_trainer.py puts them together.

    compile_s: what compiling took, s; messages: what the trainer says of it.
    """

    def __init__(self, configs: Configs, device: torch.device) -> None:
        self.configs, self.device, self.position = configs, device, Position()
        train = configs.train
        with contextlib.redirect_stdout(io.StringIO()):  # the same lines for every variant
            self.loader = build_pretraining_dataloader(configs.data, train, with_indices=True, raw=True)
        cache = open_teacher_cache(configs, self.loader, device)
        teacher, student = build.build_models(configs, device, cache)
        self.steps_in_epoch = build.steps_per_epoch(train, self.loader.valid_rows_per_shard, None)
        schedule = build.build_schedule(train, student, self.steps_in_epoch)
        self.task = build.build_task(configs, teacher, student, schedule, self.loader.normalized, device, cache)
        if cache is None:
            teacher.gather_statistics(build.spread_batches(self.loader.dataset, 256, 64, device))
        else:
            teacher.load_statistics(build.stored_statistics(self.loader, self.task))
        self.messages: list[str] = []
        console = SimpleNamespace(message=self.messages.append)
        run = SimpleNamespace(task=self.task, loader=self.loader, position=self.position, console=console)
        self.compile_s = seconds_of(lambda: compile_step(run))

    def _batches(self) -> DevicePrefetcher:
        self.loader.load_state_dict({"epoch": self.position.epoch, "samples": 0})
        batches = StepLoader(self.task, self.loader, epoch=self.position.epoch, step=self.position.step)
        return DevicePrefetcher(batches, self.device)

    def groups(self) -> Iterator[list]:
        """What each step of the present epoch takes, on the device."""
        return batches_by_step(self._batches(), self.task.accumulation_steps)

    def groups_without_end(self) -> Iterator[list]:
        """The same, epoch after epoch."""
        while True:
            yield from self.groups()
            self.position.next_epoch()

    def step(self, group: list) -> dict[str, Tensor]:
        """One optimiser step; returns its losses, on the device."""
        losses = train_step(self.task, group, self.position.step, self.position.epoch)
        self.position.step += 1
        return losses

    def train_epoch(self, steps: int, log_every: int) -> list[dict[str, float]]:
        """An epoch of so many steps, loader and all; returns the rows that would be logged."""
        rows = []
        train_one_epoch(
            self.task, self._batches(), self.position, StopFlag(), steps_in_epoch=steps, log_every=log_every,
            after_step=lambda _position, row: rows.append(row),
        )  # fmt: skip
        self.position.next_epoch()
        return [row for row in rows if row is not None]

    def save(self, checkpoints: CheckpointWriter) -> None:
        """Write a checkpoint of this moment, or begin to."""
        log = SimpleNamespace(best_step=lambda _steps: None)
        save(SimpleNamespace(task=self.task, position=self.position, configs=self.configs, checkpoints=checkpoints,
                             shards=self.loader.shard_names, teacher_hash="", log=log))  # fmt: skip

    def views(self, count: int) -> Tensor:
        """Normalised images [count, 3, H, W] on the device."""
        return next(iter(build.spread_batches(self.loader.dataset, count, count, self.device)))


def images_and_rows(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch's images as stored, [B, 3, H, W], and their global_idx, int64 [B]."""
    return batch[0], batch[1]


def free_memory() -> None:
    """Let go of what the last measurement left: compiled graphs, and memory that is cached on the GPU."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(run: Callable[[], Any], device: torch.device, repeats: int, *, warmup: int = 1) -> float:
    """The median time of a call: on the GPU between events, which the host does not wait for; else by the clock."""
    for _ in range(warmup):
        run()
    synchronize(device)
    if device.type != "cuda":
        return statistics.median(1000 * seconds_of(run) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False))


def host_milliseconds(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """The median time until a call returns that finds the device idle: what the host takes to give out the work."""
    times = []
    for _ in range(repeats):
        synchronize(device)
        times.append(1000 * seconds_of(run))
    synchronize(device)
    return statistics.median(times)


def seconds_of(run: Callable[[], Any]) -> float:
    """The time of a call until it returns, s."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def busy_share(run: Callable[[], Any], device: torch.device, repeats: int) -> float | None:
    """The share of the time in which at least one kernel ran, 0..1; on the CPU in which this process computed.

    None where the profiler sees no kernels: it needs rights that some clusters do not give.
    """
    if device.type != "cuda":
        began = time.process_time()
        elapsed = sum(seconds_of(run) for _ in range(repeats))
        return min(1.0, (time.process_time() - began) / elapsed)
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize(device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profile.events()
        # ranges that mark a part of the program hold the gaps between its kernels too
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return covered_share(spans) if spans else None


def covered_share(spans: list[tuple[float, float]]) -> float:
    """The share of the time from the first begin to the last end that lies in at least one of the spans."""
    spans = sorted(spans)
    covered, reached = 0.0, spans[0][0]
    for begin, end in spans:
        covered += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return covered / (reached - spans[0][0])


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: on the GPU since free_memory, on the CPU by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(device: torch.device) -> int:
    """Memory held now: reserved on the GPU, on the CPU the process's resident pages."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def rows_of(run_dir: Path, kind: str = "train") -> list[dict]:
    """Rows of a run's metrics.jsonl that are complete by now."""
    with contextlib.suppress(FileNotFoundError):
        lines = (run_dir / "metrics.jsonl").read_text().split("\n")[:-1]
        return [row for row in map(json.loads, lines) if row["kind"] == kind]
    return []


def last_step(run_dir: Path) -> int:
    """The last step that a run has logged, 0 before the first."""
    rows = rows_of(run_dir)
    return rows[-1]["step"] if rows else 0
