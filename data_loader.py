"""Images for training: from the cache that stage 1 made, or decoded on the way.

    loader = build_pretraining_dataloader(data_config, train_config)     # dicts (the parsed YAML) or config objects
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)                                          # this epoch's shards and order
        for images in loader: ...                                        # float32 [B, 3, H, W], normalised

The classes are map-style data sets that any torch DataLoader takes as well; the loader above does not need one: threads
read rows straight into reused batches (distillery/reading/shard_files.py, stream.py) in an order that is a pure
function of (seed, epoch, shards), whatever the number of processes and threads (distillery/reading/order.py).
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distillery.cache.archive import row_bytes_of
from distillery.cache.folder import load_index
from distillery.cache.index import CacheIndex
from distillery.config.keys_data import DataConfig
from distillery.config.keys_train import TrainConfig
from distillery.config.load import load_data_config, load_train_config
from distillery.config.sections import ALIASES
from distillery.reading.datasets import (
    CachedTensorDataset,
    RandomShardSubsetCachedDataset,
    checked_rows,
    load_labelled,
)
from distillery.reading.loader import DevicePrefetcher, PretrainingLoader
from distillery.reading.order import RUN_BYTES, WINDOW_BYTES, Sampling, block_sizes
from distillery.reading.raw import ImageDecoder, RawRows, pieces_of
from distillery.reading.rows import CachedRows
from distillery.reading.shard_files import ShardFiles
from distillery.sources.pixels import PreprocessSpec
from distillery.sources.registry import open_source
from distillery.system import distributed
from distillery.system.console import format_bytes
from distillery.system.errors import MissingFileError, UserError, stage1_command
from distillery.system.machine import file_system_of, is_network_file_system, usable_cpus

__all__ = [
    "CachedTensorDataset",
    "DevicePrefetcher",
    "PretrainDataset",
    "PretrainingLoader",
    "RandomShardSubsetCachedDataset",
    "build_pretraining_dataloader",
    "load_labelled",
]

_READING_THREADS = 2
# a few: each keeps the last piece it read of a parquet file in memory
_RAW_READERS = 4
# rows of which a parquet file's row group is worth reading whole
_LONG_RUN = 64


class PretrainDataset(Dataset):
    """The images of data_config's source, decoded when asked for: ds[i] is float32 [3, H, W], normalised.

    An image that cannot be decoded moves no index: the next one that can stands in its place. It is reported, and more
    of them than max_failed_fraction are an error.

    Args:
        data_config: dict (partial is fine: defaults fill in), DataConfig or path.
        transform: applied to every image.
    """

    def __init__(self, data_config: Any, transform: Callable[[Tensor], Any] | None = None) -> None:
        data = load_data_config(data_config, require_source=False)
        if data.dataset_name is None:
            raise UserError("data_config: dataset_name is required to read raw images")
        source = open_source(**data.source_arguments)
        limits = [len(source), data.max_samples, data.max_shards and data.max_shards * data.cache_shard_size]
        num_rows = min(limit for limit in limits if limit is not None)
        self.transform = transform
        self.decoder = ImageDecoder(source, preprocess_spec(data), num_rows, data.max_failed_fraction)
        starts = np.arange(0, num_rows, data.cache_shard_size)
        self.shard_rows = np.minimum(data.cache_shard_size, num_rows - starts)

    def __len__(self) -> int:
        return self.decoder.num_rows

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The images `indices`, in that order."""
        # each once: a sampler with replacement may ask for one twice
        wanted, places = np.unique(checked_rows(indices, len(self)), return_inverse=True)
        unique = torch.empty((len(wanted), 3, self.decoder.spec.image_size, self.decoder.spec.image_size))
        with self.decoder.borrowed_source() as read:
            encoded = chain.from_iterable(map(read, pieces_of(wanted)))
            for row, data, out in zip(wanted.tolist(), encoded, unique, strict=True):
                self.decoder.normalise(self.decoder.decode(row, data)[0], out.numpy())
        images = unique[torch.from_numpy(places)]
        return list(images) if self.transform is None else [self.transform(image) for image in images]


def preprocess_spec(data: DataConfig) -> PreprocessSpec:
    """How data_config.yaml wants images to become pixels."""
    return PreprocessSpec(data.image_size, data.resize_mode, data.interpolation, tuple(data.mean), tuple(data.std))


