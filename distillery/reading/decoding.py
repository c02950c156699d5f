"""Decode the rows of a compressed cache: whole images, or only the part of an image that a view shows."""

import math
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np

from distillery.cache.index import CacheIndex
from distillery.sources.pixels import DecodeError, PreprocessSpec, decode_image, preprocess_image
from distillery.sources.resizing import resize
from distillery.system.errors import UserError

# global_idx, int64 [n] -> float32 [n, 4]: left, top, width, height of a box in each image, as shares of its sides
CropBoxes = Callable[[np.ndarray], np.ndarray]
# as the crop on the device has it, whatever made the stored rows
_CROP_INTERPOLATION = "bicubic"
_LEAST_SHARE = 0.001  # of a side; a smaller box is decoded as one of this size is


def spec_of(index: CacheIndex) -> PreprocessSpec:
    """How the images of an index become pixels.

    Raises:
        UserError: it does not say so, or what nobody can do.
    """
    try:
        known = {field.name for field in fields(PreprocessSpec)}
        values = {name: value for name, value in index.preprocess.items() if name in known}
        return PreprocessSpec(**values | {"mean": index.mean, "std": index.std})
    except TypeError as error:
        raise UserError(f"{index.directory}: its index does not say how images become pixels ({error!r}).") from error


class RowDecoder:
    """Encoded rows -> pixels, uint8 [3, image_size, image_size].

    Args:
        index: of a compressed cache. Where its jpeg_decode is scaled, large JPEGs are decoded at a fraction of their
            size, at no less than twice what is wanted.
        boxes: what of each image is wanted; None: all of it, as stage 1 makes the rows of a uint8 cache.
    """

    def __init__(self, index: CacheIndex, boxes: CropBoxes | None = None) -> None:
        self._index, self._spec, self._boxes = index, spec_of(index), boxes

    def decode(
        self, rows: list[memoryview], shards: np.ndarray, local: np.ndarray, global_idx: np.ndarray, out: np.ndarray
    ) -> None:
        """Decode rows into out, uint8 [n, 3 * image_size**2]; an empty row gives zeros.

        Args:
            rows: n encoded images.
            shards: int64 [n], where each comes from: positions in the index.
            local: int64 [n], rows in the shard.
            global_idx: int64 [n], places in the source.
            out: gets the pixels.
        Raises:
            UserError: a row cannot be decoded; it names the file and the row.
        """
        boxes = [None] * len(rows) if self._boxes is None else self._boxes(global_idx).astype(np.float64)
        for i, (data, box) in enumerate(zip(rows, boxes, strict=True)):
            try:
                out[i] = self._pixels(data, box).reshape(-1) if len(data) else 0
            except DecodeError as error:
                raise UserError(
                    f"{self._index.shard_path(int(shards[i]))}: row {local[i]} (global_idx {global_idx[i]}) is as it "
                    f"was stored, but cannot be decoded here: {error}. Stage 1 could decode it: compare the versions "
                    "of Pillow and simplejpeg with those that it printed."
                ) from error

    def _pixels(self, data: memoryview, box: np.ndarray | None) -> np.ndarray:
        if box is None:
            return preprocess_image(data, self._spec)
        # with jpeg_decode: scaled, the box keeps twice the pixels that are wanted of it
        image_size = math.ceil(self._spec.image_size / max(box[2:].min(), _LEAST_SHARE))
        pixels = decode_image(data, replace(self._spec, image_size=image_size))
        top, bottom, left, right = box_of(pixels.shape[:2], box, is_square=self._spec.resize_mode == "crop")
        size = self._spec.image_size
        return resize(pixels[top:bottom, left:right], (size, size), _CROP_INTERPOLATION)


def box_of(shape: tuple[int, int], box: np.ndarray, *, is_square: bool) -> tuple[int, int, int, int]:
    """The pixels top..bottom-1, left..right-1 that a box covers, to the nearest whole one and at least one.

    Args:
        shape: height and width of the image, px.
        box: left, top, width, height as shares of the sides, float64 [4].
        is_square: the shares are those of the centred square, else of the whole image.
    """
    height, width = (min(shape), min(shape)) if is_square else shape
    first_row, first_column = (shape[0] - height) // 2, (shape[1] - width) // 2
    top, bottom = _span(box[1], box[3], height)
    left, right = _span(box[0], box[2], width)
    return first_row + top, first_row + bottom, first_column + left, first_column + right


def _span(start: float, share: float, extent: int) -> tuple[int, int]:
    """The first px of a share of `extent` px, and the px after it."""
    first = min(round(start * extent), extent - 1)
    return first, min(extent, max(first + 1, round((start + share) * extent)))
