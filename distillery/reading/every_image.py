"""Every image of a data configuration once, in the order of the source: of a cache, or decoded on the way.

    CachedImages, RawImages    what there is, in parts of as many rows as a shard has
    .batches(parts, ...)       the images of parts, one part after the other, read ahead by threads

Training lets another image take the place of one that cannot be decoded. Here such an image is left out, and listed.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillery.cache.folder import load_labels
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.index import CacheIndex
from distillery.config.keys_data import DataConfig
from distillery.reading.datasets import CachedTensorDataset
from distillery.reading.raw import ImageDecoder, PretrainDataset, RawRows
from distillery.reading.rows import CachedRows, reading_threads
from distillery.reading.stream import Batch, BatchMemory, BatchStream, RowIds
from distillery.sources.pixels import DecodeError, preprocess_image
from distillery.system.files import sha256_of

# more threads than these only wait for each other: a batch of a cache is a few reads
_MOST_READING_THREADS = 16
# parts of a source read at a time; each keeps the last piece of a parquet file in memory
_RAW_READERS = 4


@dataclass(frozen=True)
class Part:
    """The rows first..stop-1 of the source; num_read of them are images to be read, as far as is known before."""

    number: int
    first: int
    stop: int
    num_read: int


class EveryImage(ABC):
    """The images of a data set.

    identity: plain values that decide which images there are under which number, and their pixels; how many rows of the
    source are wanted is no part of it. fingerprint: its SHA-256, or the cache's own. parts: of all rows. is_whole:
    whether these are all the rows that there shall be. num_threads: that read or decode. line: for the console.
    """

    identity: dict[str, Any]
    fingerprint: str
    parts: list[Part]
    is_whole: bool
    has_labels: bool
    image_shape: tuple[int, int, int]
    num_threads: int
    line: str

    def batches(
        self, parts: Sequence[Part], batch_size: int, *, pin_memory: bool, ahead: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """(images float32 [n, 3, H, W] normalised, global_idx int64 [n]) of some parts, in their order.

        Each part has num_batches(part, batch_size) batches. Images that cannot be decoded are left out, so a batch may
        be shorter than others, or empty.

        Args:
            parts: of self.parts.
            batch_size: the largest n.
            pin_memory: page-locked images, for copies to a GPU that the host does not wait for.
            ahead: batches read ahead.
        """
        rows = self._rows()
        stream = BatchStream(
            self._plan(parts, batch_size),
            rows,
            BatchMemory(batch_size * rows.row_bytes, pinned=pin_memory, keep=ahead + 4),
            row_bytes=rows.row_bytes,
            num_threads=self.num_threads,
            ahead=ahead,
        )
        try:
            # map, not a loop: nothing here shall hold a batch that its consumer has dropped
            yield from map(self._item, stream)
        finally:
            stream.close()

    @staticmethod
    def num_batches(part: Part, batch_size: int) -> int:
        """How many batches a part has."""
        return -(-part.num_read // batch_size)

    def _item(self, batch: Batch) -> tuple[Tensor, Tensor]:
        count = len(batch.shards)
        images = batch.memory.view(torch.float32)[: count * math.prod(self.image_shape)].view(count, *self.image_shape)
        global_idx = torch.from_numpy(batch.global_idx)
        is_image = global_idx >= 0
        return (images, global_idx) if is_image.all() else (images[is_image], global_idx[is_image])

    def _plan(self, parts: Sequence[Part], batch_size: int) -> Iterator[tuple[RowIds, list[RowIds]]]:
        """For each batch its rows, and with the first one of a part the windows of the part that follows."""
        windows = [window for part in parts[:1] for window in self._windows(part)]
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            windows += [] if following is None else self._windows(following)
            for start in range(0, part.num_read, batch_size):
                yield self._places(part, start, min(part.num_read, start + batch_size)), windows
                windows = []

    @abstractmethod
    def _places(self, part: Part, start: int, stop: int) -> RowIds:
        """(shards, nth) of a part's images start..stop-1, as stream.Rows takes them."""

    def _windows(self, part: Part) -> list[RowIds]:
        """What to prepare before a part is read: nothing where the system reads ahead by itself."""
        return []

    @abstractmethod
    def _rows(self) -> CachedRows | RawRows: ...

    @abstractmethod
    def labels(self, part: Part, global_idx: np.ndarray) -> np.ndarray | None:
        """int64 [n] of images of a part, -1 where one has none; None where the data have no labels."""

    @abstractmethod
    def failures(self, part: Part) -> list[dict]:
        """{"global_idx", "reason"} of the images that cannot be decoded, of a part whose batches have been read."""


