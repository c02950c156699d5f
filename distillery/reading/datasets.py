"""Map-style data sets for any torch DataLoader: the rows of a cache, and the labelled rows of evaluation sets."""

import contextlib
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distillery.cache.folder import load_index, load_labels
from distillery.cache.index import CacheIndex
from distillery.reading.row_files import MaskFiles
from distillery.reading.rows import CachedRows, float_batches
from distillery.reading.shard_draws import ShardDraws
from distillery.sources.masks import MASK_DTYPES
from distillery.system.errors import UserError, stage1_command

_DEFAULT_SUBSET_SEED = 42


class CachedTensorDataset(Dataset):
    """The images of a cache, map-style: ds[i] is the i-th valid row, float32 [3, H, W], normalised.

    Rows that could not be decoded, and gaps between the shards of a partial cache, are not counted. An object may be
    sent to worker processes (forked or spawned); each opens the files for itself.

    Args:
        cache_dir: folder of the cache, or an index already loaded.
        transform: applied to every image.
        max_shards: the first so many shards only.
        max_samples: the first so many valid rows only.

    Raises:
        MissingFileError, UserError: no cache there, or a damaged one; a limit below 1; reading errors name the file and
            row.
    """

    def __init__(
        self,
        cache_dir: str | Path | CacheIndex,
        transform: Callable[[Tensor], Any] | None = None,
        max_shards: int | None = None,
        max_samples: int | None = None,
    ) -> None:
        max_shards, max_samples = (
            None if limit is None else whole(limit, name, least=1, otherwise=", or None for all")
            for name, limit in (("max_shards", max_shards), ("max_samples", max_samples))
        )
        index = cache_dir if isinstance(cache_dir, CacheIndex) else load_index(cache_dir)
        self.index = index.only(slice(0, max_shards))
        self.transform = transform
        valid = self.index.shard_rows - self.index.shard_failed
        if max_samples is not None and max_samples < valid.sum():
            before = np.cumsum(valid) - valid
            # shards past the limit are not part of it: a draw of shards_per_epoch would waste its turns on them
            num_used = max(1, int((before < max_samples).sum()))
            self.index = self.index.only(slice(0, num_used))
            valid = np.clip(max_samples - before, 0, valid)[:num_used]
        self.shard_rows = valid
        self._ends = np.cumsum(valid)
        self.rows = CachedRows(self.index)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The rows `indices`, read together; a DataLoader calls this for a batch."""
        return self.fetch(*self.locate(checked_rows(indices, len(self))))

    def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shards, nth valid rows in them) of rows of the data set, int64 [n] each."""
        shards = np.searchsorted(self._ends, rows, side="right")
        return shards, rows - (self._ends - self.shard_rows)[shards]

    def fetch(self, shards: np.ndarray, nth: np.ndarray) -> list[Any]:
        """The nth valid rows of shards, int64 [n] each, transformed."""
        images = torch.empty((len(shards), *self.index.image_shape))
        out = images.view(len(shards), -1).numpy().view(np.uint8)
        self.rows.fill(shards, nth, out, np.empty(len(shards), np.int64))
        return list(images) if self.transform is None else [self.transform(image) for image in images]


