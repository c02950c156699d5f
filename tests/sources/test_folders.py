"""Image folders: zip archives, which files a split has, names with special characters, labels from metadata."""

import copy
import json
import pickle
import stat
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillery.sources.listing import split_of_name
from distillery.sources.registry import open_source
from distillery.system.errors import MissingFileError, UserError

IMAGES = [f"image {index}".encode() for index in range(6)]


def write(folder, files):
    """files: name -> number of an image, or text."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(IMAGES[content] if isinstance(content, int) else content.encode())
    return folder


def write_zip(path, members, mode="w"):
    """members: name as it shall stand there -> number of an image, text, or the target of a link in a tuple."""
    with zipfile.ZipFile(path, mode) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo("x")
            info.filename = name
            if isinstance(content, tuple):
                info.external_attr = (stat.S_IFLNK | 0o777) << 16
                content = content[0]
            archive.writestr(info, IMAGES[content] if isinstance(content, int) else content)
    return path


def open_folder(data_dir=None, **arguments):
    if data_dir is not None:
        arguments["data_dir"] = str(data_dir)
    return open_source(dataset_name="imagefolder", **arguments)


def rows(source):
    return [IMAGES.index(image) for image in source.read(0, len(source))]


def labelled(source):
    labels = source.labels(0, len(source)).tolist()
    names = source.class_names
    return list(zip(rows(source), labels if names is None else [names[label] for label in labels], strict=True))


# zip archives


def test_backslashes_in_a_zip_separate_folders(tmp_path):
    members = {"t\\b\\0.png": 0, "t\\a\\1.png": 1, "t/a\\2.png": 2, "t\\a\\": "", "t\\.h\\3.png": 3, "t\\a\\.4.png": 4,
               "__MACOSX\\5.png": 5, "t\\a\\x.txt": ""}  # fmt: skip
    source = open_folder(data_files=str(write_zip(tmp_path / "a.zip", members)), labels_required=True)
    assert labelled(source) == [(0, "b"), (1, "a"), (2, "a")]
    assert source.describe().endswith(", 1 other files left out")


def test_classes_that_backslashes_decide_have_an_identity_of_their_own(tmp_path):
    path = str(write_zip(tmp_path / "a.zip", {"x/a\\0.png": 0}))
    assert "separators" in open_folder(data_files=path, labels_required=True).identity
    assert "separators" not in open_folder(data_files=path).identity
    path = str(write_zip(tmp_path / "b.zip", {"x/a/0.png": 0}))
    assert "separators" not in open_folder(data_files=path, labels_required=True).identity


def test_names_with_dots_and_absolute_names_in_a_zip_are_no_hidden_files(tmp_path):
    members = {"./b/0.png": 0, "../a/1.png": 1, "/c/2.png": 2, "C:\\d\\3.png": 3, "e//4.png": 4}
    source = open_folder(data_files=str(write_zip(tmp_path / "a.zip", members)), labels_required=True)
    assert labelled(source) == list(enumerate("bacde"))


def test_links_in_a_zip_are_the_images_they_lead_to_and_others_are_counted(tmp_path):
    members = {"a/0.png": 0, "b/1.png": ("../a/0.png",), "b/2.png": ("1.png",), "b/3.png": ("/x/3.png",)}
    source = open_folder(data_files=str(write_zip(tmp_path / "a.zip", members)), labels_required=True)
    assert labelled(source) == [(0, "a"), (0, "b"), (0, "b")]
    assert source.describe().endswith(", 1 links left out")


def test_a_zip_before_another_in_one_file_is_counted(tmp_path):
    first = write_zip(tmp_path / "a.zip", {"a/0.png": 0}).read_bytes()
    second = write_zip(tmp_path / "b.zip", {"a/1.png": 1}).read_bytes()
    path = tmp_path / "c.zip"
    path.write_bytes(first + second)
    source = open_folder(data_files=str(path))
    assert rows(source) == [1]
    assert source.describe().endswith(f", {len(first)} bytes of another archive before it left out")
    path.write_bytes(b"#!/bin/sh\n" + second)
    assert rows(open_folder(data_files=str(path))) == [1]


def test_zips_with_64_bit_sizes_and_sizes_behind_the_data_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive, archive.open("a/0.png", "w", force_zip64=True) as file:
        file.write(IMAGES[0])

    class Stream:
        def __init__(self, file):
            self.write, self.flush = file.write, file.flush

    with open(tmp_path / "b.zip", "wb") as file, zipfile.ZipFile(Stream(file), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", IMAGES[1])
        archive.writestr("a/2.png", IMAGES[2])
    assert rows(open_folder(tmp_path)) == [0, 1, 2]


# splits


@pytest.mark.parametrize(
    "name, split",
    [
        ("train2017/1.jpg", "train"),
        ("val2017.zip", "validation"),
        ("val_images/1.jpg", "validation"),
        ("test-2/1.jpg", "test"),
        ("training set/cat/1.jpg", "train"),
        ("images/train/cat/1.jpg", "train"),
        ("a/b/Dev/1.jpg", "validation"),
        ("train/test/1.jpg", "train"),
        ("train/dev/val.zip", "train"),
        ("trainval/1.jpg", None),
        ("strain/val.jpg", None),
        ("\u00e9val/1.jpg", None),
        ("train_test/1.jpg", "train"),
    ],
)
def test_the_outermost_folder_with_a_word_of_a_split_decides(name, split):
    assert split_of_name(name, "train") == split


def test_a_name_that_speaks_of_two_splits_is_of_the_one_that_is_wanted():
    assert split_of_name("train_test/1.jpg", "test") == "test"
    assert split_of_name("my-Part/1.jpg", "my-Part") == "my-Part"


def test_folders_and_archives_of_a_split_are_told_by_words_in_their_names(tmp_path):
    write(tmp_path, {"train2017/a/0.png": 0, "val2017/a/1.png": 1, "more/train/b/2.png": 2, "other/3.png": 3})
    write_zip(tmp_path / "train-extra.zip", {"c/4.png": 4})
    source = open_folder(tmp_path, labels_required=True)
    assert labelled(source) == [(2, "b"), (4, "c"), (0, "a")]
    assert source.describe().endswith(", 1 files of no split left out")
    assert rows(open_folder(tmp_path, split="val")) == [1]


def test_classes_named_like_splits_inside_a_split_stay_classes(tmp_path):
    write(tmp_path, {"train/test/0.png": 0, "train/dev/1.png": 1, "val/test/2.png": 2})
    assert labelled(open_folder(tmp_path, labels_required=True)) == [(1, "dev"), (0, "test")]
    write(tmp_path / "b", {"train2017/test/0.png": 0, "train2017/train/1.png": 1, "val2017/test/2.png": 2})
    assert labelled(open_folder(tmp_path / "b", labels_required=True)) == [(0, "test"), (1, "train")]


def test_the_folder_of_a_split_is_no_class(tmp_path):
    write(tmp_path, {"train2017/0.png": 0, "val2017/1.png": 1})
    with pytest.raises(UserError, match="labels need FOLDER/CLASS/IMAGE; .*train2017/0.png is in no class folder"):
        open_folder(tmp_path, labels_required=True)


def test_a_class_that_is_taken_for_a_split_is_named_with_the_way_out(tmp_path):
    write(tmp_path, {"cat/0.png": 0, "test tube/1.png": 1})
    with pytest.raises(UserError, match=r"by names like test tube/1.png; .* write data_files: \{train: .*\}\); it has"):
        open_folder(tmp_path)
    source = open_folder(data_files={"train": str(tmp_path)}, labels_required=True)
    assert labelled(source) == [(0, "cat"), (1, "test tube")]


def test_the_folder_of_a_split_keeps_its_identity_beside_other_splits(tmp_path):
    write(tmp_path, {"train/a/0.png": 0, "train/b/1.png": 1})
    before = open_folder(tmp_path, labels_required=True).identity
    write(tmp_path, {"val2017/a/2.png": 2, "notes.txt": "", "train/metadata.csv": "file_name,text\na/0.png,x\n"})
    source = open_folder(tmp_path, label_column="label")
    assert source.identity == before == open_folder(tmp_path / "train", labels_required=True).identity
    assert open_folder(tmp_path).identity == {**before, "label_column": None}


# names with special characters


@pytest.mark.parametrize("folder", ["x[set1]", "x{a,b}", "x{0..1}", "w*", "q?"])
def test_a_folder_that_exists_is_no_pattern(tmp_path, folder):
    write(tmp_path, {f"{folder}/c/0.png": 0, f"{folder}/c/1.png": 1})
    for name in ("xs", "xa", "x0", "wide", "qu"):
        write(tmp_path, {f"{name}/c/5.png": 5})
    for pattern in ("", "/**", "/*/*.png", "/c/*.png", "/c/[01].png", "/c/{0,1}.png", "/c/{0..1}.png"):
        assert rows(open_folder(data_files=f"{tmp_path}/{folder}{pattern}")) == [0, 1]
    assert rows(open_folder(tmp_path / folder, data_files="c/*.png")) == [0, 1]
    assert rows(open_folder(tmp_path / folder)) == [0, 1]


def test_a_file_that_exists_is_no_pattern_and_patterns_that_match_nothing_say_how_to_write_brackets(tmp_path):
    write(tmp_path, {"a/[1].png": 0, "a/1.png": 1, "a/x[1]/2.png": 2})
    assert rows(open_folder(data_files=f"{tmp_path}/a/[1].png")) == [0]
    assert rows(open_folder(data_files=f"{tmp_path}/a/[12].png")) == [1]
    with pytest.raises(MissingFileError, match=r"no file matches the pattern .*\. A \[ that is .* written \[\[\]"):
        open_folder(data_files=f"{tmp_path}/*/x[1]/*.png")
    assert rows(open_folder(data_files=f"{tmp_path}/*/x[[]1]/*.png")) == [2]


def test_a_data_set_folder_that_load_dataset_takes_for_a_pattern_is_refused(tmp_path):
    write(tmp_path, {"x[set1]/0.png": 0, "xs/1.png": 1})
    with pytest.raises(
        UserError, match="takes .* for a pattern. Rename the folder, or write dataset_name: KIND and data"
    ):
        open_source(dataset_name=str(tmp_path / "x[set1]"))


# labels from metadata


def write_metadata(path, columns):
    """columns: name -> values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("\n\n".join(json.dumps(row) for row in table.to_pylist()))
    else:
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in table.to_pylist()]
        path.write_text("\ufeff" + "\r\n".join([",".join(columns), *lines]) + "\r\n")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_gives_the_rows_their_order_and_their_labels(tmp_path, suffix):
    write(tmp_path, {f"a/{index}.png": index for index in range(5)})
    columns = {"file_name": ["a/3.png", "a\\0.png", "a/1.png", "a/3.png"], "species": ["owl", None, "ant", "owl"]}
    write_metadata(tmp_path / f"metadata.{suffix}", {**columns, "label": [7, 5, None, 7]})
    source = open_folder(tmp_path, labels_required=True)
    assert rows(source) == [3, 0, 1, 3] and source.labels(0, 4).tolist() == [7, 5, -1, 7]
    assert source.describe().endswith("split 'train', 2 images that no metadata file lists left out")
    source = open_folder(tmp_path, label_column="species")
    assert (source.labels(0, 4).tolist(), source.class_names) == ([1, -1, 0, 1], ["ant", "owl"])
    for other in (pickle.loads(pickle.dumps(source)), copy.copy(source)):
        assert rows(other) == [3, 0, 1, 3] and other.identity == source.identity


