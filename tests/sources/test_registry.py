import copy
import io
import json
import os
import pickle
import random
import shutil
import tarfile
import zipfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from distillery.sources import archives, tables
from distillery.sources import tar as tar_module
from distillery.sources.listing import expand_braces, scan_folder, split_of_name
from distillery.sources.registry import open_source
from distillery.system.errors import MissingFileError, RunError, UserError

CLASSES = ["cat", "dog", "eel"]
NUM_IMAGES = 23
LABELS = [index * 3 // NUM_IMAGES for index in range(NUM_IMAGES)]


def encode(seed, format="JPEG"):
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


IMAGES = [encode(seed) for seed in range(NUM_IMAGES)]
NAMES = [f"{CLASSES[label]}/{index:03d}.jpg" for index, label in enumerate(LABELS)]


def hf_schema(image_type=None):
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": CLASSES},
        "id": {"_type": "Value"},
    }
    image_type = image_type or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.int32()), ("image", image_type), ("label", pa.int64())])
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def table(start=0, stop=NUM_IMAGES):
    rows = range(start, stop)
    columns = {
        "id": [row for row in rows],
        "image": [{"bytes": IMAGES[row], "path": f"{row}.jpg"} for row in rows],
        "label": [LABELS[row] for row in rows],
    }
    return pa.table(columns, schema=hf_schema())


def write_parquet(folder, cuts=(0, 7, 8, NUM_IMAGES), group=3):
    folder.mkdir(parents=True, exist_ok=True)
    for number, (start, stop) in enumerate(zip(cuts, cuts[1:], strict=False)):
        pq.write_table(table(start, stop), folder / f"train-{number:05d}.parquet", row_group_size=group)
    return folder


def write_arrow(path, opener, start, stop, batch=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(str(path), hf_schema()) as writer:
        writer.write_table(table(start, stop), max_chunksize=batch)


def write_folder(folder, names=NAMES, images=IMAGES):
    for name, data in zip(names, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def write_zip(path, compression=zipfile.ZIP_STORED, names=NAMES, images=IMAGES):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in zip(names, images, strict=True):
            archive.writestr(name, data)
    return path


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(start=0, stop=NUM_IMAGES):
    for row in range(start, stop):
        yield f"{row:06d}.jpg", IMAGES[row]
        yield f"{row:06d}.cls", str(LABELS[row]).encode()


def make_parquet(tmp_path):
    return {"dataset_name": "parquet", "data_files": str(write_parquet(tmp_path) / "*.parquet")}


def make_parquet_one_group(tmp_path):
    pq.write_table(table(), tmp_path / "all.parquet")
    return {"dataset_name": "parquet", "data_files": [str(tmp_path / "all.parquet")]}


def make_arrow_stream(tmp_path):
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_stream, 0, 11)
    write_arrow(tmp_path / "b.arrow", pa.ipc.new_stream, 11, NUM_IMAGES)
    return {"dataset_name": "arrow", "data_dir": str(tmp_path)}


def make_arrow_file(tmp_path):
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_file, 0, 5)
    write_arrow(tmp_path / "b.arrow", pa.ipc.new_file, 5, NUM_IMAGES)
    return {"dataset_name": "arrow", "data_dir": str(tmp_path)}


def make_imagefolder(tmp_path):
    return {"dataset_name": "imagefolder", "data_dir": str(write_folder(tmp_path))}


def make_zip_stored(tmp_path):
    return {"dataset_name": "imagefolder", "data_files": str(write_zip(tmp_path / "images.zip"))}


def make_zip_deflated(tmp_path):
    for number, cut in enumerate([slice(0, 9), slice(9, None)]):
        write_zip(tmp_path / f"part{number}.zip", zipfile.ZIP_DEFLATED, NAMES[cut], IMAGES[cut])
    return {"dataset_name": "imagefolder", "data_dir": str(tmp_path)}


def make_webdataset(tmp_path):
    write_tar(tmp_path / "set-000.tar", samples(0, 10))
    write_tar(tmp_path / "set-001.tar", samples(10, NUM_IMAGES))
    return {"dataset_name": "webdataset", "data_files": str(tmp_path / "set-{000..001}.tar")}


MAKERS = {name.removeprefix("make_"): maker for name, maker in sorted(globals().items()) if name.startswith("make_")}


@pytest.fixture(params=sorted(MAKERS))
def arguments(request, tmp_path):
    (tmp_path / "data").mkdir()
    return MAKERS[request.param](tmp_path / "data")


def test_every_kind_gives_the_same_images_and_labels(arguments):
    source = open_source(**arguments, labels_required=True)
    assert len(source) == NUM_IMAGES
    assert source.read(0, NUM_IMAGES) == IMAGES
    labels = source.labels(0, NUM_IMAGES)
    assert labels.dtype == np.int64 and labels.tolist() == LABELS
    assert source.class_names in (CLASSES, None)
    assert f"{NUM_IMAGES} images" in source.describe() and "\n" not in source.describe()


