"""Decode workers: encoded images in, finished rows written straight into the shard's temporary file."""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from distillery.files import pwritev_all
from distillery.preprocess import DecodeError, PreprocessSpec, normalisation_table, normalise_into, preprocess_image
from distillery.shard_format import DTYPES, PAYLOAD_OFFSET

# so much is decoded before it is stored: what a step finds of its code and data in a core's cache, it need not fetch
_DECODED_BYTES, _STORED_BYTES = 1 << 20, 512 << 10
# pixels of a channel from which Arrow's look-up, which has a start to pay for, is faster than NumPy's
_ARROW_PIXELS = 1 << 13


@dataclass(frozen=True)
class Unit:
    """Encoded images for consecutive rows of one shard's temporary file."""

    path: str
    first_row: int
    images: Sequence[bytes | memoryview]
    spec: PreprocessSpec
    dtype: str


@dataclass(frozen=True)
class UnitResult:
    """checksums: uint64 [n], XXH3-64 of each row's bytes; failures: (row in the shard, reason).

    seconds: from receipt to answer; write_seconds: of these, in writing to the file.
    """

    first_row: int
    checksums: np.ndarray
    failures: list[tuple[int, str]]
    seconds: float
    write_seconds: float


@lru_cache(maxsize=4)
def _table(spec: PreprocessSpec, dtype: str) -> np.ndarray:
    return normalisation_table(spec.mean, spec.std, dtype)


@lru_cache(maxsize=4)
def _arrow_tables(spec: PreprocessSpec, dtype: str) -> list:
    import pyarrow as pa

    table = _table(spec, dtype)
    return [pa.array(channel) for channel in table.view(f"uint{8 * table.itemsize}")]


def _look_up(pixels: np.ndarray, tables: list) -> list[np.ndarray]:
    """What normalise_into writes, a channel at a time, as bit patterns; tables: a pyarrow array for each channel.

    Arrow takes bytes as indices; np.take makes 64-bit numbers of them first, which costs as much as the rest.
    """
    import pyarrow as pa
    from pyarrow.compute import take

    channels = []
    for channel, table in zip(pixels, tables, strict=True):
        indices = pa.Array.from_buffers(pa.uint8(), channel.size, [None, pa.py_buffer(channel)])
        # not the default pool, which gives memory back to the system between two images
        values = take(table, indices, boundscheck=False, memory_pool=pa.system_memory_pool())
        channels.append(values.to_numpy(zero_copy_only=True))
    return channels


def _pieces(pixels: np.ndarray, spec: PreprocessSpec, dtype: str) -> list[np.ndarray]:
    """An image as it is stored, in contiguous pieces: pixels, uint8 [3, H, W], or what they are when normalised."""
    if dtype == "uint8":
        return [pixels]
    if pixels[0].size >= _ARROW_PIXELS:
        return _look_up(pixels, _arrow_tables(spec, dtype))
    row = np.empty(pixels.shape, DTYPES[dtype])
    normalise_into(pixels, _table(spec, dtype), row)
    return [row]


def _checksum(pieces: list[np.ndarray]) -> int:
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0])
    checksum = xxhash.xxh3_64()
    for piece in pieces:
        checksum.update(piece)
    return checksum.intdigest()


def write_unit(unit: Unit) -> UnitResult:
    """Decode a unit's images and write their rows into the shard's temporary file; bad ones become zeros."""
    began, write_seconds = time.monotonic(), 0.0
    image_bytes = 3 * unit.spec.image_size**2
    checksums, failures = np.zeros(len(unit.images), np.uint64), []
    decoded_at_once = _rows_in(_DECODED_BYTES, image_bytes)
    fd = os.open(unit.path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for start in range(0, len(unit.images), decoded_at_once):
            decoded = []
            for row, data in enumerate(unit.images[start : start + decoded_at_once], unit.first_row + start):
                try:
                    decoded.append(preprocess_image(data, unit.spec))
                except DecodeError as error:
                    decoded.append(None)
                    failures.append((row, str(error)))
            write_seconds += _store(fd, unit, start, decoded, checksums)
    finally:
        os.close(fd)
    return UnitResult(unit.first_row, checksums, failures, time.monotonic() - began, write_seconds)


def _store(fd: int, unit: Unit, start: int, decoded: list[np.ndarray | None], checksums: np.ndarray) -> float:
    """Write the rows start.. of a unit and note their checksums; returns the seconds that writing took."""
    shape, dtype, seconds = (3, unit.spec.image_size, unit.spec.image_size), DTYPES[unit.dtype], 0.0
    row_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    written_at_once = _rows_in(_STORED_BYTES, row_bytes)
    for first in range(0, len(decoded), written_at_once):
        block = []
        for row, pixels in enumerate(decoded[first : first + written_at_once], start + first):
            pieces = [np.zeros(shape, dtype)] if pixels is None else _pieces(pixels, unit.spec, unit.dtype)
            checksums[row] = _checksum(pieces)
            block += pieces
        began = time.monotonic()
        pwritev_all(fd, block, PAYLOAD_OFFSET + (unit.first_row + start + first) * row_bytes)
        seconds += time.monotonic() - began
        # the next block comes to lie where this one was
        del pieces, block
    return seconds


def _rows_in(num_bytes: int, row_bytes: int) -> int:
    return max(1, min(num_bytes // row_bytes, 256))
