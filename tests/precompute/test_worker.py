import io

import numpy as np
import pytest
import xxhash
from PIL import Image
from stage1 import MEAN, STD

from distillery.cache.archive import DTYPES
from distillery.precompute.worker import Unit, decode_unit
from distillery.sources.pixels import PreprocessSpec, normalisation_table

SIZE = 12


def image(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def expected_rows(images: list[bytes], dtype: str) -> np.ndarray:
    rows = np.zeros((len(images), 3, SIZE, SIZE), DTYPES[dtype])
    for row, data in zip(rows, images, strict=True):
        if data != b"no image":
            pixels = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
            for channel in range(3):
                row[channel] = (
                    pixels[channel]
                    if dtype == "uint8"
                    else normalisation_table(MEAN, STD, dtype)[channel][pixels[channel]]
                )
    return rows


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_unit_stores_every_pixel_through_its_channels_table_and_zeros_for_bad_images(dtype):
    images = [b"no image" if i in (0, 3) else image(i) for i in range(7)]
    rows = expected_rows(images, dtype)
    spec = PreprocessSpec(SIZE, "squash", "bicubic", MEAN, STD)
    memory = memoryview(bytearray(b"\xff" * rows.nbytes))
    result = decode_unit(Unit(5, [memoryview(data) for data in images], spec, dtype), memory)
    assert memory == rows.tobytes()
    assert result.checksums.tolist() == [xxhash.xxh3_64_intdigest(row) for row in rows]
    assert [row for row, _ in result.failures] == [5, 8]
    assert result.source_sizes.tolist() == [[0, 0] if i in (0, 3) else [SIZE, SIZE] for i in range(7)]


@pytest.mark.parametrize("jpeg_decode", ["exact", "scaled"])
def test_the_size_an_image_had_is_that_of_the_file_turned_upright(jpeg_decode):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (70, 51)).save(buffer, "JPEG", exif=exif)
    spec = PreprocessSpec(SIZE, "crop", "lanczos", MEAN, STD, jpeg_decode)
    result = decode_unit(Unit(0, [buffer.getvalue()], spec, "uint8"), memoryview(bytearray(3 * SIZE * SIZE)))
    assert result.source_sizes.tolist() == [[70, 51]]
