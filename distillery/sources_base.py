"""What every kind of source shares: the interface, the list of files it is made of, their identity and split."""

import glob
import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np

from distillery.files import expand_path, format_bytes
from distillery.process import MissingFileError, UserError

# fmt: off
IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff",
    ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif", ".ico",
})
# fmt: on
SPLIT_WORDS = (
    ("train", "training"),
    ("validation", "valid", "val", "dev"),
    ("test", "testing", "eval", "evaluation"),
)
_END_BYTES = 64 * 1024
# small reads of many files wait for a network file system, not for a CPU
_IO_THREADS = 16

T = TypeVar("T")
DataFiles = str | Sequence[str] | dict[str, str | Sequence[str]] | None


class Source(ABC):
    """Encoded images in a fixed order, addressed by global_idx 0..len-1.

    A source pickles small enough to be sent to workers, before and after use: what it has open stays behind and is
    opened again on demand. It is for one thread at a time; copy.copy(source) shares the index and opens its own files.

    Attributes:
        class_names: the classes by label number where they are known, else None.
    """

    class_names: list[str] | None = None

    def __init__(self, identity: dict, file_bytes: int) -> None:
        self._identity = identity
        self._file_bytes = file_bytes
        self._handles: dict = {}

    @property
    def identity(self) -> dict:
        """JSON that changes when the rows do: names, sizes and edges of the files; no absolute path, time or host."""
        return self._identity

    def __len__(self) -> int:
        return self._identity["num_rows"]

    def read(self, start: int, stop: int) -> list[bytes]:
        """The encoded images start..stop-1, b"" where there is none. Consecutive calls read the disk sequentially.

        Raises:
            OSError: a file cannot be read; never counted as a bad image.
        """
        self._check_range(start, stop)
        return self._read(start, stop)

    def read_views(self, start: int, stop: int) -> list[bytes | memoryview]:
        """As read, for use at once: what is in memory already need not be copied, and a view keeps all of it there."""
        self._check_range(start, stop)
        return self._read_views(start, stop)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of a source of {len(self)}")

    def encoded(self, index: int) -> bytes:
        """One encoded image, b"" where there is none."""
        return self.read(index, index + 1)[0]

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        """int64 [stop - start], -1 where a row has none; None where the source was opened without labels."""
        labels = self._all_labels()
        return None if labels is None else labels[start:stop]

    def describe(self) -> str:
        """One line for the plan."""
        identity = self._identity
        count = identity["files"]["count"]
        line = f"{identity['kind']}: {len(self):,} images in {count:,} file{'s' * (count != 1)}"
        line += f" ({format_bytes(self._file_bytes)}), split {identity['split']!r}"
        for key, name in (("dataset_name", "from"), ("revision", "revision"), ("image_column", "column")):
            if identity.get(key):
                line += f", {name} {identity[key]}"
        return line

    @abstractmethod
    def _read(self, start: int, stop: int) -> list[bytes]: ...

    def _read_views(self, start: int, stop: int) -> list[bytes | memoryview]:
        return self._read(start, stop)

    @abstractmethod
    def _all_labels(self) -> np.ndarray | None: ...

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_handles": {}}


@dataclass(frozen=True)
class FileList:
    """The files of a source in row order; `names` are relative to `root`, with forward slashes.

    Args:
        paths: where the files are, if not at root / name.
        num_others: files that were seen and left out, for the plan.
    """

    root: str
    names: list[str]
    sizes: np.ndarray
    paths: list[str] | None = None
    num_others: int = 0

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Where a file is."""
        return self.paths[index] if self.paths is not None else os.path.join(self.root, self.names[index])

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
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    names = [Path(os.path.relpath(path, root)).as_posix() for path in paths]
    return FileList(root, names, np.array([os.stat(path).st_size for path in paths], np.int64))


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no data: dot files, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


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

    def list_directory(relative: str) -> tuple[list[tuple[str, int]], list[str], int]:
        files, folders, others = [], [], 0
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
                    others += 1
        return files, folders, others

    found, level, num_others = [], [""], 0
    while level:
        listings = map_files(list_directory, level)
        level = []
        for files, folders, others in listings:
            found += files
            level += folders
            num_others += others
    found.sort()
    sizes = np.array([size for _, size in found], np.int64)
    return FileList(root, [name for name, _ in found], sizes, None, num_others)


def _leads_back(link: str) -> bool:
    """Whether a link to a folder leads to one that it lies in itself."""
    target, here = os.path.realpath(link), os.path.realpath(os.path.dirname(link))
    return os.path.commonpath([target, here]) == target


def words_of(split: str) -> tuple[str, ...]:
    """The names that folders and files of a split may bear; as in Hugging Face's datasets, "val" means "validation"."""
    return next((words for words in SPLIT_WORDS if split in words), (split,))


