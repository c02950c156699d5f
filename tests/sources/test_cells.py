"""What the cells of an image column may be, and what becomes of those that are no image."""

import base64
import os
import urllib.parse

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distillery.sources.registry import open_source
from distillery.system.errors import MissingFileError, UserError
from tests.sources.test_registry import IMAGES, encode

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = [{"bytes": data, "path": None} for data in IMAGES[:4]]
PNG = encode(0, "PNG")


def open_cells(tmp_path, cells, image_column="image", kind="parquet"):
    path, table = tmp_path / f"t.{kind}", pa.table({"image": cells})
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return open_source(dataset_name=kind, data_files=str(path), image_column=image_column)


def read_all(source):
    return source.read(0, len(source))


def extension(storage):
    return pa.ExtensionArray.from_storage(pa.opaque(storage.type, "image", "tests"), storage)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "cells",
    [
        pa.array(IMAGES[:4], pa.binary_view()),
        pa.array(CELLS, pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string()), ("size", pa.int8())])),
        pa.array(CELLS, pa.struct([("path", pa.string()), ("bytes", pa.binary_view())])),
        pa.array(IMAGES[:4], pa.binary()).dictionary_encode(),
        extension(pa.array(IMAGES[:4], pa.binary())),
        pa.array([[cell] for cell in CELLS], pa.list_(STRUCT)),
        pa.array([[cell] for cell in CELLS], pa.large_list(STRUCT)),
        pa.array([[cell] for cell in CELLS], pa.list_(STRUCT, 1)),
        pa.array([[data] for data in IMAGES[:4]], pa.list_(pa.binary())),
        pa.array([[data] for data in IMAGES[:4]], pa.list_view(pa.binary())),
        pa.array([[[data]] for data in IMAGES[:4]], pa.list_(pa.list_(pa.large_binary()))),
        pa.array([[data] for data in IMAGES[:4]], pa.list_(pa.dictionary(pa.int32(), pa.binary()))),
    ],
    ids=lambda cells: str(cells.type)[:40],
)
def test_one_image_a_cell_is_found_and_read_in_every_layout(tmp_path, cells, kind):
    source = open_cells(tmp_path, cells, image_column=None, kind=kind)
    assert source.read(1, 3) == IMAGES[1:3] and read_all(source) == IMAGES[:4]


def test_dictionary_encoded_structs_and_repeated_images_are_read_wherever_the_slice_begins(tmp_path):
    order = [2, 0, None, 2, 1]
    cells = pa.DictionaryArray.from_arrays(pa.array(order, pa.int8()), pa.array(CELLS[:3], STRUCT))
    source = open_cells(tmp_path, cells, kind="arrow")
    expected = [b"" if index is None else IMAGES[index] for index in order]
    assert read_all(source) == expected and [source.encoded(row) for row in range(5)] == expected


@pytest.mark.parametrize("layout", [pa.list_, pa.large_list, pa.list_view])
def test_an_empty_list_and_a_list_of_null_are_missing_images(tmp_path, layout):
    source = open_cells(tmp_path, pa.array([[IMAGES[0]], None, [], [None], [IMAGES[1]]], layout(pa.binary())))
    assert read_all(source) == [IMAGES[0], b"", b"", b"", IMAGES[1]] and source.read(2, 5) == [b"", b"", IMAGES[1]]


@pytest.mark.parametrize(
    "cells", [pa.array([CELLS[:1], None, CELLS[:3]]), pa.array([IMAGES[:3]], pa.list_(pa.binary(), 3)).take([0, 0, 0])]
)
def test_a_list_of_several_images_is_refused_with_its_file_and_row(tmp_path, cells):
    source = open_cells(tmp_path, cells, image_column=None)
    with pytest.raises(UserError, match=r"t\.parquet, row 2: a list of 3 images in one cell; one is .* explode the li"):
        source.encoded(2)


def test_base64_texts_are_read_in_both_alphabets_with_line_ends_and_without_padding(tmp_path):
    plain = [base64.b64encode(data).decode() for data in (*IMAGES[:2], PNG)]
    texts = [*plain, base64.urlsafe_b64encode(IMAGES[2]).decode().rstrip("="), base64.encodebytes(PNG).decode()]
    expected = [*IMAGES[:2], PNG, IMAGES[2], PNG]
    source = open_cells(tmp_path, texts)
    assert read_all(source) == expected
    structs = pa.array([{"bytes": text, "path": "x.png"} for text in texts])
    assert read_all(open_cells(tmp_path, structs)) == expected
    assert read_all(open_cells(tmp_path, pa.array(texts).dictionary_encode(), image_column=None)) == expected


def test_broken_base64_is_an_image_that_cannot_be_decoded_and_its_neighbours_are_read(tmp_path):
    text = base64.b64encode(IMAGES[0]).decode()
    good, cut, broken = read_all(open_cells(tmp_path, [text, text[:101], f"{text[:100]}!{text[100:]}"]))
    assert good == IMAGES[0] and cut not in (b"", IMAGES[0]) and broken not in (b"", IMAGES[0])


