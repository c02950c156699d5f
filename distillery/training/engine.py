"""The training step and the epoch. The engine receives objects; it knows no YAML, no paths, no names of losses."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distillery.losses.total import check_gradients
from distillery.models.precision import LOW_TYPES
from distillery.system import distributed
from distillery.system.signals import StopFlag
from distillery.training.batches import StepBatch, live_batch
from distillery.training.compilation import eager
from distillery.training.task import Position, Task

# the scaler halves its factor after an overflow, from 65536 on; below this the gradient itself is at fault
_SMALLEST_FP16_SCALE = 2.0**-10


def seed_step(seed: int, step: int) -> None:
    """Seed torch's generators from (seed, step, rank), so that dropout needs no saved state to resume exactly."""
    torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + distributed.rank()) % 2**63)


def forward_losses(task: Task, batch: StepBatch) -> dict[str, Tensor]:
    """One view of a batch through the student, and through the teacher where its outputs have not been stored.

    Args:
        task: models, losses, augmentation.
        batch: on the device, images as the loader yields them.

    Returns:
        {"loss", "loss/<name>", ..., "explained/<name>", ...}: float32 scalars.
    """
    # a queue that still grows would compile again in every step
    is_growing = task.compiled and task.queue is not None and not task.queue.is_full
    with eager() if is_growing else nullcontext():
        past = None if task.queue is None else task.queue.rows
        losses, pooled = _losses_of_view(task, batch, task.view_call, task.objective_call, past)
    if task.queue is not None:
        task.queue.push(pooled)
    return losses


