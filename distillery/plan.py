"""What a cache shall be, and what a folder already holds of it: found by reading, before anything is written."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from distillery.files import sha256_of, write_atomic
from distillery.preprocess import PreprocessSpec
from distillery.process import UserError
from distillery.records import (
    FORMAT_VERSION,
    INDEX_NAME,
    SHARD_PATTERN,
    parse_json,
    read_record,
    record_of_shard,
    record_path,
    shard_name,
)
from distillery.shard_format import DTYPES, read_meta

_FOREIGN_TEMPORARY_S = 3600


@dataclass(frozen=True)
class CachePlan:
    """What the cache shall be: everything that decides its bytes, and how many rows it shall hold.

    num_rows: rows wanted, the first so many of the source; image sizes in px inside `spec`.
    """

    directory: Path
    spec: PreprocessSpec
    dtype: str
    shard_size: int
    num_rows: int
    source_num_samples: int
    source_identity: dict
    labels: bool

    @cached_property
    def identity(self) -> dict:
        """All that decides the bytes; its hash is the fingerprint, its differences the message when it changes."""
        return {
            "source": self.source_identity,
            "preprocess": self.spec.identity() | {"normalized": self.dtype != "uint8"},
            "dtype": self.dtype,
            "image_shape": list(self.image_shape),
            "shard_size": self.shard_size,
            "labels": self.labels,
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity."""
        return sha256_of(self.identity)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[3, H, W] of a stored image."""
        return 3, self.spec.image_size, self.spec.image_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored image."""
        return int(np.prod(self.image_shape)) * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache, the short last one included."""
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard_idx: int) -> tuple[int, int]:
        """(first row, row after the last) of a shard in the source."""
        start = shard_idx * self.shard_size
        return start, min(self.num_rows, start + self.shard_size)

    def shard_path(self, shard_idx: int) -> Path:
        """Where the shard is published."""
        return self.directory / shard_name(shard_idx)


@dataclass(frozen=True)
class Survey:
    """What a folder holds of a plan's shards: finished ones, ones to hash before they count, ones to make."""

    done: list[int]
    doubtful: list[int]
    missing: list[int]


def survey_cache(plan: CachePlan, shards: Iterable[int]) -> Survey:
    """Compare a folder with a plan; reads records and file sizes only, writes nothing.

    A shard counts as finished when its record parses, its size agrees and it was not touched since its record was
    written; anything else is hashed before it counts.

    Raises:
        UserError: the folder holds a cache of another configuration, with the differences field by field.
    """
    if not plan.directory.exists():
        return Survey([], [], list(shards))
    _check_index_version(plan.directory)
    done, doubtful, missing = [], [], []
    for shard_idx in shards:
        path = plan.shard_path(shard_idx)
        start, stop = plan.rows_of(shard_idx)
        if not os.path.lexists(path):
            missing.append(shard_idx)
            continue
        try:
            record = read_record(record_path(path))
        except (FileNotFoundError, UserError):
            record = None
        if record is None:
            _check_same_identity(plan, _identity_inside(path), path)
            doubtful.append(shard_idx)
            continue
        _check_same_identity(plan, record["identity"], path)
        status, recorded = path.lstat(), record_path(path).stat()
        if status.st_size != record["bytes"] or status.st_ctime_ns > recorded.st_ctime_ns:
            doubtful.append(shard_idx)
        elif record["num_samples"] < stop - start:
            missing.append(shard_idx)  # the short last shard of a cache that now grows
        else:
            done.append(shard_idx)
    return Survey(done, doubtful, missing)


def _check_index_version(directory: Path) -> None:
    """Refuse a folder whose index is of a future format, or of the predecessor's."""
    path = directory / INDEX_NAME
    slices = list(directory.glob("index_shard_*.json"))
    try:
        version = parse_json(path, path.read_bytes()).get("format_version") if path.exists() else FORMAT_VERSION
    except UserError:
        return  # damaged: it is only a view, and is made again
    if type(version) is int and version > FORMAT_VERSION:
        raise UserError(f"{path}: format_version {version} is of a later version of this project; update the code.")
    has_records = any(SHARD_PATTERN.fullmatch(path.stem + ".pt") for path in directory.glob("images_*.json"))
    if not has_records and (version is None or slices) and any(directory.glob("images_*.pt")):
        raise UserError(
            f"{directory} holds a cache of an earlier format, without hashes. Training reads it as it is; "
            "for a new cache give another cache_dir."
        )


def _identity_inside(path: Path) -> dict | None:
    try:
        return parse_json(path, read_meta(path)).get("identity")
    except (UserError, OSError):
        return None  # damaged beyond reading: it will be made again


def _check_same_identity(plan: CachePlan, found: dict | None, path: Path) -> None:
    if found is None or found == plan.identity:
        return
    lines = [f"  {key}: the cache has {a!r}, now it would be {b!r}" for key, a, b in _differences(found, plan.identity)]
    raise UserError(
        f"{path} was made with another configuration:\n" + "\n".join(lines) + "\n"
        "Nothing was written. Put the values back, or give another cache_dir."
    )


def _differences(a: object, b: object, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, value in a, value in b) wherever two nested dicts differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            yield from _differences(a.get(key), b.get(key), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix, a, b


def adopt_shard(plan: CachePlan, shard_idx: int) -> str | None:
    """Hash a doubtful shard and write its record when it is whole; otherwise drop the record and say why."""
    path = plan.shard_path(shard_idx)
    start, stop = plan.rows_of(shard_idx)
    try:
        record = record_of_shard(path)
        if (
            record["identity"] != plan.identity
            or record["global_start"] != start
            or record["num_samples"] < stop - start
        ):
            raise UserError(f"{path}: holds other rows than this shard should.")
    except (UserError, OSError) as error:
        record_path(path).unlink(missing_ok=True)
        return f"{error} It is made again."
    write_atomic(record_path(path), record_text(record))
    return None


def record_text(record: dict) -> bytes:
    """A record as it stands on disk."""
    return json.dumps(record, sort_keys=True).encode() + b"\n"


def remove_leftovers(directory: Path, *, all_done: bool) -> None:
    """Remove temporary files of writers that are gone; of any writer once nothing is left to make.

    A writer holds a lock on its temporary file, which ends with it. Where locks do not work across nodes this may take
    away a living writer's file: it then finds the shard published by the other, or makes it again.
    """
    for path in directory.glob(".*.tmp-*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_dead = True
            except BlockingIOError:
                is_dead = False
            except OSError:  # no locks on this file system
                is_dead = time.time() - os.fstat(file.fileno()).st_mtime > _FOREIGN_TEMPORARY_S
            if is_dead or all_done:
                path.unlink(missing_ok=True)
