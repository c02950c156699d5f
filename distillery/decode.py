"""What a decode worker does: encoded images in, rows as they are stored out, into memory it is given."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from distillery.preprocess import (
    DecodeError,
    PreprocessSpec,
    decode_image,
    normalisation_table,
    normalise_into,
    resize_image,
)
from distillery.shard_format import DTYPES

# so much is decoded before it is stored: what a step finds of its code and data in a core's cache, it need not fetch
_DECODED_BYTES = 1 << 20


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


def decode_unit(unit: Unit, memory: memoryview) -> UnitResult:
    """Decode a unit's images into `memory`, one row after another as they are stored; bad ones become zeros."""
    began, size = time.monotonic(), unit.spec.image_size
    rows = np.frombuffer(memory, DTYPES[unit.dtype]).reshape(len(unit.images), 3, size, size)
    checksums, sizes, failures = np.zeros(len(rows), np.uint64), np.zeros((len(rows), 2), np.uint32), []
    at_once = max(1, _DECODED_BYTES // (3 * size**2))
    for start in range(0, len(rows), at_once):
        decoded = []
        for i, data in enumerate(unit.images[start : start + at_once], start):
            try:
                pixels = decode_image(data)
                sizes[i] = pixels.shape[:2]
                decoded.append(resize_image(pixels, unit.spec))
            except DecodeError as error:
                decoded.append(None)
                failures.append((unit.first_row + i, str(error)))
        for i, pixels in enumerate(decoded, start):
            _store(pixels, unit.spec, unit.dtype, rows[i])
            checksums[i] = xxhash.xxh3_64_intdigest(rows[i])
    return UnitResult(unit.first_row, checksums, sizes, failures, time.monotonic() - began)
