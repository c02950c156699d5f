"""Stage 1's engine: rows of a source become shards, whatever interrupts it.

    source (main process, in order) -> units of batch_size encoded images -> decode workers, which write their rows
    straight into the shard's temporary file -> finisher thread: CRC, hash, fsync, publish, record -> index.json

No pixel crosses a process border except through the file it has to be written to anyway, so memory is bounded by the
encoded images in flight plus a few MiB per worker, whatever the shard size. A shard is a pure function of the plan's
identity and its number: any two writers of one shard write the same bytes, so nothing here needs a lock to be right.
"""

import contextlib
import errno
import fcntl
import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from distillery.decode import Unit, UnitResult, decode_pool, signals_blocked, write_unit
from distillery.files import (
    NO_SPACE_ERRNOS,
    format_bytes,
    free_bytes,
    fsync_dir,
    publish_no_clobber,
    temporary_name,
    write_atomic,
)
from distillery.plan import CachePlan, Survey, adopt_shard, record_text, remove_leftovers
from distillery.preprocess import (
    library_versions,
)
from distillery.process import RunError, StopFlag, UserError
from distillery.records import (
    FORMAT_VERSION,
    RecordScan,
    encode_checksums,
    record_of_shard,
    record_path,
    write_views,
)
from distillery.shard_format import PAYLOAD_OFFSET, finish_shard

# a signal's grace: a shard that is nearly done is finished, a big one that has just begun is dropped
_GRACE_S = 15


@dataclass(frozen=True)
class CacheReport:
    """What a call of make_cache did. shards_left: of the range it was given."""

    shards_made: int
    shards_adopted: int
    shards_left: int
    messages: list[str]


