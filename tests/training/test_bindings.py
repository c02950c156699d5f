import numpy as np
import pytest
from caches import make_test_cache

from data_loader import build_pretraining_dataloader
from distillery.training.bindings import epoch_row
from distillery.training.log import unpack_numbers


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    make_test_cache(folder, 60, shard_size=6)
    return folder


def shards_read(loader, epoch: int) -> set[int]:
    loader.set_epoch(epoch)
    return {int(shard) for _, global_idx in loader for shard in np.asarray(global_idx) // 6}


@pytest.mark.parametrize(
    "data, train",
    [
        ({}, {}),
        ({"shards_per_epoch": 4}, {}),
        ({"shards_per_epoch": 4, "shard_subset_mode": "independent"}, {}),
        ({"shuffle": "none"}, {"max_steps_per_epoch": 3}),
        ({"run_bytes": 3 * 768, "window_bytes": 6 * 768}, {"max_steps_per_epoch": 3}),
        ({"shards_per_epoch": 5, "shard_subset_mode": "fixed"}, {"max_steps_per_epoch": 2}),
    ],
)
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_row_of_an_epoch_names_the_shards_that_it_reads_and_counts_its_images(cache, data, train, epoch):
    loader = build_pretraining_dataloader(
        {"cache_dir": str(cache), **data}, {"batch_size": 4, **train}, with_indices=True
    )
    row = epoch_row(loader, epoch)
    seen = shards_read(loader, epoch)
    named = set(unpack_numbers(row["shards"]))
    assert row["images"] == 4 * len(loader)
    # of a last short batch, which is left out, a shard may be named that nothing was read of
    assert seen <= named and len(named - seen) <= 1


def test_an_epoch_over_every_shard_has_a_short_row(cache):
    loader = build_pretraining_dataloader({"cache_dir": str(cache)}, {"batch_size": 4})
    assert epoch_row(loader, 0) == {"images": 60, "shards": [[0, 9]]}
