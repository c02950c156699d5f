"""One image shard while it is written: what is known about its rows, and the writer of its bytes."""

import errno
import json
import mmap
import os
from collections.abc import Mapping, Sequence

import numpy as np
import xxhash

from distillery.cache.archive import PAYLOAD_OFFSET, crc32, payload_header
from distillery.cache.encoded import encode_row_sizes
from distillery.cache.fields import Field, frame_of
from distillery.cache.images import encode_sizes, image_fields, small_tensors
from distillery.cache.plan import CachePlan
from distillery.cache.store import encode_checksums
from distillery.precompute.loop import OpenShard, ShardLoop
from distillery.precompute.worker import UnitResult
from distillery.sources.masks import MASK_DTYPES
from distillery.sources.pixels import library_versions
from distillery.system.direct_io import ALIGNMENT_BYTES, bypass_page_cache, drop_written, start_writeback
from distillery.system.files import pwrite_all
from distillery.system.machine import is_network_file_system

# small enough for a core's cache: the bytes are fetched once and looked at twice
_DIGEST_BYTES = 512 << 10
# so far behind the newest bytes those lie that the disk has taken by now
_WRITEBACK_BYTES = 64 << 20


class OpenImageShard(OpenShard):
    """A shard of images in the making, and what the decode workers reported of its rows.

    Args:
        loop, shard_idx: as OpenShard.
        labels: int64 [N] or None.
        class_names: the classes by label, where the source knows them.
    """

    plan: CachePlan

    def __init__(
        self,
        loop: ShardLoop,
        shard_idx: int,
        labels: np.ndarray | None,
        class_names: Sequence[str] | None = None,
    ) -> None:
        start, stop = loop.plan.rows_of(shard_idx)
        # nobody knows before how many bytes encoded rows take: no room is set aside for them
        payload_bytes = 0 if loop.plan.image_bytes is None else (stop - start) * loop.plan.row_bytes
        super().__init__(loop, shard_idx, PAYLOAD_OFFSET + payload_bytes)
        self.labels, self.class_names = labels, _names_of(labels, class_names)
        self.rows_left = self.num_rows
        self.checksums = np.zeros(self.num_rows, np.uint64)
        self.source_sizes = np.zeros((self.num_rows, 2), np.uint32)
        self.failures: list[tuple[int, str]] = []
        self.row_sizes = None if self.plan.encoding is None else np.zeros(self.num_rows, np.int64)
        self.masks: np.ndarray | None = None
        if self.plan.mask_dtype is not None:
            self.masks = np.zeros((self.num_rows, *self.plan.image_shape[1:]), MASK_DTYPES[self.plan.mask_dtype])
        self.mask_checksums, self.mask_classes = np.zeros(self.num_rows, np.uint64), set()
        self.payload = PayloadWriter(self.fd, is_direct=not is_network_file_system(self.path))

    def note(self, result: UnitResult) -> None:
        """Take in what a decode worker says of its rows."""
        rows = slice(result.first_row, result.first_row + len(result.checksums))
        self.checksums[rows], self.source_sizes[rows] = result.checksums, result.source_sizes
        self.failures += result.failures
        if self.row_sizes is not None:
            self.row_sizes[rows] = result.row_sizes
        if self.masks is not None:
            self.masks[rows], self.mask_checksums[rows] = result.masks.rows, result.masks.checksums
            self.mask_classes |= result.masks.classes
        self.rows_left -= len(result.checksums)

    def meta(self) -> dict:
        """All the record says except the file's own size and hash."""
        failures = [
            {"global_idx": self.start + row, "shard_idx": self.shard_idx, "reason": reason}
            for row, reason in sorted(self.failures)
        ]
        return super().meta() | {
            "num_failed": len(failures),
            "failures": failures,
            "source_num_samples": self.plan.source_num_samples,
            "dtype": self.plan.dtype,
            "image_shape": list(self.plan.image_shape),
            "payload_offset": PAYLOAD_OFFSET,
            "row_checksums": encode_checksums(self.checksums),
            **({} if self.row_sizes is None else {"row_sizes": encode_row_sizes(self.row_sizes)}),
            "source_sizes": encode_sizes(self.source_sizes),
            "libraries": library_versions(),
            **({"class_names": self.class_names} if self.class_names else {}),
            **(self._meta_of_masks() if self.masks is not None else {}),
        }

    def _meta_of_masks(self) -> dict:
        return {
            "mask_dtype": self.plan.mask_dtype,
            "mask_classes": sorted(self.mask_classes),
            "mask_checksums": encode_checksums(self.mask_checksums),
        }

    def publish(self) -> None:
        """Complete the file and publish it."""
        meta = self.meta()
        valid = np.ones(self.num_rows, dtype=bool)
        valid[[row for row, _ in self.failures]] = False
        fields = image_fields(meta)
        small = small_tensors(valid, self.labels, self.row_sizes)
        size, digest = self.payload.finish(fields, small, json.dumps(meta, sort_keys=True), masks=self.masks)
        self.masks = None
        self.publish_file(meta | {"bytes": size, "hash": digest})


