"""A decode worker: it reads encoded images and writes decoded rows into memory that the caller provides."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import xxhash

from distillery.cache.archive import DTYPES
from distillery.cache.encoded import RowEncoding
from distillery.sources.masks import MASK_DTYPES, preprocess_mask
from distillery.sources.pixels import (
    DecodeError,
    PreprocessSpec,
    normalisation_table,
    normalise_into,
    prepare_image,
)


@dataclass(frozen=True)
class Unit:
    """Encoded images for consecutive rows of one shard, from first_row on; where mask_dtype is not None, with masks.

    encoding: of the rows of a compressed cache; None: rows are pixels of `dtype`.
    """

    first_row: int
    images: Sequence[bytes | memoryview]
    spec: PreprocessSpec
    dtype: str
    masks: Sequence[bytes | memoryview] = ()
    mask_dtype: str | None = None
    encoding: RowEncoding | None = None

    @property
    def decode_spec(self) -> PreprocessSpec:
        """How far its large JPEGs may be scaled while they are decoded."""
        return self.spec if self.encoding is None else self.encoding.decode_spec(self.spec)


@dataclass(frozen=True)
class MaskRows:
    """A unit's masks: rows [n, H, W] of the dtype asked for, zeros where there is none.

    checksums: uint64 [n], XXH3-64 of each row's bytes; classes: all class numbers of the rows that are valid.
    """

    rows: np.ndarray
    checksums: np.ndarray
    classes: frozenset[int]


@dataclass(frozen=True)
class UnitResult:
    """What a unit's rows are.

    checksums: uint64 [n], XXH3-64 of each row's bytes; source_sizes: uint32 [n, 2], height and width in px that each
    image had, upright, zeros where it could not be decoded; failures: (row in the shard, reason); seconds: it took;
    masks: None where none were asked for; row_sizes: int64 [n], bytes of each row of a compressed cache, 0 for a bad
    one, None: all rows have the same size; overflow: these rows, where the unit's memory is too small for them.
    """

    first_row: int
    checksums: np.ndarray
    source_sizes: np.ndarray
    failures: list[tuple[int, str]]
    seconds: float
    masks: MaskRows | None = None
    row_sizes: np.ndarray | None = None
    overflow: bytes | None = None

    def encoded_rows(self, memory: memoryview) -> bytes | memoryview:
        """The rows of a compressed cache, one after another, that were made into `memory`."""
        return memory[: self.row_sizes.sum()] if self.overflow is None else self.overflow


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


def _decode(unit: Unit, i: int, mask_row: np.ndarray | None) -> tuple[np.ndarray, tuple[int, int]]:
    """(uint8 [3, H, W] as they are stored, height and width the image had) of the i-th image; its mask to mask_row.

    A function of its own: what it decoded into is free on return, and still in the core's cache for the next image.
    """
    image = prepare_image(unit.images[i], unit.spec)
    if mask_row is not None:
        mask_row[:] = preprocess_mask(unit.masks[i], image.size, image.orientation, unit.spec, unit.mask_dtype)
    return image.pixels, image.size


def decode_unit(unit: Unit, memory: memoryview) -> UnitResult:
    """Decode a unit's images into `memory`, one row after another as they are stored; bad ones become zeros."""
    began, size, count = time.monotonic(), unit.spec.image_size, len(unit.images)
    rows = np.frombuffer(memory, DTYPES[unit.dtype]).reshape(count, 3, size, size)
    checksums, sizes, failures = np.zeros(count, np.uint64), np.zeros((count, 2), np.uint32), []
    masks = None if unit.mask_dtype is None else np.zeros((count, size, size), MASK_DTYPES[unit.mask_dtype])
    decoded: list[np.ndarray | None] = [None] * count
    for i in range(count):
        try:
            decoded[i], sizes[i] = _decode(unit, i, None if masks is None else masks[i])
        except DecodeError as error:
            failures.append((unit.first_row + i, str(error)))
    # only now, all in a row: each step's code and tables stay in the core's cache
    for i, pixels in enumerate(decoded):
        _store(pixels, unit.spec, unit.dtype, rows[i])
        checksums[i] = xxhash.xxh3_64_intdigest(rows[i])
    mask_rows = None if masks is None else _mask_rows(masks, [i for i in range(count) if decoded[i] is not None])
    return UnitResult(unit.first_row, checksums, sizes, failures, time.monotonic() - began, mask_rows)


def encode_unit(unit: Unit, memory: memoryview) -> UnitResult:
    """Make a unit's images into the rows of a compressed cache, one after another in `memory`; bad ones are empty."""
    began, count = time.monotonic(), len(unit.images)
    rows: list[bytes | memoryview] = [b""] * count
    sizes, failures = np.zeros((count, 2), np.uint32), []
    for i in range(count):
        try:
            rows[i], sizes[i] = unit.encoding.encode(unit.images[i], unit.spec)
        except DecodeError as error:
            failures.append((unit.first_row + i, str(error)))
    checksums = np.array([xxhash.xxh3_64_intdigest(row) for row in rows], np.uint64)
    row_sizes, overflow = np.array(list(map(len, rows)), np.int64), None
    if (num_bytes := int(row_sizes.sum())) <= len(memory):
        memory[:num_bytes] = b"".join(rows)
    else:
        overflow = b"".join(rows)
    seconds = time.monotonic() - began
    return UnitResult(unit.first_row, checksums, sizes, failures, seconds, row_sizes=row_sizes, overflow=overflow)


def make_rows(unit: Unit, memory: memoryview) -> UnitResult:
    """Make a unit's images into the rows that are stored, in `memory`."""
    return decode_unit(unit, memory) if unit.encoding is None else encode_unit(unit, memory)


def _mask_rows(masks: np.ndarray, valid: list[int]) -> MaskRows:
    checksums = np.array([xxhash.xxh3_64_intdigest(mask) for mask in masks], np.uint64)
    return MaskRows(masks, checksums, frozenset(np.unique(masks[valid]).tolist()))
