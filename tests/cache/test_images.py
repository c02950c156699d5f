import errno
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache import store
from distillery.cache.images import (
    FAILURES_NAME,
    IMAGE_SHARDS,
    INDEX_NAME,
    decode_sizes,
    encode_sizes,
    failures_of,
    index_of,
    shard_name,
    valid_rows,
)
from distillery.cache.store import (
    FutureFormatError,
    decode_checksums,
    encode_checksums,
    parse_json,
    record_path,
    record_text,
)
from distillery.system.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "cache"
    source = SmallSource()
    run_stage1(small_plan(folder, source), source)
    return folder


@pytest.fixture
def cache(made, tmp_path):
    return shutil.copytree(made, tmp_path / "cache")


def test_a_record_is_what_its_shard_says_of_itself(cache):
    for shard_idx in range(3):
        path = cache / shard_name(shard_idx)
        assert IMAGE_SHARDS.record_of_shard(path) == IMAGE_SHARDS.read_record(record_path(path))


def test_a_record_names_the_rows_that_failed(cache):
    record = IMAGE_SHARDS.read_record(cache / "images_shard_00002.json")
    assert record["failures"] == [{"global_idx": 17, "shard_idx": 2, "reason": "not an image file of a known format"}]
    assert valid_rows(record).tolist() == [True, False, True, True, True, True]


def test_row_checksums_survive_their_text():
    values = np.array([0, 1, 2**64 - 1], np.uint64)
    assert decode_checksums(json.loads(json.dumps(encode_checksums(values)))).tolist() == values.tolist()


def test_sizes_survive_their_text_and_shards_of_earlier_versions_have_none(cache):
    values = np.array([[0, 0], [375, 500], [2**32 - 1, 1]], np.uint32)
    assert decode_sizes(json.loads(json.dumps(encode_sizes(values)))).tolist() == values.tolist()
    path = cache / "images_shard_00000.json"
    record = IMAGE_SHARDS.read_record(path)
    assert decode_sizes(record.pop("source_sizes")).shape == (record["num_samples"], 2)
    assert IMAGE_SHARDS.check_record(record, path) == record
    for hostile in ({"values": "AAAAAAAAAAA="}, {"values": "AAAA"}, None, []):
        path.write_bytes(record_text(record | {"source_sizes": hostile}))
        with pytest.raises(UserError, match="images_shard_00000.json"):
            IMAGE_SHARDS.read_record(path)


def test_every_flipped_bit_of_a_record_is_noticed(cache):
    path = cache / "images_shard_00000.json"
    good = path.read_bytes()
    rng = random.Random(0)
    for position in sorted(rng.sample(range(len(good)), 300)) + [len(good) - 1]:
        data = bytearray(good)
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError, match="images_shard_00000.json"):
            IMAGE_SHARDS.read_record(path)


def test_every_truncation_of_a_record_is_noticed(cache):
    path = cache / "images_shard_00000.json"
    good = path.read_bytes()
    for length in [0, 1, 2, len(good) // 2, len(good) - 2, len(good) - 1]:
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="images_shard_00000.json"):
            IMAGE_SHARDS.read_record(path)


def test_any_flipped_byte_of_a_shard_without_record_is_noticed(cache):
    path = cache / "images_shard_00002.pt"
    record_path(path).unlink()
    good = path.read_bytes()
    payload = range(128, 128 + 6 * 768)
    rng = random.Random(1)
    # every byte around the rows, some of the rows themselves
    for position in [p for p in range(len(good)) if p not in payload] + rng.sample(payload, 40):
        data = bytearray(good)
        data[position] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        with pytest.raises(UserError, match="images_shard_00002.pt"):
            IMAGE_SHARDS.record_of_shard(path)


@pytest.mark.parametrize("change", ["append", "cut", "zeroes"])
def test_a_shard_longer_or_shorter_than_it_was_is_noticed(cache, change):
    path = cache / "images_shard_00001.pt"
    good = path.read_bytes()
    path.write_bytes({"append": good + b"\0", "cut": good[:-1], "zeroes": bytes(len(good))}[change])
    with pytest.raises(UserError, match="images_shard_00001.pt"):
        IMAGE_SHARDS.record_of_shard(path)