def _names_of(labels: np.ndarray | None, class_names: Sequence[str] | None) -> dict[str, str]:
    """label -> name of the classes that a shard holds; JSON has only texts as keys."""
    if labels is None or class_names is None:
        return {}
    return {str(number): class_names[number] for number in np.unique(labels).tolist() if 0 <= number < len(class_names)}


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
        self._buffer = memoryview(b"")

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

    def append(self, data: bytes | memoryview) -> None:
        """Take in the next bytes of the payload, of any length and from any memory.

        Raises:
            OSError: as write().
        """
        gap = len(self._rest)
        if len(self._buffer) < gap + len(data):
            # a page's beginning, as writes past the page cache need it
            self._buffer = memoryview(mmap.mmap(-1, gap + len(data)))
        self._buffer[gap : gap + len(data)] = data
        self.write(self._buffer[: gap + len(data)])

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
                # the file system needs larger pages, or wrote part of one: write everything again
                self._is_direct = bypass_page_cache(self._fd, False)
        pwrite_all(self._fd, pages, self._position)
        start_writeback(self._fd, self._position, len(pages))
        drop_written(self._fd, self._position - _WRITEBACK_BYTES)

    def finish(
        self,
        fields: list[Field],
        small: Mapping[str, np.ndarray],
        meta: str,
        *,
        masks: np.ndarray | None = None,
    ) -> tuple[int, str]:
        """Write what follows the payload: the masks, then all else. Does not fsync.

        Args:
            fields: the big tensors: the payload, and where there are masks, theirs.
            small: the tensors that follow, by small_tensors.
            meta: the shard's description of itself.
            masks: [N, H, W] of a dtype of MASK_DTYPES, contiguous, or None.
        Returns:
            (size of the file in bytes, its hash "xxh3_128:<hex>").

        Raises:
            OSError: another program truncated the file meanwhile.
        """
        self._check_no_error()
        end = fields[0].end
        assert self._position + len(self._rest) == end, f"{self._position + len(self._rest)} bytes instead of {end}"
        if (size := os.fstat(self._fd).st_size) < self._position:
            raise OSError(errno.EIO, f"the file ends at byte {size} of {self._position}: another program truncated it")
        bypass_page_cache(self._fd, False)
        crcs = [self._crc, *([] if masks is None else [crc32(masks)])]
        _, (_, after_images), *after_masks = frame_of(fields, crcs, small, meta)
        self._file_hash.update(after_images)
        pwrite_all(self._fd, self._rest + after_images, self._position)
        end += len(after_images)
        for piece in [] if masks is None else [memoryview(masks).cast("B"), after_masks[0][1]]:
            self._file_hash.update(piece)
            pwrite_all(self._fd, piece, end)
            end += len(piece)
        os.ftruncate(self._fd, end)
        return end, f"xxh3_128:{self._file_hash.hexdigest()}"
