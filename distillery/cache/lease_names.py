"""Leases: which shards of a folder a running stage 1 has taken, and which process it is. Their names say it all.

    .leases/held_00012-00031@node7@4711@5be15b0c8a1f@88123@2950@c0ffee    shards 12..31, process 4711 of node7
    .leases/first_00012                                                   nobody else may take a run that begins here

Both files are empty: who lists the folder knows everything, without opening a file. The time of the first one is the
holder's heartbeat. No byte of a cache depends on a lease; it saves two processes from making the same shard.
"""

import contextlib
import hashlib
import math
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

LEASES_NAME = ".leases"
_HELD = re.compile(r"held_(\d{5,})-(\d{5,})@([\w.-]{1,64})@(\d+)@([0-9a-f]{12})@(\d+)@(\d+)@[0-9a-f]{6}")
_FIRST = re.compile(r"first_(\d{5,})")


@dataclass(frozen=True)
class Holder:
    """A process.

    place: of its machine, of the machine's present run and of the process numbers that it sees; two processes of one
    place can tell whether the other lives. started: in clock ticks since the machine started, 0 where not known.
    """

    host: str
    pid: int
    place: str
    started: int

    def is_dead(self) -> bool:
        """Whether the process is known to be gone; of another place it never is."""
        if self.place != _place() or not self.started:
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # another user's
            pass
        try:
            # another time: it has ended, and another process has its number
            return _start_time(self.pid) != self.started
        except OSError:  # this user may not see it
            return False

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


@dataclass(frozen=True)
class Lease:
    """Shards first..last, taken by a process.

    holder: None where only the file that keeps the first shard is there. shard_s: seconds that the holder needs for a
    shard, None where not known.
    """

    name: str
    first: int
    last: int
    holder: Holder | None
    shard_s: float | None = None

    def is_dead(self) -> bool:
        """Whether its process is known to be gone."""
        return self.holder is not None and self.holder.is_dead()

    @property
    def shards(self) -> str:
        """Which shards it holds, for people."""
        return f"shard {self.first}" if self.first == self.last else f"shards {self.first}..{self.last}"


def this_process() -> Holder:
    """The process that asks."""
    host = re.sub(r"[^\w.-]", "-", socket.gethostname(), flags=re.ASCII)[:64] or "unknown"
    started = 0
    with contextlib.suppress(OSError):
        started = _start_time(os.getpid()) or 0
    return Holder(host, os.getpid(), _place(), started)


def held_name(first: int, last: int, holder: Holder, shard_s: float | None, token: str) -> str:
    """The name of the file that says what a process holds; token: six hex digits of its own.

    shard_s: seconds that the process needs for a shard, None: not known. The name has milliseconds, 0: not known.
    """
    shard_ms = 0 if shard_s is None else math.ceil(1000 * shard_s)
    process = f"{holder.host}@{holder.pid}@{holder.place}@{holder.started}"
    return f"held_{first:05d}-{last:05d}@{process}@{shard_ms}@{token}"


def first_name(first: int) -> str:
    """The name of the file that keeps others from taking a run with the same first shard."""
    return f"first_{first:05d}"


def parse_lease(name: str) -> Lease | None:
    """The lease that a file's name describes; None: it describes none."""
    if match := _HELD.fullmatch(name):
        first, last, host, pid, place, started, shard_ms = match.groups()
        holder = Holder(host, int(pid), place, int(started))
        return Lease(name, int(first), int(last), holder, int(shard_ms) / 1000 or None)
    if match := _FIRST.fullmatch(name):
        return Lease(name, int(match[1]), int(match[1]), None)
    return None


def list_leases(directory: Path) -> list[Lease]:
    """The leases on shards of a folder, by their first shard; none where they cannot be read."""
    try:
        names = os.listdir(directory / LEASES_NAME)
    except OSError:
        return []
    found = [lease for lease in map(parse_lease, names) if lease is not None]
    held = {lease.first for lease in found if lease.holder is not None}
    whole = [lease for lease in found if lease.holder is not None or lease.first not in held]
    return sorted(whole, key=lambda lease: (lease.first, lease.name))


def remove_leases(directory: Path) -> None:
    """Remove every lease on shards of a folder, and the folder they are in where it holds nothing else."""
    folder = directory / LEASES_NAME
    with contextlib.suppress(OSError):  # there is none, or it can only be read: no reason to stop
        if not folder.is_symlink():
            for name in os.listdir(folder):
                if parse_lease(name) is not None:
                    (folder / name).unlink(missing_ok=True)
            folder.rmdir()


def lease_problems(directory: Path) -> Iterator[tuple[Path, str]]:
    """(path, what it is) of everything in the folder of leases, for a person who verifies the cache."""
    folder = directory / LEASES_NAME
    leases = {lease.name: lease for lease in list_leases(directory)}
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(folder))
        if not names:
            yield folder, "left by a killed run; stage 1 removes it"
        for name in names:
            lease = leases.get(name)
            if parse_lease(name) is None:
                yield folder / name, "not part of a cache; move it elsewhere"
            elif lease is not None and lease.holder is not None and not lease.is_dead():
                yield folder / name, f"{lease.shards} held by {lease.holder}, {last_heartbeat(directory, [lease])}"
            elif lease is not None:
                yield folder / name, "left by a killed run; stage 1 removes it"


def last_heartbeat(directory: Path, leases: Iterable[Lease]) -> str:
    """When the latest heartbeat of a process was, by its leases, for people: it may have been killed since."""
    newest = 0.0
    for lease in leases:
        with contextlib.suppress(OSError):  # given back just now
            newest = max(newest, (directory / LEASES_NAME / lease.name).stat().st_mtime)
    return f"last heartbeat {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(newest))}" if newest else "just ended"


@lru_cache(maxsize=1)
def _place() -> str:
    facts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: os.readlink("/proc/self/ns/pid"),
    ):
        try:
            facts.append(read())
        except OSError:
            facts.append("")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]


def _start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None: it has ended, but its number is not free yet.

    Raises:
        OSError: there is no such process, or this one may not see it.
    """
    # the name of the program, in brackets, may hold anything
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