def test_reads_of_any_range_in_any_order_equal_the_whole(arguments, monkeypatch):
    monkeypatch.setattr(tables, "_WINDOW_BYTES", 2000)
    source = open_source(**arguments)
    rng = random.Random(0)
    for _ in range(60):
        start = rng.randrange(NUM_IMAGES + 1)
        stop = rng.randrange(start, NUM_IMAGES + 1)
        assert source.read(start, stop) == IMAGES[start:stop]
        assert source.read_views(start, stop) == IMAGES[start:stop]
        index = rng.randrange(NUM_IMAGES)
        assert source.encoded(index) == IMAGES[index]


@pytest.mark.parametrize("start, stop", [(-1, 3), (4, 3), (0, NUM_IMAGES + 1)])
def test_rows_outside_the_source_are_an_index_error(tmp_path, start, stop):
    with pytest.raises(IndexError, match=f"of a source of {NUM_IMAGES}"):
        open_source(**make_imagefolder(tmp_path)).read(start, stop)
    with pytest.raises(IndexError, match=f"of a source of {NUM_IMAGES}"):
        open_source(**make_imagefolder(tmp_path)).read_views(start, stop)


def test_views_stay_what_they_were_while_other_rows_are_read(arguments, monkeypatch):
    monkeypatch.setattr(tables, "_WINDOW_BYTES", 2000)
    source = open_source(**arguments)
    views = [source.read_views(start, start + 2) for start in range(0, NUM_IMAGES - 1, 2)]
    source.read(0, NUM_IMAGES)
    assert [bytes(view) for pair in views for view in pair] == IMAGES[: 2 * len(views)]


def test_a_source_pickles_and_copies_before_and_after_use(arguments):
    source = open_source(**arguments, labels_required=True)
    before = pickle.loads(pickle.dumps(source))
    source.read(3, 9)
    source.labels(0, 3)
    for other in (before, pickle.loads(pickle.dumps(source)), copy.copy(source)):
        assert other.read(0, NUM_IMAGES) == IMAGES
        assert other.labels(2, 5).tolist() == LABELS[2:5]
        assert other.identity == source.identity
    assert source.read(0, NUM_IMAGES) == IMAGES


def test_a_forked_process_and_its_parent_read_independently(arguments):
    source = open_source(**arguments)
    source.read(0, 5)
    child = os.fork()
    if child == 0:
        os._exit(0 if source.read(2, NUM_IMAGES) == IMAGES[2:] else 1)
    assert source.read(5, NUM_IMAGES) == IMAGES[5:]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_no_labels_unless_asked_for(arguments):
    source = open_source(**arguments)
    assert source.labels(0, 3) is None
    assert source.identity["label_column"] is None


def test_the_identity_is_json_without_paths_and_survives_a_move(arguments, tmp_path):
    identity = open_source(**arguments).identity
    assert json.loads(json.dumps(identity, allow_nan=False)) == identity
    assert str(tmp_path) not in json.dumps(identity)
    moved = json.loads(json.dumps(arguments).replace(f"{tmp_path}/data", f"{tmp_path}/else/where"))
    (tmp_path / "else").mkdir()
    shutil.move(tmp_path / "data", tmp_path / "else/where")
    for path in (tmp_path / "else").rglob("*"):
        os.utime(path, (1, 1))
    assert open_source(**moved).identity == identity


def test_labels_change_the_identity(arguments):
    assert open_source(**arguments, labels_required=True).identity != open_source(**arguments).identity


@pytest.mark.parametrize("make", [make_arrow_stream, make_arrow_file])
def test_an_arrow_file_cut_anywhere_is_named(tmp_path, make):
    make(tmp_path)
    path, data = tmp_path / "b.arrow", (tmp_path / "b.arrow").read_bytes()
    for end in range(1, len(data) - 8, len(data) // 20):
        path.write_bytes(data[:end])
        with pytest.raises(UserError, match=r"b\.arrow: not an arrow file, or damaged"):
            open_source(dataset_name="arrow", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["parquet", "arrow_stream", "zip_deflated", "webdataset"])
def test_exchanged_files_have_another_identity(name, tmp_path):
    arguments = MAKERS[name](tmp_path)
    before = open_source(**arguments).identity
    first, second = sorted(tmp_path.rglob("*.*"))[:2]
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    after = open_source(**arguments).identity
    assert after != before
    assert after["num_rows"] == before["num_rows"]


def test_one_byte_of_a_footer_changes_the_identity(tmp_path):
    path = tmp_path / "a.parquet"
    schema = hf_schema().with_metadata({b"note": b"one=two", **hf_schema().metadata})
    pq.write_table(table().replace_schema_metadata(schema.metadata), path)
    before = open_source(dataset_name="parquet", data_files=str(path)).identity
    data = path.read_bytes()
    assert data.count(b"one=two") == 1
    path.write_bytes(data.replace(b"one=two", b"one=twa"))
    assert open_source(dataset_name="parquet", data_files=str(path)).identity != before


def test_a_file_that_was_added_or_grew_changes_the_identity_of_a_folder(tmp_path):
    arguments = make_imagefolder(tmp_path)
    seen = [open_source(**arguments).identity]
    (tmp_path / NAMES[0]).write_bytes(IMAGES[0] + b"x")
    seen.append(open_source(**arguments).identity)
    (tmp_path / "cat/new.jpg").write_bytes(IMAGES[0])
    seen.append(open_source(**arguments).identity)
    (tmp_path / NAMES[1]).rename(tmp_path / "cat/renamed.jpg")
    seen.append(open_source(**arguments).identity)
    assert len({json.dumps(identity, sort_keys=True) for identity in seen}) == 4


def test_patterns_keep_their_order_and_a_file_named_twice_is_read_once(tmp_path):
    folder = write_parquet(tmp_path)
    files = [str(folder / "train-00002.parquet"), str(folder / "*.parquet")]
    assert open_source(dataset_name="parquet", data_files=files).read(0, NUM_IMAGES) == IMAGES[8:] + IMAGES[:8]


def test_data_files_expand_home_variables_folders_and_data_dir(tmp_path, monkeypatch):
    write_parquet(tmp_path / "deep/set")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path / "deep"))
    for data_files, data_dir in [
        ("~/deep/set/*.parquet", None),
        ("$WHERE/set", None),
        ("${WHERE}/**/*.parquet", None),
        ("set/*", "$WHERE"),
        (["set/train-00000.parquet", "set/train-{00001,00002}.parquet"], "~/deep"),
    ]:
        assert len(open_source(dataset_name="parquet", data_files=data_files, data_dir=data_dir)) == NUM_IMAGES


