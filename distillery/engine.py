"""The training step and the epoch: knows neither YAML nor paths nor names of losses; it is handed objects."""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distillery import distributed
from distillery.losses import check_gradients, total_loss
from distillery.models import FrozenTeacher, StudentWithHeads, align_teacher
from distillery.process import StopFlag


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run: linear warm-up, then half a cosine down to min_lr. Steps are optimiser steps."""

    learning_rate: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The learning rate of step `step` (from 0): a pure function, so a resumed run cannot drift."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        return self.min_lr + (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def default_learning_rate(global_batch_size: int) -> float:
    """The rule behind `learning_rate: null`: 1e-3 x sqrt(batch / 64), at most 4e-3, for AdamW.

    The square root is the scaling of adaptive optimisers (Malladi et al. 2022, arXiv:2205.10287); the value at 64 was
    measured on CIFAR-10 (docs/recipe.md).
    """
    return min(4e-3, 1e-3 * math.sqrt(global_batch_size / 64))


@dataclass
class Progress:
    """Where a run stands. samples: of the current epoch's global order, consumed by all ranks together."""

    step: int = 0
    epoch: int = 0
    samples: int = 0


@dataclass
class Task:
    """All that a training step touches.

    student_call: what is called (the student itself, or wrapped for DDP or compiled); teacher: frozen; augment: from
    (images, global_idx, epoch) to images; to_float: from the loader's batch to normalised float32 on the device.
    """

    student: StudentWithHeads
    student_call: nn.Module
    teacher: Callable[[Tensor], Any]
    teacher_module: FrozenTeacher
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loss_weights: dict[str, float]
    loss_options: dict[str, dict]
    augment: Callable[[Tensor, Tensor, int], Tensor]
    to_float: Callable[[Tensor], Tensor]
    device: torch.device
    precision: str
    max_grad_norm: float | None
    accumulation_steps: int
    seed: int
    ema: "Ema | None" = None
    max_bad_steps: int = 0
    scaler: torch.amp.GradScaler = field(init=False)
    num_bad_steps: Tensor = field(init=False)

    def __post_init__(self) -> None:
        # fp16 needs its scaling; at scale 1 the scaler still has a use: a step whose gradients are not finite is left
        # out on the device, without the host having to look
        scale = {} if self.precision == "fp16" else {"init_scale": 1.0, "growth_interval": 2**31 - 1}
        self.scaler = torch.amp.GradScaler(self.device.type, **scale)
        self.num_bad_steps = torch.zeros((), device=self.device)

    def autocast(self) -> Any:
        """Mixed precision for both models' forward passes; losses are computed in float32 outside."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.precision == "bf16" else torch.float16)


class Ema:
    """Exponential moving average of the student's parameters; buffers (batch-norm statistics) are copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards the model's present weights."""
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - self.decay)
            else:
                self.state[name].copy_(value)


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators from (seed, step, rank), so that drop-path needs no saved state to resume exactly."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + distributed.rank())


def forward_losses(task: Task, images: Tensor, global_idx: Tensor, epoch: int) -> dict[str, Tensor]:
    """One view of a batch through teacher and student.

    Args:
        task: models, losses, augmentation.
        images: as the loader yields them, [B, 3, H, W], on the device.
        global_idx: int64 [B]; with the epoch it determines the view.
        epoch: from 0.

    Returns:
        {"loss", "loss/<name>", ...}: float32 scalars.
    """
    view = task.augment(task.to_float(images), global_idx, epoch)
    with task.autocast():
        targets = task.teacher(view)
        outputs = task.student_call(view)
    return total_loss(outputs, align_teacher(targets, outputs.grid), task.loss_weights, task.loss_options)


def train_step(task: Task, batches: list[tuple[Tensor, Tensor]], step: int, epoch: int) -> dict[str, Tensor]:
    """One optimiser step over `accumulation_steps` batches; nothing here waits for the device.

    Returns:
        The losses (mean over the batches) and "grad_norm" before clipping, as tensors on the device.
    """
    seed_step(task.seed, step)
    for group in task.optimizer.param_groups:
        group["lr"] = task.schedule.at(step)
    totals: dict[str, Tensor] = {}
    for number, (images, global_idx) in enumerate(batches, start=1):
        is_last = number == len(batches)
        wait_to_sync = (
            nullcontext() if is_last or not hasattr(task.student_call, "no_sync") else task.student_call.no_sync()
        )
        with wait_to_sync:
            losses = forward_losses(task, images, global_idx, epoch)
            task.scaler.scale(losses["loss"] / len(batches)).backward()
        for name, value in losses.items():
            totals[name] = totals.get(name, 0) + value.detach() / len(batches)
    task.num_bad_steps += ~torch.isfinite(totals["loss"])
    task.scaler.unscale_(task.optimizer)
    max_norm = task.max_grad_norm if task.max_grad_norm is not None else math.inf
    totals["grad_norm"] = nn.utils.clip_grad_norm_(task.student.parameters(), max_norm)
    task.scaler.step(task.optimizer)
    task.scaler.update()
    task.optimizer.zero_grad(set_to_none=True)
    if task.ema is not None:
        task.ema.update(task.student.student.model)
    return totals


def check_first_step(task: Task, images: Tensor, global_idx: Tensor) -> None:
    """Every weighted loss term must be finite and have a gradient into the student, else an error names it.

    images: normalised, float32 [B, 3, H, W], on the device.
    """
    was_training = task.student.training
    task.student.eval()  # the check must not touch batch-norm statistics
    try:
        view = task.augment(images, global_idx, 0)
        with task.autocast():
            targets, outputs = task.teacher(view), task.student(view)
        terms = total_loss(outputs, align_teacher(targets, outputs.grid), task.loss_weights, task.loss_options)
        check_gradients(terms, task.student.student.parameters())
    finally:
        task.student.train(was_training)


@dataclass
class Window:
    """Timing since the last logged step."""

    began: float = field(default_factory=time.perf_counter)
    steps: int = 0
    images: int = 0
    waited_s: float = 0.0

    def summary(self) -> dict[str, float]:
        """images_per_second (this process), step_seconds, data_wait_fraction."""
        elapsed = max(1e-9, time.perf_counter() - self.began)
        return {
            "images_per_second": self.images / elapsed,
            "step_seconds": elapsed / max(1, self.steps),
            "data_wait_fraction": min(1.0, self.waited_s / elapsed),
        }


def batches_by_step(batches: Iterable, accumulation_steps: int) -> Iterable[tuple[list, float]]:
    """(the batches of one step, seconds waited for them); a group that the epoch's end cuts short is left out."""
    iterator = iter(batches)
    while True:
        began = time.perf_counter()
        group = []
        for _ in range(accumulation_steps):
            batch = next(iterator, None)
            if batch is None:
                return
            group.append(batch)
        yield group, time.perf_counter() - began


