"""Estimate the cost of a run from a few timed steps: hours, memory, the teacher's share; and give advice."""

import itertools
import math
import os
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillery.cache.archive import row_bytes_of
from distillery.cache.encoded import RowEncoding, is_encoded
from distillery.cache.images import shard_name
from distillery.config.keys_data import DataConfig
from distillery.config.keys_train import AugmentConfig, TrainConfig
from distillery.config.load import Configs
from distillery.reading.loader import DevicePrefetcher
from distillery.reading.shard_draws import rows_of_draw
from distillery.reading.staging import plan_lines, room_in, stage_path
from distillery.system import distributed
from distillery.system.console import format_bytes, format_duration
from distillery.system.errors import UserError
from distillery.system.machine import memory_left
from distillery.system.signals import slurm_seconds_left
from distillery.training.batches import StepLoader
from distillery.training.build import global_batch_size
from distillery.training.compilation import eager
from distillery.training.decoding import DecodingSpeed, decoding_advice, decoding_line, measure_decoding
from distillery.training.engine import batches_by_step, train_step
from distillery.training.memory import fit_line
from distillery.training.optimizer import state_bytes
from distillery.training.task import Schedule, Task

# shares from which on there is something to say
_SMALL_EPOCH, _SMALL_RUN, _MUCH_WAIT = 0.5, 1.0, 0.05
_MANY_VIEWS = 50
_LOSS_OF_A_KILL_S = 1800
_NUM_STEPS, _BUDGET_S = 5, 20.0
_READ_BATCHES, _READ_S = 24, 2.0


@dataclass(frozen=True)
class StepSpeed:
    """A few training steps of one process.

    step_seconds: of an optimiser step; the fractions: of the step's time; loader_images: images/s that reading alone
    gives, None where there is nothing to read yet; memory_bytes: the process's peak, on the GPU (of memory_total)
    where there is one; precision: that the steps were computed in; decoding: where the loader decodes stored rows.
    """

    num_steps: int
    images_per_step: int
    step_seconds: float
    wait_fraction: float
    teacher_fraction: float
    student_fraction: float
    loader_images: float | None
    memory_bytes: int
    memory_total: int | None
    precision: str
    decoding: DecodingSpeed | None = None

    @property
    def computed_images(self) -> float:
        """Images/s of one process if it never waited for data."""
        return self.images_per_step / (self.step_seconds * max(0.01, 1 - self.wait_fraction))

    @property
    def lasting_step_seconds(self) -> float:
        """A step's time once what was read ahead is used up: of reading or computing, whichever is slower."""
        return self.images_per_step / min(self.computed_images, self.loader_images or math.inf)


def training_lines(
    speed: StepSpeed, steps_left: int, steps_in_epoch: int, checkpoint_bytes: int, num_checkpoints: int
) -> list[str]:
    """Speed, hours, memory and disk of a run."""
    seconds = speed.lasting_step_seconds
    what = "images of the run" if speed.loader_images is not None else "random images"
    of_what = f" of the GPU's {format_bytes(speed.memory_total)}" if speed.memory_total else ", the process as a whole"
    lines = [
        f"speed: {speed.num_steps} steps on {what} took {speed.step_seconds:.3g} s each, {speed.computed_images:,.0f} "
        f"images/s a process; teacher {speed.teacher_fraction:.0%}, student {speed.student_fraction:.0%} of the time",
        f"time: about {format_duration(steps_left * seconds)} for {steps_left:,} steps, besides evaluations; an epoch "
        f"{format_duration(steps_in_epoch * seconds)}",
        f"memory: {format_bytes(speed.memory_bytes)} at the most in these steps{of_what}",
        f"disk: {num_checkpoints} checkpoints of {format_bytes(checkpoint_bytes)} at the most: "
        f"{format_bytes(num_checkpoints * checkpoint_bytes)}",
    ]
    if speed.loader_images is not None:
        lines.insert(1, f"  reading alone gives {speed.loader_images:,.0f} images/s here")
    if speed.decoding is not None:
        lines.insert(2, f"  {decoding_line(speed.decoding, speed.computed_images)}")
    return lines


