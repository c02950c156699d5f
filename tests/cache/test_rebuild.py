import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from predecessor import Evil, make_v1, make_v2
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock

from distillery.cache.folder import load_index, load_shard_layout
from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.rebuild import rebuild_index
from distillery.cache.store import FutureFormatError
from distillery.cache.verify import verify_cache
from distillery.config.load import load_data_config
from distillery.system.errors import MissingFileError, UserError
from distillery.verify import report_verification
from precompute_cache import rebuild_indexes

ROOT = Path(__file__).resolve().parents[2]
SOURCE = SmallSource()


@pytest.fixture
def cache(tmp_path):
    run_stage1(small_plan(tmp_path / "cache", SOURCE), SOURCE)
    return tmp_path / "cache"


def shards_of(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_ctime_ns, path.read_bytes()) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("version, make", [(1, make_v1), (2, make_v2)])
def test_a_predecessors_cache_is_upgraded_in_place_without_touching_a_shard(tmp_path, version, make):
    images = make(tmp_path)
    before, old = shards_of(tmp_path), load_index(tmp_path)
    report = rebuild_index(tmp_path)
    assert (report.was_upgraded, report.num_hashed, report.problems) == (True, 3, [])
    assert shards_of(tmp_path) == before
    index = load_index(tmp_path)
    assert (index.format_version, index.verified, index.complete) == (3, True, False)
    assert index.source == {"kind": "predecessor", "layout": f"v{version}", "unverified": True}
    for name in (
        "normalized",
        "mean",
        "std",
        "dtype",
        "image_shape",
        "num_samples",
        "source_num_samples",
        "shard_names",
    ):
        assert getattr(index, name) == getattr(old, name)
    assert index.shard_starts.tolist() == old.shard_starts.tolist()
    for s, expected in enumerate(images):
        layout = load_shard_layout(index, s)
        data = index.shard_path(s).read_bytes()[layout.payload_offset :][: 4 * index.row_bytes]
        assert data == expected.numpy().tobytes()
        assert len(layout.row_checksums) == 4
        # what an old reader knows is still there
        assert torch.equal(torch.load(index.shard_path(s), weights_only=True)["images"], expected)
    assert verify_cache(tmp_path) == []


def test_upgrading_again_changes_nothing(tmp_path):
    make_v1(tmp_path)
    rebuild_index(tmp_path)
    before = folder_bytes(tmp_path)
    assert rebuild_index(tmp_path).num_hashed == 0
    assert folder_bytes(tmp_path) == before


def test_an_upgrade_killed_at_any_of_its_writes_goes_on(tmp_path, monkeypatch):
    make_v1(tmp_path / "straight")
    make_v1(tmp_path / "killed")
    rebuild_index(tmp_path / "straight")
    replace = os.replace

    class Killed(BaseException):
        pass

    for left in range(5):
        count = [left]

        def replace_or_die(source, target, count=count):
            count[0] -= 1
            if count[0] < 0:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", replace_or_die)
        try:
            rebuild_index(tmp_path / "killed")
        except Killed:
            assert load_index(tmp_path / "killed").num_samples == 12  # usable at any time
        monkeypatch.setattr(os, "replace", replace)
    rebuild_index(tmp_path / "killed")
    assert folder_bytes(tmp_path / "killed") == folder_bytes(tmp_path / "straight")


def test_stage_1_never_adds_to_an_upgraded_cache(tmp_path):
    make_v1(tmp_path)
    rebuild_index(tmp_path)
    before = folder_bytes(tmp_path)
    with pytest.raises(UserError, match="holds a cache of an earlier format"):
        run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    for name in ("index.json", "images_shard_00000.json"):  # nor when part of the upgrade is lost
        (tmp_path / name).unlink()
        before.pop(name)
        with pytest.raises(UserError, match="holds a cache of an earlier format"):
            run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize(
    "make, lost",
    [
        (make_v1, "index.json"),
        (make_v1, "images_shard_00001.json"),
        (make_v2, "index.json"),
        (make_v2, "images_s000_00001.json"),
    ],
)
def test_a_lost_index_or_record_of_an_upgraded_cache_comes_back_byte_for_byte(tmp_path, make, lost):
    make(tmp_path)
    rebuild_index(tmp_path)
    for path in tmp_path.glob("index_shard_*"):
        path.unlink()
    before = folder_bytes(tmp_path)
    (tmp_path / lost).unlink()
    rebuild_index(tmp_path)
    assert folder_bytes(tmp_path) == before


