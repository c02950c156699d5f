"""Copies of the shards in use on the node's own disk (`stage_dir`), made ahead of use by a thread.

A copy is a whole file, read from beginning to end: a network file system gives that at its full speed, and gives random
runs of a few rows slowly. While an epoch is read, the thread copies its shards in the order in which the epoch first
needs them, but for those of which it has read more than half already; then those of the next epoch, as far as there is
room (`stage_gb`). Readers take a shard's copy where there is one, else the cache's own file. The bytes are the same, so
order, checks, resume and results do not change.

A copy stays as long as its room is not needed. One that neither the rest of this epoch nor the next epoch needs goes
first; then those of the next epoch, when this one lacks room. An epoch never takes room from its own copies: where its
shards are more than the room, those that come first stay, and the others are read from the cache. So a cache that fits
into the room is copied once.

All processes of a node share the copies, whatever run they belong to; one of them makes them (copies.py beside this
file). The last process that leaves the folder removes it: at the normal end, after a signal that lets the run save, and
after an error. A killed process leaves its copies to the next run on this node, which hashes them before it uses them,
or removes them where it reads another cache.

Trouble with the stage disk is one line on stderr and no error. With ENOSPC the copies that are there stay in use, and
copying is tried again a minute later; after any other error of the disk, or when the folder is gone, nothing more is
copied. A shard whose record is lost or damaged is not copied, as its hash is not known: that is such a line too. When
the shard itself cannot be read, the thread says nothing: whoever needs these rows meets the same error and reports it.

Staged are the shards of a run's own list, for PretrainingLoader. Data sets for a DataLoader and the stored outputs of a
teacher are read where they are; caches in the predecessor's format have no hashes, and are not staged.
"""

import itertools
import os
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from distillery.cache.index import CacheIndex
from distillery.reading.copies import CopyFolder, SourceError
from distillery.reading.order import Sampling
from distillery.reading.shard_files import ShardFiles
from distillery.system.console import format_bytes, format_duration
from distillery.system.direct_io import drop_written
from distillery.system.errors import UserError
from distillery.system.files import CHUNK_BYTES, NO_SPACE_ERRNOS, expand_path
from distillery.system.machine import free_bytes

_SHARE_OF_FREE = 0.9
_LOOK_S = 1.0  # how often to look whether there is something to copy, or a place as the copier
_LAST_BLOCK_S = 1.0
_FULL_DISK_S = 60.0  # how long nothing is copied after ENOSPC
_SHARE_OF_TIME, _MOST_S = 0.05, 10.0  # the thread's, for looks that find nothing to copy; the longest pause between two
_AHEAD = 8  # copies for which room is made at a time
_TIMED_BYTES, _TIMED_S = 256 << 20, 1.0
_FEW_ROWS = 0.5  # of the staged bytes: from here on an epoch reads too little of its shards