@dataclass
class _OpenShard:
    """A shard in the making: its temporary file and what the decode workers reported of its rows."""

    plan: CachePlan
    shard_idx: int
    labels: np.ndarray | None
    temporary: Path = field(init=False)
    fd: int = field(init=False)
    units_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.start, self.stop = self.plan.rows_of(self.shard_idx)
        self.num_rows = self.stop - self.start
        self.path = self.plan.shard_path(self.shard_idx)
        self.temporary = temporary_name(self.path)
        self.fd = os.open(self.temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with contextlib.suppress(OSError):  # the lock only marks the writer as alive; some file systems have none
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.checksums = np.zeros(self.num_rows, np.uint64)
        self.failures: list[tuple[int, str]] = []

    def note(self, result: UnitResult) -> None:
        self.checksums[result.first_row : result.first_row + len(result.checksums)] = result.checksums
        self.failures += result.failures
        self.units_left -= 1

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
            "libraries": library_versions(),
        }

    def publish(self) -> None:
        """Complete the file, make it durable, give it its name, then write its record."""
        meta = self.meta()
        valid = np.ones(self.num_rows, dtype=bool)
        valid[[row for row, _ in self.failures]] = False
        shape = (self.num_rows, *self.plan.image_shape)
        text = json.dumps(meta, sort_keys=True)
        size, digest = finish_shard(self.fd, self.plan.dtype, shape, valid, self.labels, text)
        os.fsync(self.fd)
        record = meta | {"bytes": size, "hash": digest}
        if not publish_no_clobber(self.temporary, self.path):
            record = self._settle_with_other_writer(record)
        write_atomic(record_path(self.path), record_text(record))
        self.close()

    def _settle_with_other_writer(self, record: dict) -> dict:
        """Another file has the name: keep it when it is a whole shard of the same rows, else put ours in its place."""
        try:
            other = record_of_shard(self.path)
            is_same_shard = (other["fingerprint"], other["num_samples"]) == (record["fingerprint"], self.num_rows)
        except (UserError, FileNotFoundError):
            is_same_shard = False
        if is_same_shard:
            return other
        os.replace(self.temporary, self.path)
        fsync_dir(self.path.parent)
        return record

    def close(self) -> None:
        """Let go of the file; a temporary file that was not published is removed."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self.temporary.unlink(missing_ok=True)


class _Pipeline:
    """Units in flight, shards being finished, and the time spent waiting for each."""

    def __init__(self, plan: CachePlan, source, batch_size: int, num_workers: int, on_rows: Callable, stop: StopFlag):
        self.plan, self.source, self.batch_size, self.stop = plan, source, batch_size, stop
        self.on_rows = on_rows
        self.scan = RecordScan(plan.directory)
        self.pool = decode_pool(num_workers)
        self.finisher = ThreadPoolExecutor(1, thread_name_prefix="finish-shard")
        self.max_units = num_workers + 2
        self.units: deque[tuple[Future, _OpenShard, int]] = deque()
        self.finishing: deque[tuple[Future, _OpenShard]] = deque()
        self.open_shards: list[_OpenShard] = []
        self.seconds = {"source": 0.0, "decode": 0.0, "disk": 0.0}
        self.made: set[int] = set()
        self._stop_seen: float | None = None
        self._views_cost_s = self._views_written = 0.0

    def run(self, shards: Iterable[int]) -> None:
        """Make the shards in order until done or told to stop."""
        for shard_idx in shards:
            if self.stop.requested:
                break
            if not self._feed(shard_idx):
                break
        while self.units and not self._grace_is_over():
            self._collect_unit()
        while self.finishing:
            self._collect_finished()

    def close(self) -> None:
        """End the workers and drop what is not published."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.finisher.shutdown(wait=True)
        for shard in self.open_shards:
            shard.close()

    def _feed(self, shard_idx: int) -> bool:
        """Submit a shard's units; False when the grace after a stop request ran out on the way."""
        start, stop = self.plan.rows_of(shard_idx)
        shard = _OpenShard(self.plan, shard_idx, self.source.labels(start, stop) if self.plan.labels else None)
        self.open_shards.append(shard)
        firsts = range(0, stop - start, self.batch_size)
        shard.units_left = len(firsts)
        for first in firsts:
            if self._grace_is_over():
                return False
            began = time.monotonic()
            images = self.source.read(start + first, min(stop, start + first + self.batch_size))
            self.seconds["source"] += time.monotonic() - began
            unit = Unit(str(shard.temporary), first, images, self.plan.spec, self.plan.dtype)
            while len(self.units) >= self.max_units:
                self._collect_unit()
            with signals_blocked():
                self.units.append((self.pool.submit(write_unit, unit), shard, len(images)))
        return True

    def _grace_is_over(self) -> bool:
        if self._stop_seen is None and self.stop.requested:
            self._stop_seen = time.monotonic()
        return self._stop_seen is not None and time.monotonic() - self._stop_seen > _GRACE_S

    def _collect_unit(self) -> None:
        future, shard, num_rows = self.units.popleft()
        began = time.monotonic()
        shard.note(future.result())
        self.seconds["decode"] += time.monotonic() - began
        self.on_rows(num_rows, self.limit(), len(self.made))
        if shard.units_left == 0:
            self.finishing.append((self.finisher.submit(shard.publish), shard))
            while len(self.finishing) > 2 or (self.finishing and self.finishing[0][0].done()):
                self._collect_finished()

    def _collect_finished(self) -> None:
        future, shard = self.finishing.popleft()
        began = time.monotonic()
        future.result()
        self.seconds["disk"] += time.monotonic() - began
        self.open_shards.remove(shard)
        self.made.add(shard.shard_idx)
        # after every shard, unless the index is so long that writing it would take more than a twentieth of the time
        if time.monotonic() - self._views_written >= 20 * self._views_cost_s:
            began = time.monotonic()
            write_views(self.plan.directory, self.scan, self.plan.num_rows)
            self._views_written = time.monotonic()
            self._views_cost_s = self._views_written - began

    def limit(self) -> str:
        """What the pipeline waits for most: 'source', 'cpu' or 'disk'."""
        slowest = max(self.seconds, key=self.seconds.get)
        return "cpu" if slowest == "decode" else slowest