def train_one_epoch(
    task: Task,
    batches: Iterable[tuple[Tensor, Tensor]],
    progress: Progress,
    stop: StopFlag,
    *,
    steps_in_epoch: int,
    log_every: int,
    after_step: Callable[[Progress, dict[str, float] | None], None],
) -> None:
    """Train from where `progress` stands to the epoch's end, or until asked to stop.

    Args:
        task: models, optimiser, losses.
        batches: (images, global_idx) on the device, from progress.samples on.
        progress: moved along after every step.
        stop: looked at after every step; all ranks stop together.
        steps_in_epoch: optimiser steps of a whole epoch.
        log_every: steps between two reads of the losses from the device.
        after_step: called with the progress and, every log_every steps, the row to log, else None.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    window = Window()
    epoch_end = steps_in_epoch * (progress.epoch + 1)
    for group, waited_s in batches_by_step(batches, task.accumulation_steps):
        if progress.step >= epoch_end:
            break
        losses = train_step(task, group, progress.step, progress.epoch)
        num_images = sum(len(images) for images, _ in group)
        window.steps, window.images, window.waited_s = (
            window.steps + 1,
            window.images + num_images,
            window.waited_s + waited_s,
        )
        row = None
        # on the CPU reading a loss is free, so a bad one is caught at its own step
        if task.device.type == "cpu":
            check_finite(task, losses, progress, group)
        if (progress.step + 1) % log_every == 0:
            check_finite(task, losses, progress, group)
            row = read_losses(losses) | {"lr": task.schedule.at(progress.step)} | window.summary()
            row["images_per_second"] *= distributed.world_size()
            window = Window()
        progress.step += 1
        progress.samples += num_images * distributed.world_size()
        after_step(progress, row)
        if distributed.any_rank(stop.requested, task.device):
            return
    assert progress.step == epoch_end, f"the loader ended at step {progress.step}, the epoch at {epoch_end}"


def read_losses(losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses as numbers, mean over ranks: the only place where the host waits for the device."""
    values = distributed.mean_over_ranks(torch.stack([value.float() for value in losses.values()])).tolist()
    return dict(zip(losses, values, strict=True))


def check_finite(task: Task, losses: dict[str, Tensor], progress: Progress, group: list) -> None:
    """Raise FloatingPointError, with what helps to find the cause, after too many losses that are NaN or infinite."""
    if task.num_bad_steps.item() <= task.max_bad_steps:
        return
    rows = torch.cat([global_idx for _, global_idx in group]).tolist()
    raise FloatingPointError(
        f"loss is not finite at step {progress.step} (epoch {progress.epoch}; {int(task.num_bad_steps.item())} such steps, "
        f"max_bad_steps {task.max_bad_steps}): "
        + ", ".join(f"{name}={value.item():.4g}" for name, value in losses.items())
        + f", lr={task.schedule.at(progress.step):.3e}; images (global_idx): {rows[:16]}"
    )


def check_weights(model: nn.Module) -> None:
    """Raise FloatingPointError when a weight or buffer is not finite: such a student must never be saved."""
    bad = [
        name for name, value in model.state_dict().items() if value.is_floating_point() and not value.isfinite().all()
    ]
    if bad:
        raise FloatingPointError(f"{len(bad)} tensors of the student are not finite, the first is {bad[0]}; not saved.")
