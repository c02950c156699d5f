"""Elastic stage 1: how many shards a process takes at a time, and how it tells the others which ones.

A process that takes shards leaves a lease: a file with a heartbeat, described in cache/lease_names.py. Whoever looks
for work passes over the shards of living leases. Leases only save double work. A shard is published under its name
once, whoever makes it, so a lease that is lost, damaged or cannot be written costs time at most.
"""

import contextlib
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import harmonic_mean

from distillery.cache.lease_names import (
    LEASES_NAME,
    Holder,
    Lease,
    first_name,
    held_name,
    list_leases,
    this_process,
)

# a process of another machine without a heartbeat for so long has lost its shards to whoever wants them
STALE_S = 60.0
# work taken at a time: long enough that looking for it is nothing beside it
RUN_S = 60.0
# a process that has not got on for so long stops its heartbeat: it hangs
STUCK_S = 900.0
_BEATS_UNTIL_STALE = 5
# to open a folder of leases that another process removes at the same time
_ATTEMPTS = 5


def mean_shard_s(leases: list[Lease]) -> float | None:
    """Seconds that one of the holders needs for a shard, as the mean of their speeds; None where no speed is known."""
    known = [lease.shard_s for lease in leases if lease.shard_s is not None]
    return harmonic_mean(known) if known else None


def run_length(num_free: int, num_others: int, shard_s: float | None) -> int:
    """How many of the free shards a process takes at a time: at least one, and one before its speed is known.

    As many as it makes in RUN_S, or half of its equal share of what is free, whichever is less. So a slow process takes
    fewer than a fast one, and all end at about the same time.

    Args:
        num_free: shards that nobody has taken.
        num_others: other processes that are at work on the folder.
        shard_s: seconds this process needs for a shard; None: not known yet.
    Source: halves of what is left, as in factoring (Hummel, Schonberg and Flynn 1992).
    """
    if shard_s is None:
        return 1
    return max(1, int(min(RUN_S / max(shard_s, 1e-9), num_free / (2 * (1 + num_others)))))


def is_left_to_others(num_free: int, num_others: int, others_shard_s: float | None, shard_s: float | None) -> bool:
    """Whether a slow process takes nothing more, because the others will have made all before it has made one shard.

    others_shard_s: seconds that one of them needs for a shard, None: not known. Other arguments as of run_length.
    """
    if shard_s is None or others_shard_s is None or not num_others:
        return False
    return others_shard_s * (1 + num_free / num_others) < shard_s


def look_again_s(waited_s: float) -> float:
    """Seconds until a process that has been waiting for so long looks for work again."""
    return min(max(waited_s / 4, 0.5), 10.0)


def heartbeat_s() -> float:
    """Seconds between two heartbeats."""
    return STALE_S / _BEATS_UNTIL_STALE


