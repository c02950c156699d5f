"""The kinds of rows that shards hold besides images of one size: masks, and encoded images; reads as shard_files.py."""

import itertools

import numpy as np

from distillery.cache.folder import ShardLayout, load_mask_layout
from distillery.cache.index import CacheIndex
from distillery.reading.shard_files import ShardFiles


class MaskFiles(ShardFiles):
    """The masks of a cache in the place of its images: a row is [H, W] of index.mask_dtype. Arguments as ShardFiles."""

    def _reset(self) -> None:
        super()._reset()
        self.row_bytes = self.index.mask_row_bytes

    def _load_layout(self, shard: int) -> ShardLayout:
        return load_mask_layout(self.index, shard)

    def _row_name(self, shard: int, row: int) -> str:
        return f"the mask of {super()._row_name(shard, row)}"


class EncodedFiles(ShardFiles):
    """The rows of a compressed cache: encoded images, each of its own length. Arguments as ShardFiles."""

    def read_encoded(self, shards: np.ndarray, local: np.ndarray) -> list[memoryview]:
        """n encoded images, int64 [n] each, in any order; one that could not be decoded in stage 1 is empty."""
        rows: list[memoryview] = [memoryview(b"")] * len(local)

        def memory_of(layout: ShardLayout, first: int, places: list[int]) -> list[memoryview]:
            ends = layout.offsets[first : first + len(places) + 1] - layout.offsets[first]
            memory, ends = memoryview(np.empty(ends[-1], np.uint8)), ends.tolist()
            found = [memory[start:stop] for start, stop in itertools.pairwise(ends)]
            for place, row in zip(places, found, strict=True):
                rows[place] = row
            return found

        self._read_runs(shards, local, memory_of)
        return rows

    def _offset(self, layout: ShardLayout, row: int) -> int:
        return layout.payload_offset + int(layout.offsets[row])


def open_files(index: CacheIndex, *, mode: str = "pread") -> ShardFiles:
    """The files of a cache's images: EncodedFiles where its rows are encoded."""
    return (EncodedFiles if index.is_encoded else ShardFiles)(index, mode=mode)
