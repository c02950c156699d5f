"""Which shards of a folder a process makes while others join and leave: the next free run, until nothing is left."""

import math
import os
import random
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from distillery.cache.lease_names import Lease
from distillery.cache.plan import is_untouched
from distillery.cache.store import record_path
from distillery.precompute.leases import (
    Leases,
    describe,
    holders_of,
    is_left_to_others,
    look_again_s,
    mean_shard_s,
    run_length,
)

if TYPE_CHECKING:
    from distillery.precompute.loop import ShardLoop

# seconds of waiting until a line says for whom, and between two such lines
_QUIET_S, _SAY_S = 2.0, 30.0
_SLEEP_S = 0.1
# publications over which this process takes its own speed
_PUBLICATIONS = 16
# shards to hash that are taken at a time, for each thread that hashes
_CHECKS = 4


class ElasticClaim:
    """What ShardLoop.claim gives in a folder that any number of processes fill.

    A look for work costs one listing of the folder and one of its leases; no record is read. A shard whose files appear
    while this process runs counts as published. Before the loop ends, all records are read once.

    Args:
        loop: whose shards they are.
        say: called with a line about those whom this process waits for.
    """

    def __init__(self, loop: "ShardLoop", say: Callable[[str], None]) -> None:
        self.loop, self.say = loop, say
        self.leases = Leases(loop.plan.directory)
        # shards whose file may have changed since its record: hashed by whoever takes them
        self.to_check: set[int] = set()
        self.num_workers = 1
        # given to the loop, which has not published them yet
        self._begun: set[int] = set()
        # of the loop's shards that are left, or were: inode of the record that does not count, None: there was none
        self._records: dict[int, int | None] = {}
        # those of which there is a temporary file
        self._unfinished: set[int] = set()
        self._names: dict[int, tuple[str, str]] = {}
        self._publications: deque[float] = deque(maxlen=_PUBLICATIONS)
        self._shard_s: float | None = None
        self._said = -math.inf

    def shards(self) -> Iterator[int]:
        """The shards that this process is to make now; ends when nothing is free, or a stop is requested.

        The next run is taken when the last shard of the one before has been given out, so the work goes on meanwhile.
        """
        # after an error of the disk the loop begins again with all that this process holds and has not published
        again, self._begun = sorted(self.leases.shards & self.loop.left), set()
        yield from self._not_made(again)
        self._publications = deque([time.monotonic()], _PUBLICATIONS)
        while run := self._take_run():
            yield from self._not_made(run)

    def published(self, shard_idx: int) -> None:
        """Note that the loop has published a shard."""
        self._begun.discard(shard_idx)
        self.leases.done(shard_idx)
        self._publications.append(time.monotonic())
        self._shard_s = (self._publications[-1] - self._publications[0]) / (len(self._publications) - 1)

    def wait(self) -> None:
        """Return when there is something to take, when all shards are seen to be there, or when a stop is requested."""
        began, known = time.monotonic(), None
        self._said = max(self._said, began + _QUIET_S - _SAY_S)
        while not self.loop.stop.requested:
            others = self.leases.living()
            names = {lease.name for lease in others}
            if names != known or self._free(others):
                known = names
                self._see_published()
                if not self.loop.left:
                    break
                if self._next_run(others):
                    return
            self._say_for_whom(others)
            self._sleep(look_again_s(time.monotonic() - began))
        if not self.loop.left:
            self.loop.left = set(range(self.loop.plan.num_shards)) - self.loop.recorded()
            for shard_idx in self.loop.left:  # whatever is there now does not count without a look inside
                self._records.pop(shard_idx, None)

    def close(self) -> None:
        """Give back what this process holds."""
        self.leases.close()

    def _not_made(self, run: list[int]) -> Iterator[int]:
        self.loop.check([shard_idx for shard_idx in run if shard_idx in self.to_check])
        for shard_idx in run:
            if self.loop.stop.requested:
                return
            if shard_idx in self.loop.left and self._is_settled(shard_idx):
                self._count(shard_idx)
            if shard_idx not in self.loop.left:
                self.leases.done(shard_idx)
            elif shard_idx in self.leases.shards:  # otherwise this process was stopped so long that another took it
                self._begun.add(shard_idx)
                yield shard_idx

    def _take_run(self) -> list[int]:
        """Take the next free run of shards; [] where there is none."""
        losses = 0
        while not self.loop.stop.requested:
            others = self.leases.living()
            # only now: what its holder publishes and gives back meanwhile is seen as published
            self._see_published()
            run = self._next_run(others, losses)
            if not run:
                break
            if taken := self.leases.take(run, self._shard_s):
                return taken
            # many begin at the same time: they spread
            losses += 1
            self._sleep(random.random() * min(losses, 10) / 20)
        return []

    def _next_run(self, others: list[Lease], losses: int = 0) -> list[int]:
        """The run that this process would take now; losses: how often another was faster just before."""
        free, num_others = self._free(others), len(holders_of(others))
        self.num_workers = num_others + 1
        # what a process without leases seems to be making is left for the end
        free = [shard_idx for shard_idx in free if shard_idx not in self._unfinished] or free
        if not free or is_left_to_others(len(free), num_others, mean_shard_s(others), self._shard_s):
            return []
        begin = random.randrange(min(2**losses, len(free)))
        run, length = [free[begin]], run_length(len(free), num_others, self._shard_s)
        is_to_check = run[0] in self.to_check
        if is_to_check:
            length = max(length, min(_CHECKS * self.loop.num_threads, len(free) // (1 + num_others)))
        for shard_idx in free[begin + 1 :][: length - 1]:
            # those between are there already, or held: a run does not reach over what another process holds
            is_apart = any(between in self.loop.left for between in range(run[-1] + 1, shard_idx))
            if is_apart or (shard_idx in self.to_check) != is_to_check:
                break
            run.append(shard_idx)
        return run

    def _free(self, others: list[Lease]) -> list[int]:
        """The shards, in order, that are not there and that no process holds."""
        free = self.loop.left - self._begun - self.leases.shards
        for lease in others:
            free.difference_update(range(lease.first, lease.last + 1))
        return sorted(free)

    def _see_published(self) -> None:
        """Take out of what is left what others have published since the last look."""
        inodes = {entry.name: entry.inode() for entry in os.scandir(self.loop.plan.directory)}
        unfinished = {name.removeprefix(".").partition(".tmp-")[0] for name in inodes if ".tmp-" in name}
        self._unfinished.clear()
        for shard_idx in sorted(self.loop.left - self._begun):
            if shard_idx not in self._names:
                path = self.loop.plan.shard_path(shard_idx)
                self._names[shard_idx] = path.name, record_path(path).name
            shard_name, record_name = self._names[shard_idx]
            if shard_name in unfinished:
                self._unfinished.add(shard_idx)
            inode = inodes.get(record_name) if shard_name in inodes else None
            if shard_idx not in self._records:
                is_there = inode is not None and self._is_settled(shard_idx)
            elif inode is None or inode == self._records[shard_idx]:
                continue
            else:
                is_there = self._records[shard_idx] is None or self._is_settled(shard_idx)
            self._records[shard_idx] = inode
            if is_there:
                self._count(shard_idx)

    def _count(self, shard_idx: int) -> None:
        """Take in that another process has published a shard."""
        self.loop.left.discard(shard_idx)
        start, stop = self.loop.plan.rows_of(shard_idx)
        self.loop.on_rows(stop - start, shards=self.loop.num_made)

    def _is_settled(self, shard_idx: int) -> bool:
        """Whether the shard wanted is there; one that may have changed since its record must have a newer one."""
        if not self.loop.is_published(shard_idx):
            return False
        if shard_idx not in self.to_check:
            return True
        path = self.loop.plan.shard_path(shard_idx)
        try:
            return is_untouched(path, self.loop.plan.kind.read_record(record_path(path)))
        except OSError:
            return False

    def _say_for_whom(self, others: list[Lease]) -> None:
        if others and time.monotonic() - self._said >= _SAY_S:
            self._said = time.monotonic()
            self.say(f"waiting for {describe(others)}; shards left: {len(self.loop.left)}")

    def _sleep(self, seconds: float) -> None:
        """Sleep, but not beyond a request to stop."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and not self.loop.stop.requested:
            time.sleep(min(left, _SLEEP_S))