def test_a_text_of_json_lines_may_hold_unicodes_ends_of_lines(tmp_path):
    write(tmp_path, {"a/0.png": 0, "a/1.png": 1})
    names = ["two\u2028lines", "next\u0085line"]
    lines = [json.dumps({"file_name": f"a/{k}.png", "label": names[k]}, ensure_ascii=False) for k in range(2)]
    (tmp_path / "metadata.jsonl").write_bytes("".join(f"{line}\r\n" for line in lines).encode())
    assert open_folder(tmp_path, labels_required=True).class_names == sorted(names)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_metadata_reads_as_load_dataset_reads_it(tmp_path, suffix):
    datasets = pytest.importorskip("datasets")
    write(tmp_path / "data", {f"{split}/{k}.png": k for k, split in enumerate(("train", "train", "test"))})
    write_metadata(tmp_path / f"data/train/metadata.{suffix}", {"file_name": ["1.png", "0.png"], "label": [4, 2]})
    write_metadata(tmp_path / f"data/test/metadata.{suffix}", {"file_name": ["2.png"], "label": [9]})
    for split in ("train", "test"):
        source = open_folder(tmp_path / "data", label_column="label", split=split)
        table = datasets.load_dataset(
            "imagefolder", data_dir=str(tmp_path / "data"), split=split, cache_dir=str(tmp_path / "cache")
        ).cast_column("image", datasets.Image(decode=False))
        paths = [cell["path"] for cell in table["image"]]
        expected = [int(path[-5]) for path in paths]
        assert labelled(source) == list(zip(expected, table["label"], strict=True))


