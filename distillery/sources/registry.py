"""The table of sources: hub data sets, parquet, arrow, image folders, zip and tar archives.

Every source is read in place, in a fixed order, without decoding. To add one, write a class with the same constructor
and add one line to SOURCES.
"""

import difflib
import glob
import os
from pathlib import Path

from distillery.sources.base import Source
from distillery.sources.folders import ImageFolderSource
from distillery.sources.hub import FORMATS, resolve_dataset
from distillery.sources.listing import DataFiles, resolve_files, scan_folder
from distillery.sources.pairs import listed_images
from distillery.sources.tables import ArrowSource, ParquetSource, is_saved_dataset, saved_dataset_files
from distillery.sources.webdataset import WebDatasetSource
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

SOURCES = {
    "parquet": ParquetSource,
    "arrow": ArrowSource,
    "imagefolder": ImageFolderSource,
    "webdataset": WebDatasetSource,
}


def open_source(
    *,
    dataset_name: str,
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: DataFiles = None,
    data_dir: str | None = None,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    labels_required: bool = False,
    mask_column: str | None = None,
    masks_required: bool = False,
    download: bool = True,
) -> Source:
    """Open one split of a data set; its images are read later, undecoded.

    Args:
        dataset_name: a kind of SOURCES (with data_files or data_dir), a local folder that load_dataset takes or that
            save_to_disk wrote, or a hub id, which is downloaded into HF_HOME first.
        dataset_config: of a hub data set, as in load_dataset.
        dataset_revision: branch, tag or commit of a hub data set.
        data_files: paths, globs, {a..b} patterns, folders or URLs; a dict of split -> those.
        data_dir: a folder; relative data_files are below it.
        split: the name of one split.
        image_column: None: found by its type.
        label_column: None: found by its type if labels_required, else there are no labels.
        labels_required: whether labels must be there.
        mask_column: of the masks; of an image folder, also the name of a folder beside that of the images, which
            image_column names then. None: found by its type and name if masks_required, else there are no masks.
        masks_required: whether every image must have a mask; those of a folder without one are left out.
        download: False: a hub data set that is not here yet raises NotDownloadedError, which says how large it is.
    Raises:
        UserError: no such data set, split or column; the message lists the existing ones.
        MissingFileError: a file or folder is not there.
        RunError: a download was given up.
    """
    columns = {"image_column": image_column, "label_column": label_column, "labels_required": labels_required}
    if masks_required:
        columns |= {"mask_column": mask_column, "masks_required": True}
    if dataset_name in SOURCES and not _has_urls(data_files):
        kind = SOURCES[dataset_name]
        listed = (
            listed_images(data_files, data_dir, split) if masks_required and dataset_name == "imagefolder" else None
        )
        if listed is not None:
            return _open(dataset_name, scan_folder(expand_path(data_dir), kind.suffixes), split, columns, listed=listed)
        files = resolve_files(dataset_name, kind.suffixes, data_files, data_dir, split)
        return _open(dataset_name, files, split, columns)
    place = _local_folder(dataset_name)
    if place is not None or dataset_name in FORMATS:
        data_files, data_dir = _expand(data_files), _expand(data_dir)
    if place is not None and masks_required:
        root = place / (data_dir or "")
        if (listed := listed_images(data_files, str(root), split)) is not None:
            files = scan_folder(root, ImageFolderSource.suffixes)
            return _open("imagefolder", files, split, columns, listed=listed)
    if place is not None and is_saved_dataset(place):
        return _open("arrow", saved_dataset_files(place, split), split, columns)
    if place is not None and glob.has_magic(os.path.realpath(os.path.join(place, data_dir or ""))):
        raise UserError(
            f"dataset_name {dataset_name}: load_dataset takes *, ? and [ in a folder's name for a pattern. Rename the "
            f"folder, or write dataset_name: KIND and data_dir: {place}, with one of {', '.join(SOURCES)} for KIND."
        )
    near = difflib.get_close_matches(dataset_name, [*SOURCES, *FORMATS], n=1, cutoff=0.8)
    if place is None and near and near[0] != dataset_name and "/" not in dataset_name and (data_files or data_dir):
        raise UserError(f"dataset_name {dataset_name!r} is no local folder; did you mean {near[0]!r}?")
    found = resolve_dataset(
        dataset_name if place is None else os.path.abspath(place),
        kinds=tuple(SOURCES),
        dataset_config=dataset_config,
        dataset_revision=dataset_revision,
        data_files=data_files,
        data_dir=data_dir,
        split=split,
        download=download,
    )
    source = _open_resolved(found, split, columns)
    if found.by_folder is not None and source.begins_with_a_relative_path():
        source = _open_resolved(found.by_folder(), split, columns)
    return source


def _open_resolved(found: object, split: str, columns: dict) -> Source:
    known = {"features": found.features, "origin": found.origin}
    if found.beside is not None:
        known["beside"] = found.beside
    return _open(found.kind, found.files, split, columns, **known)


def _open(kind: str, files: object, split: str, columns: dict, **known: object) -> Source:
    if kind == "webdataset" and "masks_required" in columns:
        raise UserError("masks are read from parquet, arrow and image folders, not from webdataset: convert it.")
    if not len(files):
        suffixes = ", ".join(SOURCES[kind].suffixes)
        others = f"; it holds {len(files.others):,} others, first {files.others[0]}" if files.others else ""
        raise MissingFileError(f"{files.root or 'The data set'} holds no files for {kind} ({suffixes}){others}.")
    return SOURCES[kind](files, split=split, **columns, **known)


def _has_urls(data_files: DataFiles) -> bool:
    if isinstance(data_files, dict):
        return any(map(_has_urls, data_files.values()))
    if data_files is None or isinstance(data_files, str | Path):
        return "://" in str(data_files or "")
    return any(map(_has_urls, data_files))


def _expand(data_files: DataFiles) -> DataFiles:
    """The same with ~ and $VARIABLES expanded, but in URLs."""
    if isinstance(data_files, dict):
        return {split: _expand(entries) for split, entries in data_files.items()}
    if isinstance(data_files, str | Path):
        return data_files if _has_urls(data_files) else str(expand_path(data_files))
    return data_files and list(map(_expand, data_files))


def _local_folder(dataset_name: str) -> Path | None:
    """The folder a name stands for, None for a hub id.

    Raises:
        UserError: it is a file.
        MissingFileError: it is spelt like a path, and nothing is there.
    """
    path = expand_path(dataset_name)
    if path.is_dir():
        return path
    if path.exists():
        if path.suffix.lower() in (".csv", ".tsv", ".json", ".jsonl"):
            raise UserError(
                f"dataset_name {dataset_name} is a file. Write dataset_name: {path.parent} and data_files: {path.name}"
            )
        kind = next((name for name, source in SOURCES.items() if path.suffix.lower() in source.suffixes), "parquet")
        raise UserError(
            f"dataset_name {dataset_name} is a file. Write dataset_name: {kind} and data_files: {dataset_name}"
        )
    if dataset_name.startswith(("/", "./", "../", "~", "$")) or dataset_name.count("/") > 1:
        raise MissingFileError(f"dataset_name {dataset_name}: there is no such folder ({path.absolute()}).")
    return None
