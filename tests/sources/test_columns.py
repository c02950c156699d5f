"""Which columns are taken for images and labels, and what tables and labels are refused."""

import base64
import decimal
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as encryption
import pytest

from distillery.sources.registry import open_source
from distillery.system.errors import UserError
from tests.sources.test_registry import IMAGES

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CELLS = pa.array([{"bytes": data, "path": None} for data in IMAGES[:4]], STRUCT)
BYTES = pa.array(IMAGES[:4])
VECTORS = pa.array([bytes([at]) * 64 for at in range(4)])
SOUNDS = pa.array([{"bytes": b"RIFF0000WAVE", "path": "a.wav"}] * 4, STRUCT)
PATHS = pa.array([f"imgs/{at}.jpg" for at in range(4)])
WORDS = pa.array(["a cat.", "a dog", "two eels", ""])


def open_table(tmp_path, columns, name="a.parquet", features=None, **arguments):
    names, arrays = zip(*columns, strict=True)
    table = pa.Table.from_arrays(list(arrays), names=list(names))
    if features:
        info = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": info})
    pq.write_table(table, tmp_path / name)
    return open_source(dataset_name="parquet", data_files=str(tmp_path / "*.parquet"), **arguments)


def chosen(tmp_path, *columns, **arguments):
    return open_table(tmp_path, columns, **arguments).identity["image_column"]


def test_bytes_with_paths_come_before_bare_bytes_and_texts(tmp_path):
    image = ("image", CELLS)
    assert chosen(tmp_path, ("vector", VECTORS), image) == "image"
    assert chosen(tmp_path, ("thumbnail", BYTES), image) == "image"
    assert chosen(tmp_path, ("file_name", PATHS), image) == "image"
    nothing_yet = pa.array([None] * 4, STRUCT)
    assert chosen(tmp_path, ("file_name", PATHS), ("image", nothing_yet)) == "image"


def test_among_columns_of_bytes_the_one_whose_first_cells_are_images_is_taken(tmp_path):
    late = pa.array([None, None, *IMAGES[:2]])
    assert chosen(tmp_path, ("vector", VECTORS), ("picture", late), ("caption", WORDS)) == "picture"
    assert chosen(tmp_path, ("sound", SOUNDS), ("image", CELLS)) == "image"
    assert chosen(tmp_path, ("sound", SOUNDS), ("picture", BYTES)) == "picture"
    assert chosen(tmp_path, ("vector", VECTORS), ("file_name", PATHS)) == "file_name"
    assert chosen(tmp_path, ("vector", VECTORS), ("tags", pa.array([["a", "b"]] * 4)), ("p", BYTES)) == "p"


def test_the_first_cells_of_later_files_count_where_the_first_file_has_none(tmp_path):
    pq.write_table(pa.table({"vector": VECTORS[:0], "picture": BYTES[:0]}), tmp_path / "0.parquet")
    assert chosen(tmp_path, ("vector", VECTORS), ("picture", BYTES)) == "picture"


def test_several_columns_of_images_are_listed_and_image_column_is_asked_for(tmp_path):
    for columns in [[("left", BYTES), ("right", BYTES)], [("one", PATHS), ("two", PATHS)],
                    [("vector", VECTORS), ("hash", VECTORS)]]:  # fmt: skip
        names = rf"{columns[0][0]} \(.*\), {columns[1][0]} \(.*\)\. Choose one with image_column: {columns[0][0]}"
        with pytest.raises(UserError, match=f"several columns may hold the images: {names}"):
            open_table(tmp_path, columns)
        assert chosen(tmp_path, *columns, image_column=columns[1][0]) == columns[1][0]


def test_a_single_column_is_taken_whatever_its_first_cells_are(tmp_path):
    assert chosen(tmp_path, ("data", VECTORS), ("size", pa.array([1] * 4))) == "data"


def test_the_first_of_several_image_features_is_taken_unless_its_cells_are_no_images(tmp_path):
    features = {name: {"_type": "Image"} for name in ("left", "right")}
    assert chosen(tmp_path, ("left", BYTES), ("right", CELLS), features=features) == "left"
    assert chosen(tmp_path, ("left", VECTORS), ("right", CELLS), features=features) == "right"