def split_of_name(name: str, split: str) -> str | None:
    """The split a relative file name speaks of ("data/train-00000-of-00002.parquet" -> "train"), if any.

    Folders are asked by their whole name, files by the words in theirs; the folders and names of images are classes
    and anything, so of those only a top folder named exactly like a split counts.
    """
    *folders, file = name.lower().split("/")
    words = set(folders[:1]) if suffix_of(file) in IMAGE_SUFFIXES else {*folders, *re.split(r"[^a-z]+", file)}
    for synonyms in (words_of(split), *SPLIT_WORDS):
        if not words.isdisjoint(synonyms):
            return synonyms[0]
    return None


def check_split(split: str, splits: Iterable[str], where: str) -> None:
    """Raise the error that lists the splits there are, unless `split` is one of them."""
    # str: datasets' NamedSplit prints as such
    splits = [str(name) for name in splits]
    if split not in splits:
        hint = " Parts of a split are chosen with max_samples." if "[" in split or "+" in split else ""
        raise UserError(f"split {split!r} is not in {where}; it has {', '.join(map(repr, splits)) or 'none'}.{hint}")


def resolve_files(
    kind: str, suffixes: Iterable[str], data_files: DataFiles, data_dir: str | None, split: str
) -> FileList:
    """The files of a local source.

    data_files (a path, glob, {a..b} pattern or folder; a list of them; or a dict of split -> those) are taken in the
    order given, matches of a pattern sorted. With data_dir alone: the folder data_dir/<split> where there is one, else
    the files whose names speak of the split (of an image folder: its archives only), else, for "train", all.

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
    # dict: a file that two patterns match is read once
    paths = list(dict.fromkeys(path for pattern in patterns for path in _matches(pattern, folder, suffixes)))
    if not paths:
        raise MissingFileError(f"data_files has no files for split {split!r}.")
    return file_list_of(paths)


def _files_of_folder(suffixes: Iterable[str], folder: Path, split: str) -> FileList:
    for word in words_of(split):
        if (folder / word).is_dir():
            return scan_folder(folder / word, suffixes)
    files = scan_folder(folder, suffixes)
    splits = [split_of_name(name, split) for name in files.names]
    named = sorted({name for name in splits if name is not None})
    if not named:
        if not len(files):
            raise MissingFileError(f"{folder} holds no files that could be images of this kind (it holds others: "
                                   f"{files.num_others}).")  # fmt: skip
        check_split(split, ["train"], f"{folder} (no name in it speaks of a split)")
        return files
    wanted = words_of(split)[0]
    check_split(wanted, named, str(folder))
    chosen = [index for index, name in enumerate(splits) if name == wanted]
    return FileList(files.root, [files.names[i] for i in chosen], files.sizes[chosen], None, files.num_others)


def _matches(pattern: str | os.PathLike, folder: Path | None, suffixes: Iterable[str]) -> Iterator[str]:
    """The files one entry of data_files stands for."""
    for text in expand_braces(os.fspath(expand_path(pattern))):
        path = os.path.join(folder or "", text)
        if os.path.isdir(path):
            files = scan_folder(path, suffixes)
            found = [files.path(index) for index in range(len(files))]
        elif os.path.exists(path):
            found = [path]
        else:
            found = sorted(match for match in glob.glob(path, recursive=True) if os.path.isfile(match))
        if not found:
            kind = "pattern" if glob.has_magic(path) else "file"
            raise MissingFileError(f"data_files: no file matches the {kind} {os.path.abspath(path)}")
        yield from found


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


def number_labels(values: Sequence[int | str | None], where: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels as int64, -1 for None; texts become the positions of their sorted names, which are returned too.

    Raises:
        UserError: neither all integers nor all texts, or an integer that int64 does not hold.
    """
    given = [value for value in values if value is not None]
    if all(isinstance(value, str) for value in given):
        names = sorted(set(given))
        position = {name: number for number, name in enumerate(names)}
        return np.array([position.get(value, -1) for value in values], np.int64), names
    if all(isinstance(value, int) for value in given):
        if given and not -(2**63) <= min(given) <= max(given) < 2**63:
            raise UserError(f"{where}: a label does not fit into 64 bits; number the classes from 0.")
        return np.array([-1 if value is None else value for value in values], np.int64), None
    kinds = ", ".join(sorted({type(value).__name__ for value in given}))
    raise UserError(f"{where}: labels must be all integers or all texts; found {kinds}.")
