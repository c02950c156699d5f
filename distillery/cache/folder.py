"""A cache folder as its readers see it: index.json in arrays, where a shard's rows are, which of them hold an image.

    python -m distillery.cache verify DIR     # as python -m distillery.verify DIR: reads every byte, writes nothing

Three layouts are read: ours (format_version 3) and the two of this project's predecessor, which carry no hashes and are
therefore flagged as unverified.
"""

import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillery.cache.archive import DTYPES, find_payload, read_member
from distillery.cache.images import IMAGE_SHARDS, INDEX_NAME, SHARD_PATTERN, valid_rows
from distillery.cache.index import (
    MALFORMED,
    OWN_KEYS,
    CacheIndex,
    checked_index,
    checked_preprocess,
    shard_arrays,
    whole_number,
)
from distillery.cache.store import (
    FORMAT_VERSION,
    FutureFormatError,
    check_version,
    decode_checksums,
    parse_json,
)
from distillery.system.errors import MissingFileError, UserError, stage1_command
from distillery.system.files import open_regular, read_regular

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ShardLayout:
    """Where the N rows of a shard are and which of them hold an image.

    payload_offset: byte offset of row 0 in the file; valid: bool [N]; row_checksums: uint64 [N], XXH3-64 of each row's
    bytes, or None in a predecessor's cache; num_bytes: of the file where it is not what the index says: a cache that
    grows has put a longer shard in the place of its short last one.
    """

    payload_offset: int
    valid: np.ndarray
    row_checksums: np.ndarray | None
    num_bytes: int | None = None


def load_index(directory: str | os.PathLike) -> CacheIndex:
    """Open a cache folder of any of the three layouts.

    Raises:
        MissingFileError: no cache there.
        UserError: its index is damaged, of a future format (FutureFormatError), hostile or contradicts itself.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME
    if not os.path.lexists(path):
        if slices := sorted(directory.glob("index_shard_*.json")):
            return index_of_seed(directory, *merge_slices(slices), normalized=False)
        raise MissingFileError(f"Index file not found: {path}. Run: {stage1_command()}")
    try:
        index = parse_json(path, read_regular(path))
    except UserError as error:
        raise UserError(f"{error} It is made again by: {stage1_command()}") from error
    check_version(index, path)
    version = index.get("format_version", 1)
    # the predecessor's has none of these: with them, it is the version that is damaged
    if version in (1, 2) and OWN_KEYS.isdisjoint(index):
        return index_of_seed(directory, index, index.get("shards"), normalized=True)
    try:
        if type(version) is not int or version != FORMAT_VERSION:
            raise ValueError(f"format_version {version!r}")
        return checked_index(
            CacheIndex(
                directory=directory,
                format_version=version,
                verified=True,
                num_samples=whole_number(index, "num_samples"),
                source_num_samples=whole_number(index, "source_num_samples"),
                complete=bool(index["complete"]),
                fingerprint=str(index["fingerprint"]),
                source=dict(index["source"]),
                preprocess=checked_preprocess(index["preprocess"]),
                dtype=index["dtype"],
                image_shape=tuple(index["image_shape"]),
                shard_size=whole_number(index, "shard_size"),
                labels=bool(index["labels"]),
                class_names={int(number): str(name) for number, name in index.get("class_names", {}).items()},
                **shard_arrays(index["shards"]),
            )
        )
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}). It is made again by: {stage1_command()}"
        ) from error


def load_shard_layout(index: CacheIndex, s: int) -> ShardLayout:
    """Where the rows of the s-th shard listed are.

    Raises:
        MissingFileError: the shard is gone.
        UserError: its record or archive is damaged, or is not the one the index lists.
    """
    path, rows = index.shard_path(s), int(index.shard_rows[s])
    try:
        if not index.verified:
            offset, size, _ = find_payload(path)
            if size != rows * index.row_bytes:
                raise UserError(f"{path}: holds {size} bytes of images, its index promises {rows * index.row_bytes}.")
            return ShardLayout(offset, np.ones(rows, dtype=bool), None)
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file; a cache folder may be a symbolic link, its files may not.")
        if status.st_size != index.shard_bytes[s]:
            if (layout := _longer_layout(index, s, status.st_size)) is not None:
                return layout
            raise UserError(
                f"{path.name} has {status.st_size} bytes, index.json says {index.shard_bytes[s]}. "
                f"Run: python -m distillery.cache verify {index.directory}, then stage 1 again."
            )
        record = IMAGE_SHARDS.record_or_meta(path)
    except FileNotFoundError as error:
        if isinstance(error, UserError):
            raise
        raise MissingFileError(
            f"{error.filename}: listed in the index, but not there. Run: {stage1_command()}"
        ) from error
    found = (record["fingerprint"], record["global_start"], record["num_samples"], record["num_failed"])
    if found != (index.fingerprint, index.shard_starts[s], rows, index.shard_failed[s]):
        raise UserError(f"{path}: is not the shard that index.json lists. Run: {stage1_command()}")
    if (record["dtype"], tuple(record["image_shape"])) != (index.dtype, index.image_shape):
        raise UserError(f"{path}: holds {record['dtype']} {record['image_shape']}, unlike index.json.")
    return ShardLayout(record["payload_offset"], valid_rows(record), decode_checksums(record["row_checksums"]))


def _longer_layout(index: CacheIndex, s: int, num_bytes: int) -> ShardLayout | None:
    """The rows that an index lists of a shard that has more by now; None: the file is no such shard."""
    path, rows = index.shard_path(s), int(index.shard_rows[s])
    try:
        # not the record: it is written after the shard, and may be the short one's still
        record, _ = IMAGE_SHARDS.meta_inside(path)
    except FutureFormatError:
        raise
    except UserError:
        return None
    valid = valid_rows(record)[:rows]
    found = (record["fingerprint"], record["global_start"], int(np.count_nonzero(~valid)))
    if record["num_samples"] <= rows or found != (index.fingerprint, index.shard_starts[s], index.shard_failed[s]):
        return None
    return ShardLayout(record["payload_offset"], valid, decode_checksums(record["row_checksums"])[:rows], num_bytes)


def load_labels(index: CacheIndex, s: int) -> np.ndarray | None:
    """int64 [N] of the s-th shard listed, its CRC checked; None in a cache without labels."""
    if not index.labels:
        return None
    data = read_member(index.shard_path(s), "data/2")
    if len(data) != 8 * index.shard_rows[s]:
        raise UserError(f"{index.shard_path(s)}: holds {len(data)} bytes of labels for {index.shard_rows[s]} rows.")
    return np.frombuffer(data, dtype="<i8")


def merge_slices(paths: list[Path]) -> tuple[dict, list[dict]]:
    """The predecessor's one index per array task as one: (facts of the first, all shard rows by global_start)."""
    slices = [parse_json(path, read_regular(path)) for path in paths]
    try:
        rows = sorted(
            (row for part in slices for row in part["shards"]), key=lambda row: whole_number(row, "global_start")
        )
    except MALFORMED as error:
        raise UserError(f"{paths[0].parent}: an index_shard_*.json is damaged ({error!r}).") from error
    return slices[0], rows


