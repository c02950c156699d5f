import copy
import itertools
import json
import pickle
import tarfile
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distillery.cache.folder import load_index, load_labels
from distillery.cache.plan import survey_cache
from distillery.config.load import load_configs
from distillery.evaluate.sets import eval_sets
from distillery.precompute import jobs
from distillery.sources.evaluation import PartOfSource, label_warnings, number_as, spread_rows
from distillery.sources.registry import open_source
from distillery.system.errors import UserError
from distillery.system.signals import StopFlag


def png(number):
    file = BytesIO()
    Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_folder(folder, labels):
    for number, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / f"{number:03d}.png").write_bytes(png(number))
    return {"dataset_name": "imagefolder", "data_dir": str(folder)}


def write_texts(folder, labels):
    folder.mkdir()
    table = pa.table(
        {"image": [{"bytes": png(number), "path": None} for number in range(len(labels))], "label": labels}
    )
    pq.write_table(table, folder / "a.parquet")
    return {"dataset_name": "parquet", "data_files": str(folder / "a.parquet")}


def write_numbers(folder, labels, names=None):
    folder.mkdir()
    table = pa.table({"image": [png(number) for number in range(len(labels))], "label": labels})
    if names is not None:
        features = {"label": {"_type": "ClassLabel", "names": names}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, folder / "a.parquet")
    return {"dataset_name": "parquet", "data_files": str(folder / "a.parquet")}


