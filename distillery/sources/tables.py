"""Read images in place from the cells of parquet and arrow files."""

import contextlib
import copy
import itertools
import json
import os
import re
import struct
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillery.sources.base import Source
from distillery.sources.cells import Encoded, Place, Value, evidence_of, images_of, is_relative_path, shorten, values_of
from distillery.sources.columns import (
    check_columns,
    feature_of,
    features_of,
    find_image_column,
    find_label_column,
    find_mask_column,
    labels_in,
    number_all_labels,
    types_of,
)
from distillery.sources.listing import FileList, check_split, map_files, scan_folder
from distillery.system.errors import MissingFileError, RunError, UserError

# more would be no faster, and from 64 MiB on slower: fresh memory costs a page fault for every 4 KiB
_WINDOW_BYTES = 8 << 20
_LABELS_AT_ONCE = 1 << 16
# rows read at a time, and their first values, that tell whether a column holds images
_LOOK_ROWS, _LOOK_VALUES = 64, 8
_REASON_CHARACTERS = 300


class UnreadableError(RunError, OSError):
    """The data of a file that could be opened cannot be read: damaged, or the disk's error."""


@dataclass(frozen=True)
class TableFacts:
    """What a file says of itself: rows, pyarrow schema, whether some of its columns are encrypted."""

    num_rows: int
    schema: object
    has_encrypted_columns: bool = False


@dataclass(frozen=True)
class Beside:
    """What was converted into arrow files, and where the paths in their cells begin.

    Args:
        folders: one for each file; None: the images are not on this machine.
        shown: what messages call each file.
        identity: of the files before the conversion; None where they are elsewhere.
    """

    folders: list[str | None]
    shown: list[str]
    identity: dict | None


