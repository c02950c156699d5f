"""The batches of an epoch for the trainer: in order, from any position, on the device.

PretrainingLoader keeps the position in the order and returns batches that a BatchStream has filled ahead.
DevicePrefetcher copies the next batch to the GPU while the current step runs.
"""

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.data import Dataset

from distillery.cache.index import CacheIndex
from distillery.reading.datasets import whole
from distillery.reading.order import EpochOrder, Sampling, rank_slice
from distillery.reading.raw import RawRows
from distillery.reading.rows import CachedRows
from distillery.reading.staging import Staging
from distillery.reading.stream import Batch, BatchMemory, BatchStream
from distillery.system import distributed
from distillery.system.errors import UserError


class PretrainingLoader:
    """Batches of an epoch in its order, read ahead by threads; made by build_pretraining_dataloader.

    dataset: the data set the rows come from. valid_rows_per_shard, shard_names (None for raw images), fingerprint,
    normalized (whether float batches are normalised; uint8 ones never are), index (None for raw images), is_encoded
    (whether rows of a cache are decoded when they are read): facts for the trainer. staging: copies of the shards on
    the node's own disk; None: there are none. The loader closes it.

    crop_boxes: None: whole images. Of a compressed cache a function may be put here that says what of each image is
    decoded, resized to image_size: (global_idx int64 [n], epoch) -> float32 [n, 4], the left edge, top edge, width and
    height of a box, as shares of the image's sides. The next iteration has it.
    """

    def __init__(
        self,
        dataset: Dataset,
        rows: CachedRows | Callable[[], RawRows],
        sampling: Sampling,
        *,
        image_shape: tuple[int, int, int],
        batch_size: int,
        num_threads: int,
        prefetch_batches: int,
        pin_memory: bool,
        with_indices: bool,
        index: CacheIndex | None,
        normalized: bool,
        staging: Staging | None = None,
        stall_s: float = 60.0,
    ) -> None:
        self.dataset, self.sampling, self.normalized = dataset, sampling, normalized
        self.batch_size, self.image_shape, self.with_indices = batch_size, image_shape, with_indices
        self.num_threads, self.prefetch_batches = num_threads, prefetch_batches
        self.pin_memory, self.stall_s = pin_memory, stall_s
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.valid_rows_per_shard: list[int] = sampling.shard_rows.tolist()
        self.index, self.staging = index, staging
        self.shard_names = index and list(index.shard_names)
        self.fingerprint = index.fingerprint if index else ""
        self.is_encoded = index is not None and index.is_encoded
        self.crop_boxes: Callable[[Tensor, int], Tensor] | None = None
        self.epoch = 0
        self._rows = rows
        self._samples = self._resume_at = 0
        self._waited_s = 0.0
        self._stream: BatchStream | None = None
        self._memory: BatchMemory | None = None
        self._order: tuple[int, EpochOrder] | None = None
        if staging is not None:
            staging.close_with(self)

    @property
    def wait_seconds(self) -> float:
        """Time all iterations so far have waited for data, s."""
        return self._waited_s + (self._stream.wait_seconds if self._stream is not None else 0.0)

    def num_batches(self, epoch: int) -> int:
        """Batches per process in epoch number `epoch`."""
        return self.sampling.num_batches(epoch)

    def __len__(self) -> int:
        return len(self._epoch_order()) // self.sampling.global_batch

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration goes through; a position that was loaded for it is kept."""
        self._choose_epoch(epoch)
        self._tell_position()

    def _choose_epoch(self, epoch: int) -> None:
        epoch = whole(epoch, "epoch", least=0)
        if epoch != self.epoch:
            self.epoch, self._samples, self._resume_at = epoch, 0, 0
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def close(self) -> None:
        """Remove the copies on the node's own disk, unless other processes use them; batches can be read on."""
        if self.staging is not None:
            self.staging.close()

    def state_dict(self) -> dict[str, int]:
        """{"epoch", "samples"}: samples of the epoch's global order that all ranks together have been given."""
        return {"epoch": self.epoch, "samples": self._samples}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration begin where the state was taken; nothing before it is read.

        Raises:
            UserError: that position is not at the border of a global batch of this batch_size and number of processes,
                or `state` is no position.
        """
        if not isinstance(state, Mapping) or not {"epoch", "samples"} <= state.keys():
            raise UserError(f"a position is a dict of epoch and samples, found {state!r}.")
        samples, global_batch = whole(state["samples"], "samples", least=0), self.sampling.global_batch
        if samples % global_batch:
            raise UserError(
                f"a position of {samples} samples is not a multiple of {global_batch} (batch_size {self.batch_size} x "
                f"{self.world_size} processes): choose a batch_size whose product with the processes divides it."
            )
        self._choose_epoch(state["epoch"])
        self._samples = self._resume_at = samples
        self._tell_position()

    def __iter__(self) -> Iterator[Any]:
        """Batches of this process: float32 [B, 3, H, W], or as stored; with_indices: (batch, int64 [B])."""
        return self._iterate(held=False)

    def held_batches(self) -> Iterator[Any]:
        """As __iter__, for one who holds each batch until its copies to the device are done: less pinned memory."""
        return self._iterate(held=True)

    def peek(self, num_images: int) -> tuple[Tensor, Tensor]:
        """The first few images of the next iteration, at most a batch, and global_idx, int64 [n].

        They are read in this call, into memory of their own. The position stays, and nothing is read ahead.
        """
        rows, first = self.rows(), self._resume_at // self.sampling.global_batch
        start, stop = rank_slice(first, self.batch_size, self.rank, self.world_size)
        shards, nth = self._epoch_order().rows(start, min(stop, start + num_images))
        out, global_idx = np.empty((len(nth), rows.row_bytes), np.uint8), np.empty(len(nth), np.int64)
        try:
            if not isinstance(rows, CachedRows):
                rows.prepare(shards, nth, lambda: True)
            rows.fill(shards, nth, out, global_idx)
        finally:
            rows.close()
        images = torch.from_numpy(out).view(rows.dtype).view(len(nth), *self.image_shape)
        return images, torch.from_numpy(global_idx)

    def rows(self) -> CachedRows | RawRows:
        """What fills this epoch's batches, for one iteration."""
        if not isinstance(self._rows, CachedRows):
            return self._rows()
        if self.crop_boxes is None:
            return self._rows
        return self._rows.cropped(functools.partial(_boxes_of_epoch, self.crop_boxes, self.epoch))

    def _iterate(self, *, held: bool) -> Iterator[Any]:
        first = self._resume_at // self.sampling.global_batch
        self._samples, self._resume_at = self._resume_at, 0
        self._tell_position()
        rows = self.rows()
        if isinstance(rows, CachedRows):
            rows.files.recheck_presence()
        stream = BatchStream(
            self._plan(self._epoch_order(), first),
            rows,
            self._batch_memory(rows.row_bytes, held),
            row_bytes=rows.row_bytes,
            num_threads=self.num_threads,
            ahead=self.prefetch_batches,
            stall_s=self.stall_s,
        )
        self._waited_s, self._stream = self.wait_seconds, stream
        return self._batches(stream, rows.dtype)

    def _batches(self, stream: BatchStream, dtype: torch.dtype) -> Iterator[Any]:
        try:
            # map, not a loop: nothing here shall hold a batch that its consumer has dropped
            yield from map(lambda batch: self._item(batch, dtype), stream)
        finally:
            stream.close()

    def _item(self, batch: Batch, dtype: torch.dtype) -> Any:
        self._samples += self.sampling.global_batch
        self._tell_position()
        images = batch.memory.view(dtype).view(self.batch_size, *self.image_shape)
        return (images, torch.from_numpy(batch.global_idx)) if self.with_indices else images

    def _tell_position(self) -> None:
        if self.staging is not None:
            self.staging.move_to(self.epoch, self._samples)

    def _epoch_order(self) -> EpochOrder:
        if self._order is None or self._order[0] != self.epoch:
            self._order = self.epoch, self.sampling.order(self.epoch)
        return self._order[1]

    def _batch_memory(self, row_bytes: int, held: bool) -> BatchMemory:
        pinned = self.pin_memory and torch.cuda.is_available() and torch.cuda.is_initialized()
        memory = self._memory
        if memory is None or (memory.pinned, memory.held) != (pinned, held):
            # as many as are in use at a time: a step holds one, what copies it or adds to it a few more
            keep = self.prefetch_batches + 6
            memory = BatchMemory(self.batch_size * row_bytes, pinned=pinned, held=held, keep=keep)
        self._memory = memory
        return memory

    def _plan(self, order: EpochOrder, first: int) -> Iterator[tuple]:
        """For each batch its rows of this rank, and this rank's rows of the windows to read ahead from then on."""
        global_batch = self.sampling.global_batch
        prepared = first * global_batch
        for batch in range(first, len(order) // global_batch):
            start, stop = rank_slice(batch, self.batch_size, self.rank, self.world_size)
            windows = []
            # up to the end of the window after the one that the batch ends in
            end = order.window_bounds((batch + 1) * global_batch - 1)[1]
            if end < len(order):
                end = order.window_bounds(end)[1]
            while prepared < end:
                until = order.window_bounds(prepared)[1]
                shards, nth = order.rows(prepared, until)
                mine = np.arange(prepared, until) % global_batch // self.batch_size == self.rank
                windows.append((shards[mine], nth[mine]))
                prepared = until
            yield order.rows(start, stop), windows


def _boxes_of_epoch(crop_boxes: Callable[[Tensor, int], Tensor], epoch: int, global_idx: np.ndarray) -> np.ndarray:
    return crop_boxes(torch.from_numpy(global_idx), epoch).numpy()


def held_batches(loader: Any) -> Iterator[Any]:
    """A loader's batches for one who holds each until its copies to the device are done, where that matters."""
    return getattr(loader, "held_batches", loader.__iter__)()


class DevicePrefetcher:
    """A loader's batches on the device, copied one ahead on a stream of their own; on the CPU it hands them through.

    wait_seconds: time spent waiting for the loader, s. state_dict(): the loader's position as of the batch handed out
    last, not of the one already fetched.

    Args:
        loader: yields tensors or tuples of them, nested or with None in the place of some, in page-locked memory where
            copies are to overlap. From held_batches() where it has that method: their memory may be used again as
            soon as the batch is dropped.
        device: where to.
    """

    def __init__(self, loader: Any, device: torch.device | str) -> None:
        self.loader, self.device = loader, torch.device(device)
        self.wait_seconds = 0.0
        self._state = self._loader_state()

    def __len__(self) -> int:
        return len(self.loader)

    def state_dict(self) -> dict[str, int]:
        """The position after the batch that was handed out last."""
        return dict(self._state)

    def __iter__(self) -> Iterator[Any]:
        if self.device.type != "cuda":
            for batch, state in self._fetched(iter(self.loader)):
                self._state = state
                yield batch
            return
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        copies, ahead = copies_to(index), None
        for batch, state in self._fetched(held_batches(self.loader)):
            moved, arrived = copies.begin(batch)
            del batch
            if ahead is not None:
                yield self._hand_out(*ahead)
            ahead = moved, arrived, state
        if ahead is not None:
            yield self._hand_out(*ahead)

    def _fetched(self, batches: Iterator[Any]) -> Iterator[tuple[Any, dict]]:
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            fetched = batch, self._loader_state()
            del batch
            yield fetched
            del fetched

    def _hand_out(self, batch: Any, arrived: "torch.cuda.Event", state: dict) -> Any:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(arrived)
        # the memory was allocated on the copy stream: it must not go back there while the current stream works on it
        tree_map_only(Tensor, lambda tensor: tensor.record_stream(current), batch)
        self._state = state
        return batch

    def _loader_state(self) -> dict:
        return self.loader.state_dict() if hasattr(self.loader, "state_dict") else {}


class DeviceCopies:
    """Copies of batches to one GPU, on a stream of their own, and the host's batches that they still read."""

    def __init__(self, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.Stream(self.device)
        self._running: deque[tuple[torch.cuda.Event, Any]] = deque()

    def begin(self, batch: Any) -> tuple[Any, "torch.cuda.Event"]:
        """The batch on the device, and the event after which it is whole."""
        while self._running and self._running[0][0].query():
            self._running.popleft()
        with torch.cuda.stream(self.stream):
            moved = tree_map_only(Tensor, lambda tensor: tensor.to(self.device, non_blocking=True), batch)
            arrived = torch.cuda.Event()
            arrived.record(self.stream)
        # dropped earlier, its memory could be filled with another batch while the GPU still reads this one
        self._running.append((arrived, batch))
        return moved, arrived


@functools.cache
def copies_to(index: int) -> DeviceCopies:
    """Those to GPU number `index`: one stream for the whole process, as what a stream has freed no other can use."""
    return DeviceCopies(index)
