"""Stage 1 with cache_dtype: jpeg: the same bytes however it is run, and sets to evaluate on stay pixels."""

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from mosaics import make_mosaics
from PIL import Image
from stage1 import MEAN, STD, SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache.encoded import RowEncoding
from distillery.cache.folder import load_index
from distillery.cache.images import decode_sizes
from distillery.cache.plan import CachePlan, survey_cache
from distillery.cache.verify import verify_cache
from distillery.config.load import load_configs, load_data_config
from distillery.precompute import jobs, pool
from distillery.precompute.estimate import (
    DecodeSpeed,
    dtype_line,
    job_lines,
    jpeg_encoding,
    measure_decoding,
    plan_lines,
    remote_lines,
)
from distillery.sources.hub import HubSplit
from distillery.sources.pixels import PreprocessSpec
from distillery.system.console import format_bytes
from distillery.system.errors import EXIT_DONE, EXIT_TOO_MANY_FAILED, UserError
from distillery.system.signals import StopFlag


class Photographs(SmallSource):
    """Files of many sizes and lengths, some longer than the 4 KiB of a page; rows 3 and 17 cannot be decoded."""

    def _encode(self, i: int) -> bytes:
        if i in (3, 17):
            return b"no image"
        rng, buffer = np.random.default_rng(i), io.BytesIO()
        pixels = rng.integers(0, 256, (int(rng.integers(4, 90)), int(rng.integers(4, 90)), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG" if i % 2 else "JPEG")
        return buffer.getvalue()


SOURCE = Photographs()
STORED = {
    "px": {"dtype": "jpeg", "encoding": RowEncoding(40, 90)},
    "original": {"dtype": "jpeg", "encoding": RowEncoding("original", 90)},
}


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """stored_size -> what one run makes of the source."""
    folder = tmp_path_factory.mktemp("reference")
    for name, stored in STORED.items():
        run_stage1(small_plan(folder / name, SOURCE, **stored), SOURCE)
        assert verify_cache(folder / name) == []
    return {name: folder_bytes(folder / name) for name in STORED}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("batch_size, num_workers", [(1, 1), (100, 1), (3, 2)])
def test_neither_batch_size_nor_workers_change_a_byte(tmp_path, references, stored, batch_size, num_workers):
    plan = small_plan(tmp_path, SOURCE, **STORED[stored])
    run_stage1(plan, SOURCE, batch_size=batch_size, num_workers=num_workers)
    assert folder_bytes(tmp_path) == references[stored]


def test_rows_that_are_larger_than_the_memory_of_a_unit_are_stored_too(tmp_path, references, monkeypatch):
    monkeypatch.setattr(pool, "_ENCODED_BYTES", 4096)
    run_stage1(small_plan(tmp_path, SOURCE, **STORED["px"]), SOURCE, batch_size=3)
    assert folder_bytes(tmp_path) == references["px"]


def test_array_jobs_and_a_cache_that_grows_equal_the_single_run(tmp_path, references):
    plan = small_plan(tmp_path / "array", SOURCE, **STORED["px"])
    for job in (2, 0, 1):
        run_stage1(plan, SOURCE, range(job, job + 1))
    for num_rows in (3, 12, 22):
        run_stage1(small_plan(tmp_path / "grown", SOURCE, max_samples=num_rows, **STORED["px"]), SOURCE)
    assert folder_bytes(tmp_path / "array") == folder_bytes(tmp_path / "grown") == references["px"]


@pytest.mark.parametrize("stored", STORED)
def test_a_shard_without_any_image_is_a_shard(tmp_path, stored):
    source = Photographs(9)
    source.images[:8] = [b"no image"] * 8
    plan = small_plan(tmp_path, source, **STORED[stored])
    run_stage1(plan, source)
    shard = torch.load(tmp_path / "images_shard_00000.pt", weights_only=True)
    assert shard["encoded"].numel() == 0 and shard["offsets"].tolist() == [0] * 9 and not shard["valid"].any()
    assert verify_cache(tmp_path) == [] and load_index(tmp_path).num_valid == 1
    assert len((tmp_path / "failures.jsonl").read_text().splitlines()) == 8


def test_a_damaged_shard_is_found_and_made_again(tmp_path, references):
    plan = small_plan(tmp_path, SOURCE, **STORED["px"])
    run_stage1(plan, SOURCE)
    path = tmp_path / "images_shard_00001.pt"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    report, _ = run_stage1(plan, SOURCE)
    assert report.shards_made == 1 and "rows of encoded differ from their checksums" in report.messages[0]
    assert folder_bytes(tmp_path) == references["px"]


def test_failed_images_are_listed_and_the_sizes_that_images_had_are_kept(references):
    record = json.loads(references["px"]["images_shard_00002.json"])
    assert record["failures"] == [{"global_idx": 17, "shard_idx": 2, "reason": "not an image file of a known format"}]
    sizes = decode_sizes(record["source_sizes"])
    with Image.open(io.BytesIO(SOURCE.images[16])) as image:
        assert sizes[0].tolist() == list(image.size[::-1]) and sizes[1].tolist() == [0, 0]


def parquet(folder, num_rows):
    """A data configuration of the first photographs, labelled, rows 3 and 17 broken."""
    table = pa.table({"image": SOURCE.images[:num_rows], "label": [i % 3 for i in range(num_rows)]})
    pq.write_table(table, folder / "labelled.parquet")
    return {
        "dataset_name": "parquet",
        "data_files": str(folder / "labelled.parquet"),
        "image_column": "image",
        "label_column": "label",
    }


def test_without_an_encoder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    folder = {"cache_dir": str(tmp_path / "cache"), "cache_dtype": "jpeg"}
    with pytest.raises(UserError, match="cache_dtype: jpeg needs the package simplejpeg"):
        jobs.open_jobs(load_data_config(parquet(tmp_path, 22) | folder), 1, 0)


def test_sets_to_evaluate_on_are_uint8_pixels_whatever_is_stored_of_them(tmp_path):
    training = parquet(tmp_path, 22)
    labelled = {key: training[key] for key in ("dataset_name", "image_column", "label_column")}
    labelled["data_files"] = {split: training["data_files"] for split in ("train", "test")}
    others = {"cache_dir": str(tmp_path / "cache"), "image_size": 16, "num_workers": 1, "cache_shard_size": 8}
    evaluation = {"labels": labelled, "masks": make_mosaics(tmp_path, 9, 3)}
    for dtype in ("jpeg", "uint8"):
        folder = {"cache_dir": str(tmp_path / dtype), "cache_dtype": dtype}
        configs = load_configs(training | others | folder | {"eval_datasets": evaluation})
        made = jobs.open_jobs(configs.data, 1, 0)
        for job in made:
            jobs.make_job(job, survey_cache(job.plan, job.shards), configs.data, 5, StopFlag())
        assert jobs.report_outcome(made, 0.1) == EXIT_DONE
        assert jobs.report_outcome(made, 0.01) == EXIT_TOO_MANY_FAILED
    assert load_index(tmp_path / "jpeg").dtype == "jpeg"
    assert load_index(tmp_path / "jpeg" / "eval" / "labels" / "test").dtype == "uint8"
    assert load_index(tmp_path / "jpeg" / "eval" / "masks" / "train").mask_dtype == "uint8"
    # the very bytes that they are beside a cache of pixels
    assert folder_bytes(tmp_path / "jpeg" / "eval") == folder_bytes(tmp_path / "uint8" / "eval")


def configuration(**changes):
    return load_data_config({"dataset_name": "me/x", "cache_dir": "c", "cache_dtype": "jpeg"} | changes)


@pytest.mark.parametrize("stored", STORED)
def test_the_bytes_of_the_plan_are_those_of_a_sample(tmp_path, references, stored):
    plan = small_plan(tmp_path / "none", SOURCE, **STORED[stored])
    speed = measure_decoding(SOURCE, plan.spec, "jpeg", plan.encoding)
    records = [
        json.loads(data) for name, data in references[stored].items() if name.startswith("images") and ".json" in name
    ]
    stored_bytes = sum(record["bytes"] for record in records)
    assert 0.7 * stored_bytes < 20 * speed.jpeg_bytes < 1.1 * stored_bytes
    survey = survey_cache(plan, range(3))
    lines = "\n".join(job_lines("images", SOURCE, plan, range(3), survey, speed))
    text = {"px": "shorter side at most 40 px, quality 90, 4:2:0", "original": "the files as they are"}[stored]
    assert f"jpeg ({text}), to be read as 8 px (squash, lanczos): 3 shards of 8, about " in lines
    assert "3 to go; about " in lines
    typical = "\n".join(job_lines("images", SOURCE, plan, range(3), survey))
    assert typical.count("about") == 2 and typical != lines
    run_stage1(plan, SOURCE, range(1))
    made = json.loads((tmp_path / "none" / "images_shard_00000.json").read_text())["bytes"]
    begun = "\n".join(job_lines("images", SOURCE, plan, range(3), survey_cache(plan, range(3)), speed))
    assert f"about {format_bytes(round(14 * made / 8))} to write" in begun
    *_, time = plan_lines([(plan, range(3))], tmp_path, 2, speed)
    assert "the cache's disk takes" in time


@pytest.mark.parametrize("stored", STORED)
def test_a_first_run_tells_the_bytes_of_its_rows_from_a_few_images(tmp_path, references, stored):
    plan = small_plan(tmp_path / "cache", SOURCE, **STORED[stored])
    (survey,) = jobs.survey_jobs([jobs.CacheJob(None, plan, SOURCE, range(3), [])])
    made = sum(len(data) for name, data in references[stored].items() if name.endswith(".pt")) / len(SOURCE)
    assert made / 3 < survey.row_bytes < made
    run_stage1(plan, SOURCE, range(1))
    (begun,) = jobs.survey_jobs([jobs.CacheJob(None, plan, SOURCE, range(3), [])])
    assert begun.row_bytes == survey_cache(plan, range(3)).row_bytes != survey.row_bytes


def test_the_plan_says_what_other_dtypes_would_take(tmp_path):
    data = configuration(image_size=224)
    speed = DecodeSpeed(56, 0.004, 110_000, 500 * 400, False, jpeg_bytes=24_107.0)
    spec = PreprocessSpec(224, "squash", "bicubic", MEAN, STD)
    plan = CachePlan(tmp_path, spec, "uint8", 2048, 500_000, 500_000, {}, False)
    line = dtype_line(plan, jpeg_encoding(data), speed)
    assert "uint8 75.3 GB, float16 and bfloat16 150.5 GB, float32 301.1 GB" in line
    assert (
        "jpeg about 12.1 GB (24,107 bytes an image, measured; shorter side at most 224 px, quality 90, 4:2:0)" in line
    )
    assert "jpeg" not in dtype_line(plan, jpeg_encoding(data), None)


def test_a_compressed_cache_of_a_data_set_that_is_not_here_is_planned_too():
    split = HubSplit("me/x", "parquet", "train", 3, 5 * 10**9, 500_000)
    for changes, size in (
        ({}, "about 12.0 GB"),
        ({"stored_size": 256}, "15.7 GB"),
        ({"stored_size": "original"}, "48.2 GB"),
    ):
        data = configuration(**changes)
        assert size in "\n".join(remote_lines("the training images", split, None, data.cache_dtype, data))
