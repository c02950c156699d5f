"""Images decoded while training, for when there is no cache: the cache's order and streams, at the decoder's speed.

An image that cannot be decoded moves nothing: in its place comes the next one of the source that can, under its own
index. Each such image is reported once, and more of them than max_failed_fraction end the run.
"""

import copy
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from distillery.preprocess import DecodeError, PreprocessSpec, normalisation_table, normalise_into, preprocess_image
from distillery.process import UserError

# encoded images that wait to be decoded; a window that holds more is read in parts of about so many bytes
_WAITING_BYTES = 256 << 20
_TOGETHER = 64  # neighbours read at a time
_POLL_S = 0.25
_FEW_FAILURES = 10


class ImageDecoder:
    """Images of a source by their index, for several threads at a time.

    Args:
        source: read(start, stop) -> list[bytes] of encoded images, for one thread at a time; copies open their own
            files; mean_bytes; describe() -> str.
        spec: how pixels are made of them.
        num_rows: images of the source that are used, the first so many.
        max_failed_fraction: share of num_rows, 0..1; a few failures are always allowed.
    """

    def __init__(self, source: Any, spec: PreprocessSpec, num_rows: int, max_failed_fraction: float) -> None:
        self.source, self.spec, self.num_rows = source, spec, num_rows
        self.max_failed_fraction = max_failed_fraction
        self.failed: dict[int, str] = {}
        self._idle: deque[Any] = deque()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_idle": deque()}

    def read(self, rows: np.ndarray) -> Iterator[list[tuple[int, bytes]]]:
        """Encoded images with their indices, some neighbours at a time; rows: int64 [n], ascending."""
        try:
            source = self._idle.pop()
        except IndexError:
            source = copy.copy(self.source)
        try:
            for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                for start in range(0, len(run), _TOGETHER):
                    part = run[start : start + _TOGETHER].tolist()
                    yield list(zip(part, source.read(part[0], part[-1] + 1), strict=True))
        finally:
            self._idle.append(source)

    def decode(self, global_idx: int, data: bytes | None = None) -> tuple[np.ndarray, int]:
        """The image `global_idx`, or the next one that can be decoded: (uint8 [3, H, W], its index).

        Args:
            global_idx: in the source.
            data: its encoded bytes, when they are at hand.

        Raises:
            UserError: too many images cannot be decoded.
        """
        while True:
            if global_idx not in self.failed:
                try:
                    if data is None:
                        [(_, data)] = next(self.read(np.array([global_idx])))
                    return preprocess_image(data, self.spec), global_idx
                except DecodeError as error:
                    self._note_failure(global_idx, str(error))
            global_idx, data = (global_idx + 1) % self.num_rows, None

    def _note_failure(self, global_idx: int, reason: str) -> None:
        self.failed[global_idx] = reason
        count = len(self.failed)
        if count <= _FEW_FAILURES:
            print(f"image {global_idx} cannot be decoded ({reason}); the next one takes its place", file=sys.stderr)
        if count > max(_FEW_FAILURES, self.max_failed_fraction * self.num_rows) or count == self.num_rows:
            raise UserError(
                f"{count} of {self.num_rows} images of {self.source.describe()} cannot be decoded, more than "
                f"max_failed_fraction ({self.max_failed_fraction:g}) allows; the last was image {global_idx}: {reason}."
            )


class RawRows:
    """The images of a source as a stream of batches asks for them (stream.Rows); made anew for every stream.

    Encoded images are read in parts that follow each other in the order of training, each part in the order of the
    source, by a few threads; many threads decode them.

    Args:
        decoder: gives the images.
        shard_rows: images that count as one shard, as a cache would have them.
        raw: uint8 pixels; else normalised float32.
        num_readers: parts of the source read at a time.
    """

    def __init__(self, decoder: ImageDecoder, shard_rows: int, *, raw: bool, num_readers: int) -> None:
        self.decoder, self.shard_rows, self.raw, self.num_readers = decoder, shard_rows, raw, num_readers
        self.dtype = torch.uint8 if raw else torch.float32
        size = decoder.spec.image_size
        self.shape = (3, size, size)
        self.row_bytes = 3 * size * size * self.dtype.itemsize
        self.reading: dict[int, tuple[str, float]] = {}
        self._table = normalisation_table(decoder.spec.mean, decoder.spec.std, "float32")
        self._part_rows = max(1, int(_WAITING_BYTES / decoder.source.mean_bytes))
        self._encoded: dict[int, bytes] = {}
        self._encoded_bytes = 0
        lock = threading.Lock()
        self._arrived, self._taken = threading.Condition(lock), threading.Condition(lock)
        self._problem: BaseException | None = None

    def fill(self, shards: np.ndarray, nth: np.ndarray, out: np.ndarray, global_idx: np.ndarray) -> None:
        """Images shards[i] * shard_rows + nth[i], int64 [n], into out, uint8 [n, row_bytes]; global_idx says which."""
        images = out.reshape(-1, *self.shape) if self.raw else out.view(np.float32).reshape(-1, *self.shape)
        for place, row in enumerate((shards * self.shard_rows + nth).tolist()):
            pixels, global_idx[place] = self.decoder.decode(row, self._take(row))
            if self.raw:
                images[place] = pixels
            else:
                normalise_into(pixels, self._table, images[place])

    def prepare(self, shards: np.ndarray, nth: np.ndarray, go_on: Callable[[], bool]) -> None:
        """Read the encoded images of a window, no further ahead of the decoders than memory is meant for."""
        rows = shards * self.shard_rows + nth
        for start in range(0, len(rows), self._part_rows):
            self._wait_for_room(go_on)
            spans = np.array_split(np.sort(rows[start : start + self._part_rows]), self.num_readers)
            # daemon: a thread stuck in a dead disk's read must not keep the process from ending
            threads = [threading.Thread(target=self._read, args=(span, go_on), daemon=True) for span in spans]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if self._problem is not None:
                raise self._problem

    def _wait_for_room(self, go_on: Callable[[], bool]) -> None:
        with self._taken:
            while self._encoded_bytes > _WAITING_BYTES and go_on():
                self._taken.wait(_POLL_S)

    def _read(self, rows: np.ndarray, go_on: Callable[[], bool]) -> None:
        thread, parts = threading.get_ident(), self.decoder.read(rows)
        try:
            while True:
                if not go_on():
                    raise InterruptedError("the stream was closed")
                self.reading[thread] = (self.decoder.source.describe(), time.monotonic())
                part = next(parts, None)
                if part is None:
                    return
                with self._arrived:
                    self._encoded.update(part)
                    self._encoded_bytes += sum(len(encoded) for _, encoded in part)
                    self._arrived.notify_all()
        except BaseException as error:
            with self._arrived:
                self._problem = error
                self._arrived.notify_all()
        finally:
            parts.close()
            self.reading.pop(thread, None)

    def _take(self, row: int) -> bytes:
        with self._arrived:
            self._arrived.wait_for(lambda: row in self._encoded or self._problem is not None)
            if row not in self._encoded:
                raise self._problem
            encoded = self._encoded.pop(row)
            self._encoded_bytes -= len(encoded)
            self._taken.notify()
            return encoded