def test_without_labels_metadata_changes_no_row_and_no_fingerprint(tmp_path):
    write(tmp_path, {"a/0.png": 0, "a/1.png": 1})
    before = open_folder(tmp_path).identity
    write(tmp_path, {"metadata.csv": "file_name,label\na/1.png,5\n"})
    source = open_folder(tmp_path)
    assert source.identity == before and source.describe().endswith(", 1 other files left out")
    identity = open_folder(tmp_path, label_column="label").identity
    write(tmp_path, {"metadata.csv": "file_name,label\na/1.png,6\n"})
    assert open_folder(tmp_path, label_column="label").identity != identity


def test_metadata_without_labels_leaves_the_folders_to_be_classes_and_is_counted(tmp_path):
    write(tmp_path, {"a/0.png": 0, "b/1.png": 1, "metadata.csv": "file_name,text\na/0.png,hello\n"})
    for arguments in ({"labels_required": True}, {"label_column": "label"}):
        source = open_folder(tmp_path, **arguments)
        assert labelled(source) == [(0, "a"), (1, "b")]
        assert source.describe().endswith(", 1 metadata files (without the columns file_name and label) left out")
    with pytest.raises(UserError, match="no label_column 'texts'. The columns are: file_name, text. For the names of"):
        open_folder(tmp_path, label_column="texts")


