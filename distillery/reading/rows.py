"""Read rows of a cache as tensors: CachedRows for training, ImageRows for the teacher pass."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillery.cache.folder import load_index
from distillery.cache.index import CacheIndex
from distillery.reading.decoding import CropBoxes, RowDecoder
from distillery.reading.row_files import open_files
from distillery.reading.shard_files import ShardFiles
from distillery.reading.stream import Batch, BatchMemory, BatchStream
from distillery.sources.pixels import normalisation_table, normalise_into
from distillery.system.errors import MissingFileError, UserError, stage1_command
from distillery.system.machine import usable_cpus

# of float_batches where nothing is decoded; reading and casting release the GIL
_READING_THREADS = 4
# images of one forward pass: part of what decides the bytes, so never a setting
TEACHER_BATCH = 64


class ToFloat:
    """Stored rows -> normalised float32. From uint8: bit for bit what a float32 cache of the same images holds.

    Args:
        index: says the dtype, the shape and whether the values are normalised.
    """

    def __init__(self, index: CacheIndex) -> None:
        self.shape, self.dtype = index.image_shape, getattr(torch, index.pixel_dtype)
        self.table = self.shift = None
        if self.dtype == torch.uint8:
            self.table = normalisation_table(index.mean, index.std, "float32")
        elif not index.normalized:
            self.shift, self.scale = (torch.tensor(values)[:, None, None] for values in (index.mean, index.std))

    @property
    def is_identity(self) -> bool:
        """Whether the stored bytes are the result already."""
        return self.dtype == torch.float32 and self.shift is None

    def __call__(self, rows: np.ndarray, out: Tensor) -> None:
        """Convert rows, uint8 [n, row_bytes], into out, float32 [n, 3, H, W]."""
        if self.table is not None:
            images = out.numpy()
            for row, image in zip(rows.reshape(-1, *self.shape), images, strict=True):
                normalise_into(row, self.table, image)
            return
        out.copy_(torch.from_numpy(rows).view(self.dtype).view(-1, *self.shape))
        if self.shift is not None:
            out.sub_(self.shift).div_(self.scale)


class CachedRows:
    """The valid rows of a cache in the form that BatchStream reads (stream.Rows).

    Args:
        index: the cache.
        raw: rows as stored, of encoded images the uint8 pixels; else normalised float32.
        files: the cache's shards, by open_files; None: to be opened here, read by preadv.
        boxes: what of each encoded image is wanted; None: all of it.
    """

    def __init__(
        self,
        index: CacheIndex,
        *,
        raw: bool = False,
        files: ShardFiles | None = None,
        boxes: CropBoxes | None = None,
    ) -> None:
        self.index, self.raw, self.boxes = index, raw, boxes
        self.files = files or open_files(index)
        self._reset()

    def _reset(self) -> None:
        self._to_float = ToFloat(self.index)
        self._copies = self.raw or self._to_float.is_identity
        self.dtype = self._to_float.dtype if self.raw else torch.float32
        self.row_bytes = int(np.prod(self.index.image_shape)) * self.dtype.itemsize
        self._scratch = threading.local()
        self._decoder = RowDecoder(self.index, self.boxes) if self.index.is_encoded else None

    def __getstate__(self) -> dict:
        return {"index": self.index, "raw": self.raw, "files": self.files, "boxes": self.boxes}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    def cropped(self, boxes: CropBoxes) -> "CachedRows":
        """The same rows of a compressed cache, of which only boxes are decoded, resized to image_size."""
        assert self.index.is_encoded, "only encoded rows are cut while they are decoded"
        return CachedRows(self.index, raw=self.raw, files=self.files, boxes=boxes)

    @property
    def reading(self) -> dict[int, tuple[str, float]]:
        """What each thread is reading, since when."""
        return self.files.reading

    def fill(self, shards: np.ndarray, nth: np.ndarray, out: np.ndarray, global_idx: np.ndarray) -> None:
        """Rows (shards[i], nth[i]), int64 [n], into out, uint8 [n, row_bytes]; global_idx, int64 [n], says which."""
        local = self._local_rows(shards, nth)
        global_idx[:] = self.index.shard_starts[shards] + local
        stored = out if self._copies else self._scratch_rows(len(local))
        if self._decoder is None:
            self.files.read(shards, local, stored)
        else:
            self._decoder.decode(self.files.read_encoded(shards, local), shards, local, global_idx, stored)
        if not self._copies:
            self._to_float(stored, torch.from_numpy(out).view(torch.float32).view(-1, *self.index.image_shape))

    def prepare(self, shards: np.ndarray, nth: np.ndarray, go_on: Callable[[], bool]) -> None:
        """Have the system read these rows into its page cache."""
        self.files.advise(shards, self._local_rows(shards, nth), go_on)

    def close(self) -> None:
        """Nothing is held."""

    def _local_rows(self, shards: np.ndarray, nth: np.ndarray) -> np.ndarray:
        return self.files.local_rows(shards, nth)

    def _scratch_rows(self, count: int) -> np.ndarray:
        """uint8 [count, stored row bytes], this thread's, the same memory each time."""
        size = count * self.index.row_bytes
        if getattr(self._scratch, "memory", np.empty(0)).nbytes < size:
            self._scratch.memory = np.empty(size, np.uint8)
        return self._scratch.memory[:size].reshape(count, self.index.row_bytes)


