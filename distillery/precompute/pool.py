"""Decode images in a pool of worker processes, or in this process. Images and rows travel through shared memory.

Measured on two cores: threads in one process reach 0.75 to 0.90 of the speed of processes, because the Python code
between two decoder calls holds the interpreter's lock. Two measures keep the cost of processes small. The workers are
forks of one process that has imported torch once. Images do not pass through a pipe: a pipe took a sixth of the time
that decoding takes. Workers write rows into the memory from which the disk thread writes them.
"""

import ctypes
import errno
import mmap
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.reduction import DupFd

from distillery.cache.archive import pixel_dtype_of
from distillery.cache.encoded import RowEncoding
from distillery.cache.plan import CachePlan
from distillery.precompute.worker import Unit, UnitResult, make_rows
from distillery.sources.pixels import DecodeError, PreprocessSpec, size_of_image
from distillery.system.console import format_bytes
from distillery.system.direct_io import ALIGNMENT_BYTES
from distillery.system.errors import UserError
from distillery.system.signals import STOP_SIGNALS, ignore_stop_signals

# of a unit: encoded images at most; and rows as they are stored, unless one alone is larger
SLOT_BYTES, STORED_BYTES = 4 << 20, 16 << 20
# of a unit's rows that are encoded images, seldom larger than those they are made of; more go through a pipe
_ENCODED_BYTES = 2 * SLOT_BYTES
# units whose rows wait for the disk, besides those that are being decoded
WRITE_AHEAD = 4
_IMAGES_LOOKED_AT = 4


@dataclass
class Work:
    """A unit that was given to a pool.

    future: of its UnitResult; memory: `gap` free bytes, then its rows; of encoded rows all that they may take.
    """

    future: Future
    memory: memoryview
    slot: int


class Pool(ABC):
    """Decodes units into memory of its own, which each has from submit until release.

    Args:
        capacity: how many units may be decoded or wait for it; WRITE_AHEAD others may be waiting for their release.
        row_bytes: of a row as it is stored; None: rows are encoded images, each of its own length.
        is_shared: whether other processes decode.
    """

    def __init__(self, capacity: int, row_bytes: int | None, *, is_shared: bool = True) -> None:
        self.capacity, self._row_bytes = capacity, row_bytes
        count, stored_bytes = capacity + WRITE_AHEAD, stored_bytes_of(row_bytes)
        fd = create_shared_memory(count * (SLOT_BYTES + stored_bytes)) if is_shared else -1
        self._slots = Slots(count, SLOT_BYTES, stored_bytes, fd)
        # the one released last is taken first: its memory is in use already
        self._free = list(range(self._slots.count))

    def submit(self, unit: Unit, gap: int) -> Work:
        """Have a unit decoded, into memory from byte `gap` of a page on.

        Raises:
            BrokenProcessPool: a worker died.
        """
        slot = self._free.pop()
        memory = self._slots.stored(slot)
        if self._row_bytes is not None:
            memory = memory[: gap + len(unit.images) * self._row_bytes]
        return Work(self._start(unit, slot, gap), memory, slot)

    def release(self, work: Work) -> None:
        """Its rows are no longer needed."""
        self._free.append(work.slot)

    @abstractmethod
    def _start(self, unit: Unit, slot: int, gap: int) -> Future: ...

    @abstractmethod
    def close(self) -> None:
        """Drop what is in hand, and the memory."""


class InlinePool(Pool):
    """Decodes in submit: for one worker there is nothing to gain from a second process."""

    def __init__(self, row_bytes: int | None) -> None:
        super().__init__(1, row_bytes, is_shared=False)

    def _start(self, unit: Unit, slot: int, gap: int) -> Future:
        future: Future = Future()
        try:
            future.set_result(_decode_into(self._slots, slot, gap, unit, self._row_bytes))
        except Exception as error:
            future.set_exception(error)
        return future

    def close(self) -> None:  # noqa: D102
        self._slots.close()


