"""List the files of a source: folders, patterns, splits, and an identity for a list of files."""

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".ico",
})
# fmt: on
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl", "metadata.parquet"})
_END_BYTES = 64 * 1024
# small reads of many files wait for a network file system, not for a CPU
_IO_THREADS = 16
T = TypeVar("T")
DataFiles = str | Sequence[str] | dict[str, str | Sequence[str]] | None
SPLIT_WORDS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)


@dataclass(frozen=True)
class FileList:
    """The files of a source in row order; `names` are relative to `root`, with forward slashes.

    Args:
        paths: where the files are, if not at root / name.
        others: names of files that were seen and are of another kind.
        num_outside: files that belong to no split, beside others that do.
        split: the split that the names speak of, where they were chosen by that.
    """

    root: str
    names: list[str]
    sizes: np.ndarray
    paths: list[str] | None = None
    others: list[str] = field(default_factory=list)
    num_outside: int = 0
    split: str | None = None

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Where a file is."""
        return self.paths[index] if self.paths is not None else os.path.join(self.root, self.names[index])

    def left_out(self) -> dict[str, int]:
        """What was seen and is in none of `names`, for the plan."""
        return {"other files": len(self.others), "files of no split": self.num_outside}

    def identity(self, *, with_ends: bool) -> dict:
        """Count, bytes and one hash over names and sizes, and the first and last 64 KiB of each file if `with_ends`.

        The footer of a parquet file and the directory of a zip archive change with any row, so this notices new
        content at the cost of two small reads a file; a folder that is moved or copied keeps its identity.
        """
        digest = hashlib.sha256()
        ends = map_files(hash_of_ends, [self.path(i) for i in range(len(self))]) if with_ends else [b""] * len(self)
        for name, size, end in zip(self.names, self.sizes.tolist(), ends, strict=True):
            digest.update(os.fsencode(name) + b"\0" + str(size).encode() + b"\0" + end)
        return {"count": len(self), "bytes": int(self.sizes.sum()), "hash": f"sha256:{digest.hexdigest()}"}


def hash_of_ends(path: str) -> bytes:
    """SHA-256 of a file's first and last 64 KiB (the whole of a small one)."""
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_END_BYTES))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(_END_BYTES, size - _END_BYTES))
        digest.update(file.read())
    return digest.digest()


def map_files(function: Callable[[str], T], paths: Sequence[str]) -> list[T]:
    """function(path) for every path, in order, several at a time: the time goes into waiting for the file system."""
    with ThreadPoolExecutor(min(_IO_THREADS, max(1, len(paths)))) as pool:
        return list(pool.map(function, paths))


def file_list_of(paths: Sequence[str]) -> FileList:
    """The list of these existing files, in this order, named relative to the folder they have in common."""
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return FileList(root, names, np.array([os.stat(path).st_size for path in paths], np.int64))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data: dot files, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def is_hidden_path(name: str) -> bool:
    """Whether a member of an archive is hidden, or lies in a hidden folder; "." and ".." are no names."""
    # most names have neither, and there may be millions
    if "/." not in f"/{name}" and "__MACOSX" not in name:
        return False
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def suffix_of(name: str) -> str:
    """ ".jpeg" for "n01440764_18.JPEG"."""
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if stem else ""


def scan_folder(root: str | os.PathLike, suffixes: Iterable[str]) -> FileList:
    """All files with these suffixes under `root`, sorted by name; follows links, leaves out hidden files.

    Raises:
        MissingFileError: there is no such folder.
    """
    root, suffixes = os.path.abspath(root), frozenset(suffixes)
    if not os.path.isdir(root):
        raise MissingFileError(f"Folder not found: {root}")

    def list_directory(relative: str) -> tuple[list[tuple[str, int]], list[str], list[str]]:
        files, folders, others = [], [], []
        with os.scandir(os.path.join(root, relative)) as entries:
            for entry in entries:
                name = f"{relative}/{entry.name}" if relative else entry.name
                if is_hidden(entry.name):
                    continue
                if entry.is_dir():
                    if not (entry.is_symlink() and _leads_back(entry.path)):
                        folders.append(name)
                elif suffix_of(entry.name) in suffixes and entry.is_file():
                    files.append((name, entry.stat().st_size))
                else:
                    others.append(name)
        return files, folders, others

    found, level, all_others = [], [""], []
    while level:
        listings = map_files(list_directory, level)
        level = []
        for files, folders, others in listings:
            found += files
            level += folders
            all_others += others
    found.sort()
    sizes = np.array([size for _, size in found], np.int64)
    return FileList(root, [name for name, _ in found], sizes, None, sorted(all_others))


def _leads_back(link: str) -> bool:
    """Whether a link to a folder leads to one that it lies in itself."""
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, here]) == target


def check_split(split: str, splits: Iterable[str], where: str) -> None:
    """Raise the error that lists the splits there are, unless `split` is one of them."""
    # str: datasets' NamedSplit prints as such
    splits = [str(name) for name in splits]
    if split not in splits:
        hint = " Parts of a split are chosen with max_samples." if "[" in split or "+" in split else ""
        raise UserError(f"split {split!r} is not in {where}; it has {', '.join(map(repr, splits)) or 'none'}.{hint}")


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