class TableSource(Source):
    """Rows of several files with one image column; an image is bytes, or the path of a file beside its table.

    Args:
        split: for the plan and the identity.
        image_column, label_column: None: found by their types; labels only if `labels_required`.
        mask_column: None: found by its type and name if `masks_required`, else there are no masks.
        features: what a data set's card says about the columns, in the form of datasets' Features.to_dict().
        origin: what else identifies the rows (hub name, revision).
        beside: of converted files; None: relative paths begin in the file's own folder.
    """

    kind: str
    suffixes: tuple[str, ...]

    def __init__(
        self,
        files: FileList,
        *,
        split: str,
        image_column: str | None = None,
        label_column: str | None = None,
        labels_required: bool = False,
        mask_column: str | None = None,
        masks_required: bool = False,
        features: dict | None = None,
        origin: dict | None = None,
        beside: Beside | None = None,
    ) -> None:
        self._paths = [files.path(index) for index in range(len(files))]
        self._folders = list(map(os.path.dirname, self._paths)) if beside is None else beside.folders
        self._shown = self._paths if beside is None else beside.shown
        facts = map_files(self._inspect, self._paths)
        self._starts = np.concatenate([[0], np.cumsum([one.num_rows for one in facts])]).astype(np.int64)
        features = features or features_of(facts[0].schema)
        self._mask_column = None
        if masks_required:
            kinds, where = types_of(one.schema for one in facts), self._shown[0]
            self._mask_column = find_mask_column(kinds, features, image_column, mask_column, where, self._look)
        self._find_columns(facts, features, image_column, label_column, labels_required)
        self._labels: np.ndarray | None = None
        identity = {
            "kind": self.kind,
            "split": split,
            "image_column": self._image_column,
            "label_column": self._label_column,
            "num_rows": int(self._starts[-1]),
            "files": files.identity(with_ends=True),
            **({} if self._mask_column is None else {"mask_column": self._mask_column}),
            **(origin or {}),
        }
        super().__init__(identity, int(files.sizes.sum()), files.left_out())
        if self._mask_column is not None:
            self._masks = copy.copy(self)
            self._masks._image_column = self._mask_column

    def _find_columns(
        self,
        facts: list[TableFacts],
        features: dict,
        image_column: str | None,
        label_column: str | None,
        labels_required: bool,
    ) -> None:
        kinds, where = types_of(one.schema for one in facts), self._shown[0]
        kinds.pop(self._mask_column, None)
        self._image_column = find_image_column(kinds, features, image_column, where, self._look)
        self._label_column = find_label_column(kinds, features, label_column, labels_required, where)
        self._names = feature_of(features, self._label_column).get("names")
        self.named_by_feature = self._names is not None
        schemas = {shown: one.schema for shown, one in zip(self._shown, facts, strict=True)}
        for path, shown, one in zip(self._paths, self._shown, facts, strict=True):
            check_columns(schemas, shown, self._image_column, self._label_column, self._mask_column)
            if one.has_encrypted_columns:
                self._check_readable(path)

    def _first_values(self, column: str) -> list[Value]:
        """What the first cells of a column hold that are not missing."""
        for path in self._paths:
            with _reading(path):
                for cells in self._column(path, column, _LOOK_ROWS):
                    values = [value for value in values_of(cells) if value]
                    if values:
                        return values[:_LOOK_VALUES]
        return []

    def _look(self, column: str) -> str | None:
        return evidence_of(self._first_values(column))

    def begins_with_a_relative_path(self) -> bool:
        """Whether the first images or masks are files named relative to a folder."""
        columns = filter(None, (self._image_column, self._mask_column))
        return any(is_relative_path(value) for column in columns for value in self._first_values(column))

    def _check_readable(self, path: str) -> None:
        for column in filter(None, (self._image_column, self._label_column, self._mask_column)):
            try:
                next(self._column(path, column, 1), None)
            except OSError as error:
                raise UserError(
                    f"{path}: column {column!r} is encrypted ({_reason(error)}). Write the file again without it."
                ) from error

    @property
    def class_names(self) -> list[str] | None:
        """The names of a ClassLabel, or the sorted distinct texts of a column of texts."""
        if self._names is None and self._label_column is not None:
            self._all_labels()
        return self._names

    def _read(self, start: int, stop: int) -> list[bytes]:
        return list(map(bytes, self._read_views(start, stop)))

    def _read_views(self, start: int, stop: int) -> list[Encoded]:
        images: list[Encoded] = []
        while start < stop:
            file = int(np.searchsorted(self._starts, start, side="right")) - 1
            first, end = int(self._starts[file]), min(stop, int(self._starts[file + 1]))
            place = Place(self._shown[file], self._image_column, self._folders[file])
            row = start - first
            with _reading(self._paths[file]):
                for cells in self._cells(file, row, end - first):
                    images += images_of(cells, place, row)
                    row += len(cells)
            start = end
        return images

    def _all_labels(self) -> np.ndarray | None:
        if self._label_column is None or self._labels is not None:
            return self._labels
        parts = list(map(self._labels_of, self._paths, self._shown))
        self._labels, names = number_all_labels(parts, self._shown, self._label_column)
        self._names = self._names if names is None else names
        return self._labels

    def _labels_of(self, path: str, shown: str) -> list[int | str | None]:
        where = f"column {self._label_column!r} of {shown}"
        with _reading(path):
            parts = [labels_in(cells, where) for cells in self._column(path, self._label_column, _LABELS_AT_ONCE)]
        return list(itertools.chain.from_iterable(parts))

    @abstractmethod
    def _inspect(self, path: str) -> TableFacts:
        """What a file says of itself, without reading its data."""

    @abstractmethod
    def _cells(self, file: int, start: int, stop: int) -> Iterator[object]:
        """Arrays that together hold the image cells start..stop-1 of one file."""

    @abstractmethod
    def _column(self, path: str, column: str, num_rows: int) -> Iterator[object]:
        """Arrays that together hold one column of a file, from its beginning, read about num_rows at a time."""


