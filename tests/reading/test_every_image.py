import numpy as np
import pytest
import torch
from caches import make_test_cache
from predecessor import make_v2

from distillery.cache.folder import load_index
from distillery.config.keys_data import DataConfig
from distillery.reading.datasets import CachedTensorDataset
from distillery.reading.every_image import CachedImages

BAD = (0, 9, 10, 39)


def read_all(images: CachedImages, parts=None, batch_size: int = 5) -> tuple[torch.Tensor, list[int]]:
    """Every image of some parts and its index."""
    batches = list(images.batches(images.parts if parts is None else parts, batch_size, pin_memory=False, ahead=2))
    return torch.cat([pixels.clone() for pixels, _ in batches]), torch.cat([idx for _, idx in batches]).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_every_valid_row_comes_once_in_order_and_normalised(tmp_path, dtype):
    make_test_cache(tmp_path, 40, bad=BAD, dtype=dtype)
    images = CachedImages(DataConfig(), load_index(tmp_path))
    pixels, global_idx = read_all(images)
    assert global_idx == [number for number in range(40) if number not in BAD]
    assert torch.equal(pixels, torch.stack(list(CachedTensorDataset(tmp_path))))
    failed = [entry["global_idx"] for part in images.parts for entry in images.failures(part)]
    assert tuple(failed) == BAD and images.is_whole


def test_parts_are_read_alone_and_have_the_number_of_batches_they_say(tmp_path):
    make_test_cache(tmp_path, 40, bad=BAD)
    images = CachedImages(DataConfig(), load_index(tmp_path))
    assert [(part.number, part.first, part.stop, part.num_read) for part in images.parts[:2]] == [
        (0, 0, 8, 7),
        (1, 8, 16, 6),
    ]
    batches = list(images.batches(images.parts[1::2], 4, pin_memory=False, ahead=1))
    assert len(batches) == sum(images.num_batches(part, 4) for part in images.parts[1::2])
    assert torch.cat([idx for _, idx in batches]).tolist() == [8, *range(11, 16), *range(24, 32)]


def test_a_limit_ends_inside_a_part_and_an_index_of_fewer_rows_than_wanted_is_not_whole(tmp_path):
    make_test_cache(tmp_path, 40, bad=BAD)
    index = load_index(tmp_path)
    # rows of the source, as where the images are decoded on the way
    images = CachedImages(DataConfig(max_samples=10), index)
    assert read_all(images)[1] == [row for row in range(10) if row not in BAD]
    assert (images.parts[-1].first, images.parts[-1].stop, images.is_whole) == (8, 10, True)
    assert [entry["global_idx"] for entry in images.failures(images.parts[-1])] == [9]
    assert not CachedImages(DataConfig(), index.only(slice(1, None))).is_whole


def test_no_workers_count_as_one(tmp_path, monkeypatch):
    monkeypatch.setattr("distillery.reading.rows.usable_cpus", lambda: 11)
    make_test_cache(tmp_path, 8)
    assert CachedImages(DataConfig(num_workers=0), load_index(tmp_path)).num_threads == 1


def test_labels_are_those_of_the_images(tmp_path):
    make_test_cache(tmp_path, 40, bad=BAD, labels=True)
    images = CachedImages(DataConfig(), load_index(tmp_path))
    assert images.labels(images.parts[1], np.array([8, 11, 15])).tolist() == [1, 4, 1]


def test_the_predecessors_cache_has_its_shards_as_parts(tmp_path):
    expected = torch.cat(make_v2(tmp_path / "old"))
    images = CachedImages(DataConfig(mean=(0.5, 0.5, 0.5)), load_index(tmp_path / "old"))
    pixels, global_idx = read_all(images)
    assert [part.number for part in images.parts] == [0, 1, 2]
    assert global_idx == [*range(8), *range(20, 24)]
    assert pixels.shape == expected.shape and not any(images.failures(part) for part in images.parts)


def test_the_images_are_known_by_what_they_are_made_of(tmp_path):
    for name, rows in (("a", 40), ("b", 40), ("c", 48)):
        make_test_cache(tmp_path / name, rows)
    a, b, c = (CachedImages(DataConfig(), load_index(tmp_path / name)) for name in "abc")
    assert a.identity == b.identity and a.identity["source"] == {"kind": "test", "num_rows": 40}
    assert a.fingerprint == b.fingerprint != c.fingerprint
