"""Correct transparency where Pillow differs from viewers: a PNG's transparent colour, a bitmap's empty alpha."""

import io

import numpy as np
from PIL import Image

from distillery.sources.png import SIGNATURE

# how a PNG without alpha channel stores its samples, in Pillow's words -> bits of a sample
_SAMPLE_BITS = {"1": 1, "L;2": 2, "L;4": 4, "L": 8, "I;16B": 16, "RGB": 8, "RGB;16B": 16}
# Pillow keeps the high byte of 16-bit colours; read the other way round it is the low one
_LOW_BYTES = "RGB;16L"


def stored_as(image: Image.Image) -> str | None:
    """How an opened PNG stores its samples, None for other formats; loading an image forgets it."""
    return image.tile[0].args if image.format == "PNG" and image.tile else None


def unscaled(samples: np.ndarray, stored: str | None) -> np.ndarray:
    """Samples of 2 and 4 bits as the file has them; Pillow scales grey ones to 0..255. stored: its word for them."""
    bits = _SAMPLE_BITS.get(stored, 8)
    return samples // (255 // (2**bits - 1)) if 1 < bits < 8 else samples


def take_transparent_colour(image: Image.Image, stored: str | None, data: bytes) -> np.ndarray | None:
    """Where a PNG has the colour that its tRNS chunk calls transparent; the image is opaque afterwards.

    The colour is compared with the samples as they are stored: Pillow scales 2 and 4 bits, and cuts 16, before that.

    Args:
        image: loaded; loses the colour.
        stored: stored_as(image), from before it was loaded.
        data: the file.
    Returns:
        bool [H, W], or None where no colour is transparent.
    Source: PNG, third edition, 11.3.1.1; bits of the colour above the depth are ignored, as in libpng.
    """
    if stored not in _SAMPLE_BITS or "transparency" not in image.info:
        return None
    key = image.info.pop("transparency")
    bits = _SAMPLE_BITS[stored]
    if stored == "1":
        return np.asarray(image) == bool(key)
    samples = unscaled(np.asarray(image), stored)
    if stored == "RGB;16B":
        samples = samples.astype(np.uint16) << 8 | _low_bytes(data)
    same = samples == np.array(key, np.uint32) % 2**bits
    return same.all(-1) if same.ndim == 3 else same


def _low_bytes(data: bytes) -> np.ndarray:
    """The low bytes of a 16-bit RGB PNG, uint8 [H, W, 3]."""
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [image.tile[0]._replace(args=_LOW_BYTES)]
        return np.array(image)


def without_empty_alpha(image: Image.Image, data: bytes) -> Image.Image:
    """A loaded image; of a bitmap whose alpha is 0 everywhere, its colours.

    Many programs leave the fourth byte of a BMP's pixels 0, so viewers take a channel without any alpha for none. An
    icon then still has its one-bit mask. A PNG (also one inside an ICO) says with the same zeros: transparent.
    """
    if image.format not in ("BMP", "ICO") or image.mode != "RGBA" or image.getchannel("A").getextrema() != (0, 0):
        return image
    if image.format == "BMP":
        return image.convert("RGB")
    entry = image.ico.entry[image.ico.getentryindex(image.size)]
    frame = data[entry.offset : entry.offset + entry.size]
    return image if frame.startswith(SIGNATURE) else _with_icon_mask(image, frame)


def _with_icon_mask(image: Image.Image, frame: bytes) -> Image.Image:
    """A 32-bit bitmap of an icon with the mask that follows its pixels: one bit a pixel, set: transparent."""
    width, height = image.size
    stride = (width + 31) // 32 * 4  # rows begin at multiples of 32 bits, the lowest row first
    header_bytes = int.from_bytes(frame[:4], "little")
    if len(frame) < header_bytes + 4 * width * height + stride * height:
        return image.convert("RGB")  # it has none
    alpha = Image.frombuffer("1", image.size, frame[-stride * height :], "raw", ("1;I", stride, -1))
    image = image.copy()
    image.putalpha(alpha.convert("L"))
    return image