class _EveryRow(CachedRows):
    """CachedRows named by their place in the shard, those that are not valid among them."""

    def _local_rows(self, shards: np.ndarray, nth: np.ndarray) -> np.ndarray:
        return nth


def float_batches(
    rows: CachedRows,
    places: Iterable[tuple[np.ndarray, np.ndarray]],
    batch_size: int,
    *,
    pin_memory: bool = False,
    held: bool = False,
) -> Iterator[Tensor]:
    """Batches of rows as float32 [n, 3, H, W], in order, the next one read ahead by threads.

    Args:
        rows: of a cache, not raw.
        places: for each batch (shards, nth), int64 [n] each, as rows.fill takes them.
        batch_size: the largest n.
        pin_memory: page-locked memory, for copies to a GPU that the host does not wait for.
        held: as BatchMemory has it.
    """
    stream = BatchStream(
        ((place, []) for place in places),
        rows,
        BatchMemory(batch_size * rows.row_bytes, pinned=pin_memory, held=held),
        row_bytes=rows.row_bytes,
        num_threads=reading_threads(rows.index, _READING_THREADS),
        ahead=1,
    )
    try:
        # map, not a loop: nothing here shall hold a batch that its consumer has dropped
        yield from map(lambda batch: _as_images(batch, rows.index.image_shape), stream)
    finally:
        stream.close()


def reading_threads(index: CacheIndex, most: int) -> int:
    """Threads that read a cache: `most` where more would only wait for each other, every CPU where rows are decoded."""
    return usable_cpus() if index.is_encoded else min(most, usable_cpus())


def _as_images(batch: Batch, shape: tuple[int, ...]) -> Tensor:
    count = len(batch.shards)
    return batch.memory.view(torch.float32)[: count * math.prod(shape)].view(count, *shape)


class ImageRows:
    """Rows of an image cache as float32 batches, the valid ones and those of images that could not be decoded."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.index = load_index(directory)
        if not self.index.verified or self.index.fingerprint != fingerprint:
            raise UserError(
                f"{directory}: is not the image cache of this configuration, or one without hashes, of an earlier "
                "format: python precompute_cache.py --data_config data_config.yaml --rebuild_index upgrades it."
            )
        self.rows = _EveryRow(self.index)
        self.files = self.rows.files

    def position(self, shard_name: str) -> int:
        """The number of a shard among those listed."""
        return self.index.shard_names.index(shard_name)

    def find(self, global_idx: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards listed, rows in them) of images, int64 [n] each.

        Raises:
            MissingFileError: one of them is not there.
        """
        shards = np.searchsorted(self.index.shard_starts, global_idx, side="right") - 1
        local = global_idx - self.index.shard_starts[shards]
        missing = (shards < 0) | (local >= self.index.shard_rows[shards])
        if missing.any():
            raise MissingFileError(
                f"{self.index.directory}: image {global_idx[missing][0]} is not there. Run: {stage1_command()}"
            )
        return shards, local

    def valid_rows(self, start: int, count: int) -> np.ndarray:
        """bool [count]: which of the images from `start` on could be decoded."""
        shards, local = self.find(np.arange(start, start + count))
        return np.array([self.files.layout(s).valid[row] for s, row in zip(shards.tolist(), local, strict=True)])

    def read_rows(self, shards: np.ndarray, local: np.ndarray) -> Tensor:
        """Rows of any shards listed, int64 [n] each, as float32 [n, 3, H, W]."""
        images = torch.empty((len(local), *self.index.image_shape))
        out = images.view(len(local), -1).numpy().view(np.uint8)
        self.rows.fill(shards, local, out, np.empty(len(local), np.int64))
        return images

    def batches(self, s: int, num_rows: int, batch_size: int, *, pin_memory: bool = False) -> Iterator[Tensor]:
        """float_batches of all rows of the s-th shard listed, valid or not; num_rows: how many it has."""
        places = (
            (np.full(stop - first, s), np.arange(first, stop))
            for first, stop in ((first, min(num_rows, first + batch_size)) for first in range(0, num_rows, batch_size))
        )
        return float_batches(self.rows, places, batch_size, pin_memory=pin_memory)
