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
times the speed of Pillow's. Lanczos is Pillow's.

With jpeg_decode "scaled", libjpeg decodes large JPEGs at 1/2, 1/4 or 1/8 of their size, at no less than twice
image_size, and the same kernel resizes what it gives. That skips most of the work of decoding, and changes pixels a
little. It is off by default, and a cache made so has another fingerprint. simplejpeg and Pillow get the same scale, so
a file's pixels do not depend on whether simplejpeg is installed.
"""

import functools
import importlib.metadata
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from distillery.sources import jpeg
from distillery.sources.png import bare_png
from distillery.sources.resizing import centre_square, resize, resize_interleaved
from distillery.sources.transparency import stored_as, take_transparent_colour, without_empty_alpha
from distillery.system.errors import UserError

try:
    import simplejpeg
except ImportError:  # an accelerator only: Pillow gives the same pixels
    simplejpeg = None

RESIZE_MODES = ("squash", "crop")
INTERPOLATIONS = ("bilinear", "bicubic", "lanczos")
JPEG_DECODES = ("exact", "scaled")
POLICY_VERSION = 1
MAX_PIXELS = 178_956_970  # where Pillow refuses by default: half a gigabyte of RGB
# an explicit list: some of Pillow's other plugins run external programs or accept any text as an image
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO")
_ORIENTATION_TAG = 0x0112
_TURNED = (5, 6, 7, 8)  # orientations by which height becomes width
# MPO: a JPEG with further pictures behind it, as many phones write
_JPEG_FORMATS = ("JPEG", "MPO")


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
        jpeg_decode: "exact", or "scaled" (large JPEGs at 1/2, 1/4 or 1/8, at least twice image_size, then resized).
    """

    image_size: int
    resize_mode: str
    interpolation: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    jpeg_decode: str = "exact"

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size is {self.image_size}; it must be at least 1 px.")
        if self.resize_mode not in RESIZE_MODES:
            raise UserError(f"resize_mode is {self.resize_mode!r}; it must be one of {', '.join(RESIZE_MODES)}.")
        if self.interpolation not in INTERPOLATIONS:
            raise UserError(f"interpolation is {self.interpolation!r}; it must be one of {', '.join(INTERPOLATIONS)}.")
        if self.jpeg_decode not in JPEG_DECODES:
            raise UserError(f"jpeg_decode is {self.jpeg_decode!r}; it must be one of {', '.join(JPEG_DECODES)}.")
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
            # absent where exact: the fingerprints of caches made before there was a choice stay as they are
            **({} if self.jpeg_decode == "exact" else {"jpeg_decode": self.jpeg_decode}),
        }

    def jpeg_scale(self, height: int, width: int) -> int:
        """1, 2, 4 or 8: by how much a JPEG of height x width px is smaller when it is decoded."""
        # a crop takes the shorter side, and squash needs enough of both: the same rule
        return 1 if self.jpeg_decode == "exact" else jpeg.largest_scale(min(height, width), 2 * self.image_size)


class Prepared(NamedTuple):
    """An image as it is stored, and what is known of its file.

    pixels: uint8 [3, image_size, image_size], RGB, contiguous; orientation: Exif, 1 to 8, that the file had; size:
    height and width of the file's image in px, upright.
    """

    pixels: np.ndarray
    orientation: int
    size: tuple[int, int]


class _Decoded(NamedTuple):
    """An image as its file has it.

    pixels: uint8 [H, W, 3]; orientation: Exif, of the file; turn: the orientation that is left to undo; scale: of a
    scaled JPEG; size: height and width before it was scaled, not upright yet.
    """

    pixels: np.ndarray
    orientation: int
    turn: int
    scale: int
    size: tuple[int, int]

    def upright(self) -> np.ndarray:
        """The pixels upright, contiguous."""
        return np.ascontiguousarray(upright(self.pixels, self.turn))

    @property
    def upright_size(self) -> tuple[int, int]:
        """Height and width before it was scaled, upright."""
        return self.size[::-1] if self.turn in _TURNED else self.size


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
    return prepare_image(data, spec).pixels


def prepare_image(data: bytes | memoryview, spec: PreprocessSpec) -> Prepared:
    """As preprocess_image, with the image's size and orientation."""
    image = _decode(data, spec)
    if image.scale == 1:
        pixels = resize_image(image.upright(), spec)
    else:
        # turned last: the resampler takes a part of a pixel at the right and lower end only, where libjpeg has it
        resized = _resize_scaled(image, spec).transpose(1, 2, 0)
        pixels = np.ascontiguousarray(upright(resized, image.turn).transpose(2, 0, 1))
    return Prepared(pixels, image.orientation, image.upright_size)


