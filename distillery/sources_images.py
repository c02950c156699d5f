"""Image files in folders, and in the zip archives there."""

import os
import posixpath
from collections import Counter
from collections.abc import Sequence

import numpy as np

from distillery.process import UserError
from distillery.sources_archives import Member, OpenFiles, index_zip, read_zip_member
from distillery.sources_base import (
    IMAGE_SUFFIXES,
    FileList,
    Source,
    map_files,
    number_labels,
    suffix_of,
)
from distillery.sources_listing import below_split

_LOOSE = -1  # in the place of an offset: a file of its own


class PackedNames:
    """Many short texts as one block of bytes: a list of a million str costs a worker 100 MB."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])


class ImageFolderSource(Source):
    """Image files under a folder, and in the zip archives there; the class is the folder an image lies in.

    Loose images and archives are in the order of their names, the images of an archive in the archive's own order, so
    that it is read from front to back. Other files are left out and counted. metadata.csv and the like are not read.
    """

    kind = "imagefolder"
    suffixes = (*sorted(IMAGE_SUFFIXES), ".zip")

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
        if image_column not in (None, "image"):
            raise UserError(f"image_column is {image_column!r}; an image folder has only 'image': leave it out.")
        self._root = files.root
        left_out = Counter(files.left_out())
        names, archives, has_backslashes = self._index_files(files, left_out)
        identity = {
            "kind": self.kind,
            "split": split,
            "image_column": None,
            "label_column": None,
            "num_rows": 0,
            "files": files.identity(with_ends=False),
            **(origin or {}),
        }
        self._labels = None
        has_labels = labels_required or label_column is not None
        if has_labels:
            self._labels, self.class_names = self._classes(files, names)
            identity["label_column"] = "label"
            if has_backslashes:
                identity["separators"] = "/\\"
        identity["num_rows"] = len(self._file)
        if archives:
            chosen = FileList(
                files.root,
                [files.names[index] for index in archives],
                files.sizes[archives],
                [files.path(index) for index in archives],
            )
            identity["archives"] = chosen.identity(with_ends=True)
        super().__init__(identity, int(files.sizes.sum()), left_out)

    def _index_files(self, files: FileList, left_out: Counter[str]) -> tuple[list[str], list[int], bool]:
        """Find all images; returns their names (a member's below its archive's), the numbers of the archives,
        and whether names in these have backslashes."""
        archives = [index for index, name in enumerate(files.names) if suffix_of(name) == ".zip"]
        indexed = dict(zip(archives, map_files(index_zip, [files.path(index) for index in archives]), strict=True))
        # columns, not a list of objects: there may be millions of rows
        file, offset, num_bytes, is_deflated, names = [], [], [], [], []
        for number, (name, size) in enumerate(zip(files.names, files.sizes.tolist(), strict=True)):
            members, folder = [], ""
            if number in indexed:
                members, folder = indexed[number].members, f"{name}/"
                left_out.update(indexed[number].left_out)
                left_out["other files"] += len(indexed[number].metadata)
            elif suffix_of(name) in IMAGE_SUFFIXES:
                members = [Member(name, _LOOSE, size)]
            else:
                left_out["other files"] += 1
            for member in members:
                file.append(number)
                offset.append(member.offset)
                num_bytes.append(member.num_bytes)
                is_deflated.append(member.is_deflated)
                names.append(folder + member.name)
        self._paths = PackedNames(files.names if files.paths is None else files.paths)
        self._file, self._offset = np.array(file, np.int32), np.array(offset, np.int64)
        self._num_bytes, self._is_deflated = np.array(num_bytes, np.int64), np.array(is_deflated, np.bool_)
        has_backslashes = any(index.has_backslashes for index in indexed.values())
        return names, archives, has_backslashes

    def _classes(self, files: FileList, names: list[str]) -> tuple[np.ndarray, list[str]]:
        folders = []
        for name, number in zip(names, self._file.tolist(), strict=True):
            outside = files.names[number]
            path = name.removeprefix(f"{outside}/") if suffix_of(outside) == ".zip" else below_split(name, files.split)
            folders.append(posixpath.normpath(f"/{path}").rpartition("/")[0].rpartition("/")[2])
        if "" in folders:
            example = os.path.join(self._root, names[folders.index("")])
            raise UserError(f"labels need FOLDER/CLASS/IMAGE; {example} is in no class folder.")
        return number_labels(folders, "class folders")

    def _read(self, start: int, stop: int) -> list[bytes]:
        return [self._read_one(row) for row in range(start, stop)]

    def _read_one(self, row: int) -> bytes:
        number, offset, num_bytes = int(self._file[row]), int(self._offset[row]), int(self._num_bytes[row])
        path = os.path.join(self._root, self._paths[number])
        if offset == _LOOSE:
            with open(path, "rb") as file:
                return file.read()
        fd = self._handles.setdefault("files", OpenFiles()).get(number, path)
        return read_zip_member(fd, offset, num_bytes, bool(self._is_deflated[row]), path)

    def _all_labels(self) -> np.ndarray | None:
        return self._labels