def flip(path, position):
    wait_for_the_clock(path.parent)
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_damage_of_an_upgraded_cache_is_found_and_left_out(tmp_path, capsys):
    make_v1(tmp_path)
    rebuild_index(tmp_path)
    path = tmp_path / "images_shard_00001.pt"
    flip(path, 2000)
    assert any("images_shard_00001.pt: differs from its record in hash" in text for text in verify_cache(tmp_path))
    assert report_verification(tmp_path, "python precompute_cache.py") == 1
    said = capsys.readouterr().out
    assert f"rm -f -- {path} && python precompute_cache.py --rebuild_index" in said
    report = rebuild_index(tmp_path)
    assert [row["shard_path"] for row in report.index["shards"]] == ["images_shard_00000.pt", "images_shard_00002.pt"]
    assert "images_shard_00001.pt" in report.problems[0]
    assert load_index(tmp_path).num_samples == 8


@pytest.mark.parametrize("damage", ["row", "foreign shape", "evil", "gone", "other rows"])
def test_a_predecessors_damaged_cache_is_not_upgraded(tmp_path, damage):
    make_v1(tmp_path)
    path = tmp_path / "images_shard_00001.pt"
    if damage == "row":
        flip(path, 2000)
    elif damage == "foreign shape":
        torch.save({"images": torch.zeros(4, 3, 4, 16)}, path)
    elif damage == "evil":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", pickle.dumps({"images": Evil(tmp_path / "marker")}, protocol=2))
            archive.writestr("a/data/0", bytes(4 * 768))
    elif damage == "gone":
        path.unlink()
    else:
        torch.save({"images": torch.zeros(3, 3, 8, 8)}, path)
    index = (tmp_path / "index.json").read_bytes()
    with pytest.raises(UserError, match="images_shard_00001.pt"):
        rebuild_index(tmp_path)
    assert (tmp_path / "index.json").read_bytes() == index
    assert not (tmp_path / "marker").exists()


# -- of our own format


def test_rebuilding_a_whole_cache_changes_nothing_and_hashes_nothing(cache):
    before = folder_bytes(cache)
    report = rebuild_index(cache)
    assert (report.num_hashed, report.was_upgraded, report.index["complete"]) == (0, False, True)
    assert folder_bytes(cache) == before


@pytest.mark.parametrize("damage", [None, b"", b"{}", b"[]", b'{"num_samples": NaN}', b'{"shards": 3}'])
@pytest.mark.parametrize("names", [["index.json"], ["images_shard_*.json"], ["*.json", "failures.jsonl"]])
def test_everything_but_the_shards_can_be_made_again_from_the_shards(cache, names, damage):
    before, shards = folder_bytes(cache), shards_of(cache)
    for name in names:
        for path in cache.glob(name):
            path.unlink() if damage is None else path.write_bytes(damage)
    rebuild_index(cache)
    assert folder_bytes(cache) == before
    assert shards_of(cache) == shards


def test_an_index_of_a_later_version_is_not_made_again(cache):
    (cache / "index.json").write_text('{"format_version": 4}')
    with pytest.raises(FutureFormatError, match="later version"):
        rebuild_index(cache)