def test_data_uris_are_read_as_rfc_2397_has_them(tmp_path):
    packed = base64.b64encode(PNG).decode()
    texts = [f"data:image/png;base64,{packed}", f"DATA:;charset=utf-8;BASE64,{urllib.parse.quote(packed)}"]
    texts += [f"data:image/png,{urllib.parse.quote_from_bytes(PNG)}", "data:image/png;base64,"]
    assert read_all(open_cells(tmp_path, texts)) == [PNG, PNG, PNG, b""]
    struct = pa.array([{"bytes": None, "path": texts[0]}], STRUCT)
    assert read_all(open_cells(tmp_path, struct)) == [PNG]


def test_empty_paths_and_all_null_columns_are_missing_images(tmp_path):
    cells = [CELLS[0], {"bytes": None, "path": ""}, {"bytes": None, "path": " "}, None]
    assert read_all(open_cells(tmp_path, pa.array(cells, STRUCT))) == [IMAGES[0], b"", b"", b""]
    assert read_all(open_cells(tmp_path, pa.array(["", None], pa.string()))) == [b"", b""]
    assert read_all(open_cells(tmp_path, pa.nulls(3))) == [b"", b"", b""]
    assert read_all(open_cells(tmp_path, pa.array([{"bytes": None, "path": None}]))) == [b""]


def test_a_later_file_of_nulls_or_of_another_layout_is_read_too(tmp_path):
    layouts = [pa.nulls(2), pa.array(CELLS, STRUCT), pa.array(IMAGES[:1]), pa.array([IMAGES[2:3]]), pa.nulls(1)]
    for number, cells in enumerate(layouts):
        pq.write_table(pa.table({"image": cells}), tmp_path / f"{number}.parquet")
    source = open_source(dataset_name="parquet", data_files=str(tmp_path))
    assert read_all(source) == [b"", b"", *IMAGES[:4], IMAGES[0], IMAGES[2], b""]


def test_file_addresses_and_paths_that_are_not_utf8_are_read(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(IMAGES[0])
    with open(os.path.join(os.fsencode(tmp_path), b"\xfe.jpg"), "wb") as file:
        file.write(IMAGES[1])
    texts = pa.array([f"file://{urllib.parse.quote(str(tmp_path))}/a%20b.jpg".encode(), b"\xfe.jpg"]).view(pa.string())
    assert read_all(open_cells(tmp_path, texts)) == IMAGES[:2]


@pytest.mark.parametrize("text", ["https://example.org/a.jpg", "s3://bucket/a.jpg", "hf://datasets/me/x/a.jpg"])
def test_addresses_are_refused_as_images_must_be_local(tmp_path, text):
    for cells in (pa.array([text]), pa.array([{"bytes": None, "path": text}], STRUCT)):
        with pytest.raises(UserError, match=r"t\.parquet, row 0: '.*a.jpg' is an address; images must be local.*Downl"):
            open_cells(tmp_path, cells).encoded(0)


@pytest.mark.parametrize(
    "text, message",
    [
        (".", r"row 0: the path '\.' leads to a folder or device"),
        ("/dev/zero", "row 0: the path '/dev/zero' leads to a folder or device"),
        ("t.parquet/x.jpg", "row 0: no bytes for an image but its path 't.parquet/x.jpg', and there is no file"),
        ("x" * 5000, r"row 0: the text 'x{77}\.\.\.' is neither the path of a file nor base64"),
        (
            base64.b64encode(bytes(range(200))).decode(),
            r"row 0: the text 'AAEC.*\.\.\.' is neither the path of a file nor",
        ),
        ("a\0b", "is neither the path of a file nor base64 of an image"),
        ("d/" * 2000 + "x.jpg", "no file|neither the path"),
    ],
)
def test_a_text_that_names_no_file_is_refused_in_one_short_line(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        open_cells(tmp_path, [text]).encoded(0)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_a_missing_file_names_table_row_and_path(tmp_path):
    source = open_cells(tmp_path, ["", "gone.jpg"])
    with pytest.raises(
        MissingFileError, match=r"t\.parquet, row 1: no bytes .* 'gone.jpg', and there is no file '/.*gone"
    ):
        read_all(source)


@pytest.mark.parametrize(
    "cells",
    [
        pa.array([1, 2]),
        pa.array([[1, 2]]),
        pa.array([{"width": 3}]),
        pa.array([{"bytes": 3}]),
        pa.array([{"path": 1.5}]),
    ],
    ids=lambda cells: str(cells.type),
)
def test_a_later_file_whose_column_holds_no_images_is_refused_by_name_and_type(tmp_path, cells):
    pq.write_table(pa.table({"image": pa.array(CELLS, STRUCT)}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"image": cells}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: image_column 'image' is (int64|list|struct).*; images are bytes"):
        open_source(dataset_name="parquet", data_files=str(tmp_path))


def test_views_of_dictionary_and_list_cells_outlive_their_window(tmp_path):
    cells = pa.array([[data] for data in IMAGES * 3], pa.list_(pa.dictionary(pa.int32(), pa.binary())))
    source = open_cells(tmp_path, cells)
    views = source.read_views(0, 5)
    read_all(source)
    assert [bytes(view) for view in views] == IMAGES[:5]
    assert np.all([len(view) for view in views])
