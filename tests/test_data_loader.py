import gc
import io
import itertools
import json
import os
import pickle
import signal
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch
from caches import MEAN, STD, Images, make_test_cache, normalised, stored_images
from PIL import Image
from torch.utils.data import DataLoader

import data_loader
from data_loader import (
    CachedTensorDataset,
    DevicePrefetcher,
    PretrainDataset,
    RandomShardSubsetCachedDataset,
    build_pretraining_dataloader,
    load_labelled,
)
from distillery.config.keys_data import DataConfig
from distillery.reading import raw as raw_module
from distillery.reading.datasets import LabelledBatches
from distillery.sources.pixels import PreprocessSpec, preprocess_image
from distillery.system import distributed
from distillery.system.errors import MissingFileError, RunError, UserError

DTYPES = ["float32", "float16", "bfloat16", "uint8"]


def build(directory, batch_size=8, *, data=None, train=None, **options):
    data_config = {"cache_dir": str(directory), "use_cached": True, **(data or {})}
    train_config = {"batch_size": batch_size, "max_steps_per_epoch": None, **(train or {})}
    return build_pretraining_dataloader(data_config, train_config, **{"with_indices": True, **options})


def indices_of(loader) -> list[list[int]]:
    return [global_idx.tolist() for _, global_idx in loader]


@pytest.fixture
def as_rank(monkeypatch):
    def become(rank, world):
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        monkeypatch.setattr(distributed, "on_main", lambda decide: decide())

    return become


# ---- the images --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shuffle", ["block", "none"])
def test_batches_equal_plain_torch_load_reading(tmp_path, dtype, shuffle):
    make_test_cache(tmp_path, 40, dtype=dtype, bad=(5, 17, 39))
    stored = stored_images(tmp_path)
    seen = []
    for images, global_idx in build(tmp_path, 7, data={"shuffle": shuffle}, raw=True):
        assert images.dtype == getattr(torch, dtype)
        assert torch.equal(images, torch.stack([stored[i] for i in global_idx.tolist()]))
        seen += global_idx.tolist()
    assert len(seen) == len(set(seen)) == 35
    for images, global_idx in build(tmp_path, 7, data={"shuffle": shuffle}):
        expected = torch.stack([stored[i] for i in global_idx.tolist()])
        assert images.dtype == torch.float32
        assert torch.equal(images, normalised(expected) if dtype == "uint8" else expected.float())


def test_without_indices_a_batch_is_the_images_alone(tmp_path):
    make_test_cache(tmp_path, 16)
    batches = list(build(tmp_path, 8, with_indices=False))
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, 8, 8)] * 2


def test_an_epoch_without_its_last_short_batch_differs_from_epoch_to_epoch(tmp_path):
    make_test_cache(tmp_path, 44)
    loader, left_out = build(tmp_path, 16), set()
    for epoch in range(12):
        loader.set_epoch(epoch)
        batches = indices_of(loader)
        assert len(batches) == len(loader) == 2
        left_out.add(tuple(sorted(set(range(44)) - set(itertools.chain(*batches)))))
    assert len(left_out) > 6


def test_map_style_rows_are_the_valid_ones_in_order(tmp_path):
    source = make_test_cache(tmp_path, 20, bad=(0, 9), dtype="uint8")
    dataset = CachedTensorDataset(tmp_path)
    valid = [i for i in range(20) if i not in (0, 9)]
    assert len(dataset) == 18
    for row, i in enumerate(valid):
        assert torch.equal(dataset[row], normalised(torch.from_numpy(source.pixels(i)).permute(2, 0, 1)))
    assert torch.equal(dataset[-1], dataset[17])
    with pytest.raises(IndexError, match="row 18 of a data set of 18 rows"):
        dataset[18]


def test_limits_take_the_first_shards_and_the_first_valid_rows(tmp_path):
    make_test_cache(tmp_path, 40, bad=(2,))
    assert len(CachedTensorDataset(tmp_path, max_shards=2)) == 15
    assert len(CachedTensorDataset(tmp_path, max_samples=10)) == 10
    assert torch.equal(CachedTensorDataset(tmp_path, max_samples=10)[9], CachedTensorDataset(tmp_path)[9])
    loader = build(tmp_path, 5, data={"max_samples": 11, "max_shards": 4})
    assert set(itertools.chain(*indices_of(loader))) <= set(range(12)) - {2}
    assert loader.valid_rows_per_shard == [7, 4]


def test_a_last_shard_without_an_image_stays_where_the_limit_is_all_there_is(tmp_path):
    make_test_cache(tmp_path, 18, bad=(16, 17))
    # a run that goes on asks for as many as it was started on, and compares shard by shard
    assert CachedTensorDataset(tmp_path, max_samples=16).shard_rows.tolist() == [8, 8, 0]


def test_shards_per_epoch_are_drawn_from_those_within_max_samples(tmp_path):
    make_test_cache(tmp_path, 40)
    loader = build(tmp_path, 4, data={"max_samples": 20, "shards_per_epoch": 2})
    for epoch in range(6):
        loader.set_epoch(epoch)
        assert set(itertools.chain(*indices_of(loader))) <= set(range(20))
        assert len(loader) >= 3


