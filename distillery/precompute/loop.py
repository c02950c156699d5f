"""The loop that makes the shards of a folder, images or teacher outputs, despite interruptions and other writers.

    claim a shard -> wait out another writer -> accept what is there, or make it -> publish -> refresh the views

A shard is a pure function of the plan's identity and its number. Two writers of one shard write the same bytes, so
correctness needs no lock.
"""

import contextlib
import errno
import os
import re
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distillery.cache.lease_names import remove_leases
from distillery.cache.plan import ShardPlan, Survey
from distillery.cache.store import FORMAT_VERSION, FutureFormatError, record_path, record_text
from distillery.precompute.elastic import ElasticClaim
from distillery.system.console import format_bytes
from distillery.system.direct_io import reserve
from distillery.system.errors import RunError, UserError
from distillery.system.files import (
    NO_SPACE_ERRNOS,
    create_temporary,
    fsync_dir,
    is_locked,
    make_directory,
    may_try_again,
    publish_no_clobber,
    temporary_name,
    write_atomic,
)
from distillery.system.machine import free_bytes, is_network_file_system
from distillery.system.signals import StopFlag

# a signal's grace: a shard that is nearly done is finished, a big one that has just begun is dropped
_GRACE_S = 15
_DENIED_ERRNOS = {errno.EACCES, errno.EPERM, errno.EROFS}
_TEMPORARY = re.compile(
    r"\.((images|teacher)_\w+\.(pt|json)|(index|statistics|embeddings)\.json|token_basis\.pt|failures\.jsonl"
    r"|embeddings_\d+\.parquet)\.tmp-[0-9a-f]{12}"
)
_FOREIGN_TEMPORARY_S = 3600


@dataclass(frozen=True)
class MakingReport:
    """What a call did. shards_left: of the range it was given; messages: what was found bad."""

    shards_made: int
    shards_accepted: int
    shards_left: int
    messages: list[str]


