"""The teacher pass: every image of a cache, in K views, through the teacher, into shards aligned with the images'.

    image shards (a thread reads ahead, checksums compared) -> teacher, TEACHER_BATCH images of one view at a time ->
    a thread writes the vectors to their places in the shard's temporary file -> hash, fsync, publish, record -> views

Which images share a forward pass depends on the shard alone: on one machine, a shard is a pure function of the
specification and its number. A pass that was killed goes on where it was, and ends with the same bytes.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor

from distillery.cache.archive import crc32
from distillery.cache.fields import frame_of, place_fields
from distillery.cache.store import (
    FORMAT_VERSION,
    FutureFormatError,
    RecordScan,
    encode_checksums,
    record_path,
    record_text,
)
from distillery.precompute.image_shard import is_being_made, remove_leftovers
from distillery.precompute.pipeline import CacheReport, explain_write_error
from distillery.reading.rows import ImageRows
from distillery.system.direct_io import reserve
from distillery.system.errors import RunError, UserError
from distillery.system.files import (
    create_temporary,
    fsync_dir,
    hash_file,
    make_directory,
    may_try_again,
    publish_no_clobber,
    pwrite_all,
    temporary_name,
    write_atomic,
)
from distillery.system.signals import StopFlag
from distillery.teacher_cache.identity import TeacherCacheSpec
from distillery.teacher_cache.outputs import FieldSums, LiveTeacher, encode_features, ensure_basis, valid_features
from distillery.teacher_cache.reader import load_basis, to_device
from distillery.teacher_cache.records import BASIS_NAME, TEACHER_SHARDS, encode_sums, mark_as_current
from distillery.teacher_cache.survey import (
    TeacherPlan,
    check_fingerprint,
    check_images,
    image_hashes,
    is_current,
    survey_teacher,
)

# a signal's grace: a shard that is nearly done is finished, a big one that has just begun is dropped
_GRACE_S = 15


@dataclass
class _Pass:
    """The shards of one call, and what has become of them."""

    plan: TeacherPlan
    teacher: LiveTeacher
    stop: StopFlag
    on_rows: Callable[[int, int], None]
    images: ImageRows
    repairs: set[int] = field(default_factory=set)
    made: set[int] = field(default_factory=set)
    found: set[int] = field(default_factory=set)
    basis: dict[str, Tensor] | None = None
    basis_hash: str | None = None
    _stop_seen: float | None = None

    def run(self, shards: Iterable[int], scan: RecordScan) -> None:
        """Make the shards in order until done or told to stop; one that another process makes is left for the end."""
        hashes = image_hashes(self.plan)
        later, deferred = deque(shards), set()
        while later and not self.stop.requested:
            shard_idx = later.popleft()
            if shard_idx not in self.repairs and self._is_published(shard_idx, hashes):
                self.found.add(shard_idx)
            elif shard_idx not in deferred and is_being_made(self.plan, shard_idx):
                deferred.add(shard_idx)
                later.append(shard_idx)
            elif self._make(shard_idx, hashes[shard_idx]):
                self.made.add(shard_idx)
                self.on_rows(0, len(self.made))
                scan.write_views(self.plan.images.num_rows)

    def _is_published(self, shard_idx: int, hashes: dict[int, str]) -> bool:
        path = self.plan.shard_path(shard_idx)
        try:
            record = TEACHER_SHARDS.read_record(record_path(path))
            is_whole = path.lstat().st_size == record["bytes"]
        except FutureFormatError:
            raise
        except (OSError, UserError):
            return False
        check_fingerprint(self.plan, record)
        return is_whole and is_current(self.plan, record, hashes, self.basis_hash)

    def _make(self, shard_idx: int, images_hash: str) -> bool:
        """Compute, write and publish a shard; False when the grace after a stop request ran out on the way."""
        s = self.images.position(self.plan.images.shard_path(shard_idx).name)
        start, stop = self.plan.rows_of(shard_idx)
        shard = OpenTeacherShard(
            self.plan.shard_path(shard_idx),
            self.plan.spec,
            shard_idx=shard_idx,
            global_start=start,
            num_rows=stop - start,
            images_hash=images_hash,
            basis_hash=self.basis_hash,
        )
        writing: Future | None = None
        sums = {name: FieldSums(width) for name, width in _sum_widths(self.plan.spec).items()}
        basis = to_device(self.basis, self.teacher.device)
        try:
            with ThreadPoolExecutor(1, thread_name_prefix="write-outputs") as pool:
                for first, images, valid in self.images.batches(s, stop - start):
                    encoded = self._outputs(images, valid, start + first, basis, sums)
                    if writing is not None:
                        writing.result()
                    writing = pool.submit(shard.write, first, encoded, valid.numpy())
                    self.on_rows(len(valid), len(self.made))
                    if self._grace_is_over():
                        return False
                writing.result()
            shard.publish(sums, is_repair=shard_idx in self.repairs)
        finally:
            shard.close()
        return True

    def _outputs(
        self, images: Tensor, valid: Tensor, start: int, basis: dict[str, Tensor] | None, sums: dict[str, FieldSums]
    ) -> dict[str, np.ndarray]:
        """All views of a batch as they are stored: field -> [n, K, ...]; adds them to the sums."""
        global_idx = torch.arange(start, start + len(images))
        images, views = images.to(self.teacher.device), []
        for view in range(self.plan.spec.num_views):
            features = self.teacher.features(images, global_idx, view)
            views.append(encode_features(features, self.plan.spec, basis))
            kept = valid_features(features, valid)
            for name, added in sums.items():
                added.add(kept.tensors()[name])
        return {name: torch.stack([one[name] for one in views], dim=1).cpu().numpy() for name in views[0]}

    def _grace_is_over(self) -> bool:
        if self._stop_seen is None and self.stop.requested:
            self._stop_seen = time.monotonic()
        return self._stop_seen is not None and time.monotonic() - self._stop_seen > _GRACE_S


def _sum_widths(spec: TeacherCacheSpec) -> dict[str, int]:
    widths = {"pooled": spec.resolved["pooled_width"], "tokens": spec.resolved["token_width"]}
    return {name: width for name, width in widths.items() if width is not None}


def make_teacher_cache(
    plan: TeacherPlan,
    teacher: LiveTeacher,
    *,
    shards: Iterable[int],
    stop: StopFlag,
    on_rows: Callable[[int, int], None] = lambda rows, shards_made: None,
) -> CacheReport:
    """Make the shards of a range that are missing; run again, it goes on where it was.

    Args:
        plan: what the outputs shall be; the images of the range must be there.
        teacher: the one that the plan's specification describes.
        shards: the shard numbers this call is to make (all, or an array task's share).
        stop: looked at between batches.
        on_rows: called with (images done just now, shards made so far).
    Raises:
        RunError: the disk is full or fails, the images cannot be read; what is published stays, the same command goes
            on.
        UserError: the folder cannot be written to, images are missing, or the outputs do not fit the dtype.
    """
    shards = list(shards)
    images, scan = ImageRows(plan.images.directory, plan.images.fingerprint), TEACHER_SHARDS.scan(plan.directory)
    work = _Pass(plan, teacher, stop, on_rows, images)
    messages, to_make, unchecked = [], shards, []
    try:
        make_directory(plan.directory)
        remove_leftovers(plan.directory, all_done=False)
        if plan.uses_basis:
            work.basis_hash = ensure_basis(plan, teacher, images)
            work.basis = load_basis(plan.directory / BASIS_NAME, work.basis_hash)
        survey = survey_teacher(plan, shards)
        to_make, unchecked = list(survey.missing), list(survey.doubtful)
        check_images(plan, [*to_make, *unchecked])
        for shard_idx in survey.missing:
            if not plan.shard_path(shard_idx).exists():
                record_path(plan.shard_path(shard_idx)).unlink(missing_ok=True)
        work.repairs |= {shard_idx for shard_idx in survey.missing if plan.shard_path(shard_idx).exists()}
        messages = _adopt(work, unchecked)
        to_make = sorted({*to_make, *work.repairs})
        _run_with_retries(work, to_make, scan)
        index = scan.write_views(plan.images.num_rows)
        remove_leftovers(plan.directory, all_done=bool(index and index["complete"]))
        mark_as_current(plan.directory)
    except UserError:
        raise
    except (OSError, RunError) as error:
        with contextlib.suppress(OSError, UserError):  # what was published is listed, if the disk still takes that
            scan.write_views(plan.images.num_rows)
        if isinstance(error, RunError):
            raise
        left = sorted({*to_make, *unchecked} - work.made - work.found)
        raise explain_write_error(plan, error, left, 1) from error
    left = len(set(to_make) - work.made - work.found) + len(unchecked)
    return CacheReport(len(work.made), len(survey.doubtful) - len(unchecked) - len(messages), left, messages)


def _adopt(work: _Pass, unchecked: list[int]) -> list[str]:
    """Hash the doubtful shards, taking each from `unchecked` when done; those that are bad join the repairs."""
    messages, hashes = [], image_hashes(work.plan)
    for shard_idx in list(unchecked):
        if work.stop.requested:
            break
        unchecked.remove(shard_idx)
        path = work.plan.shard_path(shard_idx)
        try:
            record = adopt_teacher_shard(path, work.plan.spec)
            if is_current(work.plan, record, hashes, work.basis_hash):
                start, stop = work.plan.rows_of(shard_idx)
                work.on_rows(stop - start, len(work.made))
                continue
            messages.append(f"{path}: is of other images than there are now. It is made again.")
        except UserError as error:
            if isinstance(error, FutureFormatError):
                raise
            messages.append(f"{error} It is made again.")
        record_path(path).unlink(missing_ok=True)
        work.repairs.add(shard_idx)
    return messages


def _run_with_retries(work: _Pass, to_make: list[int], scan: RecordScan) -> None:
    """Run the pass; after an I/O error the shards it hit are made once more, in new files."""
    failures: dict[int, int] = {}
    while True:
        left = [shard_idx for shard_idx in to_make if shard_idx not in work.made | work.found]
        if not left or work.stop.requested:
            return
        try:
            work.run(left, scan)
            return
        except UserError:
            raise
        except OSError as error:
            if not may_try_again(error, failures):
                raise


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
        for key, its_field in enumerate(self.fields):
            part = np.ascontiguousarray(values[its_field.name])
            if not valid.all():
                part[~valid] = 0
            data, checksums = memoryview(part).cast("B"), self.checksums[its_field.name]
            for i in range(len(part) * views):
                row = data[i * its_field.row_bytes : (i + 1) * its_field.row_bytes]
                checksums[first * views + i] = xxhash.xxh3_64_intdigest(row)
            self.crcs[key] = crc32(data, self.crcs[key])
            pwrite_all(self.fd, data, its_field.offset + first * views * its_field.row_bytes)
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
        for offset, piece in frame_of(self.fields, self.crcs, {"valid": self.valid}, json.dumps(meta, sort_keys=True)):
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
                other = TEACHER_SHARDS.record_of_shard(self.path)
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
        record = TEACHER_SHARDS.record_of_shard(path)
    except FileNotFoundError as error:
        raise UserError(f"{path}: is gone.") from error
    if record["fingerprint"] != spec.fingerprint:
        raise UserError(f"{path}: is of another configuration.")
    write_atomic(record_path(path), record_text(record))
    return record
