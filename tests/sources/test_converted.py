"""csv and json files, which load_dataset converts: their paths begin in their own folder."""

import gzip
import json

import pytest

from distillery.sources.converted import _failure
from distillery.sources.registry import open_source
from distillery.system.errors import MissingFileError, RunError, UserError
from tests.sources.test_registry import IMAGES

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", str(tmp_path / "cache/downloads"))
    monkeypatch.setattr(datasets.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def put_csv(path, rows, column="image", separator=","):
    lines = [separator.join((column, "label")), *(separator.join(map(str, row)) for row in rows)]
    return put(path, "\n".join(lines) + "\n")


def put_images(folder, rows):
    for row in rows:
        put(folder / f"imgs/{row}.jpg", IMAGES[row])
    return [(f"imgs/{row}.jpg", row) for row in rows]


def read_all(**arguments):
    source = open_source(**arguments)
    return source.read(0, len(source))


def test_paths_in_a_csv_begin_in_its_own_folder_however_it_is_named(tmp_path, monkeypatch):
    put_csv(tmp_path / "x/train.csv", put_images(tmp_path / "x", range(3)))
    monkeypatch.chdir(tmp_path / "x")
    for arguments in [
        {"dataset_name": str(tmp_path / "x")},
        {"dataset_name": "./"},
        {"dataset_name": str(tmp_path / "x"), "data_files": "train.csv"},
        {"dataset_name": "csv", "data_files": str(tmp_path / "x/*.csv")},
        {"dataset_name": "csv", "data_files": "train.csv"},
        {"dataset_name": "csv", "data_dir": str(tmp_path / "x")},
    ]:
        assert read_all(**arguments, image_column="image") == IMAGES[:3], arguments


def test_home_and_variables_are_expanded(tmp_path, monkeypatch):
    put_csv(tmp_path / "x/train.csv", put_images(tmp_path / "x", range(2)))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "x")
    for arguments in [
        {"dataset_name": "csv", "data_files": "~/$WHERE/*.csv"},
        {"dataset_name": "csv", "data_files": {"train": ["~/x/train.csv"]}},
        {"dataset_name": "csv", "data_dir": "~/$WHERE"},
        {"dataset_name": "~", "data_dir": "$WHERE"},
        {"dataset_name": "~", "data_files": "${WHERE}/train.csv"},
    ]:
        assert read_all(**arguments, image_column="image") == IMAGES[:2], arguments
    with pytest.raises(UserError, match=r"the environment variable \$NOWHERE is not set"):
        read_all(dataset_name="csv", data_files="$NOWHERE/train.csv")


def test_files_of_several_folders_keep_their_order_and_each_its_folder(tmp_path):
    first = put_csv(tmp_path / "x/a[1]/train.csv", put_images(tmp_path / "x/a[1]", [0, 1]), "file_name")
    second = put_csv(tmp_path / "x/b/train.csv", put_images(tmp_path / "x/b", [5, 6]), "file_name")
    assert read_all(dataset_name=str(tmp_path / "x")) == [*IMAGES[:2], *IMAGES[5:7]]
    data_files = [str(second), str(first).replace("[", "[[]")]
    source = open_source(dataset_name="csv", data_files=data_files, label_column="label")
    assert source.read(0, 4) == [*IMAGES[5:7], *IMAGES[:2]] and source.labels(0, 4).tolist() == [5, 6, 0, 1]
    splits = {"train": data_files[0], "test": data_files[1]}
    assert read_all(dataset_name="csv", data_files=splits, split="test") == IMAGES[:2]


def test_what_a_card_says_holds_for_files_of_several_folders(tmp_path):
    card = "---\nconfigs:\n- config_name: one\n  data_files: '*/table.csv'\n  sep: ';'\n---\n"
    put(tmp_path / "x/README.md", card)
    for row, folder in enumerate("ab"):
        put_csv(tmp_path / f"x/{folder}/table.csv", put_images(tmp_path / f"x/{folder}", [row]), separator=";")
    assert read_all(dataset_name=str(tmp_path / "x"), dataset_config="one") == IMAGES[:2]