class RandomShardSubsetCachedDataset(Dataset):
    """The rows of this epoch's shards, map-style: each epoch draws `shards_per_epoch` of them anew.

    set_epoch may be called in the main process while a DataLoader's persistent workers hold copies: the epoch lives in
    shared memory. The length may differ from epoch to epoch, by failed rows and a short last shard.

    Args:
        base_dataset: gives the rows.
        shards_per_epoch: K; as many as there are, or more: all.
        seed: of the draws; None: 42, the default of random_subset_seed. The same on every rank.
        mode: cycle, independent or fixed; see shard_draws.ShardDraws.
        draws: epoch -> shards, in place of the three arguments before it.
    """

    def __init__(
        self,
        base_dataset: CachedTensorDataset,
        shards_per_epoch: int | None,
        seed: int | None = None,
        mode: str = "cycle",
        *,
        draws: Callable[[int], np.ndarray] | None = None,
    ) -> None:
        self.base_dataset = base_dataset
        seed = _DEFAULT_SUBSET_SEED if seed is None else whole(seed, "seed")
        shards_per_epoch = None if shards_per_epoch is None else whole(shards_per_epoch, "shards_per_epoch")
        self._draws = draws or ShardDraws(len(base_dataset.shard_rows), shards_per_epoch, seed, mode)
        self._epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._chosen: tuple[int, np.ndarray, np.ndarray] | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_chosen": None}

    @property
    def epoch(self) -> int:
        """The epoch whose shards these are."""
        return int(self._epoch[0])

    def set_epoch(self, epoch: int) -> None:
        """Make this the data set of that epoch's shards, here and in worker processes.

        Raises:
            UserError: epoch is below 0, or no whole number.
        """
        self._epoch[0] = whole(epoch, "epoch", least=0)

    @property
    def shards(self) -> np.ndarray:
        """int64 [K], positions in index.shard_names of this epoch's shards, in the order of the rows."""
        return self._current()[0]

    def _current(self) -> tuple[np.ndarray, np.ndarray]:
        """(shards, where the rows of each end)."""
        epoch = self.epoch
        if self._chosen is None or self._chosen[0] != epoch:
            shards = self._draws(epoch)
            self._chosen = epoch, shards, np.cumsum(self.base_dataset.shard_rows[shards])
        return self._chosen[1:]

    def __len__(self) -> int:
        return int(self._current()[1][-1])

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The rows `indices` of this epoch's shards, read together."""
        shards, ends = self._current()
        rows = checked_rows(indices, int(ends[-1]))
        place = np.searchsorted(ends, rows, side="right")
        return self.base_dataset.fetch(shards[place], rows - (ends - self.base_dataset.shard_rows[shards])[place])


def whole(value: Any, name: str, *, least: int | None = None, otherwise: str = "") -> int:
    """A whole number that a caller gave: of Python, numpy or torch; UserError for anything else, and below `least`.

    otherwise: what else it may be, for the message.
    """
    try:
        number = operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}; it must be a whole number{otherwise}.") from None
    if least is not None and not least <= number < 2**63:
        raise UserError(f"{name} is {number}; it must be {least} or more{otherwise}.")
    return number


def checked_rows(indices: Sequence[int], count: int) -> np.ndarray:
    """Row numbers as int64 [n], negative ones counted from the end.

    Raises:
        IndexError: one is not there.
        TypeError: one is no whole number.
    """
    rows = np.asarray(indices)
    if rows.dtype.kind not in "iu":
        try:
            rows = np.array([operator.index(i) for i in indices])
        except TypeError:
            raise TypeError(f"row numbers must be whole numbers, found {list(indices)[:3]!r}") from None
    rows = rows.astype(np.int64)
    outside = (rows < -count) | (rows >= count)
    if outside.any():
        raise IndexError(f"row {rows[outside][0]} of a data set of {count} rows")
    return rows % count


