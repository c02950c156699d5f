"""How long training waits for a slow cache folder, with copies on the node's own disk (stage_dir) and without.

    python -m benchmarks.staging                                  # 4,096 images of 224 px, 4 of 16 shards an epoch
    python -m benchmarks.staging --bandwidth 100 --jump_ms 20     # MB/s, ms
    python -m benchmarks.staging --tiny                           # seconds: does everything still run?

The slow folder is simulated; its files lie on this machine's disk. It is one storage with a queue: a request takes its
bytes over --bandwidth, and --jump_ms more where it does not go on from the last request to the same file. The system's
read-ahead and its page cache (--memory) are simulated too: advice is queued like a read, but nobody waits for it. What
is left out: other users of the storage, its own caches, and several servers that answer at the same time.

The loader is the real one, with the same order of rows either way. A step is a pause: --images_per_second is what the
GPU could compute. Each way goes through two passes over the shards, epoch by epoch. "waiting" is the share of the time
that the loop stood without data.
"""

import argparse
import os
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path

from benchmarks.common import write_cache
from data_loader import build_pretraining_dataloader
from distillery.system.console import format_bytes

BLOCK_BYTES = 128 << 10
SHARD_ROWS, BATCH, SHARDS_PER_EPOCH = 256, 64, 4


class SlowFolder:
    """While it is entered, reads of the files in a folder take as long as those of a storage far away.

    Args:
        folder: below it, reads are slow.
        bandwidth: bytes/s of the storage.
        jump_s: what a request costs that does not go on where the last one to the same file ended.
        memory: bytes of the files that this machine keeps in memory.
    """

    def __init__(self, folder: Path, *, bandwidth: float, jump_s: float, memory: int) -> None:
        self.folder, self.bandwidth, self.jump_s = str(folder), bandwidth, jump_s
        self.max_blocks = memory // BLOCK_BYTES
        self.num_bytes = self.num_jumps = 0
        self._lock, self._free_at = threading.Lock(), 0.0
        self._end_of_last: dict[str, int] = {}
        # (file, block) -> when it is here
        self._blocks: OrderedDict[tuple[str, int], float] = OrderedDict()

    def __enter__(self) -> "SlowFolder":
        self._preadv, self._fadvise = os.preadv, os.posix_fadvise
        os.preadv, os.posix_fadvise = self._read, self._advise
        return self

    def __exit__(self, *_exc: object) -> None:
        os.preadv, os.posix_fadvise = self._preadv, self._fadvise

    def _name(self, fd: int) -> str | None:
        name = os.readlink(f"/proc/self/fd/{fd}")
        return name if name.startswith(self.folder) else None

    def _read(self, fd: int, buffers: list, offset: int, *flags: int) -> int:
        if (name := self._name(fd)) is not None:
            ready = self._request(name, offset, sum(map(len, buffers)), is_asking=bool(flags))
            if flags and (ready is None or ready > time.monotonic()):
                raise BlockingIOError
            time.sleep(max(0.0, ready - time.monotonic()))
        return self._preadv(fd, buffers, offset, *flags)

    def _advise(self, fd: int, offset: int, count: int, advice: int) -> None:
        if (name := self._name(fd)) is None:
            self._fadvise(fd, offset, count, advice)
        elif advice == os.POSIX_FADV_WILLNEED:
            self._request(name, offset, count)
        elif advice == os.POSIX_FADV_DONTNEED:
            with self._lock:
                for block in range(offset // BLOCK_BYTES, -(-(offset + count) // BLOCK_BYTES)):
                    self._blocks.pop((name, block), None)

    def _request(self, name: str, offset: int, count: int, *, is_asking: bool = False) -> float | None:
        """When all blocks of a range are here; those that are not are requested, unless one only asks (then None)."""
        with self._lock:
            wanted = [(name, block) for block in range(offset // BLOCK_BYTES, -(-(offset + count) // BLOCK_BYTES))]
            missing = [key for key in wanted if key not in self._blocks]
            if is_asking and missing:
                return None
            for key in missing:
                is_jump = self._end_of_last.get(name) != key[1]
                began = max(time.monotonic(), self._free_at)
                self._free_at = began + BLOCK_BYTES / self.bandwidth + (self.jump_s if is_jump else 0.0)
                self._blocks[key], self._end_of_last[name] = self._free_at, key[1] + 1
                self.num_bytes, self.num_jumps = self.num_bytes + BLOCK_BYTES, self.num_jumps + is_jump
            ready = max(self._blocks[key] for key in wanted)
            for key in wanted:
                self._blocks.move_to_end(key)
            while len(self._blocks) > self.max_blocks:
                self._blocks.popitem(last=False)
            return ready


def main() -> None:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="staging-benchmark-", dir=arguments.dir) as work:
        cache = Path(work) / "cache"
        write_cache(cache, arguments, SHARD_ROWS)
        files = sorted(cache.glob("*.pt"))
        num_bytes = sum(path.stat().st_size for path in files)
        print(
            f"{len(files)} shards, {format_bytes(num_bytes)}; {SHARDS_PER_EPOCH} an epoch; steps of {BATCH} images "
            f"at {arguments.images_per_second:g} images/s; storage: {arguments.bandwidth:g} MB/s, "
            f"{arguments.jump_ms:g} ms a jump; {arguments.memory:g} MB of memory"
        )
        num_epochs = 2 * len(files) // SHARDS_PER_EPOCH
        rows = {
            name: measure(cache, arguments, num_epochs, Path(work) / "stage" if name == "staged" else None)
            for name in ("from the cache", "staged")
        }
    print_table(rows, num_epochs)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--images_per_second", type=float, default=600.0, help="that the steps could take")
    parser.add_argument("--bandwidth", type=float, default=200.0, help="MB/s of the storage")
    parser.add_argument("--jump_ms", type=float, default=10.0, help="ms a request costs that does not go on")
    parser.add_argument("--memory", type=float, default=256.0, help="MB of the cache that stay in memory")
    parser.add_argument("--window_bytes", type=int, default=64 << 20, help="as in data_config.yaml")
    parser.add_argument("--tiny", action="store_true", help="2,048 images of 32 px")
    parser.add_argument("--dir", type=Path, default=None, help="where the data is written meanwhile")
    arguments = parser.parse_args()
    arguments.dtype = "uint8"
    if arguments.tiny:
        arguments.images, arguments.size, arguments.images_per_second = 2048, 32, 20_000.0
    return arguments


def measure(cache: Path, arguments: argparse.Namespace, num_epochs: int, stage: Path | None) -> list[dict]:
    """For each epoch: images/s, the share of the time spent waiting, bytes and jumps of the storage."""
    data = {"cache_dir": str(cache), "shards_per_epoch": SHARDS_PER_EPOCH, "window_bytes": arguments.window_bytes}
    if stage is not None:
        data["stage_dir"] = str(stage)
    train = {"batch_size": BATCH, "max_steps_per_epoch": None, "num_epochs": num_epochs}
    loader = build_pretraining_dataloader(data, train, raw=True)
    slow = SlowFolder(
        cache,
        bandwidth=arguments.bandwidth * 1e6,
        jump_s=arguments.jump_ms / 1e3,
        memory=int(arguments.memory * 1e6),
    )
    rows = []
    with slow:
        for epoch in range(num_epochs):
            loader.set_epoch(epoch)
            before = slow.num_bytes, slow.num_jumps
            began, waited, images = time.monotonic(), loader.wait_seconds, 0
            for batch in loader:
                images += len(batch)
                time.sleep(len(batch) / arguments.images_per_second)
            seconds = time.monotonic() - began
            rows.append({
                "images_per_second": images / seconds,
                "waiting": (loader.wait_seconds - waited) / seconds,
                "bytes": slow.num_bytes - before[0],
                "jumps": slow.num_jumps - before[1],
            })  # fmt: skip
        loader.close()
    return rows


def print_table(rows: dict[str, list[dict]], num_epochs: int) -> None:
    """The two ways side by side: the first epoch, the rest of the first pass over the shards, the second pass."""
    half = num_epochs // 2
    parts = {
        "first epoch": (0, 1),
        f"epochs 2 to {half}": (1, half),
        f"epochs {half + 1} to {num_epochs}": (half, num_epochs),
    }
    print(f"{'':18}{'':18}{'images/s':>10}{'waiting':>10}{'MB an epoch':>14}{'jumps an epoch':>17}")
    for part, (start, stop) in parts.items():
        for name, epochs in rows.items():
            mean = {key: sum(row[key] for row in epochs[start:stop]) / (stop - start) for key in epochs[0]}
            print(
                f"{part:18}{name:18}{mean['images_per_second']:10.0f}{mean['waiting']:10.0%}"
                f"{mean['bytes'] / 1e6:14.0f}{mean['jumps']:17.0f}"
            )


if __name__ == "__main__":
    main()
