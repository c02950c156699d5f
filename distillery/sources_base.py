"""What every kind of source shares: the interface, the list of files it is made of, their identity and split."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from distillery.system.console import format_bytes
from distillery.system.errors import MissingFileError, UserError

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


class Source(ABC):
    """Encoded images in a fixed order, addressed by global_idx 0..len-1.

    A source pickles small enough to be sent to workers, before and after use: what it has open stays behind and is
    opened again on demand. It is for one thread at a time; copy.copy(source) shares the index and opens its own files.

    Attributes:
        class_names: the classes by label number where they are known, else None.
        named_by_feature: whether these names come from a description of the column, and the labels are numbers.
    """

    class_names: list[str] | None = None
    named_by_feature: bool = False

    def __init__(self, identity: dict, file_bytes: int, left_out: dict[str, int] | None = None) -> None:
        """left_out: what the source has and does not give -> how many, for the plan."""
        self._identity = identity
        self._file_bytes = file_bytes
        self._left_out = left_out or {}
        self._handles: dict = {}

    @property
    def identity(self) -> dict:
        """JSON that changes when the rows do: names, sizes and edges of the files; no absolute path, time or host."""
        return self._identity

    @property
    def file_bytes(self) -> int:
        """Bytes of all the files."""
        return self._file_bytes

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
        left_out = ", ".join(f"{number:,} {what}" for what, number in self._left_out.items() if number)
        return f"{line}, {left_out} left out" if left_out else line

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
