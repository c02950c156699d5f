"""The files on this machine that build a teacher, and what a folder of its outputs remembers about them.

Training in `cached` mode does not load the teacher, so it would not notice changed weights in a local folder. Therefore
teacher_files.json beside the shards lists the files that the outputs were last compared with. Each has a hash of its
content; an unchanged size, time and inode make it unnecessary to hash the file again. The file decides no byte of a
shard. If it is missing, the teacher is built and compared again.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distillery.cache.store import FORMAT_VERSION, FutureFormatError, read_guarded, record_text
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path, is_locked, write_atomic
from distillery.teacher_cache.records import FILES_NAME, file_hash

LOCAL_DIR = "local-dir:"
_README = re.compile(r"readme|readme.*\.(md|rst|txt|html)", re.IGNORECASE)
# more files than any model has: the folder is a home or a data set, and is not looked through to the end
MAX_FILES = 100_000
# above it the teacher is built sooner than its folder is hashed: the files are then known by size and times alone
MAX_HASHED_BYTES = 16 << 30


def local_sources(model: Mapping[str, Any]) -> dict[str, Path]:
    """Key of the model configuration -> the folder or file that it names on this machine.

    teacher_repo and a timm name `local-dir:FOLDER`; of teacher_kwargs every text that is the path of a file, or with a
    slash in it that of a folder, from the working directory or from teacher_repo.

    Raises:
        MissingFileError: there is no such local-dir.
    """
    found, bases = {}, [Path()]
    name, source = model["teacher_name"], model["teacher_source"]
    if source == "timm" and (folder := local_dir_of(name)) is not None:
        if not folder.is_dir():
            raise MissingFileError(f"teacher_name: {name}: {folder} is no folder. Check the path.")
        found["teacher_name"] = folder
    if source == "torch_hub" and model["teacher_repo"] and (folder := expand_path(model["teacher_repo"])).is_dir():
        found["teacher_repo"] = folder
        bases.append(folder)
    for key, text in _texts_in(model["teacher_kwargs"] or {}, "teacher_kwargs"):
        for base in bases:
            if (path := path_of_text(text, base)) is not None:
                found[key] = path
                break
    return found


def local_dir_of(name: str) -> Path | None:
    """FOLDER of a timm name `local-dir:FOLDER`; None for other names."""
    return Path(name[len(LOCAL_DIR) :]) if name.lower().startswith(LOCAL_DIR) else None


def _texts_in(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _texts_in(inner, f"{key}.{name}")
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _texts_in(inner, f"{key}.{number}")


def path_of_text(text: str, base: Path = Path()) -> Path | None:
    """The file, or where the text has a slash the folder, that a text names from a folder; None where it names none."""
    try:
        path = base / Path(text).expanduser()
        return path if path.is_file() or ("/" in text and path.is_dir()) else None
    except (OSError, ValueError, RuntimeError):  # too long for a path, a zero byte, a ~user that is not known
        return None


@dataclass(frozen=True)
class TeacherFiles:
    """The files of local_sources as they are now.

    paths: "teacher_repo/models.py" -> where it is; states: the same names -> (bytes, mtime ns, ctime ns, inode), or
    None for what is no file; is_whole: not more than MAX_FILES; hashes: those taken so far.
    """

    paths: dict[str, Path]
    states: dict[str, tuple[int, ...] | None]
    is_whole: bool
    hashes: dict[str, str | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.paths)

    def bytes_to_hash(self, known: Mapping[str, list]) -> int:
        """Bytes whose hash `known` does not spare; known: as remembered_files."""
        return sum(self.states[name][0] for name in self._to_hash(known) if name not in self.hashes)

    def _to_hash(self, known: Mapping[str, list]) -> list[str]:
        return [name for name, state in self.states.items() if state and known.get(name, [None])[:-1] != [*state]]

    def entries(self, known: Mapping[str, list]) -> dict[str, list]:
        """Name -> [bytes, mtime ns, ctime ns, inode, hash], as they are remembered; [None] for what cannot be read.

        The hash is null above MAX_HASHED_BYTES in all.
        """
        to_hash = set(self._to_hash(known))
        is_small = sum(self.states[name][0] for name in to_hash) <= MAX_HASHED_BYTES
        found: dict[str, list] = {}
        for name, state in self.states.items():
            if state is None:
                found[name] = [None]
            elif name in to_hash:
                found[name] = [*state, self._hash_of(name) if is_small else None]
            else:
                found[name] = known[name]
        return found

    def _hash_of(self, name: str) -> str | None:
        if name not in self.hashes:
            try:
                self.hashes[name] = file_hash(self.paths[name].resolve())
            except (OSError, UserError):  # may not be read: nor by the teacher
                self.hashes[name] = None
        return self.hashes[name]


def scan_teacher_files(sources: Mapping[str, Path], leave_out: Iterable[Path] = ()) -> TeacherFiles:
    """Look at the files of local_sources without opening them.

    Left out of a folder: __pycache__, hidden files and folders, README*, and the folders `leave_out`, in which this
    project writes. Links are followed; a folder that several lead to counts once.
    """
    skipped, paths, is_whole = {path.resolve() for path in leave_out}, {}, True
    for key, source in sources.items():
        if not source.is_dir():
            paths[key] = source
            continue
        for name, path in _walk(source, skipped):
            if len(paths) >= MAX_FILES:
                is_whole = False
                break
            paths[f"{key}/{name}"] = path
    return TeacherFiles(paths, {name: _state_of(path) for name, path in paths.items()}, is_whole)


def _walk(root: Path, skipped: set[Path]) -> Iterator[tuple[str, Path]]:
    """(path below root, path) of the files of a folder, in an order that their names alone decide."""
    seen, waiting = set(), [(root, "")]
    while waiting:
        folder, prefix = waiting.pop(0)
        real = folder.resolve()
        if real in seen or (prefix and real in skipped):
            continue
        seen.add(real)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # may not be read: nor by the teacher
            yield f"{prefix}", folder
            continue
        for entry in entries:
            if entry.name == "__pycache__" or entry.name.startswith("."):
                continue
            if _is_folder(entry):
                waiting.append((Path(entry.path), f"{prefix}{entry.name}/"))
            elif not _README.fullmatch(entry.name):
                yield f"{prefix}{entry.name}", Path(entry.path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _state_of(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def changed_files(now: Mapping[str, list], known: Mapping[str, list]) -> list[str]:
    """Names of the files that are new, gone or of other content; both as TeacherFiles.entries."""
    names = sorted(now.keys() | known.keys())
    return [name for name in names if not _is_same(now.get(name), known.get(name))]


def _is_same(a: list | None, b: list | None) -> bool:
    if a is None or b is None:
        return False
    return a == b or (len(a) == len(b) and a[-1] is not None and (a[0], a[-1]) == (b[0], b[-1]))


def remembered_files(directory: Path, fingerprint: str) -> dict[str, list]:
    """What a folder of outputs remembers, as TeacherFiles.entries; {} where it is lost, damaged or another folder's.

    Raises:
        FutureFormatError: it is of a later version.
    """
    try:
        content = check_files_record(directory / FILES_NAME)
    except FutureFormatError:
        raise
    except (OSError, UserError):
        return {}
    return content["files"] if content["fingerprint"] == fingerprint else {}


def check_files_record(path: Path) -> dict:
    """teacher_files.json, checked.

    Raises:
        FileNotFoundError: there is none. UserError: damaged. FutureFormatError: of a later version.
    """
    content = read_guarded(path)
    files = content.get("files")
    is_sound = isinstance(content.get("fingerprint"), str) and isinstance(files, dict)
    if not is_sound or not all(isinstance(entry, list) and len(entry) in (1, 5) for entry in files.values()):
        raise UserError(f"{path}: damaged: it does not say what files there were.")
    return content


def remember_files(directory: Path, fingerprint: str, entries: Mapping[str, list]) -> OSError | None:
    """Write teacher_files.json where it would say something else; returns the error of a folder that takes none.

    A process killed in here leaves the old file or the new one, and maybe a temporary one, which the next removes.
    """
    if remembered_files(directory, fingerprint) == entries:
        return None
    content = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "files": dict(entries)}
    try:
        write_atomic(directory / FILES_NAME, record_text(content))
        for path in directory.glob(f".{FILES_NAME}.tmp-*"):
            with contextlib.suppress(FileNotFoundError):  # another process removed it
                if is_locked(path) is False:
                    path.unlink()
    except OSError as error:
        return error
    return None
