"""Who decodes: a pool of worker processes that gets encoded images through shared memory, or this process itself.

Measured on two cores against threads in one process: threads reach 0.75 to 0.90 of the speed of processes, because the
Python between the calls that release the interpreter's lock does not. What processes cost is kept small: they are forks
of one process that has imported torch once, and images do not pass through a pipe, which took a sixth of the time that
decoding them takes.
"""

import ctypes
import mmap
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.reduction import DupFd

from distillery.decode import Unit, UnitResult, write_unit
from distillery.preprocess import DecodeError, PreprocessSpec, decode_image
from distillery.process import STOP_SIGNALS, ignore_stop_signals

SLOT_BYTES = 4 << 20
_IMAGES_LOOKED_AT = 4


class InlinePool:
    """Decodes in submit: for one worker there is nothing to gain from a second process."""

    capacity = 1

    def submit(self, unit: Unit) -> Future:
        """A future of the UnitResult, which is done."""
        future: Future = Future()
        try:
            future.set_result(write_unit(unit))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:
        """There is nothing to end."""


class ProcessPool:
    """Worker processes; `capacity` units may be in flight.

    The workers hold the reading end of a pipe whose writing end this process alone has, and end when it closes: none
    outlives this process, however it dies, and signals to the whole process group are left to it.
    """

    def __init__(self, num_workers: int, *, preload: Sequence[str] = ()) -> None:
        # for each worker a unit in hand and one that waits
        self.capacity = 2 * num_workers + 2
        self._slots = Slots(self.capacity)
        self._free = deque(range(self.capacity))
        self._unfinished: set[Future] = set()
        self._is_broken = False
        self._leash, self._leash_end = os.pipe()
        # forks of a server: to fork this process, which runs Arrow's threads, can deadlock, and in a fresh interpreter
        # each worker would import torch for itself
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distillery.decode_pool", *preload])
        with _signals_blocked():
            # apart and first: starting it ends the blocking of SIGINT and SIGTERM
            resource_tracker.ensure_running()
        with _signals_blocked():
            self._executor = ProcessPoolExecutor(
                num_workers, context, initializer=_start_worker, initargs=(self._slots, _Descriptor(self._leash))
            )
            for _ in range(num_workers):  # starts them
                self._executor.submit(os.getpid)

    def submit(self, unit: Unit) -> Future:
        """A future of the UnitResult.

        Raises:
            BrokenProcessPool: a worker died.
        """
        slot, lengths = None, [len(data) for data in unit.images]
        if sum(lengths) <= SLOT_BYTES and self._free:
            slot = self._free.popleft()
            self._slots.fill(slot, unit.images)
            task = (_write_unit_of_slot, replace(unit, images=[]), slot, lengths)
        else:
            task = (write_unit, replace(unit, images=list(map(bytes, unit.images))))
        try:
            with _signals_blocked():
                future = self._executor.submit(*task)
        except BrokenProcessPool:  # a worker died while none of its units were in flight
            self._is_broken = True
            raise
        self._unfinished.add(future)
        future.add_done_callback(lambda future: self._on_done(future, slot))
        return future

    def _on_done(self, future: Future, slot: int | None) -> None:
        self._is_broken |= isinstance(future.exception(), BrokenProcessPool)
        if slot is not None:
            self._free.append(slot)
        self._unfinished.discard(future)

    def close(self) -> None:
        """End the workers; what they have in hand is dropped."""
        if self._unfinished or self._is_broken:
            # at once: they ignore the signal by which a broken executor would end them, and wait for ever
            os.close(self._leash_end)
            self._executor.shutdown(wait=True)
        else:
            self._executor.shutdown(wait=True)
            os.close(self._leash_end)
        os.close(self._leash)
        self._slots.close()


def decode_pool(
    num_workers: int, spec: PreprocessSpec, dtype: str, first_images: Sequence[bytes]
) -> InlinePool | ProcessPool:
    """Worker processes, or this process itself for one worker; the first images tell what the workers will need."""
    if num_workers <= 1:
        return InlinePool()
    preload = ["torch"] if needs_resampler(spec, first_images[:_IMAGES_LOOKED_AT]) else []
    return ProcessPool(num_workers, preload=[*preload, *(["pyarrow.compute"] if dtype != "uint8" else [])])


def needs_resampler(spec: PreprocessSpec, images: Sequence[bytes]) -> bool:
    """Whether some of the images must be resized by torch."""
    if spec.interpolation == "lanczos":
        return False
    for data in images:
        try:
            height, width, _ = decode_image(data).shape
        except DecodeError:
            continue
        if height != spec.image_size or width != spec.image_size:
            return True
    return False


def split_by_bytes(
    images: Sequence[bytes | memoryview], most: int = SLOT_BYTES
) -> Iterator[Sequence[bytes | memoryview]]:
    """Runs of consecutive images of at most `most` bytes; an image larger than that is a run of its own."""
    start = num_bytes = 0
    for i, data in enumerate(images):
        if i > start and num_bytes + len(data) > most:
            yield images[start:i]
            start, num_bytes = i, 0
        num_bytes += len(data)
    if images:
        yield images[start:]


class Slots:
    """Memory in pieces of SLOT_BYTES that this process fills and the worker processes read.

    No file and no name: nothing is left behind, and a container's small /dev/shm is no limit.
    """

    def __init__(self, count: int, fd: int | None = None) -> None:
        self._count = count
        self._fd = os.memfd_create("encoded-images") if fd is None else fd
        os.ftruncate(self._fd, count * SLOT_BYTES)
        self._memory = mmap.mmap(self._fd, count * SLOT_BYTES)

    def fill(self, slot: int, images: Sequence[bytes | memoryview]) -> None:
        """Put images, SLOT_BYTES at most, one after another into a slot."""
        position = slot * SLOT_BYTES
        for data in images:
            self._memory[position : position + len(data)] = data
            position += len(data)

    def read(self, slot: int, lengths: Sequence[int]) -> list[memoryview]:
        """The images, of these lengths, that a slot holds: as long as it is not filled anew."""
        images, position, memory = [], slot * SLOT_BYTES, memoryview(self._memory)
        for length in lengths:
            images.append(memory[position : position + length])
            position += length
        return images

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()
        os.close(self._fd)

    def __reduce__(self) -> tuple:
        return _attach_slots, (self._count, _Descriptor(self._fd))


class _Descriptor:
    """A file descriptor that arrives, as a number valid there, in a worker process that is being started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple:
        return _detach, (DupFd(self.fd),)


def _detach(duplicate) -> int:
    return duplicate.detach()


def _attach_slots(count: int, fd: int) -> Slots:
    return Slots(count, fd)


_slots: Slots | None = None


def _start_worker(slots: Slots, leash: int) -> None:
    global _slots
    _slots = slots
    ignore_stop_signals()
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, args=(leash,), daemon=True).start()


def keep_freed_memory() -> None:
    """Have the C library keep the memory of one image for the next: pages that come anew from the system cost more.

    Source: mallopt(3); 32 MiB is the most it takes. Other C libraries than GNU's have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD


def _end_with_parent(leash: int) -> None:
    """Nothing is ever written to the leash: reading it returns when its other end is closed."""
    os.read(leash, 1)
    os._exit(1)


def _write_unit_of_slot(unit: Unit, slot: int, lengths: Sequence[int]) -> UnitResult:
    return write_unit(replace(unit, images=_slots.read(slot, lengths)))


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the mask, so that no group signal ends them before they can ignore it."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