def coverage_advice(configs: Configs, valid_rows: Sequence[int], steps_in_epoch: int, total_steps: int) -> list[str]:
    """What to change where epoch or run see too few of the images; valid_rows: images in each shard."""
    data, train, batch, num_images = configs.data, configs.train, global_batch_size(configs.train), sum(valid_rows)
    seen, times, augment = steps_in_epoch * batch, total_steps * batch / num_images, train.augment
    lines = []
    if seen < _SMALL_EPOCH * num_images:
        is_capped = rows_of_draw(valid_rows, data.shards_per_epoch) // batch > steps_in_epoch
        key = (
            f"max_steps_per_epoch: {train.max_steps_per_epoch}"
            if is_capped
            else f"shards_per_epoch: {data.shards_per_epoch}"
        )
        lines.append(
            f"an epoch is {100 * seen / num_images:.2g} % of the data: {key} ends it after {seen:,} of "
            f"{num_images:,} images. Epochs of all of it: max_steps_per_epoch: null and shards_per_epoch: null, "
            f"{num_images // batch:,} steps each"
        )
    if times < _SMALL_RUN:
        enough = math.ceil(num_images / max(1, seen))
        lines.append(
            f"the run ends when it has seen {times:.0%} of the images: num_epochs: {enough} is the first that sees all"
        )
    elif times > _MANY_VIEWS and augment.model_copy(update={"hflip": True}) == AugmentConfig():
        change = "with no other change than a mirror image" if augment.hflip else "without a change"
        lines.append(
            f"every image comes {times:,.0f} times {change}: set augment.random_resized_crop, e.g. [0.3, 1.0], or "
            "fewer epochs"
        )
    return lines


def schedule_advice(configs: Configs, schedule: Schedule) -> list[str]:
    """What to change in evaluations, warm-up and length of a run."""
    train, has_datasets, lines = configs.train, bool(configs.data.eval_datasets), []
    if has_datasets and train.eval_every_epochs > train.num_epochs:
        lines.append(
            f"eval_every_epochs: {train.eval_every_epochs} is more than num_epochs: {train.num_epochs}: k-NN is "
            "measured before the first step and after the last only"
        )
    if not has_datasets or not train.eval_every_epochs:
        key = "eval_every_epochs is 0" if has_datasets else "eval_datasets is empty"
        lines.append(f"{key}: nothing but the loss will tell how good the student is")
    if schedule.warmup_steps > 0.3 * schedule.total_steps:
        lines.append(
            f"the warm-up takes {schedule.warmup_steps:,} of {schedule.total_steps:,} steps: warmup_epochs: null takes "
            "5 %"
        )
    if schedule.total_steps < 1000:
        lines.append(f"{schedule.total_steps:,} steps are few: enough to try things out, not for a student to keep")
    return lines


def speed_advice(
    speed: StepSpeed,
    num_images: int,
    row_bytes: float,
    steps_left: int,
    save_every: int,
    save_every_minutes: float | None = None,
) -> list[str]:
    """What to change where steps wait, or take longer than this machine's memory and this job's time allow.

    row_bytes: of an image on disk, on average, 0 where none are; save_every: steps between two checkpoints, of which
    save_every_minutes brings more.
    """
    lines = []
    wait = 1 - min(1.0, (speed.loader_images or math.inf) / speed.computed_images)
    if wait > _MUCH_WAIT and speed.decoding is not None and speed.decoding.images < speed.computed_images:
        pixels = 3 * speed.decoding.image_size**2
        lines.append(decoding_advice(speed.decoding, speed.computed_images, wait, pixels / row_bytes))
    elif wait > _MUCH_WAIT:
        lines.append(
            f"reading is slower than computing: some {wait:.0%} of the time would be spent waiting for data. Set "
            "stage_dir to a folder on a local disk, take cache_dtype: uint8 (a quarter of float32's bytes), or raise "
            "num_workers"
        )
    free, cache_bytes = memory_left(), num_images * row_bytes
    if free is not None and cache_bytes > free:
        rate = speed.computed_images * row_bytes
        lines.append(
            f"the images, {format_bytes(round(cache_bytes))}, are more than the memory that is free, "
            f"{format_bytes(free)}: the disk must give {format_bytes(round(rate))}/s to each process"
        )
    if speed.memory_total and speed.precision == "fp32":
        lines.append("precision: fp32 leaves the tensor cores idle: auto takes bf16 where the GPU has it")
    by_steps, by_clock = save_every * speed.lasting_step_seconds / 60, save_every_minutes or math.inf
    if min(by_steps, by_clock) > _LOSS_OF_A_KILL_S / 60:
        what = f"save_every: {save_every} steps are {by_steps:.0f} minutes"
        what = what if by_steps <= by_clock else f"save_every_minutes: {by_clock:g} minutes"
        lines.append(f"{what}, which a kill -9 would cost")
    seconds, seconds_left = steps_left * speed.lasting_step_seconds, slurm_seconds_left()
    if seconds > seconds_left:
        lines.append(
            f"this job has {format_duration(seconds_left)} left, the run takes some {format_duration(seconds)}: "
            f"about {math.ceil(seconds / seconds_left)} jobs of this length, each the same command"
        )
    return lines


