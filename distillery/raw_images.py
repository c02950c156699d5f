"""Images decoded while training, for when there is no cache: the same order and streams, at the decoder's speed.

An image that cannot be decoded moves nothing: in its place comes the next one of the source that can, under its own
index. Each such image is reported once, and more of them than max_failed_fraction end the run.
"""

import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distillery.preprocess import DecodeError, PreprocessSpec, normalisation_table, normalise_into, preprocess_image
from distillery.process import UserError

# encoded images are small: rows per read and per mixed window, instead of bytes
RUN_ROWS, WINDOW_RUNS = 64, 32
_FEW_FAILURES = 10


class ImageDecoder:
    """Images of a source by their index.

    Args:
        source: read(start, stop) -> list[bytes] of encoded images; describe() -> str.
        spec: how pixels are made of them.
        num_rows: images of the source that are used, the first so many.
        max_failed_fraction: share of num_rows, 0..1; a few failures are always allowed.
    """

    def __init__(self, source: Any, spec: PreprocessSpec, num_rows: int, max_failed_fraction: float) -> None:
        self.source, self.spec, self.num_rows = source, spec, num_rows
        self.max_failed_fraction = max_failed_fraction
        self.failed: dict[int, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> list[bytes]:
        """The encoded images start..stop-1, one reader at a time: a source is not made for several threads."""
        with self._lock:
            return self.source.read(start, stop)

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
                    encoded = self.read(global_idx, global_idx + 1)[0] if data is None else data
                    return preprocess_image(encoded, self.spec), global_idx
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

    Encoded images are read in the order of the source, window by window, by one thread; many threads decode them.

    Args:
        decoder: gives the images.
        shard_rows: images that count as one shard, as a cache would have them.
        raw: uint8 pixels; else normalised float32.
    """

    def __init__(self, decoder: ImageDecoder, shard_rows: int, *, raw: bool) -> None:
        self.decoder, self.shard_rows, self.raw = decoder, shard_rows, raw
        self.dtype = torch.uint8 if raw else torch.float32
        size = decoder.spec.image_size
        self.shape = (3, size, size)
        self.row_bytes = 3 * size * size * self.dtype.itemsize
        self.reading: dict[int, tuple[str, float]] = {}
        self._table = normalisation_table(decoder.spec.mean, decoder.spec.std, "float32")
        self._encoded: dict[int, bytes] = {}
        self._arrived = threading.Condition()
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
        """Read the encoded images of a window, run by run, in the order of the source."""
        rows = np.sort(shards * self.shard_rows + nth)
        edges = np.flatnonzero(np.diff(rows) != 1) + 1
        thread = threading.get_ident()
        try:
            for run in np.split(rows, edges):
                for start in range(0, len(run), RUN_ROWS):
                    part = run[start : start + RUN_ROWS].tolist()
                    if not go_on():
                        raise InterruptedError("the stream was closed")
                    self.reading[thread] = (self.decoder.source.describe(), time.monotonic())
                    encoded = self.decoder.read(part[0], part[-1] + 1)
                    self.reading.pop(thread, None)
                    with self._arrived:
                        self._encoded.update(zip(part, encoded, strict=True))
                        self._arrived.notify_all()
        except BaseException as error:
            with self._arrived:
                self._problem = error
                self._arrived.notify_all()
            raise

    def _take(self, row: int) -> bytes:
        with self._arrived:
            self._arrived.wait_for(lambda: row in self._encoded or self._problem is not None)
            if row not in self._encoded:
                raise self._problem
            return self._encoded.pop(row)