def test_a_transform_is_applied_to_every_image(tmp_path):
    make_test_cache(tmp_path, 8)
    doubled = CachedTensorDataset(tmp_path, transform=lambda image: image * 2)
    assert torch.equal(doubled[3], CachedTensorDataset(tmp_path)[3] * 2)


def test_gaps_of_a_partial_cache_are_no_rows(tmp_path, capsys):
    make_test_cache(tmp_path, 40, shards=[1, 3, 4])
    loader = build(tmp_path, 4)
    assert sorted(itertools.chain(*indices_of(loader))) == [*range(8, 16), *range(24, 40)]
    assert "it is incomplete, training uses what is there: 24 of 40 rows" in capsys.readouterr().out


def test_the_predecessors_cache_is_read_as_it_is(tmp_path, capsys):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.save({"images": images}, tmp_path / "images_shard_00000.pt")
    shard = {"shard_path": "images_shard_00000.pt", "num_samples": 6, "global_start": 0}
    (tmp_path / "index.json").write_text(json.dumps({"num_samples": 50_000, "shards": [shard]}))
    assert torch.equal(torch.stack([*CachedTensorDataset(tmp_path)]), images)
    for batch, global_idx in build(tmp_path, 3):
        assert torch.equal(batch, images[global_idx])
    assert "carry no checksums" in capsys.readouterr().out


def test_labelled_batches_hold_every_valid_row_in_order(tmp_path):
    source = make_test_cache(tmp_path, 19, bad=(4,), labels=True)
    images, labels = zip(*load_labelled(tmp_path, 8), strict=True)
    assert [len(batch) for batch in images] == [8, 8, 2]
    assert torch.cat(labels).tolist() == [i % 7 for i in range(19) if i != 4]
    assert torch.equal(images[2][-1], normalised(torch.from_numpy(source.pixels(18)).permute(2, 0, 1)))
    make_test_cache(tmp_path / "unlabelled", 8)
    with pytest.raises(UserError, match="holds no labels. Name the label_column"):
        load_labelled(tmp_path / "unlabelled", 8)


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7])
def test_shares_of_the_labelled_batches_are_the_same_batches_one_after_the_other(tmp_path, num_shares):
    make_test_cache(tmp_path, 43, bad=(4, 20), labels=True)
    whole = list(LabelledBatches(tmp_path, 8))
    shares = [LabelledBatches(tmp_path, 8, (number, num_shares)) for number in range(num_shares)]
    parts = [batch for share in shares for batch in share]
    assert len(whole) == len(parts) == sum(map(len, shares)) == 6
    for (images, labels), (part_images, part_labels) in zip(whole, parts, strict=True):
        assert torch.equal(images, part_images) and torch.equal(labels, part_labels)
    assert max(map(len, shares)) == len(shares[0]) == shares[0].num_rounds


def test_a_reader_of_labelled_batches_that_stops_early_leaves_no_thread_behind(tmp_path):
    make_test_cache(tmp_path, 43, labels=True)
    before = threading.active_count()
    batches = load_labelled(tmp_path, 4)
    next(batches)
    batches.close()
    assert threading.active_count() == before


# ---- the order ---------------------------------------------------------------------------------------------------