class Leases:
    """The leases on the shards of one folder: what this process holds, and what others do.

    No method raises where a file cannot be read or written: then others are not seen, or do not see this process.

    Args:
        directory: the folder of the shards.
        clock: seconds that only ever grow. Times of files are never compared with it, as clocks of machines differ: a
            heartbeat is a change that this process sees.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock, self.process = directory / LEASES_NAME, clock, this_process()
        # lease -> its shards that are not made yet; of those in a folder that takes no leases, others know nothing
        self._mine: dict[Lease, set[int]] = {}
        self._unwritten: set[Lease] = set()
        # names of others -> (the file's heartbeat in ns, None: not looked at yet; since when)
        self._heartbeats: dict[str, tuple[int | None, float]] = {}
        # of processes that are gone, in files that this one may not remove: they count for nothing
        self._remnants: set[Lease] = set()
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None
        self._advanced = clock()

    @property
    def shards(self) -> set[int]:
        """What this process holds and has not made yet."""
        with self._lock:
            return set().union(*self._mine.values())

    def advance(self) -> None:
        """Note that the work gets on; the heartbeat goes on with it."""
        self._advanced = self.clock()

    def take(self, shards: list[int], shard_s: float | None = None) -> list[int]:
        """Take shards, in order, of which nobody seemed to hold any or one in between.

        shard_s: seconds this process needs for a shard, for the others to know; None: not known yet.

        Returns:
            Those that no other process has taken meanwhile.
        """
        first, last = shards[0], shards[-1]
        name = held_name(first, last, self.process, shard_s, f"{random.getrandbits(24):06x}")
        lease = Lease(name, first, last, self.process, shard_s)
        try:
            # the description comes first: whoever finds the first shard taken finds out by whom, and what else
            self._create(lease.name)
            self._create(first_name(first))
        except OSError as error:
            self._unlink(lease.name)
            if isinstance(error, FileExistsError) and first not in {remnant.first for remnant in self._remnants}:
                return []
            # no reason not to work
            self._unwritten.add(lease)
        # two whose runs overlap without the same beginning: whoever looks last sees the other, and steps back
        others = [other for other in list_leases(self.folder.parent) if other.first != first and not self._holds(other)]
        others = [other for other in others if other not in self._remnants]
        shards = [s for s in shards if not any(other.first <= s <= other.last for other in others)]
        if not shards:
            self._remove(lease)
            return []
        self.advance()
        with self._lock:
            self._mine[lease] = set(shards)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat_until_closed, name="heartbeat", daemon=True)
            self._thread.start()
        return shards

    def done(self, shard_idx: int) -> None:
        """Note that a shard needs no lease any more."""
        with self._lock:
            over = []
            for lease, left in self._mine.items():
                left.discard(shard_idx)
                if not left:
                    over.append(lease)
            for lease in over:
                del self._mine[lease]
        for lease in over:
            self._remove(lease)

    def living(self) -> list[Lease]:
        """The leases of others. Those whose process is gone are removed, and so are those without a heartbeat."""
        now = self.clock()
        found = [lease for lease in list_leases(self.folder.parent) if not self._holds(lease)]
        gone = [lease for lease in found if lease.is_dead() or self._silent_s(lease, now) >= STALE_S]
        names = {lease.name for lease in found}
        self._heartbeats = {name: seen for name, seen in self._heartbeats.items() if name in names}
        self._remnants = {
            lease for lease in gone if not self._remove(lease) and os.path.lexists(self.folder / lease.name)
        }
        return [lease for lease in found if lease not in gone]

    def close(self) -> None:
        """Give back what this process holds, so that others need not wait for it."""
        self._closed.set()
        with self._lock:
            mine, self._mine = list(self._mine), {}
        for lease in mine:
            self._remove(lease)
        with contextlib.suppress(OSError):  # others have leases in it
            self.folder.rmdir()

    def _holds(self, lease: Lease) -> bool:
        with self._lock:
            return any(lease.name in (mine.name, first_name(mine.first)) for mine in self._mine)

    def _silent_s(self, lease: Lease, now: float) -> float:
        """For how long this process has seen no heartbeat of another's lease.

        A lease seen for the first time is not looked at: most are gone before the next look, and this saves a call for
        each.
        """
        beat, since = self._heartbeats.get(lease.name, (None, now))
        if lease.name in self._heartbeats:
            with contextlib.suppress(OSError):
                # the time alone: some network file systems give a file another inode number now and then
                found = os.stat(self.folder / lease.name).st_mtime_ns
                if beat != found:
                    beat, since = found, now
        self._heartbeats[lease.name] = (beat, since)
        return now - since

    def _beat_until_closed(self) -> None:
        while not self._closed.wait(heartbeat_s()):
            self.beat()

    def beat(self) -> None:
        """Show that this process lives, unless it hangs. Shards whose lease is gone are not held any more."""
        if self.clock() - self._advanced >= STUCK_S:
            return
        with self._lock:
            mine = [lease for lease in self._mine if lease not in self._unwritten]
        for lease in mine:
            try:
                os.utime(self.folder / lease.name)
            except FileNotFoundError:
                with self._lock:  # another process has taken them over
                    self._mine.pop(lease, None)
            except OSError:
                continue

    def _create(self, name: str) -> None:
        for attempt in range(_ATTEMPTS):
            try:
                os.close(os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
                return
            except FileNotFoundError:
                if attempt == _ATTEMPTS - 1:
                    raise
                with contextlib.suppress(FileExistsError):
                    self.folder.mkdir()

    def _remove(self, lease: Lease) -> bool:
        # of several processes that remove one lease, only the one that gets the description lets others begin there:
        # a slower one would take away the mark of who has begun meanwhile
        is_removed = self._unlink(lease.name)
        if is_removed and lease.holder is not None:
            self._unlink(first_name(lease.first))
        return is_removed

    def _unlink(self, name: str) -> bool:
        try:
            (self.folder / name).unlink()
        except OSError:
            return False
        return True


def holders_of(leases: list[Lease]) -> dict[Holder, list[Lease]]:
    """process -> its leases; those of nobody known are left out."""
    found: dict[Holder, list[Lease]] = {}
    for lease in leases:
        if lease.holder is not None:
            found.setdefault(lease.holder, []).append(lease)
    return found


def describe(leases: list[Lease], limit: int = 4) -> str:
    """Who holds what, in one line for people; at most `limit` processes by name."""
    holders = holders_of(leases)
    parts = [f"{holder}: {', '.join(lease.shards for lease in held)}" for holder, held in holders.items()]
    if unknown := [lease.shards for lease in leases if lease.holder is None]:
        parts.append(f"a process unknown: {', '.join(unknown)}")
    more = [] if len(parts) <= limit else [f"{len(parts) - limit} more processes"]
    return "; ".join([*parts[:limit], *more])