def write_tar(folder, labels):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as archive:
        for number, label in enumerate(labels):
            for name, data in ((f"{number:03d}.png", png(number)), (f"{number:03d}.cls", label.encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, BytesIO(data))
    return {"dataset_name": "webdataset", "data_files": str(folder / "a.tar")}


def labelled(arguments):
    return open_source(**arguments, labels_required=True)


@pytest.mark.parametrize("num_rows, limit", [*itertools.product((1, 7, 1999, 50_000), (1, 3, 1000, 1998, 20_000))])
def test_spread_rows_are_so_many_different_rows_from_all_over_the_split(num_rows, limit):
    limit = min(limit, num_rows)
    rows = spread_rows(num_rows, limit)
    assert len(rows) == limit and (np.diff(rows) > 0).all() and rows[0] == 0 and rows[-1] < num_rows
    # what is left out lies in equal gaps, behind the last row too
    gaps = np.diff(rows, append=num_rows) - 1
    assert gaps.max() <= -(-(num_rows - limit) // min(limit, 1000))


def test_a_part_of_a_source_has_the_rows_and_labels_of_the_whole(tmp_path):
    whole = labelled(write_texts(tmp_path / "a", [f"class {number % 3}" for number in range(40)]))
    rows = np.array([0, 1, 2, 9, 10, 39])
    part = PartOfSource(whole, rows=rows)
    for source in (part, copy.copy(part), pickle.loads(pickle.dumps(part))):
        assert source.read(0, 6) == [whole.encoded(row) for row in rows] and source.read(2, 2) == []
        assert list(map(bytes, source.read_views(2, 5))) == [whole.encoded(row) for row in (2, 9, 10)]
        assert source.labels(1, 6).tolist() == (rows[1:] % 3).tolist()
    assert len(part) == 6 and "6 of them, spread" in part.describe() and part.identity != whole.identity


@pytest.mark.parametrize("write", [write_folder, write_texts, write_tar])
def test_both_splits_number_a_class_by_its_name(tmp_path, write):
    train = labelled(write(tmp_path / "train", ["ant", "bee", "cat", "dog"]))
    test = number_as(train, labelled(write(tmp_path / "test", ["bee", "dog", "dog"])), "e")
    assert test.labels(0, 3).tolist() == [1, 3, 3]
    # a class that only the test split has comes after those of the train split, whatever its name
    test = number_as(train, labelled(write(tmp_path / "more", ["aardvark", "bee"])), "e")
    assert test.labels(0, 2).tolist() == [4, 1] and test.class_names[4] == "aardvark"


@pytest.mark.parametrize("classes", [["ant", "bee"], ["ant", "bee", "cat"]])
def test_a_split_whose_numbers_were_right_keeps_its_identity(tmp_path, classes):
    train = labelled(write_folder(tmp_path / "train", ["ant", "bee", "cat"]))
    test = labelled(write_folder(tmp_path / "test", classes))
    assert number_as(train, test, "e").identity == test.identity


def test_named_numbers_follow_the_names_where_two_files_list_them_in_another_order(tmp_path):
    train = labelled(write_numbers(tmp_path / "train", [0, 1, 2], ["ant", "bee", "cat"]))
    test = labelled(write_numbers(tmp_path / "test", [0, 1, -1], ["cat", "bee"]))
    assert number_as(train, test, "e").labels(0, 3).tolist() == [2, 1, -1]
    texts = labelled(write_texts(tmp_path / "texts", ["cat", "bee"]))
    assert number_as(train, texts, "e").labels(0, 2).tolist() == [2, 1]


def test_numbers_without_names_are_taken_as_they_are(tmp_path):
    named = labelled(write_numbers(tmp_path / "named", [0, 1], ["ant", "bee"]))
    bare = labelled(write_numbers(tmp_path / "bare", [1, 7]))
    for train, test in itertools.product((named, bare), repeat=2):
        assert number_as(train, test, "e").labels(0, 2).tolist() == test.labels(0, 2).tolist()


def test_numbers_in_one_split_and_texts_in_the_other_are_refused(tmp_path):
    texts = labelled(write_texts(tmp_path / "texts", ["ant", "bee"]))
    bare = labelled(write_numbers(tmp_path / "bare", [0, 1]))
    for train, test, found in ((texts, bare, "texts, those of test_split numbers"), (bare, texts, "numbers, those")):
        with pytest.raises(UserError, match=found):
            number_as(train, test, "e")


def test_a_number_beyond_the_named_classes_is_refused(tmp_path):
    train = labelled(write_numbers(tmp_path / "train", [0, 1], ["ant", "bee"]))
    test = labelled(write_numbers(tmp_path / "test", [0, 5], ["bee", "ant"]))
    with pytest.raises(UserError, match="label 5 has no name among the 2"):
        number_as(train, test, "e").labels(0, 2)


def test_warnings_name_the_classes_without_an_example_and_a_single_class():
    train, test = np.array([0, 0, 1]), np.array([0, 2, 2, 3])
    assert label_warnings(train, test, {2: "cat"}) == [
        "2 of the 3 classes of the test split have no image in the train split: 'cat', '3'. Their 3 test images (75%) "
        "count as wrong for every model"
    ]
    assert label_warnings(train, np.array([1, 1]), {1: "bee"}) == [
        "the test split has a single class, 'bee': its accuracy says nothing"
    ]
    assert label_warnings(train, np.array([0, 1]), {}) == []


def test_warnings_count_the_images_without_a_label():
    assert label_warnings(np.array([0, 1, -1]), np.array([-1, -1]), {}) == [
        "1 of the 3 images of the train split have no label: they are left out",
        "2 of the 2 images of the test split have no label: choose a split that has labels",
    ]


def make(tmp_path, data):
    """Stage 1 in this process."""
    configs = load_configs({"cache_dir": str(tmp_path / "cache"), "image_size": 4, "num_workers": 1} | data)
    made = jobs.open_jobs(configs.data, 1, 0)
    surveys = [survey_cache(job.plan, job.shards) for job in made]
    jobs.print_plan(made, surveys, configs.data)
    for job, survey in zip(made, surveys, strict=True):
        jobs.make_job(job, survey, configs.data, 8, StopFlag())
    return configs.data


def labels_of(folder):
    index = load_index(folder)
    return np.concatenate([load_labels(index, s) for s in range(len(index.shard_names))]).tolist()


def test_stage_1_spreads_a_cut_split_numbers_both_alike_and_stores_the_names(tmp_path, capsys):
    classes = ["ant", "bee", "cat", "dog"]
    train = write_folder(tmp_path / "e" / "train", [name for name in classes for _ in range(6)])
    write_folder(tmp_path / "e" / "test", ["bee", "bee", "dog", "eel"])
    whole = {"dataset_name": "imagefolder", "data_dir": str(tmp_path / "e")}
    data = make(tmp_path, train | {"eval_datasets": {"v": whole | {"max_train": 8}}})
    folder = tmp_path / "cache" / "eval" / "v"
    assert sorted(labels_of(folder / "train")) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert labels_of(folder / "test") == [1, 1, 3, 4]
    assert load_index(folder / "train").class_names == dict(enumerate(classes))
    assert load_index(folder / "test").class_names == {1: "bee", 3: "dog", 4: "eel"}
    warning = "1 of the 3 classes of the test split have no image in the train split: 'eel'."
    assert f"WARNING: {warning}" in capsys.readouterr().out
    eval_sets(data)
    assert f"WARNING: eval_datasets.v: {warning}" in capsys.readouterr().out


def test_a_cut_that_comes_after_a_cache_of_every_row_is_refused_by_name(tmp_path):
    train = write_folder(tmp_path / "train", [f"class {number // 10}" for number in range(40)])
    entry = {"dataset_name": "imagefolder", "data_dir": str(tmp_path)}
    write_folder(tmp_path / "test", ["class 0"])
    data = train | {"eval_datasets": {"e": entry}}
    make(tmp_path, data)
    with pytest.raises(UserError, match="e/train"):
        make(tmp_path, data | {"eval_datasets": {"e": entry | {"max_train": 20}}})


def test_a_cache_of_the_first_rows_and_one_numbered_apart_are_kept_or_refused_by_name(tmp_path, monkeypatch):
    train = write_folder(tmp_path / "e" / "train", ["ant"] * 5 + ["bee"] * 5)
    write_folder(tmp_path / "e" / "test", ["bee"])
    whole = {"dataset_name": "imagefolder", "data_dir": str(tmp_path / "e"), "max_train": 5}
    with monkeypatch.context() as before:  # as earlier versions made them
        before.setattr(jobs, "_rows_wanted", lambda part, source: source)
        before.setattr(jobs, "number_as", lambda train, test, where: test)
        make(tmp_path, train | {"eval_datasets": {"v": whole}})
    folder = tmp_path / "cache" / "eval" / "v"
    with pytest.raises(UserError, match=rf"numbered apart from those of the train split.*\(rm -r {folder / 'test'}\)"):
        make(tmp_path, train | {"eval_datasets": {"v": whole}})
    for path in (folder / "test").iterdir():
        path.unlink()
    make(tmp_path, train | {"eval_datasets": {"v": whole}})
    assert (labels_of(folder / "train"), labels_of(folder / "test")) == ([0] * 5, [1])


@pytest.mark.parametrize("given", [[0, 1, 2], ["a", "b", "c"]])
@pytest.mark.parametrize("kind", [pa.int64(), pa.string()])
def test_a_split_without_a_label_is_no_split_of_another_kind(tmp_path, given, kind):
    write = write_numbers if given == [0, 1, 2] else write_texts
    some = labelled(write(tmp_path / "some", given))
    none = labelled(write_numbers(tmp_path / "none", pa.array([None] * 3, kind)))
    assert number_as(some, none, "e").labels(0, 3).tolist() == [-1, -1, -1]
    assert number_as(none, some, "e").labels(0, 3).tolist() == [0, 1, 2]