def test_a_shard_under_another_ones_name_is_noticed(cache):
    os.replace(cache / "images_shard_00001.pt", cache / "images_shard_00000.pt")
    with pytest.raises(UserError, match="contradict each other or the file's name"):
        IMAGE_SHARDS.record_of_shard(cache / "images_shard_00000.pt")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_samples": 10**9},
        {"num_samples": -1},
        {"num_samples": 8.0},
        {"num_samples": True},
        {"num_samples": "8"},
        {"global_start": 1},
        {"global_start": 2**63},
        {"global_start": -8},
        {"shard_idx": 1},
        {"shard_path": "../images_shard_00000.pt"},
        {"shard_path": "/etc/passwd"},
        {"payload_offset": 2**62},
        {"payload_offset": -1},
        {"image_shape": [3, 2**32, 2**32]},
        {"image_shape": [3, 8]},
        {"image_shape": [3, 0, 8]},
        {"image_shape": 24},
        {"dtype": "float64"},
        {"dtype": ["float32"]},
        {"bytes": 10},
        {"hash": "md5:0"},
        {"hash": None},
        {"failures": [{"global_idx": 8}], "num_failed": 1},
        {"failures": [{"global_idx": 3}, {"global_idx": 3}], "num_failed": 2},
        {"failures": {}, "num_failed": 1},
        {"failures": [3], "num_failed": 1},
        {"num_failed": 0},
        {"row_checksums": {"values": "AAAA"}},
        {"row_checksums": {"values": "no base64"}},
        {"row_checksums": []},
        {"fingerprint": "0" * 64},
        {"identity": {}},
        {"identity": None},
        {"libraries": {"Pillow": 3}},
        {"libraries": []},
        {"source_num_samples": 7},
        {"format_version": 2},
        {"format_version": None},
        {"format_version": "3"},
    ],
    ids=str,
)
def test_a_record_with_a_hostile_field_is_refused(cache, changes):
    path = cache / "images_shard_00000.json"
    record = IMAGE_SHARDS.read_record(path) | changes
    path.write_bytes(record_text(record))  # its own hash is right
    with pytest.raises(UserError, match="images_shard_00000.json"):
        IMAGE_SHARDS.read_record(path)
    for key in changes:
        del record[key]
    with pytest.raises(UserError, match="not a shard's record"):
        IMAGE_SHARDS.check_record(record, path)


def test_a_record_of_a_later_version_is_not_taken_for_damage(cache):
    path = cache / "images_shard_00000.json"
    path.write_bytes(record_text(IMAGE_SHARDS.read_record(path) | {"format_version": 4}))
    with pytest.raises(FutureFormatError, match="format_version 4 is of a later version"):
        IMAGE_SHARDS.read_record(path)
    with pytest.raises(FutureFormatError):
        IMAGE_SHARDS.scan(cache).records()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"a": NaN}', '{"a": Infinity}', "[" * 100_000, "\xff", '{"a": 1e5']
)
def test_text_that_is_no_json_object_is_refused_with_the_files_name(tmp_path, text):
    with pytest.raises(UserError, match=r"x\.json"):
        parse_json(tmp_path / "x.json", text.encode("latin-1"))


def test_a_scan_leaves_out_unreadable_records_and_those_whose_shard_is_gone(cache):
    (cache / "images_shard_00000.json").write_bytes(b"{}")
    (cache / "images_shard_00001.pt").unlink()
    (cache / "images_shard_0000x.json").write_bytes(b"{}")
    assert [record["shard_idx"] for record in IMAGE_SHARDS.scan(cache).records()] == [2]


def test_a_second_scan_sees_what_changed(cache):
    scan = IMAGE_SHARDS.scan(cache)
    first = scan.records()
    assert scan.records() == first
    text = (cache / "images_shard_00001.json").read_bytes()
    (cache / "images_shard_00001.json").write_bytes(b"{}")
    assert [record["shard_idx"] for record in scan.records()] == [0, 2]
    (cache / "images_shard_00001.json").write_bytes(text)
    assert scan.records() == first


def test_a_record_that_the_disk_did_not_give_once_is_listed_as_soon_as_it_does(cache, monkeypatch):
    read, failures = store.read_regular, [OSError(errno.EIO, "lost")]

    def failing_once(path, *size):
        if Path(path).name == "images_shard_00001.json" and failures:
            raise failures.pop()
        return read(path, *size)

    monkeypatch.setattr(store, "read_regular", failing_once)
    assert [row["shard_path"] for row in IMAGE_SHARDS.scan(cache).write_views()["shards"]] == [
        shard_name(shard_idx) for shard_idx in range(3)
    ]
    assert not failures


@pytest.mark.parametrize(
    "damage",
    [None, b"", b"{", b"{}", b"[]", b'{"num_samples": NaN}', b'{"format_version": 1}', b"\xff\xfe", "cut", "flip"],
)
def test_the_views_are_made_again_from_the_records_byte_for_byte(cache, damage):
    before = folder_bytes(cache)
    for name in (INDEX_NAME, FAILURES_NAME):
        if damage is None:
            (cache / name).unlink()
        elif damage == "cut":
            (cache / name).write_bytes(before[name][:-10])
        elif damage == "flip":
            (cache / name).write_bytes(before[name].replace(b"1", b"0", 1))
        else:
            (cache / name).write_bytes(damage)
    IMAGE_SHARDS.scan(cache).write_views()
    assert folder_bytes(cache) == before


def test_views_that_agree_are_not_written_again(cache):
    before = (cache / INDEX_NAME).stat()
    IMAGE_SHARDS.scan(cache).write_views()
    assert (cache / INDEX_NAME).stat().st_ino == before.st_ino


