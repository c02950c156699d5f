"""Fill batches ahead of the consumer: reused memory, threads that fill it, batches in order.

    BatchMemory   memory that is used again once the last tensor or view of a batch is gone; page_locked for a GPU
    BatchStream   threads fill batches ahead of the consumer; a dead or stalled disk is an error, never a hang

Threads, not processes: reads and decoders release the GIL, and processes would pay a second copy through /dev/shm.
"""

import functools
import mmap
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distillery.system.console import format_bytes
from distillery.system.errors import RunError

_SLOW_S = 10.0
_POLL_S = 0.25
_LAST_READS_S = 1.0
RowIds = tuple[np.ndarray, np.ndarray]


class Rows(Protocol):
    """Where a stream's rows come from. A row is named by (shard, nth): int64, the nth valid row of a shard.

    reading: per thread, what it is reading and since when (time.monotonic); for the message of a stall.
    """

    reading: dict[int, tuple[str, float]]

    def fill(self, shards: np.ndarray, nth: np.ndarray, out: np.ndarray, global_idx: np.ndarray) -> None:
        """Write n rows into out, uint8 [n, row bytes], and their places in the source into global_idx, int64 [n]."""

    def prepare(self, shards: np.ndarray, nth: np.ndarray, go_on: Callable[[], bool]) -> None:
        """Prepare rows that fill() will need soon; stop when go_on returns False."""

    def close(self) -> None:
        """Drop the prepared rows; a fill that waits for them ends with an error."""


class BatchMemory:
    """Memory for batches of one size. A piece is used again when none of its tensors and views is left.

    A fresh batch costs a page fault per 4 KiB, more than reading into it; a piece used before costs none.

    Args:
        num_bytes: of a piece.
        pinned: page-locked, for copies to the device that the host need not wait for.
        held: whoever takes a pinned piece holds it until the copies from it are done. It is then the device's own
            memory, of num_bytes. Else it comes from torch's cache of such memory, which waits for running copies by
            itself, and rounds up to a power of two.
        keep: unused pieces kept at most.
    """

    def __init__(self, num_bytes: int, *, pinned: bool = False, held: bool = False, keep: int = 8) -> None:
        self.num_bytes, self.pinned, self.held, self.keep = num_bytes, pinned, held, keep
        self.num_allocated = 0
        self._free: deque[np.ndarray] = deque()
        # a thread that takes a piece has GPU 0 as its current one, whichever this process works on
        self._device = torch.cuda.current_device() if pinned and held else None

    def take(self) -> Tensor:
        """uint8 [num_bytes], contents arbitrary."""
        if self.pinned and not self.held:
            return torch.empty(self.num_bytes, dtype=torch.uint8, pin_memory=True)
        try:
            piece = self._free.pop()
        except IndexError:
            piece = page_locked(self.num_bytes, self._device) if self.pinned else np.empty(self.num_bytes, np.uint8)
            self.num_allocated += 1
        # this view dies with the tensor's storage, whatever views of the tensor there were
        lent = piece[:]
        weakref.finalize(lent, self._give_back, piece).atexit = False
        return torch.from_numpy(lent)

    def _give_back(self, piece: np.ndarray) -> None:
        if len(self._free) < self.keep:
            self._free.append(piece)


def page_locked(num_bytes: int, device: int) -> np.ndarray:
    """uint8 [num_bytes] that GPU number `device` reads by itself; ordinary memory, and a line, where it cannot be had.

    It is unlocked when the array and its views are gone: no copy from it may be running then.
    """
    # whole pages, as the lock is on pages; shared ones, of which a fork makes no copy under the eyes of the GPU
    piece = np.frombuffer(mmap.mmap(-1, num_bytes), np.uint8)
    cudart = torch.cuda.cudart()
    with torch.cuda.device(device):
        error = cudart.cudaHostRegister(piece.ctypes.data, num_bytes, 0)
    if int(error) == 0:
        # the end of the process unlocks what is left
        weakref.finalize(piece, _unlock, cudart, piece.ctypes.data, device).atexit = False
        return piece
    try:
        piece = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        instead = "torch's page-locked memory is used, which takes up to twice as much"
    except RuntimeError:
        piece = np.empty(num_bytes, np.uint8)
        instead = "ordinary memory is used, and each copy to the GPU makes the host wait"
    say_once(f"{format_bytes(num_bytes)} could not be page-locked (CUDA error {int(error)}; see ulimit -l): {instead}")
    return piece