class Staging:
    """The copies for one loader: a thread that makes them, or leaves it to the process that does.

    room: bytes that the copies of this cache may take on this node, all processes together.

    Args:
        files: the shards as the loader reads them; it takes the copies from the first move_to() on.
        sampling: the order of the epochs.
        stage_dir: the folder for copies, as stage_path() gives it.
        stage_gb: the limit of all copies of this cache on this node, in 10^9 bytes; None: see room_in().
        num_epochs: of the run: nothing is copied for later ones.
        may_copy: whether this process may be the one that copies; one of a run's processes on a node is enough.
    Raises:
        OSError: the disk of stage_dir cannot be read.
    """

    def __init__(
        self,
        files: ShardFiles,
        sampling: Sampling,
        stage_dir: Path,
        *,
        stage_gb: float | None,
        num_epochs: int,
        may_copy: bool = True,
    ) -> None:
        self.files, self.stage_gb, self.num_epochs, self.may_copy = files, stage_gb, num_epochs, may_copy
        self.room = room_in(stage_dir, files.index, stage_gb)
        self.folder = CopyFolder(stage_dir, files.index)
        # its draws keep a position: the loader's own are used by another thread
        self._sampling = replace(sampling)
        self._spans: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}
        self._position = (-1, 0)
        self._unreadable: set[int] = set()
        self._full_until, self._pause_s = 0.0, _LOOK_S
        self._checked_in = -1  # the epoch in which the copies were last found to be there
        self._moved, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def move_to(self, epoch: int, samples: int) -> None:
        """Say that the loader stands behind the first `samples` rows of an epoch; the first call starts the thread."""
        is_new_epoch, self._position = epoch != self._position[0], (epoch, samples)
        if self._thread is None and not self._ended.is_set():
            self._thread = threading.Thread(target=self._work, name="stage-shards", daemon=True)
            self._thread.start()
        elif is_new_epoch:
            self._moved.set()

    def close(self) -> None:
        """End the thread and leave the folder; later reads take the cache's own files. Does nothing in a fork."""
        if os.getpid() != self._pid or self._ended.is_set():
            return
        self._ended.set()
        self._moved.set()
        if self._thread is not None:
            self._thread.join(_LAST_BLOCK_S)  # a read that a dead disk does not answer is left to itself
        self.files.copies = None
        self.folder.leave()
        self.files.close_removed_copies()

    def close_with(self, owner: object) -> None:
        """Close when the owner is gone, or the interpreter ends."""
        weakref.finalize(owner, self.close)

    def _goes_on(self) -> bool:
        return not self._ended.is_set()

    def _work(self) -> None:
        try:
            self.folder.enter()
            if not self._goes_on():  # close() did not wait for the end of that
                self.folder.leave()
                return
            self.files.copies = self.folder
            # what other runs left is removed by now
            self.room = room_in(self.folder.path.parent, self.files.index, self.stage_gb)
            while self._goes_on():
                self.files.close_removed_copies()
                is_copier = self.may_copy and self.folder.become_copier(self._goes_on)
                if not is_copier or not self._copy_next():
                    self._moved.wait(self._pause_s)
                    self._moved.clear()
        except OSError as error:
            if self._goes_on() and self.may_copy:
                self.folder.say(f"{error.filename or self.folder.path}: {os.strerror(error.errno or 0)}")

    def _copy_next(self) -> bool:
        """Copy the shard that is needed next; False where there is none to copy, or no room."""
        if time.monotonic() < self._full_until:
            return False
        for shard in self.folder.rejected & self.folder.held.keys():
            self.folder.remove(shard)
        epoch = self._position[0]
        if epoch != self._checked_in:
            self._checked_in = epoch
            self.folder.forget_lost()
        shard = self._make_room()
        self.files.close_removed_copies()
        if shard is None:
            return False
        try:
            self.folder.copy(shard, self._goes_on)
        except SourceError:
            self._unreadable.add(shard)
        except OSError as error:
            if error.errno not in NO_SPACE_ERRNOS:
                raise
            self._full_until = time.monotonic() + _FULL_DISK_S
            held = format_bytes(sum(self.folder.held.values()))
            self.folder.say(
                f"{self.folder.path}: {os.strerror(error.errno)} for more than {held}; copying is tried again every "
                f"{_FULL_DISK_S:g} s"
            )
            return False
        return True

    def _make_room(self) -> int | None:
        """Remove copies that others need the room of; the shard to copy now, None where there is none, or no room yet.

        Other processes look once in _LOOK_S whether a copy that they have open was removed. Until they have looked, its
        bytes count as taken. So room is made for several copies at a time: not each of them shall wait for that.
        """
        began = time.thread_time()
        now, later = self._needed()
        folder, sizes = self.folder, self.files.index.shard_bytes
        for shard in beyond_room(now, later, folder.held, self.room):
            folder.remove(shard)
        planned, held = [], dict(folder.held)
        while len(planned) < _AHEAD and (found := next_copy(now, later, held, sizes, self.room)) is not None:
            shard, giving_way = found
            for each in giving_way:
                folder.remove(each)
                del held[each]
            held[shard] = int(sizes[shard])
            planned.append(shard)
            if not giving_way:
                break
        # of many shards a look takes a while
        self._pause_s = max(_LOOK_S, min(_MOST_S, (time.thread_time() - began) / _SHARE_OF_TIME))
        taken = sum(folder.held.values()) + folder.bytes_removed_within(2 * _LOOK_S)
        return planned[0] if planned and taken + sizes[planned[0]] <= self.room else None

    def _needed(self) -> tuple[list[int], list[int]]:
        """(shards to have copies of for the rest of this epoch, those that only the next one needs), by first need."""
        epoch, samples = self._position
        wanted = [number for number in (epoch, epoch + 1) if number < max(self.num_epochs, epoch + 1)]
        self._spans = {number: self._spans.get(number) or self._span_of(number) for number in wanted}
        left_out = self._unreadable | self.folder.rejected
        shards, first, stop = self._spans[epoch]
        # where more than half of a shard is read already, a copy would cost more than it saves; one that is there stays
        is_left, worth_it = stop > samples, first + stop > 2 * samples
        now = [
            shard
            for shard, is_worth_it in zip(shards[is_left].tolist(), worth_it[is_left].tolist(), strict=True)
            if shard not in left_out and (is_worth_it or shard in self.folder.held)
        ]
        later = self._spans[epoch + 1][0].tolist() if epoch + 1 in self._spans else []
        left_out |= set(now)
        return now, [shard for shard in later if shard not in left_out]

    def _span_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self._sampling.order(epoch).spans()


def next_copy(
    now: Sequence[int], later: Sequence[int], held: Mapping[int, int], sizes: Sequence[int], room: int
) -> tuple[int, list[int]] | None:
    """(the shard to copy next, the copies that make room for it); None where nothing is to be copied, or fits.

    Args:
        now: shards that the rest of this epoch needs, by first need.
        later: those that only the next epoch needs, by first need.
        held: shard -> bytes of its copy.
        sizes: bytes of every shard.
        room: bytes that the copies may take together.
    """
    unused, early, _ = _by_use(now, later, held)
    free = room - sum(held.values())
    for wanted, giving_way in ((now, unused + early), (later, unused)):
        most = free + sum(held[shard] for shard in giving_way)
        for shard in wanted:
            if shard not in held and sizes[shard] <= most:
                return shard, _first_of(giving_way, held, int(sizes[shard]) - free)
    return None


