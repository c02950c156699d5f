"""A decode worker: it reads encoded images and writes decoded rows into memory that the caller provides."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from distillery.cache.archive import DTYPES
from distillery.sources.pixels import (
    DecodeError,
    PreprocessSpec,
    decode_image,
    normalisation_table,
    normalise_into,
    resize_image,
)


@dataclass(frozen=True)
class Unit:
    """Encoded images for consecutive rows of one shard, from first_row on."""

    first_row: int
    images: Sequence[bytes | memoryview]
    spec: PreprocessSpec
    dtype: str


@dataclass(frozen=True)
class UnitResult:
    """What a unit's rows are.

    checksums: uint64 [n], XXH3-64 of each row's bytes; source_sizes: uint32 [n, 2], height and width in px that each
    image had, upright, zeros where it could not be decoded; failures: (row in the shard, reason); seconds: it took.
    """

    first_row: int
    checksums: np.ndarray
    source_sizes: np.ndarray
    failures: list[tuple[int, str]]
    seconds: float


@lru_cache(maxsize=4)
def _table(spec: PreprocessSpec, dtype: str) -> np.ndarray:
    return normalisation_table(spec.mean, spec.std, dtype)


def _store(pixels: np.ndarray | None, spec: PreprocessSpec, dtype: str, row: np.ndarray) -> None:
    """Write a decoded image, uint8 [3, H, W], to its row, [3, H, W] of what is stored; zeros where there is none."""
    if pixels is None:
        row[:] = 0
    elif dtype == "uint8":
        row[:] = pixels
    else:
        normalise_into(pixels, _table(spec, dtype), row)


def _decode(data: bytes | memoryview, spec: PreprocessSpec) -> tuple[np.ndarray, tuple[int, int]]:
    """(uint8 [3, H, W] as they are stored, height and width the image had).

    A function of its own: what it decoded into is free on return, and still in the core's cache for the next image.
    """
    pixels = decode_image(data)
    return resize_image(pixels, spec), pixels.shape[:2]


def decode_unit(unit: Unit, memory: memoryview) -> UnitResult:
    """Decode a unit's images into `memory`, one row after another as they are stored; bad ones become zeros."""
    began, size, count = time.monotonic(), unit.spec.image_size, len(unit.images)
    rows = np.frombuffer(memory, DTYPES[unit.dtype]).reshape(count, 3, size, size)
    checksums, sizes, failures = np.zeros(count, np.uint64), np.zeros((count, 2), np.uint32), []
    decoded: list[np.ndarray | None] = [None] * count
    for i, data in enumerate(unit.images):
        try:
            decoded[i], sizes[i] = _decode(data, unit.spec)
        except DecodeError as error:
            failures.append((unit.first_row + i, str(error)))
    # only now, all in a row: each step's code and tables stay in the core's cache
    for i, pixels in enumerate(decoded):
        _store(pixels, unit.spec, unit.dtype, rows[i])
        checksums[i] = xxhash.xxh3_64_intdigest(rows[i])
    return UnitResult(unit.first_row, checksums, sizes, failures, time.monotonic() - began)
