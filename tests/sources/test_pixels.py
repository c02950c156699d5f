import hashlib
import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from distillery.sources import jpeg
from distillery.sources import pixels as pixels_module
from distillery.sources.pixels import (
    MAX_PIXELS,
    DecodeError,
    PreprocessSpec,
    decode_image,
    decode_oriented,
    library_versions,
    normalisation_table,
    normalise_into,
    prepare_image,
    preprocess_image,
)
from distillery.system.errors import UserError
from distillery.system.files import sha256_of

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def spec_of(image_size=16, resize_mode="squash", interpolation="bicubic", jpeg_decode="exact"):
    return PreprocessSpec(image_size, resize_mode, interpolation, MEAN, STD, jpeg_decode)


def photo(height=40, width=56, seed=0):
    """A smooth colour image with some noise, uint8 [H, W, 3], values well inside 0..255."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 196, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-8, 9, smooth.shape), 0, 255).astype(np.uint8)


def encode(image, format, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_claimed_size(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" * 100)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_of_claimed_size(width, height):
    data = bytearray(encode(photo(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def exif_block(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def pillow_rgb(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEG_OPTIONS = {
    "4:2:0": {"subsampling": 2},
    "4:2:2": {"subsampling": 1},
    "4:4:4": {"subsampling": 0},
    "progressive": {"progressive": True},
    "low quality": {"quality": 10},
    "restart markers": {"restart_marker_blocks": 2},
    "stored as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("name", sorted(JPEG_OPTIONS))
@pytest.mark.parametrize("size", [(40, 56), (33, 47), (1, 1), (8, 300)])
def test_the_fast_jpeg_path_gives_exactly_pillows_pixels(name, size):
    data = encode(photo(*size), "JPEG", **JPEG_OPTIONS[name])
    assert jpeg.plain_size(data) == size
    np.testing.assert_array_equal(decode_image(data), pillow_rgb(data))


def test_the_fast_jpeg_path_takes_grey_and_leaves_exif_xmp_cmyk_and_other_formats_to_pillow():
    grey = encode(Image.fromarray(photo()).convert("L"), "JPEG")
    assert jpeg.plain_size(grey) == (40, 56)
    np.testing.assert_array_equal(decode_image(grey), pillow_rgb(grey))
    others = [
        encode(photo(), "JPEG", exif=exif_block(1)),
        encode(photo(), "JPEG", xmp=b"<x/>"),
        encode(Image.fromarray(photo()).convert("CMYK"), "JPEG"),
        encode(photo(), "PNG"),
        b"\xff\xd8",
        b"\xff\xd8\xff",
    ]
    assert [jpeg.plain_size(data) for data in others] == [None] * len(others)


@pytest.mark.parametrize("jpeg_decode", pixels_module.JPEG_DECODES)
def test_a_damaged_jpeg_has_the_same_outcome_with_and_without_the_fast_path(monkeypatch, jpeg_decode):
    rng = np.random.default_rng(0)
    original, spec = encode(photo(), "JPEG"), spec_of(8, jpeg_decode=jpeg_decode)

    def outcome(data):
        try:
            return decode_image(data, spec).tobytes()
        except DecodeError as error:
            return str(error)

    damaged = []
    for _ in range(150):
        data = bytearray(original[: rng.integers(2, len(original) + 1)] if rng.random() < 0.3 else original)
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        damaged.append(bytes(data))
    fast = [outcome(data) for data in damaged]
    monkeypatch.setattr(pixels_module, "simplejpeg", None)
    assert fast == [outcome(data) for data in damaged]
    assert 10 < sum(isinstance(result, str) for result in fast) < 140


# height, width -> scale at image_size 16, of which twice is 32: a side of 63 px becomes one of 32, rounded up
SCALES = {(62, 300): 1, (63, 64): 2, (124, 130): 2, (125, 131): 4, (130, 125): 4, (248, 900): 4, (249, 251): 8,
          (700, 530): 8, (40, 600): 1}  # fmt: skip


def scaled_shape(shape):
    scale = SCALES[shape]
    return -(-shape[0] // scale), -(-shape[1] // scale), 3


@pytest.mark.parametrize("interpolation", pixels_module.INTERPOLATIONS)
@pytest.mark.parametrize("resize_mode", pixels_module.RESIZE_MODES)
@pytest.mark.parametrize("shape", SCALES)
def test_a_scaled_jpeg_keeps_twice_the_target_size_and_hardly_changes(shape, resize_mode, interpolation):
    data = encode(photo(*shape), "JPEG", quality=95)
    spec = spec_of(16, resize_mode, interpolation, "scaled")
    assert decode_image(data, spec).shape == scaled_shape(shape)
    image = prepare_image(data, spec)
    assert image.size == shape and image.pixels.shape == (3, 16, 16) and image.pixels.flags.c_contiguous
    difference = np.abs(image.pixels.astype(int) - preprocess_image(data, spec_of(16, resize_mode, interpolation)))
    # a crop begins at a whole pixel of the smaller image
    assert difference.mean() <= (0 if SCALES[shape] == 1 else 0.6 if resize_mode == "squash" else 4)


def variants(shape):
    """The same photograph as different kinds of JPEGs, some of which only Pillow reads: name -> file."""
    pixels, kinds = photo(*shape), {}
    for name, options in JPEG_OPTIONS.items():
        kinds[name] = encode(pixels, "JPEG", **options)
    kinds["grey"] = encode(Image.fromarray(pixels).convert("L"), "JPEG")
    kinds["CMYK"] = encode(Image.fromarray(pixels).convert("CMYK"), "JPEG")
    kinds["Exif"] = encode(pixels, "JPEG", exif=exif_block(1))
    kinds["two pictures"] = encode(pixels, "MPO", save_all=True, append_images=[Image.fromarray(pixels[:20])])
    return kinds


@pytest.mark.parametrize("shape", [(63, 64), (125, 131), (700, 530)])
def test_every_kind_of_jpeg_is_scaled_alike_with_and_without_the_fast_path(monkeypatch, shape):
    spec, files = spec_of(16, jpeg_decode="scaled"), variants(shape)
    fast = {name: decode_image(data, spec) for name, data in files.items()}
    monkeypatch.setattr(pixels_module, "simplejpeg", None)
    for name, data in files.items():
        np.testing.assert_array_equal(decode_image(data, spec), fast[name], err_msg=name)
        expected = preprocess_image(data, spec_of(16)).astype(int)
        assert np.abs(preprocess_image(data, spec) - expected).mean() < 3, name
    np.testing.assert_array_equal(fast["Exif"], fast["4:2:0"])
    assert {pixels.shape for pixels in fast.values()} == {scaled_shape(shape)}


def test_tiny_jpegs_for_a_tiny_target_are_scaled_alike_with_and_without_the_fast_path(monkeypatch):
    spec = spec_of(1, jpeg_decode="scaled")
    files = [encode(photo(height, width), "JPEG") for height in range(1, 34, 3) for width in (1, 7, 15, 16, 29, 64)]
    fast = [decode_image(data, spec) for data in files]
    monkeypatch.setattr(pixels_module, "simplejpeg", None)
    for data, pixels in zip(files, fast, strict=True):
        np.testing.assert_array_equal(decode_image(data, spec), pixels)


@pytest.mark.parametrize("resize_mode", pixels_module.RESIZE_MODES)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_is_turned_upright_and_its_size_too(orientation, resize_mode):
    spec, pixels = spec_of(16, resize_mode, jpeg_decode="scaled"), photo(70, 91)
    plain, turned = encode(pixels, "JPEG"), encode(pixels, "JPEG", exif=exif_block(orientation))
    found, noted = decode_oriented(turned, spec)
    assert noted == orientation
    np.testing.assert_array_equal(found, pixels_module.upright(decode_image(plain, spec), orientation))
    assert decode_image(plain, spec).shape == (35, 46, 3)
    image = prepare_image(turned, spec)
    assert image.orientation == orientation and image.size == ((91, 70) if orientation >= 5 else (70, 91))
    expected = pixels_module.upright(preprocess_image(plain, spec).transpose(1, 2, 0), orientation).transpose(2, 0, 1)
    np.testing.assert_array_equal(image.pixels, expected)


@pytest.mark.parametrize("format, options", [("PNG", {}), ("WEBP", {}), ("TIFF", {"compression": "jpeg"})])
def test_other_formats_are_never_scaled(format, options):
    data = encode(photo(140, 150), format, **options)
    assert prepare_image(data, spec_of(16, jpeg_decode="scaled")).size == (140, 150)
    np.testing.assert_array_equal(
        preprocess_image(data, spec_of(16, jpeg_decode="scaled")), preprocess_image(data, spec_of(16))
    )


def lossless_jpeg(grey):
    """A lossless JPEG (ITU-T T.81, SOF3) of uint8 [H, W], each pixel predicted from its left neighbour."""
    left = np.column_stack([np.r_[128, grey[:-1, 0]], grey[:, :-1]]).astype(int)
    bits = ""
    for difference in (grey - left).ravel().tolist():
        length = abs(difference).bit_length()
        bits += f"{length:04b}"
        bits += f"{difference if difference > 0 else difference + (1 << length) - 1:0{length}b}" if length else ""
    bits += "1" * (-len(bits) % 8)
    scan = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).replace(b"\xff", b"\xff\0")
    parts = (
        (0xC3, struct.pack(">BHHB", 8, *grey.shape, 1) + bytes([1, 0x11, 0])),
        (0xC4, bytes([0, 0, 0, 0, 9, *[0] * 12]) + bytes(range(9))),
        (0xDA, bytes([1, 1, 0, 1, 0, 0])),
    )
    segments = b"".join(struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in parts)
    return b"\xff\xd8" + segments + scan + b"\xff\xd9"


def test_a_jpeg_that_has_no_smaller_scale_is_decoded_whole():
    grey = ((np.arange(96)[:, None] + np.arange(128)) * 0.9).astype(np.uint8)
    exact, scaled = (prepare_image(lossless_jpeg(grey), spec_of(16, jpeg_decode=how)) for how in ("exact", "scaled"))
    assert np.array_equal(exact.pixels, scaled.pixels) and scaled.size == (96, 128)
    assert np.array_equal(decode_image(lossless_jpeg(grey))[..., 0], grey)


def antialias_weights(source, target, interpolation):
    """float64 [target, source]: the textbook filter, stretched by the scale when shrinking."""
    scale = source / target
    stretch = max(scale, 1.0)
    kernels = {
        "bilinear": (1, lambda x: np.maximum(1 - x, 0)),
        "bicubic": (2, lambda x: np.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)),
        "lanczos": (3, lambda x: np.sinc(x) * np.sinc(x / 3)),
    }
    support, kernel = kernels[interpolation]
    weights = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * scale
        first = max(int(centre - support * stretch + 0.5), 0)
        last = min(int(centre + support * stretch + 0.5), source)
        distance = np.abs((np.arange(first, last) - centre + 0.5) / stretch)
        taps = np.where(distance < support, kernel(distance), 0)
        weights[row, first:last] = taps / taps.sum()
    return weights


def reference_resize(pixels, size, interpolation):
    rows = antialias_weights(pixels.shape[0], size, interpolation)
    columns = antialias_weights(pixels.shape[1], size, interpolation)
    return np.clip(np.einsum("hi,ijc,wj->chw", rows, pixels.astype(np.float64), columns, optimize=True), 0, 255)


@pytest.mark.parametrize("interpolation", pixels_module.INTERPOLATIONS)
@pytest.mark.parametrize("shape, size", [((40, 56), 16), ((40, 56), 64), ((500, 37), 32), ((900, 1200), 8)])
def test_squash_equals_the_float64_antialiased_resize_up_to_rounding(interpolation, shape, size):
    pixels = photo(*shape)
    result = preprocess_image(encode(pixels, "PNG"), spec_of(size, "squash", interpolation))
    assert result.dtype == np.uint8 and result.shape == (3, size, size) and result.flags.c_contiguous
    # each of the two passes rounds by half a step, and negative lobes amplify the first one's rounding by up to a third
    assert np.abs(result - reference_resize(pixels, size, interpolation)).max() <= 1.2


@pytest.mark.parametrize("shape", [(40, 57), (57, 40), (41, 41), (16, 90)])
def test_crop_is_the_squash_of_the_largest_centred_square(shape):
    pixels = photo(*shape)
    side = min(shape)
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    result = preprocess_image(encode(pixels, "PNG"), spec_of(16, "crop"))
    np.testing.assert_array_equal(result, preprocess_image(encode(square, "PNG"), spec_of(16, "squash")))


def test_a_very_long_image_is_cropped_without_a_giant_intermediate():
    pixels = np.repeat(np.arange(60000) // 300 % 256, 3).reshape(1, 60000, 3).astype(np.uint8)
    result = preprocess_image(encode(pixels, "PNG"), spec_of(64, "crop"))
    assert np.unique(result).tolist() == [pixels[0, 29999, 0]]


@pytest.mark.parametrize("interpolation", pixels_module.INTERPOLATIONS)
@pytest.mark.parametrize("resize_mode", pixels_module.RESIZE_MODES)
def test_an_image_of_the_target_size_keeps_its_pixels(interpolation, resize_mode):
    pixels = photo(32, 32)
    result = preprocess_image(encode(pixels, "PNG"), spec_of(32, resize_mode, interpolation))
    np.testing.assert_array_equal(result, pixels.transpose(2, 0, 1))
    assert result.flags.c_contiguous


def test_pixels_are_the_same_at_every_instruction_set_level_of_the_cpu():
    program = (
        "import hashlib, sys; from tests.sources.test_pixels import *; digest = hashlib.sha256()\n"
        "for mode in ('bilinear', 'bicubic'):\n"
        "    for shape in ((40, 56), (375, 500), (20, 17)):\n"
        "        for how in ('exact', 'scaled'):\n"
        "            digest.update(preprocess_image(encode(photo(*shape), 'JPEG'), spec_of(32, 'squash', mode, how)))\n"
        "print(digest.hexdigest())"
    )
    results = set()
    for level in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": level}
        command = [sys.executable, "-c", program]
        results.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(results) == 1 and len(results.pop().strip()) == 64


def test_importing_preprocess_does_not_import_torch():
    program = "import sys, distillery.sources.pixels; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def grey_png():
    return encode(Image.fromarray(photo()).convert("L"), "PNG")


def test_grey_is_repeated_in_three_channels():
    result = decode_image(grey_png())
    assert result.shape == (40, 56, 3)
    assert (result[..., :1] == result).all()
    np.testing.assert_array_equal(result[..., 0], np.asarray(Image.fromarray(photo()).convert("L")))


def test_one_bit_is_black_and_white():
    image = Image.fromarray(photo()).convert("1")
    result = decode_image(encode(image, "PNG"))
    np.testing.assert_array_equal(result[..., 1], np.asarray(image) * np.uint8(255))
    assert set(np.unique(result)) == {0, 255}


def test_alpha_is_laid_on_white():
    pixels = np.dstack([photo(), np.tile(np.linspace(0, 255, 56).astype(np.uint8), (40, 1))])
    alpha = pixels[..., 3:].astype(float) / 255
    expected = pixels[..., :3] * alpha + 255 * (1 - alpha)
    for format in ("PNG", "TIFF"):
        assert np.abs(decode_image(encode(pixels, format)) - expected).max() <= 1
    grey_alpha = Image.fromarray(pixels).convert("LA")
    grey = np.asarray(grey_alpha)[..., :1] * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(encode(grey_alpha, "PNG")) - grey).max() <= 1


def test_opaque_alpha_changes_nothing():
    pixels = np.dstack([photo(), np.full((40, 56), 255, np.uint8)])
    np.testing.assert_array_equal(decode_image(encode(pixels, "PNG")), pixels[..., :3])


def test_a_palette_shows_its_colours_and_its_transparent_entry_is_white():
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120])
    opaque = [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [100, 110, 120]]]
    assert decode_image(encode(image, "PNG")).tolist() == opaque
    for transparency in (2, b"\xff\xff\x00"):
        see_through = decode_image(encode(image, "PNG", transparency=transparency)).tolist()
        assert see_through == [opaque[0], [[255, 255, 255], [100, 110, 120]]]
    gif = decode_image(encode(image, "GIF", transparency=0)).tolist()
    assert gif[0][0] == [255, 255, 255] and gif[1] == opaque[1]


def test_a_transparent_colour_of_an_rgb_or_grey_png_is_white():
    pixels = np.full((2, 2, 3), 7, np.uint8)
    pixels[0, 0] = [1, 2, 3]
    assert decode_image(encode(pixels, "PNG", transparency=(1, 2, 3))).tolist()[0] == [[255] * 3, [7] * 3]
    grey = Image.fromarray(np.array([[5, 9]], np.uint8))
    assert decode_image(encode(grey, "PNG", transparency=5)).tolist() == [[[255] * 3, [9] * 3]]


PNG_KINDS = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16), (3, 1), (3, 2), (3, 4), (3, 8),
             (4, 8), (4, 16), (6, 8), (6, 16)]  # fmt: skip
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def png_of_samples(samples, colour_type, depth, extra=b""):
    """A PNG of samples [H, W, C] in 0..2**depth - 1, written by hand: Pillow writes few of the kinds."""
    height, width, _ = samples.shape
    rows = samples.reshape(height, -1)
    if depth == 16:
        lines = [row.astype(">u2").tobytes() for row in rows]
    else:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=-1)[..., -depth:]
        lines = [np.packbits(row).tobytes() for row in bits.reshape(height, -1)]
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"".join(b"\0" + line for line in lines)))
    return b"\x89PNG\r\n\x1a\n" + header + extra + body + png_chunk(b"IEND", b"")


@pytest.mark.parametrize("with_trns", [False, True])
@pytest.mark.parametrize("colour_type, depth", PNG_KINDS)
def test_every_kind_of_png_shows_its_colours_on_white(colour_type, depth, with_trns):
    rng = np.random.default_rng(depth)
    top = 2**depth - 1
    samples = rng.integers(0, top + 1, (9, 13, CHANNELS[colour_type]))
    levels = samples >> 8 if depth == 16 else samples * 255 // top
    alpha, extra = np.full((9, 13, 1), 255), b""
    if colour_type == 3:
        palette = rng.integers(0, 256, (top + 1, 3), dtype=np.uint8)
        alphas = rng.integers(0, 256, (top + 1) // 2, dtype=np.uint8) if with_trns else np.zeros(0, np.uint8)
        extra = png_chunk(b"PLTE", palette.tobytes()) + (png_chunk(b"tRNS", alphas.tobytes()) if with_trns else b"")
        alpha = np.append(alphas, np.full(top + 1 - len(alphas), 255))[samples]
        levels = palette[samples[..., 0]]
    elif colour_type in (4, 6):
        levels, alpha = levels[..., :-1], levels[..., -1:]
    else:
        samples[::2] = samples[0, 0]  # many have the colour, one differs from it in the lowest bit alone
        samples[2, 3] ^= [1] + [0] * (CHANNELS[colour_type] - 1)
        levels = samples >> 8 if depth == 16 else samples * 255 // top
        if depth == 16 and colour_type == 0:
            levels = (samples * 255 + 32767) // 65535
        if with_trns:
            alpha = np.where((samples == samples[0, 0]).all(-1, keepdims=True), 0, 255)
            extra = png_chunk(b"tRNS", samples[0, 0].astype(">u2").tobytes())
    expected = levels * (alpha / 255) + 255 * (1 - alpha / 255)
    found = decode_image(png_of_samples(samples, colour_type, depth, extra))
    assert np.abs(found - np.broadcast_to(expected, found.shape)).max() <= 0.5


def test_the_transparent_colour_of_16_bits_is_no_colour_of_8():
    samples = np.full((2, 2, 3), 5 << 8)
    found = decode_image(png_of_samples(samples, 2, 16, png_chunk(b"tRNS", struct.pack(">3H", 5, 5, 5))))
    assert np.unique(found).tolist() == [5]


def bitmap_of_claimed_alpha(bgra):
    """A BMP with a V4 header that names an alpha mask."""
    height, width, _ = bgra.shape
    pixels = bgra[::-1].tobytes()
    header = struct.pack("<IiiHHIIiiII", 108, width, height, 1, 32, 3, len(pixels), 0, 0, 0, 0)
    header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + bytes(52)
    return b"BM" + struct.pack("<IHHI", 14 + len(header) + len(pixels), 0, 0, 14 + len(header)) + header + pixels


def icon_of_bitmap(bgra, mask):
    """An ICO with one 32-bit bitmap and its one-bit mask, bool [H, W]; None: without."""
    height, width, _ = bgra.shape
    frame = struct.pack("<IiiHHIIiiII", 40, width, 2 * height, 1, 32, 0, 0, 0, 0, 0, 0) + bgra[::-1].tobytes()
    if mask is not None:
        padded = np.zeros((height, (width + 31) // 32 * 32), bool)
        padded[:, :width] = mask[::-1]
        frame += np.packbits(padded, axis=1).tobytes()
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, width, height, 0, 0, 1, 32, len(frame), 22) + frame


def test_a_bitmap_whose_alpha_is_empty_everywhere_shows_its_colours():
    bgra = np.dstack([photo(20, 28)[..., ::-1], np.zeros((20, 28), np.uint8)])
    mask = np.zeros((20, 28), bool)
    mask[3:9, 5:25] = True
    for data in (bitmap_of_claimed_alpha(bgra), icon_of_bitmap(bgra, None), icon_of_bitmap(bgra, mask & False)):
        np.testing.assert_array_equal(decode_image(data), photo(20, 28))
    masked = decode_image(icon_of_bitmap(bgra, mask))
    np.testing.assert_array_equal(masked, np.where(mask[..., None], 255, photo(20, 28)))


def test_alpha_that_is_empty_in_places_or_in_a_png_is_transparent():
    bgra = np.dstack([photo(20, 28)[..., ::-1], np.zeros((20, 28), np.uint8)])
    assert (decode_image(encode(bgra, "PNG")) == 255).all()
    assert (decode_image(encode(Image.fromarray(bgra), "ICO", sizes=[(28, 20)])) == 255).all()  # Pillow's hold PNGs
    bgra[0, 0, 3] = 255
    for data in (bitmap_of_claimed_alpha(bgra), icon_of_bitmap(bgra, None)):
        found = decode_image(data)
        assert found[0, 0].tolist() == photo(20, 28)[0, 0].tolist() and (found[1:] == 255).all()


MUCH = b"a" * 3_000_000
XMP_TURNED = b'<x tiff:Orientation="6"/>'
USELESS_CHUNKS = {
    "compressed text": png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(MUCH)),
    "texts of 66 MB": png_chunk(b"tEXt", b"parameters\0" + MUCH * 2) * 11,
    "text in UTF-8": png_chunk(b"iTXt", b"prompt\0\1\0en\0\0" + zlib.compress(MUCH)),
    "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(MUCH)),
    "profile": png_chunk(b"iCCP", b"camera\0\0" + zlib.compress(MUCH)),
    "unknown compression": png_chunk(b"zTXt", b"comment\0\7" + b"..."),
    "damaged text": png_chunk(b"tEXt", b"comment\0hello")[:-1] + b"?",
    "short gamma": png_chunk(b"gAMA", b""),
}


@pytest.mark.parametrize("name", sorted(USELESS_CHUNKS))
def test_a_png_has_its_pixels_whatever_its_texts_and_profiles_are(name):
    plain = encode(photo(), "PNG")
    for at in (33, len(plain) - 12):  # behind the header, and behind the pixels
        np.testing.assert_array_equal(decode_image(plain[:at] + USELESS_CHUNKS[name] + plain[at:]), photo())


@pytest.mark.parametrize(
    "turning",
    [
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(XMP_TURNED + MUCH)),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP_TURNED),
        png_chunk(b"eXIf", exif_block(6).removeprefix(b"Exif\0\0")),
    ],
)
def test_a_png_with_a_large_text_is_still_turned_upright(turning):
    plain = encode(photo(), "PNG")
    data = plain[:33] + turning + USELESS_CHUNKS["compressed text"] + plain[33:]
    np.testing.assert_array_equal(decode_image(data), np.rot90(photo(), -1))


def test_a_damaged_png_with_a_large_text_keeps_the_reason_of_the_file_as_it_is(monkeypatch):
    plain = encode(photo(), "PNG")
    for chunk in USELESS_CHUNKS.values():
        data = (plain[:33] + chunk + plain[33:])[: -len(plain) // 2]
        with pytest.raises(DecodeError) as reason:
            decode_image(data)
        with monkeypatch.context() as without_a_second_try:
            without_a_second_try.setattr(pixels_module, "bare_png", lambda data: None)
            with pytest.raises(DecodeError, match=f"^{re.escape(str(reason.value))}$"):
                decode_image(data)


@pytest.mark.parametrize("marker", [0xE1, 0xE2, 0xED, 0xFE])
def test_a_jpeg_has_its_pixels_whatever_its_segments_hold(marker):
    plain = encode(photo(), "JPEG")
    segment = b"\xff" + bytes([marker]) + struct.pack(">H", 60002) + b"Exif\0\0" + bytes(59994)
    np.testing.assert_array_equal(decode_image(plain[:20] + segment * 50 + plain[20:]), decode_image(plain))


def test_a_view_of_bytes_decodes_as_the_bytes_do():
    plain = encode(photo(), "PNG")
    with_text = plain[:33] + USELESS_CHUNKS["compressed text"] + plain[33:]
    bitmap = bitmap_of_claimed_alpha(np.zeros((4, 4, 4), np.uint8))
    for data in (with_text, bitmap, encode(photo(), "JPEG"), b"no image"):
        outcomes = []
        for given in (data, memoryview(data)):
            try:
                outcomes.append(decode_image(given).tolist())
            except DecodeError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("rgb", [(255, 255, 255), (0, 0, 0), (200, 40, 90), (20, 130, 240)])
def test_cmyk_shows_its_colour_whether_adobe_inverted_it_or_not(rgb):
    cmyk = Image.new("RGB", (16, 16), rgb).convert("CMYK")
    jpeg = encode(cmyk, "JPEG", quality=100)
    assert b"Adobe" in jpeg
    assert np.abs(decode_image(jpeg).astype(int) - rgb).max() <= 3
    assert np.abs(decode_image(encode(cmyk, "TIFF")).astype(int) - rgb).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_scaled_not_clipped(format):
    values = np.linspace(0, 65535, 40 * 56).astype(np.uint16).reshape(40, 56)
    result = decode_image(encode(Image.fromarray(values), format))
    np.testing.assert_array_equal(result[..., 2], np.rint(values / 257).astype(np.uint8))


def test_sixteen_bit_rgb_keeps_the_high_byte():
    pixel = struct.pack(">3H", 0x12FF, 0x8000, 0xFE01)
    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0" + pixel)) + png_chunk(b"IEND", b"")
    assert decode_image(b"\x89PNG\r\n\x1a\n" + chunks).tolist() == [[[0x12, 0x80, 0xFE]]]


def test_float_images_are_scaled_from_one_or_taken_as_levels():
    unit = np.array([[0.0, 0.5, 1.0]], np.float32)
    assert decode_image(encode(Image.fromarray(unit), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    levels = np.array([[0.4, 127.0, 254.6]], np.float32)
    assert decode_image(encode(Image.fromarray(levels), "TIFF"))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("value", [np.nan, -0.1, 256.0, np.inf])
def test_float_images_without_a_known_brightness_are_refused(value):
    data = encode(Image.fromarray(np.array([[0.5, value]], np.float32)), "TIFF")
    with pytest.raises(DecodeError, match="floating-point pixels outside 0..255"):
        decode_image(data)


def test_integer_images_without_a_known_brightness_are_refused():
    data = encode(Image.fromarray(np.array([[5, 70000]], np.int32)), "TIFF")
    with pytest.raises(DecodeError, match="integer pixels outside 0..65535"):
        decode_image(data)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied_once(orientation, format):
    options = {"lossless": True} if format == "WEBP" else {}
    plain = encode(photo(), format, **options)
    turned = encode(photo(), format, exif=exif_block(orientation), **options)
    stored = Image.fromarray(decode_image(plain))
    stored.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(turned), np.asarray(ImageOps.exif_transpose(stored)))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0",
        b"Exif\0\0garbage",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif_block(6)[:-9],
        exif_block(99),
        exif_block(0),
    ],
)
def test_a_broken_exif_block_is_ignored(block):
    data = encode(photo(), "JPEG", exif=b"Exif\0\0" + block)
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(photo(), "JPEG")))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (12, 10), colour) for colour in ((200, 10, 10), (10, 200, 10), (10, 10, 200))]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert np.unique(decode_image(data).reshape(-1, 3), axis=0).tolist() == [[200, 10, 10]]


BAD = {
    "empty": (b"", r"no data \(0 bytes\)"),
    "text": (b"<html>404: not found</html>" * 20, "not an image file of a known format"),
    "zeros": (bytes(1000), "not an image file of a known format"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image file of a known format"),
    "jpeg magic only": (b"\xff\xd8\xff\xe0", "."),
    "truncated jpeg": (encode(photo(), "JPEG")[:700], "truncated|broken"),
    "truncated png": (encode(photo(), "PNG")[:900], "."),
    "truncated webp": (encode(photo(), "WEBP")[:200], "."),
    "truncated gif": (encode(photo(), "GIF")[:900], "."),
    "truncated tiff": (encode(photo(), "TIFF")[:900], "."),
    "png bomb": (png_of_claimed_size(60000, 60000), f"more than {MAX_PIXELS} pixels"),
    "png just too large": (png_of_claimed_size(MAX_PIXELS + 1, 1), f"more than {MAX_PIXELS} pixels"),
    "jpeg bomb": (jpeg_of_claimed_size(65500, 65500), f"more than {MAX_PIXELS} pixels"),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_image_is_a_decode_error_with_a_short_reason_that_repeats(name):
    data, reason = BAD[name]
    messages = set()
    for _ in range(3):
        with pytest.raises(DecodeError, match=reason) as caught:
            preprocess_image(data, spec_of())
        messages.add(str(caught.value))
    (message,) = messages
    assert len(message) <= 200 and " at 0x" not in message and "<" not in message and "\n" not in message


def test_whatever_pillow_raises_for_a_file_becomes_a_decode_error_without_addresses(monkeypatch):
    class Odd(RuntimeError):
        pass

    def fail(_image):
        raise Odd(f"bad thing in {io.BytesIO()!r} at 0x7f00aa\nsecond line")

    monkeypatch.setattr(pixels_module, "_as_rgb", fail)
    with pytest.raises(DecodeError, match=r"^Odd: bad thing in \.\.\. at \.\.\. second line$"):
        decode_image(grey_png())


def test_every_cut_of_a_file_decodes_or_is_a_decode_error():
    outcomes = {"decoded": 0, "refused": 0}
    for format in ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM"):
        data = encode(photo(24, 24), format)
        for length in range(0, len(data), 23):
            try:
                assert decode_image(data[:length]).shape == (24, 24, 3)
                outcomes["decoded"] += 1
            except DecodeError:
                outcomes["refused"] += 1
    assert outcomes["refused"] > 20 * outcomes["decoded"]


def test_no_global_state_of_pillow_is_changed():
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data, _ in BAD.values():
            with pytest.raises(DecodeError):
                decode_image(data)
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, 89478485)


def test_threads_give_the_same_pixels_as_one_after_the_other():
    files = [encode(photo(seed=seed), format) for seed in range(6) for format in ("JPEG", "PNG", "GIF", "WEBP")]
    alone = [hashlib.sha256(preprocess_image(data, spec_of())).digest() for data in files]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda data: hashlib.sha256(preprocess_image(data, spec_of())).digest(), files * 3)
        assert list(together) == alone * 3


def test_the_normalisation_table_is_the_float64_formula_rounded_once_to_float32():
    table = normalisation_table(MEAN, STD, "float32")
    assert table.dtype == np.float32 and table.shape == (3, 256)
    for channel in range(3):
        for value in range(256):
            assert table[channel, value] == np.float32((value / 255 - MEAN[channel]) / STD[channel])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("mean, std", [(MEAN, STD), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)])
def test_half_width_tables_equal_torchs_cast_of_the_float32_table(dtype, mean, std):
    table = torch.from_numpy(normalisation_table(mean, std, dtype)).view(torch.int16)
    expected = torch.from_numpy(normalisation_table(mean, std, "float32")).to(getattr(torch, dtype))
    assert torch.equal(table, expected.view(torch.int16))


def test_a_table_of_pixels_is_refused():
    with pytest.raises(UserError, match="cannot be stored as 'uint8'; choose float32, float16 or bfloat16"):
        normalisation_table(MEAN, STD, "uint8")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("library", ["OpenCV", "NumPy", "one that writes elsewhere"])
@pytest.mark.parametrize("size", [(1, 1), (20, 21), (600, 600)])
def test_normalising_looks_every_pixel_up_in_its_channels_table(monkeypatch, dtype, library, size):
    if library != "OpenCV":
        elsewhere = SimpleNamespace(LUT=lambda channel, values, out: values[channel])
        monkeypatch.setattr(pixels_module, "load_look_up", lambda: None if library == "NumPy" else elsewhere)
    elif pixels_module.load_look_up() is None:
        pytest.skip("opencv-python-headless is not installed")
    table = normalisation_table(MEAN, STD, dtype)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8)
    pixels.flags.writeable = False  # as those of a file that is mapped
    out = np.empty(pixels.shape, table.dtype)
    normalise_into(pixels, table, out)
    for channel in range(3):
        np.testing.assert_array_equal(out[channel], table[channel][pixels[channel]])


def test_identity_tells_every_choice_apart_and_is_json():
    import json

    specs = [
        PreprocessSpec(*choice)
        for choice in [
            (32, "squash", "bicubic", MEAN, STD),
            (33, "squash", "bicubic", MEAN, STD),
            (32, "crop", "bicubic", MEAN, STD),
            (32, "squash", "bilinear", MEAN, STD),
            (32, "squash", "lanczos", MEAN, STD),
            (32, "squash", "bicubic", (0.5,) * 3, STD),
            (32, "squash", "bicubic", MEAN, (0.5,) * 3),
            (32, "squash", "bicubic", MEAN, STD, "scaled"),
        ]
    ]
    assert len({json.dumps(spec.identity(), sort_keys=True, allow_nan=False) for spec in specs}) == len(specs)
    assert json.loads(json.dumps(specs[0].identity())) == specs[0].identity()


def test_the_identity_of_exact_decoding_is_that_of_caches_made_before_there_was_a_choice():
    assert sha256_of(spec_of().identity()) == "3a93a6900bc30bc2f54d1122458a50effedaf9b537ecdfa1a56c136a4ef3e0c2"


@pytest.mark.parametrize(
    "values, message",
    [
        ((0, "squash", "bicubic", MEAN, STD), "image_size is 0; it must be at least 1 px"),
        ((8, "pad", "bicubic", MEAN, STD), "resize_mode is 'pad'; it must be one of squash, crop"),
        ((8, "crop", "nearest", MEAN, STD), "interpolation is 'nearest'; it must be one of bilinear, bicubic, lanczos"),
        ((8, "crop", "bicubic", MEAN, STD, "fast"), "jpeg_decode is 'fast'; it must be one of exact, scaled"),
        ((8, "crop", "bicubic", MEAN, (0.2, 0.0, 0.2)), "three numbers each, std above 0"),
        ((8, "crop", "bicubic", (0.5,), STD), "three numbers each"),
    ],
)
def test_an_impossible_specification_is_a_user_error(values, message):
    with pytest.raises(UserError, match=message):
        PreprocessSpec(*values)


def test_library_versions_name_what_could_change_pixels():
    versions = library_versions()
    assert versions["Pillow"] == Image.__version__
    assert versions["torch"] == torch.__version__.partition("+")[0]
    assert set(versions) == {"Pillow", "simplejpeg", "torch"}
