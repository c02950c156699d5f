import io
import json
import mmap
import os
import pickle
import struct
import threading
import zipfile
import zlib

import numpy as np
import pytest
import torch
import xxhash

from distillery.cache.archive import (
    DTYPES,
    PAYLOAD_OFFSET,
    ForeignShardError,
    find_payload,
    payload_header,
    read_member,
    read_meta,
)
from distillery.precompute.image_shard import PayloadWriter, gap_before
from distillery.system.errors import UserError
from distillery.system.files import open_regular, read_regular
from tests.support.caches import finish

META = json.dumps({"reason": "Ümläut \u2028", "numbers": [1, 2.5]})


def in_memory(rows: bytes, position: int = 0) -> memoryview:
    """Bytes of a payload from `position` on, as PayloadWriter wants them."""
    gap = gap_before(position)
    memory = memoryview(mmap.mmap(-1, gap + len(rows)))
    memory[gap:] = rows
    return memory


def write_shard(path, dtype="float32", shape=(5, 3, 4, 4), labels=True, meta=META):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize, dtype=np.uint8)
    valid = np.ones(shape[0], bool)
    valid[1] = False
    numbers = np.arange(shape[0], dtype=np.int64) - 2 if labels else None
    with open(path, "r+b" if path.exists() else "w+b") as file:
        payload = PayloadWriter(file.fileno())
        payload.write(in_memory(rows.tobytes()))
        size, digest = finish(payload, dtype, shape, valid, numbers, meta)
    return rows.tobytes(), valid, numbers, size, digest


@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_a_shard_is_a_file_for_plain_torch_load(tmp_path, dtype, labels):
    rows, valid, numbers, size, digest = write_shard(tmp_path / "s.pt", dtype, labels=labels)
    for mapped in (False, True):
        shard = torch.load(tmp_path / "s.pt", weights_only=True, mmap=mapped)
        assert list(shard) == ["images", "valid", *(["labels"] if labels else []), "meta"]
        assert shard["images"].dtype == getattr(torch, dtype)
        assert shard["images"].shape == (5, 3, 4, 4)
        assert shard["images"].is_contiguous()
        assert shard["images"].view(torch.uint8).numpy().tobytes() == rows
        assert shard["valid"].tolist() == valid.tolist()
        assert shard["meta"] == META
        if labels:
            assert shard["labels"].dtype == torch.int64
            assert shard["labels"].tolist() == numbers.tolist()
    assert (tmp_path / "s.pt").stat().st_size == size
    assert digest == f"xxh3_128:{xxhash.xxh3_128_hexdigest((tmp_path / 's.pt').read_bytes())}"


def test_the_archive_passes_zips_own_test_and_its_members_are_aligned(tmp_path):
    write_shard(tmp_path / "s.pt")
    with zipfile.ZipFile(tmp_path / "s.pt") as archive:
        assert archive.testzip() is None
        assert archive.namelist() == [f"archive/{name}" for name in (
            "data/0", "data/1", "data/2", "data.pkl", "byteorder", "version")]  # fmt: skip
        for info in archive.infolist():
            name_bytes, extra_bytes = struct.unpack(
                "<2H", (tmp_path / "s.pt").read_bytes()[info.header_offset + 26 :][:4]
            )
            assert (info.header_offset + 30 + name_bytes + extra_bytes) % 64 == 0


def test_the_bytes_do_not_depend_on_the_files_name_or_what_stood_in_it_before(tmp_path):
    write_shard(tmp_path / "one.pt")
    (tmp_path / "another.pt").write_bytes(b"\xff" * 5000)
    write_shard(tmp_path / "another.pt")
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another.pt").read_bytes()


def test_the_bytes_of_format_3_never_change(tmp_path):
    write_shard(tmp_path / "s.pt", "uint8", meta="{}")
    # another value here makes every cache there is unreadable for stage 1: raise format_version instead
    assert xxhash.xxh3_64_hexdigest((tmp_path / "s.pt").read_bytes()) == "336960e537602b93"


