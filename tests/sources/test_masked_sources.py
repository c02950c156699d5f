import copy
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mosaics import encode_png, make_mosaics, mosaics

from distillery.config.load import load_configs
from distillery.sources.evaluation import PartOfSource
from distillery.sources.registry import open_source
from distillery.system.errors import MissingFileError, UserError

IMAGES, MASKS = ([encode_png(pixels) for pixels in values] for values in mosaics(6, tiles=1))


def open_masked(**arguments):
    return open_source(**arguments, masks_required=True)


def write_columns(folder, features=None, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table(columns)
    if features is not None:
        kinds = {name: {"_type": "Image"} for name in features}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": kinds}})})
    pq.write_table(table, folder / "a.parquet")
    return {"dataset_name": "parquet", "data_files": str(folder / "a.parquet")}


def write_files(folder, **contents):
    """name=bytes, for each file."""
    for name, data in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def pairs_of(source):
    return list(zip(source.read(0, len(source)), map(bytes, source.masks(0, len(source))), strict=True))


PAIRS = list(zip(IMAGES, MASKS, strict=True))

# ---- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, chosen",
    [
        (("image", "mask"), {}),
        (("mask", "image"), {}),
        (("pixel_values", "label"), {}),
        (("photo", "segmentation_mask"), {}),
        (("photo", "classes"), {"mask_column": "classes"}),
        (("photo", "classes"), {"image_column": "photo"}),
        (("mask", "label"), {"image_column": "mask"}),
        (("mask", "label"), {"mask_column": "label"}),
    ],
)
@pytest.mark.parametrize("is_feature", [False, True])
def test_the_columns_of_images_and_masks_are_found_or_chosen(tmp_path, names, chosen, is_feature):
    image, mask = names if names[0] != "mask" or names[1] != "image" else names[::-1]
    columns = {image: IMAGES, mask: MASKS, "number": list(range(6)), "text": ["a b"] * 6}
    columns = {name: columns[name] for name in (*names, "number", "text")}
    source = open_masked(**write_columns(tmp_path, names if is_feature else None, **columns), **chosen)
    assert pairs_of(source) == PAIRS
    assert (source.identity["image_column"], source.identity["mask_column"]) == (image, mask)
    assert f"column {image}, masks {mask}" in source.describe()


def test_an_integer_called_label_is_no_mask(tmp_path):
    source = open_masked(**write_columns(tmp_path, image=IMAGES, label=[1] * 6, annotation=MASKS))
    assert source.identity["mask_column"] == "annotation"


@pytest.mark.parametrize(
    "columns, chosen, found",
    [
        (("image", "mask", "annotation"), {}, r"several columns may hold the masks: mask, annotation"),
        (("image", "a", "b"), {}, r"several columns may hold the images: image \(binary\), a \(binary\), b"),
        (("image", "a", "b"), {"image_column": "image"}, r"several columns may hold the masks: a, b"),
        (("image",), {}, r"no column holds masks\. .*number \(int64\)"),
        (("image", "mask"), {"mask_column": "msk"}, r"mask_column 'msk' is not there"),
        (
            ("image", "mask"),
            {"mask_column": "mask", "image_column": "mask"},
            r"mask_column 'mask' is the image_column too",
        ),
        (("image", "mask"), {"mask_column": "number"}, r"mask_column 'number' is int64; images are bytes"),
    ],
)
def test_a_choice_of_columns_that_is_not_clear_is_refused_with_a_list_of_them(tmp_path, columns, chosen, found):
    arguments = write_columns(tmp_path, **dict.fromkeys(columns, IMAGES), number=list(range(6)))
    with pytest.raises(UserError, match=rf"a\.parquet: {found}"):
        open_masked(**arguments, **chosen)


