"""Encoded image bytes -> uint8 pixels [3, H, W], and the exact table that normalises them.

What becomes of each kind of file (POLICY_VERSION names this table; it is part of every cache's fingerprint):

    grey, palette, 1-bit        the RGB values they show
    transparency of any kind    laid on white, as a viewer shows it: what hides under alpha is arbitrary
    a PNG's transparent colour  compared at the depth of the file, 1 to 16 bits, and white
    alpha 0 in the whole image  white; in a BMP or a bitmap of an ICO it means: no alpha (transparency.py)
    CMYK                        Pillow's formula, no ICC profile; CMYK JPEGs are inverted, as Adobe writes them
    16-bit grey, 32-bit integer 0..65535 scaled to 0..255 and rounded; values outside are a DecodeError
    16-bit RGB                  the high byte of each value
    floating point              0..1 scaled to 0..255, else 0..255 rounded; values outside are a DecodeError
    Exif orientation            applied (all eight); an unreadable Exif block is ignored
    texts, profiles of a PNG    no part of the image, however large or damaged (png.py)
    animation, several pages    the first frame
    empty, truncated, damaged, not an image, more than MAX_PIXELS: a DecodeError

Three lines came to the table after caches had been made: transparent colours of 2, 4 and 16 bits, bitmaps without any
alpha, large texts. POLICY_VERSION stayed: every file that showed as documented gives the same pixels as before, and a
new number would have made all those caches anew. A cache that holds such files keeps what it has.

JPEGs are decoded by libjpeg-turbo's accurate integer path. simplejpeg decodes plain files a quarter faster than Pillow
(ten times for 32 px thumbnails) into exactly Pillow's pixels; what it does not take without a warning, Pillow decides.
Bilinear and bicubic resizing is torch's antialiased uint8 kernel: fixed-point, so the same on every CPU, and 3 to 4
times the speed of Pillow's. Lanczos is Pillow's. DCT-domain downscaling is not used: it changes pixels.
"""

import functools
import importlib.metadata
import io
import re
import struct
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from distillery.sources.png import bare_png
from distillery.sources.transparency import stored_as, take_transparent_colour, without_empty_alpha
from distillery.system.errors import UserError

try:
    import simplejpeg
except ImportError:  # an accelerator only: Pillow gives the same pixels
    simplejpeg = None

RESIZE_MODES = ("squash", "crop")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
POLICY_VERSION = 1
MAX_PIXELS = 178_956_970  # where Pillow refuses by default: half a gigabyte of RGB
# an explicit list: some of Pillow's other plugins run external programs or accept any text as an image
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_ORIENTATION_TAG = 0x0112
_OTHER_JPEG_FRAMES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}


class DecodeError(ValueError):
    """An image that cannot be decoded; the message is the reason that goes to failures.jsonl: short, no addresses."""


@dataclass(frozen=True)
class PreprocessSpec:
    """How an encoded image becomes pixels, and pixels become numbers.

    Args:
        image_size: H = W of the result, px.
        resize_mode: "squash" (H and W straight to image_size) or "crop" (the largest centred square, then resized).
        interpolation: "bilinear", "bicubic" or "lanczos", antialiased.
        mean, std: normalisation per channel, of pixels scaled to 0..1.
    """

    image_size: int
    resize_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}; it must be at least 1 px.")
        if self.resize_mode not in RESIZE_MODES:
            raise UserError(f"resize_mode is {self.resize_mode!r}; it must be one of {', '.join(RESIZE_MODES)}.")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation is {self.interpolation!r}; it must be one of {', '.join(INTERPOLATIONS)}.")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(value > 0 for value in self.std):
            raise UserError(f"mean {self.mean} and std {self.std} must be three numbers each, std above 0.")

    def identity(self) -> dict:
        """All that decides the pixels, as plain JSON; library versions are apart (library_versions)."""
        return {
            "image_size": self.image_size,
            "resize_mode": self.resize_mode,
            "interpolation": self.interpolation,
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
            "policy_version": POLICY_VERSION,
            "decoder": "libjpeg-turbo accurate DCT, Pillow",
            "resampler": "pillow" if self.interpolation == "lanczos" else "torch-uint8-antialias",
            "alpha": "white",
            "orientation": "exif",
            "frame": "first",
            "max_pixels": MAX_PIXELS,
        }


