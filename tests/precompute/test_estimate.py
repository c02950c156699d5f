import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from distillery.cache.encoded import RowEncoding
from distillery.cache.plan import CachePlan
from distillery.config.load import load_data_config
from distillery.precompute import estimate
from distillery.precompute.estimate import DecodeSpeed, measure_decoding, plan_lines, remote_lines, sampled_row_bytes
from distillery.precompute.jobs import list_parts
from distillery.sources.hub import HubSplit
from distillery.sources.pixels import PreprocessSpec

SPEC = PreprocessSpec(32, "squash", "lanczos", (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
JPEG = RowEncoding(32, 90)
DECODING = DecodeSpeed(num_images=56, seconds=0.004, encoded_bytes=110_000, pixels=500 * 400, needs_torch=True)


class Images:
    """A source of encoded images in memory."""

    def __init__(self, images):
        self.images, self.asked = images, []

    def __len__(self):
        return len(self.images)

    def read(self, start, stop):
        self.asked.append((start, stop))
        return self.images[start:stop]


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_a_few_images_are_decoded_from_the_middle(png_images, dtype):
    source = Images(png_images)
    speed = measure_decoding(source, SPEC, dtype, JPEG, num_images=20)
    middle = (len(png_images) - 20) // 2
    assert source.asked == [(middle, middle + 20)]
    assert speed.num_images == 12  # the first eight pay for what happens once
    assert 0 < speed.seconds < 1
    assert speed.encoded_bytes == pytest.approx(np.mean([len(data) for data in png_images[middle : middle + 20]]))
    assert speed.pixels > 0
    assert not speed.needs_torch


def jpeg(height, width):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize("jpeg_decode, other", [("exact", "scaled"), ("scaled", "exact")])
def test_large_jpegs_are_decoded_both_ways(jpeg_decode, other):
    images = [b"broken", jpeg(300, 200), jpeg(70, 40), jpeg(400, 250)] * 4
    speed = measure_decoding(Images(images), replace(SPEC, jpeg_decode=jpeg_decode), "uint8", JPEG)
    name, seconds, pixels = speed.other
    assert (name, pixels) == (other, 300 * 200) and 0 < seconds < 1
    # a worker needs room for what it decodes: at half the size
    assert speed.pixels == (400 * 250 if jpeg_decode == "exact" else 200 * 125)


def test_where_no_image_is_scaled_nothing_is_decoded_twice(png_images):
    assert measure_decoding(Images([*png_images[:9], jpeg(126, 80)] * 2), SPEC, "uint8", JPEG).other is None


@pytest.mark.parametrize(
    "other, line",
    [
        (
            ("scaled", 0.003, 4.1e6),
            "scaled would take 3 ms an image instead of 4 (the median image has 4.1 megapixels)",
        ),
        (("scaled", 0.0033, 4.1e6), None),
        (("exact", 0.0123, 4.1e6), "exact would take 12.3 ms an image instead of 4 (the median image has 4.1 megapix"),
    ],
)
def test_the_plan_says_what_the_other_jpeg_decode_takes_where_it_is_worth_it(tmp_path, monkeypatch, other, line):
    text = "\n".join(lines_of(tmp_path, monkeypatch, speed=replace(DECODING, other=other)))
    assert ("jpeg_decode: " in text) == (line is not None) and (line or "") in text


def test_a_source_of_one_image_is_enough(png_images):
    assert measure_decoding(Images(png_images[:1]), SPEC, "float32", JPEG).num_images == 1


def test_images_that_cannot_be_decoded_tell_nothing():
    assert measure_decoding(Images([b"broken"] * 20), SPEC, "float32", JPEG) is None


def test_encoded_rows_of_images_that_cannot_be_decoded_count_as_typical(tmp_path):
    plan = CachePlan(tmp_path, SPEC, "jpeg", 10, 20, 20, {}, False, encoding=JPEG)
    assert sampled_row_bytes(Images([b"broken"] * 20), plan) == plan.row_bytes


def test_plan_lines_count_what_is_left_of_every_folder(tmp_path):
    plans = [
        CachePlan(tmp_path / name, SPEC, "uint8", 10, num_rows, num_rows, {"num_rows": num_rows}, False)
        for name, num_rows in (("a", 25), ("b", 7))
    ]
    (line,) = plan_lines([(plans[0], [1, 2]), (plans[1], [])], tmp_path, 4, None)
    assert line.startswith("files: 8 (2 shards, a record each")  # and index and failures of two folders


def lines_of(tmp_path, monkeypatch, *, num_workers=16, speed=DECODING, inodes=None):
    """The plan of 500,000 images of 224 px, on a file system with so many free inodes."""
    monkeypatch.setattr(estimate, "free_inodes", lambda folder: inodes)
    spec = PreprocessSpec(224, "squash", "bicubic", SPEC.mean, SPEC.std)
    plan = CachePlan(tmp_path, spec, "float32", 2048, 500_000, 500_000, {}, False)
    return plan_lines([(plan, range(plan.num_shards))], tmp_path, num_workers, speed)


def test_plan_lines_tell_files_memory_speed_and_hours(tmp_path, monkeypatch):
    text = "\n".join(lines_of(tmp_path, monkeypatch, inodes=10**6))
    assert "files: 492 (245 shards, a record each, index and failures); 1,000,000 are free" in text
    assert "16 decode workers of 89.9 MB" in text
    assert "56 images took 4 ms each here: 250 images/s by one worker, 4,000 by 16" in text
    assert "about 2.1 min for the 500,000 images of this job" in text
    assert "the source gives 440.0 MB/s and the cache's disk takes 2.4 GB/s" in text


def test_too_few_inodes_are_a_warning(tmp_path, monkeypatch):
    warning = "WARNING: 492 files are to be made, the file system has room for 100"
    assert warning in "\n".join(lines_of(tmp_path, monkeypatch, inodes=100))
    assert "WARNING" not in "\n".join(lines_of(tmp_path, monkeypatch))


def test_without_a_measurement_only_the_files_are_told(tmp_path, monkeypatch):
    assert len(lines_of(tmp_path, monkeypatch, speed=None)) == 1


def test_one_worker_is_this_process(tmp_path, monkeypatch):
    text = "\n".join(lines_of(tmp_path, monkeypatch, num_workers=1))
    assert "one worker decodes in this process" in text
    assert "250 images/s by one worker\n" in text


def test_a_remote_data_set_is_planned_from_what_the_hub_says():
    data = load_data_config({"dataset_name": "me/x", "cache_dir": "c", "image_size": 224, "cache_dtype": "uint8"})
    split = HubSplit("me/x", "parquet", "train", 3, 5 * 10**9, 600_000)
    text = "\n".join(remote_lines("the training images", split, 500_000, "uint8", data))
    assert "600,000 images in 3 files (5.0 GB to download), split 'train', from me/x on the hub" in text
    assert "500,000 of 600,000 images: 245 shards of 2,048, 75.3 GB to write, 492 files" in text
    assert "--download_only" in text


def test_remote_evaluation_sets_of_a_compressed_cache_are_planned_as_uint8():
    keys = {"dataset_name": "me/x", "cache_dir": "c", "image_size": 224, "cache_dtype": "jpeg"}
    data = load_data_config({**keys, "eval_datasets": {"e": {"dataset_name": "me/e"}}})
    training, *evaluation = list_parts(data)
    assert [part.dtype for part in evaluation] == ["uint8", "uint8"]
    split = HubSplit("me/e", "parquet", "test", 1, 10**6, 1000)
    planned = [remote_lines(part.title, split, None, part.dtype, data)[1] for part in (training, evaluation[1])]
    assert "about" in planned[0] and f"shards of 2,048, {1000 * 3 * 224 * 224 / 1e6:.1f} MB to write" in planned[1]


def test_what_the_hub_does_not_say_is_called_unknown():
    data = load_data_config({"dataset_name": "me/x", "cache_dir": "c"})
    split = HubSplit("me/x", "imagefolder", "train", 1, None, None)
    text = "\n".join(remote_lines("the training images", split, None, "float32", data))
    assert "images in 1 file (of unknown size)" in text
    assert "not known before the download" in text
