"""What --dry_run says before anything is written: room, memory, hours, how much of the data is seen, and advice.

Pure functions from figures to lines; planner_cache.py and planner_train.py measure the figures.
"""

import math
from dataclasses import dataclass

from distillery.system.console import format_bytes, hours

# shares from which on there is something to say
_SMALL_EPOCH, _SMALL_RUN, _MUCH_WAIT = 0.5, 1.0, 0.05
_MANY_VIEWS = 50
_LOSS_OF_A_KILL_S = 1800


@dataclass(frozen=True)
class TrainingFacts:
    """What is known of a run before it begins. Steps are optimiser steps; images_in_epoch: what an epoch sees.

    shard_steps: steps that the chosen shards of an epoch would give without max_steps_per_epoch; whole_steps: all
    images once; row_bytes: of a stored image, 0 where none are; checkpoint_bytes: of one.
    """

    num_images: int
    global_batch: int
    steps_in_epoch: int
    shard_steps: int
    whole_steps: int
    num_epochs: int
    total_steps: int
    steps_done: int
    warmup_steps: int
    max_steps_per_epoch: int | None
    shards_per_epoch: int | None
    save_every: int
    keep_checkpoints: int
    checkpoint_bytes: int
    eval_every_epochs: int
    num_eval_datasets: int
    has_crop: bool
    precision: str
    on_cuda: bool
    row_bytes: int
    seconds_left: float
    memory_left: int | None


@dataclass(frozen=True)
class StepSpeed:
    """A few training steps of one process.

    step_seconds: of an optimiser step; the fractions: of the step's time; loader_images: images/s that reading alone
    gives, None where there is nothing to read yet; memory_bytes: the process's peak, on the GPU (of memory_total)
    where there is one.
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

    @property
    def computed_images(self) -> float:
        """Images/s of one process if it never waited for data."""
        return self.images_per_step / (self.step_seconds * max(0.01, 1 - self.wait_fraction))

    @property
    def lasting_step_seconds(self) -> float:
        """A step's time once what was read ahead is used up: of reading or computing, whichever is slower."""
        return self.images_per_step / min(self.computed_images, self.loader_images or math.inf)


def training_lines(facts: TrainingFacts, speed: StepSpeed) -> list[str]:
    """Speed, hours, memory and disk of a run."""
    steps_left = facts.total_steps - facts.steps_done
    seconds = speed.lasting_step_seconds
    what = "images of the run" if speed.loader_images is not None else "random images"
    of_what = f" of the GPU's {format_bytes(speed.memory_total)}" if speed.memory_total else ", the process as a whole"
    lines = [
        f"speed: {speed.num_steps} steps on {what} took {speed.step_seconds:.3g} s each, {speed.computed_images:,.0f} "
        f"images/s a process; teacher {speed.teacher_fraction:.0%}, student {speed.student_fraction:.0%} of the time",
        f"time: about {hours(steps_left * seconds)} for {steps_left:,} steps, besides evaluations; an epoch "
        f"{hours(facts.steps_in_epoch * seconds)}",
        f"memory: {format_bytes(speed.memory_bytes)} at the most in these steps{of_what}",
        f"disk: {facts.keep_checkpoints + 1} checkpoints of {format_bytes(facts.checkpoint_bytes)} at the most: "
        f"{format_bytes((facts.keep_checkpoints + 1) * facts.checkpoint_bytes)}",
    ]
    if speed.loader_images is not None:
        lines.insert(1, f"  reading alone gives {speed.loader_images:,.0f} images/s here")
    return lines


def training_advice(facts: TrainingFacts, speed: StepSpeed | None = None) -> list[str]:
    """What a careful colleague would say of the plan; speed None: nothing was timed."""
    return [*_coverage_advice(facts), *_schedule_advice(facts), *(_speed_advice(facts, speed) if speed else [])]