class CachedImages(EveryImage):
    """The valid rows of a cache, among the first rows of the source that max_samples and max_shards allow."""

    def __init__(self, data: DataConfig, index: CacheIndex) -> None:
        self._limit = min(data.max_rows or index.source_num_samples, index.source_num_samples)
        self._index = index.only(slice(0, int(np.searchsorted(index.shard_starts, self._limit))))
        self._dataset = CachedTensorDataset(self._index)
        self.parts = [self._part(s) for s in range(len(self._index.shard_names))]
        # of its predecessor's caches nobody knows how many rows there should be
        self.is_whole = sum(part.stop - part.first for part in self.parts) == self._limit or not index.verified
        self.has_labels, self.image_shape = index.labels, index.image_shape
        by_default = data.num_workers is None
        self.num_threads = reading_threads(index, _MOST_READING_THREADS) if by_default else data.workers
        self.identity = {
            "source": index.source,
            "preprocess": index.preprocess,
            "dtype": index.dtype,
            "shard_size": index.shard_size,
            "labels": index.labels,
        }
        if not index.verified:
            self.identity["shards"] = sha256_of([index.shard_names, index.shard_bytes.tolist()])
        self.fingerprint = index.fingerprint or sha256_of(self.identity)
        num_images = sum(part.num_read for part in self.parts)
        self.line = f"reading the cache {index.directory}: {num_images} images in {len(self.parts)} shards"
        if index.is_encoded:
            self.line += f", decoding {self.num_threads} at a time"

    def _part(self, s: int) -> Part:
        first, num_rows = int(self._index.shard_starts[s]), int(self._index.shard_rows[s])
        num_read = int(self._dataset.shard_rows[s])
        if first + num_rows > self._limit:
            num_rows = self._limit - first
            num_read = int(self._dataset.rows.files.layout(s).valid[:num_rows].sum())
        number = first // self._index.shard_size if self._index.verified else s
        return Part(number, first, first + num_rows, num_read)

    def _listed(self, part: Part) -> int:
        """Its shard's position in the index."""
        return int(np.searchsorted(self._index.shard_starts, part.first))

    def _places(self, part: Part, start: int, stop: int) -> RowIds:
        return np.full(stop - start, self._listed(part)), np.arange(start, stop)

    def _rows(self) -> CachedRows:
        return self._dataset.rows

    def labels(self, part: Part, global_idx: np.ndarray) -> np.ndarray | None:
        """See EveryImage."""
        labels = load_labels(self._index, self._listed(part))
        return None if labels is None else labels[global_idx - part.first]

    def failures(self, part: Part) -> list[dict]:
        """See EveryImage."""
        s = self._listed(part)
        if not self._index.shard_failed[s]:
            return []
        found = IMAGE_SHARDS.record_or_meta(self._index.shard_path(s))["failures"]
        return [
            {"global_idx": one["global_idx"], "reason": one["reason"]} for one in found if one["global_idx"] < part.stop
        ]


class _StrictDecoder(ImageDecoder):
    """An ImageDecoder in which no other image takes the place of one that cannot be decoded."""

    def decode(self, global_idx: int, data: bytes) -> tuple[np.ndarray, int]:
        """(uint8 [3, H, W], its index); of one that cannot be decoded, zeros and -1."""
        try:
            return preprocess_image(data, self.spec), global_idx
        except DecodeError as error:
            self.failed[global_idx] = str(error)
            return np.zeros((3, self.spec.image_size, self.spec.image_size), np.uint8), -1


class RawImages(EveryImage):
    """The images of a source, decoded on the way."""

    is_whole = True

    def __init__(self, data: DataConfig) -> None:
        decoder = PretrainDataset(data).decoder
        source, spec, num_rows = decoder.source, decoder.spec, decoder.num_rows
        self._decoder = _StrictDecoder(source, spec, num_rows, data.max_failed_fraction)
        self._shard_size = size = data.cache_shard_size
        bounds = [(first, min(num_rows, first + size)) for first in range(0, num_rows, size)]
        self.parts = [Part(number, first, stop, stop - first) for number, (first, stop) in enumerate(bounds)]
        self.has_labels = source.labels(0, 0) is not None
        self.image_shape = (3, spec.image_size, spec.image_size)
        self.num_threads = data.workers
        self.identity = {
            "source": source.identity,
            "preprocess": spec.identity() | {"normalized": True},
            "dtype": "float32",
            "shard_size": size,
            "labels": self.has_labels,
        }
        self.fingerprint = sha256_of(self.identity)
        place = "cache_dir is null" if data.cache_dir is None else f"there is no cache at {data.cache_dir}"
        why = "use_cached is false" if data.use_cached is False else place
        self.line = f"decoding raw images ({why}), {self.num_threads} at a time: {source.describe()}"

    def _places(self, part: Part, start: int, stop: int) -> RowIds:
        return np.full(stop - start, part.number), np.arange(start, stop)

    def _windows(self, part: Part) -> list[RowIds]:
        return [self._places(part, 0, part.num_read)]

    def _rows(self) -> RawRows:
        num_readers = min(_RAW_READERS, self.num_threads)
        return RawRows(self._decoder, self._shard_size, raw=False, num_readers=num_readers)

    def labels(self, part: Part, global_idx: np.ndarray) -> np.ndarray | None:
        """See EveryImage."""
        labels = self._decoder.source.labels(part.first, part.stop)
        return None if labels is None else labels[global_idx - part.first]

    def failures(self, part: Part) -> list[dict]:
        """See EveryImage."""
        # a list of them is taken in one go: threads add to them meanwhile
        found = sorted(item for item in list(self._decoder.failed.items()) if part.first <= item[0] < part.stop)
        return [{"global_idx": number, "reason": reason} for number, reason in found]