class ShardLoop(ABC):
    """The shards of one call, and what becomes of them.

    left: shards neither there nor made yet; repairs: shards whose file was found bad and is to be replaced.

    Args:
        plan: what the folder shall be.
        shards: their numbers.
        stop: looked at between shards, and by `make`.
        on_rows: called with (rows done just now, shards=made so far, and what else `make` says).
        on_wait: where given, the call shares its shards by leases with any number of other processes, and returns when
            all are there; it is called with a line about those whom it waits for.
    """

    def __init__(
        self,
        plan: ShardPlan,
        shards: Iterable[int],
        *,
        stop: StopFlag,
        on_rows: Callable[..., None],
        on_wait: Callable[[str], None] | None = None,
    ) -> None:
        self.plan, self.stop, self._on_rows, self.num_threads = plan, stop, on_rows, 1
        self.elastic = None if on_wait is None else ElasticClaim(self, on_wait)
        self.scan = plan.kind.scan(plan.directory)
        self.left, self.repairs = set(shards), set()
        self.num_made = self.num_accepted = 0
        self.messages: list[str] = []
        # of a row on average, where something was measured
        self.row_bytes: float | None = None
        self._stop_seen: float | None = None
        self._views_cost_s = self._views_written = 0.0

    @abstractmethod
    def survey(self) -> Survey:
        """What the folder, which is there by now, holds of the shards."""

    @abstractmethod
    def why_outdated(self, record: dict) -> str | None:
        """Why a whole shard of this configuration is not the one wanted now; None: it is."""

    @abstractmethod
    def make(self, shards: list[int]) -> None:
        """Make the shards that `claim` gives of these, each published and then noted by `published`.

        Raises:
            OSError: the disk failed; called again, it begins the unfinished shards anew.
        """

    def run(self, num_threads: int) -> MakingReport:
        """Make the shards that are missing; run again, it goes on where it was. num_threads: for hashing shards.

        Raises:
            RunError: the disk is full or fails, or somebody removes shards; what is published stays, the same command
                goes on.
            UserError: the folder cannot be written to, or another job makes something else in it.
        """
        self.num_threads = max(1, num_threads)
        try:
            make_directory(self.plan.directory)
            remove_leftovers(self.plan.directory, all_done=False)
            survey = self.survey()
            self.left -= set(survey.done)
            names = set(os.listdir(self.plan.directory))
            for path in map(self.plan.shard_path, survey.missing):
                # a listing taken while others publish may show a record and miss its shard
                if path.name not in names and record_path(path).name in names and not os.path.lexists(path):
                    record_path(path).unlink(missing_ok=True)
            if self.elastic is None:
                self.check(survey.to_check)
            else:
                self.elastic.to_check = set(survey.to_check)
            self._make_with_retries()
            if self.elastic is not None:  # others need not wait for what is left until the views are written
                self.elastic.close()
            index = self.scan.write_views(self.plan.num_rows)
            is_complete = bool(index and index["complete"])
            remove_leftovers(self.plan.directory, all_done=is_complete)
            if self.elastic is not None and not self.left and not is_complete:
                raise RunError(
                    f"{self.plan.directory}: all shards had been made, but some were removed or replaced meanwhile. "
                    "See that nothing else changes the folder, then run the same command again."
                )
        except UserError:
            raise
        except (OSError, RunError) as error:
            with contextlib.suppress(OSError, UserError):  # what was published is listed, if the disk still takes that
                self.scan.write_views(self.plan.num_rows)
            if isinstance(error, RunError):
                raise
            raise explain_write_error(self.plan, error, self.left, self.row_bytes) from error
        finally:
            if self.elastic is not None:
                self.elastic.close()
        return MakingReport(self.num_made, self.num_accepted, len(self.left), self.messages)

    def claim(self, shards: Iterable[int]) -> Iterator[int]:
        """The shards that this process is to make now, until a stop is requested.

        One that another process is seen to be making is left for the end, and made if it still is not there by then:
        two jobs over one range share it, and neither waits for the other. An elastic call takes runs of shards by
        leases, whatever `shards` are.
        """
        if self.elastic is not None:
            yield from self.elastic.shards()
            return
        later, deferred = deque(shards), set()
        while later and not self.stop.requested:
            shard_idx = later.popleft()
            if self.is_published(shard_idx):  # by another process, or by this one just before a disk error
                self.left.discard(shard_idx)
                start, stop = self.plan.rows_of(shard_idx)
                self.on_rows(stop - start, shards=self.num_made)
            elif shard_idx not in deferred and is_being_made(self.plan.shard_path(shard_idx)):
                deferred.add(shard_idx)
                later.append(shard_idx)
            else:
                yield shard_idx

    def published(self, shard_idx: int, **state: object) -> None:
        """Count a shard that was made and list it in the views; state: for on_rows."""
        self.left.discard(shard_idx)
        self.num_made += 1
        writers = 1
        if self.elastic is not None:
            self.elastic.published(shard_idx)
            writers = self.elastic.num_workers
        self.on_rows(0, shards=self.num_made, **state)
        # after every shard, unless the index is so long that writing it would take more than a twentieth of the time
        # of one process
        if time.monotonic() - self._views_written >= 20 * writers * self._views_cost_s:
            began = time.monotonic()
            self.scan.write_views(self.plan.num_rows)
            self._views_written = time.monotonic()
            self._views_cost_s = self._views_written - began

    def on_rows(self, rows: int, **state: object) -> None:
        """Pass on that so many rows are done; state: as the caller's on_rows takes it."""
        if self.elastic is not None:
            self.elastic.leases.advance()
        self._on_rows(rows, **state)

    def grace_is_over(self) -> bool:
        """Whether a stop was requested so long ago that unfinished shards are dropped."""
        if self._stop_seen is None and self.stop.requested:
            self._stop_seen = time.monotonic()
        return self._stop_seen is not None and time.monotonic() - self._stop_seen > _GRACE_S

    def is_published(self, shard_idx: int) -> bool:
        """Whether the shard wanted stands under its name with its record by now.

        Raises:
            UserError: one of another configuration does.
        """
        path = self.plan.shard_path(shard_idx)
        try:
            record = self.plan.kind.read_record(record_path(path))
            is_whole = path.lstat().st_size == record["bytes"]
        except FutureFormatError:
            raise
        except (OSError, UserError):
            return False
        if record["fingerprint"] != self.plan.fingerprint:
            raise mixed_configurations(path)
        return is_whole and not self.why_outdated(record)

    def recorded(self) -> set[int]:
        """The shards of which the folder holds a readable record of the shard wanted."""
        records = self.scan.records()
        ours = [record for record in records if record["fingerprint"] == self.plan.fingerprint]
        return {record["shard_idx"] for record in ours if not self.why_outdated(record)}

    def check(self, to_check: list[int]) -> None:
        """Hash the shards that may have changed since their record; those that are bad join the repairs."""

        def look_at(shard_idx: int) -> tuple[bool, str | None]:
            return (False, None) if self.stop.requested else (True, self.accept_shard(shard_idx))

        with ThreadPoolExecutor(self.num_threads) as pool:
            for shard_idx, (is_checked, problem) in zip(to_check, pool.map(look_at, to_check), strict=True):
                if problem is not None:
                    self.messages.append(f"{problem} It is made again.")
                    self.repairs.add(shard_idx)
                elif is_checked:
                    self.left.discard(shard_idx)
                    self.num_accepted += 1
                    start, stop = self.plan.rows_of(shard_idx)
                    self.on_rows(stop - start, shards=0, limit="disk")

    def accept_shard(self, shard_idx: int) -> str | None:
        """Hash a shard and write its record when it is the one wanted; otherwise drop the record and say why."""
        path = self.plan.shard_path(shard_idx)
        try:
            record = self.plan.kind.record_of_shard(path)
            if record["fingerprint"] != self.plan.fingerprint:
                raise UserError(f"{path}: is of another configuration.")
            if reason := self.why_outdated(record):
                raise UserError(f"{path}: {reason}.")
        except (PermissionError, FutureFormatError):
            raise
        except (UserError, OSError) as error:
            record_path(path).unlink(missing_ok=True)
            return str(error)
        write_atomic(record_path(path), record_text(record))
        return None

    def _make_with_retries(self) -> None:
        """After an I/O error the shards it hit are made once more, from the data, in new files."""
        failures, num_made = {}, 0
        while self.left and not self.stop.requested:
            try:
                self.make(sorted(self.left))
                if self.elastic is None:
                    return
                self.elastic.wait()
            except UserError:
                raise
            except OSError as error:
                if self.num_made > num_made:  # it works on: this is another failure, maybe days after the last
                    failures, num_made = {}, self.num_made
                if not may_try_again(error, failures):
                    raise