def test_brace_patterns():
    assert expand_braces("a-{008..011}.tar") == ["a-008.tar", "a-009.tar", "a-010.tar", "a-011.tar"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain{}.tar") == ["plain{}.tar"]


def test_data_files_by_split(tmp_path):
    folder = write_parquet(tmp_path)
    files = {"train": [str(folder / "train-00002.parquet")], "held": str(folder / "train-0000[01].parquet")}
    assert open_source(dataset_name="parquet", data_files=files, split="held").read(0, 8) == IMAGES[:8]
    assert open_source(dataset_name="parquet", data_files=files).encoded(0) == IMAGES[8]
    with pytest.raises(UserError, match="split 'test' is not in data_files .*; it has 'train', 'held'"):
        open_source(dataset_name="parquet", data_files=files, split="test")
    with pytest.raises(UserError, match=r"split 'train\[:10%\]' .* it has 'train'\. Parts of a split .* max_samples"):
        open_source(dataset_name="parquet", data_files=str(folder), split="train[:10%]")


@pytest.mark.parametrize(
    "name, split",
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("my_set-val.parquet", "validation"),
        ("dev/x.parquet", "validation"),
        ("Test.parquet", "test"),
        ("eval_0.parquet", "test"),
        ("strain.parquet", None),
        ("part-0.parquet", None),
        ("val/cat/training.jpg", "validation"),
        ("cat/train_017.jpg", None),
    ],
)
def test_names_that_speak_of_a_split(name, split):
    assert split_of_name(name, "train") == split