class ParquetSource(TableSource):
    """Parquet files: opened by their footers, read one window of a row group at a time, only the image column.

    A window is a row group, or about 8 MiB of it: some files are a single group of many gigabytes.
    """

    kind = "parquet"
    suffixes = (".parquet",)

    def _inspect(self, path: str) -> TableFacts:
        import pyarrow as pa
        import pyarrow.parquet as pq

        tail = _last_bytes(path, 8)
        if tail.endswith(b"PARE"):
            raise UserError(f"{path}: this parquet file is encrypted. Decrypt it: write it again without encryption.")
        try:
            with pq.ParquetFile(path) as file:
                # behind the footer of a file with encrypted columns follows a signature
                is_signed = file.metadata.serialized_size != struct.unpack("<I", tail[:4])[0]
                _check_names(file.schema_arrow)
                return TableFacts(file.metadata.num_rows, file.schema_arrow, is_signed)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise UserError(f"{path}: not a parquet file, or damaged ({_reason(error)}).") from error

    def _cells(self, file: int, start: int, stop: int) -> Iterator[object]:
        while start < stop:
            first, window = self._window_with(file, start)
            end = min(stop, first + len(window))
            yield window.slice(start - first, end - start)
            start = end

    def _window_with(self, file: int, row: int) -> tuple[int, object]:
        """(the row of the file it begins with, its image cells) of the window that holds `row`."""
        handles = self._handles
        if handles.get("file") != file:
            handles.clear()
            handles.update(file=file, reader=self._open(self._paths[file]), group=None)
            metadata = handles["reader"].metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            handles["group_starts"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        group = int(np.searchsorted(handles["group_starts"], row, side="right")) - 1
        if handles["group"] != group or row < handles["first"]:
            handles.update(group=group, windows=self._windows_of(handles["reader"], group), window=[])
            handles["first"] = int(handles["group_starts"][group])
        while row >= handles["first"] + len(handles["window"]):
            handles["first"] += len(handles["window"])
            # released first: two windows at once would double the memory
            handles["window"] = []
            handles["window"] = next(handles["windows"], None)
            if handles["window"] is None:
                raise OSError(f"{self._paths[file]}: row group {group} has fewer rows than its footer says: damaged.")
        return handles["first"], handles["window"]

    def _open(self, path: str) -> object:
        import pyarrow.parquet as pq

        # buffered: otherwise a whole column chunk is read into memory at once
        return pq.ParquetFile(path, buffer_size=4 << 20, pre_buffer=False)

    def _windows_of(self, reader: object, group: int) -> Iterator[object]:
        metadata, schema = reader.metadata.row_group(group), reader.schema
        # by the schema: to look at the metadata of an encrypted column ends the process
        own = [
            index
            for index in range(metadata.num_columns)
            if f"{schema.column(index).path}.".startswith(f"{self._image_column}.")
        ]
        num_bytes = sum(metadata.column(index).total_uncompressed_size for index in own)
        rows = max(1, min(metadata.num_rows, metadata.num_rows * _WINDOW_BYTES // max(1, num_bytes)))
        yield from _batches(reader, self._image_column, rows, row_groups=[group])

    def _column(self, path: str, column: str, num_rows: int) -> Iterator[object]:
        with self._open(path) as reader:
            yield from _batches(reader, column, num_rows)


def _batches(reader: object, column: str, num_rows: int, **which: list[int]) -> Iterator[object]:
    # by name: for the column "a", the reader also returns columns called "a.b"
    for batch in reader.iter_batches(num_rows, columns=[column], use_threads=False, **which):
        yield batch.column(column)


class ArrowSource(TableSource):
    """Arrow files, stream or file format, as Hugging Face's datasets writes them; memory-mapped, nothing is copied."""

    kind = "arrow"
    suffixes = (".arrow",)

    def _inspect(self, path: str) -> TableFacts:
        table = _map_table(path)
        return TableFacts(table.num_rows, table.schema)

    def _cells(self, file: int, start: int, stop: int) -> Iterator[object]:
        if file not in self._handles:
            self._handles[file] = _map_table(self._paths[file])
        yield from self._handles[file].column(self._image_column).slice(start, stop - start).chunks

    def _column(self, path: str, column: str, num_rows: int) -> Iterator[object]:
        for chunk in _map_table(path).column(column).chunks:
            yield from (chunk.slice(start, num_rows) for start in range(0, len(chunk), num_rows))


def _map_table(path: str) -> object:
    import pyarrow as pa

    try:
        source = pa.memory_map(path)
        try:
            table = pa.ipc.open_file(source).read_all()
        except (pa.ArrowException, OSError):
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        _check_names(table.schema)
        return table
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # an OSError where it ends too early
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path}: not an arrow file, or damaged ({_reason(error)}).") from error


def _check_names(schema: object) -> None:
    """Raise the UnicodeDecodeError of column names that are no text here, where the file is at hand."""
    _ = schema.names


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """Name the file whose data cannot be read."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UnreadableError(f"{path} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), _REASON_CHARACTERS)[1:-1]


def _last_bytes(path: str, count: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - count))
        return file.read(count)


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by datasets' save_to_disk."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_dataset_files(folder: Path, split: str) -> FileList:
    """The arrow files of a folder written by save_to_disk, in the order its state.json gives.

    A folder of one Dataset has the split that it was loaded as, "train" where that is not known.

    Raises:
        UserError: there is no such split.
    """
    if is_dict := (folder / "dataset_dict.json").is_file():
        check_split(split, json.loads((folder / "dataset_dict.json").read_text())["splits"], str(folder))
        folder = folder / split
    state = json.loads((folder / "state.json").read_text())
    if not is_dict:
        # of a part, such as train[:80%], the split that it is from
        check_split(split, re.split(r"[\[+]", state.get("_split") or "train")[:1], str(folder))
    names = [entry["filename"] for entry in state["_data_files"]]
    if not names:
        return scan_folder(folder, ArrowSource.suffixes)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(f"{folder}: state.json names {missing[0]}, which is not there.")
    sizes = np.array([(folder / name).stat().st_size for name in names], np.int64)
    return FileList(os.path.abspath(folder), names, sizes)
