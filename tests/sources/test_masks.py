import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from distillery.sources.masks import preprocess_mask
from distillery.sources.pixels import DecodeError, PreprocessSpec, decode_oriented, resize_image

NUMBERS = np.random.default_rng(0).integers(0, 200, (9, 14))


def spec_of(size, mode="squash"):
    return PreprocessSpec(size, mode, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def encode(image, file_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def palette(numbers):
    image = Image.fromarray(numbers.astype(np.uint8)).convert("L")
    image.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    return image


def grey_png(numbers, bits):
    """A grey PNG of so many bits a sample, which Pillow reads but does not write."""
    rows = (np.unpackbits(numbers.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]).reshape(len(numbers), -1)
    data = b"".join(b"\0" + np.packbits(row).tobytes() for row in rows)
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", numbers.shape[1], len(numbers), bits, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(data)), (b"IEND", b""))  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    )


def as_stored(data, numbers, dtype="uint8", orientation=1):
    """The whole mask, which nothing resizes: a square one."""
    return preprocess_mask(data, numbers.shape, orientation, spec_of(len(numbers)), dtype)


SQUARE = np.arange(144).reshape(12, 12) % 251


@pytest.mark.parametrize(
    "name, data, numbers",
    [
        ("grey", encode(Image.fromarray(SQUARE.astype(np.uint8))), SQUARE),
        ("palette", encode(palette(SQUARE)), SQUARE),
        ("palette of 4 bits", encode(palette(SQUARE % 16), bits=4), SQUARE % 16),
        ("grey of 1 bit", encode(Image.fromarray(SQUARE % 2 == 1)), SQUARE % 2),
        ("grey of 2 bits", grey_png(SQUARE % 4, 2), SQUARE % 4),
        ("grey of 4 bits", grey_png(SQUARE % 16, 4), SQUARE % 16),
        ("grey of 16 bits", encode(Image.fromarray(SQUARE.astype(np.uint16))), SQUARE),
        ("32-bit integers", encode(Image.fromarray(SQUARE.astype(np.int32)), "TIFF"), SQUARE),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_numbers_of_every_kind_of_mask_are_those_stored(name, data, numbers):
    assert as_stored(data, numbers).tolist() == numbers.tolist(), name
    assert as_stored(data, numbers, "int16").dtype == np.int16


def test_the_largest_numbers_of_each_type_are_kept():
    for dtype, high in (("uint8", 255), ("int16", 32767)):
        numbers = np.array([[0, high], [1, high - 1]], np.uint16)
        assert as_stored(encode(Image.fromarray(numbers)), numbers, dtype).tolist() == numbers.tolist()


@pytest.mark.parametrize(
    "data, dtype, reason",
    [
        (b"", "uint8", r"^mask: no data"),
        (b"no image", "uint8", r"^mask is not an image file"),
        (encode(Image.fromarray(SQUARE.astype(np.uint8)))[:-30], "uint8", "^mask: "),
        (
            encode(Image.fromarray(SQUARE.astype(np.uint8)).convert("RGB")),
            "uint8",
            r"^mask has mode RGB; .*one channel",
        ),
        (encode(Image.fromarray(SQUARE.astype(np.uint8)).convert("LA")), "uint8", r"^mask has mode LA"),
        (encode(Image.fromarray(SQUARE.astype(np.float32)), "TIFF"), "uint8", r"^mask has mode F"),
        (encode(Image.fromarray(SQUARE.astype(np.uint8)), "JPEG"), "uint8", r"^mask is a JPEG, .*lossless"),
        (
            encode(Image.fromarray(SQUARE.astype(np.uint8)), "TIFF", compression="jpeg"),
            "uint8",
            r"^mask is a JPEG, .*lossless",
        ),
        (encode(Image.fromarray((SQUARE + 200).astype(np.uint16))), "uint8", r"^mask holds 343; .*0 to 255"),
        (encode(Image.fromarray((SQUARE + 32700).astype(np.uint16))), "int16", r"^mask holds 32843; .*0 to 32767"),
        (encode(Image.fromarray((SQUARE - 1).astype(np.int32)), "TIFF"), "int16", r"^mask holds -1; "),
    ],
    ids=range(11),
)
def test_what_is_no_mask_of_class_numbers_is_a_decode_error_that_says_why(data, dtype, reason):
    with pytest.raises(DecodeError, match=reason):
        as_stored(data, SQUARE, dtype)


def test_a_mask_of_another_size_than_its_image_is_a_decode_error_with_both_sizes():
    data = encode(Image.fromarray(NUMBERS.astype(np.uint8)))
    with pytest.raises(DecodeError, match=r"^mask is 9x14 px, its image 18x28 px$"):
        preprocess_mask(data, (18, 28), 1, spec_of(4), "uint8")
    with pytest.raises(DecodeError, match=r"^mask is 9x14 px, its image 14x9 px, before it is turned"):
        preprocess_mask(data, (9, 14), 6, spec_of(4), "uint8")


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("size", [3, 4, 9, 20, 28])
@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (12, 12)])
def test_each_pixel_is_the_one_under_its_centre_in_the_part_of_the_image_that_is_shown(mode, size, shape):
    numbers = np.random.default_rng(2).integers(0, 200, shape)
    height, width = shape
    top = left = 0
    if mode == "crop":
        height = width = min(shape)
        top, left = (shape[0] - height) // 2, (shape[1] - width) // 2
    found = preprocess_mask(encode(Image.fromarray(numbers.astype(np.uint8))), shape, 1, spec_of(size, mode), "uint8")
    for row in range(size):
        for column in range(size):
            y, x = top + int((row + 0.5) * height / size), left + int((column + 0.5) * width / size)
            assert found[row, column] == numbers[y, x]


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_a_mask_lies_on_its_image_however_the_image_is_turned_and_cut(mode, orientation, file_format):
    # four fields, of grey values that are the mask's numbers: they must coincide, but for the resized fields' edges
    numbers = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 8, axis=0), 12, axis=1)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, found = decode_oriented(encode(Image.fromarray(numbers).convert("RGB"), file_format, exif=exif))
    assert found == orientation
    spec = spec_of(8, mode)
    image = resize_image(pixels, spec)[0].astype(int)
    for options in ({}, {"exif": exif}):  # a mask that says so itself is not turned twice
        for kind in ("PNG", "TIFF"):
            data = encode(Image.fromarray(numbers), kind, **options)
            mask = preprocess_mask(data, pixels.shape[:2], found, spec, "uint8")
            inside = np.ix_([0, 1, 2, 5, 6, 7], [0, 1, 2, 5, 6, 7])
            assert np.abs(image[inside] - mask[inside]).max() <= 1


def test_a_mask_that_says_it_is_turned_when_its_image_is_not_is_a_decode_error():
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encode(Image.fromarray(SQUARE.astype(np.uint8)), exif=exif)
    with pytest.raises(DecodeError, match="^mask has the Exif orientation 3, its image 1$"):
        as_stored(data, SQUARE)