def build_pretraining_dataloader(
    data_config: Any,
    train_config: Any,
    *,
    with_indices: bool = False,
    raw: bool = False,
    shards: Sequence[str] | None = None,
) -> PretrainingLoader:
    """The loader that the configuration asks for; says in one line which one that is.

    Args:
        data_config: dict (the parsed YAML, partial is fine: defaults fill in) or DataConfig.
        train_config: dict or TrainConfig; batch_size is that of one process.
        with_indices: yield (batch, global_idx int64 [B]): each image's place in the source.
        raw: yield the stored dtype, not normalised further (uint8 pixels for raw images).
        shards: names of the shards to use, a run's frozen list; None: all there are.

    Raises:
        MissingFileError: no cache where one was asked for. UserError: a cache of another configuration, a batch larger
        than an epoch, a configuration error.
    """
    data = load_data_config(data_config, require_source=False)
    train = load_train_config(train_config, require_checkpoint_dir=False)
    index = distributed.decided_by_main(lambda: _find_cache(data, _keys_given(data_config)))
    build = _cached_loader if index is not None else _raw_loader
    loader, lines = build(data, train, index, shards, with_indices=with_indices, raw=raw)
    if distributed.is_main():
        print("\n".join(lines), flush=True)
    return loader


def _keys_given(config: Any) -> set[str]:
    """The keys a configuration sets itself; a default is no statement about a cache that is there already."""
    if isinstance(config, Mapping):
        return {ALIASES.get(key, key) for key in config}
    return set(DataConfig.model_fields)


def _find_cache(data: DataConfig, keys_given: set[str]) -> CacheIndex | None:
    """The index of the cache to use; None: raw images."""
    if data.use_cached is False:
        return None
    if data.cache_dir is None:
        if data.use_cached:
            raise UserError("use_cached is true, but cache_dir is not given")
        return None
    try:
        index = load_index(data.cache_path)
    except MissingFileError:
        # shards without an index are a damaged cache, not none: stage 1 makes the index again
        if data.use_cached or data.dataset_name is None or any(data.cache_path.glob("images_shard_*.pt")):
            raise
        return None
    _check_same_configuration(index, data, keys_given)
    return index


def _check_same_configuration(index: CacheIndex, data: DataConfig, keys_given: set[str]) -> None:
    """Raise UserError, field by field, when the cache was made with other values than the configuration gives."""
    stored = {"cache_dtype": index.dtype, "cache_shard_size": index.shard_size, **index.preprocess}
    wanted = preprocess_spec(data).identity() | {
        "cache_dtype": data.cache_dtype,
        "cache_shard_size": data.cache_shard_size,
    }
    if not index.verified:  # a predecessor's index says neither how it resized nor how it cut its shards
        stored = {key: stored[key] for key in ("image_size", "cache_dtype")}
    differing = [
        f"  {key}: {_plain(stored[key])} in the cache, {_plain(wanted[key])} in data_config"
        for key in sorted(wanted.keys() & stored.keys() & keys_given)
        if _plain(stored[key]) != _plain(wanted[key])
    ]
    if differing:
        raise UserError(
            f"{index.directory} is the cache of another configuration:\n" + "\n".join(differing) + "\n"
            f"Give these values in data_config.yaml, or another cache_dir and run: {stage1_command()}"
        )


def _plain(value: Any) -> Any:
    return [float(number) for number in value] if isinstance(value, list | tuple) else value


def _cached_loader(
    data: DataConfig,
    train: TrainConfig,
    index: CacheIndex,
    shards: Sequence[str] | None,
    *,
    with_indices: bool,
    raw: bool,
) -> tuple[PretrainingLoader, list[str]]:
    if shards is not None:
        index = _chosen_shards(index, shards)
    base = CachedTensorDataset(index, max_shards=data.max_shards, max_samples=data.max_samples)
    rows = CachedRows(base.index, raw=raw, files=ShardFiles(base.index, mode=data.read_mode))
    sampling = _sampling(data, train, base.shard_rows, base.index.row_bytes)
    dataset = base
    if sampling.draws.count < len(base.shard_rows):
        # the loader's own draws: with max_steps_per_epoch they are shorter than shards_per_epoch
        dataset = RandomShardSubsetCachedDataset(base, data.shards_per_epoch, draws=sampling.shards)
    loader = PretrainingLoader(
        dataset,
        rows,
        sampling,
        image_shape=base.index.image_shape,
        index=base.index,
        normalized=base.index.normalized if raw else True,
        num_threads=_READING_THREADS if data.num_workers is None else max(1, data.num_workers),
        **_loader_options(data, train, with_indices),
    )
    return loader, _describe_cache(base, data) + _describe_order(data, sampling)


