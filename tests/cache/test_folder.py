import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from predecessor import Evil, make_v1, make_v2
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache.folder import load_index, load_labels, load_shard_layout
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.store import FutureFormatError, record_text
from distillery.cache.verify import verify_cache
from distillery.system.errors import MissingFileError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    source = SmallSource()
    run_stage1(small_plan(folder, source), source)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def edit_index(folder, edit) -> None:
    path = folder / "index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def test_an_index_in_arrays_says_what_the_file_says(cache):
    index = load_index(cache)
    assert (index.format_version, index.verified, index.complete, index.labels) == (3, True, True, True)
    assert (index.num_samples, index.source_num_samples, index.num_valid) == (22, 22, 20)
    assert index.shard_starts.tolist() == [0, 8, 16]
    assert index.shard_rows.tolist() == [8, 8, 6]
    assert index.shard_failed.tolist() == [1, 0, 1]
    assert index.shard_bytes.tolist() == [index.shard_path(s).stat().st_size for s in range(3)]
    assert index.row_bytes == 3 * 8 * 8 * 4
    assert index.normalized
    assert index.mean == (0.485, 0.456, 0.406)


def test_rows_are_where_the_layout_says(cache):
    index = load_index(cache)
    for s in range(3):
        layout = load_shard_layout(index, s)
        shard = torch.load(index.shard_path(s), weights_only=True)
        data = index.shard_path(s).read_bytes()[layout.payload_offset :][: index.shard_rows[s] * index.row_bytes]
        assert data == shard["images"].numpy().tobytes()
        assert layout.valid.tolist() == shard["valid"].tolist()
        assert load_labels(index, s).tolist() == shard["labels"].tolist()
        assert len(layout.row_checksums) == index.shard_rows[s]


def test_a_layout_is_read_from_the_shard_itself_when_its_record_is_lost(cache):
    index = load_index(cache)
    before = load_shard_layout(index, 0)
    for damage in (b"{}", None):
        if damage is None:
            (cache / "images_shard_00000.json").unlink()
        else:
            (cache / "images_shard_00000.json").write_bytes(damage)
        after = load_shard_layout(index, 0)
        assert after.payload_offset == before.payload_offset
        assert after.valid.tolist() == before.valid.tolist()
        assert after.row_checksums.tolist() == before.row_checksums.tolist()


def test_a_cache_folder_may_be_a_symbolic_link_its_files_may_not(cache, tmp_path):
    (tmp_path / "link").symlink_to(cache)
    index = load_index(tmp_path / "link")
    assert load_shard_layout(index, 0).valid.sum() == 7
    shard = cache / "images_shard_00000.pt"
    shutil.move(shard, tmp_path / "elsewhere.pt")
    shard.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError, match="images_shard_00000.pt is not a regular file"):
        load_shard_layout(index, 0)
    shutil.move(cache / "index.json", tmp_path / "index.json")
    (cache / "index.json").symlink_to(tmp_path / "index.json")
    with pytest.raises(UserError, match=r"index\.json is a symbolic link"):
        load_index(cache)
    (cache / "index.json").unlink()
    os.mkfifo(cache / "index.json")
    with pytest.raises(UserError, match=r"index\.json is not a regular file"):
        load_index(cache)


def test_no_cache_is_a_missing_file_with_the_command_that_makes_one(tmp_path):
    with pytest.raises(MissingFileError, match=r"Index file not found: .*index\.json\. Run: python precompute_cache"):
        load_index(tmp_path)


def test_a_vanished_shard_is_a_missing_file(cache):
    index = load_index(cache)
    (cache / "images_shard_00001.pt").unlink()
    with pytest.raises(MissingFileError, match="images_shard_00001.pt: listed in the index, but not there"):
        load_shard_layout(index, 1)


def test_a_later_format_is_refused(cache):
    edit_index(cache, lambda index: index.update(format_version=4))
    with pytest.raises(FutureFormatError, match="format_version 4 is of a later version of this project"):
        load_index(cache)


