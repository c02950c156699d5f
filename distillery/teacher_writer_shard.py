"""One shard of teacher outputs on its way to its name: a temporary file, its publication, its record."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xxhash

from distillery.cache.archive import crc32
from distillery.cache.fields import frame_of, place_fields
from distillery.cache.store import FORMAT_VERSION, FutureFormatError, encode_checksums, record_path, record_text
from distillery.system.direct_io import reserve
from distillery.system.errors import UserError
from distillery.system.files import (
    create_temporary,
    fsync_dir,
    hash_file,
    publish_no_clobber,
    pwrite_all,
    temporary_name,
    write_atomic,
)
from distillery.teacher_cache.identity import TeacherCacheSpec
from distillery.teacher_cache.outputs import FieldSums
from distillery.teacher_cache.records import encode_sums, record_of_teacher_shard


class OpenTeacherShard:
    """A shard in the making: its temporary file, and checksums of what has been written to it.

    Args:
        path: the name it shall get.
        spec: what is stored.
        shard_idx: its number.
        global_start: its first image.
        num_rows: how many images it has.
        images_hash: file hash of the image shard it is made of.
        basis_hash: file hash of the token basis; None without one.
    """

    def __init__(
        self,
        path: Path,
        spec: TeacherCacheSpec,
        *,
        shard_idx: int,
        global_start: int,
        num_rows: int,
        images_hash: str,
        basis_hash: str | None,
    ) -> None:
        self.path, self.spec = path, spec
        self.shard_idx, self.global_start, self.num_rows = shard_idx, global_start, num_rows
        self.images_hash, self.basis_hash = images_hash, basis_hash
        views = spec.num_views
        self.fields = place_fields({n: (dtype, (num_rows, views, *s)) for n, (dtype, s) in spec.view_fields.items()})
        self.crcs = [0] * len(self.fields)
        self.checksums = {field.name: np.zeros(num_rows * views, np.uint64) for field in self.fields}
        self.valid = np.zeros(num_rows, bool)
        self.rows_written = 0
        self.temporary = temporary_name(path)
        self.fd = create_temporary(self.temporary)
        reserve(self.fd, self.fields[-1].end)

    def write(self, first: int, values: Mapping[str, np.ndarray], valid: np.ndarray) -> None:
        """Write the rows that follow those written so far; rows that are not valid become zero.

        Args:
            first: number of the first row.
            values: field -> [n, K, ...] in the field's dtype.
            valid: bool [n].
        """
        assert first == self.rows_written
        views = self.spec.num_views
        for key, field in enumerate(self.fields):
            part = np.ascontiguousarray(values[field.name])
            if not valid.all():
                part[~valid] = 0
            data, checksums = memoryview(part).cast("B"), self.checksums[field.name]
            for i in range(len(part) * views):
                row = data[i * field.view_bytes : (i + 1) * field.view_bytes]
                checksums[first * views + i] = xxhash.xxh3_64_intdigest(row)
            self.crcs[key] = crc32(data, self.crcs[key])
            pwrite_all(self.fd, data, field.offset + first * views * field.view_bytes)
        self.valid[first : first + len(valid)] = valid
        self.rows_written += len(valid)

    def meta(self, sums: Mapping[str, FieldSums]) -> dict:
        """All the record says except the file's own size and hash."""
        return {
            "format_version": FORMAT_VERSION,
            "shard_path": self.path.name,
            "shard_idx": self.shard_idx,
            "global_start": self.global_start,
            "num_samples": self.num_rows,
            "num_views": self.spec.num_views,
            "failed_rows": np.flatnonzero(~self.valid).tolist(),
            "identity": self.spec.identity,
            "fingerprint": self.spec.fingerprint,
            "images_hash": self.images_hash,
            "basis_hash": self.basis_hash,
            "fields": {field.name: {"dtype": field.dtype, "shape": list(field.shape)} for field in self.fields},
            "checksums": {name: encode_checksums(values) for name, values in self.checksums.items()},
            "sums": {
                name: encode_sums(found.count, found.total.numpy(), found.squares.numpy())
                for name, found in sums.items()
            },
            "libraries": {"torch": torch.__version__},
        }

    def publish(self, sums: Mapping[str, FieldSums], *, is_repair: bool) -> None:
        """Complete the file, make it durable, give it its name, then write its record.

        is_repair: whatever stands under the name was found bad or out of date, and is to be replaced.
        """
        assert self.rows_written == self.num_rows
        meta = self.meta(sums)
        for offset, piece in frame_of(self.fields, self.crcs, self.valid, json.dumps(meta, sort_keys=True)):
            pwrite_all(self.fd, piece, offset)
        os.ftruncate(self.fd, offset + len(piece))
        record = meta | {"bytes": offset + len(piece), "hash": _hash_of(self.fd)}
        os.fsync(self.fd)
        if not publish_no_clobber(self.temporary, self.path):
            record = self._settle_with_other_file(record, is_repair)
        write_atomic(record_path(self.path), record_text(record))
        self.close()

    def _settle_with_other_file(self, record: dict, is_repair: bool) -> dict:
        """Another file has the name: keep it when it is a whole shard of the same images, else replace it."""
        other = None
        if not is_repair:
            try:
                other = record_of_teacher_shard(self.path)
            except FutureFormatError:
                raise
            except (UserError, FileNotFoundError):
                other = None
        same = ("fingerprint", "images_hash", "basis_hash", "num_samples")
        if other is not None and all(other[key] == record[key] for key in same):
            return other
        os.replace(self.temporary, self.path)
        fsync_dir(self.path.parent)
        return record

    def close(self) -> None:
        """Let go of the file; a temporary file that was not published is removed."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            try:
                os.close(fd)
            finally:
                self.temporary.unlink(missing_ok=True)


def _hash_of(fd: int) -> str:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        file.seek(0)
        return hash_file(file)


def adopt_teacher_shard(path: Path, spec: TeacherCacheSpec) -> dict:
    """Hash a doubtful shard and write its record when it is whole; returns the record.

    Raises:
        UserError: it is damaged, or of another configuration.
    """
    try:
        record = record_of_teacher_shard(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is gone.") from error
    if record["fingerprint"] != spec.fingerprint:
        raise UserError(f"{path}: is of another configuration.")
    write_atomic(record_path(path), record_text(record))
    return record
