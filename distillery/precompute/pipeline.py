"""Stage 1's engine: rows of a source become shards, whatever interrupts it.

    source (main process, in order) -> units of encoded images, through shared memory -> decode workers -> rows, in the
    same memory -> disk thread: CRC, hash and write, past the page cache; fsync, publish, record -> index.json

A pixel is written to memory once, by the worker that decoded it, and goes to the disk from there, so memory is bounded
by the units in flight, whatever the shard size. A shard is a pure function of the plan's identity and its number: any
two writers of one shard write the same bytes, so nothing here needs a lock to be right.
"""

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.plan import CachePlan, Survey
from distillery.cache.store import RecordScan, record_path
from distillery.precompute.image_shard import (
    OpenShard,
    adopt_shard,
    gap_before,
    is_being_made,
    is_published,
    remove_leftovers,
)
from distillery.precompute.pool import WRITE_AHEAD, Work, decode_pool, split_into_units
from distillery.precompute.worker import Unit
from distillery.system.console import format_bytes
from distillery.system.errors import RunError, UserError
from distillery.system.files import NO_SPACE_ERRNOS, make_directory, may_try_again
from distillery.system.machine import free_bytes
from distillery.system.signals import StopFlag

# how many encoded images are read before the first are decoded, and how many bytes at a time from then on
_FIRST_ROWS, _READ_BYTES = 32, 16 << 20
# shards that may wait to be durable while the next are being made
_PUBLISH_AHEAD = 2
# a signal's grace: a shard that is nearly done is finished, a big one that has just begun is dropped
_GRACE_S = 15
_DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class CacheReport:
    """What a call of make_cache did. shards_left: of the range it was given; messages: what was found bad."""

    shards_made: int
    shards_adopted: int
    shards_left: int
    messages: list[str]


