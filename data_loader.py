"""Load images for training: from the cache of stage 1, or decoded during training.

    loader = build_pretraining_dataloader(data_config, train_config)     # dicts (the parsed YAML) or config objects
    for epoch in range(num_epochs):
        loader.set_epoch(epoch)                                          # this epoch's shards and order
        for images in loader: ...                                        # float32 [B, 3, H, W], normalised

The classes are map-style data sets; any torch DataLoader accepts them. The loader above does not need a DataLoader: its
threads read rows directly into reused batches (distillery/reading/shard_files.py, stream.py). The order is a pure
function of (seed, epoch, shards), whatever the number of processes and threads (distillery/reading/order.py).
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

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
    load_labelled,
)
from distillery.reading.loader import DevicePrefetcher, PretrainingLoader
from distillery.reading.order import RUN_BYTES, WINDOW_BYTES, Sampling, block_sizes
from distillery.reading.raw import PretrainDataset, RawRows
from distillery.reading.row_files import open_files
from distillery.reading.rows import CachedRows
from distillery.reading.staging import Staging, describe_staging, stage_path
from distillery.sources.base import describe_source
from distillery.sources.pixels import PreprocessSpec
from distillery.sources.registry import SOURCES
from distillery.system import distributed
from distillery.system.console import format_bytes
from distillery.system.errors import MissingFileError, UserError, stage1_command
from distillery.system.launcher import world_from_environment
from distillery.system.machine import file_system_of, is_network_file_system

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
# keys that say which images are meant, as far as a cache knows
_SOURCE_KEYS = ("dataset_name", "split", "image_column")
# rows of which a parquet file's row group is worth reading whole
_LONG_RUN = 64


def preprocess_spec(data: DataConfig) -> PreprocessSpec:
    """How data_config.yaml wants images to become pixels."""
    return PreprocessSpec(**data.preprocess_arguments)


def build_pretraining_dataloader(
    data_config: Any,
    train_config: Any,
    *,
    with_indices: bool = False,
    raw: bool = False,
    shards: Sequence[str] | None = None,
) -> PretrainingLoader:
    """Build the loader that the configuration names, and print which one it is.

    Args:
        data_config: dict (the parsed YAML, partial is fine: defaults fill in) or DataConfig.
        train_config: dict or TrainConfig; batch_size is that of one process.
        with_indices: yield (batch, global_idx int64 [B]): each image's place in the source.
        raw: yield the stored dtype, not normalised further (uint8 pixels for raw images).
        shards: names of the shards to use, a run's frozen list; None: every shard.

    Raises:
        MissingFileError: the configuration needs a cache, and none exists. UserError: a cache of another
        configuration, a batch larger than an epoch, a configuration error.
    """
    data = load_data_config(data_config, require_source=False)
    train = load_train_config(train_config, require_checkpoint_dir=False)
    index = distributed.on_main(lambda: find_cache(data, _keys_given(data_config)))
    images = _raw_images(data, shards, raw=raw) if index is None else _cached_images(data, index, shards, raw=raw)
    dataset, sampling = images.dataset, _sampling(data, train, images)
    if index is not None and sampling.draws.count < len(dataset.shard_rows):
        # the loader's own draws: with max_steps_per_epoch they are shorter than shards_per_epoch
        dataset = RandomShardSubsetCachedDataset(dataset, data.shards_per_epoch, draws=sampling.shards)
    staging, staging_line = _build_staging(data, train, images, sampling)
    lines = [*images.lines, _describe_order(data, sampling), *_advise_longer_runs(images, sampling), *staging_line]
    if distributed.is_main():
        print("\n".join(lines), flush=True)
    return PretrainingLoader(
        dataset,
        images.rows,
        sampling,
        image_shape=images.shape,
        batch_size=train.batch_size,
        num_threads=images.num_threads,
        prefetch_batches=data.prefetch_batches,
        pin_memory=data.pin_memory,
        with_indices=with_indices,
        index=images.index,
        normalized=images.normalized,
        staging=staging,
    )


def _keys_given(config: Any) -> set[str]:
    """The keys a configuration sets itself; a default is no statement about a cache that is there already."""
    if isinstance(config, Mapping):
        return {ALIASES.get(key, key) for key in config}
    return set(DataConfig.model_fields)


def find_cache(data: DataConfig, keys_given: Set[str] = frozenset(DataConfig.model_fields)) -> CacheIndex | None:
    """The index of the cache to use; None: raw images.

    keys_given: those that the configuration sets itself, in which the cache has to agree with it.
    """
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
    # an index names jpeg_decode only where it is not exact
    own = {"cache_dtype": index.dtype, "cache_shard_size": index.shard_size, "jpeg_decode": "exact"}
    stored = own | index.preprocess
    wanted = preprocess_spec(data).identity() | {key: getattr(data, key) for key in own}
    if index.is_encoded:
        wanted |= {"stored_size": data.row_size, "jpeg_quality": data.jpeg_quality}
    if not index.verified:  # a predecessor's index says neither how it resized nor how it cut its shards
        stored = {key: stored[key] for key in ("image_size", "cache_dtype")}
    if data.dataset_name is not None:  # a configuration may leave the source out, the default of split too then
        stored |= _keys_of_source(index.source, is_kind=data.dataset_name in SOURCES)
        wanted |= {key: value for key in _SOURCE_KEYS if (value := getattr(data, key)) is not None}
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


def _keys_of_source(source: Mapping[str, Any], *, is_kind: bool) -> dict[str, Any]:
    """Keys of data_config.yaml that the cache's record of its source answers; is_kind: dataset_name is parquet, say."""
    known = {key: source.get(key) for key in _SOURCE_KEYS}
    if source.get("kind") == "webdataset":  # an extension, written in several ways
        known["image_column"] = None
    if is_kind:
        known["dataset_name"] = source["kind"] if source.get("kind") in SOURCES else None
    return {key: value for key, value in known.items() if value is not None}