def _raw_loader(
    data: DataConfig,
    train: TrainConfig,
    index: None,
    shards: Sequence[str] | None,
    *,
    with_indices: bool,
    raw: bool,
) -> tuple[PretrainingLoader, list[str]]:
    if shards is not None:
        raise MissingFileError(
            f"this run was started on the shards of a cache, and {data.cache_dir} holds none. Run: {stage1_command()}"
        )
    dataset = PretrainDataset(data)
    size = data.image_size
    # the order is that of the cache which stage 1 would make
    row_bytes = row_bytes_of((3, size, size), data.cache_dtype)
    sampling = _sampling(data, train, dataset.shard_rows, row_bytes)
    num_threads = usable_cpus() if data.num_workers is None else max(1, data.num_workers)
    loader = PretrainingLoader(
        dataset,
        lambda: RawRows(dataset.decoder, data.cache_shard_size, raw=raw, num_readers=min(_RAW_READERS, num_threads)),
        sampling,
        image_shape=(3, size, size),
        index=None,
        normalized=not raw,
        num_threads=num_threads,
        **_loader_options(data, train, with_indices),
    )
    why = "use_cached is false" if data.use_cached is False else f"there is no cache at {data.cache_dir}"
    line = (
        f"decoding raw images, {num_threads} at a time, from {dataset.decoder.source.describe()}: {len(dataset)} "
        f"images of {size} x {size} px ({why}; a cache is many times faster: {stage1_command()})"
    )
    return loader, [line, *_describe_order(data, sampling), *_advise_longer_runs(dataset, sampling, row_bytes)]


def _sampling(data: DataConfig, train: TrainConfig, shard_rows: np.ndarray, row_bytes: int) -> Sampling:
    run_rows, window_runs = block_sizes(
        row_bytes, data.run_bytes or RUN_BYTES, max(data.window_bytes or WINDOW_BYTES, data.run_bytes or 0)
    )
    return Sampling(
        shard_rows,
        train.batch_size * distributed.world_size(),
        shards_per_epoch=data.shards_per_epoch,
        mode=data.shard_subset_mode,
        seed=data.random_subset_seed,
        shuffle=data.shuffle,
        steps_of=train.grad_accumulation_steps,
        max_steps=train.max_steps_per_epoch,
        run_rows=run_rows,
        window_runs=window_runs,
    )


def _loader_options(data: DataConfig, train: TrainConfig, with_indices: bool) -> dict[str, Any]:
    return {
        "batch_size": train.batch_size,
        "prefetch_batches": data.prefetch_batches,
        "pin_memory": data.pin_memory,
        "with_indices": with_indices,
    }


def _advise_longer_runs(dataset: PretrainDataset, sampling: Sampling, row_bytes: int) -> list[str]:
    """What to set where short runs of a parquet file cost most of a row group each."""
    if dataset.decoder.source.identity["kind"] != "parquet" or sampling.run_rows >= min(_LONG_RUN, len(dataset)):
        return []
    return [
        f"  of a parquet file even a run of {sampling.run_rows} rows costs most of a row group: "
        f"run_bytes: {_LONG_RUN * row_bytes} reads less, in runs of {_LONG_RUN}, mixed from fewer places"
    ]


def _chosen_shards(index: CacheIndex, names: Sequence[str]) -> CacheIndex:
    place = {name: number for number, name in enumerate(index.shard_names)}
    if missing := [name for name in names if name not in place]:
        raise MissingFileError(
            f"{index.directory}: {len(missing)} of the {len(names)} shards that this run trains on are not in its "
            f"index, the first is {missing[0]}. Run: {stage1_command()}"
        )
    return index.only([place[name] for name in names])


def _describe_cache(dataset: CachedTensorDataset, data: DataConfig) -> list[str]:
    index = dataset.index
    _, height, width = index.image_shape
    lines = [
        f"reading the cache {index.directory}: {len(dataset)} images of {height} x {width} px, {index.dtype}, in "
        f"{len(index.shard_names)} shards, {format_bytes(index.num_samples * index.row_bytes)}"
    ]
    if not index.complete and index.verified:
        wanted = min(index.source_num_samples, data.max_samples or index.source_num_samples)
        lines.append(
            f"  it is incomplete, training uses what is there: {index.num_samples} of {wanted} rows. To complete "
            f"it, run: {stage1_command()} (a run in progress takes what came since with --set refresh_shards=true)"
        )
    if not index.verified:
        lines.append("  it is in the predecessor's format: its bytes carry no checksums and cannot be verified")
    if is_network_file_system(index.directory):
        lines.append(
            f"  it lies on a network file system ({file_system_of(index.directory)}): copy it to a local disk first "
            f'(cp -r {index.directory} "$TMPDIR"/) and give that as cache_dir'
        )
    return lines


def _describe_order(data: DataConfig, sampling: Sampling) -> list[str]:
    count, total = sampling.draws.count, len(sampling.shard_rows)
    which = "every shard" if count == total else f"{count} of {total} shards ({data.shard_subset_mode})"
    if sampling.draws.mode == "cycle" and len(sampling.draws(0)) < count:
        which += f"; max_steps_per_epoch ends it after about {len(sampling.draws(0))}, so it draws no more than that"
    how = "in order within each shard"
    if data.shuffle == "block":
        how = f"runs of {sampling.run_rows} rows, mixed in windows of {sampling.run_rows * sampling.window_runs}"
    return [f"  an epoch: {which}; {sampling.num_batches(0)} batches; {how}"]
