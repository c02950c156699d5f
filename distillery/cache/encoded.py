"""Rows of a compressed cache: encoded images, each of its own length, in one tensor with the offsets of all rows.

A shard holds {"encoded": uint8 [bytes], "offsets": int64 [N + 1], "valid", "labels", "meta"}: row i is the file
encoded[offsets[i]:offsets[i + 1]]. The row of an image that could not be decoded is empty.
"""

import base64
import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from distillery.cache.archive import ENCODED_DTYPE
from distillery.cache.fields import Field, place_fields
from distillery.sources.pixels import DecodeError, PreprocessSpec, shrink_image, size_of_image
from distillery.system.errors import UserError

# px, the longest side of a JPEG that libjpeg writes
_MAX_SIDE = 65_500
# a record has 32 bits for the bytes of a row
_MAX_ROW_BYTES = (1 << 32) - 1
# one value of each colour for 2 x 2 pixels
_SUBSAMPLING = "4:2:0"
# of photographs at quality 90; 300 of ImageNet had 0.36 at 224 px and 0.35 at 256 px, taken as 4:3
_TYPICAL_BYTES_A_PIXEL, _TYPICAL_ASPECT = 0.36, 4 / 3


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
            "subsampling": _SUBSAMPLING,
            "encoder": f"simplejpeg {load_encoder().__version__}",
        }

    def describe(self) -> str:
        """What is stored, for a line of the plan."""
        if self.stored_size == "original":
            return "the files as they are"
        return f"shorter side at most {self.stored_size} px, quality {self.quality}, {_SUBSAMPLING}"

    def typical_bytes(self, image_size: int) -> int:
        """What a row takes where nothing has been measured: of a photograph of 4:3 at quality 90.

        Of files that stay as they are nothing is known: they count as photographs of twice image_size.
        """
        shorter = 2 * image_size if self.stored_size == "original" else self.stored_size
        return math.ceil(_TYPICAL_BYTES_A_PIXEL * shorter * shorter * _TYPICAL_ASPECT)

    def encode(self, data: bytes | memoryview, spec: PreprocessSpec) -> tuple[bytes | memoryview, tuple[int, int]]:
        """(the row of an encoded image, the image's height and width in px, upright).

        Raises:
            DecodeError: it cannot be decoded, or not be stored.
        """
        if self.stored_size == "original":
            size = size_of_image(data, spec)
            if len(data) > _MAX_ROW_BYTES:
                raise DecodeError(f"the file has {len(data)} bytes; a row has less than 4 GiB")
            return data, size
        pixels, size = shrink_image(data, self.decode_spec(spec), self.stored_shape)
        return load_encoder().encode_jpeg(pixels, quality=self.quality, colorsubsampling="420"), size

    def decode_spec(self, spec: PreprocessSpec) -> PreprocessSpec:
        """How images are decoded before they are encoded: scaled JPEGs keep at least twice stored_size."""
        return spec if self.stored_size == "original" else replace(spec, image_size=self.stored_size)

    def stored_shape(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the row of an image: stored_size is the shorter side, unless the image has fewer px.

        Where the longer side is more than a JPEG can have, both become shorter.
        """
        if self.stored_size == "original":
            return height, width
        short, long = min(height, width), max(height, width)
        shorter = min(short, self.stored_size)
        longer = _rounded(long * shorter, short)
        if longer > _MAX_SIDE:
            shorter, longer = max(1, _rounded(short * _MAX_SIDE, long)), _MAX_SIDE
        return (shorter, longer) if height <= width else (longer, shorter)


def _rounded(numerator: int, denominator: int) -> int:
    """The nearest whole number to a fraction above 0, halves up."""
    return (2 * numerator + denominator) // (2 * denominator)


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
