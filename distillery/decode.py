"""Decode workers: encoded images in, finished rows written straight into the shard's temporary file."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from distillery.files import pwrite_all
from distillery.preprocess import DecodeError, PreprocessSpec, normalisation_table, normalise_into, preprocess_image
from distillery.process import STOP_SIGNALS, ignore_stop_signals
from distillery.shard_format import DTYPES, PAYLOAD_OFFSET

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Unit:
    """Encoded images for consecutive rows of one shard's temporary file."""

    path: str
    first_row: int
    images: list[bytes]
    spec: PreprocessSpec
    dtype: str


@dataclass(frozen=True)
class UnitResult:
    """checksums: uint64 [n], XXH3-64 of each row's bytes; failures: (row in the shard, reason)."""

    first_row: int
    checksums: np.ndarray
    failures: list[tuple[int, str]]


@lru_cache(maxsize=4)
def _table(spec: PreprocessSpec, dtype: str) -> np.ndarray:
    return normalisation_table(spec.mean, spec.std, dtype)


@lru_cache(maxsize=1)
def _block(rows: int, image_size: int, dtype: str) -> np.ndarray:
    # kept between calls: a fresh buffer costs a page fault per 4 KiB, more than the copy into it
    return np.zeros((rows, 3, image_size, image_size), DTYPES[dtype])


def write_unit(unit: Unit) -> UnitResult:
    """Decode a unit's images and write their rows into the shard's temporary file; bad ones become zeros."""
    size = unit.spec.image_size
    row_bytes = 3 * size * size * np.dtype(DTYPES[unit.dtype]).itemsize
    block = _block(max(1, min(_BLOCK_BYTES // row_bytes, 256)), size, unit.dtype)
    table = None if unit.dtype == "uint8" else _table(unit.spec, unit.dtype)
    checksums, failures = np.zeros(len(unit.images), np.uint64), []
    fd = os.open(unit.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for start in range(0, len(unit.images), len(block)):
            images = unit.images[start : start + len(block)]
            for row, data in enumerate(images):
                try:
                    pixels = preprocess_image(data, unit.spec)
                except DecodeError as error:
                    block[row] = 0
                    failures.append((unit.first_row + start + row, str(error)))
                else:
                    if table is None:
                        block[row] = pixels
                    else:
                        normalise_into(pixels, table, block[row])
                checksums[start + row] = xxhash.xxh3_64_intdigest(block[row])
            offset = PAYLOAD_OFFSET + (unit.first_row + start) * row_bytes
            pwrite_all(fd, block[: len(images)].data, offset)
    finally:
        os.close(fd)
    return UnitResult(unit.first_row, checksums, failures)


def _start_worker(parent: int) -> None:
    """A decode worker outlives neither its parent's death nor dies of a signal to the whole process group."""
    ignore_stop_signals()
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class _InlineExecutor(Executor):
    """Runs each task in submit: for one worker there is nothing to gain from a second process."""

    def submit(self, function: Callable, /, *args: object) -> Future:
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def decode_pool(num_workers: int) -> Executor:
    """Worker processes, or this process itself for one worker."""
    if num_workers <= 1:
        return _InlineExecutor()
    # spawn: forking a process that runs Arrow's or torch's threads can deadlock
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(num_workers, context, initializer=_start_worker, initargs=(os.getpid(),))


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Processes started inside inherit the mask, so that no group signal ends them before they can ignore it."""
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)
