"""Decode workers: encoded images in, finished rows written straight into the shard's temporary file."""

import os
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from distillery.files import pwrite_all
from distillery.preprocess import DecodeError, PreprocessSpec, normalisation_table, normalise_into, preprocess_image
from distillery.shard_format import DTYPES, PAYLOAD_OFFSET

# what a core's cache holds: rows are hashed and copied into the page cache while they are still there
_BLOCK_BYTES = 1 << 20


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


@lru_cache(maxsize=1)
def _block(rows: int, image_size: int, dtype: str) -> np.ndarray:
    # kept between calls: a fresh buffer costs a page fault per 4 KiB, more than the copy into it
    return np.zeros((rows, 3, image_size, image_size), DTYPES[dtype])


def write_unit(unit: Unit) -> UnitResult:
    """Decode a unit's images and write their rows into the shard's temporary file; bad ones become zeros."""
    began, write_seconds = time.monotonic(), 0.0
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
            write_began = time.monotonic()
            pwrite_all(fd, block[: len(images)].data, offset)
            write_seconds += time.monotonic() - write_began
    finally:
        os.close(fd)
    return UnitResult(unit.first_row, checksums, failures, time.monotonic() - began, write_seconds)
