"""Images in the cells of parquet and arrow files, read in place."""

import json
import os
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from distillery.process import MissingFileError, UserError
from distillery.sources_base import FileList, Source, map_files, number_labels, scan_folder
from distillery.sources_columns import feature_of, features_of, find_image_column, find_label_column, is_text

# more would be no faster, and from 64 MiB on slower: fresh memory costs a page fault for every 4 KiB
_WINDOW_BYTES = 8 << 20


class TableSource(Source):
    """Rows of several files with one image column; an image is bytes, or the path of a file beside its table.

    Args:
        split: for the plan and the identity.
        image_column, label_column: None: found by their types; labels only if `labels_required`.
        features: what a data set's card says about the columns, in the form of datasets' Features.to_dict().
        origin: what else identifies the rows (hub name, revision).
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
        features: dict | None = None,
        origin: dict | None = None,
    ) -> None:
        self._paths = [files.path(index) for index in range(len(files))]
        inspected = map_files(self._inspect, self._paths)
        self._starts = np.concatenate([[0], np.cumsum([rows for rows, _ in inspected])]).astype(np.int64)
        schema = inspected[0][1]
        features = features or features_of(schema)
        self._image_column = find_image_column(schema, features, image_column, self._paths[0])
        self._label_column = find_label_column(schema, features, label_column, labels_required, self._paths[0])
        for path, (_, other) in zip(self._paths, inspected, strict=True):
            for column in (self._image_column, self._label_column):
                if column is not None and column not in other.names:
                    raise UserError(f"{path}: there is no column {column!r}, which {self._paths[0]} has.")
        self._labels: np.ndarray | None = None
        self._names = feature_of(features, self._label_column).get("names")
        self.named_by_feature = self._names is not None
        identity = {
            "kind": self.kind,
            "split": split,
            "image_column": self._image_column,
            "label_column": self._label_column,
            "num_rows": int(self._starts[-1]),
            "files": files.identity(with_ends=True),
            **(origin or {}),
        }
        super().__init__(identity, int(files.sizes.sum()), files.left_out())

    @property
    def class_names(self) -> list[str] | None:
        """The names of a ClassLabel, or the sorted distinct texts of a column of texts."""
        if self._names is None and self._label_column is not None:
            self._all_labels()
        return self._names

    def _read(self, start: int, stop: int) -> list[bytes]:
        return list(map(bytes, self._read_views(start, stop)))

    def _read_views(self, start: int, stop: int) -> list[bytes | memoryview]:
        import pyarrow as pa

        images: list[bytes | memoryview] = []
        while start < stop:
            file = int(np.searchsorted(self._starts, start, side="right")) - 1
            first, end = int(self._starts[file]), min(stop, int(self._starts[file + 1]))
            try:
                for cells in self._cells(file, start - first, end - first):
                    images += self._images_of(cells, self._paths[file])
            except MissingFileError:
                raise
            except (pa.ArrowException, OSError) as error:
                raise OSError(f"{self._paths[file]} cannot be read: {error}") from error
            start = end
        return images

    def _images_of(self, cells: object, table_path: str) -> list[bytes | memoryview]:
        """The encoded images of a pyarrow array of cells: bytes, {bytes, path} or path."""
        import pyarrow as pa

        paths: list[str | None] = [None] * len(cells)
        data: list[bytes | memoryview | None] = [None] * len(cells)
        if pa.types.is_struct(cells.type):
            # flatten, not field: only this takes the struct's own nulls and offset into account
            columns = dict(zip([field.name for field in cells.type], cells.flatten(), strict=True))
            data = _views(columns["bytes"]) if "bytes" in columns else data
            if None in data and "path" in columns:
                paths = columns["path"].to_pylist()
        elif is_text(cells.type):
            paths = cells.to_pylist()
        else:
            data = _views(cells)
        return [
            one if one is not None else b"" if path is None else _read_beside(table_path, path)
            for one, path in zip(data, paths, strict=True)
        ]

    def _all_labels(self) -> np.ndarray | None:
        if self._label_column is None or self._labels is not None:
            return self._labels
        where = f"column {self._label_column!r} of {self._paths[0]}"
        values: list = []
        for path in self._paths:
            column = self._label_cells(path)
            values += column.to_pylist()
        self._labels, names = number_labels(values, where)
        self._names = self._names if names is None else names
        return self._labels

    @abstractmethod
    def _inspect(self, path: str) -> tuple[int, object]:
        """(number of rows, pyarrow schema) of a file, without reading its data."""

    @abstractmethod
    def _cells(self, file: int, start: int, stop: int) -> Iterator[object]:
        """Arrays that together hold the image cells start..stop-1 of one file."""

    @abstractmethod
    def _label_cells(self, path: str) -> object: ...


class ParquetSource(TableSource):
    """Parquet files: opened by their footers, read one window of a row group at a time, only the image column.

    A window is a row group, or about 8 MiB of it: some files are a single group of many gigabytes.
    """

    kind = "parquet"
    suffixes = (".parquet",)

    def _inspect(self, path: str) -> tuple[int, object]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            with pq.ParquetFile(path) as file:
                return file.metadata.num_rows, file.schema_arrow
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a parquet file, or damaged ({error}).") from error

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
        metadata = reader.metadata.row_group(group)
        columns = [metadata.column(index) for index in range(metadata.num_columns)]
        num_bytes = sum(
            column.total_uncompressed_size
            for column in columns
            if column.path_in_schema.split(".")[0] == self._image_column
        )
        rows = max(1, min(metadata.num_rows, metadata.num_rows * _WINDOW_BYTES // max(1, num_bytes)))
        batches = reader.iter_batches(rows, row_groups=[group], columns=[self._image_column], use_threads=False)
        for batch in batches:
            yield batch.column(0)

    def _label_cells(self, path: str) -> object:
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=[self._label_column]).column(0)


class ArrowSource(TableSource):
    """Arrow files, stream or file format, as Hugging Face's datasets writes them; memory-mapped, nothing is copied."""

    kind = "arrow"
    suffixes = (".arrow",)

    def _inspect(self, path: str) -> tuple[int, object]:
        table = _map_table(path)
        return table.num_rows, table.schema

    def _cells(self, file: int, start: int, stop: int) -> Iterator[object]:
        if file not in self._handles:
            self._handles[file] = _map_table(self._paths[file])
        yield from self._handles[file].column(self._image_column).slice(start, stop - start).chunks

    def _label_cells(self, path: str) -> object:
        return _map_table(path).column(self._label_column)