class ProcessPool(Pool):
    """Worker processes.

    The workers hold the reading end of a pipe whose writing end this process alone has, and end when it closes: none
    outlives this process, however it dies, and signals to the whole process group are left to it.
    """

    def __init__(self, num_workers: int, row_bytes: int | None, *, preload: Sequence[str] = ()) -> None:
        super().__init__(units_in_flight(num_workers), row_bytes)
        self._unfinished: set[Future] = set()
        self._is_broken = False
        self._leash, self._leash_end = os.pipe()
        # forks of a server: to fork this process, which runs Arrow's threads, can deadlock, and in a fresh interpreter
        # each worker would import torch for itself
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["distillery.precompute.pool", *preload])
        with _signals_blocked():
            # apart and first: starting it ends the blocking of SIGINT and SIGTERM
            resource_tracker.ensure_running()
        with _signals_blocked():
            self._executor = ProcessPoolExecutor(
                num_workers, context, initializer=_start_worker, initargs=(self._slots, _Descriptor(self._leash))
            )
            for _ in range(num_workers):  # starts them
                self._executor.submit(os.getpid)

    def _start(self, unit: Unit, slot: int, gap: int) -> Future:
        encoded = [*unit.images, *unit.masks]
        lengths = [len(data) for data in encoded]
        if sum(lengths) <= SLOT_BYTES:
            self._slots.fill(slot, encoded)
            unit = replace(unit, images=[], masks=[])
        else:
            unit = replace(unit, images=list(map(bytes, unit.images)), masks=list(map(bytes, unit.masks)))
            lengths = None
        try:
            with _signals_blocked():
                future = self._executor.submit(_decode_slot, slot, gap, unit, self._row_bytes, lengths)
        except BrokenProcessPool:  # a worker died while none of its units were in flight
            self._is_broken = True
            raise
        self._unfinished.add(future)
        future.add_done_callback(self._on_done)
        return future

    def _on_done(self, future: Future) -> None:
        self._is_broken |= isinstance(future.exception(), BrokenProcessPool)
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


def decode_pool(num_workers: int, plan: CachePlan, first_images: Sequence[bytes]) -> InlinePool | ProcessPool:
    """Worker processes, or this process itself for one worker; the first images tell what the workers will need."""
    if num_workers <= 1:
        return InlinePool(plan.image_bytes)
    preload = ["cv2"] if pixel_dtype_of(plan.dtype) != "uint8" else []
    if needs_resampler(plan.spec, first_images[:_IMAGES_LOOKED_AT], plan.encoding):
        preload.append("torch")
    return ProcessPool(num_workers, plan.image_bytes, preload=preload)


def units_in_flight(num_workers: int) -> int:
    """Units that are decoded or wait for it: for each worker one in hand and one that waits."""
    return 2 * num_workers + 2


