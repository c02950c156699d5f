"""A shard's file as it is written: its bytes pass by once, in order, and are hashed on their way to the disk."""

import errno
import math
import os

import numpy as np
import xxhash

from distillery.cache.archive import DTYPES, PAYLOAD_OFFSET, crc32, payload_header, shard_tail
from distillery.system.direct_io import ALIGNMENT_BYTES, bypass_page_cache, drop_written, start_writeback
from distillery.system.files import pwrite_all

# small enough for a core's cache: the bytes are fetched once and looked at twice
_DIGEST_BYTES = 512 << 10
# so far behind the newest bytes those lie that the disk has taken by now
_WRITEBACK_BYTES = 64 << 20


def gap_before(payload_position: int) -> int:
    """How many bytes from a page's beginning the payload's byte number `payload_position` lies in the file."""
    return (PAYLOAD_OFFSET + payload_position) % ALIGNMENT_BYTES


class PayloadWriter:
    """Writes a shard's file, and takes the CRC-32 of its payload and the hash of the file from memory meanwhile.

    Whole pages are written past the page cache where the file system can: a copy there costs as much as storing the
    image, and pushes out what others need. What is less than a page waits for the bytes that follow it.

    Args:
        fd: an empty file, open for writing.
        is_direct: False on network file systems, which answer each such write only when the server has it.
    """

    def __init__(self, fd: int, *, is_direct: bool = True) -> None:
        self._fd, self._rest, self._position = fd, payload_header(), 0
        self._file_hash, self._crc = xxhash.xxh3_128(self._rest), 0
        self._is_direct = is_direct and bypass_page_cache(fd, True)
        self._error: OSError | None = None

    def write(self, memory: memoryview) -> None:
        """Take in the next bytes of the payload.

        Args:
            memory: writable, the beginning of a page of memory; its first gap_before(position) bytes are used here, the
                payload follows.

        Raises:
            OSError: it could not be written; the file is of no use any more.
        """
        self._check_no_error()
        gap = len(self._rest)
        for start in range(gap, len(memory), _DIGEST_BYTES):
            piece = memory[start : start + _DIGEST_BYTES]
            self._crc = crc32(piece, self._crc)
            self._file_hash.update(piece)
        memory[:gap] = self._rest
        whole = len(memory) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        try:
            self._put(memory[:whole])
        except OSError as error:
            self._error = error
            raise
        self._rest = bytes(memory[whole:])
        self._position += whole

    def _check_no_error(self) -> None:
        """Bytes that could not be written are missing in this file for good: nothing may follow them."""
        if self._error is not None:
            raise self._error

    def _put(self, pages: memoryview) -> None:
        if self._is_direct:
            try:
                pwrite_all(self._fd, pages, self._position)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # it wants larger pages, or wrote a part of one: all of it once more
                self._is_direct = bypass_page_cache(self._fd, False)
        pwrite_all(self._fd, pages, self._position)
        start_writeback(self._fd, self._position, len(pages))
        drop_written(self._fd, self._position - _WRITEBACK_BYTES)

    def finish(
        self, dtype: str, shape: tuple[int, ...], valid: np.ndarray, labels: np.ndarray | None, meta: str
    ) -> tuple[int, str]:
        """Write what follows the payload, which is `shape` rows of `dtype`. Does not fsync.

        Returns:
            (size of the file in bytes, its hash "xxh3_128:<hex>").

        Raises:
            OSError: another program truncated the file meanwhile.
        """
        self._check_no_error()
        end = PAYLOAD_OFFSET + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        assert self._position + len(self._rest) == end, f"{self._position + len(self._rest)} bytes instead of {end}"
        if (size := os.fstat(self._fd).st_size) < self._position:
            raise OSError(errno.EIO, f"the file ends at byte {size} of {self._position}: another program truncated it")
        bypass_page_cache(self._fd, False)
        tail = shard_tail(self._crc, dtype, shape, valid, labels, meta)
        self._file_hash.update(tail)
        pwrite_all(self._fd, self._rest + tail, self._position)
        os.ftruncate(self._fd, end + len(tail))
        return end + len(tail), f"xxh3_128:{self._file_hash.hexdigest()}"