def test_masks_of_several_files_that_are_paths_or_missing_are_read_row_for_row(tmp_path):
    (tmp_path / "m.png").write_bytes(MASKS[1])
    write_columns(
        tmp_path / "x", image=IMAGES[:2], mask=[{"bytes": MASKS[0], "path": None}, {"bytes": None, "path": "../m.png"}]
    )
    write_columns(tmp_path / "y", image=IMAGES[2:], mask=[{"bytes": data, "path": None} for data in [None, *MASKS[3:]]])
    source = open_masked(dataset_name="parquet", data_files=str(tmp_path / "*" / "a.parquet"))
    expected = [*MASKS[:2], b"", *MASKS[3:]]
    for one in (source, copy.copy(source), pickle.loads(pickle.dumps(source))):
        assert list(map(bytes, one.masks(0, 6))) == expected
        assert one.read(1, 4) == IMAGES[1:4] and list(map(bytes, one.masks(1, 4))) == expected[1:4]
    part = PartOfSource(source, rows=np.array([0, 3, 4]))
    assert pairs_of(part) == [(IMAGES[row], expected[row]) for row in (0, 3, 4)]


def test_a_source_opened_without_masks_has_none_and_keeps_its_identity(tmp_path):
    entry = make_mosaics(tmp_path, 3, 2)
    arguments = {"dataset_name": "parquet", "data_files": entry["data_files"], "image_column": "image"}
    plain, masked = open_source(**arguments), open_masked(**arguments)
    assert plain.masks(0, 3) is None and PartOfSource(plain, rows=np.array([1])).masks(0, 1) is None
    assert masked.identity == plain.identity | {"mask_column": "mask"}


def test_a_webdataset_is_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match="masks are read from parquet, arrow and image folders"):
        open_masked(dataset_name="webdataset", data_files=str(tmp_path / "a.tar"))


# ---- folders ------------------------------------------------------------------------------------


def write_layout(folder, image_folder, mask_folder, split, *, first=0, last=6):
    """Six JPEG-named images and their masks; {split} may stand anywhere in the folders."""
    for number in range(first, last):
        for pattern, data, suffix in ((image_folder, IMAGES, "jpg"), (mask_folder, MASKS, "png")):
            write_files(folder, **{f"{pattern.format(split=split)}/n{number}.{suffix}": data[number]})


@pytest.mark.parametrize(
    "images, masks, chosen",
    [
        ("images/{split}", "annotations/{split}", {"image_column": "images", "mask_column": "annotations"}),
        ("images/{split}", "annotations/{split}", {}),
        ("{split}/images", "{split}/masks", {}),
        ("{split}/JPEGImages", "{split}/SegmentationClass", {}),
        ("data/{split}/photos/a", "data/{split}/classes/a", {"image_column": "photos", "mask_column": "classes"}),
    ],
)
def test_images_and_masks_of_two_folders_are_pairs_by_their_paths(tmp_path, images, masks, chosen):
    write_layout(tmp_path / "d", images, masks, "training", last=4)
    write_layout(tmp_path / "d", images, masks, "validation", first=4)
    for split, rows in (("train", slice(0, 4)), ("validation", slice(4, 6))):
        source = open_masked(dataset_name="imagefolder", data_dir=str(tmp_path / "d"), split=split, **chosen)
        assert pairs_of(source) == PAIRS[rows]
        for one in (copy.copy(source), pickle.loads(pickle.dumps(source))):
            assert pairs_of(one) == PAIRS[rows]


def test_images_without_a_mask_and_masks_without_an_image_are_left_out_and_counted(tmp_path):
    write_layout(tmp_path, "images", "masks", "train")
    (tmp_path / "masks" / "n2.png").unlink()
    (tmp_path / "images" / "n4.jpg").unlink()
    write_files(tmp_path, **{"masks/n9.png": MASKS[0], "other/n1.png": MASKS[0]})
    source = open_masked(dataset_name="imagefolder", data_dir=str(tmp_path))
    assert pairs_of(source) == [PAIRS[row] for row in (0, 1, 3, 5)]
    counts = "1 files in neither folder, 2 masks without an image, 1 images without a mask left out"
    assert source.describe().endswith(f"column images, masks masks, {counts}")