def _coverage_advice(facts: TrainingFacts) -> list[str]:
    seen = facts.steps_in_epoch * facts.global_batch
    times = facts.total_steps * facts.global_batch / facts.num_images
    lines = []
    if seen < _SMALL_EPOCH * facts.num_images:
        is_capped = facts.max_steps_per_epoch is not None and facts.shard_steps > facts.steps_in_epoch
        key = f"max_steps_per_epoch: {facts.max_steps_per_epoch}" if is_capped else (
            f"shards_per_epoch: {facts.shards_per_epoch}")  # fmt: skip
        lines.append(
            f"an epoch is {100 * seen / facts.num_images:.2g} % of the data: {key} ends it after {seen:,} of "
            f"{facts.num_images:,} images. Epochs of all of it: max_steps_per_epoch: null and shards_per_epoch: null, "
            f"{facts.whole_steps:,} steps each"
        )
    if times < _SMALL_RUN:
        enough = math.ceil(facts.num_images / max(1, seen))
        lines.append(
            f"the run ends when it has seen {times:.0%} of the images: num_epochs: {enough} is the first that sees all"
        )
    elif times > _MANY_VIEWS and not facts.has_crop:
        lines.append(
            f"every image comes {times:,.0f} times with no other change than a mirror image: set "
            "augment.random_resized_crop, e.g. [0.3, 1.0], or fewer epochs"
        )
    return lines


def _schedule_advice(facts: TrainingFacts) -> list[str]:
    lines = []
    if facts.num_eval_datasets and facts.eval_every_epochs > facts.num_epochs:
        lines.append(
            f"eval_every_epochs: {facts.eval_every_epochs} is more than num_epochs: {facts.num_epochs}: k-NN is "
            "measured before the first step and after the last only"
        )
    if not facts.num_eval_datasets or not facts.eval_every_epochs:
        key = "eval_datasets is empty" if not facts.num_eval_datasets else "eval_every_epochs is 0"
        lines.append(f"{key}: nothing but the loss will tell how good the student is")
    if facts.warmup_steps > 0.3 * facts.total_steps:
        lines.append(
            f"the warm-up takes {facts.warmup_steps:,} of {facts.total_steps:,} steps: warmup_epochs: null takes 5 %"
        )
    if facts.total_steps < 1000:
        lines.append(f"{facts.total_steps:,} steps are few: enough to try things out, not for a student to keep")
    return lines


def _speed_advice(facts: TrainingFacts, speed: StepSpeed) -> list[str]:
    lines = []
    wait = 1 - min(1.0, (speed.loader_images or math.inf) / speed.computed_images)
    if wait > _MUCH_WAIT:
        lines.append(
            f"reading is slower than computing: some {wait:.0%} of the time would be spent waiting for data. Put the "
            "cache on a local disk, take cache_dtype: uint8 (a quarter of float32's bytes), or raise num_workers"
        )
    cache_bytes = facts.num_images * facts.row_bytes
    if facts.memory_left is not None and cache_bytes > facts.memory_left:
        rate = speed.computed_images * facts.row_bytes
        lines.append(
            f"the images, {format_bytes(cache_bytes)}, are more than the memory that is free, "
            f"{format_bytes(facts.memory_left)}: the disk must give {format_bytes(rate)}/s to each process"
        )
    if facts.on_cuda and facts.precision == "fp32":
        lines.append("precision: fp32 leaves the tensor cores idle: auto takes bf16 where the GPU has it")
    if facts.save_every * speed.lasting_step_seconds > _LOSS_OF_A_KILL_S:
        minutes = facts.save_every * speed.lasting_step_seconds / 60
        lines.append(f"save_every: {facts.save_every} steps are {minutes:.0f} minutes, which a kill -9 would cost")
    seconds = (facts.total_steps - facts.steps_done) * speed.lasting_step_seconds
    if seconds > facts.seconds_left:
        jobs = math.ceil(seconds / facts.seconds_left)
        lines.append(
            f"this job has {hours(facts.seconds_left)} left, the run takes some {hours(seconds)}: about {jobs} jobs of "
            "this length, each the same command"
        )
    return lines


def advice_lines(advice: list[str]) -> list[str]:
    """The advice as it is printed."""
    return [f"advice: {text}." for text in advice]