def test_absolute_paths_stay_and_missing_cells_are_missing_images(tmp_path):
    put_images(tmp_path / "far", [0])
    put_images(tmp_path / "x", [1])
    put_csv(tmp_path / "x/train.csv", [(tmp_path / "far/imgs/0.jpg", 0), ("", 1), ("../x/imgs/1.jpg", 2)])
    assert read_all(dataset_name=str(tmp_path / "x")) == [IMAGES[0], b"", IMAGES[1]]


def test_json_structs_lists_tables_of_tabs_and_packed_files_are_read_alike(tmp_path):
    rows = put_images(tmp_path, range(2))
    structs = [json.dumps({"image": {"bytes": None, "path": f"../{path}"}}) for path, _ in rows]
    put(tmp_path / "structs/train.jsonl", "\n".join(structs))
    put(tmp_path / "lists/train.json", json.dumps([{"images": [f"../{path}"]} for path, _ in rows]))
    table = put_csv(tmp_path / "tabs/train.tsv", [(f"../{path}", row) for path, row in rows], separator="\t")
    put(tmp_path / "packed/train.csv.gz", gzip.compress(table.read_bytes().replace(b"\t", b",")))
    for folder in ("structs", "lists", "tabs", "packed"):
        assert read_all(dataset_name=str(tmp_path / folder)) == IMAGES[:2], folder


def test_the_identity_follows_the_contents_of_the_files_and_not_their_place(tmp_path):
    rows = put_images(tmp_path / "x", range(3))
    path = put_csv(tmp_path / "x/train.csv", rows)
    by_name, by_folder = {"dataset_name": "csv", "data_files": str(path)}, {"dataset_name": str(tmp_path / "x")}
    before = [open_source(**arguments).identity for arguments in (by_name, by_folder)]
    put_csv(path, rows[::-1])
    after = [open_source(**arguments).identity for arguments in (by_name, by_folder)]
    assert before[0] != after[0] and before[1] != after[1]
    put_csv(path, rows)
    (tmp_path / "x").rename(tmp_path / "y")
    by_name["data_files"], by_folder["dataset_name"] = str(tmp_path / "y/train.csv"), str(tmp_path / "y")
    assert [open_source(**arguments).identity for arguments in (by_name, by_folder)] == before
    assert str(tmp_path) not in json.dumps(before)


def test_the_identity_of_a_csv_of_absolute_paths_follows_the_csv_and_no_library(tmp_path):
    put_images(tmp_path, [0, 1])
    for folder in "ab":
        put_csv(tmp_path / folder / "train.csv", [(tmp_path / "imgs/0.jpg", 0)])
    arguments = {"dataset_name": "csv", "data_files": str(tmp_path / "*/*.csv"), "image_column": "image"}
    before = open_source(**arguments).identity
    assert before["files"]["count"] == 2 and "revision" not in before
    put_csv(tmp_path / "b/train.csv", [(tmp_path / "imgs/1.jpg", 0)])
    assert open_source(**arguments).identity["files"] != before["files"]


def test_a_folder_reached_by_a_link_is_the_folder_itself(tmp_path):
    put_csv(tmp_path / "x/deep/train.csv", put_images(tmp_path / "x/deep", range(2)), "file_name")
    put_images(tmp_path / "pictures/train", range(2))
    put_csv(tmp_path / "pictures/train/metadata.csv", [("imgs/1.jpg", 5), ("imgs/0.jpg", 6)], "file_name")
    for name in ("x", "pictures"):
        (tmp_path / f"link to {name}").symlink_to(tmp_path / name)
        places = [tmp_path / name, tmp_path / f"link to {name}"]
        there, by_link = (open_source(dataset_name=str(place), label_column="label") for place in places)
        assert by_link.identity == there.identity and by_link.read(0, 2) == there.read(0, 2)

    # a file that is named below the link is no other either
    linked = str(tmp_path / "link to x")
    by_name = open_source(dataset_name=linked, data_files=f"{linked}/deep/train.csv").identity
    assert by_name == open_source(dataset_name=linked).identity