def test_the_identity_of_folders_knows_the_masks_and_stays_when_they_move(tmp_path):
    write_layout(tmp_path / "a", "images", "masks", "train")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, moved = (open_masked(dataset_name="imagefolder", data_dir=str(tmp_path / name)) for name in "ab")
    assert first.identity == moved.identity
    write_files(tmp_path / "b", **{"masks/n3.png": MASKS[3] + b" "})
    changed = open_masked(dataset_name="imagefolder", data_dir=str(tmp_path / "b"))
    assert changed.identity != first.identity and len(changed) == 6


def test_a_zip_archive_may_hold_both_folders(tmp_path):
    write_layout(tmp_path / "a", "images", "masks", "train")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((tmp_path / "a").rglob("*.*")):
            archive.write(path, path.relative_to(tmp_path / "a").as_posix())
    assert pairs_of(open_masked(dataset_name="imagefolder", data_files=str(tmp_path / "a.zip"))) == PAIRS


@pytest.mark.parametrize(
    "names, chosen, found",
    [
        (("a/x.png", "b/x.png"), {}, r"no folder is called images, .*Name it with image_column\. .*found: a, b"),
        (("images/x.png", "b/x.png"), {}, r"no folder is called masks, .*Name it with mask_column"),
        (("images/x.png", "masks/x.png", "labels/x.png"), {}, "several folders could be mask_column: masks, labels"),
        (("images/x.png", "masks/x.png"), {"mask_column": "msk"}, "no folder 'msk' with image files"),
        (("images/x.png", "masks/x.png"), {"mask_column": "images"}, "both 'images'"),
        (("images/x.png", "masks/y.png"), {}, "Found images/x.png and masks/y.png; the paths must be the same"),
        (("images/x.png", "images/x.jpg", "masks/x.png"), {}, "images/x.jpg and images/x.png differ only in their suf"),
    ],
)
def test_folders_that_give_no_pairs_are_refused_and_named(tmp_path, names, chosen, found):
    write_files(tmp_path, **dict.fromkeys(names, IMAGES[0]))
    with pytest.raises(UserError, match=found):
        open_masked(dataset_name="imagefolder", data_dir=str(tmp_path), **chosen)


@pytest.mark.parametrize("column", ["mask_file_name", "mask", "annotation_file_name"])
def test_metadata_names_the_mask_of_each_image(tmp_path, column):
    for number in range(6):
        write_files(tmp_path, **{f"train/p{number}.jpg": IMAGES[number], f"train/classes/{number}.png": MASKS[number]})
    order, lines = [3, 0, 5, 1], [f"file_name,{column}"]
    lines += [f"p{number}.jpg,classes/{number}.png" for number in order] + ["p2.jpg,"]
    write_files(tmp_path, **{"train/metadata.csv": "\n".join(lines).encode()})
    source = open_masked(dataset_name="imagefolder", data_dir=str(tmp_path))
    assert pairs_of(source) == [PAIRS[number] for number in order]
    assert source.identity["mask_column"] == column and "1 images without a mask" in source.describe()
    write_files(tmp_path, **{"train/metadata.csv": f"file_name,{column}\np1.jpg,classes/9.png".encode()})
    with pytest.raises(MissingFileError, match=r"lists 'classes/9\.png', and there is no such image"):
        open_masked(dataset_name="imagefolder", data_dir=str(tmp_path))


def test_metadata_that_says_nothing_of_masks_leaves_the_folders_to_decide(tmp_path):
    write_layout(tmp_path, "images", "masks", "train")
    write_files(tmp_path, **{"metadata.csv": b"file_name,author\nimages/n1.jpg,me"})
    assert pairs_of(open_masked(dataset_name="imagefolder", data_dir=str(tmp_path))) == PAIRS
    with pytest.raises(UserError, match=r"metadata\.csv names no masks: that needs .* there is no folder 'other'"):
        open_masked(dataset_name="imagefolder", data_dir=str(tmp_path), mask_column="other")


