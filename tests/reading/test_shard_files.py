import json
import os
import pickle
import threading
import time

import numpy as np
import pytest
import torch
from caches import make_test_cache, normalised, stored_images
from stage1 import SmallSource, run_stage1, small_plan

from distillery.cache.folder import load_index
from distillery.reading import shard_files
from distillery.reading.rows import CachedRows, ToFloat
from distillery.reading.shard_files import ShardFiles
from distillery.system.errors import MissingFileError, RunError, UserError

DTYPES = ["float32", "float16", "bfloat16", "uint8"]


def read_all(files: ShardFiles, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shards, local, rows) of every row of the cache, valid or not."""
    shards = np.repeat(np.arange(len(files.index.shard_rows)), files.index.shard_rows)
    local = np.concatenate([np.arange(rows) for rows in files.index.shard_rows])
    if order is not None:
        shards, local = shards[order], local[order]
    out = np.full((len(shards), files.index.row_bytes), 77, np.uint8)
    files.read(shards, local, out)
    return shards, local, out


def flip_bit(path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("mode", shard_files.READ_MODES)
def test_rows_equal_plain_torch_load_in_any_order(tmp_path, dtype, seed, mode):
    make_test_cache(tmp_path, 21, dtype=dtype, bad=(3, 20))
    index = load_index(tmp_path)
    order = None if seed is None else np.random.default_rng(seed).permutation(21)
    shards, local, rows = read_all(ShardFiles(index, mode=mode), order)
    images = torch.from_numpy(rows).view(getattr(torch, dtype)).view(-1, *index.image_shape)
    stored = stored_images(tmp_path)
    for image, place in zip(images, (index.shard_starts[shards] + local).tolist(), strict=True):
        assert torch.equal(image, stored.get(place, torch.zeros_like(image)))


def test_a_row_asked_for_twice_is_given_twice(tmp_path):
    make_test_cache(tmp_path, 8)
    files = ShardFiles(load_index(tmp_path))
    out = np.zeros((4, files.index.row_bytes), np.uint8)
    files.read(np.zeros(4, np.int64), np.array([5, 2, 5, 3]), out)
    assert (out[0] == out[2]).all()
    assert (out[0] != out[1]).any()


def test_neighbouring_rows_are_one_read(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 16)
    calls, preadv = [], os.preadv
    monkeypatch.setattr(
        os, "preadv", lambda fd, buffers, *rest: calls.append(len(buffers)) or preadv(fd, buffers, *rest)
    )
    read_all(ShardFiles(load_index(tmp_path)), np.random.default_rng(0).permutation(16))
    assert calls == [8, 8]


def test_a_read_that_stops_short_is_continued(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 16)
    expected = read_all(ShardFiles(load_index(tmp_path)))[2]
    preadv = os.preadv

    def stingy(fd, buffers, offset):
        return preadv(fd, [buffers[0][:1001]], offset)

    monkeypatch.setattr(os, "preadv", stingy)
    assert (read_all(ShardFiles(load_index(tmp_path)))[2] == expected).all()


def test_failed_rows_are_never_the_nth_valid_one(tmp_path):
    make_test_cache(tmp_path, 16, bad=(0, 4, 15))
    rows = CachedRows(load_index(tmp_path))
    global_idx = np.zeros(13, np.int64)
    out = np.zeros((13, rows.row_bytes), np.uint8)
    rows.fill(np.repeat([0, 1], [6, 7]), np.concatenate([np.arange(6), np.arange(7)]), out, global_idx)
    assert global_idx.tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize("dtype", DTYPES)
def test_float_rows_are_the_float32_cache_or_its_cast(tmp_path, dtype):
    source = make_test_cache(tmp_path, 8, dtype=dtype)
    rows = CachedRows(load_index(tmp_path))
    out = torch.zeros(8, 3, 8, 8)
    rows.fill(np.zeros(8, np.int64), np.arange(8), out.view(8, -1).numpy().view(np.uint8), np.zeros(8, np.int64))
    for i in range(8):
        expected = normalised(torch.from_numpy(source.pixels(i)).permute(2, 0, 1))
        narrow = torch.float32 if dtype == "uint8" else getattr(torch, dtype)
        assert torch.equal(out[i], expected.to(narrow).float())


def test_images_of_a_predecessor_that_are_not_normalised_are_normalised_once(tmp_path):
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"images": images}, tmp_path / "images_s000_00000.pt")
    shard = {"shard_path": "images_s000_00000.pt", "num_samples": 4, "global_start": 0}
    (tmp_path / "index_shard_000.json").write_text(json.dumps({"shard_id": 0, "num_shards": 1, "shards": [shard]}))
    index = load_index(tmp_path)
    out = torch.zeros(4, 3, 8, 8)
    ToFloat(index)(images.view(4, -1).numpy().view(np.uint8), out)
    assert torch.allclose(out, normalised(images * 255), atol=1e-6)
    assert torch.equal(torch.from_numpy(read_all(ShardFiles(index))[2]).view(torch.float32).view(images.shape), images)


# ---- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 0.37, 0.999])
@pytest.mark.parametrize("mode", shard_files.READ_MODES)
def test_a_flipped_bit_is_found_at_the_first_read_and_named(tmp_path, place, mode):
    make_test_cache(tmp_path, 16)
    index = load_index(tmp_path)
    files = ShardFiles(index, mode=mode)
    row = int(place * 8)
    offset = files.layout(1).payload_offset + int(place * 8 * index.row_bytes)
    flip_bit(tmp_path / "images_shard_00001.pt", offset)
    message = rf"images_shard_00001\.pt: row {row} \(global_idx {8 + row}, .*verify {tmp_path}"
    with pytest.raises(UserError, match=message):
        read_all(files)


def test_checksums_are_compared_once_always_or_never(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 16)
    index, digests = load_index(tmp_path), []
    digest = shard_files.xxhash.xxh3_64_intdigest
    monkeypatch.setattr(shard_files.xxhash, "xxh3_64_intdigest", lambda data: digests.append(1) or digest(data))
    for verify, first, second in (("first", 16, 0), ("always", 16, 16), ("never", 0, 0)):
        files = ShardFiles(index, verify=verify)
        for expected in (first, second):
            digests.clear()
            read_all(files)
            assert len(digests) == expected
    with pytest.raises(UserError, match="verify 'sometimes': expected one of first, always, never"):
        ShardFiles(index, verify="sometimes")


def test_checking_some_rows_leaves_the_others_unchecked(tmp_path):
    make_test_cache(tmp_path, 16)
    index = load_index(tmp_path)
    files = ShardFiles(index)
    out = np.zeros((15, index.row_bytes), np.uint8)
    read = np.setdiff1d(np.arange(16), [11])
    files.read(read // 8, read % 8, out)
    flip_bit(tmp_path / "images_shard_00001.pt", files.layout(1).payload_offset + 3 * index.row_bytes)
    with pytest.raises(UserError, match="row 3"):
        files.read(np.array([1]), np.array([3]), out[:1])


def test_a_shard_cut_before_it_is_opened_is_an_error_with_both_sizes(tmp_path):
    make_test_cache(tmp_path, 16)
    path = tmp_path / "images_shard_00001.pt"
    size = path.stat().st_size
    os.truncate(path, 1000)
    with pytest.raises(UserError, match=rf"images_shard_00001\.pt has 1000 bytes, index\.json says {size}\. Run:"):
        read_all(ShardFiles(load_index(tmp_path)))


@pytest.mark.parametrize("mode", shard_files.READ_MODES)
def test_a_shard_cut_while_it_is_open_is_an_error_with_the_row(tmp_path, mode):
    make_test_cache(tmp_path, 16)
    files = ShardFiles(load_index(tmp_path), mode=mode)
    read_all(files)
    os.truncate(tmp_path / "images_shard_00001.pt", files.layout(1).payload_offset + 2 * files.index.row_bytes + 10)
    with pytest.raises(UserError, match=r"images_shard_00001\.pt ends at byte .*, inside row 2: it was shortened"):
        read_all(files)


def test_a_shard_that_is_gone_is_an_error_with_its_name(tmp_path):
    make_test_cache(tmp_path, 16)
    index = load_index(tmp_path)
    (tmp_path / "images_shard_00001.pt").unlink()
    with pytest.raises(MissingFileError, match=r"images_shard_00001\.pt"):
        read_all(ShardFiles(index))


def test_a_shard_removed_while_open_is_noticed(tmp_path):
    make_test_cache(tmp_path, 16)
    files = ShardFiles(load_index(tmp_path))
    read_all(files)
    (tmp_path / "images_shard_00000.pt").unlink()
    files.recheck_presence()
    with pytest.raises(MissingFileError, match=r"images_shard_00000\.pt was removed while in use"):
        read_all(files)


def test_a_shard_replaced_by_a_longer_one_is_read_on_as_it_was(tmp_path):
    make_test_cache(tmp_path, 12)
    files = ShardFiles(load_index(tmp_path))
    before = read_all(files)[2]
    make_test_cache(tmp_path / "longer", 16)
    os.replace(tmp_path / "longer" / "images_shard_00001.pt", tmp_path / "images_shard_00001.pt")
    files.recheck_presence()
    assert (read_all(files)[2] == before).all()


@pytest.mark.parametrize("known", [False, True])
def test_a_last_shard_that_grew_before_it_was_opened_gives_the_rows_the_index_lists(tmp_path, known):
    source = SmallSource()
    run_stage1(small_plan(tmp_path, source, max_samples=12), source)
    files, record = ShardFiles(load_index(tmp_path)), tmp_path / "images_shard_00001.json"
    before, short = read_all(ShardFiles(files.index))[2], record.read_bytes()
    if known:
        files.layout(1)
    run_stage1(small_plan(tmp_path, source), source)
    assert (read_all(files)[2] == before).all()
    record.write_bytes(short)  # the moment between the longer shard and its record
    assert (read_all(ShardFiles(files.index))[2] == before).all()


def test_an_unreadable_row_is_an_error_with_its_file(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 16)
    files = ShardFiles(load_index(tmp_path))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(RunError, match=r"images_shard_00000\.pt: row 0 cannot be read: Input/output error"):
        read_all(files)


def test_a_symbolic_link_in_place_of_a_shard_is_refused(tmp_path):
    make_test_cache(tmp_path / "a", 16)
    path = tmp_path / "a" / "images_shard_00001.pt"
    path.rename(tmp_path / "elsewhere.pt")
    path.symlink_to(tmp_path / "elsewhere.pt")
    with pytest.raises(UserError):
        read_all(ShardFiles(load_index(tmp_path / "a")))


# ---- resources ---------------------------------------------------------------------------------------------------


def test_descriptors_are_bounded_and_given_back(tmp_path):
    make_test_cache(tmp_path, 40, shard_size=2)
    before = open_descriptors()
    files = ShardFiles(load_index(tmp_path), max_open=3)
    for seed in range(5):
        read_all(files, np.random.default_rng(seed).permutation(40))
        assert open_descriptors() <= before + 3
    del files
    assert open_descriptors() == before


def test_threads_may_share_an_object_while_shards_are_closed_and_opened(tmp_path):
    make_test_cache(tmp_path, 40, shard_size=2)
    files = ShardFiles(load_index(tmp_path), max_open=2)
    expected, errors = read_all(files)[2], []

    def work(seed):
        for turn in range(20):
            order = np.random.default_rng((seed, turn)).permutation(40)
            if (read_all(files, order)[2] != expected[order]).any():
                errors.append((seed, turn))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_copies_are_independent(tmp_path):
    make_test_cache(tmp_path, 16)
    rows = CachedRows(load_index(tmp_path), raw=True)
    expected = read_all(rows.files)[2]
    copy = pickle.loads(pickle.dumps(rows))
    assert (read_all(copy.files)[2] == expected).all()
    assert copy.raw


def test_reading_ahead_changes_nothing_and_can_be_stopped(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 16)
    monkeypatch.setattr(shard_files, "_is_resident", lambda fd, probe, offset: False)
    files = ShardFiles(load_index(tmp_path))
    shards, local = np.array([1, 0, 0, 1]), np.array([3, 2, 1, 7])
    asked = []
    files.advise(shards, local)
    files.advise(shards, local, lambda: bool(asked.append(1)) or len(asked) < 2)
    assert len(asked) == 2
    read_all(files)


def test_of_a_window_in_memory_only_a_few_rows_are_looked_at(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 160)
    looked, advised = [], []
    monkeypatch.setattr(shard_files, "_is_resident", lambda fd, probe, offset: not looked.append(offset))
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: advised.append(arguments))
    files = ShardFiles(load_index(tmp_path))
    files.advise(np.repeat(np.arange(20), 4), np.tile(np.arange(0, 8, 2), 20))
    assert len(looked) <= 2 * (shard_files._SAMPLED_RUNS + 1)
    assert not advised


def test_an_index_of_a_million_rows_opens_in_less_than_a_second(tmp_path):
    make_test_cache(tmp_path, 8)
    index = json.loads((tmp_path / "index.json").read_text())
    row = index["shards"][0] | {"num_samples": 2000, "bytes": 2_000_000}
    index["shards"] = [row | {"shard_path": f"images_shard_{s:05d}.pt", "global_start": 2000 * s} for s in range(500)]
    index |= {"num_samples": 1_000_000, "source_num_samples": 1_000_000}
    (tmp_path / "index.json").write_text(json.dumps(index))
    began = time.perf_counter()
    rows = CachedRows(load_index(tmp_path))
    assert time.perf_counter() - began < 1
    assert rows.index.num_valid == 1_000_000
