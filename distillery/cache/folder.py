"""A cache folder as its readers see it: index.json as arrays, the place of each row, and which rows hold an image.

    python -m distillery.cache verify DIR     # as python -m distillery.verify DIR: reads every byte, writes nothing

It reads three layouts: ours (format_version 3) and the two of this project's predecessor. The predecessor's layouts
carry no hashes, so their indexes are marked as unverified.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillery.cache.archive import DTYPES, find_payload
from distillery.cache.encoded import decode_row_sizes, offsets_of
from distillery.cache.images import (
    IMAGE_SHARDS,
    INDEX_NAME,
    SHARD_PATTERN,
    image_fields,
    read_labels,
    valid_rows,
)
from distillery.cache.index import OWN_KEYS, CacheIndex, checked_index, own_fields, shard_arrays, whole_number
from distillery.cache.store import (
    FORMAT_VERSION,
    MALFORMED,
    FutureFormatError,
    decode_checksums,
    parse_json,
    read_index,
)
from distillery.system.errors import MissingFileError, UserError, stage1_command
from distillery.system.files import open_regular, read_regular

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ShardLayout:
    """Where the N rows of a shard are and which of them hold an image.

    payload_offset: byte offset of row 0 in the file; valid: bool [N]; row_checksums: uint64 [N], XXH3-64 of each row's
    bytes, or None in a predecessor's cache; num_bytes: of the file where it is not what the index says: a cache that
    grows has put a longer shard in the place of its short last one. offsets: of encoded rows, int64 [N + 1], bytes from
    row 0 on to where each begins, and to where the last one ends; None where all rows have the same size.
    """

    payload_offset: int
    valid: np.ndarray
    row_checksums: np.ndarray | None
    num_bytes: int | None = None
    offsets: np.ndarray | None = None


def load_index(directory: str | os.PathLike) -> CacheIndex:
    """Open a cache folder of any of the three layouts.

    Raises:
        MissingFileError: no cache there.
        UserError: its index is damaged, of a future format (FutureFormatError), hostile or contradicts itself.
    """
    directory = Path(directory)
    content, version = _read_index(directory)
    try:
        fields = own_fields(content) if version == FORMAT_VERSION else _predecessor_fields(directory, content, version)
        return checked_index(CacheIndex(directory=directory, format_version=version, **fields))
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        remedy = f" It is made again by: {stage1_command()}" if version == FORMAT_VERSION else ""
        raise UserError(f"{directory / INDEX_NAME}: damaged ({type(error).__name__}: {error}).{remedy}") from error


def _read_index(directory: Path) -> tuple[dict, int]:
    """(index.json's content, its format_version); the predecessor's one index per array task is read as one."""
    path = directory / INDEX_NAME
    if not os.path.lexists(path) and (slices := sorted(directory.glob("index_shard_*.json"))):
        return _merge_slices(slices), 2
    content = read_index(path, stage1_command())
    # the predecessor's has no key of ours: with one, it is the version that is damaged
    is_predecessors = content.get("format_version", 1) in (1, 2) and OWN_KEYS.isdisjoint(content)
    return content, 1 if is_predecessors else FORMAT_VERSION


def load_shard_layout(index: CacheIndex, s: int) -> ShardLayout:
    """Where the rows of the s-th shard listed are.

    Raises:
        MissingFileError: the shard is gone.
        UserError: its record or archive is damaged, or is not the one the index lists.
    """
    path, rows = index.shard_path(s), int(index.shard_rows[s])
    if index.verified:
        record, num_bytes = _record_listed(index, s)
        checksums = decode_checksums(record["row_checksums"])[:rows]
        offsets = offsets_of(decode_row_sizes(record)[:rows]) if index.is_encoded else None
        return ShardLayout(record["payload_offset"], valid_rows(record)[:rows], checksums, num_bytes, offsets)
    with _listed_files():
        offset, size, _ = find_payload(path)
    if size != rows * index.row_bytes:
        raise UserError(f"{path}: holds {size} bytes of images, its index promises {rows * index.row_bytes}.")
    return ShardLayout(offset, np.ones(rows, dtype=bool), None)


def load_mask_layout(index: CacheIndex, s: int) -> ShardLayout:
    """Where the masks of the s-th shard listed are; errors as load_shard_layout."""
    record, num_bytes = _record_listed(index, s)
    if record.get("mask_dtype") != index.mask_dtype:
        raise UserError(f"{index.shard_path(s)}: its masks are {record.get('mask_dtype')}, unlike index.json.")
    rows, checksums = int(index.shard_rows[s]), decode_checksums(record["mask_checksums"])
    return ShardLayout(image_fields(record)[1].offset, valid_rows(record)[:rows], checksums[:rows], num_bytes)


def _record_listed(index: CacheIndex, s: int) -> tuple[dict, int | None]:
    """(the record of the s-th shard listed, ShardLayout's num_bytes)."""
    path, rows = index.shard_path(s), int(index.shard_rows[s])
    with _listed_files():
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file; a cache folder may be a symbolic link, its files may not.")
        has_size = status.st_size == index.shard_bytes[s]
        record = IMAGE_SHARDS.record_or_meta(path) if has_size else _meta_of_grown(index, s, status.st_size)
    if not _is_listed(index, s, record) or (has_size and record["num_samples"] != rows):
        raise UserError(f"{path}: is not the shard that index.json lists. Run: {stage1_command()}")
    if (record["dtype"], tuple(record["image_shape"])) != (index.dtype, index.image_shape):
        raise UserError(f"{path}: holds {record['dtype']} {record['image_shape']}, unlike index.json.")
    return record, None if has_size else status.st_size


@contextlib.contextmanager
def _listed_files() -> Iterator[None]:
    """Say of a missing file that the index lists it."""
    try:
        yield
    except MissingFileError:
        raise
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{error.filename}: listed in the index, but not there. Run: {stage1_command()}"
        ) from error


def _is_listed(index: CacheIndex, s: int, record: dict) -> bool:
    """Whether a record's first rows are those that an index lists."""
    num_failed = np.count_nonzero(~valid_rows(record)[: index.shard_rows[s]])
    found = (record["fingerprint"], record["global_start"], num_failed)
    return found == (index.fingerprint, index.shard_starts[s], index.shard_failed[s])


def _meta_of_grown(index: CacheIndex, s: int, num_bytes: int) -> dict:
    """What a shard says of itself that has more rows by now than the index lists.

    Raises:
        UserError: it is no such shard.
    """
    path = index.shard_path(s)
    try:
        # not the record: it is written after the shard, and may be the short one's still
        meta, _ = IMAGE_SHARDS.meta_inside(path)
        if meta["num_samples"] > index.shard_rows[s] and _is_listed(index, s, meta):
            return meta
    except FutureFormatError:
        raise
    except UserError:
        pass
    raise UserError(
        f"{path.name} has {num_bytes} bytes, index.json says {index.shard_bytes[s]}. "
        f"Run: python -m distillery.cache verify {index.directory}, then stage 1 again."
    )


def load_labels(index: CacheIndex, s: int) -> np.ndarray | None:
    """int64 [N] of the s-th shard listed, its CRC checked; None in a cache without labels."""
    if not index.labels:
        return None
    data = read_labels(index.shard_path(s), index.dtype)
    if len(data) != 8 * index.shard_rows[s]:
        raise UserError(f"{index.shard_path(s)}: holds {len(data)} bytes of labels for {index.shard_rows[s]} rows.")
    return np.frombuffer(data, dtype="<i8")


def _merge_slices(paths: list[Path]) -> dict:
    """The predecessor's one index per array task as one: the keys of the first, the shards of all by global_start."""
    slices = [parse_json(path, read_regular(path)) for path in paths]
    try:
        rows = sorted(
            (row for part in slices for row in part["shards"]), key=lambda row: whole_number(row, "global_start")
        )
    except MALFORMED as error:
        raise UserError(f"{paths[0].parent}: an index_shard_*.json is damaged ({error!r}).") from error
    return slices[0] | {"shards": rows}


def _predecessor_fields(directory: Path, content: dict, version: int) -> dict:
    """CacheIndex's fields out of a predecessor's index, whose images are normalised in version 1.

    Its num_samples may be the data set's size: what counts is what the shards hold.
    """
    rows = content.get("shards")
    if not rows:
        raise UserError(f"{directory}: its index lists no shards. Run: {stage1_command()}")
    arrays = shard_arrays([_predecessor_row(directory, row) for row in rows])
    dtype, shape = predecessor_image_format(directory / rows[0]["shard_path"])
    end = int((arrays["shard_starts"] + arrays["shard_rows"]).max())
    return arrays | {
        "verified": False,
        "num_samples": int(arrays["shard_rows"].sum()),
        "source_num_samples": max(end, whole_number(content, "num_samples") if "num_samples" in content else 0),
        "complete": False,
        "fingerprint": "",
        "source": {},
        "preprocess": {
            "image_size": shape[1],
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
            "normalized": version == 1,
        },
        "dtype": dtype,
        "image_shape": shape,
        "shard_size": int(arrays["shard_rows"].max()),
        "labels": False,
    }


def _predecessor_row(directory: Path, row: dict) -> dict:
    name = row["shard_path"]
    if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
        raise UserError(f"{directory}: refused: its index names {name!r}, which is no shard's name.")
    try:
        size = (directory / name).lstat().st_size
    except FileNotFoundError as error:
        raise MissingFileError(f"{error.filename}: listed in the index of {directory}, but not there.") from error
    return {**row, "num_failed": 0, "bytes": size}


def predecessor_image_format(path: Path) -> tuple[str, tuple[int, int, int]]:
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