def make_cache(
    plan: CachePlan,
    source,
    *,
    shards: Iterable[int],
    survey: Survey,
    batch_size: int,
    num_workers: int,
    stop: StopFlag,
    on_rows: Callable[[int, str, int], None] = lambda rows, limit, shards_made: None,
) -> CacheReport:
    """Make the shards of a range that `survey` found missing; run again, it goes on where it was.

    Args:
        plan: what the cache shall be.
        source: has read(start, stop) -> list[bytes] and labels(start, stop) -> int64 array or None.
        shards: the shard numbers this call is to make (all, or an array task's share).
        survey: of these shards, by survey_cache.
        batch_size: images per unit of work; changes no byte.
        num_workers: decode processes; 1 decodes in this process.
        stop: looked at between units.
        on_rows: called with (rows decoded just now, what limits the speed, shards made so far).

    Raises:
        RunError: the disk is full, or a worker died; what is published stays, the same command goes on.
    """
    plan.directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(plan.directory, all_done=False)
    messages, to_make = [], list(survey.missing)
    for shard_idx in survey.missing:
        if not plan.shard_path(shard_idx).exists():
            record_path(plan.shard_path(shard_idx)).unlink(missing_ok=True)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for shard_idx, problem in zip(
            survey.doubtful, pool.map(lambda idx: adopt_shard(plan, idx), survey.doubtful), strict=True
        ):
            if problem:
                messages.append(problem)
                to_make.append(shard_idx)
    adopted = len(survey.doubtful) - len(messages)
    made = _make_shards(plan, source, sorted(to_make), batch_size, num_workers, stop, on_rows)
    index = write_views(plan.directory, RecordScan(plan.directory), plan.num_rows)
    remove_leftovers(plan.directory, all_done=bool(index and index["complete"]))
    return CacheReport(len(made), adopted, len(to_make) - len(made), messages)


def _make_shards(plan, source, to_make, batch_size, num_workers, stop, on_rows) -> set[int]:
    """Run the pipeline; after one I/O error the shards it hit are made once more, from the data, in new files."""
    made: set[int] = set()
    for attempt in (1, 2):
        left = [shard_idx for shard_idx in to_make if shard_idx not in made]
        if not left or stop.requested:
            break
        pipeline = _Pipeline(
            plan, source, batch_size, min(num_workers, -(-len(left) * plan.shard_size // batch_size)), on_rows, stop
        )
        try:
            pipeline.run(left)
        except BrokenProcessPool as error:
            raise RunError(
                "a decode worker was killed, most likely by the system for want of memory. Everything published stays; "
                f"run the same command again with fewer workers (num_workers is {num_workers})."
            ) from error
        except OSError as error:
            if error.errno in NO_SPACE_ERRNOS:
                raise RunError(_no_space_message(plan, error, len(left) - len(pipeline.made))) from error
            # never fsync the same file again: after a failed fsync the kernel may call lost pages clean
            if error.errno not in {errno.EIO, errno.ENOENT, errno.ESTALE} or attempt == 2:
                raise
        finally:
            pipeline.close()
            made |= pipeline.made
    return made


def _no_space_message(plan: CachePlan, error: OSError, shards_left: int) -> str:
    needed = shards_left * plan.shard_size * plan.row_bytes
    what = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file-size limit (ulimit -f) was reached"}
    return (
        f"{plan.directory}: {what.get(error.errno, 'the disk is full')} ({os.strerror(error.errno)}). "
        f"{shards_left} shards are left to make: {needed} bytes ({format_bytes(needed)}) needed, "
        f"{free_bytes(plan.directory)} bytes ({format_bytes(free_bytes(plan.directory))}) free. "
        "Everything published is intact; make room and run the same command again."
    )