def test_views_in_the_form_of_a_link_are_replaced_not_followed(cache, tmp_path):
    (tmp_path / "outside").write_bytes(b"precious")
    (cache / INDEX_NAME).unlink()
    (cache / INDEX_NAME).symlink_to(tmp_path / "outside")
    IMAGE_SHARDS.scan(cache).write_views()
    assert (tmp_path / "outside").read_bytes() == b"precious"
    assert not (cache / INDEX_NAME).is_symlink()


def test_without_failures_there_is_no_failures_file(cache):
    (cache / FAILURES_NAME).write_bytes(b"old")
    for shard_idx in (0, 2):
        (cache / f"images_shard_0000{shard_idx}.pt").unlink()
    IMAGE_SHARDS.scan(cache).write_views()
    assert not (cache / FAILURES_NAME).exists()


def test_views_that_agree_leave_a_folder_alone_that_can_only_be_read(cache, monkeypatch):
    for shard_idx in (0, 2):  # those with failures: without them there is no failures file either
        (cache / f"images_shard_0000{shard_idx}.pt").unlink()
    IMAGE_SHARDS.scan(cache).write_views()

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    monkeypatch.setattr(store, "write_atomic", refuse)
    assert IMAGE_SHARDS.scan(cache).write_views()["num_samples"] == 8


def test_an_index_is_complete_when_all_rows_wanted_are_there_and_not_merely_as_many(cache):
    images = IMAGE_SHARDS.scan(cache).records()
    assert index_of(images)["complete"]
    assert not index_of(images[:2])["complete"]
    assert index_of(images[:2], 16)["complete"]
    assert index_of(images[:2], 12)["complete"]
    # as many rows as wanted, but not the first ones
    assert not index_of(images[1:], 12)["complete"]


def test_records_of_two_configurations_make_no_index(cache, tmp_path):
    source = SmallSource()
    other = tmp_path / "other"
    run_stage1(small_plan(other, source, labels=False), source)
    for name in ("images_shard_00001.pt", "images_shard_00001.json"):
        shutil.copy(other / name, cache / name)
    before = folder_bytes(cache)
    with pytest.raises(UserError, match="images_shard_00000.pt and images_shard_00001.pt .* different configurations"):
        IMAGE_SHARDS.scan(cache).write_views()
    assert folder_bytes(cache) == before


def test_an_index_made_while_another_writer_publishes_lists_what_it_published(cache, tmp_path, monkeypatch):
    late = {name: (cache / name) for name in ("images_shard_00002.pt", "images_shard_00002.json")}
    for name, path in late.items():
        shutil.move(path, tmp_path / name)
    scan = IMAGE_SHARDS.scan(cache)
    images = scan.records

    def records_then_publish():
        found = images()
        for name, path in late.items():
            if not path.exists():
                shutil.copy(tmp_path / name, path)
        return found

    monkeypatch.setattr(scan, "records", records_then_publish)
    index = scan.write_views()
    assert index["num_samples"] == 22
    assert json.loads((cache / INDEX_NAME).read_text()) == index


@pytest.mark.parametrize("num_target, num_listed", [(None, 3), (4, 3), (16, 4)])
def test_while_others_publish_all_the_time_the_writing_of_views_ends_but_a_complete_index_is_written(
    tmp_path, monkeypatch, num_target, num_listed
):
    source, cache, made = SmallSource(40), tmp_path / "cache", tmp_path / "made"
    run_stage1(small_plan(made, source, shard_size=4), source)
    cache.mkdir()
    scan, shards = IMAGE_SHARDS.scan(cache), iter(sorted(made.glob("images_shard_*.pt")))
    images = scan.records

    def publish_and_look():
        shard = next(shards)
        for path in (shard, record_path(shard)):
            shutil.copy(path, cache)
        return images()

    monkeypatch.setattr(scan, "records", publish_and_look)
    scan.write_views(num_target)
    index = json.loads((cache / INDEX_NAME).read_text())
    assert len(index["shards"]) == num_listed
    assert index["complete"] == (num_target is not None)


def test_an_old_reader_finds_the_keys_it_knows(cache):
    index = json.loads((cache / INDEX_NAME).read_text())
    assert index["num_samples"] == 22
    assert [(row["shard_path"], row["num_samples"], row["global_start"]) for row in index["shards"]] == [
        (f"images_shard_0000{i}.pt", rows, 8 * i) for i, rows in enumerate((8, 8, 6))
    ]


def test_the_failures_file_has_one_line_for_each(cache):
    lines = [json.loads(line) for line in (cache / FAILURES_NAME).read_text().splitlines()]
    assert [line["global_idx"] for line in lines] == [3, 17]
    assert failures_of(IMAGE_SHARDS.scan(cache).records()) == (cache / FAILURES_NAME).read_bytes()
