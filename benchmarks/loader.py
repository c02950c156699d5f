"""How fast batches come out of the cache, beside the limit and the loaders one would use instead.

    python -m benchmarks.loader                          # 2,048 float32 images of 224 px, page cache hot
    python -m benchmarks.loader --dtype uint8 --size 96 --cold
    python -m benchmarks.loader --tiny --out /tmp/bench   # seconds: does everything still run?

All contenders read the same images, shuffled, as [64, 3, H, W] batches of the stored dtype, with two threads or worker
processes. They take turns, `--rounds` times; a turn lasts at least `--seconds` of whole epochs, the first four batches
of each left out. The figure is the median of the turns. "first pass" is ours while it compares each row's checksum: one
epoch, once, before the turns. The ceiling is what two threads reach with bare os.preadv of single rows, in random
order, into buffers that are reused and were touched before.

--cold drops each contender's own files from the page cache before every epoch (posix_fadvise, no root needed) and takes
one epoch per turn; its ceiling is a sequential read of the same files by four threads.

Writes loader.json and loader.png into --out. Peers that are not installed are left out, with the reason
(requirements-bench.txt has them all).
"""

import argparse
import os
import platform
import random
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import build_parser, draw_bars, run_benchmark, write_cache
from benchmarks.loader_peers import PEERS
from data_loader import CachedTensorDataset, build_pretraining_dataloader
from distillery.cache.archive import DTYPES
from distillery.cache.folder import load_index, load_shard_layout
from distillery.system.console import format_bytes
from distillery.system.machine import file_system_of, usable_cpus

WARM_UP_BATCHES = 4
THREADS = 2
SEQUENTIAL_THREADS = 4


@dataclass
class Setting:
    """What is measured: the cache, batch size, and how long a turn lasts."""

    cache: Path
    work: Path
    batch_size: int
    seconds: float
    cold: bool


@dataclass
class Contender:
    """One way of reading. turn: measures it once, in images/s; batches: those of an epoch; files: what it reads."""

    name: str
    turn: Callable[[], float]
    files: Path
    batches: Callable[[], Iterator[Tensor]] | None = None
    rates: list[float] = field(default_factory=list)


def main() -> int:
    arguments = parse_arguments()
    # peers hand read-only arrays to torch, which warns in every worker
    warnings.simplefilter("ignore")
    random.seed(0)
    return run_benchmark("loader", arguments, measure, draw)


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="256 images of 32 px, one short round")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--dtype", default="float32", choices=list(DTYPES))
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="page cache dropped before every epoch")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), metavar="NAME", help=", ".join(PEERS))
    arguments = parser.parse_args()
    if unknown := set(arguments.peers) - PEERS.keys():
        parser.error(f"--peers {' '.join(sorted(unknown))}: expected some of {', '.join(PEERS)}")
    if arguments.tiny:
        arguments.images, arguments.size, arguments.batch_size = 256, 32, 16
        arguments.seconds, arguments.rounds = 0.2, 1
    return arguments


def measure(arguments: argparse.Namespace, work: Path) -> dict:
    """Prepare every contender, let them take turns, and return what loader.json holds."""
    setting = Setting(work / "cache", work, arguments.batch_size, arguments.seconds, arguments.cold)
    write_cache(setting.cache, arguments)
    row_bytes = load_index(setting.cache).row_bytes
    print(
        f"{arguments.images} images, {row_bytes} bytes each ({format_bytes(arguments.images * row_bytes)}), on "
        f"{file_system_of(work)}; page cache {'cold' if arguments.cold else 'hot'}; batches of {arguments.batch_size}"
    )
    own_batches = ours(setting, "pread")
    if not setting.cold:
        read_into_page_cache(setting.cache)  # stage 1 lets go of what it wrote
    first_pass = time_epochs(own_batches, 0.0, warm_up=0 if setting.cold else WARM_UP_BATCHES)
    contenders = [ceiling(setting), contender("ours", own_batches, setting.cache, setting)]
    if not setting.cold:
        mapped_batches = ours(setting, "mmap")
        time_epochs(mapped_batches, 0.0, warm_up=0)
        contenders.append(contender("ours, read_mode: mmap", mapped_batches, setting.cache, setting))
    skipped = add_peers(contenders, arguments.peers, setting)
    check_batches(contenders[1:], setting)
    os.sync()
    for round_number in range(arguments.rounds):
        for each in contenders:
            if setting.cold:
                drop_from_page_cache(each.files)
            each.rates.append(each.turn())
        line = ", ".join(f"{each.name} {each.rates[-1]:.0f}" for each in contenders)
        print(f"round {round_number + 1}: {line}", flush=True)
    return report(contenders, skipped, first_pass, arguments, row_bytes)


