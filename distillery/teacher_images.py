"""Images of a cache as the teacher's pass wants them: float32 batches of rows that follow each other, all of them."""

import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from distillery.cache.folder import load_index
from distillery.reader import ShardFiles
from distillery.reader_rows import ToFloat
from distillery.system.errors import MissingFileError, UserError, stage1_command

# images of one forward pass: part of what decides the bytes, so never a setting
TEACHER_BATCH = 64


class ImageRows:
    """Rows of an image cache as float32 batches, the valid ones and those of images that could not be decoded."""

    def __init__(self, directory: Path, fingerprint: str) -> None:
        self.index = load_index(directory)
        if not self.index.verified or self.index.fingerprint != fingerprint:
            raise UserError(
                f"{directory}: is not the image cache of this configuration, or one without hashes, of an earlier "
                "format: python precompute_cache.py --data_config data_config.yaml --rebuild_index upgrades it."
            )
        self.files, self._to_float = ShardFiles(self.index), ToFloat(self.index)

    def position(self, shard_name: str) -> int:
        """The number of a shard among those listed."""
        return self.index.shard_names.index(shard_name)

    def read(self, s: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """(float32 [n, 3, H, W] normalised, valid bool [n]) of rows first..stop-1 of the s-th shard listed."""
        local = np.arange(first, stop)
        return self.read_rows(np.full(len(local), s), local), torch.from_numpy(self.files.layout(s).valid[first:stop])

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
        stored = np.empty((len(local), self.index.row_bytes), np.uint8)
        self.files.read(shards, local, stored)
        images = torch.empty((len(local), *self.index.image_shape))
        self._to_float(stored, images)
        return images

    def batches(self, s: int, num_rows: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(first row, images, valid) of a shard in batches of TEACHER_BATCH, one read ahead by a thread."""
        bounds = [(first, min(num_rows, first + TEACHER_BATCH)) for first in range(0, num_rows, TEACHER_BATCH)]
        with ThreadPoolExecutor(1, thread_name_prefix="read-images") as pool:
            ahead = pool.submit(self.read, s, *bounds[0])
            for (first, _), later in itertools.zip_longest(bounds, bounds[1:]):
                images, valid = ahead.result()
                if later is not None:
                    ahead = pool.submit(self.read, s, *later)
                yield first, images, valid
