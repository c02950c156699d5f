"""Rows of a cache as a stream of batches asks for them: its valid ones, as stored or as normalised float32."""

import threading
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from distillery.cache.index import CacheIndex
from distillery.reader import ShardFiles
from distillery.sources.pixels import normalisation_table, normalise_into


class ToFloat:
    """Stored rows -> normalised float32. From uint8: bit for bit what a float32 cache of the same images holds.

    Args:
        index: says the dtype, the shape and whether the values are normalised.
    """

    def __init__(self, index: CacheIndex) -> None:
        self.shape, self.dtype = index.image_shape, getattr(torch, index.dtype)
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
    """The valid rows of a cache as a stream of batches asks for them (stream.Rows).

    Args:
        index: the cache.
        raw: rows as stored; else normalised float32.
        files: the cache's shards; None: to be opened here, read by preadv.
    """

    def __init__(self, index: CacheIndex, *, raw: bool = False, files: ShardFiles | None = None) -> None:
        self.index, self.raw = index, raw
        self.files = files or ShardFiles(index)
        self._reset()

    def _reset(self) -> None:
        self._to_float = ToFloat(self.index)
        self._copies = self.raw or self._to_float.is_identity
        self.dtype = self._to_float.dtype if self.raw else torch.float32
        self.row_bytes = int(np.prod(self.index.image_shape)) * self.dtype.itemsize
        self._scratch = threading.local()

    def __getstate__(self) -> dict:
        return {"index": self.index, "raw": self.raw, "files": self.files}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._reset()

    @property
    def reading(self) -> dict[int, tuple[str, float]]:
        """What each thread is reading, since when."""
        return self.files.reading

    def fill(self, shards: np.ndarray, nth: np.ndarray, out: np.ndarray, global_idx: np.ndarray) -> None:
        """Rows (shards[i], nth[i]), int64 [n], into out, uint8 [n, row_bytes]; global_idx, int64 [n], says which."""
        local = self.files.local_rows(shards, nth)
        global_idx[:] = self.index.shard_starts[shards] + local
        if self._copies:
            self.files.read(shards, local, out)
            return
        stored = self._scratch_rows(len(local))
        self.files.read(shards, local, stored)
        self._to_float(stored, torch.from_numpy(out).view(torch.float32).view(-1, *self.index.image_shape))

    def prepare(self, shards: np.ndarray, nth: np.ndarray, go_on: Callable[[], bool]) -> None:
        """Have the system read these rows into its page cache."""
        self.files.advise(shards, self.files.local_rows(shards, nth), go_on)

    def close(self) -> None:
        """Nothing is held."""

    def _scratch_rows(self, count: int) -> np.ndarray:
        """uint8 [count, stored row bytes], this thread's, the same memory each time."""
        size = count * self.index.row_bytes
        if getattr(self._scratch, "memory", np.empty(0)).nbytes < size:
            self._scratch.memory = np.empty(size, np.uint8)
        return self._scratch.memory[:size].reshape(count, self.index.row_bytes)
