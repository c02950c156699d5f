"""How evenly `--num_jobs auto` shares stage 1 among unequal processes, beside fixed shares of the shards.

    python -m benchmarks.elastic            # simulated: 200 processes, 10,000 shards, some slow, late or killed
    python -m benchmarks.elastic --real     # on this machine: real processes, one of them slow

The simulation decides by the very functions that stage 1 decides by (distillery/precompute/leases.py). The ideal is the
time that all processes would need if each were at work from its first moment to the common end.
"""

import argparse
import heapq
import itertools
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from distillery.precompute.leases import (
    STALE_S,
    heartbeat_s,
    is_left_to_others,
    look_again_s,
    run_length,
)

ROOT = Path(__file__).resolve().parents[1]
# calls of the file system: two files made and the leases listed; two files removed; the folder and its leases listed
_TAKE_CALLS, _GIVE_BACK_CALLS, _LOOK_CALLS = 7, 2, 6
# of a worker that is killed: how much later another one takes its place
_AWAY_S = 300.0
# of the process that is stopped and woken again and again
_CYCLE_S = 0.2


@dataclass(frozen=True)
class Machine:
    """A simulated machine: seconds that a shard takes on it, and the spans of time (from, to) in which it is there."""

    shard_s: float
    spans: tuple[tuple[float, float], ...]


@dataclass
class Process:
    """A simulated process, which is there from starts_s until it is killed at ends_s, and what it knows."""

    shard_s: float
    starts_s: float
    ends_s: float
    taken: list[int] = field(default_factory=list)
    making: int | None = None
    lease: int | None = None
    known_shard_s: float | None = None
    # what its lease says of its speed
    lease_shard_s: float | None = None
    waits_since_s: float | None = None
    # leases of others -> since when this process has looked at the heartbeat; None: seen once
    heartbeats: dict[int, float | None] = field(default_factory=dict)


SCENARIOS = {
    "equal": (),
    "unequal": ("unequal",),
    "unequal, 1 of 40 at a tenth": ("unequal", "slow"),
    "unequal, 1 of 10 killed and back": ("unequal", "killed"),
    "unequal, 1 of 5 joins late": ("unequal", "late"),
    "all of these": ("unequal", "slow", "killed", "late"),
}


