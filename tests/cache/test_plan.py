import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock

from distillery.cache import plan as plan_module
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.plan import survey_cache
from distillery.cache.store import FutureFormatError, record_text
from distillery.precompute.image_shard import PayloadWriter
from distillery.sources.pixels import PreprocessSpec
from distillery.system.errors import UserError
from tests.support.caches import finish

SOURCE = SmallSource()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    run_stage1(small_plan(folder, SOURCE), SOURCE)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    """A copy in which every record is newer than its shard, as the writer leaves them."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for path in sorted(made.iterdir(), key=lambda path: (path.suffix != ".pt", path.name)):
        shutil.copy(path, folder / path.name)
    wait_for_the_clock(folder)
    return folder


def survey(folder, shards=range(3), **changes):
    return survey_cache(small_plan(folder, SOURCE, **changes), shards)


def test_the_shards_partition_the_rows(tmp_path):
    plan = small_plan(tmp_path, SOURCE, shard_size=5)
    assert [plan.rows_of(k) for k in range(plan.num_shards)] == [(0, 5), (5, 10), (10, 15), (15, 20), (20, 22)]
    assert plan.row_bytes == 3 * 8 * 8 * 4


def test_the_fingerprint_depends_on_what_decides_the_bytes_and_on_nothing_else(tmp_path):
    plan = small_plan(tmp_path, SOURCE)
    spec = plan.spec
    for changes in (
        {"dtype": "uint8"},
        {"shard_size": 9},
        {"labels": False},
        {"source_identity": {"kind": "other"}},
        {"spec": replace(spec, image_size=9)},
        {"spec": replace(spec, resize_mode="crop")},
        {"spec": replace(spec, interpolation="bicubic")},
        {"spec": replace(spec, std=(1.0, 1.0, 1.0))},
    ):
        assert replace(plan, **changes).fingerprint != plan.fingerprint
    for changes in ({"directory": tmp_path / "x"}, {"num_rows": 3}):
        assert replace(plan, **changes).fingerprint == plan.fingerprint


def test_an_empty_or_absent_folder_has_everything_missing(tmp_path):
    assert survey(tmp_path / "absent").missing == [0, 1, 2]
    assert survey(tmp_path).missing == [0, 1, 2]


def test_a_finished_cache_has_everything_done_and_is_only_read(cache):
    before = folder_bytes(cache)
    found = survey(cache)
    assert (found.done, found.to_check, found.missing, found.notes) == ([0, 1, 2], [], [], [])
    assert folder_bytes(cache) == before


@pytest.mark.parametrize("what", ["no record", "damaged record", "written", "longer", "renamed over"])
def test_a_shard_that_may_have_changed_since_its_record_is_to_be_checked(cache, what):
    shard, record = cache / "images_shard_00001.pt", cache / "images_shard_00001.json"
    if what == "no record":
        record.unlink()
    elif what == "damaged record":
        record.write_bytes(record.read_bytes()[:-9])
    elif what == "written":
        with open(shard, "r+b") as file:
            file.write(file.read(1))
        times = record.stat()
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))  # a forged mtime hides nothing
    elif what == "longer":
        with open(shard, "ab") as file:
            file.write(b"\0")
    else:
        os.replace(shard, cache / "aside")
        os.replace(cache / "aside", shard)
    assert survey(cache).to_check == [1]


def test_a_vanished_shard_is_missing_even_though_its_record_stands(cache):
    (cache / "images_shard_00001.pt").unlink()
    assert survey(cache).missing == [1]


def test_a_short_last_shard_is_missing_in_a_cache_that_shall_grow_and_done_in_one_that_shall_shrink(tmp_path):
    run_stage1(small_plan(tmp_path, SOURCE, max_samples=12), SOURCE)
    assert survey(tmp_path).missing == [1, 2]
    assert survey(tmp_path).done == [0]
    assert survey(tmp_path, range(2), max_samples=10).done == [0, 1]


@pytest.mark.parametrize(
    "changes, lines",
    [
        (
            {"source_identity": {"kind": "test", "num_rows": 23}},
            [r"source\.num_rows: the cache has 22, now it would be 23"],
        ),
        ({"dtype": "float16"}, [r"  dtype: the cache has 'float32', now it would be 'float16'"]),
        ({"dtype": "uint8"}, [r"preprocess\.normalized: the cache has True", "dtype: the cache has 'float32'"]),
        (
            {"spec": PreprocessSpec(8, "squash", "lanczos", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "scaled")},
            [r":\n  preprocess\.jpeg_decode: the cache has 'exact', now it would be 'scaled'\nNothing"],
        ),
        ({"shard_size": 4}, ["shard_size: the cache has 8, now it would be 4"]),
        ({"labels": False}, ["labels: the cache has True, now it would be False"]),
        (
            {"spec": PreprocessSpec(9, "crop", "lanczos", (0.5, 0.456, 0.406), (0.229, 0.224, 0.225))},
            [
                r"image_shape: the cache has \[3, 8, 8\], now it would be \[3, 9, 9\]",
                r"preprocess\.image_size: the cache has 8",
                r"preprocess\.mean: the cache has \[0\.485",
                r"preprocess\.resize_mode: the cache has 'squash', now it would be 'crop'",
                "Nothing was written",
            ],
        ),
    ],
)
def test_another_configuration_is_refused_field_by_field_and_nothing_is_written(cache, changes, lines):
    before = folder_bytes(cache)
    for shards in (range(3), range(2, 3), range(0)):  # whichever share an array task has
        for line in lines:
            with pytest.raises(UserError, match=line):
                survey(cache, shards, **changes)
    (cache / "images_shard_00000.json").unlink()  # the shard itself knows, too
    with pytest.raises(UserError, match=lines[0]):
        survey(cache, range(1), **changes)
    del before["images_shard_00000.json"]
    assert folder_bytes(cache) == before


def test_other_library_versions_are_said_and_stop_nothing(cache, monkeypatch):
    monkeypatch.setattr(plan_module, "library_versions", lambda: {"Pillow": "99.0", "torch": "1.0"})
    found = survey(cache)
    assert found.done == [0, 1, 2]
    notes = "\n".join(found.notes)
    assert "made with Pillow" in notes
    assert "now it is 99.0" in notes
    assert "simplejpeg" in notes
    assert len(found.notes) == 3


@pytest.mark.parametrize("name", ["images_shard_00000.pt", "images_shard_00001.json", "index.json", "failures.jsonl"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_links_and_pipes_in_the_place_of_a_caches_files_are_refused(cache, tmp_path, name, kind):
    path = cache / name
    if kind == "link":
        shutil.move(path, tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.unlink()
        os.mkfifo(path) if kind == "pipe" else path.mkdir()
    with pytest.raises(UserError, match=f"{name} is a symbolic link, a pipe or a folder"):
        survey(cache)


def test_a_cache_dir_that_is_a_link_works_and_one_that_is_a_file_is_refused(cache, tmp_path):
    (tmp_path / "link").symlink_to(cache)
    assert survey(tmp_path / "link").done == [0, 1, 2]
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match="is a file, or a symbolic link to nothing"):
            survey(tmp_path / name)


def test_a_cache_dir_that_another_job_makes_at_this_moment_is_taken_for_an_empty_one(tmp_path, monkeypatch):
    is_dir = Path.is_dir

    def made_afterwards(path):
        found = is_dir(path)
        if path == tmp_path / "new":
            path.mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(Path, "is_dir", made_afterwards)
    assert survey(tmp_path / "new").missing == [0, 1, 2]


def make_future_shard(folder):
    with open(folder / "images_shard_00000.pt", "w+b") as file:
        payload = PayloadWriter(file.fileno())
        payload.write(memoryview(bytearray(128 + 768)))
        finish(payload, "float32", (1, 3, 8, 8), np.ones(1, bool), None, json.dumps({"format_version": 4}))


@pytest.mark.parametrize("which", ["index", "record", "shard"])
def test_a_later_version_is_refused_wherever_it_shows(cache, tmp_path, which):
    if which == "index":
        index = json.loads((cache / "index.json").read_text())
        (cache / "index.json").write_text(json.dumps(index | {"format_version": 4}))
    elif which == "record":
        path = cache / "images_shard_00001.json"
        path.write_bytes(record_text(IMAGE_SHARDS.read_record(path) | {"format_version": 4}))
    else:
        shutil.rmtree(cache)
        cache.mkdir()
        make_future_shard(cache)
    before = folder_bytes(cache)
    with pytest.raises(FutureFormatError, match="format_version 4 is of a later version"):
        survey(cache)
    assert folder_bytes(cache) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"num_samples": NaN}', '{"shards": [{"shard_path": "../x"}], "format_version": 3}']
)
def test_a_damaged_or_hostile_index_does_not_stop_stage_1_which_never_uses_it(cache, text):
    (cache / "index.json").write_text(text)
    assert survey(cache).done == [0, 1, 2]


def make_v1(folder):
    folder.mkdir()
    torch.save({"images": torch.zeros(4, 3, 8, 8)}, folder / "images_shard_00000.pt")
    rows = [{"shard_path": "images_shard_00000.pt", "num_samples": 4, "global_start": 0}]
    (folder / "index.json").write_text(json.dumps({"num_samples": 100, "shards": rows}))


def test_a_predecessors_cache_is_refused_and_left_as_it_is(tmp_path):
    make_v1(tmp_path / "v1")
    before = folder_bytes(tmp_path)
    with pytest.raises(UserError, match="holds a cache of an earlier format"):
        survey(tmp_path / "v1", range(2))
    (tmp_path / "v1" / "index.json").unlink()  # even when only its shards are left
    del before["v1/index.json"]
    with pytest.raises(UserError, match="stage 1 did not write it. Stage 1 does not write over it"):
        survey(tmp_path / "v1", range(2))
    assert folder_bytes(tmp_path) == before


def test_a_cache_of_other_files_says_how_many_there_were_and_are(tmp_path):
    source = SmallSource()
    kind = {"kind": "imagefolder", "split": "train"}

    def identity(rows, num_bytes, digest):
        return kind | {"num_rows": rows, "files": {"count": rows, "bytes": num_bytes, "hash": digest}}

    run_stage1(small_plan(tmp_path, source, source_identity=identity(22, 1000, "a")), source)
    with pytest.raises(UserError) as caught:
        survey_cache(small_plan(tmp_path, source, source_identity=identity(23, 1100, "b")), range(3))
    then, now = "22 images in 22 files, 1,000 bytes then", "23 images in 23 files, 1,100 bytes now"
    assert f"was made of other files: {then}, {now}. Nothing was written" in str(caught.value)
    assert "Put the files back as they were, or give another cache_dir." in str(caught.value)
    with pytest.raises(UserError, match="1,000 bytes now, with other names or content"):
        survey_cache(small_plan(tmp_path, source, source_identity=identity(22, 1000, "b")), range(3))