def _unlock(cudart: Any, address: int, device: int) -> None:
    with torch.cuda.device(device):
        cudart.cudaHostUnregister(address)


@functools.cache
def say_once(line: str) -> None:
    """Print a line on stderr, the first time."""
    print(line, file=sys.stderr, flush=True)


@dataclass
class Batch:
    """A batch on its way. memory: uint8 [B * row bytes]; global_idx: int64 [B]; ready: one entry per finished part."""

    shards: np.ndarray
    nth: np.ndarray
    source: BatchMemory
    memory: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)
    global_idx: np.ndarray = field(init=False)
    ready: queue.SimpleQueue = field(default_factory=queue.SimpleQueue)
    parts: int = 0

    def __post_init__(self) -> None:
        self.global_idx = np.full(len(self.shards), -1, np.int64)

    def rows(self, start: int, stop: int, row_bytes: int) -> np.ndarray:
        """uint8 [stop - start, row_bytes] of the batch's memory.

        It is taken when the first row is about to be written: what was given back last is still in the CPU's cache.
        """
        with self.lock:
            if self.memory is None:
                self.memory = self.source.take()
        return self.memory.numpy()[start * row_bytes : stop * row_bytes].reshape(stop - start, row_bytes)


class BatchStream(Iterator[Batch]):
    """Batches in the order of `plan`, filled ahead by threads.

    Args:
        plan: for each batch its rows, and the windows of rows that are to be prepared from now on.
        rows: fills parts of batches, called by num_threads threads; prepares windows, called by one more.
        memory: pieces of a batch's size.
        row_bytes: of a row in a batch.
        num_threads: filling at a time.
        ahead: batches that are ready or being filled while the consumer works on one.
        stall_s: when a batch does not come and one read has not returned for so long, that is an error.

    Raises:
        What `rows` raises, at the batch it concerns; RunError: a stall, or a thread that died.
    """

    def __init__(
        self,
        plan: Iterable[tuple[RowIds, list[RowIds]]],
        rows: Rows,
        memory: BatchMemory,
        *,
        row_bytes: int,
        num_threads: int,
        ahead: int,
        stall_s: float = 60.0,
    ) -> None:
        self._plan = iter(plan)
        self._rows, self._memory = rows, memory
        self._num_threads, self._ahead, self._stall_s = num_threads, ahead, stall_s
        self._batches: deque[Batch] = deque()
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._windows: queue.SimpleQueue = queue.SimpleQueue()
        self.wait_seconds = 0.0
        self._fillers = self._start_threads(row_bytes)
        stopped = threading.Event()
        self._preparer = threading.Thread(
            target=_prepare_windows, args=(self._windows, rows, stopped), name="read-ahead", daemon=True
        )
        self._preparer.start()
        self._end = weakref.finalize(self, _end_threads, self._tasks, num_threads, self._windows, stopped, rows)
        self._end.atexit = False

    def _start_threads(self, row_bytes: int) -> list[threading.Thread]:
        num_torch_threads = torch.get_num_threads()
        started = threading.Barrier(self._num_threads + 1)
        # daemon: a thread stuck in a dead disk's read must not keep the process from ending
        threads = [
            threading.Thread(
                target=_fill_batches, args=(self._tasks, self._rows, row_bytes, started), name="read-rows", daemon=True
            )
            for _ in range(self._num_threads)
        ]
        for thread in threads:
            thread.start()
        started.wait()
        # the fillers set their own number to 1, which is also what every thread to come would get
        torch.set_num_threads(num_torch_threads)
        return threads

    def __next__(self) -> Batch:
        self._submit()
        if not self._batches:
            self.close()
            raise StopIteration
        batch = self._batches.popleft()
        began = time.monotonic()
        try:
            for _ in range(batch.parts):
                if (error := self._wait_for_part(batch, began)) is not None:
                    raise error
        except BaseException:
            self.close()
            raise
        finally:
            self.wait_seconds += time.monotonic() - began
        return batch

    def close(self) -> None:
        """End the threads; batches that were handed out stay valid."""
        self._end()
        self._batches.clear()
        self._plan = iter(())
        deadline = time.monotonic() + _LAST_READS_S
        for thread in (*self._fillers, self._preparer):
            # the read it is in ends first; a stuck one is left to itself
            thread.join(timeout=max(0.0, deadline - time.monotonic()))

    def _submit(self) -> None:
        while len(self._batches) <= self._ahead:
            planned = next(self._plan, None)
            if planned is None:
                return
            (shards, nth), windows = planned
            for window in windows:
                self._windows.put(window)
            batch = Batch(shards, nth, self._memory)
            edges = np.linspace(0, len(shards), min(self._num_threads, len(shards)) + 1).astype(int).tolist()
            batch.parts = len(edges) - 1
            self._batches.append(batch)
            for start, stop in zip(edges[:-1], edges[1:], strict=True):
                self._tasks.put((batch, start, stop))

    def _wait_for_part(self, batch: Batch, began: float) -> BaseException | None:
        """One part of the batch: None, or the error that came instead."""
        said = False
        while True:
            try:
                return batch.ready.get(timeout=_POLL_S)
            except queue.Empty:
                pass
            now = time.monotonic()
            if not all(thread.is_alive() for thread in self._fillers):
                raise RunError("a reading thread died without an error; the batch it worked on will not come.")
            reads = [(now - since, name) for name, since in list(self._rows.reading.values())]
            seconds, name = max(reads, default=(0.0, ""))
            if seconds > self._stall_s:
                raise RunError(
                    f"{name}: a read has not come back for {seconds:.0f} s. The disk or network file system that holds "
                    "it does not answer; check it, then run the same command again."
                )
            if now - began > _SLOW_S and name and not said:
                said = True
                print(f"waiting for data for {now - began:.0f} s, reading {name}", file=sys.stderr, flush=True)


