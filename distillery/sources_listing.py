"""Which files a configuration means: patterns and folders, and the split that a name speaks of."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from pathlib import Path

from distillery.sources_base import (
    IMAGE_SUFFIXES,
    DataFiles,
    FileList,
    check_split,
    file_list_of,
    scan_folder,
    suffix_of,
)
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

SPLIT_WORDS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)


def words_of(split: str) -> tuple[str, ...]:
    """The names that folders and files of a split may bear; as in Hugging Face's datasets, "val" means "validation"."""
    return next((words for words in SPLIT_WORDS if split in words), (split,))


def split_of_name(name: str, split: str) -> str | None:
    """The split a relative file name speaks of ("images/val2017/1.jpg" -> "validation"), if any.

    A name speaks of a split if one of its words, runs of letters, is a keyword of that split, as in Hugging Face's
    datasets. The outermost such folder decides, so that classes in a split may be called "test"; where no folder
    speaks, the name of the file, unless it is an image's, which may be anything. Of several splits that one name
    speaks of, `split` goes before the others.
    """
    *folders, file = name.split("/")
    parts = folders if suffix_of(file) in IMAGE_SUFFIXES else [*folders, file]
    return next((found for part in parts if (found := _split_of_part(part, split)) is not None), None)


@lru_cache(1 << 16)
def _split_of_part(part: str, split: str) -> str | None:
    words = {part.lower(), *re.split(r"[\W\d_]+", part.lower())}
    return next(
        (names[0] for names in (words_of(split), *SPLIT_WORDS) if words.intersection(map(str.lower, names))), None
    )


def below_split(name: str, split: str | None) -> str:
    """What follows the folder by which a file belongs to a split; the whole name where none does."""
    parts = name.split("/")
    if split is None:
        return name
    speaking = next((place for place, part in enumerate(parts[:-1]) if _split_of_part(part, split) is not None), -1)
    return "/".join(parts[speaking + 1 :])


def is_inside(files: FileList, name: str) -> bool:
    """Whether one of a list's other files belongs to its split, rather than lies beside the splits."""
    return not name.startswith("../") and (files.split is None or split_of_name(name, files.split) is not None)


def resolve_files(
    kind: str, suffixes: Iterable[str], data_files: DataFiles, data_dir: str | None, split: str
) -> FileList:
    """The files of a local source.

    data_files (a path, glob, {a..b} pattern or folder; a list of them; or a dict of split -> those) are taken in the
    order given, matches of a pattern sorted; what exists under the very name that is written is no pattern. With
    data_dir alone: the files whose folders or names speak of the split, or, where none speaks of any, all for "train".

    Raises:
        UserError: neither is given, or there is no such split.
        MissingFileError: a file or folder is missing, or a pattern matches nothing.
    """
    folder = expand_path(data_dir) if data_dir is not None else None
    if data_files is None:
        if folder is None:
            raise UserError(f"dataset_name: {kind} needs data_files (paths or patterns) or data_dir (a folder).")
        return _files_of_folder(suffixes, folder, split)
    if not isinstance(data_files, dict):
        data_files = {"train": data_files}
    check_split(split, data_files, "data_files (what is listed without a split is 'train')")
    patterns = data_files[split]
    patterns = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
    lists = [found for pattern in patterns for found in _matches(pattern, folder, suffixes)]
    # dict: a file that two patterns match is read once
    paths = list(dict.fromkeys(found.path(index) for found in lists for index in range(len(found))))
    others = list(dict.fromkeys(os.path.join(found.root, name) for found in lists for name in found.others))
    if not paths:
        raise MissingFileError(f"data_files has no files for split {split!r}.")
    files = file_list_of(paths)
    return replace(files, others=[os.path.relpath(path, files.root) for path in others])


def _files_of_folder(suffixes: Iterable[str], folder: Path, split: str) -> FileList:
    files = scan_folder(folder, suffixes)
    splits = [split_of_name(name, split) for name in files.names]
    named = sorted({name for name in splits if name is not None})
    if not named:
        if len(files):
            check_split(split, ["train"], f"{folder} (no name in it speaks of a split)")
        return files
    wanted = words_of(split)[0]
    if wanted not in named:
        example = files.names[next(index for index, name in enumerate(splits) if name is not None)]
        check_split(
            wanted,
            named,
            f"{folder} (by names like {example}; if they mean no split, write data_files: {{{split}: {folder}}})",
        )
    chosen = [index for index, name in enumerate(splits) if name == wanted]
    others = [name for name in files.others if split_of_name(name, split) in (wanted, None)]
    names, root = [files.names[index] for index in chosen], files.root
    # where one folder is named like the split, the names begin below it: they are part of a cache's fingerprint
    top = next((word for word in words_of(split) if (folder / word).is_dir()), None)
    if top is not None and all(name.startswith(f"{top}/") for name in names):
        root = os.path.join(root, top)
        names = [name.removeprefix(f"{top}/") for name in names]
        others = [os.path.relpath(name, top) for name in others]
    below = None if root != files.root else split
    return FileList(root, names, files.sizes[chosen], None, others, splits.count(None), below)


def _matches(pattern: str | os.PathLike, folder: Path | None, suffixes: Iterable[str]) -> Iterator[FileList]:
    """The files one entry of data_files stands for, in lists."""
    there, rest = _existing_part(os.path.join(folder or "", expand_path(pattern)))
    for text in expand_braces(rest):
        path = os.path.join(there, text) if text else there
        if os.path.isdir(path):
            files = scan_folder(path, suffixes)
        elif os.path.exists(path):
            files = file_list_of([path])
        else:
            matches = sorted(glob.glob(os.path.join(glob.escape(there), text), recursive=True))
            files = file_list_of([match for match in matches if os.path.isfile(match)])
        if not len(files):
            kind = "pattern" if glob.has_magic(text) else "file"
            hint = ". A [ that is part of a name is written [[]" if "[" in text else ""
            raise MissingFileError(f"data_files: no file matches the {kind} {os.path.abspath(path)}{hint}")
        yield files


def _existing_part(path: str) -> tuple[str, str]:
    """(the leading folders that exist under these very names, the rest): their brackets and braces mean themselves."""
    there, rest = os.path.join(os.path.sep if os.path.isabs(path) else "", ""), path.lstrip(os.path.sep)
    while rest:
        name, _, remaining = rest.partition(os.path.sep)
        if not os.path.lexists(os.path.join(there, name)):
            break
        there, rest = os.path.join(there, name), remaining.lstrip(os.path.sep)
    return there, rest


def expand_braces(pattern: str) -> list[str]:
    """ "a-{000..002}.tar" -> ["a-000.tar", "a-001.tar", "a-002.tar"]; "{x,y}.tar" -> ["x.tar", "y.tar"]."""
    choices = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            choices.append([str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)])
        elif part.startswith("{") and "," in part:
            choices.append(part[1:-1].split(","))
        else:
            choices.append([part])
    return ["".join(parts) for parts in product(*choices)]