def draw_machines(count: int, mean_s: float, work_s: float, rng: random.Random, what: tuple[str, ...]) -> list[Machine]:
    """The machines of a scenario. mean_s: seconds a shard takes; work_s: about how long all of the work takes."""
    seconds = [mean_s * (rng.lognormvariate(0, 0.25) if "unequal" in what else 1) for _ in range(count)]
    chosen = {kind: set(rng.sample(range(count), max(1, count // part))) if kind in what else set()
              for kind, part in (("slow", 40), ("killed", 10), ("late", 5))}  # fmt: skip
    machines = []
    for k in range(count):
        start = rng.uniform(0, work_s / 2) if k in chosen["late"] else 0.0
        spans = ((start, math.inf),)
        if k in chosen["killed"]:
            killed = start + rng.uniform(0.1, 0.6) * work_s
            spans = ((start, killed), (killed + _AWAY_S, math.inf))
        machines.append(Machine(10 * mean_s if k in chosen["slow"] else seconds[k], spans))
    return machines


def ideal_s(machines: list[Machine], num_shards: int) -> float:
    """Seconds until so many shards are made where every machine makes its part of each until the end."""
    changes = [(at, sign / machine.shard_s) for machine in machines for span in machine.spans
               for at, sign in zip(span, (1, -1), strict=True)]  # fmt: skip
    left, speed, now = float(num_shards), 0.0, 0.0
    for at, change in sorted(changes):
        if left <= speed * (at - now):
            break
        left, speed, now = left - speed * (at - now), speed + change, at
    return now + left / speed


def fixed_s(machines: list[Machine], num_shards: int) -> float:
    """Seconds with `--num_jobs N --job_id K`: a share for each machine, which goes on with it when it is back."""
    ends = []
    for k, machine in enumerate(machines):
        left = num_shards * (k + 1) // len(machines) - num_shards * k // len(machines)
        for start, stop in machine.spans:
            if left and start + left * machine.shard_s <= stop:
                ends.append(start + left * machine.shard_s)
            left -= min(left, int((stop - start) / machine.shard_s) if stop < math.inf else left)
    return max(ends)


class Elastic:
    """A simulated folder that processes share by leases; what one writes, the others see at once.

    calls: of the file system, for leases and for looking for work; num_looks: how many of them list the whole folder.
    """

    def __init__(self, machines: list[Machine], num_shards: int) -> None:
        self.processes = [Process(machine.shard_s, *span) for machine in machines for span in machine.spans]
        self.num_shards, self.free = num_shards, list(range(num_shards))
        heapq.heapify(self.free)
        self.num_published = self.calls = self.num_looks = 0
        self.now = 0.0
        # lease -> whose it is; a process has one at a time
        self._leases: dict[int, Process] = {}
        self._numbers = itertools.count()
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def run(self) -> float:
        """Seconds until the last shard is published."""
        for process in self.processes:
            self._at(process.starts_s, process, self._go_on)
        while self.num_published < self.num_shards:
            self.now, _, event = heapq.heappop(self._events)
            event()
        lived_s = sum(max(0.0, min(p.ends_s, self.now) - p.starts_s) for p in self.processes)
        self.calls += round(lived_s / heartbeat_s())
        return self.now

    def _at(self, seconds: float, process: Process, event: Callable[[Process], None]) -> None:
        heapq.heappush(self._events, (seconds, next(self._order), lambda: event(process)))

    def _go_on(self, process: Process) -> None:
        """Make the next shard of those taken; where there is none take more, or wait."""
        if self.now >= process.ends_s:
            return
        if not process.taken:
            self._look(process)
        if process.taken:
            process.waits_since_s, process.making = None, process.taken.pop(0)
            self._at(self.now + process.shard_s, process, self._publish)
            return
        if process.waits_since_s is None:
            process.waits_since_s = self.now
        self._at(self.now + look_again_s(self.now - process.waits_since_s), process, self._go_on)

    def _look(self, process: Process) -> None:
        self.calls += _LOOK_CALLS
        self.num_looks += 1
        self._give_back(process)
        self._watch(process)
        num_others = len(self._leases)
        speeds = [1 / other.lease_shard_s for other in self._leases.values() if other.lease_shard_s is not None]
        others_shard_s = len(speeds) / sum(speeds) if speeds else None
        if not self.free or is_left_to_others(len(self.free), num_others, others_shard_s, process.known_shard_s):
            return
        length = run_length(len(self.free), num_others, process.known_shard_s)
        process.taken = [heapq.heappop(self.free) for _ in range(length)]
        process.lease_shard_s = process.known_shard_s
        process.lease = next(self._numbers)
        self._leases[process.lease] = process
        self.calls += _TAKE_CALLS + _GIVE_BACK_CALLS

    def _publish(self, process: Process) -> None:
        if self.now >= process.ends_s:
            return
        process.making, process.known_shard_s = None, process.shard_s
        self.num_published += 1
        self._go_on(process)

    def _watch(self, process: Process) -> None:
        """Look at the heartbeats of leases seen before; what a silent one held is free again."""
        before, process.heartbeats = process.heartbeats, {}
        for lease, holder in list(self._leases.items()):
            since = None
            if lease in before:
                self.calls += 1
                is_silent = self.now >= holder.ends_s
                since = before[lease] if is_silent and before[lease] is not None else self.now
            if since is not None and self.now - since >= STALE_S:
                for shard_idx in [*holder.taken, *([] if holder.making is None else [holder.making])]:
                    heapq.heappush(self.free, shard_idx)
                self._give_back(holder)
                continue
            process.heartbeats[lease] = since

    def _give_back(self, process: Process) -> None:
        process.taken, process.making = [], None
        if process.lease is not None:
            del self._leases[process.lease]
            process.lease = None


def simulate(num_processes: int, num_shards: int, shard_s: float, num_draws: int) -> None:
    """Print a row for each scenario: medians over so many draws of machines."""
    work_s = num_shards * shard_s / num_processes
    print(f"simulated: {num_processes} processes, {num_shards:,} shards of {shard_s:g} s each: {work_s:,.0f} s of work")
    print(f"{'':36}{'ideal, s':>10}{'elastic':>10}{'worst':>8}{'fixed':>8}{'calls/s':>10}{'listings/s':>12}")
    for name, what in SCENARIOS.items():
        ideals, elastic, fixed, calls, looks = [], [], [], [], []
        for draw in range(num_draws):
            machines = draw_machines(num_processes, shard_s, work_s, random.Random(draw), what)
            ideals.append(ideal_s(machines, num_shards))
            folder = Elastic(machines, num_shards)
            elastic.append(folder.run() / ideals[-1])
            fixed.append(fixed_s(machines, num_shards) / ideals[-1])
            calls.append(folder.calls / folder.now)
            looks.append(folder.num_looks / folder.now)
        print(
            f"{name:36}{median(ideals):10,.0f}{median(elastic):10.2f}{max(elastic):8.2f}{median(fixed):8.2f}"
            f"{median(calls):10.1f}{median(looks):12.1f}"
        )


def measure(num_processes: int, num_images: int, part: float, num_rounds: int) -> None:
    """Print the seconds that real processes need, elastic and with fixed shares in turns, and their ratio."""
    from benchmarks.common import synthetic_jpegs

    with tempfile.TemporaryDirectory(prefix="elastic-benchmark-") as work:
        folder = Path(work)
        images = [{"bytes": data, "path": None} for data in synthetic_jpegs(64, 256)]
        rows = list(itertools.islice(itertools.cycle(images), num_images))
        pq.write_table(pa.table({"image": rows}), folder / "images.parquet", row_group_size=500)
        config = f"""dataset_name: parquet
data_files: {folder}/images.parquet
cache_dir: {folder}/cache
cache_dtype: uint8
cache_shard_size: 50
num_workers: 1
interpolation: lanczos
"""
        (folder / "data.yaml").write_text(config)
        print(
            f"measured: {num_processes} processes with a decode worker each, {num_images:,} images in shards of 50; "
            f"one process runs {part:.0%} of the time and is stopped for the rest"
        )
        print(f"{'round':>8}{'elastic, s':>14}{'fixed, s':>14}{'fixed / elastic':>18}")
        for number in range(1, num_rounds + 1):
            elastic = _seconds(folder, [["--num_jobs", "auto"]] * num_processes, part)
            fixed = _seconds(
                folder, [["--num_jobs", str(num_processes), "--job_id", str(k)] for k in range(num_processes)], part
            )
            print(f"{number:8}{elastic:14.1f}{fixed:14.1f}{fixed / elastic:18.2f}", flush=True)


def _seconds(folder: Path, flags: list[list[str]], part: float) -> float:
    """From the moment at which all processes have read their plan until the last one has ended; the last is slow."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    command = [sys.executable, "precompute_cache.py", "--data_config", str(folder / "data.yaml")]
    processes = [
        subprocess.Popen([*command, *its], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for its in flags
    ]
    for process in processes:
        while not process.stdout.readline().startswith("free space"):
            assert process.poll() is None, "stage 1 failed"
    began = time.monotonic()
    while any(process.poll() is None for process in processes):
        if processes[-1].poll() is None:
            processes[-1].send_signal(signal.SIGSTOP)
            time.sleep((1 - part) * _CYCLE_S)
            processes[-1].send_signal(signal.SIGCONT)
        time.sleep(part * _CYCLE_S)
    assert [process.returncode for process in processes] == [0] * len(processes)
    return time.monotonic() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--shard_s", type=float, default=60.0, metavar="S", help="seconds a shard takes, on average")
    parser.add_argument("--draws", type=int, default=5, help="of machines, for each row")
    parser.add_argument("--processes", type=int, help="200; with --real 2")
    parser.add_argument("--real", action="store_true")
    parser.add_argument("--images", type=int, default=8_000, help="with --real")
    parser.add_argument("--part", type=float, default=0.1, help="with --real: of the time in which the slow one runs")
    parser.add_argument("--rounds", type=int, default=3, help="with --real")
    arguments = parser.parse_args()
    if arguments.real:
        measure(arguments.processes or 2, arguments.images, arguments.part, arguments.rounds)
    else:
        simulate(arguments.processes or 200, arguments.shards, arguments.shard_s, arguments.draws)


if __name__ == "__main__":
    main()