class SyntheticLoader:
    """Random images in the place of a cache that is not there yet; the counts are those the cache would have."""

    normalized = True
    is_encoded = False
    fingerprint = "synthetic"

    def __init__(self, num_images: int, shard_size: int, batch_size: int, image_size: int) -> None:
        self.num_images, self.batch_size, self.image_shape = num_images, batch_size, (3, image_size, image_size)
        starts = range(0, num_images, shard_size)
        self.valid_rows_per_shard = [min(shard_size, num_images - start) for start in starts]
        self.shard_names = [shard_name(number) for number in range(len(starts))]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batch without end: (float32 [B, 3, H, W], int64 [B])."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, *self.image_shape, generator=generator)
        while True:
            yield images, torch.arange(self.batch_size) % self.num_images

    def close(self) -> None:
        """Nothing is held."""


def synthetic_loader(configs: Configs) -> SyntheticLoader | None:
    """Random images for --dry_run where nothing is cached yet; None where the run's own images can be read.

    Raises:
        UserError: there is no cache, and how many images it would have is not known before a download.
    """
    data = configs.data
    has_cache = data.cache_dir is not None and (data.cache_path / "index.json").exists()
    if has_cache or data.use_cached is False or data.dataset_name is None:
        return None
    from distillery.sources.hub import NotDownloadedError
    from distillery.sources.registry import open_source

    try:
        num_rows = len(open_source(**data.source_arguments, download=False))
    except NotDownloadedError as error:
        num_rows = error.hub_split.num_rows
    num_images = min((limit for limit in (data.max_rows, num_rows) if limit), default=None)
    if num_images is None:
        raise UserError(
            f"there is no cache at {data.cache_dir}, and the hub does not say how many images {data.dataset_name} has. "
            "Give the number for this plan: --set max_samples=N, or make the cache first."
        )
    if distributed.is_main():
        print(f"there is no cache at {data.cache_dir} yet: the plan is for {num_images:,} images, on random ones")
    return SyntheticLoader(num_images, data.cache_shard_size, configs.train.batch_size, data.image_size)


def plan_run(configs: Configs, task: Task, loader: Any, steps_in_epoch: int, steps_done: int, epoch: int) -> list[str]:
    """Lines for the console: speed, hours, memory, disk, advice. The task is trained for a few steps."""
    with eager():  # compiling takes longer than the plan may
        speed = measure_steps(task, loader, epoch)
    data, train, rows, schedule = configs.data, configs.train, loader.valid_rows_per_shard, task.schedule
    steps_left = schedule.total_steps - steps_done
    row_bytes = stored_row_bytes(loader, data) if loader.shard_names else 0
    advice = [
        *coverage_advice(configs, rows, steps_in_epoch, schedule.total_steps),
        *schedule_advice(configs, schedule),
        *speed_advice(
            speed, sum(rows), row_bytes, steps_left, train.save_every or steps_in_epoch, train.save_every_minutes
        ),
    ]
    if task.compiled:
        advice.append("the run compiles its steps (compile), and is faster than these, which were not compiled")
    # the best one is kept beside the newest, and the new one is complete before the oldest goes
    num_files = train.keep_checkpoints + 1 + bool(data.eval_datasets and train.eval_every_epochs)
    lines = training_lines(speed, steps_left, steps_in_epoch, checkpoint_bytes(task.student, train), num_files)
    lines += [fit_line(task, train, data.image_size), *staging_plan(data, loader)]
    return [*lines, *(f"advice: {text}." for text in advice)]


