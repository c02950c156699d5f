"""Images decoded during training, when there is no cache: same order and streams, at the decoder's speed.

PretrainDataset returns images one by one, RawRows in a loader's batches. Both decode with an ImageDecoder.

An image that cannot be decoded does not shift the others. The next image of the source that can be decoded takes its
place, with its own index. The loader reports each such image once. More of them than max_failed_fraction end the run.
"""

import contextlib
import copy
import itertools
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from distillery.config.load import load_data_config
from distillery.reading.datasets import checked_rows
from distillery.sources.pixels import DecodeError, PreprocessSpec, normalisation_table, normalise_into, preprocess_image
from distillery.sources.registry import open_source
from distillery.system import distributed
from distillery.system.errors import UserError

# encoded images that wait to be decoded; a window that holds more is read in parts of about so many bytes
_WAITING_BYTES = 256 << 20
# rows of the first part, whose bytes are not known yet
_FIRST_ROWS = 256
_TOGETHER = 64  # neighbours read at a time
_POLL_S = 0.25
_FEW_FAILURES = 10
Read = Callable[[range], list[bytes]]


def pieces_of(rows: np.ndarray) -> list[range]:
    """Ascending rows, int64 [n], as runs of neighbours that are read at a time."""
    runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
    edges = [(start, int(run[-1]) + 1) for run in runs for start in run[::_TOGETHER].tolist()]
    return [range(start, min(start + _TOGETHER, end)) for start, end in edges]


class ImageDecoder:
    """Images of a source by their index, for several threads at a time.

    reading: per thread, what it is reading and since when (time.monotonic).

    Args:
        source: read(start, stop) -> list[bytes] of encoded images, for one thread at a time; copies open their own
            files; describe() -> str.
        spec: how pixels are made of them.
        num_rows: images of the source that are used, the first so many.
        max_failed_fraction: share of this process's images, 0..1; a few failures are always allowed.
    """

    def __init__(self, source: Any, spec: PreprocessSpec, num_rows: int, max_failed_fraction: float) -> None:
        self.source, self.spec, self.num_rows = source, spec, num_rows
        self.max_failed_fraction = max_failed_fraction
        self._table = normalisation_table(spec.mean, spec.std, "float32")
        self.failed: dict[int, str] = {}
        self.reading: dict[int, tuple[str, float]] = {}
        self._idle: deque[Any] = deque()

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_idle": deque(), "reading": {}}

    @contextlib.contextmanager
    def borrowed_source(self) -> Iterator[Read]:
        """A source for this thread alone, as the function that reads encoded images from it."""
        try:
            source = self._idle.pop()
        except IndexError:
            source = copy.copy(self.source)
        thread = threading.get_ident()

        def read(rows: range) -> list[bytes]:
            self.reading[thread] = (self.source.describe(), time.monotonic())
            try:
                return source.read(rows.start, rows.stop)
            finally:
                self.reading.pop(thread, None)

        try:
            yield read
        finally:
            self._idle.append(source)

    def decode(self, global_idx: int, data: bytes) -> tuple[np.ndarray, int]:
        """The image `global_idx`, or the next one that can be decoded: (uint8 [3, H, W], its index).

        Args:
            global_idx: in the source.
            data: its encoded bytes.

        Raises:
            UserError: too many images cannot be decoded.
        """
        for row in itertools.chain(range(global_idx, self.num_rows), range(global_idx)):
            if row in self.failed:
                continue
            try:
                if row != global_idx:
                    with self.borrowed_source() as read:
                        [data] = read(range(row, row + 1))
                return preprocess_image(data, self.spec), row
            except DecodeError as error:
                self._note_failure(row, str(error))
        raise self._too_many()

    def normalise(self, pixels: np.ndarray, out: np.ndarray) -> None:
        """Pixels of decode as normalised float32 [3, H, W] into out."""
        normalise_into(pixels, self._table, out)

    def _note_failure(self, global_idx: int, reason: str) -> None:
        self.failed[global_idx] = reason
        count = len(self.failed)
        if count <= _FEW_FAILURES:
            print(f"image {global_idx} cannot be decoded ({reason}); the next one takes its place", file=sys.stderr)
        # each process meets its share of the images, and of the bad ones
        most = self.max_failed_fraction * self.num_rows / distributed.world_size()
        if count > max(_FEW_FAILURES, most) or count == self.num_rows:
            raise self._too_many()

    def _too_many(self) -> UserError:
        global_idx, reason = list(self.failed.items())[-1]
        return UserError(
            f"{len(self.failed)} of {self.num_rows} images of {self.source.describe()} cannot be decoded, more than "
            f"max_failed_fraction ({self.max_failed_fraction:g}) allows; the last was image {global_idx}: {reason}."
        )


