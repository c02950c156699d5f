"""Read metadata.csv, .jsonl and .parquet of an image folder: the files of its rows, and their labels.

Source: datasets, packaged_modules/folder_based_builder.
"""

import hashlib
import io
import json
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distillery.sources.columns import LABEL_NAMES, MASK_NAMES
from distillery.system.errors import MissingFileError, UserError

FILE_NAME = "file_name"


@dataclass(frozen=True)
class MetadataFile:
    """Where one lies and how to read it.

    Args:
        name: of the file, absolute with forward slashes; of a member of an archive, below the archive's name.
        read: its bytes.
    """

    name: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Listing:
    """The rows of an image folder by its metadata.

    Args:
        rows: for every row, the position of its image in the list of the folder's images.
        label_column: the column that holds `labels`; None: no labels wanted.
        labels: for every row, None where it has none; of masks, their positions in the list of the folder's images.
        identity: what identifies the metadata.
    """

    rows: list[int]
    label_column: str | None
    labels: list
    identity: dict


def list_rows(
    files: Sequence[MetadataFile],
    images: Sequence[str],
    *,
    image_column: str | None,
    label_column: str | None,
    labels_required: bool,
    left_out: Counter[str],
    mask_column: str | None = None,
    masks_required: bool = False,
) -> Listing | None:
    """The rows that metadata files give, in their order; None where none lists images with these labels or masks.

    Args:
        files: in the order of their rows.
        images: names of all images, as those of the metadata files.
        image_column: "image" or None for the column file_name, "mask" for mask_file_name.
        label_column: None: by a usual name, if labels_required.
        labels_required: whether labels are wanted.
        left_out: what is passed over is added here.
        mask_column: "mask" for the column mask_file_name or mask; None: by a usual name, if masks_required.
        masks_required: whether files of masks are wanted, in the place of labels.
    Raises:
        UserError: a file cannot be read or has other columns than the first.
        MissingFileError: a file is listed that is not there.
    """
    folders = Counter(posixpath.dirname(file.name) for file in files)
    twice = next((folder for folder, number in folders.items() if number > 1), None)
    if twice is not None:
        raise UserError(f"{twice} has several metadata files, which would list its images twice; rename all but one.")
    texts = [file.read() for file in files]
    tables = [_parse(file.name, text) for file, text in zip(files, texts, strict=True)]
    wanted = LABEL_NAMES if labels_required and label_column is None else [label_column] if label_column else []
    if masks_required:
        names = MASK_NAMES if mask_column is None else [mask_column]
        wanted = [*(f"{name}_{FILE_NAME}" for name in names), *names]
    chosen = [_columns_of(table, image_column, wanted) for table in tables]
    if all(columns is None for columns in chosen):
        if not masks_required:
            _check_names(files[0].name, tables[0], image_column, label_column)
        missing = "mask" if masks_required else "label"
        left_out[f"metadata files (without the columns file_name and {missing})"] += len(files)
        return None
    position = {posixpath.normpath(name): row for row, name in enumerate(images)}
    digest = hashlib.sha256()
    rows: list[int] = []
    labels: list = []
    for file, text, table, columns in zip(files, texts, tables, chosen, strict=True):
        if columns is None or columns != chosen[0]:
            raise UserError(
                f"{file.name} has the columns {_listing(table)}; {files[0].name} has {_listing(tables[0])}. "
                "All metadata files of a folder need the same columns."
            )
        file_column, found_label = columns
        digest.update(hashlib.sha256(text).digest())
        for place, path in enumerate(table[file_column]):
            row = _row_of(file.name, path, position, left_out)
            if row is None:
                continue
            label = table[found_label][place] if found_label is not None else None
            if masks_required:
                label = _row_of(file.name, label, position, left_out)
                if label is None:
                    left_out["images without a mask"] += 1
                    continue
            rows.append(row)
            labels.append(label)
    if not rows:
        raise UserError(f"{files[0].name} lists no image of this split.")
    if chosen[0][1] is not None and all(label is None for label in labels):
        raise UserError(f"{files[0].name}: no row has a label in the column {chosen[0][1]!r}.")
    left_out["images that no metadata file lists"] += len(images) - len({*rows, *(labels if masks_required else ())})
    identity = {"count": len(files), "file_column": chosen[0][0], "hash": f"sha256:{digest.hexdigest()}"}
    return Listing(rows, chosen[0][1], labels, identity)