def _losses_of_view(
    task: Task,
    batch: StepBatch,
    make_view: Callable[[Tensor, Tensor], Tensor],
    objective: nn.Module,
    past: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """forward_losses and the teacher's pooled targets; nothing is kept of the batch. past: rows of the queue."""
    view, second = make_view(batch.images, batch.view), None
    if batch.depth is not None:
        task.depth.use(batch.depth, LOW_TYPES.get(task.precision, torch.float32))
    with task.clock.part("teacher"):
        if batch.stored is not None:
            targets = task.stored.targets(batch.stored)
            second = task.stored.second_view(batch.stored) if task.stored.has_second_view else None
        else:
            targets = task.teacher_call(view)
            if batch.second_view is not None:
                second = task.teacher_call(make_view(batch.images, batch.second_view))
    with task.clock.part("student"), task.autocast():
        is_stored = batch.stored is not None
        losses = objective(view, targets, second_view=second, queue=past, is_stored=is_stored)
    return losses, targets.pooled


def rehearse_step(task: Task, batch: StepBatch) -> None:
    """The forward and backward pass of a step, as the step calls them; they leave no trace, on this rank alone.

    A queue is as full as it will be in most steps.
    """
    past = None if task.queue is None else task.queue.all_rows
    with _untouched(task), _alone(task.objective_call):
        losses, _ = _losses_of_view(task, batch, task.view_call, task.objective_call, past)
        task.scaler.scale(losses["loss"]).backward()


@contextmanager
def _untouched(task: Task) -> Iterator[None]:
    """Inside, forward and backward passes may do what they like to the student's buffers and gradients."""
    buffers = list(task.student.buffers())
    before = [value.clone() for value in buffers]
    try:
        yield
    finally:
        for value, old in zip(buffers, before, strict=True):
            value.copy_(old)
        task.optimizer.zero_grad(set_to_none=True)


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Inside, the ranks share nothing: neither gradients nor the buffers of batch norm. One of them may fail."""
    if not isinstance(module, nn.parallel.DistributedDataParallel):
        yield
        return
    module.require_forward_param_sync = False
    try:
        with module.no_sync():
            yield
    finally:
        module.require_forward_param_sync = True  # a forward pass within no_sync has unset it


def _without_sync(module: nn.Module) -> Any:
    """Inside, the ranks do not average their gradients."""
    return module.no_sync() if hasattr(module, "no_sync") else nullcontext()


def train_step(task: Task, batches: list[StepBatch], step: int, epoch: int) -> dict[str, Tensor]:
    """One optimiser step over `accumulation_steps` batches; nothing here waits for the device.

    Returns:
        What forward_losses gives (mean over the batches) and "grad_norm" before clipping, as tensors on the device.
    """
    seed_step(task.seed, step)
    for group in task.optimizer.param_groups:
        group["lr"] = task.schedule.at(step)
    if task.statistics is not None:
        task.statistics.remember()
    names: list[str] = []
    values = torch.zeros(())
    for number, batch in enumerate(batches, start=1):
        with nullcontext() if number == len(batches) else _without_sync(task.objective_call):
            losses = forward_losses(task, batch)
            with task.clock.part("student"):
                task.scaler.scale(_share(losses["loss"], len(batches))).backward()
        names = [*losses, "grad_norm"]
        # one vector for all of them: as scalars each would be a kernel in every line below
        now = _share(torch.stack([value.detach() for value in losses.values()]), len(batches))
        values = now if number == 1 else values + now
    with task.clock.part("optimizer"):
        if all(batch.stored is not None for batch in batches):
            task.objective.leave_idle_heads()
        task.scaler.unscale_(task.optimizer)
        max_norm = task.max_grad_norm if task.max_grad_norm is not None else math.inf
        grad_norm = nn.utils.clip_grad_norm_(task.student.parameters(), max_norm)
        values = torch.cat([values, grad_norm[None]])
        rows = [batch.global_idx for batch in batches]
        is_bad = task.bad_steps.note(step, epoch, names, values, rows[0] if len(rows) == 1 else torch.cat(rows))
        if task.statistics is not None:
            task.statistics.undo_where(is_bad)
        _update_weights(task, grad_norm)
        task.optimizer.zero_grad(set_to_none=True)
        if task.ema is not None:
            task.ema.update()
    return dict(zip(names, values.unbind(), strict=True))


def _share(value: Tensor, count: int) -> Tensor:
    """value / count; a division by 1 would be a kernel of its own, forward and backward."""
    return value if count == 1 else value / count


def _update_weights(task: Task, grad_norm: Tensor) -> None:
    """The optimiser's step, left out where a gradient is not finite: on the device wherever it can be.

    grad_norm: scalar on the device; of the gradients of all ranks, so that all of them decide alike.
    """
    if task.precision == "fp16":  # the scaler tries factors until the gradient is finite
        task.scaler.step(task.optimizer)
        task.scaler.update()
        return
    if task.optimizer.defaults.get("fused"):
        task.optimizer.found_inf = (~(grad_norm < math.inf)).float()
    # The host must tell an optimiser that is not fused, and waits for a GPU. Where no bad step is allowed there is no
    # need: the run ends at the next look at the numbers, and such weights are never saved
    elif (task.device.type == "cpu" or task.max_bad_steps) and not grad_norm.isfinite():
        return
    task.optimizer.step()


def check_first_step(task: Task, batch: StepBatch) -> None:
    """Every weighted loss term must be finite and have a gradient into the student, else an error names it.

    batch: on the device, images normalised, float32 [B, 3, H, W].
    """
    was_training = task.student.training
    # where some losses are computed in the steps alone that run the teacher, such a step as well
    kinds = [batch]
    if batch.stored is not None and task.stored.live_fields:
        kinds.append(live_batch(task, batch.images, batch.global_idx, epoch=0))
    # uncompiled: for so few images, which no step has, everything would be compiled too
    with eager(), _untouched(task):
        try:
            task.student.eval()
            for given in kinds:
                terms, _ = _losses_of_view(task, given, task.make_view, task.objective)
                check_gradients(terms, task.student.student.parameters())
            task.student.train()  # dropout and stochastic depth fail here if they fail at all
            _losses_of_view(task, batch, task.make_view, task.objective)
        finally:
            task.student.train(was_training)


def batches_by_step(batches: Iterable, accumulation_steps: int) -> Iterator[list]:
    """The batches of one step at a time; a group that the epoch's end cuts short is left out."""
    iterator = iter(batches)
    while True:
        group = []
        for _ in range(accumulation_steps):
            batch = next(iterator, None)
            if batch is None:
                return
            group.append(batch)
        yield group


def train_one_epoch(
    task: Task,
    batches: Iterable[StepBatch],
    position: Position,
    stop: StopFlag,
    *,
    steps_in_epoch: int,
    log_every: int,
    after_step: Callable[[Position, dict[str, float] | None], None],
    is_save_due: Callable[[], bool] = lambda: False,
    save: Callable[[], None] = lambda: None,
) -> None:
    """Train from `position` to the end of the epoch, or until a request to stop.

    All ranks stop and save together: before each step they begin to ask each other, after it they act on the answer.

    Args:
        task: models, optimiser, losses.
        batches: on the device, from position.samples on.
        position: moved along after every step.
        stop: one process looks at it after every step, several before it.
        steps_in_epoch: optimiser steps of a whole epoch.
        log_every: steps between two reads of the losses from the device.
        after_step: called with the position and, every log_every steps, the row to log, else None.
        is_save_due: looked at as stop is.
        save: called on all ranks after a step when is_save_due was true on one; not at the epoch's end or a stop.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    clock, groups = task.clock, batches_by_step(batches, task.accumulation_steps)
    clock.restart()
    epoch_end = position.epoch_start + steps_in_epoch
    while position.step < epoch_end:
        with clock.part("wait"):
            group = next(groups, None)
        assert group is not None, f"the loader ended at step {position.step}, the epoch at {epoch_end}"
        vote = distributed.Vote(lambda: stop.requested, is_save_due)
        losses = train_step(task, group, position.step, position.epoch)
        num_images = sum(len(batch.images) for batch in group)
        del group  # before the next one is fetched: a step's batches are there once
        clock.count(num_images)
        is_logged = (position.step + 1) % log_every == 0
        # on the CPU reading a number is free, so a bad step is caught at once; on CUDA the host would wait for it
        if is_logged or task.device.type == "cpu":
            check_numbers(task)
        row = None
        if is_logged:
            row = read_losses(losses) | {"lr": task.schedule.at(position.step)} | clock.summary()
            row["images_per_second"] *= distributed.world_size()
        position.step += 1
        position.samples += num_images * distributed.world_size()
        after_step(position, row)
        is_stopped, is_due = vote.read()
        if is_stopped:
            return
        if is_due and position.step < epoch_end:
            save()


def read_losses(losses: dict[str, Tensor]) -> dict[str, float]:
    """The losses as numbers, mean over ranks; the host waits for the device here."""
    values = distributed.mean_over_ranks(torch.stack([value.float() for value in losses.values()])).tolist()
    return dict(zip(losses, values, strict=True))


def check_numbers(task: Task) -> None:
    """Raise FloatingPointError on every rank when one has had too many steps that are NaN or infinite.

    The host waits for the device here, and the device for the other ranks: NCCL waits ten minutes for a dead one. So a
    barrier of gloo comes first, which fails at once when a rank is gone.
    """
    distributed.wait_for_all()
    if distributed.any_rank(task.bad_steps.exceeded())[0]:
        raise FloatingPointError(task.bad_steps.describe(task.schedule.at))
    if task.precision == "fp16" and task.scaler.get_scale() < _SMALLEST_FP16_SCALE:
        raise FloatingPointError(
            f"fp16 gradients overflow even at a loss scale of {task.scaler.get_scale():g}; use precision: bf16 or fp32"
        )