def _plain(value: Any) -> Any:
    return [float(number) for number in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class _Images:
    """Images that a loader reads: of a cache, or of a source, decoded on the way.

    dataset: the images map-style; rows: what reads them into batches; normalized: whether float batches are normalised;
    index: of the cache; lines: for the console.
    """

    dataset: CachedTensorDataset | PretrainDataset
    rows: CachedRows | Callable[[], RawRows]
    shape: tuple[int, int, int]
    row_bytes: int
    num_threads: int
    normalized: bool
    index: CacheIndex | None
    lines: list[str]


def _cached_images(data: DataConfig, index: CacheIndex, shards: Sequence[str] | None, *, raw: bool) -> _Images:
    if shards is not None:
        index = _chosen_shards(index, shards)
    dataset = CachedTensorDataset(index, max_shards=data.max_shards, max_samples=data.max_samples)
    index = dataset.index
    by_default = data.num_workers is None and not index.is_encoded
    num_threads = _READING_THREADS if by_default else data.workers
    return _Images(
        dataset,
        CachedRows(index, raw=raw, files=open_files(index, mode=data.read_mode)),
        index.image_shape,
        index.row_bytes,
        num_threads=num_threads,
        normalized=index.normalized or not raw,
        index=index,
        lines=_describe_cache(dataset, data, num_threads),
    )


def _raw_images(data: DataConfig, shards: Sequence[str] | None, *, raw: bool) -> _Images:
    if shards is not None:
        raise MissingFileError(
            f"this run was started on the shards of a cache, and {data.cache_dir} holds none. Run: {stage1_command()}"
        )
    dataset = PretrainDataset(data)
    size, decoder = data.image_size, dataset.decoder
    num_threads = data.workers
    place = "cache_dir is null" if data.cache_dir is None else f"there is no cache at {data.cache_dir}"
    why = "use_cached is false" if data.use_cached is False else place
    line = (
        f"decoding raw images, {num_threads} at a time, from {decoder.source.describe()}: {len(dataset)} "
        f"images of {size} x {size} px ({why}; a cache is many times faster: {stage1_command()})"
    )
    return _Images(
        dataset,
        lambda: RawRows(decoder, data.cache_shard_size, raw=raw, num_readers=min(_RAW_READERS, num_threads)),
        (3, size, size),
        row_bytes_of((3, size, size), data.cache_dtype),  # the order is that of the cache which stage 1 would make
        num_threads=num_threads,
        normalized=not raw,
        index=None,
        lines=[line],
    )


def _sampling(data: DataConfig, train: TrainConfig, images: _Images) -> Sampling:
    run_rows, window_runs = block_sizes(
        images.row_bytes, data.run_bytes or RUN_BYTES, max(data.window_bytes or WINDOW_BYTES, data.run_bytes or 0)
    )
    return Sampling(
        images.dataset.shard_rows,
        train.batch_size * distributed.world_size(),
        shards_per_epoch=data.shards_per_epoch,
        mode=data.shard_subset_mode,
        seed=data.random_subset_seed,
        shuffle=data.shuffle,
        batches_per_step=train.grad_accumulation_steps,
        max_steps=train.max_steps_per_epoch,
        run_rows=run_rows,
        window_runs=window_runs,
    )


def _build_staging(
    data: DataConfig, train: TrainConfig, images: _Images, sampling: Sampling
) -> tuple[Staging | None, list[str]]:
    """(copies of the cache's shards on the node's own disk, a line for the console); (None, []) without stage_dir."""
    if data.stage_dir is None:
        return None, []
    if images.index is None:
        return None, ["  stage_dir: nothing is staged, as the images are not read from a cache"]
    if not images.index.verified:
        return None, ["  stage_dir: nothing is staged, as the predecessor's caches have no hashes to check copies with"]
    try:
        place = stage_path(data.stage_dir, images.index.directory)
        staging = Staging(
            images.rows.files, sampling, place,
            stage_gb=data.stage_gb, num_epochs=train.num_epochs, may_copy=world_from_environment().local_rank == 0,
        )  # fmt: skip
    except OSError as error:
        place = error.filename or data.stage_dir
        return None, [f"  stage_dir: {place}: {os.strerror(error.errno or 0)}: nothing is staged"]
    return staging, [describe_staging(images.index, sampling, place, staging.room)]


def _advise_longer_runs(images: _Images, sampling: Sampling) -> list[str]:
    """What to set where short runs of a parquet file cost most of a row group each."""
    if images.index is not None or images.dataset.decoder.source.identity["kind"] != "parquet":
        return []
    if sampling.run_rows >= min(_LONG_RUN, len(images.dataset)):
        return []
    return [
        f"  of a parquet file even a run of {sampling.run_rows} rows costs most of a row group: "
        f"run_bytes: {_LONG_RUN * images.row_bytes} reads less, in runs of {_LONG_RUN}, mixed from fewer places"
    ]


def _chosen_shards(index: CacheIndex, names: Sequence[str]) -> CacheIndex:
    place = {name: number for number, name in enumerate(index.shard_names)}
    if missing := [name for name in names if name not in place]:
        raise MissingFileError(
            f"{index.directory}: {len(missing)} of the {len(names)} shards that this run trains on are not in its "
            f"index, the first is {missing[0]}. Run: {stage1_command()}"
        )
    return index.only([place[name] for name in names])


def _describe_cache(dataset: CachedTensorDataset, data: DataConfig, num_threads: int) -> list[str]:
    index = dataset.index
    _, height, width = index.image_shape
    lines = [
        f"reading the cache {index.directory}: {len(dataset)} images of {height} x {width} px, {index.dtype}, in "
        f"{len(index.shard_names)} shards, {format_bytes(int(index.shard_bytes.sum()))}"
    ]
    with contextlib.suppress(KeyError, TypeError, AttributeError):  # other programs' records may say less
        lines.append(f"  made from {describe_source(index.source)}")
    if index.is_encoded:
        lines.append(f"  its rows are decoded when they are read, {num_threads} at a time (num_workers)")
    if not index.complete and index.verified:
        wanted = min(index.source_num_samples, data.max_samples or index.source_num_samples)
        lines.append(
            f"  it is incomplete, training uses what is there: {index.num_samples} of {wanted} rows. To complete "
            f"it, run: {stage1_command()} (a run in progress takes what came since with --set refresh_shards=true)"
        )
    if not index.verified:
        lines.append("  it is in the predecessor's format: its bytes carry no checksums and cannot be verified")
    if data.stage_dir is None and index.verified and is_network_file_system(index.directory):
        lines.append(
            f"  it lies on a network file system ({file_system_of(index.directory)}): --set stage_dir=FOLDER, on the "
            "node's own disk ('$TMPDIR' for instance), copies each epoch's shards there ahead of their use"
        )
    return lines


def _describe_order(data: DataConfig, sampling: Sampling) -> str:
    count, total = sampling.draws.count, len(sampling.shard_rows)
    which = "every shard" if count == total else f"{count} of {total} shards ({data.shard_subset_mode})"
    if sampling.draws.mode == "cycle" and len(sampling.draws(0)) < count:
        which += f"; max_steps_per_epoch ends it after about {len(sampling.draws(0))}, so it draws no more than that"
    how = "in order within each shard"
    if data.shuffle == "block":
        how = f"runs of {sampling.run_rows} rows, mixed in windows of {sampling.run_rows * sampling.window_runs}"
    return f"  an epoch: {which}; {sampling.num_batches(0)} batches; {how}"