def row(key, value, s=0):
    return lambda index: index["shards"][s].update({key: value})


HOSTILE = {
    "name up": (row("shard_path", "../x.pt"), "refused: '../x.pt' is no shard's name"),
    "name up and back": (row("shard_path", "../cache/images_shard_00000.pt"), "refused"),
    "name absolute": (row("shard_path", "/etc/passwd"), "refused: '/etc/passwd'"),
    "name of the index": (row("shard_path", "index.json"), "refused"),
    "name no text": (row("shard_path", 5), "refused: 5"),
    "name with newline": (row("shard_path", "images_shard_00000.pt\n"), "refused"),
    "name twice": (row("shard_path", "images_shard_00001.pt"), "lists a shard twice"),
    "overlap": (row("num_samples", 9), "images_shard_00000.pt and images_shard_00001.pt overlap"),
    "out of order": (lambda index: index["shards"].reverse(), "overlap or are out of order"),
    "wrapping": (row("global_start", 2**63 - 1, 2), "global_start 9223372036854775807"),
    "beyond the source": (row("num_samples", 7, 2), "num_samples 22, the shards listed hold 23"),
    "source too short": (lambda index: index.update(source_num_samples=20), "rows up to 22 of a source of 20"),
    "huge": (row("num_samples", 10**9, 2), "num_samples 22, the shards listed"),
    "huge and consistent": (
        lambda index: (
            index["shards"][2].update(num_samples=10**9),
            index.update(num_samples=10**9 + 16, source_num_samples=10**10),
        ),
        "cannot hold 1000000000 images in",
    ),
    "no rows": (row("num_samples", 0, 2), "a shard without rows"),
    "negative": (row("global_start", -8), "global_start -8"),
    "fraction": (row("num_samples", 8.0), "num_samples 8.0"),
    "boolean": (row("num_samples", True), "num_samples True"),
    "text": (row("bytes", "8"), "bytes '8'"),
    "beyond 64 bits": (row("bytes", 10**30), "bytes 1000"),
    "failures": (row("num_failed", 9), "more failures than rows"),
    "row no object": (lambda index: index.update(shards=[3]), "damaged"),
    "rows no list": (lambda index: index.update(shards={"a": 1}), "damaged"),
    "rows null": (lambda index: index.update(shards=None), "damaged"),
    "no shards": (lambda index: index.update(shards=[], num_samples=0), "lists no shards"),
    "key missing": (lambda index: index.pop("dtype"), "damaged"),
    "dtype": (lambda index: index.update(dtype="float64"), "not of this format"),
    "dtype no text": (lambda index: index.update(dtype=["float32"]), "damaged"),
    "shape": (lambda index: index.update(image_shape=[3, 2**32, 2**32]), "cannot hold"),
    "shape flat": (lambda index: index.update(image_shape=[3, 8]), "not of this format"),
    "shape of fractions": (lambda index: index.update(image_shape=[3, 8.0, 8]), "not of this format"),
    "mean": (lambda index: index["preprocess"].update(mean=[0, 0]), "damaged"),
    "std zero": (lambda index: index["preprocess"].update(std=[1, 0, 1]), "damaged"),
    "normalized": (lambda index: index["preprocess"].update(normalized="no"), "damaged"),
    "preprocess": (lambda index: index.update(preprocess=7), "damaged"),
    "version text": (lambda index: index.update(format_version="3"), "damaged"),
    "version 0": (lambda index: index.update(format_version=0), "damaged"),
    "version null": (lambda index: index.update(format_version=None), "damaged"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_index_is_refused_with_the_reason(cache, name):
    edit, reason = HOSTILE[name]
    edit_index(cache, edit)
    with pytest.raises(UserError, match=reason):
        load_index(cache)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"num_samples": NaN}', '{"format_version": 3}', "\xff"])
def test_a_damaged_index_is_refused_with_the_command_that_makes_it_again(cache, text):
    (cache / "index.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=r"index\.json.*It is made again by: python precompute_cache\.py"):
        load_index(cache)


def test_an_index_whose_version_is_damaged_is_never_taken_for_the_predecessors(cache):
    """That would be read as unverified, and uint8 pixels as normalised."""
    path = cache / "index.json"
    text, tried = path.read_bytes(), 0
    start = text.index(b'"format_version"')
    for position in range(start, text.index(b",", start)):
        for bit in range(8):
            damaged = bytearray(text)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(UserError):
                load_index(cache)
            try:
                problems = verify_cache(cache)
            except FutureFormatError:
                continue
            assert any(str(path) in problem for problem in problems), bytes(damaged[start : start + 24])
            tried += 1
    assert tried > 100


def test_an_infinite_mean_is_refused(cache):
    text = (cache / "index.json").read_text()
    (cache / "index.json").write_text(text.replace("0.485", "1e999"))
    with pytest.raises(UserError, match="damaged"):
        load_index(cache)


@pytest.mark.parametrize("what", ["size", "swap", "foreign", "rows"])
def test_a_shard_that_is_not_the_one_listed_is_refused(cache, tmp_path, what):
    index = load_index(cache)
    shard, record = cache / "images_shard_00000.pt", cache / "images_shard_00000.json"
    if what == "size":
        shard.write_bytes(shard.read_bytes() + b"\0")
        reason = r"images_shard_00000.pt has \d+ bytes, index.json says \d+. Run: python -m distillery.cache verify"
    elif what == "swap":
        # its record is lost and the other shard has the same size
        shutil.copy(cache / "images_shard_00001.pt", shard)
        record.unlink()
        os.truncate(shard, index.shard_bytes[0])
        reason = "images_shard_00000.pt"
    elif what == "rows":
        edit_index(cache, lambda text: text["shards"][0].update(num_failed=0))
        index = load_index(cache)
        reason = "is not the shard that index.json lists"
    else:
        source = SmallSource()
        other = tmp_path / "other"
        plan = small_plan(other, source)
        object.__setattr__(plan, "source_identity", {"kind": "else", "num_rows": 22})
        run_stage1(plan, source)
        for name in (shard.name, record.name):
            shutil.copy(other / name, cache / name)
        reason = "is not the shard that index.json lists"
    with pytest.raises(UserError, match=reason):
        load_shard_layout(index, 0)


def test_a_record_of_a_later_version_is_refused_by_readers_too(cache):
    path = cache / "images_shard_00000.json"
    path.write_bytes(record_text(IMAGE_SHARDS.read_record(path) | {"format_version": 9}))
    with pytest.raises(FutureFormatError, match="format_version 9"):
        load_shard_layout(load_index(cache), 0)


def test_labels_of_another_length_are_refused(cache):
    edit_index(cache, lambda index: (index["shards"][2].update(num_samples=5), index.update(num_samples=21)))
    with pytest.raises(UserError, match="48 bytes of labels for 5 rows"):
        load_labels(load_index(cache), 2)


# -- the predecessor's layouts


@pytest.mark.parametrize("version, make", [(1, make_v1), (2, make_v2)])
def test_a_predecessors_cache_loads_flagged_as_unverified(tmp_path, version, make):
    images = make(tmp_path)
    before = folder_bytes(tmp_path)
    index = load_index(tmp_path)
    assert (index.format_version, index.verified, index.normalized) == (version, False, version == 1)
    assert (index.dtype, index.image_shape, index.num_samples) == ("float32", (3, 8, 8), 12)
    assert index.shard_starts.tolist() == ([0, 4, 8] if version == 1 else [0, 4, 20])
    assert index.source_num_samples == (100 if version == 1 else 24)
    for s, expected in enumerate(images):
        layout = load_shard_layout(index, s)
        data = index.shard_path(s).read_bytes()[layout.payload_offset :][: 4 * index.row_bytes]
        assert data == expected.numpy().tobytes()
        assert layout.valid.all()
        assert layout.row_checksums is None
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("name", ["../x.pt", "/etc/passwd", "index.json", 7, None])
def test_a_predecessors_index_with_a_hostile_name_is_refused(tmp_path, name):
    make_v1(tmp_path)
    edit_index(tmp_path, lambda index: index["shards"][0].update(shard_path=name))
    with pytest.raises(UserError, match="refused: its index names"):
        load_index(tmp_path)


@pytest.mark.parametrize(
    "edit, reason",
    [
        (lambda index: index["shards"][1].update(global_start=3), "overlap"),
        (lambda index: index["shards"][1].update(num_samples="4"), "expected a whole number"),
        (lambda index: index["shards"][1].update(num_samples=2**70), "expected a whole number"),
        (lambda index: index["shards"][1].update(num_samples=10**9), "overlap|cannot hold"),
        (lambda index: index.update(num_samples="many"), "expected a whole number"),
        (lambda index: index.update(shards=[]), "lists no shards"),
        (lambda index: index.update(shards=3), "damaged"),
        (lambda index: index.update(shards=[None]), "damaged"),
        (lambda index: index["shards"][0].pop("global_start"), "damaged"),
    ],
)
def test_a_predecessors_damaged_index_is_refused(tmp_path, edit, reason):
    make_v1(tmp_path)
    edit_index(tmp_path, edit)
    with pytest.raises(UserError, match=reason):
        load_index(tmp_path)


def test_a_predecessors_shard_that_is_gone_or_of_other_rows_is_said(tmp_path):
    make_v1(tmp_path)
    edit_index(tmp_path, lambda index: index["shards"][2].update(num_samples=3))
    with pytest.raises(UserError, match="holds 3072 bytes of images, its index promises 2304"):
        load_shard_layout(load_index(tmp_path), 2)
    (tmp_path / "images_shard_00001.pt").unlink()
    with pytest.raises(MissingFileError, match="images_shard_00001.pt: listed in the index of"):
        load_index(tmp_path)


def test_a_malicious_pickle_in_a_predecessors_shard_never_runs(tmp_path):
    make_v1(tmp_path / "cache")
    marker = tmp_path / "marker"
    with zipfile.ZipFile(tmp_path / "cache" / "images_shard_00000.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"images": Evil(marker)}, protocol=2))
        archive.writestr("archive/data/0", bytes(4 * 768))
        archive.writestr("archive/version", b"3\n")
    with pytest.raises(UserError, match="images_shard_00000.pt: damaged, or not written by torch.save"):
        load_index(tmp_path / "cache")
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"junk" * 1000, "half"])
def test_a_predecessors_damaged_shard_is_named(tmp_path, content):
    make_v1(tmp_path)
    path = tmp_path / "images_shard_00000.pt"
    path.write_bytes(path.read_bytes()[:2000] if content == "half" else content)
    with pytest.raises(UserError, match="images_shard_00000.pt"):
        load_index(tmp_path)


def test_a_hostile_folder_costs_neither_memory_nor_time(cache):
    """A gigabyte of address space above what Python needs is enough to refuse claims of billions of rows."""
    edit_index(cache, HOSTILE["huge and consistent"][0])
    edit_index(cache, row("bytes", 10**12, 2))
    os.truncate(cache / "images_shard_00002.pt", 10**12)  # a hole, as long as the index wants to have it
    code = f"""
import resource
from distillery.cache.folder import load_index
from distillery.cache.folder import load_shard_layout
from distillery.system.errors import UserError
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
try:
    load_shard_layout(load_index({str(cache)!r}), 2)
except UserError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert "is not the shard that index.json lists" in done.stdout, done.stderr


def test_numbers_of_an_index_are_whole(cache):
    index = load_index(cache)
    assert index.shard_starts.dtype == np.int64
    assert index.shard_bytes.dtype == np.int64