class _Pipeline:
    """Units in flight, rows being written, shards being finished, and the time spent waiting for each."""

    def __init__(
        self,
        plan: CachePlan,
        source,
        *,
        repairs: set[int],
        batch_size: int,
        num_workers: int,
        on_rows: Callable,
        stop: StopFlag,
        scan: RecordScan,
    ) -> None:
        self.plan, self.source, self.batch_size, self.stop = plan, source, batch_size, stop
        self.on_rows, self.scan, self.repairs = on_rows, scan, repairs
        self.num_workers, self.pool = num_workers, None
        self.rows_at_once = _FIRST_ROWS
        self.disk = ThreadPoolExecutor(1, thread_name_prefix="write-rows")
        # apart: an fsync may take seconds
        self.publisher = ThreadPoolExecutor(1, thread_name_prefix="publish-shards")
        # with the seconds that submitting took
        self.units: deque[tuple[Work, OpenShard, float]] = deque()
        self.writing: deque[tuple[Future, Work]] = deque()
        self.publishing: deque[tuple[Future, OpenShard]] = deque()
        self.open_shards: list[OpenShard] = []
        # what this process waited for
        self.seconds = {"source": 0.0, "cpu": 0.0, "disk": 0.0}
        # what the workers and the disk thread were at work for
        self.busy_seconds = {"decode": 0.0, "write": 0.0}
        self.began: float | None = None
        self.made: set[int] = set()
        self.found: set[int] = set()
        self._stop_seen: float | None = None
        self._views_cost_s = self._views_written = 0.0

    def run(self, shards: Iterable[int]) -> None:
        """Make the shards in order until done or told to stop.

        One that another process is seen to be making is left for the end, and made if it still is not there by then:
        two jobs over one range share it, and neither waits for the other.
        """
        later, deferred = deque(shards), set()
        while later and not self.stop.requested:
            shard_idx = later.popleft()
            if is_published(self.plan, shard_idx):
                self.found.add(shard_idx)
            elif shard_idx not in deferred and is_being_made(self.plan, shard_idx):
                deferred.add(shard_idx)
                later.append(shard_idx)
            elif not self._feed(shard_idx):
                break
        while self.units and not self._grace_is_over():
            self._collect_unit()
        while self.writing:
            self._collect_written()
        while self.publishing:
            self._collect_published()

    def close(self) -> None:
        """End the workers and drop what is not published."""
        for executor in (self.disk, self.publisher):
            executor.shutdown(wait=True, cancel_futures=True)
        # an error's traceback holds this object, and these the memory of the pool
        for waiting in (self.units, self.writing, self.publishing):
            waiting.clear()
        if self.pool is not None:
            self.pool.close()
        for shard in self.open_shards:
            with contextlib.suppress(OSError):  # an error of this file is reported by what wrote it
                shard.close()

    def _feed(self, shard_idx: int) -> bool:
        """Submit a shard's units; False when the grace after a stop request ran out on the way."""
        start, stop = self.plan.rows_of(shard_idx)
        labels, names = None, None
        if self.plan.labels:
            labels, names = self._read_labels(start, stop), self.source.class_names
        shard = OpenShard(self.plan, shard_idx, labels, class_names=names, is_repair=shard_idx in self.repairs)
        self.open_shards.append(shard)
        first = 0
        while first < stop - start:
            count = min(self.batch_size, self.rows_at_once, stop - start - first)
            images = self._read_images(start + first, start + first + count)
            if self.pool is None:
                self.pool = decode_pool(self.num_workers, self.plan.spec, self.plan.dtype, self.plan.row_bytes, images)
            for part in split_into_units(images, self.plan.row_bytes):
                self._make_room()
                if self._grace_is_over():
                    return False
                self._submit(Unit(first, part, self.plan.spec, self.plan.dtype), shard)
                first += len(part)
        return True

    def _make_room(self) -> None:
        """Collect what is done, then wait until one more unit may be submitted."""
        while self.writing and self.writing[0][0].done():
            self._collect_written()
        while len(self.units) >= self.pool.capacity:
            self._collect_unit()

    def _submit(self, unit: Unit, shard: OpenShard) -> None:
        began = time.monotonic()
        if self.began is None:
            self.began = began
        work = self.pool.submit(unit, gap_before(unit.first_row * self.plan.row_bytes))
        self.units.append((work, shard, time.monotonic() - began))

    def _read_images(self, start: int, stop: int) -> list[bytes | memoryview]:
        began = time.monotonic()
        with _source_errors(self.source):
            images = self.source.read_views(start, stop)
        if len(images) != stop - start:
            raise RunError(f"{self.source.describe()}: gave {len(images)} images for the rows {start}..{stop - 1}.")
        # photographs of many MB are read a few at a time
        self.rows_at_once = max(1, _READ_BYTES * len(images) // max(1, sum(map(len, images))))
        if all(work.future.done() for work, _, _ in self.units):  # otherwise the workers had enough to do meanwhile
            self.seconds["source"] += time.monotonic() - began
        return images

    def _read_labels(self, start: int, stop: int):
        with _source_errors(self.source):
            labels = self.source.labels(start, stop)
        if labels is None or len(labels) != stop - start:
            raise UserError(f"{self.source.describe()}: has no labels for the rows {start}..{stop - 1}.")
        return labels

    def _grace_is_over(self) -> bool:
        if self._stop_seen is None and self.stop.requested:
            self._stop_seen = time.monotonic()
        return self._stop_seen is not None and time.monotonic() - self._stop_seen > _GRACE_S

    def _collect_unit(self) -> None:
        work, shard, waited = self.units.popleft()
        began = time.monotonic()
        result = work.future.result()
        self.seconds["cpu"] += waited + time.monotonic() - began
        self.busy_seconds["decode"] += result.seconds
        shard.note(result)
        # units are collected in order, so all rows before these are written
        written = self.disk.submit(self._write, shard, work.memory)
        self.writing.append((written, work))
        if not shard.rows_left:
            self.publishing.append((self.publisher.submit(self._publish, shard, written), shard))
        self.on_rows(len(result.checksums), self.limit(), len(self.made))
        while len(self.writing) > WRITE_AHEAD:
            self._collect_written()
        while len(self.publishing) > _PUBLISH_AHEAD or (self.publishing and self.publishing[0][0].done()):
            self._collect_published()

    def _write(self, shard: OpenShard, memory: memoryview) -> None:
        began = time.monotonic()
        shard.payload.write(memory)
        self.busy_seconds["write"] += time.monotonic() - began

    @staticmethod
    def _publish(shard: OpenShard, written: Future) -> None:
        written.result()
        shard.publish()

    def _collect_written(self) -> None:
        future, work = self.writing.popleft()
        began = time.monotonic()
        future.result()
        self.seconds["disk"] += time.monotonic() - began
        self.pool.release(work)

    def _collect_published(self) -> None:
        future, shard = self.publishing.popleft()
        began = time.monotonic()
        future.result()
        self.seconds["disk"] += time.monotonic() - began
        self.open_shards.remove(shard)
        self.made.add(shard.shard_idx)
        self.on_rows(0, self.limit(), len(self.made))
        # after every shard, unless the index is so long that writing it would take more than a twentieth of the time
        if time.monotonic() - self._views_written >= 20 * self._views_cost_s:
            began = time.monotonic()
            self.scan.write_views(self.plan.num_rows)
            self._views_written = time.monotonic()
            self._views_cost_s = self._views_written - began

    def limit(self) -> str:
        """What the pipeline waits for most, 'source', 'cpu' or 'disk', and how busy the workers and the disk are."""
        elapsed = max(time.monotonic() - self.began, 1e-9)
        decode = min(1.0, self.busy_seconds["decode"] / elapsed / self.num_workers)
        write = min(1.0, self.busy_seconds["write"] / elapsed)
        return f"{max(self.seconds, key=self.seconds.get)} (decoding {decode:.0%}, writing {write:.0%} of the time)"


@contextlib.contextmanager
def _source_errors(source):
    """An I/O error of the source is not one of the cache folder."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise RunError(
            f"{source.describe()}: cannot be read: {error}. Everything published stays; run the same command again."
        ) from error


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
        source: a sources_base.Source.
        shards: the shard numbers this call is to make (all, or an array task's share).
        survey: of these shards, by survey_cache.
        batch_size: images per unit of work at most (fewer of large files); changes no byte.
        num_workers: decode processes; 1 decodes in this process.
        stop: looked at between units.
        on_rows: called with (rows done just now, 0 for a shard published; what limits the speed; shards made so far).

    Raises:
        RunError: the disk is full or fails, a worker died, the source cannot be read; what is published stays, the
            same command goes on.
        UserError: the folder cannot be written to, or another job makes another cache in it.
    """
    scan = IMAGE_SHARDS.scan(plan.directory)
    messages, to_make, unchecked = [], list(survey.missing), list(survey.doubtful)
    made: set[int] = set()
    found: set[int] = set()
    try:
        make_directory(plan.directory)
        remove_leftovers(plan.directory, all_done=False)
        for shard_idx in survey.missing:
            if not plan.shard_path(shard_idx).exists():
                record_path(plan.shard_path(shard_idx)).unlink(missing_ok=True)
        repairs = _adopt_shards(plan, unchecked, messages, num_workers, stop, on_rows)
        to_make = sorted({*to_make, *repairs})
        _make_shards(
            plan, source, to_make, made, found,
            repairs=repairs, batch_size=batch_size, num_workers=num_workers, on_rows=on_rows, stop=stop, scan=scan,
        )  # fmt: skip
        index = scan.write_views(plan.num_rows)
        remove_leftovers(plan.directory, all_done=bool(index and index["complete"]))
    except UserError:
        raise
    except (OSError, RunError, BrokenProcessPool) as error:
        with contextlib.suppress(OSError, UserError):  # what was published is listed, if the disk still takes that
            scan.write_views(plan.num_rows)
        if isinstance(error, RunError):
            raise
        raise explain_write_error(plan, error, sorted({*to_make, *unchecked} - made - found), num_workers) from error
    left = len(to_make) - len(made) - len(found) + len(unchecked)
    return CacheReport(len(made), len(survey.doubtful) - len(unchecked) - len(messages), left, messages)


def _adopt_shards(plan, unchecked: list[int], messages: list[str], num_workers, stop, on_rows) -> set[int]:
    """Hash the doubtful shards, taking each from `unchecked` when done; returns those that are bad."""
    bad = set()
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        running = {idx: pool.submit(lambda idx=idx: None if stop.requested else [adopt_shard(plan, idx)])
                   for idx in list(unchecked)}  # fmt: skip
        for shard_idx, future in running.items():
            if (answer := future.result()) is None:
                continue
            unchecked.remove(shard_idx)
            if answer[0] is not None:
                messages.append(answer[0])
                bad.add(shard_idx)
            else:
                start, end = plan.rows_of(shard_idx)
                on_rows(end - start, "disk", 0)
    return bad


def _make_shards(plan, source, to_make, made: set, found: set, *, num_workers, batch_size, stop, **options) -> None:
    """Run the pipeline; after an I/O error the shards it hit are made once more, from the data, in new files.

    made, found: grow by the shards this process published, and by those another did meanwhile.
    """
    failures: dict[int, int] = {}
    while True:
        left = [shard_idx for shard_idx in to_make if shard_idx not in made | found]
        if not left or stop.requested:
            return
        rows = sum(stop - start for start, stop in map(plan.rows_of, left))
        workers = min(num_workers, -(-rows // min(batch_size, _FIRST_ROWS)))
        pipeline = _Pipeline(plan, source, batch_size=batch_size, num_workers=workers, stop=stop, **options)
        try:
            pipeline.run(left)
            return
        except UserError:
            raise
        except OSError as error:
            if not may_try_again(error, failures):
                raise
        finally:
            pipeline.close()
            made |= pipeline.made
            found |= pipeline.found


def explain_write_error(plan: CachePlan, error: Exception, shards_left: list[int], num_workers: int) -> Exception:
    """An error of the system, as what it means for the user."""
    if isinstance(error, BrokenProcessPool):
        return RunError(
            "a decode worker was killed, most likely by the system for want of memory. Everything published stays; "
            f"run the same command again with fewer workers (num_workers is {num_workers})."
        )
    if error.errno in NO_SPACE_ERRNOS:
        return RunError(_no_space_message(plan, error, shards_left))
    reason = f"{error.filename or plan.directory}: {os.strerror(error.errno) if error.errno else error}"
    if error.errno in _DENIED_ERRNOS:
        return UserError(
            f"the cache folder {plan.directory} cannot be written to ({reason}). Training reads it as it is; to go on "
            "making it, have its permissions changed, or give another cache_dir."
        )
    return RunError(
        f"{reason} (error {error.errno}) while writing the cache. Nothing doubtful was published; everything published "
        "stays. When the storage works again, run the same command again."
    )


def _no_space_message(plan: CachePlan, error: OSError, shards_left: list[int]) -> str:
    needed = sum(stop - start for start, stop in map(plan.rows_of, shards_left)) * plan.row_bytes
    what = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file-size limit (ulimit -f) was reached"}
    return (
        f"{plan.directory}: {what.get(error.errno, 'the disk is full')} ({os.strerror(error.errno)}). "
        f"{len(shards_left)} shards are left to make: {needed} bytes ({format_bytes(needed)}) needed, "
        f"{free_bytes(plan.directory)} bytes ({format_bytes(free_bytes(plan.directory))}) free. "
        "Everything published is intact; make room and run the same command again."
    )