def index_of_seed(directory: Path, facts: dict, rows: list[dict] | None, *, normalized: bool) -> CacheIndex:
    """A predecessor's index. Its num_samples may be the data set's size: what counts is what the shards hold."""
    try:
        if not rows:
            raise UserError(f"{directory}: its index lists no shards. Run: {stage1_command()}")
        arrays = shard_arrays([_seed_row(directory, row) for row in rows])
        dtype, shape = seed_image_format(directory / rows[0]["shard_path"])
        num_rows = int(arrays["shard_rows"].sum())
        end = int((arrays["shard_starts"] + arrays["shard_rows"]).max())
        return checked_index(
            CacheIndex(
                directory=directory,
                format_version=1 if normalized else 2,
                verified=False,
                num_samples=num_rows,
                source_num_samples=max(end, whole_number(facts, "num_samples") if "num_samples" in facts else 0),
                complete=False,
                fingerprint="",
                source={},
                preprocess={
                    "image_size": shape[1],
                    "mean": list(IMAGENET_MEAN),
                    "std": list(IMAGENET_STD),
                    "normalized": normalized,
                },
                dtype=dtype,
                image_shape=shape,
                shard_size=int(arrays["shard_rows"].max()),
                labels=False,
                **arrays,
            )
        )
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory}: its index is damaged ({type(error).__name__}: {error}).") from error


def _seed_row(directory: Path, row: dict) -> dict:
    name = row["shard_path"]
    if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
        raise UserError(f"{directory}: refused: its index names {name!r}, which is no shard's name.")
    try:
        size = (directory / name).lstat().st_size
    except FileNotFoundError as error:
        raise MissingFileError(f"{error.filename}: listed in the index of {directory}, but not there.") from error
    return {**row, "num_failed": 0, "bytes": size}


def seed_image_format(path: Path) -> tuple[str, tuple[int, int, int]]:
    """(dtype, [3, H, W]) of a predecessor's shard; torch reads only the header thanks to mmap, and runs nothing."""
    import torch

    open_regular(path).close()
    try:
        images = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["images"]
        dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    except Exception as error:  # torch raises nearly anything on hostile bytes
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged, or not written by torch.save ({type(error).__name__}: {reason}).") from error
    if dtype not in DTYPES or len(shape) != 4:
        raise UserError(f"{path}: its images are {dtype} {shape}; expected [N, 3, H, W] of {', '.join(DTYPES)}.")
    return dtype, shape[1:]