def _row_of(metadata: str, path: object, position: dict[str, int], left_out: Counter[str]) -> int | None:
    """The image that a cell of a metadata file names."""
    if path is None or path == "":
        left_out["rows of metadata without a file"] += 1
        return None
    relative = str(path).replace("\\", "/")
    folder = posixpath.dirname(metadata)
    full = posixpath.normpath(posixpath.join(folder, relative))
    if not full.startswith(f"{folder.rstrip('/')}/") or "://" in relative:
        raise UserError(f"{metadata}: {FILE_NAME} {str(path)[:200]!r} is no path below the folder of that file.")
    if full in position:
        return position[full]
    if not os.path.exists(full):
        raise MissingFileError(f"{metadata} lists {str(path)[:200]!r}, and there is no such image below {folder}.")
    left_out["listed files of another split or kind"] += 1
    return None


def _columns_of(
    table: dict[str, list], image_column: str | None, label_names: Sequence[str]
) -> tuple[str, str | None] | None:
    """(column of the files, column of the labels or masks) of one metadata file, None where it has no such.

    label_names: the first that is there is taken; empty: none is wanted.
    """
    prefix = "image" if image_column is None else image_column
    names = [f"{prefix}_{FILE_NAME}", *([FILE_NAME] if prefix == "image" else [])]
    if image_column is None:
        names += (name for name in table if _is_file_column(name) and name not in label_names)
    label_column = next((name for name in label_names if name in table), None)
    file_column = next((name for name in names if name in table), None)
    labels_missing = bool(label_names) and label_column is None
    return None if file_column is None or labels_missing else (file_column, label_column)


def _is_file_column(name: str) -> bool:
    return name == FILE_NAME or name.endswith(f"_{FILE_NAME}")


def _check_names(name: str, table: dict[str, list], image_column: str | None, label_column: str | None) -> None:
    """Raise UserError where metadata is meant that cannot be used, rather than a file of another purpose."""
    if label_column in table or any(FILE_NAME in column and not _is_file_column(column) for column in table):
        wanted = FILE_NAME if image_column in (None, "image") else f"{image_column}_{FILE_NAME}"
        raise UserError(f"{name}: there is no column {wanted!r}. The columns are: {_listing(table)}.")
    if label_column not in (None, "label"):
        raise UserError(
            f"{name}: there is no label_column {label_column!r}. The columns are: {_listing(table)}. "
            "For the names of the folders write label_column: label"
        )


def _listing(table: dict[str, list]) -> str:
    text = ", ".join(table)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _parse(name: str, data: bytes) -> dict[str, list]:
    """The columns of a metadata file.

    Raises:
        UserError: it is not of the format that its name says.
    """
    import pyarrow as pa

    parse = {".csv": _parse_csv, ".jsonl": _parse_json_lines, ".parquet": _parse_parquet}[posixpath.splitext(name)[1]]
    try:
        return parse(data)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise UserError(f"{name} cannot be read: {' '.join(str(error).split())[:200]}") from error


def _parse_csv(data: bytes) -> dict[str, list]:
    import pyarrow as pa
    from pyarrow import csv

    header = csv.open_csv(io.BytesIO(data), parse_options=csv.ParseOptions(newlines_in_values=True)).schema.names
    paths = {name: pa.string() for name in header if name.endswith(FILE_NAME)}

    def read(types: dict) -> pa.Table:
        return csv.read_csv(
            io.BytesIO(data),
            parse_options=csv.ParseOptions(newlines_in_values=True),
            # only an empty cell is none: a class may be called "NA" or "null"
            convert_options=csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=[""]),
        )

    table = read(paths)
    # a class may be called 2020-01-01 or 12:30
    if dates := {field.name: pa.string() for field in table.schema if pa.types.is_temporal(field.type)}:
        table = read(paths | dates)
    return _columns(table)


def _parse_parquet(data: bytes) -> dict[str, list]:
    import pyarrow.parquet as pq

    return _columns(pq.read_table(io.BytesIO(data)))


def _columns(table: object) -> dict[str, list]:
    twice = [name for name, number in Counter(table.column_names).items() if number > 1]
    if twice:
        raise ValueError(f"the column {twice[0]!r} is there twice")
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _parse_json_lines(data: bytes) -> dict[str, list]:
    rows = []
    # not splitlines: inside a text, JSON may hold characters that it takes for ends of lines
    for number, line in enumerate(data.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is no object")
            rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}
