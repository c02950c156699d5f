"""The engine of stage 1: it turns rows of a source into shards, and an interrupted pass can go on.

    source (main process, in order) -> units of encoded images, through shared memory -> decode workers -> rows, in the
    same memory -> disk thread: CRC, hash and write, past the page cache; fsync, publish, record -> index.json

A worker decodes a pixel into shared memory, and the disk thread writes it from there; no copy lies between. Rows of a
compressed cache are copied once more: what a page of the file begins with is known only then. The units in flight
therefore bound the memory that images take, whatever the shard size. The masks of a shard follow its images in the
file, so they are held until the shard is complete.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from distillery.cache.plan import CachePlan, Survey
from distillery.precompute.image_shard import OpenImageShard, gap_before
from distillery.precompute.loop import MakingReport, ShardLoop
from distillery.precompute.pool import WRITE_AHEAD, Work, decode_pool, split_into_units
from distillery.precompute.worker import Unit, UnitResult
from distillery.system.errors import RunError, UserError
from distillery.system.signals import StopFlag

# how many encoded images are read before the first are decoded, and how many bytes at a time from then on
_FIRST_ROWS, _READ_BYTES = 32, 16 << 20
# shards that may wait to be durable while the next are being made
PUBLISH_AHEAD = 2


def make_cache(
    plan: CachePlan,
    source,
    *,
    survey: Survey,
    batch_size: int,
    num_workers: int,
    stop: StopFlag,
    on_rows: Callable[..., None] = lambda rows, **state: None,
    on_wait: Callable[[str], None] | None = None,
) -> MakingReport:
    """Make the shards that `survey` found missing; run again, it goes on where it was.

    Args:
        plan: what the cache shall be.
        source: a sources.base.Source.
        survey: of the shards this call is to make (all, or an array task's share), by survey_cache.
        batch_size: images per unit of work at most (fewer of large files); changes no byte.
        num_workers: decode processes; 1 decodes in this process.
        stop: looked at between units.
        on_rows: called with (rows done just now, 0 for a shard published; shards=made so far; limit=what limits the
            speed).
        on_wait: as of ShardLoop: None for one job's share.

    Raises:
        RunError: the disk is full or fails, a worker died, the source cannot be read; what is published stays, the
            same command goes on.
        UserError: the folder cannot be written to, or another job makes another cache in it.
    """
    shards = [*survey.missing, *survey.to_check]
    options = {"stop": stop, "on_rows": on_rows, "on_wait": on_wait}
    loop = _ImageLoop(plan, shards, source, survey, batch_size, num_workers, **options)
    return loop.run(num_workers)


class _ImageLoop(ShardLoop):
    """Shards of images; arguments as ShardLoop and make_cache."""

    def __init__(
        self, plan: CachePlan, shards: list[int], source, survey: Survey, batch_size: int, num_workers: int, **options
    ) -> None:
        super().__init__(plan, shards, **options)
        self.source, self.surveyed, self.batch_size, self.num_workers = source, survey, batch_size, num_workers
        self.row_bytes = survey.row_bytes

    def survey(self) -> Survey:
        return self.surveyed

    def why_outdated(self, record: dict) -> str | None:
        return self.plan.why_outdated(record)

    def make(self, shards: list[int]) -> None:
        rows = sum(stop - start for start, stop in map(self.plan.rows_of, shards))
        workers = min(self.num_workers, -(-rows // min(self.batch_size, _FIRST_ROWS)))
        pipeline = _Pipeline(self, self.source, batch_size=self.batch_size, num_workers=workers)
        try:
            pipeline.run(shards)
        except BrokenProcessPool as error:
            raise RunError(
                "a decode worker was killed, most likely by the system for want of memory. Everything published stays; "
                f"run the same command again with fewer workers (num_workers is {self.num_workers})."
            ) from error
        finally:
            pipeline.close()


class _Pipeline:
    """Units in flight, rows being written, shards being finished, and the time spent waiting for each."""

    def __init__(self, loop: ShardLoop, source, *, batch_size: int, num_workers: int) -> None:
        self.loop, self.plan, self.source, self.batch_size = loop, loop.plan, source, batch_size
        self.num_workers, self.pool = num_workers, None
        self.rows_at_once = _FIRST_ROWS
        self.disk = ThreadPoolExecutor(1, thread_name_prefix="write-rows")
        # apart: an fsync may take seconds
        self.publisher = ThreadPoolExecutor(1, thread_name_prefix="publish-shards")
        # with the seconds that submitting took
        self.units: deque[tuple[Work, OpenImageShard, float]] = deque()
        self.writing: deque[tuple[Future, Work]] = deque()
        self.publishing: deque[tuple[Future, OpenImageShard]] = deque()
        self.open_shards: list[OpenImageShard] = []
        # what this process waited for
        self.seconds = {"source": 0.0, "cpu": 0.0, "disk": 0.0}
        # what the workers and the disk thread were at work for
        self.busy_seconds = {"decode": 0.0, "write": 0.0}
        self.began: float | None = None

    def run(self, shards: Iterable[int]) -> None:
        """Make the shards in order until done or a stop is requested."""
        for shard_idx in self.loop.claim(shards):
            if not self._feed(shard_idx):
                break
        while self.units and not self.loop.grace_is_over():
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
        shard = OpenImageShard(self.loop, shard_idx, labels, names)
        self.open_shards.append(shard)
        first = 0
        while first < stop - start:
            count = min(self.batch_size, self.rows_at_once, stop - start - first)
            images, masks = self._read_images(start + first, start + first + count)
            plan = self.plan
            if self.pool is None:
                self.pool = decode_pool(self.num_workers, plan, images)
            for part in split_into_units(images, plan.image_bytes):
                self._make_room()
                if self.loop.grace_is_over():
                    return False
                of_part, masks = masks[: len(part)], masks[len(part) :]
                self._submit(Unit(first, part, plan.spec, plan.dtype, of_part, plan.mask_dtype, plan.encoding), shard)
                first += len(part)
        return True

    def _make_room(self) -> None:
        """Collect what is done, then wait until one more unit may be submitted."""
        while self.writing and self.writing[0][0].done():
            self._collect_written()
        while len(self.units) >= self.pool.capacity:
            self._collect_unit()

    def _submit(self, unit: Unit, shard: OpenImageShard) -> None:
        began = time.monotonic()
        if self.began is None:
            self.began = began
        row_bytes = self.plan.image_bytes
        # where encoded rows come to lie in the file is known only when all before them are made
        work = self.pool.submit(unit, 0 if row_bytes is None else gap_before(unit.first_row * row_bytes))
        self.units.append((work, shard, time.monotonic() - began))

    def _read_images(self, start: int, stop: int) -> tuple[list[bytes | memoryview], list[bytes | memoryview]]:
        """(encoded images, encoded masks; none of these where the plan has none)."""
        began = time.monotonic()
        has_masks = self.plan.mask_dtype is not None
        with _source_errors(self.source):
            images = self.source.read_views(start, stop)
            masks = self.source.masks(start, stop) if has_masks else []
        if len(images) != stop - start or (has_masks and len(masks) != len(images)):
            raise RunError(f"{self.source.describe()}: gave {len(images)} images for the rows {start}..{stop - 1}.")
        # photographs of many MB are read a few at a time
        self.rows_at_once = max(1, _READ_BYTES * len(images) // max(1, sum(map(len, images))))
        if all(work.future.done() for work, _, _ in self.units):  # otherwise the workers had enough to do meanwhile
            self.seconds["source"] += time.monotonic() - began
        return images, masks

    def _read_labels(self, start: int, stop: int):
        with _source_errors(self.source):
            labels = self.source.labels(start, stop)
        if labels is None or len(labels) != stop - start:
            raise UserError(f"{self.source.describe()}: has no labels for the rows {start}..{stop - 1}.")
        return labels

    def _collect_unit(self) -> None:
        work, shard, waited = self.units.popleft()
        began = time.monotonic()
        result = work.future.result()
        self.seconds["cpu"] += waited + time.monotonic() - began
        self.busy_seconds["decode"] += result.seconds
        shard.note(result)
        # units are collected in order, so all rows before these are written
        written = self.disk.submit(self._write, shard, work.memory, result)
        self.writing.append((written, work))
        if not shard.rows_left:
            self.publishing.append((self.publisher.submit(self._publish, shard, written), shard))
        self.loop.on_rows(len(result.checksums), shards=self.loop.num_made, limit=self.limit())
        while len(self.writing) > WRITE_AHEAD:
            self._collect_written()
        while len(self.publishing) > PUBLISH_AHEAD or (self.publishing and self.publishing[0][0].done()):
            self._collect_published()

    def _write(self, shard: OpenImageShard, memory: memoryview, result: UnitResult) -> None:
        began = time.monotonic()
        if result.row_sizes is None:
            shard.payload.write(memory)
        else:
            shard.payload.append(result.encoded_rows(memory))
        self.busy_seconds["write"] += time.monotonic() - began

    @staticmethod
    def _publish(shard: OpenImageShard, written: Future) -> None:
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
        self.loop.published(shard.shard_idx, limit=self.limit())

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