def add_peers(contenders: list[Contender], names: list[str], setting: Setting) -> dict[str, str]:
    """Append those that are installed and take the dtype; returns why the others are left out."""
    skipped = {}
    for name in names:
        files, began = setting.work / name, time.perf_counter()
        try:
            batches = PEERS[name](setting.cache, files, setting.batch_size, THREADS)
            time_epochs(batches, 0.0, warm_up=0, at_most=8)
        except Exception as error:  # a peer that fails, however it does, must not end the comparison
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            print(f"  {name}: left out ({skipped[name]})")
            continue
        contenders.append(contender(name, batches, files if files.exists() else setting.cache, setting))
        print(f"  {name}: prepared in {time.perf_counter() - began:.1f} s")
    return skipped


# ---- ours, and the limit -----------------------------------------------------------------------------------------


def ours(setting: Setting, read_mode: str) -> Callable[[], Iterator[Tensor]]:
    """The project's loader, batches as stored; each call goes through another epoch."""
    data = {"cache_dir": str(setting.cache), "use_cached": True, "num_workers": THREADS, "read_mode": read_mode}
    train = {"batch_size": setting.batch_size, "max_steps_per_epoch": None}
    loader = build_pretraining_dataloader(data, train, raw=True)

    def batches() -> Iterator[Tensor]:
        loader.set_epoch(loader.epoch + 1)
        return iter(loader)

    return batches


def bare_preadv(setting: Setting) -> float:
    """Images/s of two threads that read single rows, in random order, into buffers that they have touched before."""
    index = load_index(setting.cache)
    shards = range(len(index.shard_names))
    offsets = [load_shard_layout(index, s).payload_offset for s in shards]
    fds = [os.open(index.shard_path(s), os.O_RDONLY) for s in shards]
    rows = [(fds[s], offsets[s] + row * index.row_bytes) for s in shards for row in range(index.shard_rows[s])]
    random.shuffle(rows)
    row_bytes, batch_size, done = index.row_bytes, setting.batch_size, [0] * THREADS
    start = threading.Barrier(THREADS + 1)

    def read(thread: int) -> None:
        memory = memoryview(np.ones(batch_size * row_bytes, np.uint8))
        places = [[memory[i * row_bytes : (i + 1) * row_bytes]] for i in range(batch_size)]
        mine = rows[thread::THREADS]
        start.wait()
        end = time.perf_counter() + setting.seconds
        while time.perf_counter() < end:
            for number, (fd, offset) in enumerate(mine):
                os.preadv(fd, places[number % batch_size], offset)
            done[thread] += len(mine)

    rate = images_per_second(read, THREADS, start, done)
    for fd in fds:
        os.close(fd)
    return rate


def sequential_read(setting: Setting) -> float:
    """Images/s, by their bytes, of four threads that read the shards from beginning to end."""
    index = load_index(setting.cache)
    paths = [index.shard_path(s) for s in range(len(index.shard_names))]
    done, start = [0.0] * SEQUENTIAL_THREADS, threading.Barrier(SEQUENTIAL_THREADS + 1)

    def read(thread: int) -> None:
        memory = memoryview(np.ones(8 << 20, np.uint8))
        start.wait()
        for path in paths[thread::SEQUENTIAL_THREADS]:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(memory):
                    done[thread] += count / index.row_bytes

    return images_per_second(read, SEQUENTIAL_THREADS, start, done)


def images_per_second(read: Callable[[int], None], num_threads: int, start: threading.Barrier, done: list) -> float:
    threads = [threading.Thread(target=read, args=(thread,)) for thread in range(num_threads)]
    for thread in threads:
        thread.start()
    start.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return sum(done) / (time.perf_counter() - began)


# ---- measuring ---------------------------------------------------------------------------------------------------


def contender(name: str, batches: Callable[[], Iterator[Tensor]], files: Path, setting: Setting) -> Contender:
    """A loader that takes its turns by whole epochs."""
    seconds, warm_up = (0.0, 0) if setting.cold else (setting.seconds, WARM_UP_BATCHES)
    return Contender(name, lambda: time_epochs(batches, seconds, warm_up=warm_up), files, batches)