class _EvaluationBatches(ABC):
    """(images float32 [B, 3, H, W] normalised, what is known of them) over every valid row of a cache, in order.

    Threads read one batch of images ahead. The last batch may be short.

    num_rounds: batches of the largest share.

    Args:
        cache_dir: folder of the cache.
        batch_size: rows of a batch.
        share: (number, of how many): one of so many contiguous runs of whole batches. The shares one after the other
            are all batches, so a batch holds the same rows whatever the number of shares; the first is never smaller.
        pin_memory: page-locked images, for copies to a GPU that the host does not wait for.
    Raises:
        UserError: the cache does not hold it.
    """

    def __init__(
        self, cache_dir: str | Path, batch_size: int, share: tuple[int, int] = (0, 1), *, pin_memory: bool = False
    ) -> None:
        index = load_index(cache_dir)
        self._check(index)
        self.dataset, self.pin_memory = CachedTensorDataset(index), pin_memory
        starts = range(0, len(self.dataset), batch_size)
        number, num_shares = share
        self.num_rounds = -(-len(starts) // num_shares)
        first, end = (-(-(number + i) * len(starts) // num_shares) for i in (0, 1))
        self._bounds = [(start, min(len(self.dataset), start + batch_size)) for start in starts[first:end]]
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._iterate(held=False)

    def held_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As iterating, for a consumer that holds a batch until its copy to the device is done (BatchMemory)."""
        return self._iterate(held=True)

    @staticmethod
    @abstractmethod
    def _check(index: CacheIndex) -> None:
        """Raise UserError where a cache does not hold what is wanted."""

    @abstractmethod
    def _targets(self) -> Callable[[int, int], np.ndarray]:
        """(first row, row after the last) -> what is known of these rows, [B, ...]."""

    def _iterate(self, *, held: bool) -> Iterator[tuple[Tensor, Tensor]]:
        targets = self._targets()
        places = (self.dataset.locate(np.arange(*bounds)) for bounds in self._bounds)
        pinned = self.pin_memory
        batches = float_batches(self.dataset.rows, places, self._batch_size, pin_memory=pinned, held=pinned and held)
        with contextlib.closing(batches):
            for start, stop in self._bounds:
                of_batch = torch.from_numpy(targets(start, stop))
                yield next(batches), of_batch.pin_memory() if pinned else of_batch


class LabelledBatches(_EvaluationBatches):
    """(images float32 [B, 3, H, W] normalised, labels int64 [B]) over every valid row of a cache with labels."""

    @staticmethod
    def _check(index: CacheIndex) -> None:
        if not index.labels:
            remedy = "Name the label_column in data_config.yaml, with another cache_dir"
            if index.mask_dtype is not None:
                remedy = "It holds masks: give its entry of eval_datasets task: classification and another name"
            raise UserError(f"{index.directory} holds no labels. {remedy}, and run: {stage1_command()}")

    def _targets(self) -> Callable[[int, int], np.ndarray]:
        labels = cached_labels(self.dataset)
        return lambda start, stop: labels[start:stop]


class MaskedBatches(_EvaluationBatches):
    """(images float32 [B, 3, H, W] normalised, masks [B, H, W]) over every valid row of a cache with masks.

    Masks are class numbers as they are stored: uint8 or int16. Each is compared with its checksum when it is read.
    """

    @staticmethod
    def _check(index: CacheIndex) -> None:
        if index.mask_dtype is None:
            raise UserError(
                f"{index.directory} holds no masks. Give its entry of eval_datasets task: segmentation and another "
                f"name, and run: {stage1_command()}"
            )

    def _targets(self) -> Callable[[int, int], np.ndarray]:
        index, images = self.dataset.index, self.dataset.rows.files
        files = MaskFiles(index)

        def read(start: int, stop: int) -> np.ndarray:
            shards, nth = self.dataset.locate(np.arange(start, stop))
            masks = np.empty((stop - start, *index.image_shape[1:]), MASK_DTYPES[index.mask_dtype])
            files.read(shards, images.local_rows(shards, nth), masks.view(np.uint8).reshape(stop - start, -1))
            return masks

        return read


def load_labelled(cache_dir: str | Path, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(images float32 [B, 3, H, W] normalised, labels int64 [B]) over every valid row in order; the last may be short.

    Raises:
        UserError: the cache has no labels.
    """
    return iter(LabelledBatches(cache_dir, batch_size))


def cached_labels(dataset: CachedTensorDataset) -> np.ndarray:
    """int64 [N], the labels of the rows of a data set of whole shards whose cache has labels."""
    layouts = (dataset.rows.files.layout(s) for s in range(len(dataset.index.shard_names)))
    parts = [load_labels(dataset.index, s)[layout.valid] for s, layout in enumerate(layouts)]
    return np.concatenate(parts).astype(np.int64)