def beyond_room(now: Sequence[int], later: Sequence[int], held: Mapping[int, int], room: int) -> list[int]:
    """The copies that are too many for the room, as those that a run with more of it left; arguments as next_copy."""
    excess = sum(held.values()) - room
    return _first_of(itertools.chain(*_by_use(now, later, held)), held, excess) if excess > 0 else []


def _by_use(now: Sequence[int], later: Sequence[int], held: Mapping[int, int]) -> tuple[list[int], ...]:
    """Copies in the order in which they give way: those that nobody needs, the next epoch's, those of this one."""
    needed = {*now, *later}
    unused = [shard for shard in held if shard not in needed]
    return unused, *([shard for shard in reversed(shards) if shard in held] for shards in (later, now))


def _first_of(shards: Iterable[int], held: Mapping[int, int], num_bytes: int) -> list[int]:
    """The first so many that hold num_bytes together."""
    found = []
    for shard in shards:
        if num_bytes <= 0:
            break
        found.append(shard)
        num_bytes -= held[shard]
    return found


# ---- what the configuration says, and what it will cost --------------------------------------------------------------


def stage_path(stage_dir: str, cache: Path) -> Path:
    """The folder for copies, variables expanded.

    Raises:
        UserError: it is a file, or the cache folder or inside it, or a variable in it is not set.
    """
    path = expand_path(stage_dir)
    place, source = path.resolve(), cache.resolve()
    if place == source or source in place.parents:
        raise UserError(
            f"stage_dir is {path}, which lies in cache_dir {cache}: expected a folder on the node's own disk, "
            "for instance $TMPDIR, or null."
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"stage_dir is {path}, which is no folder: expected a folder on the node's own disk, or null.")
    return path


def room_in(stage_dir: Path, index: CacheIndex, stage_gb: float | None) -> int:
    """Bytes that the copies of a cache may take in stage_dir, those that are there already among them.

    stage_gb: the limit in 10^9 bytes, as far as so much is free; None: 0.9 of what is free.
    """
    free = free_bytes(stage_dir) + CopyFolder(stage_dir, index).num_bytes()
    return int(_SHARE_OF_FREE * free) if stage_gb is None else min(int(stage_gb * 1e9), free)


def describe_staging(index: CacheIndex, sampling: Sampling, stage_dir: Path, room: int) -> str:
    """A line for the console."""
    shards = sampling.shards(0)
    num_bytes = int(index.shard_bytes[shards].sum())
    rest = "" if num_bytes <= room else "; those that do not fit are read from the cache"
    return (
        f"  staging to {stage_dir}: the {len(shards)} shards of an epoch are {format_bytes(num_bytes)}, room for "
        f"{format_bytes(room)}{rest}"
    )


def plan_lines(index: CacheIndex, sampling: Sampling, stage_dir: Path, room: int) -> list[str]:
    """What staging costs and saves, for a plan: bytes, files and requests of an epoch, and how long copying takes."""
    order = sampling.order(0)
    shards = order.spans()[0]
    num_bytes, all_bytes = int(index.shard_bytes[shards].sum()), int(index.shard_bytes.sum())
    copied = min(num_bytes, room)
    num_runs = -(-len(order) // order.run_rows) if order.shuffle == "block" else len(shards)
    how_often = "once" if sampling.draws.mode == "fixed" else "an epoch"
    until = f" until all {format_bytes(all_bytes)} are there" if num_bytes < all_bytes <= room else ""
    least = min(2 * num_bytes, all_bytes)  # this epoch's and the next one's
    lines = [
        f"staging: {format_bytes(copied)} copied to {stage_dir} {how_often}{until}: {len(shards)} files, each from "
        f"beginning to end, in place of {num_runs:,} runs of {order.run_rows} rows. It takes {format_bytes(least)} of "
        f"disk to have the next epoch's ready too, and there is room for {format_bytes(room)}"
    ]
    rate = timed_read(index, int(shards[0]))
    if rate is not None:
        lines.append(f"  the cache gives {format_bytes(rate)}/s here: {format_duration(copied / rate)} {how_often}")
    share = len(order) / int(sampling.shard_rows[shards].sum())
    if share < _FEW_ROWS:
        lines.append(
            f"advice: an epoch reads {share:.0%} of the bytes that are copied for it: shards_per_epoch: "
            f"{max(1, round(share * len(shards)))} reads whole shards, or leave stage_dir at null."
        )
    return lines


def timed_read(index: CacheIndex, shard: int) -> float | None:
    """Bytes/s at which the cache gives the beginning of a shard, not from memory; None where it cannot be read."""
    buffer, count = bytearray(CHUNK_BYTES), 0
    try:
        with index.shard_path(shard).open("rb", buffering=0) as file:
            drop_written(file.fileno(), int(index.shard_bytes[shard]))
            began = time.perf_counter()
            while (size := file.readinto(buffer)) and count < _TIMED_BYTES and time.perf_counter() - began < _TIMED_S:
                count += size
            return count / (time.perf_counter() - began) if count else None
    except OSError:
        return None
