"""One shard's way to its name: a temporary file, its publication, its record; and what dead writers leave behind."""

import errno
import json
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xxhash

from distillery.cache.archive import PAYLOAD_OFFSET, crc32, payload_header
from distillery.cache.fields import frame_of, place_fields
from distillery.cache.images import IMAGE_SHARDS, encode_sizes, small_tensors
from distillery.cache.plan import CachePlan
from distillery.cache.store import FORMAT_VERSION, FutureFormatError, encode_checksums, record_path, record_text
from distillery.precompute.worker import UnitResult
from distillery.sources.pixels import library_versions
from distillery.system.direct_io import ALIGNMENT_BYTES, bypass_page_cache, drop_written, reserve, start_writeback
from distillery.system.errors import UserError
from distillery.system.files import (
    create_temporary,
    fsync_dir,
    is_locked,
    publish_no_clobber,
    pwrite_all,
    temporary_name,
    write_atomic,
)
from distillery.system.machine import is_network_file_system

_TEMPORARY = re.compile(
    r"\.((images|teacher)_\w+\.(pt|json)|(index|statistics)\.json|token_basis\.pt|failures\.jsonl)\.tmp-[0-9a-f]{12}"
)
_FOREIGN_TEMPORARY_S = 3600
# small enough for a core's cache: the bytes are fetched once and looked at twice
_DIGEST_BYTES = 512 << 10
# so far behind the newest bytes those lie that the disk has taken by now
_WRITEBACK_BYTES = 64 << 20


class OpenShard:
    """A shard in the making: its temporary file and what the decode workers reported of its rows.

    Args:
        plan: what the cache shall be.
        shard_idx: which of its shards.
        labels: int64 [N] or None.
        class_names: the classes by label, where the source knows them.
        is_repair: whatever stands under the shard's name was found bad, and is to be replaced.
    """

    def __init__(
        self,
        plan: CachePlan,
        shard_idx: int,
        labels: np.ndarray | None,
        *,
        class_names: Sequence[str] | None = None,
        is_repair: bool,
    ) -> None:
        self.plan, self.shard_idx, self.labels, self.is_repair = plan, shard_idx, labels, is_repair
        self.class_names = _names_of(labels, class_names)
        self.start, stop = plan.rows_of(shard_idx)
        self.num_rows = stop - self.start
        self.rows_left = self.num_rows
        self.checksums = np.zeros(self.num_rows, np.uint64)
        self.source_sizes = np.zeros((self.num_rows, 2), np.uint32)
        self.failures: list[tuple[int, str]] = []
        self.path = plan.shard_path(shard_idx)
        self.temporary = temporary_name(self.path)
        self.fd = create_temporary(self.temporary)
        reserve(self.fd, PAYLOAD_OFFSET + self.num_rows * plan.row_bytes)
        self.payload = PayloadWriter(self.fd, is_direct=not is_network_file_system(self.path))

    def note(self, result: UnitResult) -> None:
        """Take in what a decode worker says of its rows."""
        rows = slice(result.first_row, result.first_row + len(result.checksums))
        self.checksums[rows], self.source_sizes[rows] = result.checksums, result.source_sizes
        self.failures += result.failures
        self.rows_left -= len(result.checksums)

    def meta(self) -> dict:
        """All the record says except the file's own size and hash."""
        failures = [
            {"global_idx": self.start + row, "shard_idx": self.shard_idx, "reason": reason}
            for row, reason in sorted(self.failures)
        ]
        return {
            "format_version": FORMAT_VERSION,
            "shard_path": self.path.name,
            "shard_idx": self.shard_idx,
            "global_start": self.start,
            "num_samples": self.num_rows,
            "num_failed": len(failures),
            "failures": failures,
            "source_num_samples": self.plan.source_num_samples,
            "identity": self.plan.identity,
            "fingerprint": self.plan.fingerprint,
            "dtype": self.plan.dtype,
            "image_shape": list(self.plan.image_shape),
            "payload_offset": PAYLOAD_OFFSET,
            "row_checksums": encode_checksums(self.checksums),
            "source_sizes": encode_sizes(self.source_sizes),
            "libraries": library_versions(),
            **({"class_names": self.class_names} if self.class_names else {}),
        }

    def publish(self) -> None:
        """Complete the file, make it durable, give it its name, then write its record."""
        meta = self.meta()
        valid = np.ones(self.num_rows, dtype=bool)
        valid[[row for row, _ in self.failures]] = False
        shape = (self.num_rows, *self.plan.image_shape)
        text = json.dumps(meta, sort_keys=True)
        size, digest = self.payload.finish(self.plan.dtype, shape, valid, self.labels, text)
        os.fsync(self.fd)
        record = meta | {"bytes": size, "hash": digest}
        if not publish_no_clobber(self.temporary, self.path):
            record = self._settle_with_other_file(record)
        write_atomic(record_path(self.path), record_text(record))
        self.close()

    def _settle_with_other_file(self, record: dict) -> dict:
        """Another file has the name: keep it when it is a whole shard of at least our rows, else put ours in its place.

        Raises:
            UserError: it is a whole shard of another configuration, made since this job began.
        """
        try:
            other = IMAGE_SHARDS.record_of_shard(self.path)
        except FutureFormatError:
            raise
        except (UserError, FileNotFoundError):
            other = None
        if other is not None and other["fingerprint"] == record["fingerprint"]:
            if other["num_samples"] >= self.num_rows:
                return other
        elif other is not None and not self.is_repair:
            raise UserError(
                f"{self.path} was made by another job with another configuration just now; one has to stop."
            )
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


