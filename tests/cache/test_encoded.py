import io
import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import xxhash
from PIL import Image
from stage1 import MEAN, STD, SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache.encoded import RowEncoding, decode_row_sizes, encode_row_sizes, place_encoded_rows
from distillery.cache.folder import load_index, load_labels, load_shard_layout
from distillery.cache.images import IMAGE_SHARDS, small_tensors
from distillery.cache.plan import survey_cache
from distillery.cache.rebuild import rebuild_index
from distillery.cache.store import record_text
from distillery.cache.verify import verify_cache
from distillery.precompute.image_shard import PayloadWriter
from distillery.sources.pixels import DecodeError, PreprocessSpec, decode_image
from distillery.system.errors import UserError

SPEC = PreprocessSpec(16, "squash", "lanczos", MEAN, STD)
SOURCE = SmallSource()
JPEG = {"dtype": "jpeg", "encoding": RowEncoding(8, 90)}
FIRST = "images_shard_00000"


def picture(height: int, width: int) -> np.ndarray:
    """A smooth picture, uint8 [H, W, 3], that JPEG changes little; its upper left corner is red."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return (255 * np.stack([1 - (x + y) / 2, x * y, y / 2], axis=2)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, "JPEG", exif=exif, quality=95)


@pytest.mark.parametrize(
    "height, width, stored_size, shape",
    [
        (300, 400, 150, (150, 200)),
        (400, 300, 150, (200, 150)),
        (301, 400, 150, (150, 199)),
        (100, 900, 150, (100, 900)),
        (149, 151, 150, (149, 151)),
        (150, 150, 150, (150, 150)),
        (1, 5000, 150, (1, 5000)),
        (65_500, 3, 150, (65_500, 3)),
        (131_000, 4, 150, (65_500, 2)),
        (131_000, 1, 150, (65_500, 1)),
        (90_000, 300, 225, (65_500, 218)),
        (70_000, 80_000, "original", (70_000, 80_000)),
    ],
)
def test_the_shorter_side_is_stored_size_the_aspect_stays_and_nothing_is_enlarged(height, width, stored_size, shape):
    assert RowEncoding(stored_size, 90).stored_shape(height, width) == shape


@pytest.mark.parametrize("jpeg_decode", ["exact", "scaled"])
@pytest.mark.parametrize(
    "kind, shape",
    [("RGB", (60, 80)), ("large", (480, 640)), ("grey", (60, 80)), ("CMYK", (60, 80)), ("alpha", (60, 80)),
     ("small", (10, 12)), ("turned", (160, 120)), ("strip", (65_600, 12))],
)  # fmt: skip
def test_a_row_is_an_upright_rgb_jpeg_of_what_a_viewer_shows(kind, shape, jpeg_decode):
    image = Image.fromarray(picture(*shape))
    data = {
        "grey": lambda: encoded(image.convert("L"), "JPEG", quality=95),
        "CMYK": lambda: encoded(image.convert("CMYK"), "JPEG", quality=95),
        "alpha": lambda: encoded(Image.fromarray(np.dstack([picture(*shape), np.full(shape, 99, np.uint8)])), "PNG"),
        "turned": lambda: turned(image, 6),
        "strip": lambda: encoded(image, "PNG"),
    }.get(kind, lambda: encoded(image, "JPEG", quality=95))()
    encoding = RowEncoding(40, 90)
    row, size = encoding.encode(data, replace(SPEC, jpeg_decode=jpeg_decode))
    expected = decode_image(data)
    assert size == expected.shape[:2]
    with Image.open(io.BytesIO(row)) as stored:
        assert (stored.format, stored.mode, stored.size[::-1]) == ("JPEG", "RGB", encoding.stored_shape(*size))
        assert not stored.getexif() and stored.layer[0][1:3] == (2, 2)  # 4:2:0
        wanted = Image.fromarray(expected).resize(stored.size, Image.Resampling.LANCZOS)
        assert np.abs(np.asarray(stored, int) - np.asarray(wanted, int)).mean() < 3


def test_a_scaled_jpeg_keeps_twice_stored_size():
    spec = RowEncoding(40, 90).decode_spec(replace(SPEC, jpeg_decode="scaled"))
    assert [spec.jpeg_scale(height, 900) for height in (640, 320, 160, 158)] == [8, 4, 2, 1]


def test_original_keeps_every_byte_of_any_format_that_can_be_decoded_and_no_other():
    image, original = Image.fromarray(picture(30, 20)), RowEncoding("original", 90)
    for data in (encoded(image, "PNG"), encoded(image, "JPEG") + b"behind it", encoded(image, "WEBP")):
        assert original.encode(data, SPEC) == (data, (30, 20))
    assert original.encode(turned(image, 6), SPEC)[1] == (20, 30)
    for data in (b"", b"no image", encoded(image, "JPEG")[:200]):
        for encoding in (original, RowEncoding(40, 90)):
            with pytest.raises(DecodeError):
                encoding.encode(data, SPEC)


def test_a_lower_quality_takes_fewer_bytes():
    data = encoded(Image.fromarray(picture(60, 80)), "PNG")
    sizes = [len(RowEncoding(40, quality).encode(data, SPEC)[0]) for quality in (100, 90, 50)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_without_simplejpeg_jpegs_cannot_be_stored_and_originals_can(monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with pytest.raises(UserError, match="needs the package simplejpeg. Run: pip install simplejpeg"):
        RowEncoding(8, 90).identity()
    assert RowEncoding("original", 90).identity() == {"stored_size": "original"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    run_stage1(small_plan(folder, SOURCE, **JPEG), SOURCE)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def test_plain_torch_load_gives_the_tensors_and_rows_are_files(made):
    for s, rows in enumerate((8, 8, 6)):
        shard = torch.load(made / f"images_shard_{s:05d}.pt", weights_only=True)
        assert list(shard) == ["encoded", "offsets", "valid", "labels", "meta"]
        kinds = [(shard[name].dtype, shard[name].shape) for name in ("encoded", "offsets", "valid", "labels")]
        num_bytes = len(shard["encoded"])
        assert kinds == [
            (torch.uint8, (num_bytes,)), (torch.int64, (rows + 1,)), (torch.bool, (rows,)), (torch.int64, (rows,)),
        ]  # fmt: skip
        assert shard["offsets"][0] == 0 and shard["offsets"][-1] == num_bytes
        for row in range(rows):
            data = bytes(shard["encoded"][shard["offsets"][row] : shard["offsets"][row + 1]].numpy())
            i = 8 * s + row
            assert shard["labels"][row] == i % 7 and shard["valid"][row] == (i not in (3, 17))
            assert data == (b"" if i in (3, 17) else RowEncoding(8, 90).encode(SOURCE.images[i], SPEC)[0])
        assert json.loads(shard["meta"])["identity"]["preprocess"]["stored_size"] == 8


def test_the_bytes_of_a_compressed_shard_of_format_3_never_change(tmp_path):
    rows, sizes = [b"first", b"", b"third"], np.array([5, 0, 5])
    small = small_tensors(sizes > 0, np.array([4, 5, 6]), sizes)
    with open(tmp_path / "s.pt", "w+b") as file:
        payload = PayloadWriter(file.fileno())
        payload.append(b"".join(rows))
        payload.finish(place_encoded_rows(sizes), small, "{}")
    # another value here makes every compressed cache there is unreadable for stage 1: raise format_version instead
    assert xxhash.xxh3_64_hexdigest((tmp_path / "s.pt").read_bytes()) == "e3af2837f4bc86ab"


def test_the_index_says_jpeg_and_readers_find_every_row_and_label(made):
    index = load_index(made)
    assert (index.dtype, index.pixel_dtype, index.image_shape) == ("jpeg", "uint8", (3, 8, 8))
    assert not index.normalized and index.complete and index.num_valid == 20
    layout = load_shard_layout(index, 2)
    data = index.shard_path(2).read_bytes()
    first, after = layout.payload_offset + layout.offsets[:2]
    assert data[first:after] == RowEncoding(8, 90).encode(SOURCE.images[16], SPEC)[0]
    assert layout.offsets[1] == layout.offsets[2] and not layout.valid[1]
    assert load_labels(index, 2).tolist() == [i % 7 for i in range(16, 22)]


def test_verify_finds_a_flipped_byte_anywhere_in_a_shard_and_names_the_row(cache):
    path = cache / f"{FIRST}.pt"
    assert verify_cache(cache) == []
    data = path.read_bytes()
    layout = load_shard_layout(load_index(cache), 0)
    places = {
        "rows of encoded differ from their checksums, the first is row 4": 128 + int(layout.offsets[4]),
        "rows of encoded differ from their checksums, the first is row 7": 128 + int(layout.offsets[8]) - 1,
        "the bytes around its rows": data.index(layout.offsets.astype("<i8").tobytes()) + 8,
        "damaged|differs from its record": data.index(b'"row_sizes"') + 2,
    }
    for reason, position in places.items():
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        problems = verify_cache(cache)
        assert len(problems) == 1 and str(path) in problems[0], (reason, problems)
        assert any(part in problems[0] for part in reason.split("|")), problems
    path.write_bytes(data)
    assert verify_cache(cache) == []


def test_everything_but_the_shards_is_made_again_from_the_shards(cache):
    before = folder_bytes(cache)
    for path in [*cache.glob("*.json"), *cache.glob("*.jsonl")]:
        path.unlink()
    rebuild_index(cache)
    assert folder_bytes(cache) == before
    expected = load_shard_layout(load_index(cache), 0).offsets
    (cache / f"{FIRST}.json").unlink()
    assert (load_shard_layout(load_index(cache), 0).offsets == expected).all()
    survey = survey_cache(small_plan(cache, SOURCE, **JPEG), range(3))
    assert (survey.done, survey.to_check) == ([1, 2], [0])


def sizes_of(record, change):
    return {"row_sizes": encode_row_sizes(change(decode_row_sizes(record)))}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: sizes_of(record, lambda sizes: sizes[:-1]),
        lambda record: sizes_of(record, lambda sizes: np.append(sizes, 1)),
        lambda record: sizes_of(record, lambda sizes: np.where(np.arange(8) == 1, 0, sizes)),  # valid, and empty
        lambda record: sizes_of(record, lambda sizes: np.where(np.arange(8) == 3, 5, sizes)),  # not valid, not empty
        lambda record: sizes_of(record, lambda sizes: np.where(np.arange(8) == 1, 2**32 - 1, sizes)),  # beyond the file
        lambda record: {"row_sizes": {"values": "AAAAA"}},
        lambda record: {"row_sizes": {}},
        lambda record: {"row_sizes": None},
        lambda record: {"payload_offset": 256},
        lambda record: {"mask_dtype": "uint8", "mask_classes": [0], "mask_checksums": record["row_checksums"]},
        lambda record: {"dtype": "uint8"},
    ],
)
def test_a_record_whose_row_sizes_cannot_be_is_refused(cache, change):
    path = cache / f"{FIRST}.json"
    record = IMAGE_SHARDS.read_record(path)
    path.write_bytes(record_text(record | change(record)))  # its own hash is right
    with pytest.raises(UserError, match=f"{FIRST}.json: (not a shard's record|its fields contradict)"):
        IMAGE_SHARDS.read_record(path)


def test_row_sizes_are_of_compressed_caches_alone(tmp_path):
    run_stage1(small_plan(tmp_path, SOURCE, max_samples=8), SOURCE)
    path = tmp_path / f"{FIRST}.json"
    record = IMAGE_SHARDS.read_record(path)
    path.write_bytes(record_text(record | {"row_sizes": encode_row_sizes(np.ones(8, np.int64))}))
    with pytest.raises(UserError, match="contradict"):
        IMAGE_SHARDS.read_record(path)


def test_row_sizes_that_move_bytes_from_row_to_row_are_found(cache):
    path = cache / f"{FIRST}.json"
    record = IMAGE_SHARDS.read_record(path)
    moved = sizes_of(record, lambda sizes: sizes + np.array([1, -1, 0, 0, 0, 0, 0, 0]))
    path.write_bytes(record_text(record | moved))
    assert any("differs from its record in row_sizes" in problem for problem in verify_cache(cache))


@pytest.mark.parametrize(
    "edit, reason",
    [
        ({"mask_dtype": "uint8"}, "not of this format"),
        ({"dtype": "png"}, "not of this format"),
        ({"dtype": "uint8"}, "unlike index.json|cannot hold"),
        ({"image_shape": [3, 9, 9]}, "unlike index.json"),
        (
            {
                "num_samples": 10**9,
                "source_num_samples": 10**9,
                "shards": [
                    {
                        "shard_path": f"{FIRST}.pt",
                        "global_start": 0,
                        "num_samples": 10**9,
                        "num_failed": 0,
                        "bytes": 10**6,
                        "hash": "",
                    }
                ],
            },
            "cannot hold 1000000000 images in 1000000 bytes",
        ),
    ],
)
def test_a_hostile_index_is_refused(cache, edit, reason):
    path = cache / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    with pytest.raises(UserError, match=reason):
        load_shard_layout(load_index(cache), 0)


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"encoding": RowEncoding(9, 90)}, "preprocess.stored_size: the cache has 8, now it would be 9"),
        ({"encoding": RowEncoding(8, 91)}, "preprocess.jpeg_quality: the cache has 90, now it would be 91"),
        (
            {"encoding": RowEncoding("original", 90)},
            "stored_size: the cache has 8, now it would be 'original'",
        ),
        ({"dtype": "uint8", "encoding": None}, "dtype: the cache has 'jpeg', now it would be 'uint8'"),
    ],
)
def test_another_encoding_is_refused_field_by_field(made, changes, line):
    with pytest.raises(UserError, match=line):
        survey_cache(small_plan(made, SOURCE, **JPEG | changes), range(3))


def test_another_version_of_the_encoder_is_refused(made, monkeypatch):
    import simplejpeg

    monkeypatch.setattr(simplejpeg, "__version__", "1.0.0")
    version = json.loads((made / "index.json").read_text())["preprocess"]["encoder"].removeprefix("simplejpeg ")
    told = (
        f"preprocess.encoder: the cache has 'simplejpeg {version}', now it would be 'simplejpeg 1.0.0'\n"
        rf"Nothing was written. Install the version of the cache \(pip install simplejpeg=={version}\), or give another"
    )
    with pytest.raises(UserError, match=told):
        survey_cache(small_plan(made, SOURCE, **JPEG), range(3))
