"""One open file with a shard's rows: the cache's own, or a copy of it on a faster disk."""

import mmap
import os
import time
from collections.abc import Callable
from typing import Protocol

import numpy as np

from distillery.cache.folder import ShardLayout


class Copies(Protocol):
    """Copies of shards on a faster disk (distillery/reading/copies.py)."""

    def open(self, shard: int) -> int | None:
        """A descriptor of a shard's copy, of the size that the index lists; None where there is none to use."""

    def has(self, shard: int) -> bool:
        """Whether open() would give a descriptor."""

    def reject(self, shard: int, reason: str) -> None:
        """Give this copy to nobody any more."""


class OpenShard:
    """A shard's descriptor; it is closed when the last thread that uses it lets go, never under a running read.

    mapped: the whole file, uint8 [bytes], where it is read through a mapping. unchecked: of a copy: bool [N], rows that
    were not compared with their checksums since it was opened; None: this is the cache's own file.
    """

    def __init__(self, shard: int, fd: int, layout: ShardLayout, *, is_copy: bool = False) -> None:
        self.shard, self.fd, self.layout = shard, fd, layout
        self.checked_at = time.monotonic()
        self.mapped: np.ndarray | None = None
        self.unchecked = np.ones(len(layout.valid), bool) if is_copy else None

    @property
    def is_removed(self) -> bool:
        """Whether the file has no name any more."""
        return os.fstat(self.fd).st_nlink == 0

    def map_file(self) -> None:
        """Map the file; its size has been compared with the index before."""
        self.mapped = np.frombuffer(mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ), np.uint8)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.fd)  # bound before: `os` may be gone when the interpreter ends