def _names_of(labels: np.ndarray | None, class_names: Sequence[str] | None) -> dict[str, str]:
    """label -> name of the classes that a shard holds; JSON has only texts as keys."""
    if labels is None or class_names is None:
        return {}
    return {str(number): class_names[number] for number in np.unique(labels).tolist() if 0 <= number < len(class_names)}


def is_published(plan: CachePlan, shard_idx: int) -> bool:
    """Whether a whole shard with its record stands under the name by now.

    Raises:
        UserError: one of another configuration does.
    """
    path = plan.shard_path(shard_idx)
    start, stop = plan.rows_of(shard_idx)
    try:
        record = IMAGE_SHARDS.read_record(record_path(path))
        size = path.lstat().st_size
    except FutureFormatError:
        raise
    except (OSError, UserError):
        return False
    if record["fingerprint"] != plan.fingerprint:
        raise _mixed(path)
    return record["num_samples"] >= stop - start and size == record["bytes"]


def _mixed(path: Path) -> UserError:
    return UserError(f"{path} was made by another job with another configuration just now; one of the two has to stop.")


def is_being_made(plan: CachePlan, shard_idx: int) -> bool:
    """Whether another living process is seen at work on a shard; where locks are not seen, nobody is."""
    prefix = f".{plan.shard_path(shard_idx).name}.tmp-"
    for entry in os.scandir(plan.directory):
        if entry.name.startswith(prefix):
            try:
                if is_locked(Path(entry.path)):
                    return True
            except FileNotFoundError:
                continue
    return False


def adopt_shard(plan: CachePlan, shard_idx: int) -> str | None:
    """Hash a doubtful shard and write its record when it is whole; otherwise drop the record and say why."""
    path = plan.shard_path(shard_idx)
    start, stop = plan.rows_of(shard_idx)
    try:
        record = IMAGE_SHARDS.record_of_shard(path)
        if record["identity"] != plan.identity:
            raise UserError(f"{path}: is of another configuration.")
        if record["num_samples"] < stop - start:
            raise UserError(f"{path}: holds the first {record['num_samples']} of {stop - start} rows.")
    except (PermissionError, FutureFormatError):
        raise
    except (UserError, OSError) as error:
        record_path(path).unlink(missing_ok=True)
        return f"{error} It is made again."
    write_atomic(record_path(path), record_text(record))
    return None