class OpenShard:
    """A shard in the making: its temporary file, until it is whole and gets its name.

    Args:
        loop: that makes it.
        shard_idx: which of the plan's shards.
        num_bytes: that its rows will take in the file.
    """

    def __init__(self, loop: ShardLoop, shard_idx: int, num_bytes: int) -> None:
        self.loop, self.plan, self.shard_idx = loop, loop.plan, shard_idx
        self.start, stop = self.plan.rows_of(shard_idx)
        self.num_rows = stop - self.start
        self.path = self.plan.shard_path(shard_idx)
        self.temporary = temporary_name(self.path)
        self.fd = create_temporary(self.temporary)
        reserve(self.fd, num_bytes)

    def meta(self) -> dict:
        """All the record says except the file's own size and hash."""
        return {
            "format_version": FORMAT_VERSION,
            "shard_path": self.path.name,
            "shard_idx": self.shard_idx,
            "global_start": self.start,
            "num_samples": self.num_rows,
            "identity": self.plan.identity,
            "fingerprint": self.plan.fingerprint,
        }

    def publish_file(self, record: dict) -> None:
        """Make the complete file durable, give it its name, then write its record."""
        os.fsync(self.fd)
        if not publish_no_clobber(self.temporary, self.path):
            record = self._settle_with_other_file(record)
        write_atomic(record_path(self.path), record_text(record))
        self.close()

    def _settle_with_other_file(self, record: dict) -> dict:
        """Another file has the name: keep it when it is the shard wanted, else put ours in its place.

        Returns:
            The record of the one that stands there now.
        Raises:
            UserError: it is a whole shard of another configuration, made since this job began.
        """
        try:
            other = self.plan.kind.record_of_shard(self.path)
        except FutureFormatError:
            raise
        except (UserError, FileNotFoundError):
            other = None
        if other is not None and other["fingerprint"] == self.plan.fingerprint:
            if not self.loop.why_outdated(other):
                return other
        elif other is not None and self.shard_idx not in self.loop.repairs:
            raise mixed_configurations(self.path)
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


def mixed_configurations(path: Path) -> UserError:
    """Another job with another configuration has published a shard here."""
    return UserError(f"{path} was made by another job with another configuration just now; one of the two has to stop.")


def is_being_made(path: Path) -> bool:
    """Whether another living process is seen at work on a shard; where locks are not seen, nobody is."""
    prefix = f".{path.name}.tmp-"
    for entry in os.scandir(path.parent):
        if entry.name.startswith(prefix):
            try:
                if is_locked(Path(entry.path)):
                    return True
            except FileNotFoundError:
                continue
    return False


def remove_leftovers(directory: Path, *, all_done: bool) -> None:
    """Remove temporary files of writers that are gone; once nothing is left to make, of any writer, and all leases.

    A living writer whose file is taken away all the same (all is done, or its lock could not be seen from this node)
    finds its shard published by another, or makes it again.
    """
    if all_done:
        remove_leases(directory)
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


def explain_write_error(
    plan: ShardPlan, error: OSError, shards_left: Iterable[int], row_bytes: float | None = None
) -> Exception:
    """An error of the system, as what it means for the user; row_bytes: of a row, on average, None: as planned."""
    if error.errno in NO_SPACE_ERRNOS:
        return RunError(_no_space_message(plan, error, list(shards_left), row_bytes or plan.row_bytes))
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


def _no_space_message(plan: ShardPlan, error: OSError, shards_left: list[int], row_bytes: float) -> str:
    needed = round(sum(stop - start for start, stop in map(plan.rows_of, shards_left)) * row_bytes)
    what = {errno.EDQUOT: "the quota is used up", errno.EFBIG: "a file-size limit (ulimit -f) was reached"}
    about = "about " if plan.rows_vary else ""
    return (
        f"{plan.directory}: {what.get(error.errno, 'the disk is full')} ({os.strerror(error.errno)}). "
        f"{len(shards_left)} shards are left to make: {about}{needed} bytes ({format_bytes(needed)}) needed, "
        f"{free_bytes(plan.directory)} bytes ({format_bytes(free_bytes(plan.directory))}) free. "
        "Everything published is intact; make room and run the same command again."
    )