def test_an_index_of_part_of_the_source_is_complete_when_that_part_was_wanted(tmp_path):
    plan = small_plan(tmp_path, SOURCE, max_samples=12)
    run_stage1(plan, SOURCE)
    before = folder_bytes(tmp_path)
    (tmp_path / "index.json").unlink()
    assert not rebuild_index(tmp_path).index["complete"]
    assert rebuild_index(tmp_path, 12).index["complete"]
    assert folder_bytes(tmp_path) == before
    assert not rebuild_index(tmp_path, 10**9).index["complete"]


def test_a_damaged_shard_is_left_out_of_the_index_and_named(cache):
    flip(cache / "images_shard_00001.pt", 1000)
    report = rebuild_index(cache)
    assert [row["global_start"] for row in report.index["shards"]] == [0, 16]
    assert len(report.problems) == 1
    assert "images_shard_00001.pt: damaged" in report.problems[0]
    assert not (cache / "images_shard_00001.json").exists()
    run_stage1(small_plan(cache, SOURCE), SOURCE)
    assert load_index(cache).complete


def test_a_folder_without_a_whole_shard_has_no_index(tmp_path):
    with pytest.raises(MissingFileError, match="holds no shards"):
        rebuild_index(tmp_path)
    (tmp_path / "images_shard_00000.pt").write_bytes(b"junk")
    with pytest.raises(UserError, match=r"no shard is whole:\n.*images_shard_00000.pt"):
        rebuild_index(tmp_path)


def test_an_empty_evaluation_folder_does_not_stop_the_command(cache):
    part = shutil.copytree(cache, cache / "eval/sets/train")
    (cache / "eval/sets/test").mkdir()
    indexes = [cache / "index.json", part / "index.json"]
    for index in indexes:
        index.unlink()
    assert rebuild_indexes(load_data_config({"dataset_name": "x", "cache_dir": str(cache)})) == 0
    assert all(index.exists() for index in indexes)


def test_shards_of_two_configurations_are_not_put_into_one_index(cache, tmp_path):
    source = SmallSource(30)
    run_stage1(small_plan(tmp_path / "other", source), source)
    shutil.copy(tmp_path / "other" / "images_shard_00003.pt", cache)
    index = (cache / "index.json").read_bytes()
    with pytest.raises(UserError, match="made with different configurations"):
        rebuild_index(cache)
    assert (cache / "index.json").read_bytes() == index


def test_the_identity_of_an_upgraded_shard_says_where_it_is_from(tmp_path):
    make_v2(tmp_path)
    rebuild_index(tmp_path)
    record = IMAGE_SHARDS.read_record(tmp_path / "images_s001_00000.json")
    assert record["identity"]["source"]["layout"] == "v2"
    assert json.loads((tmp_path / "index.json").read_text())["preprocess"]["normalized"] is False
    assert (record["global_start"], record["shard_idx"], record["libraries"]) == (20, 2, {})


def test_the_command_upgrades_verifies_and_then_refuses_to_add(tmp_path):
    make_v1(tmp_path / "cache")
    images = [{"bytes": data, "path": None} for data in SOURCE.images]
    pq.write_table(pa.table({"image": images}), tmp_path / "train.parquet")
    config = {"dataset_name": "parquet", "data_files": str(tmp_path / "train.parquet"), "image_size": 8,
              "cache_dir": str(tmp_path / "cache"), "cache_shard_size": 4}  # fmt: skip
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(config))

    def precompute(*flags):
        command = [sys.executable, str(ROOT / "precompute_cache.py"), "--data_config", str(tmp_path / "data.yaml")]
        return subprocess.run([*command, *flags], capture_output=True, text=True, timeout=120)

    before = shards_of(tmp_path / "cache")
    done = precompute("--rebuild_index")
    assert done.returncode == 0, done.stderr
    assert "index.json made again from 3 shards, 3 of them hashed (upgraded" in done.stdout
    assert precompute("--verify").returncode == 0
    refused = precompute()
    assert refused.returncode == 2
    assert "holds a cache of an earlier format" in refused.stderr
    assert shards_of(tmp_path / "cache") == before