def remove_leftovers(directory: Path, *, all_done: bool) -> None:
    """Remove temporary files of writers that are gone; of any writer once nothing is left to make.

    A living writer whose file is taken away all the same (all is done, or its lock could not be seen from this node)
    finds its shard published by another, or makes it again.
    """
    # a lock taken on another node of a network file system may be invisible here
    sees_all_locks = not is_network_file_system(directory)
    for entry in os.scandir(directory):
        if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
            continue
        path = Path(entry.path)
        try:
            locked = is_locked(path)
            is_dead = locked is False and sees_all_locks
            is_old = locked is not True and time.time() - path.lstat().st_mtime > _FOREIGN_TEMPORARY_S
            if is_dead or is_old or all_done:
                path.unlink()
        except OSError:  # gone already, another user's, or a read-only file system: no reason to stop
            continue


def gap_before(payload_position: int) -> int:
    """How many bytes from a page's beginning the payload's byte number `payload_position` lies in the file."""
    return (PAYLOAD_OFFSET + payload_position) % ALIGNMENT_BYTES


class PayloadWriter:
    """Writes a shard's file, and takes the CRC-32 of its payload and the hash of the file from memory meanwhile.

    Whole pages are written past the page cache where the file system can: a copy there costs as much as storing the
    image, and pushes out what others need. What is less than a page waits for the bytes that follow it.

    Args:
        fd: an empty file, open for writing.
        is_direct: False on network file systems, which answer each such write only when the server has it.
    """

    def __init__(self, fd: int, *, is_direct: bool = True) -> None:
        self._fd, self._rest, self._position = fd, payload_header(), 0
        self._file_hash, self._crc = xxhash.xxh3_128(self._rest), 0
        self._is_direct = is_direct and bypass_page_cache(fd, True)
        self._error: OSError | None = None

    def write(self, memory: memoryview) -> None:
        """Take in the next bytes of the payload.

        Args:
            memory: writable, the beginning of a page of memory; its first gap_before(position) bytes are used here, the
                payload follows.

        Raises:
            OSError: it could not be written; the file is of no use any more.
        """
        self._check_no_error()
        gap = len(self._rest)
        for start in range(gap, len(memory), _DIGEST_BYTES):
            piece = memory[start : start + _DIGEST_BYTES]
            self._crc = crc32(piece, self._crc)
            self._file_hash.update(piece)
        memory[:gap] = self._rest
        whole = len(memory) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        try:
            self._put(memory[:whole])
        except OSError as error:
            self._error = error
            raise
        self._rest = bytes(memory[whole:])
        self._position += whole

    def _check_no_error(self) -> None:
        """Bytes that could not be written are missing in this file for good: nothing may follow them."""
        if self._error is not None:
            raise self._error

    def _put(self, pages: memoryview) -> None:
        if self._is_direct:
            try:
                pwrite_all(self._fd, pages, self._position)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # it wants larger pages, or wrote a part of one: all of it once more
                self._is_direct = bypass_page_cache(self._fd, False)
        pwrite_all(self._fd, pages, self._position)
        start_writeback(self._fd, self._position, len(pages))
        drop_written(self._fd, self._position - _WRITEBACK_BYTES)

    def finish(
        self, dtype: str, shape: tuple[int, ...], valid: np.ndarray, labels: np.ndarray | None, meta: str
    ) -> tuple[int, str]:
        """Write what follows the payload, which is `shape` rows of `dtype`. Does not fsync.

        Returns:
            (size of the file in bytes, its hash "xxh3_128:<hex>").

        Raises:
            OSError: another program truncated the file meanwhile.
        """
        self._check_no_error()
        (field,) = place_fields({"images": (dtype, shape)}, row_dims=1)
        end = field.end
        assert self._position + len(self._rest) == end, f"{self._position + len(self._rest)} bytes instead of {end}"
        if (size := os.fstat(self._fd).st_size) < self._position:
            raise OSError(errno.EIO, f"the file ends at byte {size} of {self._position}: another program truncated it")
        bypass_page_cache(self._fd, False)
        _, (_, tail) = frame_of([field], [self._crc], small_tensors(valid, labels), meta)
        self._file_hash.update(tail)
        pwrite_all(self._fd, self._rest + tail, self._position)
        os.ftruncate(self._fd, end + len(tail))
        return end + len(tail), f"xxh3_128:{self._file_hash.hexdigest()}"
