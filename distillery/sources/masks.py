"""Encoded masks -> class numbers [H, W], with the geometry of their images.

L, P, 1, I, I;16        the numbers as they are stored: palette indices, not colours; samples of 2 and 4 bits unscaled
colours, alpha, floats  a DecodeError: which colour is which class is not known
JPEG                    a DecodeError: it changes numbers
Exif orientation        that of the image turns both; a mask with another one of its own is a DecodeError
another size            than the image has before it is turned: a DecodeError
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from distillery.sources.pixels import (
    MAX_PIXELS,
    DecodeError,
    PreprocessSpec,
    check_pixel_count,
    known_formats,
    orientation_of,
    reason_of,
    upright,
)
from distillery.sources.transparency import unscaled

# how masks become numbers: part of the fingerprint of caches that hold masks
MASK_POLICY_VERSION = 1
MASK_DTYPES = {"uint8": np.uint8, "int16": np.int16}
_TURNED = (5, 6, 7, 8)


def preprocess_mask(
    data: bytes | memoryview, image_size: tuple[int, int], orientation: int, spec: PreprocessSpec, dtype: str
) -> np.ndarray:
    """Decode a mask, turn it like its image, crop or squash it likewise, and resize it to the nearest pixels.

    Args:
        data: the mask's file.
        image_size: height and width of the image, px, upright.
        orientation: Exif orientation of the image.
        spec: interpolation, mean and std play no part here.
        dtype: of MASK_DTYPES.
    Returns:
        `dtype` [spec.image_size, spec.image_size], contiguous.
    Raises:
        DecodeError: no mask of this image can be had from `data`.
    """
    numbers, own_orientation, is_upright = _decode(data)
    if own_orientation not in (1, orientation):
        raise DecodeError(f"mask has the Exif orientation {own_orientation}, its image {orientation}")
    if not is_upright:
        numbers = upright(numbers, orientation)
    if numbers.shape != image_size:
        turned = orientation in _TURNED
        (height, width), (its_height, its_width) = (
            size[:: -1 if turned else 1] for size in (numbers.shape, image_size)
        )
        where = ", before it is turned by its Exif orientation" if turned else ""
        raise DecodeError(f"mask is {height}x{width} px, its image {its_height}x{its_width} px{where}")
    limits = np.iinfo(MASK_DTYPES[dtype])
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high > limits.max:
        raise DecodeError(
            f"mask holds {low if low < 0 else high}; stored as {dtype}, class numbers are 0 to {limits.max} "
            "(num_classes and ignore_index decide)"
        )
    return np.ascontiguousarray(_nearest(numbers, spec).astype(MASK_DTYPES[dtype]))


def _nearest(numbers: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """[H, W] -> [size, size]: what lies under the centre of each new pixel, in whole numbers, the same everywhere."""
    height, width = numbers.shape
    top = left = 0
    if spec.resize_mode == "crop":
        side = min(height, width)
        top, left, height, width = (height - side) // 2, (width - side) // 2, side, side
    centres = 2 * np.arange(spec.image_size) + 1
    rows, columns = (centres * extent // (2 * spec.image_size) for extent in (height, width))
    return numbers[np.ix_(top + rows, left + columns)]


def _decode(data: bytes | memoryview) -> tuple[np.ndarray, int, bool]:
    """(numbers [H, W], Exif orientation, whether Pillow has turned them by it already, as it does in TIFF files)."""
    if not data:
        raise DecodeError("mask: no data (0 bytes)")
    try:
        with Image.open(io.BytesIO(bytes(data)), formats=known_formats()) as mask:
            check_pixel_count(*mask.size)
            if mask.format == "JPEG" or "jpeg" in str(mask.info.get("compression", "")):
                raise DecodeError("mask is a JPEG, which changes class numbers; it must be lossless, as PNG is")
            # before the orientation: to look for it may load the file, which forgets how it was stored
            stored, orientation = mask.tile[0].args if mask.tile else None, orientation_of(mask)
            mask.load()
            if mask.mode not in ("L", "P", "1", "I") and not mask.mode.startswith("I;16"):
                raise DecodeError(
                    f"mask has mode {mask.mode}; class numbers are one channel of whole numbers (L, P, 1, I or I;16)"
                )
            # TIFF: the first of several words
            numbers = unscaled(np.asarray(mask), stored[0] if isinstance(stored, tuple) else stored)
            return numbers, orientation, mask.format == "TIFF" and orientation != 1
    except DecodeError:
        raise
    except UnidentifiedImageError:
        raise DecodeError("mask is not an image file of a known format") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"mask has more than {MAX_PIXELS} pixels") from None
    except Exception as error:  # Pillow's plugins raise nearly every built-in exception for damaged files
        raise DecodeError(f"mask: {reason_of(error)}") from error
