"""Rows of a compressed cache: encoded images, each of its own length, in one tensor with the offsets of all rows.

A shard holds {"encoded": uint8 [bytes], "offsets": int64 [N + 1], "valid", "labels", "meta"}: row i is the file
encoded[offsets[i]:offsets[i + 1]]. The row of an image that could not be decoded is empty.
"""

import base64
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from distillery.cache.archive import ENCODED_DTYPE
from distillery.cache.fields import Field, place_fields
from distillery.sources.pixels import DecodeError, PreprocessSpec, decode_image, resize_pixels
from distillery.system.errors import UserError

# the most pixels that a side of a JPEG may have in libjpeg
_MAX_SIDE = 65_500
_TYPICAL_BYTES_A_PIXEL = 0.4
SUBSAMPLING = "4:2:0"


@dataclass(frozen=True)
class RowEncoding:
    """How images become rows of a compressed cache.

    Args:
        stored_size: px of the shorter side; smaller images are not enlarged, the aspect is kept. "original": files stay
            as they are, whatever their format.
        quality: of the JPEGs, 1 to 100; of no effect with "original".
    """

    stored_size: int | Literal["original"]
    quality: int

    def identity(self) -> dict:
        """All that decides the rows beside the image's own preprocessing, as plain JSON.

        Raises:
            UserError: the encoder is not installed.
        """
        if self.stored_size == "original":
            return {"stored_size": "original"}
        return {
            "stored_size": self.stored_size,
            "jpeg_quality": self.quality,
            "subsampling": SUBSAMPLING,
            "encoder": f"simplejpeg {load_encoder().__version__}",
        }

    def typical_bytes(self, image_size: int) -> int:
        """What a row takes where nothing has been measured: of a photograph of 4:3 at quality 90.

        Of files that stay as they are nothing is known: they count as photographs of twice image_size.
        """
        shorter = 2 * image_size if self.stored_size == "original" else self.stored_size
        return math.ceil(_TYPICAL_BYTES_A_PIXEL * shorter * shorter * 4 / 3)

    def encode(self, data: bytes | memoryview, spec: PreprocessSpec) -> tuple[bytes, tuple[int, int]]:
        """(the row of an encoded image, the image's height and width in px, upright).

        Raises:
            DecodeError: it cannot be decoded.
        """
        pixels = decode_image(data)
        height, width = pixels.shape[:2]
        if self.stored_size == "original":
            return bytes(data), (height, width)
        stored = _stored_shape(height, width, self.stored_size)
        if stored != (height, width):
            pixels = np.ascontiguousarray(resize_pixels(pixels, *stored, spec.interpolation).transpose(1, 2, 0))
        try:
            row = load_encoder().encode_jpeg(pixels, quality=self.quality, colorsubsampling="420")
        except ValueError as error:
            raise DecodeError(f"cannot be stored as a JPEG of {stored[1]} x {stored[0]} px: {error}") from error
        return row, (height, width)


def load_encoder():
    """simplejpeg; it alone encodes, so that a cache has the rows of one encoder.

    Raises:
        UserError: it is not installed.
    """
    try:
        import simplejpeg
    except ImportError as error:
        raise UserError("cache_dtype: jpeg needs the package simplejpeg. Run: pip install simplejpeg") from error
    return simplejpeg


def _stored_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) with `shorter` as the shorter side, never more than the image has, nor than a JPEG can have."""
    short, long = min(height, width), max(height, width)
    target = min(short, shorter)
    longer = (2 * long * target + short) // (2 * short)
    if longer > _MAX_SIDE:
        target, longer = max(1, round(short * _MAX_SIDE / long)), _MAX_SIDE
    return (target, longer) if height <= width else (longer, target)


def encode_row_sizes(sizes: np.ndarray) -> dict:
    """int64 [N], bytes of each row, as they stand in a record."""
    return {"unit": "bytes", "values": base64.b64encode(sizes.astype("<u4").tobytes()).decode()}


def decode_row_sizes(record: dict) -> np.ndarray:
    """int64 [N], bytes of each row, out of a record."""
    data = base64.b64decode(record["row_sizes"]["values"], validate=True)
    return np.frombuffer(data, dtype="<u4").astype(np.int64)


def offsets_of(row_sizes: np.ndarray) -> np.ndarray:
    """int64 [N + 1]: where each row begins in the tensor of all, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(row_sizes, dtype=np.int64)]).astype("<i8")


def place_encoded_rows(row_sizes: np.ndarray) -> list[Field]:
    """Where the rows of these sizes, int64 [N], stand in a shard: its one big tensor."""
    (field,) = place_fields({"encoded": ("uint8", (int(row_sizes.sum()),))}, row_dims=1)
    return [Field(field.name, field.dtype, field.shape, len(row_sizes), field.offset, 0, row_sizes)]


def is_encoded(dtype: str) -> bool:
    """Whether a cache of this dtype holds encoded rows."""
    return dtype == ENCODED_DTYPE