def write_voc(folder):
    write_layout(folder, "JPEGImages", "SegmentationClass", "")
    write_files(
        folder,
        **{f"SegmentationObject/n{number}.png": MASKS[0] for number in range(6)},
        **{f"Annotations/n{number}.xml": b"<a/>" for number in range(6)},
        **{"JPEGImages/unlabelled.jpg": IMAGES[0]},
        **{
            "ImageSets/Segmentation/train.txt": b"n4\nn1\n",
            "ImageSets/Segmentation/val.txt": b"n0\n\nn2 \nunlabelled\n",
        },
    )
    lists = {split: f"ImageSets/Segmentation/{split}.txt" for split in ("train", "val")}
    return {"dataset_name": "imagefolder", "data_dir": str(folder), "data_files": lists}


def test_lists_of_images_give_the_splits_of_pascal_voc_in_their_order(tmp_path):
    arguments = write_voc(tmp_path)
    train, val = (open_masked(**arguments, split=split) for split in ("train", "val"))
    assert pairs_of(train) == [PAIRS[4], PAIRS[1]] and pairs_of(val) == [PAIRS[0], PAIRS[2]]
    assert "1 images without a mask left out" in val.describe()
    assert train.identity["files"] == val.identity["files"] and train.identity["listed"] != val.identity["listed"]
    by_name = arguments | {"dataset_name": str(tmp_path), "data_dir": None}
    assert open_masked(**by_name).identity == train.identity


def test_the_ready_configuration_reads_ade20k_and_pascal_voc_as_they_are_unpacked(tmp_path):
    data = load_configs(Path(__file__).resolve().parents[2] / "configs" / "ade20k_voc" / "data_config.yaml").data
    ade, voc = (data.eval_datasets[name] for name in ("ade20k", "voc2012"))
    for split, rows in (("training", (0, 4)), ("validation", (4, 6))):
        write_layout(tmp_path / "ade", "images/{split}", "annotations/{split}", split, first=rows[0], last=rows[1])
    write_files(tmp_path / "ade", **{"objectInfo150.txt": b"1", "sceneCategories.txt": b"ADE_train_00000001 airport"})
    write_voc(tmp_path / "voc")
    for entry, folder, part, expected in (
        (ade, "ade", "train", PAIRS[:4]),
        (ade, "ade", "test", PAIRS[4:]),
        (voc, "voc", "train", [PAIRS[4], PAIRS[1]]),
        (voc, "voc", "test", [PAIRS[0], PAIRS[2]]),
    ):
        assert pairs_of(open_source(**entry.source_arguments(part) | {"data_dir": str(tmp_path / folder)})) == expected
    assert (ade.mask_dtype, voc.mask_dtype) == ("uint8", "uint8")


def test_a_list_that_is_wrong_is_refused(tmp_path):
    arguments = write_voc(tmp_path)
    with pytest.raises(UserError, match="split 'test' is not in data_files; it has 'train', 'val'"):
        open_masked(**arguments, split="test")
    with pytest.raises(UserError, match="data_dir must name their folder"):
        open_masked(**arguments | {"data_dir": None})
    with pytest.raises(MissingFileError, match=r"there is no list .*/gone\.txt"):
        open_masked(**arguments | {"data_files": "gone.txt"})
    write_files(tmp_path, **{"ImageSets/Segmentation/train.txt": b"n4\nn77\n"})
    with pytest.raises(MissingFileError, match=r"1 of the 2 images listed are not in 'JPEGImages', first 'n77'"):
        open_masked(**arguments)
    write_files(tmp_path, **{"ImageSets/Segmentation/train.txt": b"\n"})
    with pytest.raises(UserError, match="the list of 'train' is empty"):
        open_masked(**arguments)