def shrink_image(
    data: bytes | memoryview, spec: PreprocessSpec, shape_of: Callable[[int, int], tuple[int, int]]
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode, turn upright, resize without a crop.

    Args:
        data: an encoded image file.
        spec: its image_size says how far a JPEG may be scaled.
        shape_of: height and width wanted, of those of the upright image.
    Returns:
        (uint8 [H, W, 3], RGB, contiguous; the image's height and width in px, upright).
    Raises:
        DecodeError: no image can be had from `data`.
    """
    image = _decode(data, spec)
    shape = shape_of(*image.upright_size)
    if image.scale == 1:
        return resize_interleaved(image.upright(), shape, spec.interpolation), image.upright_size
    covered = tuple(extent / image.scale for extent in image.size)
    shape = shape[::-1] if image.turn in _TURNED else shape
    resized = resize_interleaved(image.pixels, shape, spec.interpolation, covered)
    return np.ascontiguousarray(upright(resized, image.turn)), image.upright_size


def size_of_image(data: bytes | memoryview, spec: PreprocessSpec) -> tuple[int, int]:
    """Height and width of an image in px, upright, after it was decoded to its end; errors as preprocess_image."""
    return _decode(data, spec).upright_size


def resize_image(pixels: np.ndarray, spec: PreprocessSpec) -> np.ndarray:
    """Crop or squash, and resize, the pixels of decode_image: uint8 [3, image_size, image_size], contiguous."""
    if spec.resize_mode == "crop":
        pixels = centre_square(pixels)
    return resize(pixels, (spec.image_size, spec.image_size), spec.interpolation)


def _resize_scaled(image: _Decoded, spec: PreprocessSpec) -> np.ndarray:
    """resize_image for a scaled JPEG: its last row and column may reach beyond the image, by a part of a pixel."""
    pixels, (height, width) = image.pixels, image.size
    if spec.resize_mode == "crop":
        side = min(height, width)
        top, left = (((extent - side) // 2 + image.scale // 2) // image.scale for extent in (height, width))
        height = width = side
        kept = jpeg.shrunk(side, image.scale)
        pixels = np.ascontiguousarray(pixels[top : top + kept, left : left + kept])
    covered = height / image.scale, width / image.scale
    return resize(pixels, (spec.image_size, spec.image_size), spec.interpolation, covered)


def decode_image(data: bytes | memoryview, spec: PreprocessSpec | None = None) -> np.ndarray:
    """The pixels of an encoded image, uint8 [H, W, 3], RGB, contiguous, upright.

    Args:
        data: an encoded image file.
        spec: where its jpeg_decode is "scaled", a large JPEG gives fewer pixels; None: exact.
    Raises:
        DecodeError: no image can be had from `data`.
    """
    return decode_oriented(data, spec)[0]


def decode_oriented(data: bytes | memoryview, spec: PreprocessSpec | None = None) -> tuple[np.ndarray, int]:
    """(the pixels as decode_image gives them, the Exif orientation, 1 to 8, that they had before they were upright)."""
    image = _decode(data, spec)
    return image.upright(), image.orientation


def _decode(data: bytes | memoryview, spec: PreprocessSpec | None) -> _Decoded:
    if not data:
        raise DecodeError("no data (0 bytes)")
    size = jpeg.plain_size(data) if simplejpeg is not None else None
    if size is None:
        return _decode_with_pillow(data, spec)
    height, width = size
    check_pixel_count(width, height)
    scale = 1 if spec is None else spec.jpeg_scale(height, width)
    # the smallest of its scales that gives this size: no smaller one gives it too (jpeg.largest_scale)
    least = {} if scale == 1 else {"min_height": jpeg.shrunk(height, scale), "min_width": jpeg.shrunk(width, scale)}
    try:
        # strict: a file libjpeg warns about is Pillow's to judge
        return _Decoded(simplejpeg.decode_jpeg(data, "RGB", strict=True, **least), 1, 1, scale, size)
    except (ValueError, MemoryError):
        return _decode_with_pillow(data, spec)


@functools.cache
def known_formats() -> tuple[str, ...]:
    """FORMATS that this Pillow was built with; naming any other makes Image.open fail with a KeyError."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_pixel_count(width: int, height: int) -> None:
    """Raise the DecodeError of an image that is too large."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f"more than {MAX_PIXELS} pixels: too large, or a decompression bomb")


def _decode_with_pillow(data: bytes | memoryview, spec: PreprocessSpec | None) -> _Decoded:
    data = bytes(data)  # of a view, the one copy that BytesIO would make
    try:
        return _decode_whole(data, spec)
    except DecodeError:
        if spec is not None and spec.jpeg_decode == "scaled":
            # some kinds, lossless JPEGs for one, have no smaller scale
            return _decode_with_pillow(data, None)
        bare = bare_png(data)
        if bare is None:
            raise
        try:
            return _decode_whole(bare, spec)
        except DecodeError:
            pass  # it was no text: the reason is the first one's
        raise


def _decode_whole(data: bytes, spec: PreprocessSpec | None) -> _Decoded:
    try:
        with Image.open(io.BytesIO(data), formats=known_formats()) as image:
            check_pixel_count(*image.size)
            # of a JPEG alone: other formats may have another size once they are loaded
            size, scale = image.size[::-1], _scale_jpeg(image, spec)
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
    size = pixels.shape[:2] if scale == 1 else size
    return _Decoded(pixels, max(orientation, turned_by_pillow), orientation, scale, size)


def _scale_jpeg(image: Image.Image, spec: PreprocessSpec | None) -> int:
    """Have an opened JPEG loaded at the scale that it returns."""
    if spec is None or image.format not in _JPEG_FORMATS:
        return 1
    width, height = image.size
    scale = spec.jpeg_scale(height, width)
    if scale > 1:
        # Pillow takes the largest scale that leaves this much; rounded down, that is ours, and never the next one
        image.draft(None, (width // scale, height // scale))
    return scale


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
    if orientation in _TURNED:
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
