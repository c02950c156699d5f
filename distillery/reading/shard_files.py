"""Read rows of shards from their files into the caller's memory, without unpickling and without a second copy.

Reads use preadv by default. A mapping has two risks: a mapped file that shrinks may kill the process (SIGBUS), and page
faults make a mapping many times slower than reads on Lustre and NFS. A mapping pays off where the files are local and
in memory: the copy then needs no system call. Both release the GIL, so threads suffice. The threads and the memory they
fill are in distillery/reading/stream.py.
"""

import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import xxhash

from distillery.cache.folder import ShardLayout, load_shard_layout
from distillery.cache.index import CacheIndex
from distillery.reading.open_shard import Copies, OpenShard
from distillery.system.errors import MissingFileError, RunError, UserError, stage1_command
from distillery.system.files import open_regular

VERIFY_MODES = ("first", "always", "never")
READ_MODES = ("pread", "mmap")
_MAX_SEGMENT_ROWS = 512  # of one preadv; the system's limit is 1024 buffers
_MAX_LAYOUT_ROWS = 8 << 20  # rows of the shard layouts kept in memory: 9 bytes each, 17 of encoded ones
_ADVICE_BYTES = 128 << 10  # the kernel cuts longer advice to the device's read-ahead
_SAMPLED_RUNS = 8  # of a window: when they are all in memory, the others are taken to be there too
_PRESENCE_CHECK_S = 1.0

_all_files: weakref.WeakSet["ShardFiles"] = weakref.WeakSet()


# a thread that is not there in the child may have held a lock when the process was forked
os.register_at_fork(after_in_child=lambda: [files._reset() for files in list(_all_files)])