def ceiling(setting: Setting) -> Contender:
    """What can be had at best from the same files."""
    if setting.cold:
        return Contender("ceiling: sequential read", lambda: sequential_read(setting), setting.cache)
    return Contender("ceiling: bare preadv", lambda: bare_preadv(setting), setting.cache)


def time_epochs(batches: Callable, seconds: float, *, warm_up: int, at_most: int | None = None) -> float:
    """Images/s; of each epoch the first `warm_up` batches are left out. seconds 0: one epoch."""
    timed, images = 0.0, 0
    while images == 0 or timed < seconds:
        began = time.perf_counter()
        rows = skipped = 0
        for number, batch in enumerate(batches(), start=1):
            rows += len(batch)
            if number == warm_up:
                began, skipped = time.perf_counter(), rows
            if number == at_most:
                break
        if rows == skipped:
            raise ValueError(f"an epoch has no more than {warm_up} batches: more --images are needed")
        timed, images = timed + time.perf_counter() - began, images + rows - skipped
    return images / timed


def read_into_page_cache(folder: Path) -> None:
    """Read every shard in the folder once."""
    memory = bytearray(8 << 20)
    for path in folder.glob("*.pt"):
        with path.open("rb", buffering=0) as file:
            while file.readinto(memory):
                pass


def drop_from_page_cache(folder: Path) -> None:
    """Write back and forget the pages of every file in the folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


def check_batches(contenders: list[Contender], setting: Setting) -> None:
    """Every contender's batches must be rows of the cache, of the right shape and dtype, or its speed means nothing."""
    dataset = CachedTensorDataset(setting.cache)
    index = dataset.index
    stored = build_pretraining_dataloader(
        {"cache_dir": str(setting.cache), "use_cached": True},
        {"batch_size": 1, "max_steps_per_epoch": None},
        raw=True,
    )
    known = {round(image.double().sum().item(), 3) for image in stored}
    for each in contenders:
        batch = next(iter(each.batches()))
        assert tuple(batch.shape) == (setting.batch_size, *index.image_shape), (each.name, batch.shape)
        assert str(batch.dtype) == f"torch.{index.dtype}", (each.name, batch.dtype)
        sums = {round(image.double().sum().item(), 3) for image in batch}
        assert sums <= known, f"{each.name} gave images that are not in the cache"


def report(
    contenders: list[Contender],
    skipped: dict[str, str],
    first_pass: float,
    arguments: argparse.Namespace,
    row_bytes: int,
) -> dict:
    """Print the table; return it with what it was measured on."""
    medians = [statistics.median(each.rates) for each in contenders]
    limit, mine = medians[:2]
    print(f"{'':28}{'images/s':>12}{'GB/s':>8}{'of ceiling':>12}{'ours is':>10}")
    names = [each.name for each in contenders]
    for name, rate in zip([*names, "ours, first pass (checks)"], [*medians, first_pass], strict=True):
        print(f"{name:28}{rate:12.0f}{rate * row_bytes / 1e9:8.2f}{rate / limit:12.3f}{mine / rate:9.1f}x")
    rows = [
        {"name": each.name, "images_per_second": rate, "rounds": each.rates}
        for each, rate in zip(contenders, medians, strict=True)
    ]
    for name, reason in skipped.items():
        print(f"{name:28}    left out: {reason}")
    setting = {key: getattr(arguments, key) for key in ("images", "size", "dtype", "batch_size", "seconds", "cold")}
    machine = {"cpus": usable_cpus(), "machine": platform.machine(), "torch": torch.__version__}
    return {
        "setting": setting | machine,
        "row_bytes": row_bytes,
        "results": rows,
        "first_pass_images_per_second": first_pass,
        "left_out": skipped,
    }


def draw(result: dict, path: Path) -> None:
    """A bar for each contender, the ceiling as a line."""
    limit, *rows = result["results"]
    setting = result["setting"]
    heading = f"{setting['dtype']}, {setting['size']} px, batches of {setting['batch_size']}, shuffled"
    title = f"{'cold' if setting['cold'] else 'hot'} page cache, {setting['cpus']} CPUs"
    bars = {row["name"]: row["images_per_second"] for row in rows}
    draw_bars([(heading, bars)], path, unit="images/s", limits={limit["name"]: limit["images_per_second"]}, title=title)


if __name__ == "__main__":
    sys.exit(main())