def test_data_dir_takes_the_folder_of_the_split_else_the_names_else_everything(tmp_path):
    for start, name in enumerate(["a/train/x", "a/test/y", "b/my-train-0", "b/my-validation", "c/one", "c/two"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table(start, start + 1), tmp_path / f"{name}.parquet")

    def rows(folder, split):
        source = open_source(dataset_name="parquet", data_dir=str(tmp_path / folder), split=split)
        return [IMAGES.index(data) for data in source.read(0, len(source))]

    assert [rows("a", "train"), rows("a", "test")] == [[0], [1]]
    assert [rows("b", "train"), rows("b", "validation"), rows("b", "val")] == [[2], [3], [3]]
    assert rows("c", "train") == [4, 5]
    for folder, there in [("a", "'test', 'train'"), ("b", "'train', 'validation'"), ("c", "'train'")]:
        with pytest.raises(UserError, match=f"split 'extra' is not in .*; it has {there}"):
            rows(folder, "extra")


def test_missing_files_folders_and_arguments_are_named(tmp_path):
    with pytest.raises(MissingFileError, match=r"no file matches the pattern .*/none-\*\.parquet"):
        open_source(dataset_name="parquet", data_files=str(tmp_path / "none-*.parquet"))
    with pytest.raises(MissingFileError, match="no file matches the file .*/gone.parquet"):
        open_source(dataset_name="parquet", data_files={"train": str(tmp_path / "gone.parquet")})
    with pytest.raises(MissingFileError, match="data_files has no files for split 'train'"):
        open_source(dataset_name="parquet", data_files={"train": []})
    with pytest.raises(MissingFileError, match="Folder not found: .*/nowhere"):
        open_source(dataset_name="imagefolder", data_dir=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="dataset_name: parquet needs data_files .* or data_dir"):
        open_source(dataset_name="parquet")
    with pytest.raises(MissingFileError, match="there is no such folder"):
        open_source(dataset_name=str(tmp_path / "nowhere"))
    (tmp_path / "x.tar").touch()
    with pytest.raises(UserError, match="is a file. Write dataset_name: webdataset and data_files:"):
        open_source(dataset_name=str(tmp_path / "x.tar"))
    (tmp_path / "train").mkdir()
    (tmp_path / "train/readme.txt").touch()
    with pytest.raises(MissingFileError, match=r"holds no files for imagefolder \(.*\.jpg.*\.zip\)"):
        open_source(dataset_name="imagefolder", data_dir=str(tmp_path))


def write_columns(tmp_path, schema=None, **columns):
    pq.write_table(pa.table(columns, schema=schema), tmp_path / "t.parquet")
    return {"dataset_name": "parquet", "data_files": str(tmp_path / "t.parquet")}


def test_plain_and_large_binary_columns_hold_images(tmp_path):
    for kind in (pa.binary(), pa.large_binary()):
        source = open_source(**write_columns(tmp_path, id=[1, 2], data=pa.array(IMAGES[:2], kind)))
        assert source.read(0, 2) == IMAGES[:2]
        assert source.identity["image_column"] == "data"


def test_the_image_feature_decides_among_several_columns_and_image_column_overrules_it(tmp_path):
    features = {"second": {"_type": "Image"}, "third": [{"_type": "Image"}]}
    schema = pa.schema([("first", pa.binary()), ("second", pa.binary()), ("third", pa.list_(pa.binary()))])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    arguments = write_columns(tmp_path, schema, first=IMAGES[:1], second=IMAGES[1:2], third=[IMAGES[2:4]])
    assert open_source(**arguments).encoded(0) == IMAGES[1]
    assert open_source(**arguments, image_column="first").encoded(0) == IMAGES[0]
    with pytest.raises(UserError, match="t.parquet, row 0: a list of 2 images in one cell; one is expected.*explode"):
        open_source(**arguments, image_column="third").encoded(0)


def test_unreadable_schema_metadata_is_ignored(tmp_path):
    schema = pa.schema([("data", pa.binary())]).with_metadata({"huggingface": "{not json"})
    assert open_source(**write_columns(tmp_path, schema, data=IMAGES[:1])).encoded(0) == IMAGES[0]


def test_missing_columns_are_answered_with_those_there_are(tmp_path):
    arguments = write_columns(tmp_path, size=[1], name=["x"])
    with pytest.raises(UserError, match=r"no column holds images. image_column must be one of: size \(int64\), name"):
        open_source(**arguments)
    arguments = write_columns(tmp_path, picture=IMAGES[:1], size=[1.5])
    with pytest.raises(UserError, match="there is no image_column 'img'. The columns are: picture .*, size"):
        open_source(**arguments, image_column="img")
    with pytest.raises(UserError, match="there is no label_column 'target'. The columns are: picture .*, size"):
        open_source(**arguments, label_column="target")
    with pytest.raises(UserError, match="no column looks like labels. label_column must be one of: picture .*, size"):
        open_source(**arguments, labels_required=True)
    with pytest.raises(UserError, match="labels must be all integers or all texts; found float"):
        open_source(**arguments, label_column="size").labels(0, 1)


def test_a_later_file_without_the_column_is_named(tmp_path):
    pq.write_table(table(0, 2), tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: there is no column 'image', which .*a.parquet has"):
        open_source(dataset_name="parquet", data_files=str(tmp_path))


def test_missing_images_are_empty_and_paths_are_read_beside_the_table(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/x.jpg").write_bytes(IMAGES[0])
    (tmp_path / "y.jpg").write_bytes(IMAGES[1])
    cells = [
        {"bytes": IMAGES[2], "path": "pictures/x.jpg"},
        {"bytes": None, "path": "pictures/x.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": b"", "path": "y.jpg"},
        {"bytes": None, "path": str(tmp_path / "y.jpg")},
    ]
    arguments = write_columns(tmp_path, hf_schema().remove(2).remove(0), image=cells)
    expected = [IMAGES[2], IMAGES[0], b"", b"", b"", IMAGES[1]]
    source = open_source(**arguments)
    assert source.read(0, 6) == expected
    assert [source.encoded(row) for row in range(6)] == expected
    paths = open_source(**write_columns(tmp_path, file=["y.jpg", None]), image_column="file")
    assert paths.read(0, 2) == [IMAGES[1], b""]


def test_a_path_to_no_file_is_an_error_not_a_bad_image(tmp_path):
    source = open_source(**write_columns(tmp_path, file=["gone.jpg"]), image_column="file")
    with pytest.raises(MissingFileError, match="no bytes for an image but its path 'gone.jpg', and there is no file"):
        source.read(0, 1)


def test_text_labels_are_numbered_by_their_sorted_names_over_all_files(tmp_path):
    for number, names in enumerate([["pug", "ant"], ["bee", None, "ant"]]):
        columns = {"image": IMAGES[: len(names)], "species": pa.array(names, pa.string())}
        pq.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    source = open_source(dataset_name="parquet", data_files=str(tmp_path), label_column="species")
    assert source.class_names == ["ant", "bee", "pug"]
    assert source.labels(0, 5).tolist() == [2, 0, 1, -1, 0]


def test_dictionary_encoded_labels_and_missing_integers(tmp_path):
    kinds = {"label": pa.array(["b", "a", "b"]).dictionary_encode(), "cls": pa.array([4, None, 5], pa.int16())}
    arguments = write_columns(tmp_path, image=IMAGES[:3], **kinds)
    assert open_source(**arguments, label_column="label").labels(0, 3).tolist() == [1, 0, 1]
    assert open_source(**arguments, label_column="cls").labels(0, 3).tolist() == [4, -1, 5]


def test_a_class_label_is_preferred_to_a_name_and_fine_labels_to_coarse_ones(tmp_path):
    features = {
        "coarse_label": {"_type": "ClassLabel", "names": ["c"]},
        "fine_label": {"_type": "ClassLabel", "names": ["f"]},
    }
    schema = pa.schema(
        [("image", pa.binary()), ("class", pa.int64()), ("coarse_label", pa.int64()), ("fine_label", pa.int64())]
    )
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    columns = {"image": IMAGES[:1], "class": [9], "coarse_label": [1], "fine_label": [2]}
    source = open_source(**write_columns(tmp_path, schema.with_metadata(metadata), **columns), labels_required=True)
    assert (source.identity["label_column"], source.class_names) == ("fine_label", ["f"])
    source = open_source(**write_columns(tmp_path, schema, **columns), labels_required=True)
    assert (source.identity["label_column"], source.class_names) == ("fine_label", None)


def test_a_window_of_a_large_row_group_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "_WINDOW_BYTES", 4 * len(IMAGES[0]))
    source = open_source(**make_parquet_one_group(tmp_path))
    assert source.read(0, 10) == IMAGES[:10]
    assert len(source._handles["window"]) <= 5


def test_empty_row_groups_and_files_are_passed_over(tmp_path):
    with pq.ParquetWriter(tmp_path / "a.parquet", hf_schema()) as writer:
        for start, stop in [(0, 0), (0, 2), (2, 2), (2, 3)]:
            writer.write_table(table(start, stop))
    pq.write_table(table(0, 0), tmp_path / "b.parquet")
    pq.write_table(table(3, 5), tmp_path / "c.parquet")
    assert open_source(dataset_name="parquet", data_files=str(tmp_path)).read(0, 5) == IMAGES[:5]


def test_what_is_no_table_is_named(tmp_path):
    for kind, message in [("parquet", "not a parquet file, or damaged"), ("arrow", "not an arrow file, or damaged")]:
        path = tmp_path / f"x.{kind}"
        path.write_bytes(b"<html>404</html>" * 100)
        with pytest.raises(UserError, match=f"x.{kind}: {message}"):
            open_source(dataset_name=kind, data_files=str(path))


def test_damage_inside_a_parquet_file_is_an_io_error_not_a_bad_image(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(), path)
    data = bytearray(path.read_bytes())
    column = pq.read_metadata(path).row_group(0).column(1)
    start = column.data_page_offset if column.dictionary_page_offset is None else column.dictionary_page_offset
    data[start : start + 40] = bytes(40)
    source = open_source(dataset_name="parquet", data_files=str(path))
    path.write_bytes(data)
    with pytest.raises(OSError, match="a.parquet") as caught:
        source.read(0, NUM_IMAGES)
    assert isinstance(caught.value, RunError)  # one line for the user, whoever reads


def test_an_arrow_file_that_shrank_gives_fewer_images_and_no_endless_loop(tmp_path):
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_file, 0, 9)
    source = open_source(dataset_name="arrow", data_files=str(tmp_path / "a.arrow"))
    write_arrow(tmp_path / "a.arrow", pa.ipc.new_file, 0, 5)
    assert source.read(0, 9) == IMAGES[:5]


def test_folders_of_save_to_disk_are_read_in_their_own_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    columns = {"image": [{"bytes": data, "path": None} for data in IMAGES], "label": LABELS}
    whole = datasets.Dataset.from_dict(columns, features=features)
    whole.save_to_disk(tmp_path / "one", num_shards=3)
    datasets.DatasetDict({"train": whole, "odd": whole.select(range(5))}).save_to_disk(tmp_path / "two")
    for arguments, expected in [
        ({"dataset_name": str(tmp_path / "one")}, IMAGES),
        ({"dataset_name": str(tmp_path / "two")}, IMAGES),
        ({"dataset_name": str(tmp_path / "two"), "split": "odd"}, IMAGES[:5]),
    ]:
        source = open_source(**arguments, labels_required=True)
        assert source.read(0, len(source)) == expected
        assert source.labels(0, 5).tolist() == LABELS[:5] and source.class_names == CLASSES
    with pytest.raises(UserError, match="split 'test' is not in .*two; it has 'train', 'odd'"):
        open_source(dataset_name=str(tmp_path / "two"), split="test")
    for saved_as, split in [(None, "train"), ("test", "test"), ("test[:50%]", "test")]:
        datasets.Dataset.from_dict(columns, features, split=saved_as).save_to_disk(tmp_path / "single")
        assert len(open_source(dataset_name=str(tmp_path / "single"), split=split)) == len(IMAGES)
        with pytest.raises(UserError, match=f"split 'val' is not in .*single; it has '{split}'"):
            open_source(dataset_name=str(tmp_path / "single"), split="val")
    next((tmp_path / "one").glob("*.arrow")).unlink()
    with pytest.raises(MissingFileError, match="state.json names data-.*arrow, which is not there"):
        open_source(dataset_name=str(tmp_path / "one"))


def test_an_image_folder_leaves_out_and_counts_other_files_and_hidden_ones_silently(tmp_path):
    arguments = make_imagefolder(tmp_path)
    for name in ["cat/notes.txt", "metadata.csv", "cat/.hidden.jpg", ".git/a.jpg", "__MACOSX/b.jpg"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    source = open_source(**arguments)
    assert source.read(0, len(source)) == IMAGES
    assert source.describe().endswith(", 2 other files left out")


def test_an_image_folder_with_splits_and_classes_by_the_nearest_folder(tmp_path):
    names = ["train/deep/cat/1.jpg", "train/dog/2.JPEG", "train/dog/3.png", "val/cat/4.jpg"]
    write_folder(tmp_path, names, IMAGES[:4])
    source = open_source(dataset_name="imagefolder", data_dir=str(tmp_path), labels_required=True)
    assert source.read(0, 3) == IMAGES[:3]
    assert (source.labels(0, 3).tolist(), source.class_names) == ([0, 1, 1], ["cat", "dog"])
    assert open_source(dataset_name="imagefolder", data_dir=str(tmp_path), split="validation").read(0, 1) == IMAGES[3:4]
    with pytest.raises(UserError, match="split 'test' is not in .*; it has 'train', 'validation'"):
        open_source(dataset_name="imagefolder", data_dir=str(tmp_path), split="test")


def test_zip_archives_named_after_splits(tmp_path):
    write_zip(tmp_path / "train.zip", names=NAMES[:4], images=IMAGES[:4])
    write_zip(tmp_path / "val.zip", names=NAMES[4:6], images=IMAGES[4:6])
    arguments = {"dataset_name": "imagefolder", "data_dir": str(tmp_path)}
    assert open_source(**arguments).read(0, 4) == IMAGES[:4]
    assert open_source(**arguments, split="validation").read(0, 2) == IMAGES[4:6]


def test_labels_need_class_folders(tmp_path):
    write_folder(tmp_path, ["1.jpg"], IMAGES[:1])
    with pytest.raises(UserError, match="labels need FOLDER/CLASS/IMAGE; .*/1.jpg is in no class folder"):
        open_source(dataset_name="imagefolder", data_dir=str(tmp_path), labels_required=True)
    with pytest.raises(UserError, match="image_column is 'img'; an image folder has only 'image'"):
        open_source(dataset_name="imagefolder", data_dir=str(tmp_path), image_column="img")


def test_links_are_followed_but_not_in_circles(tmp_path):
    write_folder(tmp_path / "data", NAMES[:3], IMAGES[:3])
    write_folder(tmp_path / "far", ["eel/9.jpg"], IMAGES[9:10])
    (tmp_path / "data/eel").symlink_to(tmp_path / "far/eel")
    (tmp_path / "data/cat/loop").symlink_to(tmp_path / "data")
    (tmp_path / "data/cat/broken.jpg").symlink_to(tmp_path / "none")
    files = scan_folder(tmp_path / "data", {".jpg"})
    assert files.names == [*NAMES[:3], "eel/9.jpg"] and len(files.others) == 1


def test_names_that_are_not_utf8_are_read(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"c\xff")
    os.mkdir(folder)
    with open(os.path.join(folder, b"\xfe.jpg"), "wb") as file:
        file.write(IMAGES[0])
    source = pickle.loads(pickle.dumps(open_source(dataset_name="imagefolder", data_dir=str(tmp_path))))
    assert source.read(0, 1) == IMAGES[:1]


def test_a_zip_is_read_in_its_own_order_without_its_junk(tmp_path):
    order = [5, 2, 9]
    names = [f"x/{row}.jpg" for row in order] + ["__MACOSX/x/._5.jpg", "x/.DS_Store", "x/readme.md"]
    write_zip(tmp_path / "a.zip", names=names, images=[IMAGES[row] for row in order] + [b"junk"] * 3)
    source = open_source(dataset_name="imagefolder", data_files=str(tmp_path / "a.zip"))
    assert source.read(0, 3) == [IMAGES[row] for row in order] and len(source) == 3
    assert source.describe().endswith(", 1 other files left out")


def test_zip_headers_of_any_length_are_read(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for row, (length, extra) in enumerate([(1, 0), (60, 1000), (250, 65000), (60000, 0)]):
            info = zipfile.ZipInfo(f"{'n' * length}{row}.jpg")
            # 0xCAFE: an extra field that no program knows
            info.extra = b"\xfe\xca" + extra.to_bytes(2, "little") + bytes(extra) if extra else b""
            archive.writestr(info, IMAGES[row])
    assert open_source(dataset_name="imagefolder", data_files=str(tmp_path / "a.zip")).read(0, 4) == IMAGES[:4]


def test_a_rotten_deflated_member_is_a_missing_image_and_its_neighbours_are_read(tmp_path):
    path = write_zip(tmp_path / "a.zip", zipfile.ZIP_DEFLATED)
    source = open_source(dataset_name="imagefolder", data_files=str(path))
    data = bytearray(path.read_bytes())
    start = int(source._places.offset[3]) + 30 + len(NAMES[3])
    data[start : start + 8] = b"\xff" * 8
    path.write_bytes(data)
    with pytest.raises(zlib.error):
        zlib.decompress(bytes(data[start : start + int(source._places.num_bytes[3])]), wbits=-15)
    assert source.read(2, 5) == [IMAGES[2], b"", IMAGES[4]]


def test_a_zip_bomb_and_a_cut_member_are_missing_images_in_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_IMAGE_BYTES", 5000)
    path = write_zip(tmp_path / "a.zip", zipfile.ZIP_DEFLATED, NAMES[:3], [IMAGES[0], bytes(50_000_000), IMAGES[2]])
    source = open_source(dataset_name="imagefolder", data_files=str(path))
    assert source.read(0, 3) == [IMAGES[0], b"", IMAGES[2]]
    source._places.num_bytes[2] -= 20
    assert source.encoded(2) == b""


def test_an_archive_that_shrinks_or_vanishes_is_an_io_error(tmp_path):
    path = write_zip(tmp_path / "a.zip")
    source = open_source(dataset_name="imagefolder", data_files=str(path))
    os.truncate(path, 1000)
    with pytest.raises(OSError, match="a.zip.*truncated"):
        source.read(0, NUM_IMAGES)
    tar = write_tar(tmp_path / "b.tar", samples())
    source = open_source(dataset_name="webdataset", data_files=str(tar))
    os.truncate(tar, 1000)
    with pytest.raises(OSError, match="b.tar ends at byte .*truncated"):
        source.read(0, NUM_IMAGES)
    tar.unlink()
    with pytest.raises(FileNotFoundError):
        copy.copy(source).read(0, 1)


def test_what_is_no_usable_zip_is_named(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(b"PK\3\4" + bytes(500))
    with pytest.raises(UserError, match="a.zip: not a zip archive, or damaged"):
        open_source(dataset_name="imagefolder", data_files=str(path))
    write_zip(path, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match="a.zip: cat/000.jpg is encrypted or not packed by deflate"):
        open_source(dataset_name="imagefolder", data_files=str(path))
    data = bytearray(write_zip(path).read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is encrypted"):
        open_source(dataset_name="imagefolder", data_files=str(path))


def test_more_archives_than_may_be_open_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "_MAX_OPEN_FILES", 3)
    for row in range(12):
        write_tar(tmp_path / f"{row:02d}.tar", samples(row, row + 1))
    source = open_source(dataset_name="webdataset", data_dir=str(tmp_path))
    for _ in range(2):
        assert [source.encoded(row) for row in (0, 5, 1, 11, 5, 0, 7)] == [
            IMAGES[row] for row in (0, 5, 1, 11, 5, 0, 7)
        ]
    assert len(source._handles["files"]._fds) == 3


# the last two are too long for the plain header
TAR_NAMES = ["a.jpg", "é/ü.jpg", f"{'d' * 90}/{'e' * 90}.jpg", f"{'n' * 99}.jpg", f"{'f' * 150}/{'g' * 180}.jpg"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_indexes_equal_tarfiles_own(tmp_path, format):
    names = TAR_NAMES[:3] if format == tarfile.USTAR_FORMAT else TAR_NAMES
    path = write_tar(tmp_path / "a.tar", [(name, IMAGES[row]) for row, name in enumerate(names)], format)
    with tarfile.open(path) as archive:
        expected = [(info.name, info.offset_data, info.size) for info in archive]
    index = tar_module.index_tar(str(path))
    assert [(member.name, member.offset, member.num_bytes) for member in index.members] == expected
    assert index.left_out == {}


def test_tar_archives_with_folders_links_and_no_end_mark_are_indexed(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        link = tarfile.TarInfo("d/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        for row in range(3):
            info = tarfile.TarInfo(f"d/{row}.jpg")
            info.size = len(IMAGES[row])
            archive.addfile(info, io.BytesIO(IMAGES[row]))
            archive.addfile(link)
    source = open_source(dataset_name="webdataset", data_files=str(path))
    assert source.read(0, len(source)) == [image for row in range(3) for image in (IMAGES[row], IMAGES[0])]
    path = write_tar(tmp_path / "b.tar", samples())
    members = tar_module.index_tar(str(path)).members
    end = members[-1].offset + -(-members[-1].num_bytes // 512) * 512
    os.truncate(path, end)
    assert open_source(dataset_name="webdataset", data_files=str(path)).read(0, NUM_IMAGES) == IMAGES


def test_samples_are_neighbours_with_one_name_up_to_the_first_dot(tmp_path):
    members = [
        ("a/1.jpg", IMAGES[0]), ("a/1.seg.png", b"mask"), ("a/1.cls", b"7"),
        ("b/1.cls", b"8"), ("b/1.PNG", IMAGES[1]),
        ("b/2.txt", b"no image"), ("._3.jpg", b"junk"),
        ("c/4.left.jpg", IMAGES[2]), ("c/4.jpg", IMAGES[3]),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    source = open_source(dataset_name="webdataset", data_files=str(path), labels_required=True)
    assert source.read(0, len(source)) == [IMAGES[0], IMAGES[1], IMAGES[3]]
    assert source.labels(0, 3).tolist() == [7, 8, -1]
    assert source.describe().endswith(", 1 samples without an image left out")
    assert open_source(dataset_name="webdataset", data_files=str(path), image_column="left.jpg").read(0, 1) == [
        IMAGES[2]
    ]
    with pytest.raises(UserError, match=r"no sample has an image \.webp\. Its members end in: cls, jpg, left.jpg, png"):
        open_source(dataset_name="webdataset", data_files=str(path), image_column="webp")


def test_webdataset_labels_from_cls_texts_or_json_entries(tmp_path):
    members = []
    for row, name in enumerate(["owl", "ant", "owl"]):
        members += [(f"{row}.jpg", IMAGES[row]), (f"{row}.json", json.dumps({"label": name, "size": row}).encode())]
    arguments = {"dataset_name": "webdataset", "data_files": str(write_tar(tmp_path / "a.tar", members))}
    for extra in ({"labels_required": True}, {"label_column": "json"}, {"label_column": "label"}):
        source = open_source(**arguments, **extra)
        assert (source.class_names, source.labels(0, 3).tolist()) == (["ant", "owl"], [1, 0, 1])
        assert source.identity["label_column"] == "label"
    source = pickle.loads(pickle.dumps(open_source(**arguments, label_column="size")))
    assert (source.labels(0, 3).tolist(), source.class_names) == ([0, 1, 2], None)
    with pytest.raises(UserError, match="a .json member has no entry 'colour'"):
        open_source(**arguments, label_column="colour").labels(0, 1)
    with pytest.raises(UserError, match="no sample has label_column 'cls'. Its members end in: jpg, json"):
        open_source(**arguments, label_column="cls")
    texts = write_tar(
        tmp_path / "b.tar", [("0.jpg", IMAGES[0]), ("0.cls", b"b\n"), ("1.jpg", IMAGES[1]), ("1.cls", b"a")]
    )
    source = open_source(dataset_name="webdataset", data_files=str(texts), labels_required=True)
    assert (source.labels(0, 2).tolist(), source.class_names) == ([1, 0], ["a", "b"])
    large = write_tar(tmp_path / "d.tar", [("0.jpg", IMAGES[0]), ("0.cls", str(2**63).encode())])
    with pytest.raises(UserError, match="labels of .*d.tar: a label does not fit into 64 bits"):
        open_source(dataset_name="webdataset", data_files=str(large), labels_required=True).labels(0, 1)
    bare = write_tar(tmp_path / "c.tar", [("0.jpg", IMAGES[0])])
    with pytest.raises(UserError, match=r"no sample has labels \(.cls or .json\)"):
        open_source(dataset_name="webdataset", data_files=str(bare), labels_required=True)


def test_compressed_and_truncated_tars_are_named(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x.jpg"))
    with pytest.raises(UserError, match="a.tar: not an uncompressed tar archive, or truncated .* Unpack .tar.gz"):
        open_source(dataset_name="webdataset", data_files=str(tmp_path / "a.tar"))
    path = write_tar(tmp_path / "b.tar", samples())
    os.truncate(path, 700)
    with pytest.raises(UserError, match="b.tar: not an uncompressed tar archive, or truncated"):
        open_source(dataset_name="webdataset", data_files=str(path))


def test_a_misspelt_kind_is_answered_at_once(tmp_path):
    with pytest.raises(UserError, match="'parqet' is no local folder; did you mean 'parquet'"):
        open_source(dataset_name="parqet", data_files=str(tmp_path / "a.parquet"))


def test_an_image_folder_without_metadata_has_no_label_column_of_another_name(tmp_path):
    write_folder(tmp_path, ["cat/1.jpg"], IMAGES[:1])
    arguments = {"dataset_name": "imagefolder", "data_dir": str(tmp_path)}
    assert open_source(**arguments, label_column="label").class_names == ["cat"]
    with pytest.raises(UserError, match="label_column is 'species'; an image folder without a metadata file has only"):
        open_source(**arguments, label_column="species")


@pytest.mark.parametrize(
    "cells, labels, names",
    [
        (["0.0", "1.0", ""], [0, 1, -1], None),
        (["2020-01-01", "2019-01-01", ""], [1, 0, -1], ["2019-01-01", "2020-01-01"]),
        (["12:30", "12:30", "8:15"], [0, 0, 1], ["12:30", "8:15"]),
    ],
)
def test_labels_of_a_metadata_csv_as_pandas_writes_them(tmp_path, cells, labels, names):
    write_folder(tmp_path, ["0.jpg", "1.jpg", "2.jpg"], IMAGES[:3])
    rows = "".join(f"{number}.jpg,{cell}\n" for number, cell in enumerate(cells))
    (tmp_path / "metadata.csv").write_text(f"file_name,label\n{rows}")
    source = open_source(dataset_name="imagefolder", data_dir=str(tmp_path), labels_required=True)
    assert source.labels(0, 3).tolist() == labels and source.class_names == names
