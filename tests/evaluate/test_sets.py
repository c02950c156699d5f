"""The evaluation sets of a data configuration."""

import pytest
from caches import make_test_cache

from distillery.config.keys_data import DataConfig
from distillery.evaluate import sets
from distillery.evaluate.sets import EvalSet, eval_sets
from distillery.system.errors import UserError


def data_of(folder, **entries) -> DataConfig:
    whole = {name: {"dataset_name": "imagefolder", "data_dir": "unused"} | more for name, more in entries.items()}
    return DataConfig(dataset_name="imagefolder", data_dir="unused", cache_dir=str(folder), eval_datasets=whole)


def test_sets_of_both_tasks_come_in_the_order_of_the_configuration(tmp_path, monkeypatch):
    for name, labels in (("streets", False), ("pets", True)):
        for part in ("train", "test"):
            make_test_cache(tmp_path / "eval" / name / part, 8, labels=labels)
    asked = []
    monkeypatch.setattr(sets, "count_mask_classes", lambda indexes, *given: asked.append((len(indexes), *given)) or 5)
    data = data_of(tmp_path, streets={"task": "segmentation", "num_classes": 6, "ignore_index": 3}, pets={})
    streets, pets = eval_sets(data)
    folder = tmp_path / "eval"
    assert streets == EvalSet("streets", folder / "streets/train", folder / "streets/test", "segmentation", 5, 3)
    assert pets == EvalSet("pets", folder / "pets/train", folder / "pets/test")
    assert asked == [(2, "streets", 6, 3)]
    assert streets.is_segmentation and not pets.is_segmentation


def test_a_class_is_called_by_its_name_or_its_number(tmp_path):
    of = EvalSet("pets", tmp_path, tmp_path, class_names={0: "cat"})
    assert (of.name_of(0), of.name_of(4)) == ("cat", "4")


def test_a_set_that_is_not_cached_says_what_to_run(tmp_path):
    make_test_cache(tmp_path / "eval" / "pets" / "train", 8, labels=True)
    with pytest.raises(UserError, match=r"eval_datasets.pets: .*test is not there. Run: python precompute_cache.py"):
        eval_sets(data_of(tmp_path, pets={}))


def test_more_neighbours_than_there_are_images_are_said(tmp_path, capsys):
    for part in ("train", "test"):
        make_test_cache(tmp_path / "eval" / "pets" / part, 8, labels=True)
    eval_sets(data_of(tmp_path, pets={}), 8)
    assert "knn_k" not in capsys.readouterr().out
    eval_sets(data_of(tmp_path, pets={}), 9)
    assert "eval_datasets.pets: knn_k is 9, and there are 8 training images: all vote" in capsys.readouterr().out