def _map_table(path: str) -> object:
    import pyarrow as pa

    source = pa.memory_map(path)
    try:
        return pa.ipc.open_file(source).read_all()
    except (pa.ArrowException, OSError):
        source.seek(0)
    try:
        return pa.ipc.open_stream(source).read_all()
    except (pa.ArrowException, OSError) as error:  # an OSError where it ends too early
        raise UserError(f"{path}: not an arrow file, or damaged ({error}).") from error


def is_saved_dataset(folder: Path) -> bool:
    """Whether a folder was written by datasets' save_to_disk."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def saved_dataset_files(folder: Path, split: str) -> FileList:
    """The arrow files of a folder written by save_to_disk, in the order its state.json gives.

    Raises:
        UserError: there is no such split.
    """
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text())["splits"]
        if split not in splits:
            raise UserError(f"split {split!r} is not in {folder}; it has {', '.join(map(repr, splits))}.")
        folder = folder / split
    state = json.loads((folder / "state.json").read_text())
    names = [entry["filename"] for entry in state["_data_files"]]
    if not names:
        return scan_folder(folder, ArrowSource.suffixes)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise MissingFileError(f"{folder}: state.json names {missing[0]}, which is not there.")
    sizes = np.array([(folder / name).stat().st_size for name in names], np.int64)
    return FileList(os.path.abspath(folder), names, sizes)


def _views(cells: object) -> list[memoryview | bytes | None]:
    """The values of a pyarrow array of bytes, in place; None for nulls."""
    import pyarrow as pa

    if not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)) or not len(cells):
        return cells.to_pylist()
    _, starts, data = cells.buffers()
    starts = np.frombuffer(starts, np.int64 if pa.types.is_large_binary(cells.type) else np.int32)
    edges = starts[cells.offset : cells.offset + len(cells) + 1].tolist()
    memory = memoryview(data if data is not None else b"").cast("B")
    views = [memory[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    if cells.null_count:
        return [view if valid else None for view, valid in zip(views, cells.is_valid().to_pylist(), strict=True)]
    return views


def _read_beside(table_path: str, path: str) -> bytes:
    full = os.path.join(os.path.dirname(table_path), path)
    try:
        with open(full, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{table_path} has no bytes for an image but its path {path!r}, and there is no file {full}."
        ) from error