def test_threads_and_batches_ahead_change_nothing(tmp_path):
    make_test_cache(tmp_path, 60, bad=(7,))
    orders = []
    for num_workers, prefetch in itertools.product([None, 0, 1, 2, 4], [1, 4]):
        loader = build(tmp_path, 8, data={"num_workers": num_workers, "prefetch_batches": prefetch})
        loader.set_epoch(3)
        orders.append(indices_of(loader))
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_ranks_share_the_global_batches_of_one_process(tmp_path, as_rank, world):
    make_test_cache(tmp_path, 60)
    alone = build(tmp_path, 24, data={"shards_per_epoch": 6})
    shares = []
    for rank in range(world):
        as_rank(rank, world)
        shares.append(indices_of(build(tmp_path, 24 // world, data={"shards_per_epoch": 6})))
    assert indices_of(alone) == [list(itertools.chain(*parts)) for parts in zip(*shares, strict=True)]


def test_epochs_differ_and_repeat_exactly(tmp_path):
    make_test_cache(tmp_path, 40)
    loader, orders = build(tmp_path), {}
    for epoch in [0, 1, 2, 1, 0]:
        loader.set_epoch(epoch)
        order = indices_of(loader)
        assert orders.setdefault(epoch, order) == order
    assert len({str(order) for order in orders.values()}) == 3


@pytest.mark.parametrize("mode, distinct", [("cycle", 5), ("independent", None), ("fixed", 2)])
def test_each_epoch_reads_its_own_shards(tmp_path, mode, distinct):
    make_test_cache(tmp_path, 40)
    loader = build(tmp_path, 8, data={"shards_per_epoch": 2, "shard_subset_mode": mode, "shuffle": "none"})
    seen = set()
    for epoch in range(3):  # ceil(5 shards / 2)
        loader.set_epoch(epoch)
        order = indices_of(loader)
        shards = [batch[0] // 8 for batch in order]
        assert len(set(shards)) == 2
        assert order == [list(range(8 * shard, 8 * shard + 8)) for shard in shards]
        assert sorted(loader.dataset.shards.tolist()) == sorted(shards)
        seen |= set(shards)
    assert distinct is None or len(seen) == distinct


def test_a_capped_cycle_covers_the_data(tmp_path):
    make_test_cache(tmp_path, 80)
    data = {"shards_per_epoch": 5, "shard_subset_mode": "cycle"}
    loader = build(tmp_path, 8, data=data, train={"max_steps_per_epoch": 2})
    seen = Counter()
    for epoch in range(5):
        loader.set_epoch(epoch)
        assert len(loader) == 2
        assert len(loader.dataset) == 16
        seen.update(itertools.chain(*indices_of(loader)))
    assert seen == dict.fromkeys(range(80), 1)


def test_accumulation_counts_steps_not_batches(tmp_path):
    make_test_cache(tmp_path, 40)
    assert len(build(tmp_path, 4, train={"max_steps_per_epoch": 3, "grad_accumulation_steps": 2})) == 6
    assert len(build(tmp_path, 8, train={"grad_accumulation_steps": 2})) == 4


# ---- resuming ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap, position", [*itertools.product([None], range(6)), *itertools.product([3], range(4))])
def test_resuming_anywhere_gives_the_rest_of_the_epoch(tmp_path, position, cap):
    make_test_cache(tmp_path, 48)
    train, data = {"max_steps_per_epoch": cap}, {"shards_per_epoch": 5}
    straight = build(tmp_path, train=train, data=data)
    straight.set_epoch(4)
    whole, states = [], [straight.state_dict()]
    for _, global_idx in straight:
        whole.append(global_idx.tolist())
        states.append(straight.state_dict())
    assert states[position] == {"epoch": 4, "samples": 8 * position}
    resumed = build(tmp_path, train=train, data=data)
    resumed.load_state_dict(states[position])
    resumed.set_epoch(4)  # as every epoch loop does; the position stays
    assert indices_of(resumed) == whole[position:]
    assert indices_of(resumed) == whole


def test_resuming_with_other_processes_and_batch_sizes(tmp_path, as_rank):
    make_test_cache(tmp_path, 64)
    whole = list(itertools.chain(*indices_of(build(tmp_path, 8))))
    shares = []
    for rank in range(2):
        as_rank(rank, 2)
        loader = build(tmp_path, 8)
        loader.load_state_dict({"epoch": 0, "samples": 32})
        shares.append(indices_of(loader))
    assert list(itertools.chain(*(a + b for a, b in zip(*shares, strict=True)))) == whole[32:]
    with pytest.raises(UserError, match=r"24 samples is not a multiple of 16 \(batch_size 8 x 2 processes\)"):
        loader.load_state_dict({"epoch": 0, "samples": 24})


def test_resuming_reads_nothing_of_what_was_skipped(tmp_path):
    make_test_cache(tmp_path, 80)
    order = build(tmp_path, data={"shuffle": "none"})
    shards = [batch[0] // 8 for batch in indices_of(order)]
    for shard in shards[:8]:
        (tmp_path / f"images_shard_{shard:05d}.pt").unlink()
    resumed = build(tmp_path, data={"shuffle": "none"})
    resumed.load_state_dict({"epoch": 0, "samples": 64})
    assert [batch[0] // 8 for batch in indices_of(resumed)] == shards[8:]


def test_another_epoch_forgets_a_position(tmp_path):
    make_test_cache(tmp_path, 40)
    loader = build(tmp_path)
    loader.load_state_dict({"epoch": 0, "samples": 16})
    loader.set_epoch(1)
    assert loader.state_dict() == {"epoch": 1, "samples": 0}
    assert len(indices_of(loader)) == 5


# ---- memory ------------------------------------------------------------------------------------------------------


def test_batches_stay_as_they_are_while_anyone_holds_them_or_a_view(tmp_path):
    make_test_cache(tmp_path, 64)
    stored = stored_images(tmp_path)
    loader, held = build(tmp_path, 4), []
    for epoch in range(4):
        loader.set_epoch(epoch)
        for number, (images, global_idx) in enumerate(loader):
            kept = [images, images[1:3], images.numpy()[2:], images.flatten()[: 3 * 8 * 8].view(3, 8, 8)][number % 4]
            held.append((kept, global_idx[[slice(None), slice(1, 3), slice(2, None), 0][number % 4]]))
        del images
        gc.collect()
    for kept, global_idx in held:
        wanted = [stored[i] for i in np.atleast_1d(global_idx.numpy()).tolist()]
        assert torch.equal(torch.as_tensor(kept).reshape(-1, 3, 8, 8), torch.stack(wanted))


def test_dropped_batches_are_used_again(tmp_path):
    make_test_cache(tmp_path, 64)
    loader = build(tmp_path, 4, data={"prefetch_batches": 2})
    for epoch in range(10):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
    assert loader._memory.num_allocated <= 6


def test_descriptors_threads_and_memory_are_flat_over_epochs(tmp_path):
    make_test_cache(tmp_path, 200, shard_size=4, size=32)
    loader = build(tmp_path, 8)

    def resident_bytes() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def state():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    for epoch in range(30):
        loader.set_epoch(epoch)
        for _ in loader:
            pass
        if epoch == 5:
            before, memory = state(), resident_bytes()
    assert state() == before
    assert resident_bytes() < 1.05 * memory


def test_leaving_an_epoch_early_ends_its_threads(tmp_path):
    make_test_cache(tmp_path, 64)
    before = threading.active_count()
    loader = build(tmp_path, 4)
    for _ in range(5):
        for _ in loader:
            break
        gc.collect()
    assert threading.active_count() <= before  # one of an earlier test may have ended meanwhile


# ---- things go wrong ---------------------------------------------------------------------------------------------


def test_a_flipped_bit_ends_the_epoch_with_the_row(tmp_path):
    make_test_cache(tmp_path, 64)
    path = tmp_path / "images_shard_00003.pt"
    with path.open("r+b") as file:
        file.seek(1000)
        byte = file.read(1)[0]
        file.seek(1000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match=r"images_shard_00003\.pt: row 1 \(global_idx 25"):
        indices_of(build(tmp_path, 4))


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_a_shard_lost_during_training_is_an_error_within_seconds(tmp_path, damage):
    make_test_cache(tmp_path, 200, shard_size=4)
    loader, path = build(tmp_path, 4, data={"prefetch_batches": 1}), tmp_path / "images_shard_00011.pt"
    began = time.monotonic()
    with pytest.raises(UserError, match=r"images_shard_00011\.pt"):
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            for number, _ in enumerate(loader):
                if epoch == 1 and number == 3:
                    path.unlink() if damage == "removed" else os.truncate(path, 900)
    assert time.monotonic() - began < 20


def test_a_read_that_never_returns_is_an_error_with_the_file(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 40)
    preadv, release = os.preadv, threading.Event()

    def stuck(fd, buffers, offset, *flags):
        if len(buffers[0]) > 1 and "00002" in os.readlink(f"/proc/self/fd/{fd}"):
            release.wait(30)
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", stuck)
    loader = build(tmp_path, 8, data={"num_workers": 1})
    loader.stall_s = 0.3
    began = time.monotonic()
    with pytest.raises(RunError, match=r"images_shard_00002\.pt: a read has not come back for"):
        indices_of(loader)
    release.set()
    assert time.monotonic() - began < 10


def test_time_spent_waiting_is_measured(tmp_path, monkeypatch):
    make_test_cache(tmp_path, 16)
    preadv = os.preadv

    def slow(fd, buffers, offset, *flags):
        time.sleep(0.05 if len(buffers[0]) > 1 else 0)
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", slow)
    loader = build(tmp_path, 8, data={"num_workers": 1})
    prefetcher = DevicePrefetcher(loader, "cpu")
    for _ in prefetcher:
        pass
    assert loader.wait_seconds > 0.05
    assert prefetcher.wait_seconds > 0.05


def test_a_read_only_cache_is_enough_and_nothing_is_written(tmp_path):
    make_test_cache(tmp_path, 40, labels=True)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    # root may write all the same: then the comparison at the end is the test
    for path in (*tmp_path.iterdir(), tmp_path):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        indices_of(build(tmp_path, 8))
        list(load_labelled(tmp_path, 8))
    finally:
        tmp_path.chmod(0o755)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# ---- what the configuration asks for -----------------------------------------------------------------------------


def test_a_missing_cache_is_an_error_with_the_command(tmp_path):
    with pytest.raises(MissingFileError, match=r"index\.json\. Run: python precompute_cache\.py --data_config"):
        build(tmp_path / "nowhere")


def test_a_cache_of_another_configuration_is_refused_field_by_field(tmp_path):
    make_test_cache(tmp_path, 16)
    other = {"image_size": 32, "cache_dtype": "uint8", "mean": [0.5, 0.5, 0.5], "interpolation": "bicubic"}
    with pytest.raises(UserError) as caught:
        build(tmp_path, data=other)
    text = str(caught.value)
    assert "image_size: 8 in the cache, 32 in data_config" in text
    assert "cache_dtype: 'float32' in the cache" in text or "cache_dtype: float32 in the cache, uint8" in text
    assert "mean: [0.485" in text
    assert "interpolation" not in text
    same = {"image_size": 8, "cache_dtype": "float32", "cache_shard_size": 8, "resize_mode": "squash"}
    assert len(build(tmp_path, data=same)) == 2


def test_a_cache_of_another_data_set_is_refused_and_the_lines_say_what_it_was_made_from(tmp_path, capsys):
    make_test_cache(tmp_path, 16)
    index = tmp_path / "index.json"
    content = json.loads(index.read_text())
    files = {"count": 2, "bytes": 4000, "hash": "x"}
    content["source"] |= {"kind": "parquet", "split": "train", "image_column": "img", "files": files, "num_rows": 16}
    index.write_text(json.dumps(content))
    source = {"dataset_name": "parquet", "data_files": "a.parquet", "split": "train", "image_column": "img"}
    assert len(build(tmp_path, data=source)) == 2
    assert "made from parquet: 16 images in 2 files (4.0 kB), split 'train', column img" in capsys.readouterr().out
    build(tmp_path, data=source | {"image_column": None})  # found by its type
    for key, other in {"dataset_name": "imagefolder", "split": "test", "image_column": "photo"}.items():
        expected = f"another configuration:\n  {key}: {content['source'].get(key, 'parquet')} in the cache, {other} in"
        with pytest.raises(UserError, match=expected):
            build(tmp_path, data=source | {key: other})
    bare = DataConfig(cache_dir=str(tmp_path), image_size=8, cache_shard_size=8)
    # a configuration without a source, as for a cache on a node that has no images, says nothing of it
    assert len(build_pretraining_dataloader(bare, {"batch_size": 8})) == 2
    content["source"]["files"] = None
    index.write_text(json.dumps(content))
    assert len(build(tmp_path)) == 2
    content["source"]["dataset_name"] = "me/photos"
    index.write_text(json.dumps(content))
    assert len(build(tmp_path, data={"dataset_name": "me/photos"})) == 2
    with pytest.raises(UserError, match="dataset_name: me/photos in the cache, you/photos in data_config"):
        build(tmp_path, data={"dataset_name": "you/photos"})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda data: RandomShardSubsetCachedDataset(data, 2, seed="x"), "seed is 'x'; it must be a whole number"),
        (lambda data: RandomShardSubsetCachedDataset(data, 2.0), "shards_per_epoch is 2.0; it must be a whole number"),
        (lambda data: RandomShardSubsetCachedDataset(data, 2).set_epoch(-1), "epoch is -1; it must be 0 or more"),
        (lambda data: RandomShardSubsetCachedDataset(data, 2).set_epoch(1.5), "epoch is 1.5; it must be a whole"),
        (
            lambda data: CachedTensorDataset(data.index, max_samples="5"),
            "max_samples is '5'; it must be a whole number",
        ),
        (lambda data: data[1.5], "row numbers must be whole numbers, found .1.5"),
        (lambda data: data["a"], "row numbers must be whole numbers, found .'a'"),
        (lambda data: build(data.index.directory).load_state_dict({"epoch": 0}), "found .'epoch': 0"),
        (lambda data: build(data.index.directory).load_state_dict(None), "a position is a dict of epoch and samples"),
        (lambda data: build(data.index.directory).load_state_dict({"epoch": 0, "samples": -8}), "samples is -8; it"),
        (lambda data: build(data.index.directory).set_epoch(-1), "epoch is -1; it must be 0 or more"),
    ],
)
def test_what_is_no_whole_number_is_refused_where_it_is_given(tmp_path, call, message):
    make_test_cache(tmp_path, 40)
    data = CachedTensorDataset(tmp_path)
    with pytest.raises((UserError, TypeError), match=message):
        call(data)
    numbers = [1, np.uint64(1), np.int8(1), torch.tensor(1)]
    assert all(torch.equal(row, data[1]) for row in data.__getitems__(numbers))


def test_a_cache_made_by_another_jpeg_decode_is_refused_where_the_configuration_sets_the_key(tmp_path):
    folders = {jpeg_decode: tmp_path / jpeg_decode for jpeg_decode in ("exact", "scaled")}
    for jpeg_decode, folder in folders.items():
        make_test_cache(folder, 16, jpeg_decode=jpeg_decode)
        assert "scaled" in (folder / "index.json").read_text() or jpeg_decode == "exact"
        assert len(build(folder, data={"image_size": 8, "cache_shard_size": 8})) == 2
        assert len(build(folder, data={"jpeg_decode": jpeg_decode})) == 2
    with pytest.raises(UserError, match=r"jpeg_decode: exact in the cache, scaled in data_config\nGive these values"):
        build(folders["exact"], data={"jpeg_decode": "scaled"})
    with pytest.raises(UserError, match=r"jpeg_decode: scaled in the cache, exact in data_config\nGive these values"):
        build(folders["scaled"], data={"jpeg_decode": "exact"})


def test_a_batch_larger_than_the_epoch_is_an_error_with_the_figures(tmp_path):
    make_test_cache(tmp_path, 16)
    with pytest.raises(UserError, match=r"a step takes 32 images .* an epoch holds at most 8 \(1 of 2 shards\)"):
        build(tmp_path, 32, data={"shards_per_epoch": 1})


def test_a_frozen_list_of_shards_is_kept_to(tmp_path):
    make_test_cache(tmp_path, 40)
    names = ["images_shard_00001.pt", "images_shard_00004.pt"]
    loader = build(tmp_path, 4, shards=names)
    assert loader.shard_names == names
    assert sorted(itertools.chain(*indices_of(loader))) == [*range(8, 16), *range(32, 40)]
    with pytest.raises(MissingFileError, match=r"1 of the 2 shards .* the first is images_shard_00009\.pt"):
        build(tmp_path, 4, shards=["images_shard_00001.pt", "images_shard_00009.pt"])


def test_a_network_file_system_is_noticed(tmp_path, monkeypatch, capsys):
    make_test_cache(tmp_path, 16)
    monkeypatch.setattr(data_loader, "is_network_file_system", lambda path: True)
    monkeypatch.setattr(data_loader, "file_system_of", lambda path: "lustre")
    build(tmp_path)
    out = capsys.readouterr().out
    assert out.count("reading the cache") == 1
    assert "it lies on a network file system (lustre): --set stage_dir=FOLDER" in out


# ---- raw images --------------------------------------------------------------------------------------------------


@pytest.fixture
def raw_source(monkeypatch):
    def use(source: Images) -> Images:
        monkeypatch.setattr(raw_module, "open_source", lambda **_: source)
        return source

    return use


RAW = {"dataset_name": "test", "use_cached": False, "image_size": 8, "cache_shard_size": 8, "num_workers": 2}


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"shuffle": "none"},
        {"shards_per_epoch": 4},
        {"max_samples": 29},
        {"max_shards": 3, "shard_subset_mode": "independent"},
        {"run_bytes": 2000, "window_bytes": 9000},
    ],
    ids=str,
)
def test_raw_batches_equal_the_cache_image_for_image_and_in_order(tmp_path, raw_source, keys, dtype):
    make_test_cache(tmp_path, 40, dtype=dtype)
    raw_source(Images(40))
    data = RAW | {"cache_dtype": dtype} | keys
    raw = build(tmp_path, 8, data=data)
    cached = build(tmp_path, 8, data=data | {"use_cached": True})
    for epoch in range(3):
        raw.set_epoch(epoch)
        cached.set_epoch(epoch)
        assert all(torch.equal(a, b) for a, b in zip(raw.peek(3), cached.peek(3), strict=True))
        for (a, i), (b, j) in zip(raw, cached, strict=True):
            assert torch.equal(i, j)
            assert torch.equal(a, b)
    state = {"epoch": 1, "samples": 8}
    raw.load_state_dict(state)
    cached.load_state_dict(state)
    assert indices_of(raw) == indices_of(cached)


