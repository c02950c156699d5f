"""Read images from tar archives in the layout of the WebDataset library."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from distillery.sources.archives import ArchiveMember, OpenFiles, read_exactly
from distillery.sources.base import Source, number_labels
from distillery.sources.listing import IMAGE_SUFFIXES, FileList, is_hidden_path, map_files, suffix_of
from distillery.sources.tar import index_tar
from distillery.system.errors import UserError

Place = tuple[int, ArchiveMember]  # number of the archive, member
_ABSENT = ArchiveMember("", 0, -1)
_PACK = "Pack it again: mkdir x && tar -xf {path} -C x && tar --sort=name -cf NEW.tar -C x ."


class WebDatasetSource(Source):
    """Images in tar archives, as WebDataset writes them: members that share a name up to the first dot are one sample.

    image_column: the extension of the image ("jpg", "left.png"); None: the first of a sample that is an image's.
    label_column: "cls" (None means this, or "json" where there is none) for KEY.cls, "json" for "label" in KEY.json,
    another name for that entry of KEY.json. Samples without an image are left out and counted. Members of a sample
    must be neighbours in one archive; a label that is elsewhere than its image is an error where labels are read.
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
        places: dict[str, list[Place]] = {"image": [], "cls": [], "json": []}
        imageless: list[tuple[int, dict[str, ArchiveMember]]] = []
        left_out = Counter(files.left_out())
        for number, archive in enumerate(map_files(index_tar, self._paths)):
            left_out.update(archive.left_out)
            left_out["members without an extension"] += sum(_has_no_extension(m.name) for m in archive.members)
            for sample in samples_of(archive.members, self._paths[number]):
                image = _image_of(sample, wanted)
                if image is None:
                    imageless.append((number, sample))
                    continue
                places["image"].append((number, image))
                for extension in ("cls", "json"):
                    places[extension].append((number, sample.get(extension, _ABSENT)))
        dotted = _images_named_with_dots(imageless)
        if not places["image"]:
            missing = f"no sample has an image{f' .{wanted}' if wanted else ''}"
            raise UserError(f"{self._paths[0]}: {missing}. {_seen(self._paths[0])}{_hint_at_dots(dotted)}")
        left_out["samples without an image"] = len(imageless)
        if dotted:
            left_out[f"images named like {dotted[0].name} (a key ends at the first dot)"] = len(dotted)
        self._file, self._offset, self._num_bytes = self._pack(places["image"])
        self._labels: np.ndarray | None = None
        self._names: list[str] | None = None
        self._label_key: str | None = None
        if labels_required or label_column is not None:
            self._find_labels(places, imageless, label_column)
        identity = {
            "kind": self.kind,
            "split": split,
            "image_column": wanted,
            "label_column": self._label_key,
            "num_rows": len(self._file),
            "files": files.identity(with_ends=True),
            **(origin or {}),
        }
        super().__init__(identity, int(files.sizes.sum()), left_out)

    def _find_labels(
        self,
        places: dict[str, list[Place]],
        imageless: list[tuple[int, dict[str, ArchiveMember]]],
        label_column: str | None,
    ) -> None:
        """Remember where every row's label is."""
        there = [name for name in ("cls", "json") if any(member is not _ABSENT for _, member in places[name])]
        if label_column is None and there:
            label_column = there[0]
        extension = "cls" if label_column == "cls" else "json"
        if label_column is None and any("cls" in sample for _, sample in imageless):
            extension = "cls"
        self._check_neighbours(places["image"], places[extension], imageless, extension)
        if extension not in there:
            wanted = f"label_column {label_column!r}" if label_column else "labels (.cls or .json)"
            raise UserError(f"{self._paths[0]}: no sample has {wanted}. {_seen(self._paths[0])}")
        self._label_key = "label" if label_column == "json" else label_column
        self._label_in_json = extension == "json"
        self._label_places = self._pack(places[extension])

    def _check_neighbours(
        self,
        images: list[Place],
        labels: list[Place],
        imageless: list[tuple[int, dict[str, ArchiveMember]]],
        extension: str,
    ) -> None:
        """Raise UserError where an image has no label and one of its name stands elsewhere.

        Elsewhere in the same archive, for keys may come again in the next; in any where no image has a label.
        """
        is_anywhere = all(label is _ABSENT for _, label in labels)

        def place(number: int, member: ArchiveMember) -> tuple[int, tuple[str, str]]:
            return 0 if is_anywhere else number, key_of(member.name)

        pairs = zip(images, labels, strict=True)
        unlabelled = {place(*image) for image, (_, label) in pairs if label is _ABSENT}
        found = [(number, sample[extension]) for number, sample in imageless if extension in sample]
        apart = [(number, label) for number, label in found if place(number, label) in unlabelled]
        if apart:
            path = self._paths[apart[0][0]]
            raise UserError(
                f"{path}: {apart[0][1].name} is not beside its image ({len(apart):,} labels are not): the members of a "
                f"sample must be neighbours in one archive. {_PACK.format(path=path)}"
            )

    @property
    def class_names(self) -> list[str] | None:
        """The sorted distinct texts, where the labels are texts."""
        self._all_labels()
        return self._names

    def _pack(self, places: Sequence[Place]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(file, offset, bytes) as arrays: a list of objects would grow in every worker that looks at it.

        Raises:
            UserError: a member is sparse: it would take more than one read.
        """
        sparse = next(((number, member.name) for number, member in places if member.is_sparse), None)
        if sparse is not None:
            path = self._paths[sparse[0]]
            raise UserError(
                f"{path}: {sparse[1]} is stored as a sparse file (tar -S): its bytes do not lie in one piece. "
                f"{_PACK.format(path=path)}"
            )
        return (
            np.array([number for number, _ in places], np.int32),
            np.array([member.offset for _, member in places], np.int64),
            np.array([member.num_bytes for _, member in places], np.int64),
        )

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
            return int(text) if text.removeprefix("-").isdecimal() else text
        try:
            return json.loads(text)[self._label_key]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self._paths[number]}: a .json member has no entry {self._label_key!r}: {text[:100]}"
            ) from error


def key_of(name: str) -> tuple[str, str]:
    """(folder, file name up to its first dot) of a member: what the members of a sample share."""
    folder, _, file = name.rpartition("/")
    return folder, file.partition(".")[0]


def _has_no_extension(name: str) -> bool:
    return "." not in name.rpartition("/")[2] and not is_hidden_path(name)


def samples_of(members: Sequence[ArchiveMember], path: str) -> Iterator[dict[str, ArchiveMember]]:
    """Neighbours with one name up to the first dot of their file name, as {extension: member}.

    Raises:
        UserError: two neighbours have the same name.
    """
    key, sample = None, {}
    for member in members:
        folder, _, file = member.name.rpartition("/")
        stem, dot, extension = file.partition(".")
        if not dot or is_hidden_path(member.name):
            continue
        if (folder, stem) != key:
            if sample:
                yield sample
            key, sample = (folder, stem), {}
        if extension.lower() in sample:
            raise UserError(
                f"{path}: {member.name} is there twice in a sample. Unpacking keeps the last. {_PACK.format(path=path)}"
            )
        sample[extension.lower()] = member
    if sample:
        yield sample


def _image_of(sample: dict[str, ArchiveMember], wanted: str | None) -> ArchiveMember | None:
    if wanted is not None:
        return sample.get(wanted)
    return next((member for extension, member in sample.items() if f".{extension}" in IMAGE_SUFFIXES), None)


def _images_named_with_dots(imageless: Sequence[tuple[int, dict[str, ArchiveMember]]]) -> list[ArchiveMember]:
    """Members like im.001.png of samples without an image: most likely images whose names have more than one dot."""
    return [
        member
        for _, sample in imageless
        for extension, member in sample.items()
        if "." in extension and suffix_of(extension) in IMAGE_SUFFIXES
    ]


def _hint_at_dots(dotted: Sequence[ArchiveMember]) -> str:
    if not dotted:
        return ""
    file = dotted[0].name.rpartition("/")[2]
    stem, _, extension = file.partition(".")
    renamed = f"{file.rpartition('.')[0].replace('.', '_')}.{file.rpartition('.')[2]}"
    return (
        f" A key ends at the first dot: {file} is {extension!r} of sample {stem!r}. Rename the files (here {renamed}), "
        f"pack them again (tar --sort=name), or, if that is meant, write image_column: {extension}"
    )


def _seen(path: str) -> str:
    extensions = sorted({extension for sample in samples_of(index_tar(path).members, path) for extension in sample})
    return f"Its members end in: {', '.join(extensions[:20]) or 'nothing'}."