def _fill_batches(tasks: queue.SimpleQueue, rows: Rows, row_bytes: int, started: threading.Barrier) -> None:
    # torch's own threads would compete with the other fillers and with the training step
    torch.set_num_threads(1)
    started.wait()
    while (task := tasks.get()) is not None:
        batch, start, stop = task
        error = None
        try:
            out = batch.rows(start, stop, row_bytes)
            rows.fill(batch.shards[start:stop], batch.nth[start:stop], out, batch.global_idx[start:stop])
        except BaseException as caught:
            error = caught
        ready = batch.ready
        # nothing of a batch may be held while waiting: its memory goes back when the consumer drops it
        task = batch = out = None
        ready.put(error)
        error = ready = None


def _prepare_windows(windows: queue.SimpleQueue, rows: Rows, stopped: threading.Event) -> None:
    while (window := windows.get()) is not None:
        try:
            rows.prepare(*window, lambda: not stopped.is_set())
        except Exception:
            # this is only reading ahead: who fills a batch with these rows meets the error and reports it
            continue


def _end_threads(
    tasks: queue.SimpleQueue, num_threads: int, windows: queue.SimpleQueue, stopped: threading.Event, rows: Rows
) -> None:
    stopped.set()
    rows.close()
    try:
        while True:
            tasks.get_nowait()
    except queue.Empty:
        pass
    for _ in range(num_threads):
        tasks.put(None)
    windows.put(None)
