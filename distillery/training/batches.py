"""What a training step needs, made ahead of it: the batch, its draws, and the teacher's outputs where they are stored.

    StepBatch                  all tensors of one batch
    live_batch, stored_batch   make it of images and their global_idx
    StepLoader                 makes those of an epoch, one batch ahead, in a thread

The draws are functions of (seed, epoch, global_idx): the thread makes them where global_idx is, on the host. On the
device they would be a hundred tiny kernels a step.
"""

import functools
import itertools
import queue
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from distillery.losses.registry import needs_second_view
from distillery.reading.loader import held_batches
from distillery.reading.stream import BatchMemory
from distillery.system.errors import RunError
from distillery.training.task import Task

# of a tensor in a piece of memory: enough for every type
_ALIGNMENT = 64

# added to the epoch for the draws of a sample's second view: no run has so many epochs
SECOND_VIEW = 2**31


class StepBatch(NamedTuple):
    """What a training step takes of one batch, on the host or on the device.

    images: [B, 3, H, W], as the loader yields them.
    global_idx: int64 [B], each image's place in the source.
    view: float32 [B, V], the parameters of the view that both models see, for Augmentation.apply.
    second_view: those of the view that the teacher alone sees; None where no loss compares with it, or it is stored.
    depth: float32 [B, L], the factors of the student's stochastic depth; None where the student has none.
    stored: the teacher's outputs, as StoredTargets.read gives them; None where the step runs the teacher.
    """

    images: Tensor
    global_idx: Tensor
    view: Tensor
    second_view: Tensor | None = None
    depth: Tensor | None = None
    stored: tuple[Tensor, ...] | None = None


def live_batch(task: Task, images: Tensor, global_idx: Tensor, epoch: int) -> StepBatch:
    """A batch of a step that runs the teacher; global_idx int64 [B], on the device where the draws are to be."""
    view, second = task.augment.draw(global_idx, seed=task.seed, epoch=epoch), None
    if needs_second_view(task.loss_weights):
        second = task.augment.draw(global_idx, seed=task.seed, epoch=epoch + SECOND_VIEW)
    return StepBatch(images, global_idx, view, second, _depth(task, global_idx, epoch))


def stored_batch(task: Task, images: Tensor, global_idx: Tensor, epoch: int) -> StepBatch:
    """A batch of a step that takes the teacher's stored outputs; global_idx int64 [B], on the CPU."""
    view, stored = task.stored.draw(global_idx, epoch), task.stored.read(global_idx, epoch)
    return StepBatch(images, global_idx, view, None, _depth(task, global_idx, epoch), stored)


def _depth(task: Task, global_idx: Tensor, epoch: int) -> Tensor | None:
    if task.depth is None or not task.depth.layers:
        return None
    return task.depth.draw(global_idx, seed=task.seed, epoch=epoch)


class StepLoader:
    """A loader's batches with all that their steps need, made by a thread one batch ahead.

    Args:
        task: whose steps.
        loader: yields (images, global_idx) in host memory.
        epoch: that the loader stands in.
        step: that its next batch belongs to.
        stall_s: a read of stored outputs that takes longer is an error.
    """

    def __init__(self, task: Task, loader: Any, *, epoch: int, step: int, stall_s: float = 60.0) -> None:
        self.task, self.loader, self.epoch, self.step, self.stall_s = task, loader, epoch, step, stall_s

    def __iter__(self) -> Iterator[StepBatch]:
        return self._batches(iter(self.loader), pin=False)

    def held_batches(self) -> Iterator[StepBatch]:
        """As __iter__, for one who holds each batch until its copies to the device are done; in pinned memory."""
        batches = held_batches(self.loader)
        return self._batches(batches, pin=getattr(self.loader, "pin_memory", False))

    def _batches(self, batches: Iterator[tuple[Tensor, Tensor]], *, pin: bool) -> Iterator[StepBatch]:
        wanted, made = queue.SimpleQueue(), queue.SimpleQueue()
        _start_thread(self._make_all, wanted, made, pin)
        is_ahead = False
        try:
            for batch in batches:
                wanted.put(batch)
                del batch
                if is_ahead:
                    yield self._next(made)
                is_ahead = True
            if is_ahead:
                yield self._next(made)
        finally:
            wanted.put(None)

    def _next(self, made: queue.SimpleQueue) -> StepBatch:
        try:
            batch = made.get(timeout=None if self.task.stored is None else self.stall_s)
        except queue.Empty:
            raise RunError(
                f"{self.task.stored.cache.directory}: a read has not come back for {self.stall_s:.0f} s. The disk or "
                "network file system that holds it does not answer; check it, then run the same command again."
            ) from None
        if isinstance(batch, BaseException):
            raise batch
        return batch

    def _make_all(self, wanted: queue.SimpleQueue, made: queue.SimpleQueue, pin: bool) -> None:
        for number in itertools.count():
            if (batch := wanted.get()) is None:
                return
            try:
                found = self._make(batch, self.step + number // self.task.accumulation_steps)
                made.put(_pinned(found, self.task.device) if pin else found)
            except BaseException as error:
                made.put(error)
            # nothing of a batch may be held while waiting: its memory goes back when the consumer drops it
            batch = found = None

    def _make(self, batch: tuple[Tensor, Tensor], step: int) -> StepBatch:
        stored = self.task.stored
        make = live_batch if stored is None or stored.is_live(step) else stored_batch
        return make(self.task, *batch, self.epoch)


def _pinned(batch: StepBatch, device: torch.device) -> StepBatch:
    """The batch, all but its images in one piece of page-locked memory: copies from elsewhere make the host wait."""
    others = batch._replace(images=None)
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tree_leaves(others) if tensor is not None]
    parts = iter(_page_locked_memory(sum(sizes), device).take().split(sizes))

    def move(tensor: Tensor) -> Tensor:
        return next(parts)[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)

    return tree_map_only(Tensor, move, others)._replace(images=batch.images)


@functools.lru_cache(maxsize=4)
def _page_locked_memory(num_bytes: int, device: torch.device) -> BatchMemory:
    """For batches of one size, of all epochs: locking costs more than copying. A run has one size, or two if hybrid."""
    with torch.cuda.device(device):
        return BatchMemory(num_bytes, pinned=True, held=True)


def _start_thread(work: Any, *arguments: Any) -> None:
    """Run `work` in a thread that computes on one core and keeps nobody from ending."""
    num_threads, is_set = torch.get_num_threads(), threading.Event()

    def run() -> None:
        # torch's own threads would compete with the training step
        torch.set_num_threads(1)
        is_set.set()
        work(*arguments)

    threading.Thread(target=run, name="make-batches", daemon=True).start()
    is_set.wait()
    # what the thread set for itself is also what every thread to come would get
    torch.set_num_threads(num_threads)