class ShardFiles:
    """The rows of a cache's shards. Threads may share one; a copy in another process opens the files for itself.

    Args:
        index: the cache.
        verify: "first": each row's checksum is compared when this process first reads it; "always"; "never". The
            predecessor's caches have no checksums.
        max_open: shards open at a time; None: 512, or a quarter of what the process may open.
        mode: "pread", or "mmap": faster for files that are local and in memory. The file's size is looked at before
            every copy from the mapping, but one cut short during the copy kills the process.

    copies: where copies of the shards are looked for before the cache is read. A copy that cannot be read, or has a
    damaged row, is rejected, and the same rows are read from the cache.

    Errors of every reading method:
        MissingFileError: the shard is gone. UserError: it is damaged, shrank, or is not the one the index lists.
        RunError: the system could not read it. All name the file, and the row where there is one.
    """

    def __init__(
        self, index: CacheIndex, *, verify: str = "first", max_open: int | None = None, mode: str = "pread"
    ) -> None:
        for name, value, known in (("verify", verify, VERIFY_MODES), ("mode", mode, READ_MODES)):
            if value not in known:
                raise UserError(f"{name} {value!r}: expected one of {', '.join(known)}.")
        self.index, self.verify, self.max_open, self.mode = index, verify, max_open, mode
        self.copies: Copies | None = None
        self._reset()
        _all_files.add(self)

    def _reset(self) -> None:
        self.row_bytes = self.index.row_bytes
        # reentrant: while it is held, memory may be freed, and with it a loader whose end takes it too
        self._lock = threading.RLock()
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._layouts: OrderedDict[int, ShardLayout] = OrderedDict()
        self._layout_rows = 0
        self._first_bit = np.concatenate([[0], np.cumsum(self.index.shard_rows)])
        self._checked = np.zeros(int(self._first_bit[-1]) // 8 + 1, np.uint8)
        self._open_limit = self.max_open or min(512, _descriptor_limit() // 4)
        self.reading: dict[int, tuple[str, float]] = {}

    def __getstate__(self) -> dict:
        return {"index": self.index, "verify": self.verify, "max_open": self.max_open, "mode": self.mode}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.copies = None
        self._reset()
        _all_files.add(self)

    def layout(self, shard: int) -> ShardLayout:
        """Where the shard's rows are, from memory when it was read lately."""
        with self._lock:
            if (layout := self._layouts.get(shard)) is not None:
                self._layouts.move_to_end(shard)
                return layout
        layout = self._load_layout(shard)
        with self._lock:
            if shard not in self._layouts:
                self._layouts[shard] = layout
                self._layout_rows += len(layout.valid)
            while self._layout_rows > _MAX_LAYOUT_ROWS and len(self._layouts) > 1:
                self._layout_rows -= len(self._layouts.popitem(last=False)[1].valid)
        return layout

    def local_rows(self, shards: np.ndarray, nth: np.ndarray) -> np.ndarray:
        """int64 [n]: the row in its shard of the nth valid one, counted from 0."""
        gappy = self.index.shard_failed[shards] > 0
        if not gappy.any():
            return nth
        local = nth.copy()
        for shard in np.unique(shards[gappy]).tolist():
            wanted = shards == shard
            valid = np.flatnonzero(self.layout(shard).valid)
            if len(valid) != self.index.shard_rows[shard] - self.index.shard_failed[shard]:
                raise UserError(f"{self._path(shard)}: its failed rows are not those of index.json. {self._advice()}")
            local[wanted] = valid[nth[wanted]]
        return local

    def read(self, shards: np.ndarray, local: np.ndarray, out: np.ndarray) -> None:
        """Read n rows, in any order.

        Args:
            shards: int64 [n], positions in the index.
            local: int64 [n], rows in the shard.
            out: uint8 [n, row_bytes], contiguous; row i gets the bytes of (shards[i], local[i]).
        """
        memory, row_bytes = memoryview(out).cast("B"), self.row_bytes

        def memory_of(layout: ShardLayout, first: int, places: list[int]) -> list[memoryview]:
            return [memory[place * row_bytes : (place + 1) * row_bytes] for place in places]

        self._read_runs(shards, local, memory_of)

    def _read_runs(
        self,
        shards: np.ndarray,
        local: np.ndarray,
        memory_of: Callable[[ShardLayout, int, list[int]], list[memoryview]],
    ) -> None:
        """Read n rows, int64 [n] each, in the order of the files.

        memory_of: gives memory for rows that follow each other in a shard: of (the shard's layout, the first of these
            rows, the place of each among the n).
        """
        order = np.lexsort((local, shards))
        shards, local = shards[order], local[order]
        unchecked = self._unchecked(shards, local)
        is_start = np.ones(len(order), bool)
        # rows that follow each other in a file are one call
        is_start[1:] = (shards[1:] != shards[:-1]) | (local[1:] != local[:-1] + 1)
        is_start[::_MAX_SEGMENT_ROWS] = True
        starts = np.flatnonzero(is_start)
        places = order.tolist()
        opened, thread, names, read_segment = None, threading.get_ident(), self.index.shard_names, self._read_segment
        is_from_cache = np.ones(len(order), bool)
        try:
            for start, stop, shard, first in zip(
                starts.tolist(), [*starts[1:].tolist(), len(order)], shards[starts].tolist(), local[starts].tolist(),
                strict=True,
            ):  # fmt: skip
                if opened is None or opened.shard != shard:
                    opened = self._opened(shard)
                self.reading[thread] = names[shard], time.monotonic()
                buffers = memory_of(opened.layout, first, places[start:stop])
                if opened.unchecked is not None:
                    if self._read_copy(opened, first, buffers):
                        is_from_cache[start:stop] = False
                        continue
                    opened = self._opened(shard)
                read_segment(opened, first, buffers)
                if unchecked is not None:
                    self._check(opened, first, buffers, unchecked[start:stop].tolist())
        finally:
            self.reading.pop(thread, None)
        if unchecked is not None:
            self._mark_checked(shards[is_from_cache], local[is_from_cache])

    def advise(self, shards: np.ndarray, local: np.ndarray, go_on: Callable[[], bool] = lambda: True) -> None:
        """Have the system read these rows into its page cache, in file order; costs little if they are there.

        Args:
            shards: int64 [n], positions in the index.
            local: int64 [n], rows in the shard.
            go_on: called between runs of rows; stop when it returns False.
        """
        order = np.lexsort((local, shards))
        shards, local = shards[order], local[order]
        starts = np.flatnonzero(np.r_[True, (shards[1:] != shards[:-1]) | (local[1:] != local[:-1] + 1)][: len(order)])
        runs = list(zip(shards[starts], local[starts], np.r_[starts[1:], len(order)] - starts, strict=True))
        samples = runs[:: max(1, len(runs) // _SAMPLED_RUNS)]
        if all(self._is_run_resident(*run) for run in samples):
            return
        for shard, first, count in runs:
            if not go_on():
                return
            if not self._is_run_resident(shard, first, count):
                opened, offset, end = self._place(shard, first, count)
                for position in range(offset, end, _ADVICE_BYTES):
                    os.posix_fadvise(opened.fd, position, min(_ADVICE_BYTES, end - position), os.POSIX_FADV_WILLNEED)

    def _offset(self, layout: ShardLayout, row: int) -> int:
        """The first byte of a row in its file; of as many as there are: the byte after the last one's."""
        return layout.payload_offset + row * self.row_bytes

    def _place(self, shard: int, first: int, count: int) -> tuple[OpenShard, int, int]:
        """The open shard, the first byte of a run of rows in it, and the byte after it."""
        opened = self._opened(int(shard))
        return opened, *(self._offset(opened.layout, int(row)) for row in (first, first + count))

    def _is_run_resident(self, shard: int, first: int, count: int) -> bool:
        """Whether the first and the last byte of a run of rows are in memory."""
        opened, offset, end = self._place(shard, first, count)
        probe = [bytearray(1)]
        return _is_resident(opened.fd, probe, offset) and _is_resident(opened.fd, probe, end - 1)

    def recheck_presence(self) -> None:
        """Let the next read of every open shard make sure that the file is still there."""
        with self._lock:
            for opened in self._open.values():
                opened.checked_at = 0.0

    def close_removed_copies(self) -> None:
        """Let go of copies that were removed: until then their bytes take room on the disk."""
        with self._lock:
            opened = list(self._open.values())
        for each in opened:
            if each.unchecked is not None and each.is_removed:
                self._forget(each)

    def _unchecked(self, shards: np.ndarray, local: np.ndarray) -> np.ndarray | None:
        """bool [n], rows whose checksum is to be compared; None: none of them."""
        if self.verify == "never" or not self.index.verified:
            return None
        if self.verify == "always":
            return np.ones(len(shards), bool)
        bits = self._first_bit[shards] + local
        unchecked = (self._checked[bits >> 3] >> (bits & 7).astype(np.uint8)) & 1 == 0
        return unchecked if unchecked.any() else None

    def _check(self, opened: OpenShard, first: int, buffers: list[memoryview], unchecked: list[bool]) -> None:
        layout = opened.layout
        for row, (buffer, is_unchecked) in enumerate(zip(buffers, unchecked, strict=True), start=first):
            if is_unchecked and xxhash.xxh3_64_intdigest(buffer) != layout.row_checksums[row]:
                raise UserError(
                    f"{self._path(opened.shard)}: {self._row_name(opened.shard, row)}, "
                    f"byte {self._offset(layout, row)}) is damaged: its checksum is not the one "
                    f"recorded when it was made. {self._advice()}"
                )

    def _read_copy(self, copy: OpenShard, first: int, buffers: list[memoryview]) -> bool:
        """Read rows from a shard's copy, and check them; False: it failed, and is rejected."""
        rows, copies = slice(first, first + len(buffers)), self.copies
        try:
            self._read_segment(copy, first, buffers)
            if self.verify != "never":
                self._check(copy, first, buffers, copy.unchecked[rows].tolist())
        except (UserError, RunError):
            if copies is not None:  # the loader may be closing
                copies.reject(copy.shard, "this copy cannot be read, or is damaged")
            self._forget(copy)
            return False
        if self.verify == "first":
            copy.unchecked[rows] = False
        return True

    def _mark_checked(self, shards: np.ndarray, local: np.ndarray) -> None:
        bits = self._first_bit[shards] + local
        with self._lock:
            np.bitwise_or.at(self._checked, bits >> 3, np.left_shift(1, bits & 7).astype(np.uint8))

    def _read_segment(self, opened: OpenShard, first: int, buffers: list[memoryview]) -> None:
        offset, end = (self._offset(opened.layout, row) for row in (first, first + len(buffers)))
        wanted = end - offset
        if opened.mapped is not None and os.fstat(opened.fd).st_size >= end:
            for buffer in buffers:
                np.copyto(np.frombuffer(buffer, np.uint8), opened.mapped[offset : offset + len(buffer)])
                offset += len(buffer)
            return
        try:
            count = os.preadv(opened.fd, buffers, offset)
            while count < wanted:
                # a read may stop short without an error (the 2 GiB limit); only a read of nothing is the file's end
                more = os.preadv(opened.fd, _tail_of(buffers, count), offset + count)
                if more == 0:
                    raise UserError(
                        f"{self._path(opened.shard)} ends at byte {offset + count}, inside row "
                        f"{first + _num_full(buffers, count)}: it was shortened while in use. {self._advice()}"
                    )
                count += more
        except OSError as error:
            raise RunError(
                f"{self._path(opened.shard)}: row {first} cannot be read: {os.strerror(error.errno or 0)}. "
                f"{self._advice()}"
            ) from error

    def _opened(self, shard: int) -> OpenShard:
        """The shard, opened when it was not; its presence is looked at again when the last look is a second old."""
        with self._lock:
            if (opened := self._open.get(shard)) is not None:
                self._open.move_to_end(shard)
        is_due = opened is not None and time.monotonic() - opened.checked_at > _PRESENCE_CHECK_S
        if is_due and self._has_moved(opened):
            self._forget(opened)
            opened = None
        if opened is None:
            opened = self._open_shard(shard)
            with self._lock:
                self._open[shard] = opened
                while len(self._open) > self._open_limit:
                    self._open.popitem(last=False)
        elif is_due:
            # a name that leads to another file is a shard that stage 1 replaced; the rows of the index are in ours
            if opened.is_removed and not self.index.shard_path(shard).exists():
                raise MissingFileError(f"{self._path(shard)} was removed while in use. Run: {self._command()}")
            opened.checked_at = time.monotonic()
        return opened

    def _has_moved(self, opened: OpenShard) -> bool:
        """Whether the copy that is open was removed, or the file of the cache that is open has a copy by now."""
        if opened.unchecked is not None:
            return opened.is_removed
        copies = self.copies
        return copies is not None and opened.layout.num_bytes is None and copies.has(opened.shard)

    def _forget(self, opened: OpenShard) -> None:
        with self._lock:
            if self._open.get(opened.shard) is opened:
                del self._open[opened.shard]

    def _open_copy(self, shard: int, layout: ShardLayout) -> OpenShard | None:
        # num_bytes: another shard is in the place of the one listed, and the layout is of that
        copies = self.copies
        fd = copies.open(shard) if copies is not None and layout.num_bytes is None else None
        if fd is None:
            return None
        copy = OpenShard(shard, fd, layout, is_copy=True)
        try:
            size = os.fstat(fd).st_size
            if size != self.index.shard_bytes[shard]:
                raise ValueError(f"it has {size} bytes, not {self.index.shard_bytes[shard]}")
            return self._mapped(copy)
        except (OSError, ValueError) as error:
            copies.reject(shard, getattr(error, "strerror", None) or str(error))
            return None

    def _open_shard(self, shard: int) -> OpenShard:
        layout = self.layout(shard)
        return self._open_copy(shard, layout) or self._mapped(self._open_listed(shard, layout))

    def _mapped(self, opened: OpenShard) -> OpenShard:
        """The same, which in mode mmap is mapped."""
        if self.mode == "mmap":
            opened.map_file()
        return opened

    def _open_listed(self, shard: int, layout: ShardLayout) -> OpenShard:
        path = self.index.shard_path(shard)
        try:
            with open_regular(path) as file:
                opened = OpenShard(shard, os.dup(file.fileno()), layout)
        except FileNotFoundError as error:
            raise MissingFileError(f"{path}: listed in the index, but not there. Run: {self._command()}") from error
        except OSError as error:
            raise RunError(f"{path}: cannot be opened: {os.strerror(error.errno or 0)}.") from error
        size, expected = os.fstat(opened.fd).st_size, int(self.index.shard_bytes[shard])
        if size != expected:
            # the layout may have been read before a longer shard came in this one's place
            opened.layout = self._load_layout(shard)
            if opened.layout.num_bytes != size:
                raise UserError(f"{path.name} has {size} bytes, index.json says {expected}. {self._advice()}")
        return opened

    def _load_layout(self, shard: int) -> ShardLayout:
        return load_shard_layout(self.index, shard)

    def _path(self, shard: int) -> str:
        return str(self.index.shard_path(shard))

    def _row_name(self, shard: int, row: int) -> str:
        return f"row {row} (global_idx {self.index.shard_starts[shard] + row}"

    def _command(self) -> str:
        return stage1_command()

    def _advice(self) -> str:
        return f"Run: python -m distillery.cache verify {self.index.directory}, then stage 1 again."


def _descriptor_limit() -> int:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return soft if soft > 0 else 1024


def _num_full(buffers: list[memoryview], count: int) -> int:
    """How many of the buffers the first `count` bytes fill."""
    return int(np.searchsorted(np.cumsum([len(buffer) for buffer in buffers]), count, side="right"))


def _tail_of(buffers: list[memoryview], skip: int) -> list[memoryview]:
    """The buffers without their first `skip` bytes."""
    tail = []
    for buffer in buffers:
        if skip < len(buffer):
            tail.append(buffer[skip:])
        skip = max(0, skip - len(buffer))
    return tail


def _is_resident(fd: int, probe: list[bytearray], offset: int) -> bool:
    try:
        return os.preadv(fd, probe, offset, os.RWF_NOWAIT) == 1
    except OSError:  # not in memory, or a file system that cannot tell
        return False
