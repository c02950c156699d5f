"""Read image files from folders and from the zip archives in them."""

import copy
import os
import posixpath
import zipfile
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distillery.sources.archives import ArchiveIndex, ArchiveMember, OpenFiles, index_zip, read_zip_member
from distillery.sources.base import PackedNames, Source, number_labels
from distillery.sources.listing import (
    IMAGE_SUFFIXES,
    METADATA_NAMES,
    FileList,
    below_split,
    is_inside,
    map_files,
    suffix_of,
)
from distillery.sources.metadata import Listing, MetadataFile, list_rows
from distillery.sources.pairs import pair_masks
from distillery.system.errors import UserError
from distillery.system.files import sha256_of

_LOOSE = -1  # in the place of an offset: a file of its own


class _Places(NamedTuple):
    """Where images are, in columns: there may be millions. The file of each, and of a member of an archive more."""

    file: np.ndarray
    offset: np.ndarray
    num_bytes: np.ndarray
    is_deflated: np.ndarray

    def at(self, rows: list[int]) -> "_Places":
        return _Places(*(column[np.array(rows, np.int64)] for column in self))


class ImageFolderSource(Source):
    """Image files under a folder, and in the zip archives there; the class is the folder an image lies in.

    Loose images and archives are in the order of their names, the images of an archive in the archive's own order, so
    that it is read from front to back. Other files are left out and counted. Where labels are read, metadata.csv,
    .jsonl or .parquet decides as in load_dataset: its rows are the images, in its order. Without labels it changes
    nothing. Masks are images too: metadata names them, or they lie in a folder beside that of the images (pairs.py).
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
        mask_column: str | None = None,
        masks_required: bool = False,
        listed: list[str] | None = None,
        features: dict | None = None,
        origin: dict | None = None,
    ) -> None:
        self._root = files.root
        archives = [index for index, name in enumerate(files.names) if suffix_of(name) == ".zip"]
        indexed = dict(zip(archives, map_files(index_zip, [files.path(index) for index in archives]), strict=True))
        left_out = Counter(files.left_out())
        names = self._find_images(files, indexed, left_out)
        identity = {
            "kind": self.kind,
            "split": split,
            "image_column": None,
            "label_column": None,
            "num_rows": len(names),
            "files": files.identity(with_ends=False),
            **(origin or {}),
        }
        if archives:
            chosen = FileList(
                files.root,
                [files.names[index] for index in archives],
                files.sizes[archives],
                [files.path(index) for index in archives],
            )
            identity["archives"] = chosen.identity(with_ends=True)
        self._labels = None
        has_labels = labels_required or label_column is not None
        needs_metadata = has_labels or masks_required or image_column not in (None, "image")
        metadata = _find_metadata(files, indexed) if needs_metadata and listed is None else []
        listing = None
        if metadata:
            left_out["other files"] -= len(metadata)
            listing = list_rows(
                metadata,
                [posixpath.join("/", files.root, name) for name in names],
                image_column=image_column,
                label_column=label_column,
                labels_required=labels_required,
                left_out=left_out,
                mask_column=mask_column,
                masks_required=masks_required,
            )
        masks: list[int] | None = None
        if masks_required and listing is None:
            where = files.root or (origin or {}).get("dataset_name") or "the image folder"
            if metadata:
                where += f" ({Path(metadata[0].name).name} names no masks: that needs file_name and mask_file_name)"
            pairs = pair_masks(names, image_column, mask_column, listed, where=where, left_out=left_out)
            rows, masks = pairs.images, pairs.masks
            identity |= {"image_column": pairs.image_folder, "mask_column": pairs.mask_folder, "num_rows": len(rows)}
            identity |= {} if listed is None else {"listed": f"sha256:{sha256_of(listed)}"}
        elif masks_required:
            rows, masks = listing.rows, listing.labels
            identity |= {"mask_column": listing.label_column, "num_rows": len(rows), "metadata": listing.identity}
        elif listing is not None:
            self._take_rows(listing, identity)
        elif image_column not in (None, "image"):
            raise UserError(f"image_column is {image_column!r}; an image folder has only 'image': leave it out.")
        elif has_labels:
            if label_column not in (None, "label"):
                raise UserError(
                    f"label_column is {label_column!r}; an image folder without a metadata file has only 'label', the "
                    "names of its folders: leave it out, or put metadata.csv beside the images."
                )
            self._labels, self.class_names = self._classes(files, names)
            identity["label_column"] = "label"
            if any(index.has_backslashes for index in indexed.values()):
                identity["separators"] = "/\\"
        super().__init__(identity, int(files.sizes.sum()), left_out)
        if masks is not None:
            self._masks = copy.copy(self)
            self._masks._places, self._places = self._places.at(masks), self._places.at(rows)

    def _find_images(self, files: FileList, indexed: dict[int, ArchiveIndex], left_out: Counter[str]) -> list[str]:
        """Note where all images are; returns their names, a member's below its archive's."""
        file, offset, num_bytes, is_deflated, names = [], [], [], [], []
        for number, (name, size) in enumerate(zip(files.names, files.sizes.tolist(), strict=True)):
            members, folder = [], ""
            if number in indexed:
                members, folder = indexed[number].members, f"{name}/"
                left_out.update(indexed[number].left_out)
                left_out["other files"] += len(indexed[number].metadata)
            elif suffix_of(name) in IMAGE_SUFFIXES:
                members = [ArchiveMember(name, _LOOSE, size)]
            else:
                left_out["other files"] += 1
            for member in members:
                file.append(number)
                offset.append(member.offset)
                num_bytes.append(member.num_bytes)
                is_deflated.append(member.is_deflated)
                names.append(folder + member.name)
        self._paths = PackedNames(files.names if files.paths is None else files.paths)
        self._places = _Places(
            np.array(file, np.int32),
            np.array(offset, np.int64),
            np.array(num_bytes, np.int64),
            np.array(is_deflated, np.bool_),
        )
        return names

    def _take_rows(self, listing: Listing, identity: dict) -> None:
        """Keep the images that metadata lists, in its order, with the labels it gives."""
        self._places = self._places.at(listing.rows)
        if listing.label_column is not None:
            where = f"column {listing.label_column!r} of the metadata in {self._root}"
            self._labels, self.class_names = number_labels(listing.labels, where)
        identity |= {"label_column": listing.label_column, "num_rows": len(listing.rows), "metadata": listing.identity}

    def _classes(self, files: FileList, names: list[str]) -> tuple[np.ndarray, list[str]]:
        folders = []
        for name, number in zip(names, self._places.file.tolist(), strict=True):
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
        number, offset, num_bytes, is_deflated = (int(column[row]) for column in self._places)
        path = os.path.join(self._root, self._paths[number])
        if offset == _LOOSE:
            with open(path, "rb") as file:
                return file.read()
        fd = self._handles.setdefault("files", OpenFiles()).get(number, path)
        return read_zip_member(fd, offset, num_bytes, bool(is_deflated), path)

    def _all_labels(self) -> np.ndarray | None:
        return self._labels


def _find_metadata(files: FileList, indexed: dict[int, ArchiveIndex]) -> list[MetadataFile]:
    """The metadata files among the files of a split and in its archives; else those beside the splits."""
    found = []
    for place, name in enumerate(files.names):
        full = posixpath.join("/", files.root, name)
        if posixpath.basename(name) in METADATA_NAMES:
            found.append(MetadataFile(full, Path(files.path(place)).read_bytes))
        for member in indexed[place].metadata if place in indexed else []:
            inner = posixpath.normpath(f"{full}/{member}".replace("\\", "/"))
            found.append(MetadataFile(inner, partial(_read_member, files.path(place), member)))
    others = [name for name in files.others if posixpath.basename(name) in METADATA_NAMES]
    own = [name for name in others if is_inside(files, name)]
    for name in own or ([] if found else others):
        path = os.path.normpath(os.path.join(files.root, name))
        found.append(MetadataFile(path, Path(path).read_bytes))
    return found


def _read_member(path: str, member: str) -> bytes:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.read(member)
    except (
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:  # RuntimeError: it is encrypted, or packed unusually
        raise UserError(f"{path}: {member} cannot be read: {error}") from error