def test_raw_images_are_read_no_further_ahead_than_memory_is_meant_for(tmp_path, raw_source, monkeypatch):
    source = raw_source(Images(400))
    whole = indices_of(build(tmp_path, 4, data=RAW))
    monkeypatch.setattr(raw_module, "_FIRST_ROWS", 10)
    monkeypatch.setattr(raw_module, "_WAITING_BYTES", 40 * len(source.encoded(0)))
    source.reads.clear()
    loader = build(tmp_path, 4, data=RAW | {"prefetch_batches": 1})
    batches = iter(loader)
    next(batches)
    time.sleep(0.5)
    # two parts of 40 that wait and a few batches that were taken, of 400
    assert sum(stop - start for start, stop in source.reads) < 120
    assert indices_of(loader) == whole


@pytest.mark.parametrize("kind, run_bytes, is_told", [("parquet", 700, True), ("parquet", 60_000, False),
                                                      ("imagefolder", 700, False)])  # fmt: skip
def test_short_runs_of_parquet_files_come_with_advice(tmp_path, raw_source, capsys, kind, run_bytes, is_told):
    raw_source(Images(400)).identity["kind"] = kind
    build(tmp_path, 8, data=RAW | {"run_bytes": run_bytes, "cache_dtype": "uint8"})
    told = "even a run of 3 rows costs most of a row group: run_bytes: 12288 reads less, in runs of 64"
    assert (told in capsys.readouterr().out) == is_told