@pytest.mark.parametrize("meta_bytes", [0, 255, 70_000])
@pytest.mark.parametrize("rows", [1, 255, 256, 70_000])
def test_numbers_of_every_pickled_width_load(tmp_path, rows, meta_bytes):
    _, valid, _, _, _ = write_shard(tmp_path / "s.pt", "uint8", (max(rows, 2), 3, 1, 1), meta="x" * meta_bytes)
    shard = torch.load(tmp_path / "s.pt", weights_only=True)
    assert shard["images"].shape == (len(valid), 3, 1, 1)
    assert shard["meta"] == read_meta(tmp_path / "s.pt") == "x" * meta_bytes


def write_big_shard(path, rows: int) -> None:
    """A shard of `rows` rows of 3,072 bytes that takes no room on the disk: all but its last row is a hole."""
    with open(path, "w+b") as file:
        file.truncate(PAYLOAD_OFFSET + rows * 3072)
        os.pwrite(file.fileno(), b"\x07" * 3072, PAYLOAD_OFFSET + (rows - 1) * 3072)
        os.pwrite(file.fileno(), payload_header(), 0)
        payload = PayloadWriter(file.fileno())
        # the CRC is wrong, which neither torch nor finding members minds
        payload._position, payload._rest = PAYLOAD_OFFSET + rows * 3072, b""
        finish(payload, "uint8", (rows, 3, 32, 32), np.ones(rows, bool), np.arange(rows), META)


@pytest.mark.parametrize(
    "payload_bytes", [(1 << 32) + (1 << 20), 0xFFFFFFFF, (1 << 32) - 4096, (1 << 32) - (12 << 20), 5 << 32]
)
def test_a_shard_around_4_gib_loads(tmp_path, payload_bytes):
    rows, path = payload_bytes // 3072, tmp_path / "s.pt"
    write_big_shard(path, rows)
    shard = torch.load(path, weights_only=True, mmap=True)
    assert shard["images"].shape == (rows, 3, 32, 32)
    assert (shard["images"][-1] == 7).all()
    assert (shard["images"][0] == 0).all()
    assert shard["labels"][-1] == rows - 1
    assert shard["valid"].all()
    assert read_meta(path) == META
    assert find_payload(path)[:2] == (PAYLOAD_OFFSET, rows * 3072)


@pytest.mark.slow
def test_every_crc_of_a_shard_beyond_4_gib_is_right(tmp_path):
    rows, at_once = ((1 << 32) + (1 << 20)) // 3072, 8192
    with open(tmp_path / "s.pt", "w+b") as file:
        payload = PayloadWriter(file.fileno())
        for start in range(0, rows, at_once):
            payload.write(in_memory(bytes(3072 * min(at_once, rows - start)), start * 3072))
        finish(payload, "uint8", (rows, 3, 32, 32), np.ones(rows, bool), None, META)
    with zipfile.ZipFile(tmp_path / "s.pt") as archive:
        assert archive.testzip() is None


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_the_images_of_any_file_of_torch_save_are_found(tmp_path, dtype):
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).to(getattr(torch, dtype))
    by_path = tmp_path / "images_shard_00000.pt"
    torch.save({"images": images}, by_path)  # by path: the archive's root is the file's name
    with open(tmp_path / "by_object.pt", "wb") as file:
        torch.save({"images": images}, file)
    for path in (by_path, tmp_path / "by_object.pt"):
        offset, size, crc = find_payload(path)
        data = path.read_bytes()[offset : offset + size]
        assert data == images.view(torch.uint8).numpy().tobytes()
        assert zlib.crc32(data) == crc
        with pytest.raises(ForeignShardError, match="this project's stage 1 did not write it"):
            read_meta(path)


class Evil:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (os.mkdir, (str(self.marker),))