def test_metadata_in_an_archive_is_read(tmp_path):
    members = {"i/0.png": 0, "i\\1.png": 1, "metadata.csv": "file_name,label\ni/1.png,4\ni/0.png,2\n"}
    write_zip(tmp_path / "a.zip", members)
    source = open_folder(tmp_path, labels_required=True)
    assert labelled(source) == [(1, 4), (0, 2)] and "left out" not in source.describe()
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1  # the flag of an encrypted member
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(UserError, match="a.zip: metadata.csv cannot be read: .*encrypted"):
        open_folder(tmp_path, labels_required=True)


def test_metadata_beside_the_splits_is_for_all_that_have_none_of_their_own(tmp_path):
    text = "file_name,label\ntrain/0.png,3\nval2017/1.png,4\n"
    write(tmp_path, {"train/0.png": 0, "val2017/1.png": 1, "metadata.csv": text})
    assert labelled(open_folder(tmp_path, label_column="label")) == [(0, 3)]
    source = open_folder(tmp_path, label_column="label", split="validation")
    assert labelled(source) == [(1, 4)] and ", 1 listed files of another split or kind" in source.describe()
    write(tmp_path, {"train/metadata.csv": "file_name,label\n0.png,8\n", "val2017/metadata.csv": text[:16] + "1.png,9"})
    assert labelled(open_folder(tmp_path, label_column="label")) == [(0, 8)]
    assert labelled(open_folder(tmp_path, label_column="label", split="validation")) == [(1, 9)]


def test_of_several_image_columns_one_is_chosen(tmp_path):
    text = "image_file_name,mask_file_name,label\n0.png,1.png,3\n"
    write(tmp_path, {"0.png": 0, "1.png": 1, "metadata.csv": text})
    assert labelled(open_folder(tmp_path, label_column="label")) == [(0, 3)]
    assert labelled(open_folder(tmp_path, label_column="label", image_column="mask")) == [(1, 3)]
    with pytest.raises(UserError, match="image_column is 'left'; an image folder has only 'image'"):
        open_folder(tmp_path, image_column="left")


@pytest.mark.parametrize(
    "text, message",
    [
        ("file_name,label\n9.png,1\n", "metadata.csv lists '9.png', and there is no such image below"),
        ("file_name,label\n../0.png,1\n", "file_name '../0.png' is no path below the folder of that file"),
        ("file_name,label\n/0.png,1\n", "file_name '/0.png' is no path below"),
        ("file_name;label\n0.png;1\n", "there is no column 'file_name'. The columns are: file_name;label"),
        ("id,label\n0.png,1\n", "there is no column 'file_name'. The columns are: id, label"),
        ("file_name,label\n", "metadata.csv lists no image of this split"),
        ("file_name,label\n0.png,1,2\n", "metadata.csv cannot be read: .*Expected 2 columns, got 3"),
        ("", "metadata.csv cannot be read: Empty CSV file"),
        ("file_name,label\n0.png,0.5\n", "labels must be all integers or all texts; found float"),
        ("file_name,label\n0.png,\n", "no row has a label in the column 'label'"),
        ("file_name,label,label\n0.png,1,2\n", "the column 'label' is there twice"),
    ],
)
def test_metadata_that_cannot_be_used_is_an_error(tmp_path, text, message):
    write(tmp_path, {"0.png": 0, "metadata.csv": text})
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path, label_column="label")


def test_metadata_files_that_do_not_agree_are_an_error(tmp_path):
    write(tmp_path, {"a/0.png": 0, "a/metadata.csv": "file_name,label\n0.png,1\n", "b/1.png": 1})
    write(tmp_path, {"b/metadata.csv": "file_name,cls\n1.png,1\n"})
    with pytest.raises(
        UserError, match="b/metadata.csv has the columns file_name, cls; .*a/metadata.csv has file_name, l"
    ):
        open_folder(tmp_path, label_column="label")
    write(tmp_path, {"a/metadata.jsonl": "[1]"})
    with pytest.raises(UserError, match="a has several metadata files"):
        open_folder(tmp_path, label_column="label")
    write(tmp_path / "c", {"0.png": 0, "metadata.jsonl": "[1]"})
    with pytest.raises(UserError, match="metadata.jsonl cannot be read: line 1 is no object"):
        open_folder(tmp_path / "c", label_column="label")
