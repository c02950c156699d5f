"""What reading a cache costs besides reading: memory for its index and bookkeeping, and the CPU time of the checksums.

    python -m benchmarks.footprint                                # 500 M uint8 images of 224 px in shards of 2,048
    python -m benchmarks.footprint --images 1281167 --dtype float32
    python -m benchmarks.footprint --tiny                         # seconds: does everything still run?

Memory: an index.json of so many shards is written (the shards are not), opened, and a loader is built on it. Each line
is what was added and stays (tracemalloc: Python's objects and numpy's arrays), of the first also the peak. CPU time: a
small cache of the dtype and size, in the page cache, is read row by row by one thread, with the checksums compared and
without, in turns; medians. All times are the thread's own CPU time: what else runs on the machine disturbs them little.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.common import write_cache
from data_loader import build_pretraining_dataloader
from distillery.cache.archive import DTYPES
from distillery.cache.folder import load_index, load_shard_layout
from distillery.cache.images import index_text, shard_name
from distillery.cache.index import CacheIndex
from distillery.cache.store import FORMAT_VERSION
from distillery.reading.shard_files import ShardFiles
from distillery.system.console import format_bytes

SMALL_ROWS = 256
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500_000_000)
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--dtype", default="uint8", choices=list(DTYPES))
    parser.add_argument("--shard_rows", type=int, default=2048)
    parser.add_argument("--tiny", action="store_true", help="100,000 images of 32 px")
    parser.add_argument("--dir", type=Path, default=None, help="where the data is written meanwhile")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.images, arguments.size = 100_000, 32
    with tempfile.TemporaryDirectory(prefix="footprint-", dir=arguments.dir, ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        measure_memory(work / "large", arguments)
        arguments.images = SMALL_ROWS
        write_cache(work / "small", arguments)
        measure_checksums(load_index(work / "small"))
        arguments.images, arguments.size = 4 * arguments.shard_rows, 8
        write_cache(work / "records", arguments, arguments.shard_rows)
        measure_records(load_index(work / "records"))


def measure_memory(directory: Path, arguments: argparse.Namespace) -> None:
    """Print what an index of so many images, and a loader on it, take."""
    directory.mkdir()
    num_bytes = write_index(directory, arguments)
    shards = -(-arguments.images // arguments.shard_rows)
    print(f"{arguments.images:,} images in {shards:,} shards; index.json: {format_bytes(num_bytes)}")
    print(f"index.json opened in {thread_seconds(lambda: load_index(directory)):.2f} s of a core")
    kept = []
    with counted("the index", shards, peak=True):
        kept.append(load_index(directory))
    with counted("reading: a bit for each row, and where each shard's begin", shards):
        kept.append(ShardFiles(kept[0]))
    with counted("a whole loader, its own index included", shards), contextlib.redirect_stdout(io.StringIO()):
        data = {"cache_dir": str(directory), "use_cached": True}
        loader = build_pretraining_dataloader(data, {"batch_size": 64, "max_steps_per_epoch": None})
    with counted("the order of an epoch, asked for its middle", shards):
        order = loader.sampling.order(1)
        kept.append((order, order.rows(len(order) // 2, len(order) // 2 + 64)))


def write_index(directory: Path, arguments: argparse.Namespace) -> int:
    """Write the index.json of a complete cache of these images; returns its size in bytes."""
    starts = range(0, arguments.images, arguments.shard_rows)
    shape = [3, arguments.size, arguments.size]
    row_bytes = int(np.prod(shape)) * np.dtype(DTYPES[arguments.dtype]).itemsize
    rows = [min(arguments.shard_rows, arguments.images - start) for start in starts]
    index = {
        "format_version": FORMAT_VERSION, "num_samples": arguments.images, "source_num_samples": arguments.images,
        "complete": True, "fingerprint": "0" * 64, "source": {"kind": "benchmark"},
        "preprocess": {"mean": [0.5] * 3, "std": [0.5] * 3, "normalized": arguments.dtype != "uint8"},
        "dtype": arguments.dtype, "image_shape": shape, "shard_size": arguments.shard_rows, "labels": False,
        "shards": [
            {
                "shard_path": shard_name(number), "global_start": start, "num_samples": count, "num_failed": 0,
                "bytes": count * row_bytes + 40_000, "hash": "xxh3_128:" + "0" * 32,
            }
            for number, (start, count) in enumerate(zip(starts, rows, strict=True))
        ],
    }  # fmt: skip
    return (directory / "index.json").write_bytes(index_text(index))


@contextlib.contextmanager
def counted(what: str, shards: int, *, peak: bool = False) -> Iterator[None]:
    """Print what the block added to Python's memory and kept."""
    tracemalloc.start()
    yield
    now, highest = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    at_the_peak = f", {format_bytes(highest)} at the peak" if peak else ""
    print(f"  {what}: {format_bytes(now)}, {now / shards:.0f} bytes a shard{at_the_peak}")


def measure_checksums(index: CacheIndex) -> None:
    """Print what reading a row, and comparing its checksum, take of a core; and what a shard's record does."""
    shards = np.repeat(np.arange(len(index.shard_names)), index.shard_rows)
    local = np.concatenate([np.arange(rows) for rows in index.shard_rows])
    order = np.random.default_rng(0).permutation(len(shards))
    out = np.ones((64, index.row_bytes), np.uint8)

    def read(files: ShardFiles) -> None:
        for start in range(0, len(order) - 63, 64):
            rows = order[start : start + 64]
            files.read(shards[rows], local[rows], out)

    ways = {verify: ShardFiles(index, verify=verify) for verify in ("never", "always")}
    times: dict[str, list[float]] = {verify: [] for verify in ways}
    for round_number in range(ROUNDS + 1):
        for verify, files in ways.items():
            seconds = thread_seconds(lambda files=files: read(files))
            if round_number:  # the first opens the files and touches the memory
                times[verify].append(seconds / (len(order) // 64 * 64) * 1e6)
    bare, checked = (statistics.median(times[verify]) for verify in ("never", "always"))
    print(f"rows of {index.row_bytes:,} bytes, µs of one core:")
    print(f"  reading a row {bare:.1f}; comparing its checksum {checked - bare:.1f}: {1 - bare / checked:.0%} of both")


def measure_records(index: CacheIndex) -> None:
    """Print what it takes to learn where a shard's rows are, which the reader keeps for 8 M rows."""
    seconds = [thread_seconds(lambda s=s: load_shard_layout(index, s)) for s in range(len(index.shard_names))]
    print(f"  a shard's record of {index.shard_rows[0]} rows, read and checked: {statistics.median(seconds) * 1e6:.0f}")


def thread_seconds(work: Callable[[], object]) -> float:
    """CPU time of this thread."""
    began = time.thread_time()
    work()
    return time.thread_time() - began


if __name__ == "__main__":
    main()