def preprocess_image(data: bytes, spec: PreprocessSpec) -> np.ndarray:
    """Decode, turn upright, crop or squash, resize.

    Args:
        data: an encoded image file.
        spec: mean and std play no part here.
    Returns:
        uint8 [3, image_size, image_size], RGB, contiguous.
    Raises:
        DecodeError: no image can be had from `data`.
    """
    return resize_image(decode_image(data), spec)


def resize_image(pixels: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Crop or squash, and resize, the pixels of decode_image: uint8 [3, image_size, image_size], contiguous."""
    if spec.resize_mode == "crop":
        pixels = _centre_square(pixels)
    return resize_pixels(pixels, spec.image_size, spec.image_size, spec.interpolation)


def decode_image(data: bytes | memoryview) -> np.ndarray:
    """The pixels of an encoded image, uint8 [H, W, 3], RGB, contiguous, upright.

    Raises:
        DecodeError: no image can be had from `data`.
    """
    return decode_oriented(data)[0]


def decode_oriented(data: bytes | memoryview) -> tuple[np.ndarray, int]:
    """(the pixels as decode_image gives them, the Exif orientation, 1 to 8, that they had before they were upright)."""
    if not data:
        raise DecodeError("no data (0 bytes)")
    size = _plain_jpeg_size(data) if simplejpeg is not None else None
    if size is None:
        return _decode_with_pillow(data)
    check_pixel_count(*size)
    try:
        # strict: a file libjpeg warns about is Pillow's to judge
        return simplejpeg.decode_jpeg(data, "RGB", strict=True), 1
    except (ValueError, MemoryError):
        return _decode_with_pillow(data)


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of an 8-bit grey or colour JPEG, Huffman-coded, without Exif or XMP; None for anything else."""
    if data[:2] != b"\xff\xd8":
        return None
    size, position = None, 2
    try:
        while True:
            prefix, marker, length = struct.unpack_from(">BBH", data, position)
            if marker == 0xDA:  # the scan begins
                return size
            # APP1 is where Exif and XMP are: both can turn the image, and Pillow reads them
            if prefix != 0xFF or marker == 0xE1 or marker < 0xC0 or marker in _OTHER_JPEG_FRAMES:
                return None
            if marker in (0xC0, 0xC1, 0xC2):
                precision, height, width, components = struct.unpack_from(">BHHB", data, position + 4)
                if precision != 8 or components not in (1, 3) or size is not None:
                    return None
                size = width, height
            position += 2 + length
    except struct.error:
        return None


@functools.cache
def known_formats() -> tuple[str, ...]:
    """FORMATS that this Pillow was built with; naming any other makes Image.open fail with a KeyError."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_pixel_count(width: int, height: int) -> None:
    """Raise the DecodeError of an image that is too large."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f"more than {MAX_PIXELS} pixels: too large, or a decompression bomb")


def _decode_with_pillow(data: bytes | memoryview) -> tuple[np.ndarray, int]:
    data = bytes(data)  # of a view, the one copy that BytesIO would make
    try:
        return _decode_whole(data)
    except DecodeError:
        bare = bare_png(data)
        if bare is None:
            raise
        try:
            return _decode_whole(bare)
        except DecodeError:
            pass  # it was no text: the reason is the first one's
        raise


def _decode_whole(data: bytes) -> tuple[np.ndarray, int]:
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            check_pixel_count(*image.size)
            stored = stored_as(image)
            # TIFF files are turned by Pillow itself, which takes the tag away
            turned_by_pillow = orientation_of(image) if image.format == "TIFF" else 1
            image.load()
            orientation = orientation_of(image)
            transparent = take_transparent_colour(image, stored, data)
            pixels = _as_rgb(without_empty_alpha(image, data))
    except DecodeError:
        raise
    except UnidentifiedImageError:
        # its own message holds the address of a BytesIO
        raise DecodeError("not an image file of a known format") from None
    except Image.DecompressionBombError:
        raise DecodeError(f"more than {MAX_PIXELS} pixels: too large, or a decompression bomb") from None
    except Exception as error:  # Pillow's plugins raise nearly every built-in exception for damaged files
        raise DecodeError(reason_of(error)) from error
    if transparent is not None:
        pixels[transparent] = 255
    return np.ascontiguousarray(upright(pixels, orientation)), max(orientation, turned_by_pillow)


def reason_of(error: Exception) -> str:
    """What is wrong with a file: a short text without addresses, which would differ from run to run."""
    text = re.sub(r"<[^<>]*>|0x[0-9a-fA-F]+", "...", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"[:200] if text else type(error).__name__


def orientation_of(image: Image.Image) -> int:
    """The Exif orientation of an opened image, 1 to 8; 1 where it says nothing or nonsense."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # the block is the camera's; a damaged one says nothing about the image
        return 1
    return orientation if orientation in range(1, 9) else 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the Exif orientation of [H, W, ...]; source: Exif 2.32, tag 0x0112."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _as_rgb(image: Image.Image) -> np.ndarray:
    """The pixels a viewer shows, uint8 [H, W, 3]."""
    if image.mode == "F":
        return _grey_to_rgb(_scale_float(np.asarray(image)))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _grey_to_rgb(_scale_integers(np.asarray(image)))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, "white")
        return np.array(Image.alpha_composite(white, layer).convert("RGB"))
    return np.array(image.convert("RGB"))


def _scale_integers(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DecodeError("integer pixels outside 0..65535: which brightness they mean is not known")
    return ((values * 255 + 32767) // 65535).astype(np.uint8)


def _scale_float(values: np.ndarray) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= 255):  # also true of NaN
        raise DecodeError("floating-point pixels outside 0..255: which brightness they mean is not known")
    return np.rint(values.astype(np.float64) * (255 if high <= 1 else 1)).astype(np.uint8)


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def _centre_square(pixels: np.ndarray) -> np.ndarray:
    """The largest centred square of [H, W, 3], cut before the one resize so that extreme shapes stay cheap."""
    height, width, _ = pixels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return np.ascontiguousarray(pixels[top : top + side, left : left + side])


def resize_pixels(pixels: np.ndarray, height: int, width: int, interpolation: str) -> np.ndarray:
    """uint8 [H, W, 3], contiguous -> uint8 [3, height, width], contiguous."""
    if pixels.shape[:2] == (height, width):
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    if interpolation == "lanczos":
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
    torch = load_resampler()
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(batch, size=(height, width), mode=interpolation, antialias=True)
    return np.ascontiguousarray(resized[0].numpy())


@functools.cache
def load_resampler():
    """Import torch (about 1.5 s, once). Call it before forking decode workers, so that they share what it loads."""
    import torch

    return torch


def normalisation_table(mean: tuple[float, ...], std: tuple[float, ...], dtype: str) -> np.ndarray:
    """(v / 255 - mean) / std for every pixel value v.

    Computed in float64, rounded to float32, and from there to a half-width dtype where one is asked for: so a cache
    of any dtype equals the float32 one cast by torch. A table needs no fused multiply-add, which CPUs do differently.

    Returns:
        [3, 256] float32, float16, or uint16 holding the bit patterns of bfloat16 (round to nearest even).
    """
    values = np.arange(256, dtype=np.float64) / 255
    table = ((values - np.array(mean, np.float64)[:, None]) / np.array(std, np.float64)[:, None]).astype(np.float32)
    if dtype == "float32":
        return table
    if dtype == "float16":
        return table.astype(np.float16)
    if dtype == "bfloat16":
        bits = table.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    raise UserError(f"normalised images cannot be stored as {dtype!r}; choose float32, float16 or bfloat16.")


def normalise_into(pixels: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write table[c, pixels[c]] to out[c]: pixels uint8 [3, H, W], table [3, 256], out [3, H, W] of its dtype."""
    opencv, kind = load_look_up(), np.float32 if table.itemsize == 4 else np.uint16
    # bits are moved, whatever they mean: not every dtype is one OpenCV has
    for channel, values, stored in zip(pixels, table.view(kind), out.view(kind), strict=True):
        # an array it cannot write to it replaces by a new one, and says nothing
        if opencv is None or opencv.LUT(channel, values, stored) is not stored:
            # clip: a byte cannot leave the table, and this mode alone writes to `out` without a buffer between
            np.take(values, channel, out=stored, mode="clip")


@functools.cache
def load_look_up():
    """OpenCV, whose look-up takes bytes as indices; None without it: NumPy's makes 64-bit numbers of them first."""
    try:
        import cv2
    except ImportError:
        return None
    # its pool of threads would not survive a fork, and the images are spread over the cores already
    cv2.setNumThreads(1)
    return cv2


def library_versions() -> dict[str, str]:
    """Versions of the libraries that could change pixels, without importing torch and without its build suffix."""
    versions = {"Pillow": Image.__version__, "simplejpeg": getattr(simplejpeg, "__version__", "none")}
    versions["torch"] = importlib.metadata.version("torch").partition("+")[0]
    return versions
