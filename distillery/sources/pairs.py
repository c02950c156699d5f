"""Pair the images of one folder with the masks of another: the same path below it, whatever the suffix."""

import posixpath
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from distillery.sources.listing import DataFiles, check_split
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "JPEGImages")
MASK_FOLDERS = (
    "masks", "mask", "annotations", "annotation", "labels", "label", "segmentations", "SegmentationClass",
)  # fmt: skip
_SHOWN_FOLDERS = 12


class Pairs(NamedTuple):
    """Positions of images and of their masks in a list of file names, and the folders they lie in."""

    images: list[int]
    masks: list[int]
    image_folder: str
    mask_folder: str


def pair_masks(
    names: Sequence[str],
    image_folder: str | None = None,
    mask_folder: str | None = None,
    listed: Sequence[str] | None = None,
    *,
    where: str,
    left_out: Counter[str],
) -> Pairs:
    """The images that have a mask, in the order of `listed` or else of their names.

    A file belongs to a folder that stands anywhere in its path: images/train/a.jpg and annotations/train/a.png are a
    pair, train/images/a.jpg and train/masks/a.png too. Both have the same path without that folder and the suffix.

    Args:
        names: of image files, relative, with forward slashes.
        image_folder: name of the folder of the images; None: the one of IMAGE_FOLDERS that is there.
        mask_folder: of the masks; None: the one of MASK_FOLDERS.
        listed: paths without folder and suffix of the images wanted, in their order; None: all.
        where: the folder of it all, for messages.
        left_out: what is passed over is added here.
    Raises:
        UserError: a folder is not there, or several could be it; two files of one path differ only in their suffix.
        MissingFileError: an image is listed that is not there.
    """
    there = Counter(part for name in names for part in set(posixpath.dirname(name).split("/")) - {""})
    image_folder = _find_folder("image_column", image_folder, IMAGE_FOLDERS, there, where)
    mask_folder = _find_folder("mask_column", mask_folder, MASK_FOLDERS, there, where)
    if image_folder == mask_folder:
        raise UserError(
            f"{where}: image_column and mask_column are both {image_folder!r}; masks lie in another folder."
        )
    images, masks = (_positions(names, folder, where) for folder in (image_folder, mask_folder))
    left_out["files in neither folder"] += len(names) - len(images) - len(masks)
    if listed is None:
        left_out["masks without an image"] += len(masks.keys() - images.keys())
        listed = list(images)
    elif unknown := [path for path in listed if path not in images]:
        raise MissingFileError(
            f"{where}: {len(unknown)} of the {len(listed)} images listed are not in {image_folder!r}, first "
            f"{unknown[0]!r}. A line of a list is the path of an image below that folder, without its suffix."
        )
    pairs = [(images[path], masks[path]) for path in listed if path in masks]
    left_out["images without a mask"] += len(listed) - len(pairs)
    if not pairs:
        raise UserError(
            f"{where}: no file in {mask_folder!r} has the path of one in {image_folder!r}. Found "
            f"{_example(names, images)} and {_example(names, masks)}; the paths must be the same but for the suffix."
        )
    return Pairs([image for image, _ in pairs], [mask for _, mask in pairs], image_folder, mask_folder)


def _find_folder(key: str, wanted: str | None, usual: Sequence[str], there: Counter[str], where: str) -> str:
    candidates = [name for name in usual if name in there]
    if wanted is not None or len(candidates) == 1:
        name = (candidates[0] if wanted is None else wanted).strip("/")
        if set(name.split("/")) <= there.keys():
            return name
    if wanted is not None:
        found = f"there is no folder {wanted!r} with image files ({key})"
    elif candidates:
        found = f"several folders could be {key}: {', '.join(candidates)}. Choose one with {key}: {candidates[0]}"
    else:
        found = f"no folder is called {', '.join(usual[:-1])} or {usual[-1]}. Name it with {key}"
    folders = ", ".join(name for name, _ in there.most_common(_SHOWN_FOLDERS)) or "none"
    raise UserError(
        f"{where}: {found}. Images and masks lie in two folders (found: {folders}), or metadata.csv names the mask of "
        "each image in a column mask_file_name."
    )


def _positions(names: Sequence[str], folder: str, where: str) -> dict[str, int]:
    """path without the folder and the suffix -> position, of the files in a folder."""
    found: dict[str, int] = {}
    for position, name in enumerate(names):
        before, is_inside, after = f"/{name}".partition(f"/{folder}/")
        path = posixpath.splitext(f"{before}/{after}".lstrip("/"))[0]
        if is_inside and found.setdefault(path, position) != position:
            raise UserError(f"{where}: {names[found[path]]} and {name} differ only in their suffix. Keep one of them.")
    return found


def _example(names: Sequence[str], positions: dict[str, int]) -> str:
    return names[next(iter(positions.values()))] if positions else "none"


def listed_images(data_files: DataFiles, data_dir: str | None, split: str) -> list[str] | None:
    """The lines of the text files that data_files gives for a split, as PASCAL VOC lists its splits.

    Returns:
        None where data_files are no text files.
    Raises:
        UserError: there is no such split, no data_dir to find the images in, or a list is empty.
        MissingFileError: a list is not there.
    """
    if not isinstance(data_files, dict):
        data_files = {"train": data_files or []}
    entries = {name: [text] if isinstance(text, str | Path) else list(text) for name, text in data_files.items()}
    if not any(str(text).endswith(".txt") for texts in entries.values() for text in texts):
        return None
    check_split(split, entries, "data_files")
    if data_dir is None:
        raise UserError(
            f"data_files lists the images of {split!r} in {entries[split][0]}; data_dir must name their folder."
        )
    lines: list[str] = []
    for text in entries[split]:
        path = expand_path(data_dir) / expand_path(text)
        if not path.is_file():
            raise MissingFileError(f"data_files: there is no list {path.absolute()}; lists are relative to data_dir")
        lines += [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not lines:
        raise UserError(f"data_files: the list of {split!r} is empty.")
    return lines