class PretrainDataset(Dataset):
    """The images of data_config's source, decoded on access: ds[i] is float32 [3, H, W], normalised.

    An image that cannot be decoded shifts no index: the next image that can be decoded takes its place. Each failure is
    reported; more failures than max_failed_fraction are an error.

    Args:
        data_config: dict (partial is fine: defaults fill in), DataConfig or path.
        transform: applied to every image.
    """

    def __init__(self, data_config: Any, transform: Callable[[Tensor], Any] | None = None) -> None:
        data = load_data_config(data_config, require_source=False)
        if data.dataset_name is None:
            raise UserError("data_config: dataset_name is required to read raw images")
        source = open_source(**data.source_arguments)
        num_rows = min(len(source), data.max_rows or len(source))
        self.transform = transform
        spec = PreprocessSpec(**data.preprocess_arguments)
        self.decoder = ImageDecoder(source, spec, num_rows, data.max_failed_fraction)
        starts = np.arange(0, num_rows, data.cache_shard_size)
        self.shard_rows = np.minimum(data.cache_shard_size, num_rows - starts)

    def __len__(self) -> int:
        return self.decoder.num_rows

    def __getitem__(self, i: int) -> Any:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The images `indices`, in that order."""
        # each once: a sampler with replacement may ask for one twice
        wanted, places = np.unique(checked_rows(indices, len(self)), return_inverse=True)
        unique = torch.empty((len(wanted), 3, self.decoder.spec.image_size, self.decoder.spec.image_size))
        with self.decoder.borrowed_source() as read:
            encoded = itertools.chain.from_iterable(map(read, pieces_of(wanted)))
            for row, data, out in zip(wanted.tolist(), encoded, unique, strict=True):
                self.decoder.normalise(self.decoder.decode(row, data)[0], out.numpy())
        images = unique[torch.from_numpy(places)]
        return list(images) if self.transform is None else [self.transform(image) for image in images]


class RawRows:
    """The images of a source in the form that BatchStream reads (stream.Rows); every stream makes a new one.

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
        self.reading = decoder.reading
        # by index: the encoded image, or the error that came instead of it
        self._encoded: dict[int, bytes | Exception] = {}
        self._part_rows, self._waiting_bytes = _FIRST_ROWS, 0
        lock = threading.Lock()
        self._arrived, self._taken = threading.Condition(lock), threading.Condition(lock)
        self._end: BaseException | None = None  # why no more images will come

    def fill(self, shards: np.ndarray, nth: np.ndarray, out: np.ndarray, global_idx: np.ndarray) -> None:
        """Images shards[i] * shard_rows + nth[i], int64 [n], into out, uint8 [n, row_bytes]; global_idx says which."""
        images = out.reshape(-1, *self.shape) if self.raw else out.view(np.float32).reshape(-1, *self.shape)
        for place, row in enumerate((shards * self.shard_rows + nth).tolist()):
            pixels, global_idx[place] = self.decoder.decode(row, self._take(row))
            if self.raw:
                images[place] = pixels
            else:
                self.decoder.normalise(pixels, images[place])

    def prepare(self, shards: np.ndarray, nth: np.ndarray, go_on: Callable[[], bool]) -> None:
        """Read the encoded images of a window, no further ahead of the decoders than memory is meant for."""
        rows = shards * self.shard_rows + nth
        try:
            while len(rows) and self._has_room(go_on):
                part, rows = np.sort(rows[: self._part_rows]), rows[self._part_rows :]
                num_bytes = sum(self._read_part(part, go_on))
                self._part_rows = min(4 * self._part_rows, int(_WAITING_BYTES * len(part) / max(1, num_bytes)) + 1)
        except BaseException as error:
            self._stop(error)
            raise

    def close(self) -> None:
        """Let go of all that waits; who is waiting for an image gets an error."""
        self._stop(InterruptedError("the stream was closed"))

    def _stop(self, reason: BaseException) -> None:
        with self._arrived:
            self._end = self._end or reason
            self._encoded.clear()
            self._arrived.notify_all()

    def _has_room(self, go_on: Callable[[], bool]) -> bool:
        """Wait until there is; False where the stream has ended meanwhile."""
        with self._taken:
            while go_on() and self._end is None:
                if self._waiting_bytes <= _WAITING_BYTES:
                    return True
                self._taken.wait(_POLL_S)
        return False

    def _read_part(self, rows: np.ndarray, go_on: Callable[[], bool]) -> list[int]:
        """Read ascending rows by several threads; the bytes that each has read."""
        read_bytes: list[int] = []

        def read_span(pieces: list[range]) -> None:
            try:
                with self.decoder.borrowed_source() as read:
                    read_bytes.append(sum(self._read_piece(read, piece) for piece in pieces if go_on()))
            except BaseException as error:
                self._stop(error)

        spans = np.array_split(rows, self.num_readers)
        # daemon: a thread stuck in a dead disk's read must not keep the process from ending
        threads = [threading.Thread(target=read_span, args=(pieces_of(span),), daemon=True) for span in spans]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return read_bytes

    def _read_piece(self, read: Read, rows: range) -> int:
        try:
            encoded: list[bytes | Exception] = [*read(rows)]
            num_bytes = sum(map(len, encoded))
        except Exception as error:  # for who needs one of these images; others can be read
            encoded, num_bytes = [error] * len(rows), 0
        with self._arrived:
            if self._end is None:
                self._encoded.update(zip(rows, encoded, strict=True))
                self._waiting_bytes += num_bytes
                self._arrived.notify_all()
        return num_bytes

    def _take(self, row: int) -> bytes:
        with self._arrived:
            self._arrived.wait_for(lambda: row in self._encoded or self._end is not None)
            if row not in self._encoded:
                raise self._end
            encoded = self._encoded.pop(row)
            if isinstance(encoded, Exception):
                raise encoded
            self._waiting_bytes -= len(encoded)
            self._taken.notify()
            return encoded