def staging_plan(data: DataConfig, loader: Any) -> list[str]:
    """What copies on the node's own disk cost and save; no line without stage_dir, or before there is a cache."""
    index = getattr(loader, "index", None)
    if data.stage_dir is None or index is None or not index.verified:
        return []
    try:
        place = stage_path(data.stage_dir, index.directory)
        return plan_lines(index, loader.sampling, place, room_in(place, index, data.stage_gb))
    except OSError as error:
        return [f"staging: {data.stage_dir}: {os.strerror(error.errno or 0)}: nothing would be staged"]


def stored_row_bytes(loader: Any, data: DataConfig) -> float:
    """Bytes of an image on disk, on average: of the loader's cache, or of the one that stage 1 would make."""
    if not isinstance(loader, SyntheticLoader):
        index = loader.index
        return index.shard_bytes.sum() / index.num_samples
    if is_encoded(data.cache_dtype):
        return RowEncoding(data.row_size, data.jpeg_quality).typical_bytes(data.image_size)
    return row_bytes_of((3, data.image_size, data.image_size), data.cache_dtype)


def checkpoint_bytes(student: nn.Module, train: TrainConfig) -> int:
    """The size of a checkpoint: weights, the optimiser's moments, the averages of ema_decay."""
    weights = sum(value.numel() * value.element_size() for value in student.state_dict().values())
    return weights + state_bytes(student, train) + (weights if train.ema_decay else 0)


def measure_steps(task: Task, loader: Any, epoch: int) -> StepSpeed:
    """Time a few optimiser steps of the task, after one that pays for what happens once."""
    batches = DevicePrefetcher(StepLoader(task, loader, epoch=epoch, step=0), task.device)
    groups = batches_by_step(batches, task.accumulation_steps)
    began, steps = time.monotonic(), 0
    for step in range(1 + _NUM_STEPS):
        with task.clock.part("wait"):
            group = next(groups, None)
        if group is None:  # an epoch of a single step: that one is measured
            break
        if step <= 1:  # the first pays for what happens once
            task.clock.restart()
        train_step(task, group, step, epoch)
        task.clock.count(sum(len(batch.images) for batch in group))
        del group  # as the run does
        steps = max(1, step)
        # all together: one process that goes on would wait for the others' gradients
        if distributed.any_rank(time.monotonic() - began > _BUDGET_S)[0]:
            break
    row = task.clock.summary()
    groups.close()
    return StepSpeed(
        num_steps=steps,
        images_per_step=task.accumulation_steps * loader.batch_size,
        step_seconds=row["step_seconds"],
        wait_fraction=row["data_wait_fraction"],
        teacher_fraction=row["teacher_fraction"],
        student_fraction=row["student_fraction"],
        loader_images=None if isinstance(loader, SyntheticLoader) else measure_loader(loader),
        **_memory(task.device),
        precision=task.precision,
        decoding=measure_decoding(loader),
    )


def measure_loader(loader: Any) -> float:
    """Images/s that the loader gives when nothing else is done, after the batches that it has read ahead."""
    batches = iter(loader)
    for _ in range(min(loader.prefetch_batches, len(loader) // 2)):
        next(batches)
    num_images, began = 0, time.perf_counter()
    for batch in itertools.islice(batches, _READ_BATCHES):
        num_images += len(batch[0])
        if time.perf_counter() - began > _READ_S:
            break
    return num_images / (time.perf_counter() - began)


def _memory(device: torch.device) -> dict[str, int | None]:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return {"memory_bytes": torch.cuda.max_memory_reserved(device), "memory_total": total}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": kibibytes * 1024, "memory_total": None}