def archive_of(path, members: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_malicious_pickle_never_runs(tmp_path):
    path, marker = tmp_path / "s.pt", tmp_path / "marker"
    evil = pickle.dumps({"images": Evil(marker), "meta": META}, protocol=2)
    archive_of(path, {"archive/data.pkl": evil, "archive/data/0": b"x" * 100})
    assert read_meta(path) == META
    find_payload(path)
    assert not marker.exists()
    # the pickle is a real one: whoever does unpickle it makes the folder
    pickle.loads(evil)
    assert marker.exists()


def hostile_files(folder):
    rng = np.random.default_rng(0)
    write_shard(folder / "good.pt")
    good = (folder / "good.pt").read_bytes()
    cases = {"empty": b"", "text": b"hello" * 100, "noise": rng.bytes(5000), "half": good[: len(good) // 2]}
    directory = good.rindex(b"PK\5\6")
    for name, values in {
        "directory far away": {16: 0xFFFFFFF0},
        "directory huge": {12: 0xFFFFFFF0},
        "directory elsewhere": {16: 5},
    }.items():
        data = bytearray(good)
        for offset, value in values.items():
            struct.pack_into("<I", data, directory + offset, value)
        cases[name] = bytes(data)
    buffer = io.BytesIO()
    archive_of(buffer, {"archive/data.pkl": b"\0" * (8 << 20)}, zipfile.ZIP_DEFLATED)
    cases["zip bomb"] = buffer.getvalue()
    for name, member in {
        "no pickle": {"archive/other": b"x"},
        "torn pickle": {"archive/data.pkl": b"\x80\x02}(X\xff\xff\xff\x7fmeta"},
        "unknown opcode": {"archive/data.pkl": b"\x80\x02\xff\xfe"},
        "meta without value": {"archive/data.pkl": pickle.dumps("meta", 2)},
        "long integer": {"archive/data.pkl": b"\x80\x02\x8b\xff\xff\xff\x7f"},
    }.items():
        buffer = io.BytesIO()
        archive_of(buffer, member)
        cases[name] = buffer.getvalue()
    for name, data in cases.items():
        (folder / f"{name}.pt").write_bytes(data)
    return sorted(cases)


def test_hostile_files_are_refused_with_their_name(tmp_path):
    for name in hostile_files(tmp_path):
        path = tmp_path / f"{name}.pt"
        with pytest.raises(UserError, match=f"{name}.pt"):
            read_meta(path)


def test_finding_the_payload_of_hostile_files_gives_a_range_inside_the_file_or_an_error(tmp_path):
    refused = 0
    for name in hostile_files(tmp_path):
        path = tmp_path / f"{name}.pt"
        try:
            offset, size, _ = find_payload(path)
        except UserError as error:
            refused += 1
            assert name in str(error)
        else:
            assert 0 <= offset <= offset + size <= path.stat().st_size
    assert refused >= 6


def test_every_single_byte_of_a_shard_may_be_wrong_without_another_error_than_ours(tmp_path):
    path = tmp_path / "s.pt"
    write_shard(path, "uint8", (2, 3, 2, 2))
    good = path.read_bytes()
    for position in [*range(PAYLOAD_OFFSET), *range(PAYLOAD_OFFSET + 24, len(good))]:
        data = bytearray(good)
        data[position] ^= 0xFF
        path.write_bytes(data)
        for read in (read_meta, find_payload, lambda path: read_member(path, "data/2")):
            try:
                read(path)
            except UserError as error:
                assert "s.pt" in str(error)
    path.write_bytes(good)
    assert read_meta(path) == META


def test_links_pipes_and_folders_are_refused_without_waiting(tmp_path):
    write_shard(tmp_path / "real.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "real.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "folder.pt").mkdir()
    for name, reason in (
        ("link", "is a symbolic link"),
        ("pipe", "not a regular file"),
        ("folder", "not a regular file"),
    ):
        errors = []

        def read(name=name, errors=errors):
            try:
                open_regular(tmp_path / f"{name}.pt")
            except (UserError, OSError) as error:
                errors.append(error)

        thread = threading.Thread(target=read, daemon=True)
        thread.start()
        thread.join(timeout=5)
        assert errors, f"{name}: opening it waits"
        assert reason in str(errors[0])


def test_reading_a_whole_file_is_bounded(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_regular(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="a: larger than 4 bytes"):
        read_regular(tmp_path / "a", 4)


def test_the_header_ends_where_the_rows_begin():
    assert len(payload_header()) == PAYLOAD_OFFSET