def stored_bytes_of(row_bytes: int | None) -> int:
    """Memory for a unit's rows, in whole pages; row_bytes as Pool has it."""
    if row_bytes is None:
        return _ENCODED_BYTES
    return -(-(ALIGNMENT_BYTES + max(STORED_BYTES, row_bytes)) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def memory_bytes(num_workers: int, row_bytes: int | None) -> int:
    """What a pool's units take at the most; row_bytes as Pool has it."""
    return (units_in_flight(num_workers) + WRITE_AHEAD) * (SLOT_BYTES + stored_bytes_of(row_bytes))


def needs_resampler(spec: PreprocessSpec, images: Sequence[bytes], encoding: RowEncoding | None = None) -> bool:
    """Whether some of the images must be resized by torch; encoding: of rows that are encoded images."""
    if spec.interpolation == "lanczos":
        return False
    for data in images:
        try:
            size = size_of_image(data, spec)
        except DecodeError:
            continue
        if size != ((spec.image_size, spec.image_size) if encoding is None else encoding.stored_shape(*size)):
            return True
    return False


def split_into_units(
    images: Sequence[bytes | memoryview], row_bytes: int | None, most: int = SLOT_BYTES
) -> Iterator[Sequence[bytes | memoryview]]:
    """Runs of consecutive images of `most` bytes and STORED_BYTES of rows; what is larger alone is a run of its own."""
    most_rows = len(images) if row_bytes is None else max(1, STORED_BYTES // row_bytes)
    start = num_bytes = 0
    for i, data in enumerate(images):
        if i > start and (num_bytes + len(data) > most or i - start == most_rows):
            yield images[start:i]
            start, num_bytes = i, 0
        num_bytes += len(data)
    if images:
        yield images[start:]


def create_shared_memory(num_bytes: int) -> int:
    """A file descriptor of memory for several processes. No name: nothing is left, a small /dev/shm is no limit.

    Raises:
        UserError: a limit on the size of files, which counts here too, is below it.
    """
    fd = os.memfd_create("units")
    try:
        os.ftruncate(fd, num_bytes)
    except OSError as error:
        os.close(fd)
        if error.errno != errno.EFBIG:
            raise
        raise UserError(
            f"decode workers share {format_bytes(num_bytes)} of memory with this process, and a file-size limit "
            "(ulimit -f) below that counts for it too. Raise the limit, or set num_workers: 1, which shares none."
        ) from error
    return fd


class Slots:
    """Memory for `count` units: encoded images, and rows as they are stored.

    fd: of create_shared_memory; -1: memory of this process alone.
    """

    def __init__(self, count: int, encoded_bytes: int, stored_bytes: int, fd: int = -1) -> None:
        self.count, self._encoded_bytes, self._stored_bytes, self._fd = count, encoded_bytes, stored_bytes, fd
        self._memory = memoryview(mmap.mmap(fd, count * (encoded_bytes + stored_bytes)))

    def stored(self, slot: int) -> memoryview:
        """Where a unit's rows come to lie: whole pages."""
        start = self.count * self._encoded_bytes + slot * self._stored_bytes
        return self._memory[start : start + self._stored_bytes]

    def fill(self, slot: int, images: Sequence[bytes | memoryview]) -> None:
        """Put images, encoded_bytes at most, one after another into a slot."""
        position = slot * self._encoded_bytes
        for data in images:
            self._memory[position : position + len(data)] = data
            position += len(data)

    def read(self, slot: int, lengths: Sequence[int]) -> list[memoryview]:
        """The images, of these lengths, that a slot holds: as long as it is not filled anew."""
        images, position = [], slot * self._encoded_bytes
        for length in lengths:
            images.append(self._memory[position : position + length])
            position += length
        return images

    def close(self) -> None:
        """Close the memory; the system frees it once its last view is gone."""
        if self._fd >= 0:
            os.close(self._fd)
        del self._memory

    def __reduce__(self) -> tuple:
        return _attach_slots, (self.count, self._encoded_bytes, self._stored_bytes, _Descriptor(self._fd))


class _Descriptor:
    """A file descriptor that arrives, as a number valid there, in a worker process that is being started."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple:
        return _detach, (DupFd(self.fd),)


def _detach(duplicate) -> int:
    return duplicate.detach()


def _attach_slots(*arguments: int) -> Slots:
    return Slots(*arguments)


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


def _decode_slot(slot: int, gap: int, unit: Unit, row_bytes: int | None, lengths: list[int] | None) -> UnitResult:
    """In a worker; lengths: of the encoded images, then masks, in the slot, None where the unit has them itself."""
    if lengths is not None:
        encoded = _slots.read(slot, lengths)
        count = len(encoded) if unit.mask_dtype is None else len(encoded) // 2
        unit = replace(unit, images=encoded[:count], masks=encoded[count:])
    return _decode_into(_slots, slot, gap, unit, row_bytes)


def _decode_into(slots: Slots, slot: int, gap: int, unit: Unit, row_bytes: int | None) -> UnitResult:
    memory = slots.stored(slot)[gap:]
    return make_rows(unit, memory if row_bytes is None else memory[: len(unit.images) * row_bytes])


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the mask, so that no group signal ends them before they can ignore it."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