@pytest.mark.parametrize("cell, message", [
    ("imgs/9.jpg", r"train\.csv, row 0: no bytes .* 'imgs/9.jpg', and there is no file '/.*/x/imgs/9.jpg'"),
    ("https://example.org/a.jpg", r"train\.csv, row 0: .* is an address; images must be local"),
])  # fmt: skip
def test_a_cell_that_names_no_local_file_is_refused_with_csv_and_row(tmp_path, cell, message):
    put_csv(tmp_path / "x/train.csv", [(cell, 0)])
    with pytest.raises(UserError, match=message):
        read_all(dataset_name=str(tmp_path / "x"), image_column="image")


def test_addresses_are_not_taken_for_images(tmp_path):
    put_csv(tmp_path / "x/train.csv", [("https://example.org/a.jpg", 0)], "url")
    with pytest.raises(UserError, match="train.csv: no column holds images. 'url' holds addresses: images must be lo"):
        open_source(dataset_name=str(tmp_path / "x"))


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n1,2,3,4\n", "could not prepare .*: .*Expected 2 fields in line 3, saw 4"),
        ("", "could not prepare .*: No columns to parse from file"),
        ("image,label\n", "split 'train' holds no rows"),
        ("image,label\n1,2\n", r"train\.csv: no column holds images. image_column must be one of: image \(int64\)"),
    ],
)
def test_a_csv_that_cannot_be_used_is_refused_with_the_reason(tmp_path, text, message):
    put(tmp_path / "x/train.csv", text)
    with pytest.raises(UserError, match=message) as caught:
        open_source(dataset_name=str(tmp_path / "x"))
    assert len(str(caught.value)) < 700


def test_a_full_disk_or_a_network_is_not_taken_for_a_bad_file():
    full = RuntimeError("generating failed")
    full.__cause__ = OSError(28, "No space left on device")
    assert isinstance(_failure("x", full, is_remote=False), RunError)
    assert isinstance(_failure("x", ValueError("reset"), is_remote=True), RunError)
    assert isinstance(_failure("x", ValueError("bad"), is_remote=False), UserError)


def test_names_of_formats_and_files_are_answered_with_what_to_type(tmp_path):
    path = put_csv(tmp_path / "x/train.csv", [("a.jpg", 0)])
    with pytest.raises(UserError, match=rf"is a file. Write dataset_name: {path.parent} and data_files: train.csv"):
        open_source(dataset_name=str(path))
    with pytest.raises(UserError, match="dataset_name: csv needs data_files"):
        open_source(dataset_name="csv")
    with pytest.raises(UserError, match="csv cannot be loaded: .*none.csv"):
        open_source(dataset_name="csv", data_files=str(tmp_path / "none.csv"))
    with pytest.raises(MissingFileError, match="there is no such folder"):
        open_source(dataset_name=str(tmp_path / "none.csv"))


def test_a_csv_that_is_here_is_read_also_where_nothing_may_be_downloaded(tmp_path):
    path = put_csv(tmp_path / "x/train.csv", put_images(tmp_path / "x", range(2)))
    assert read_all(dataset_name="csv", data_files=str(path), download=False) == IMAGES[:2]


def test_a_table_that_an_image_folder_leaves_unread_is_named(tmp_path, capsys):
    put_csv(tmp_path / "x/data.csv", put_images(tmp_path / "x", range(3))[::-1])
    assert read_all(dataset_name=str(tmp_path / "x")) == IMAGES[:3]
    assert "x is read as an image folder, without data.csv; to read the table, write data_files: data.csv" in (
        capsys.readouterr().err
    )
    assert read_all(dataset_name=str(tmp_path / "x"), data_files="data.csv") == IMAGES[2::-1]
    assert "image folder" not in capsys.readouterr().err