def test_texts_are_taken_where_they_alone_name_images_and_addresses_are_refused(tmp_path):
    assert chosen(tmp_path, ("caption", WORDS), ("file_name", PATHS)) == "file_name"
    packed = pa.array([base64.b64encode(data).decode() for data in IMAGES[:4]])
    assert chosen(tmp_path, ("caption", WORDS), ("b64", packed)) == "b64"
    urls = pa.array(["https://example.org/1.jpg"] * 4)
    with pytest.raises(UserError, match="no column holds images. 'url' holds addresses: images must be local"):
        open_table(tmp_path, [("caption", WORDS), ("url", urls)])


@pytest.mark.parametrize("name", ["image", "label"])
def test_two_columns_of_one_name_are_refused_in_every_file(tmp_path, name):
    columns = [("image", CELLS), ("label", pa.array([0, 1, 2, 3]))]
    open_table(tmp_path, columns, "a.parquet", label_column="label")
    twice = [*columns, next(column for column in columns if column[0] == name)]
    with pytest.raises(UserError, match=rf"b\.parquet: 2 columns are called '{name}'\. Rename all but one"):
        open_table(tmp_path, twice, "b.parquet", label_column="label")


def test_doubled_and_dotted_names_of_other_columns_do_no_harm(tmp_path):
    others = [("id", VECTORS), ("image.bytes", VECTORS), ("label.old", pa.array([9] * 4)), ("id", VECTORS)]
    columns = [*others, ("image", BYTES), ("label", pa.array([3, 2, 1, 0]))]
    source = open_table(tmp_path, columns, image_column="image", label_column="label")
    assert source.read(0, 4) == IMAGES[:4] and source.labels(0, 4).tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize(
    "labels, expected",
    [
        (pa.array([1.0, None, float("nan"), 2.0]), [1, -1, -1, 2]),
        (pa.array([True, False, None, True]), [1, 0, -1, 1]),
        (pa.array([decimal.Decimal("3.00"), None, decimal.Decimal("0.00"), decimal.Decimal("7.00")]), [3, -1, 0, 7]),
        (pa.array([2**63 - 1, 0, 1, None], pa.uint64()), [2**63 - 1, 0, 1, -1]),
        (pa.nulls(4), [-1] * 4),
    ],
    ids=lambda labels: str(getattr(labels, "type", "")),
)
def test_whole_numbers_of_any_type_are_labels_and_what_is_missing_is_minus_one(tmp_path, labels, expected):
    source = open_table(tmp_path, [("image", CELLS), ("label", labels)], label_column="label")
    assert source.labels(0, 4).tolist() == expected


@pytest.mark.parametrize(
    "labels, message",
    [
        (pa.array([0, 1, 2, 2**63], pa.uint64()), "the label '9223372036854775808' does not fit into 64 bits"),
        (pa.array([0.0, 1e300, 2.0, 3.0]), "the label .1e.300. does not fit into 64 bits"),
        (pa.array([0.0, 1.5, 2.0, 3.0]), "labels must be all integers or all texts; found float '1.5'"),
        (pa.array([0.0, float("inf"), 2.0, 3.0]), "labels must be all integers or all texts; found float 'inf'"),
        (pa.array([decimal.Decimal("1.5")] * 4), "labels must be all integers or all texts; found Decimal '1.5'"),
        (pa.array([b"\xff"] * 4).view(pa.string()), "a label is not UTF-8 text"),
        (pa.array([[1]] * 4), r"label_column 'label' is list<.*>; labels are integers or texts"),
        (VECTORS, "label_column 'label' is binary; labels are integers or texts"),
    ],
    ids=lambda labels: str(getattr(labels, "type", "")),
)
def test_what_is_no_label_is_refused_with_its_file_and_the_value(tmp_path, labels, message):
    with pytest.raises(UserError, match=rf"a\.parquet: {message}"):
        open_table(tmp_path, [("image", CELLS), ("label", labels)], label_column="label").labels(0, 4)


