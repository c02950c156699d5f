"""Images in tar archives, as the WebDataset library lays them out."""

import json
from collections.abc import Iterator, Sequence

import numpy as np

from distillery.process import UserError
from distillery.sources_archives import Member, OpenFiles, index_tar, read_exactly
from distillery.sources_base import IMAGE_SUFFIXES, FileList, Source, is_hidden, map_files, number_labels

_ABSENT = Member("", 0, -1)


class WebDatasetSource(Source):
    """Images in tar archives, as WebDataset writes them: members that share a name up to the first dot are one sample.

    image_column: the extension of the image ("jpg", "left.png"); None: the first of a sample that is an image's.
    label_column: "cls" (None means this, or "json" where there is none) for KEY.cls, "json" for "label" in KEY.json,
    another name for that entry of KEY.json. Samples without an image are left out and counted.
    Source: https://github.com/webdataset/webdataset, base_plus_ext and group_by_keys.
    """

    kind = "webdataset"
    suffixes = (".tar",)

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
        wanted = None if image_column is None else image_column.lower().lstrip(".")
        places: dict[str, list[tuple[int, Member]]] = {"image": [], "cls": [], "json": []}
        self._num_others = 0
        for number, members in enumerate(map_files(index_tar, self._paths)):
            for sample in samples_of(members):
                image = _image_of(sample, wanted)
                if image is None:
                    self._num_others += 1
                    continue
                places["image"].append((number, image))
                for extension in ("cls", "json"):
                    places[extension].append((number, sample.get(extension, _ABSENT)))
        if not places["image"]:
            missing = f"no sample has an image{f' .{wanted}' if wanted else ''}"
            raise UserError(f"{self._paths[0]}: {missing}. {_seen(self._paths[0])}")
        self._file, self._offset, self._num_bytes = _pack(places["image"])
        self._labels: np.ndarray | None = None
        self._names: list[str] | None = None
        self._label_key: str | None = None
        if labels_required or label_column is not None:
            self._find_labels(places, label_column)
        identity = {
            "kind": self.kind,
            "split": split,
            "image_column": wanted,
            "label_column": self._label_key,
            "num_rows": len(self._file),
            "files": files.identity(with_ends=True),
            **(origin or {}),
        }
        super().__init__(identity, int(files.sizes.sum()))

    def _find_labels(self, places: dict[str, list[tuple[int, Member]]], label_column: str | None) -> None:
        """Remember where every row's label is."""
        there = [name for name in ("cls", "json") if any(member is not _ABSENT for _, member in places[name])]
        if label_column is None and there:
            label_column = there[0]
        extension = "cls" if label_column == "cls" else "json"
        if extension not in there:
            wanted = f"label_column {label_column!r}" if label_column else "labels (.cls or .json)"
            raise UserError(f"{self._paths[0]}: no sample has {wanted}. {_seen(self._paths[0])}")
        self._label_key = "label" if label_column == "json" else label_column
        self._label_in_json = extension == "json"
        self._label_places = _pack(places[extension])

    @property
    def class_names(self) -> list[str] | None:
        """The sorted distinct texts, where the labels are texts."""
        self._all_labels()
        return self._names

    def describe(self) -> str:
        """One line for the plan."""
        line = super().describe()
        return f"{line}, {self._num_others:,} samples without an image left out" if self._num_others else line

    def _read(self, start: int, stop: int) -> list[bytes]:
        return [
            self._read_piece(int(number), int(offset), int(num_bytes))
            for number, offset, num_bytes in zip(
                self._file[start:stop], self._offset[start:stop], self._num_bytes[start:stop], strict=True
            )
        ]

    def _read_piece(self, number: int, offset: int, num_bytes: int) -> bytes:
        path = self._paths[number]
        fd = self._handles.setdefault("files", OpenFiles()).get(number, path)
        return read_exactly(fd, num_bytes, offset, path)

    def _all_labels(self) -> np.ndarray | None:
        if self._label_key is not None and self._labels is None:
            values = [self._label_at(*map(int, place)) for place in zip(*self._label_places, strict=True)]
            self._labels, self._names = number_labels(values, f"labels of {self._paths[0]}")
        return self._labels

    def _label_at(self, number: int, offset: int, num_bytes: int) -> int | str | None:
        if num_bytes < 0:
            return None
        text = self._read_piece(number, offset, num_bytes).decode(errors="replace").strip()
        if not self._label_in_json:
            return int(text) if text.lstrip("-").isdecimal() else text
        try:
            return json.loads(text)[self._label_key]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._paths[number]}: a .json member has no entry {self._label_key!r}: {text[:100]}"
            ) from error


def samples_of(members: Sequence[Member]) -> Iterator[dict[str, Member]]:
    """Neighbours with one name up to the first dot of their file name, as {extension: member}."""
    key, sample = None, {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not dot or any(map(is_hidden, member.name.removeprefix("./").split("/"))):
            continue
        if (folder, stem) != key:
            if sample:
                yield sample
            key, sample = (folder, stem), {}
        sample[extension.lower()] = member
    if sample:
        yield sample


def _image_of(sample: dict[str, Member], wanted: str | None) -> Member | None:
    if wanted is not None:
        return sample.get(wanted)
    return next((member for extension, member in sample.items() if f".{extension}" in IMAGE_SUFFIXES), None)


def _seen(path: str) -> str:
    extensions = sorted({extension for sample in samples_of(index_tar(path)) for extension in sample})
    return f"Its members end in: {', '.join(extensions[:20]) or 'nothing'}."


def _pack(places: Sequence[tuple[int, Member]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(file, offset, bytes) as arrays: a list of objects would grow in every worker that looks at it."""
    return (
        np.array([number for number, _ in places], np.int32),
        np.array([member.offset for _, member in places], np.int64),
        np.array([member.num_bytes for _, member in places], np.int64),
    )