def end_of(loader, within_s=20.0):
    """(batches, error) of an epoch that must come to its end."""
    found = []

    def read() -> None:
        batches = 0
        try:
            for _ in loader:
                batches += 1
            found.append((batches, None))
        except Exception as error:
            found.append((batches, error))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(within_s)
    assert found, "the epoch neither goes on nor ends"
    return found[0]


class UnreadableFrom(Images):
    """Of its images, those from `first` on cannot be read."""

    first = 24

    def read(self, start, stop):
        if stop > self.first:
            raise OSError(5, "Input/output error")
        return super().read(start, stop)


def test_images_that_cannot_be_read_end_the_epoch_where_they_are_wanted(tmp_path, raw_source, monkeypatch):
    monkeypatch.setattr(raw_module, "_TOGETHER", 8)
    raw_source(UnreadableFrom(40))
    loader = build(tmp_path, 8, data=RAW | {"shards_per_epoch": None, "shuffle": "none", "shard_subset_mode": "fixed"})
    order = [batch[0] for batch in np.array(loader._epoch_order().rows(0, 40)[0]).reshape(5, 8).tolist()]
    batches, error = end_of(loader)
    assert isinstance(error, OSError)
    assert batches == min(order.index(3), order.index(4))


def test_a_reader_that_cannot_start_is_an_error(tmp_path, raw_source, monkeypatch):
    raw_source(Images(40))

    def full(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(raw_module.RawRows, "_read_part", full)
    assert "can't start new thread" in str(end_of(build(tmp_path, 8, data=RAW))[1])


def test_a_stuck_read_of_a_stand_in_is_an_error_too(tmp_path, raw_source):
    class Stuck(Images):
        release = threading.Event()

        def read(self, start, stop):
            if (start, stop) == (6, 7):
                self.release.wait(30)
            return super().read(start, stop)

    raw_source(Stuck(16, bad=(5,)))
    loader = build(tmp_path, 8, data=RAW)
    loader.stall_s = 0.5
    assert "a read has not come back" in str(end_of(loader)[1])
    Stuck.release.set()


def test_leaving_an_epoch_wakes_those_who_wait_for_an_image(tmp_path, raw_source):
    class Slow(Images):
        release = threading.Event()

        def read(self, start, stop):
            self.release.wait(30)
            return super().read(start, stop)

    raw_source(Slow(400))
    loader = build(tmp_path, 8, data=RAW | {"num_workers": 8})
    batches = iter(loader)
    loader._stream._submit()
    before = time.monotonic()
    loader._stream.close()
    del batches
    while any(thread.name == "read-rows" for thread in threading.enumerate()) and time.monotonic() < before + 20:
        time.sleep(0.02)
    assert not any(thread.name == "read-rows" for thread in threading.enumerate())
    Slow.release.set()


def test_where_no_image_can_be_decoded_every_call_says_so(tmp_path, raw_source):
    raw_source(Images(6, bad=tuple(range(6))))
    dataset = PretrainDataset(RAW | {"max_failed_fraction": 1.0})
    for _ in range(2):
        with pytest.raises(UserError, match="6 of 6 images of test images cannot be decoded"):
            dataset[0]


def test_a_process_of_several_meets_its_share_of_the_failures_allowed(tmp_path, raw_source, as_rank):
    data = RAW | {"max_failed_fraction": 0.1}
    raw_source(Images(400, bad=tuple(range(0, 400, 12))))  # 34, and 40 are allowed
    assert end_of(build(tmp_path, 8, data=data))[1] is None
    as_rank(1, 4)
    raw_source(Images(400, bad=tuple(range(0, 400, 6))))  # 67: of a quarter about 17, and 10 are allowed
    assert "cannot be decoded, more than" in str(end_of(build(tmp_path, 8, data=data))[1])


def test_raw_pixels_are_uint8_and_said_to_be_unnormalised(tmp_path, raw_source):
    source = raw_source(Images(16))
    loader = build(tmp_path, 4, data=RAW, raw=True)
    assert not loader.normalized
    for images, global_idx in loader:
        for image, i in zip(images, global_idx.tolist(), strict=True):
            assert torch.equal(image, torch.from_numpy(source.pixels(i)).permute(2, 0, 1))


def test_undecodable_raw_images_are_replaced_counted_and_shift_nothing(tmp_path, raw_source, capsys):
    source = raw_source(Images(32, bad=(3, 4, 31)))
    whole = indices_of(build(tmp_path, 8, data=RAW | {"num_workers": 1}))
    raw_source(Images(32))
    good = indices_of(build(tmp_path, 8, data=RAW))
    stand_in = {3: 5, 4: 5, 31: 0}
    assert whole == [[stand_in.get(i, i) for i in batch] for batch in good]
    assert "image 3 cannot be decoded" in capsys.readouterr().err
    raw_source(source)
    dataset = PretrainDataset(RAW | {"cache_dir": str(tmp_path)})
    assert len(dataset) == 32
    assert torch.equal(dataset[3], dataset[5])
    assert torch.equal(dataset[6], normalised(torch.from_numpy(source.pixels(6)).permute(2, 0, 1)))


def test_too_many_undecodable_raw_images_are_an_error(tmp_path, raw_source):
    raw_source(Images(40, bad=tuple(range(0, 30))))
    with pytest.raises(UserError, match=r"11 of 40 images of test images cannot be decoded, more than"):
        indices_of(build(tmp_path, 8, data=RAW))


def test_null_takes_the_cache_when_there_is_one_and_says_so(tmp_path, raw_source, capsys):
    raw_source(Images(40))
    data = RAW | {"use_cached": None}
    assert build(tmp_path / "c", data=data).shard_names is None
    assert "decoding raw images, 2 at a time, from test images: 40 images" in capsys.readouterr().out
    make_test_cache(tmp_path / "c", 40)
    assert len(build(tmp_path / "c", data=data).shard_names) == 5
    assert "reading the cache" in capsys.readouterr().out


def test_shards_without_their_index_are_not_taken_for_no_cache(tmp_path, raw_source):
    raw_source(Images(40))
    make_test_cache(tmp_path, 40)
    (tmp_path / "index.json").unlink()
    with pytest.raises(MissingFileError, match=r"Index file not found: .*Run: python precompute_cache\.py"):
        build(tmp_path, data=RAW | {"use_cached": None})


# ---- under torch's own DataLoader --------------------------------------------------------------------------------


class WithEpoch:
    """The subset's rows as (epoch its worker sees, sum of the image)."""

    def __init__(self, subset):
        self.subset = subset

    def __len__(self):
        return len(self.subset)

    def __getitem__(self, i):
        return self.subset.epoch, self.subset[i].double().sum()


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_persistent_workers_see_set_epoch(tmp_path, start_method):
    make_test_cache(tmp_path, 40)
    subset = RandomShardSubsetCachedDataset(CachedTensorDataset(tmp_path), 2, seed=1)
    sums = {image.double().sum().item(): i // 8 for i, image in stored_images(tmp_path).items()}
    loader = DataLoader(
        WithEpoch(subset), 4, num_workers=1, persistent_workers=True, multiprocessing_context=start_method
    )
    seen = set()
    for epoch in range(3):
        subset.set_epoch(epoch)
        epochs, shards = set(), set()
        for epoch_seen, images in loader:
            epochs |= set(epoch_seen.tolist())
            shards |= {sums[value] for value in images.tolist()}
        assert epochs == {epoch}
        assert shards == set(subset.shards.tolist())
        seen |= shards
    assert seen == set(range(5))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_data_sets_work_under_an_ordinary_loader(tmp_path, num_workers):
    make_test_cache(tmp_path, 40, dtype="uint8", bad=(1,))
    dataset = CachedTensorDataset(tmp_path)
    len(dataset[3])  # files are open before the fork
    loader = DataLoader(dataset, 13, num_workers=num_workers, multiprocessing_context="fork" if num_workers else None)
    assert torch.equal(torch.cat(list(loader)), torch.stack([dataset[i] for i in range(39)]))


def test_data_sets_can_be_pickled(tmp_path):
    make_test_cache(tmp_path, 16)
    subset = RandomShardSubsetCachedDataset(CachedTensorDataset(tmp_path), 1)
    subset.set_epoch(1)
    copy = pickle.loads(pickle.dumps(subset))
    assert torch.equal(torch.stack([*copy]), torch.stack([*subset]))


# ---- to the device -----------------------------------------------------------------------------------------------


def test_the_prefetcher_hands_out_the_loaders_batches_and_their_positions(tmp_path):
    make_test_cache(tmp_path, 40)
    loader = build(tmp_path)
    expected = indices_of(loader)
    prefetcher = DevicePrefetcher(loader, torch.device("cpu"))
    assert len(prefetcher) == 5
    for number, (images, global_idx) in enumerate(prefetcher, start=1):
        assert images.shape == (8, 3, 8, 8)
        assert global_idx.tolist() == expected[number - 1]
        assert prefetcher.state_dict() == {"epoch": 0, "samples": 8 * number}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_batches_arrive_on_the_device_as_they_were(tmp_path):
    make_test_cache(tmp_path, 64, size=32)
    torch.zeros(1, device="cuda")
    stored = stored_images(tmp_path)
    loader = build(tmp_path, 4)
    prefetcher = DevicePrefetcher(loader, "cuda")
    held = []
    for number, (images, global_idx) in enumerate(prefetcher, start=1):
        assert prefetcher.state_dict()["samples"] == 4 * number
        held.append((images * 1, global_idx))
    assert loader._memory.pinned
    for images, global_idx in held:
        assert torch.equal(images.cpu(), torch.stack([stored[i] for i in global_idx.cpu().tolist()]))


def test_raw_images_are_scaled_as_the_cache_of_the_same_configuration_is(raw_source):
    class Jpegs(Images):
        def encoded(self, i):
            buffer = io.BytesIO()
            Image.fromarray(self.pixels(i)).resize((70, 45)).save(buffer, "JPEG")
            return buffer.getvalue()

    source = raw_source(Jpegs(4))
    images = {how: PretrainDataset(RAW | {"jpeg_decode": how}) for how in ("exact", "scaled")}
    for i in range(4):
        pixels = preprocess_image(source.encoded(i), PreprocessSpec(8, "squash", "bicubic", MEAN, STD, "scaled"))
        assert torch.equal(images["scaled"][i], normalised(torch.from_numpy(pixels)))
        assert not torch.equal(images["scaled"][i], images["exact"][i])


def test_raw_images_may_be_asked_for_more_than_once_in_a_batch(tmp_path, raw_source):
    raw_source(Images(8))
    dataset = PretrainDataset(RAW | {"cache_dir": str(tmp_path)})
    found = dataset.__getitems__([4, 1, 4, 4, 0])
    for place, row in enumerate([4, 1, 4, 4, 0]):
        assert torch.equal(found[place], dataset[row])
    found[0].zero_()
    assert found[2].any()


@pytest.mark.parametrize("limit", ["max_shards", "max_samples"])
@pytest.mark.parametrize("value", [0, -1])
def test_an_impossible_limit_is_an_error(tmp_path, limit, value):
    make_test_cache(tmp_path, 8)
    with pytest.raises(UserError, match=f"{limit} is {value}; it must be 1 or more, or None for all"):
        CachedTensorDataset(tmp_path, **{limit: value})


@pytest.mark.parametrize("bad", [(), (3,)])
def test_a_child_of_a_fork_reads_whatever_its_parents_threads_were_doing(tmp_path, bad):
    make_test_cache(tmp_path, 16, bad=bad)
    dataset = CachedTensorDataset(tmp_path)
    expected = dataset[1]
    with dataset.rows.files._lock:  # as a reading thread holds it for moments
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(dataset[1], expected) else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.02)
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert ended == (child, 0)