def test_labels_whose_types_differ_between_files_are_read_if_all_are_numbers(tmp_path):
    for number, labels in enumerate([pa.array([0, 1], pa.int8()), pa.array([2.0, None]), pa.array([True, None])]):
        columns = [("image", CELLS[:2]), ("label", labels)]
        source = open_table(tmp_path, columns, f"{number}.parquet", label_column="label")
    assert source.labels(0, 6).tolist() == [0, 1, 2, -1, 1, -1]
    columns = [("image", CELLS[:2]), ("label", pa.array(["cat", "dog"]))]
    source = open_table(tmp_path, columns, "3.parquet", label_column="label")
    with pytest.raises(UserError, match=r"found int in .*0\.parquet and str in .*3\.parquet"):
        source.labels(0, 1)


def test_a_message_about_a_wide_table_stays_short(tmp_path):
    wide = pa.struct([(f"field{at}", pa.int64()) for at in range(300)])
    columns = [(f"column{at}", pa.nulls(1, wide)) for at in range(40)]
    with pytest.raises(UserError, match="and 28 more") as caught:
        open_table(tmp_path, columns)
    assert len(str(caught.value)) < 1500


class PlainKeys(encryption.KmsClient):
    """Hands out the keys it is given, packed."""

    def __init__(self, _connection):
        encryption.KmsClient.__init__(self)

    def wrap_key(self, key_bytes, _master_key):
        return base64.b64encode(key_bytes)


def write_encrypted(path, table, columns, plaintext_footer):
    settings = encryption.EncryptionConfiguration(
        footer_key="footer", column_keys={"key": columns}, plaintext_footer=plaintext_footer
    )
    factory = encryption.CryptoFactory(PlainKeys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
        writer.write_table(table)


@pytest.mark.parametrize("columns, plaintext_footer", [(["image"], False), (["image"], True), (["label"], True)])
def test_encrypted_files_and_columns_are_refused_in_one_line(tmp_path, columns, plaintext_footer):
    table = pa.table({"image": BYTES, "label": [0, 1, 2, 3]})
    write_encrypted(tmp_path / "a.parquet", table, columns, plaintext_footer)
    with pytest.raises(UserError, match=rf"a\.parquet: .*({columns[0]}' )?is encrypted") as caught:
        open_source(dataset_name="parquet", data_files=str(tmp_path), label_column="label")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_encrypted_columns_that_are_not_asked_for_do_no_harm(tmp_path):
    table = pa.table({"image": CELLS, "label": [0, 1, 2, 3]})
    write_encrypted(tmp_path / "a.parquet", table, ["label"], plaintext_footer=True)
    source = open_source(dataset_name="parquet", data_files=str(tmp_path))
    assert source.read(0, 4) == IMAGES[:4]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize(
    "data", [b"", b"PAR", b"PAR1" + bytes(50) + b"\x10\0\0\0PAR1", b"ARROW1\0\0", b"FEA1" + bytes(90)]
)
def test_empty_files_and_stumps_are_named_in_one_line(tmp_path, kind, data):
    (tmp_path / f"x.{kind}").write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.{kind}: not an? {kind} file, or damaged") as caught:
        open_source(dataset_name=kind, data_files=str(tmp_path))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_a_parquet_file_cut_anywhere_is_named(tmp_path):
    open_table(tmp_path, [("image", CELLS)], "b.parquet")
    data = (tmp_path / "b.parquet").read_bytes()
    for end in range(0, len(data), len(data) // 20):
        (tmp_path / "b.parquet").write_bytes(data[:end])
        with pytest.raises(UserError, match=r"b\.parquet: not a parquet file, or damaged"):
            open_source(dataset_name="parquet", data_files=str(tmp_path))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_column_names_that_are_no_text_are_damage(tmp_path, kind):
    path, table = tmp_path / f"a.{kind}", pa.table({"image": CELLS, "zqzqzq": [1, 2, 3, 4]})
    if kind == "parquet":
        pq.write_table(table, path, store_schema=False)
    else:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)
    path.write_bytes(path.read_bytes().replace(b"zqzqzq", b"zq\xff\xffzq"))
    with pytest.raises(UserError, match=rf"a\.{kind}: not an? {kind} file, or damaged"):
        open_source(dataset_name=kind, data_files=str(path))
