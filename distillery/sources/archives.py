"""Read images in place from archives: build an index of offsets once, then one pread an image. Also zip archives."""

import os
import posixpath
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from distillery.sources.listing import IMAGE_SUFFIXES, METADATA_NAMES, is_hidden_path, suffix_of
from distillery.system.errors import UserError

_MAX_OPEN_FILES = 64
_ZIP_HEADER_BYTES = 30
# room for the name and the extra field of a local header, so that one read nearly always has the data too
_ZIP_SLACK_BYTES = 320
_MAX_IMAGE_BYTES = 1 << 30  # no image file is larger; a zip bomb is
_MAX_LINKS = 40  # in a chain; as Linux
_MAX_PATH_BYTES = 4096


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A file inside an archive: where its header (zip) or its data (tar) begins, how long it is as it lies there."""

    name: str
    offset: int
    num_bytes: int
    is_deflated: bool = False
    is_sparse: bool = False  # its zeros are not stored: the bytes that lie there are not the file's


@dataclass(frozen=True, slots=True)
class Link:
    """A member that stands for another one; the target of a symbolic link is relative to the link's folder."""

    name: str
    target: str
    is_symbolic: bool


@dataclass(frozen=True)
class ArchiveIndex:
    """What an archive holds: `members` in the order they lie in it, and how many of what else are left out.

    Args:
        metadata: names of the members that list images and their labels.
        has_backslashes: whether images' names have them, as separators of folders.
    """

    members: list[ArchiveMember]
    left_out: dict[str, int]
    metadata: list[str] = field(default_factory=list)
    has_backslashes: bool = False


def resolve_links(entries: Sequence[ArchiveMember | Link]) -> tuple[list[ArchiveMember], int]:
    """The entries with every link replaced by the bytes of its target; and how many links lead to no member."""
    if not any(isinstance(entry, Link) for entry in entries):
        return list(entries), 0
    latest: dict[str, ArchiveMember] = {}
    links: dict[str, str] = {}
    found: list[ArchiveMember | None] = []
    # a hard link means the file of that name that came before it, a symbolic link the last one of all
    for entry in entries:
        name = posixpath.normpath(entry.name)
        member: ArchiveMember | None = None
        if isinstance(entry, ArchiveMember):
            member = entry
        elif entry.is_symbolic:
            links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), entry.target))
        else:
            links[name] = posixpath.normpath(entry.target)
            member = latest.get(links[name])
        if member is not None:
            latest[name] = member
        found.append(member)
    for place, entry in enumerate(entries):
        target = posixpath.normpath(entry.name)
        for _ in range(_MAX_LINKS):
            if found[place] is not None or target is None:
                break
            target = links.get(target)
            found[place] = latest.get(target)
    members = [
        replace(member, name=entry.name) if isinstance(entry, Link) else member
        for entry, member in zip(entries, found, strict=True)
        if member is not None
    ]
    return members, len(entries) - len(members)


class OpenFiles:
    """Descriptors of recently used files; pread needs no position, so a descriptor survives a fork."""

    def __init__(self) -> None:
        self._fds: dict[int, int] = {}

    def get(self, number: int, path: str) -> int:
        """A descriptor for reading the file of this number, opened at its first use."""
        fd = self._fds.pop(number, None)
        if fd is None:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            if len(self._fds) >= _MAX_OPEN_FILES:
                os.close(self._fds.pop(next(iter(self._fds))))
        self._fds[number] = fd
        return fd

    def __del__(self) -> None:
        for fd in self._fds.values():
            os.close(fd)


def read_exactly(fd: int, num_bytes: int, offset: int, path: str) -> bytes:
    """`num_bytes` from `offset`.

    Raises:
        OSError: the file ends before.
    """
    data = os.pread(fd, num_bytes, offset)
    while len(data) < num_bytes:
        more = os.pread(fd, num_bytes - len(data), offset + len(data))
        if not more:
            raise OSError(f"{path} ends at byte {offset + len(data)}, {offset + num_bytes} expected: truncated?")
        data += more
    return data


def index_zip(path: str) -> ArchiveIndex:
    """The images of a zip archive in the order they lie in it, by its central directory.

    Backslashes in names, which some Windows programs write, separate folders.

    Raises:
        UserError: not a zip archive, or one whose images are encrypted or packed in another way than deflate.
    """
    entries: list[ArchiveMember | Link] = []
    metadata: list[str] = []
    has_backslashes = False
    left_out: Counter[str] = Counter()
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            left_out["bytes of another archive before it"] = _bytes_of_another(path, infos)
            for info in infos:
                name = info.filename.replace("\\", "/")
                if name.endswith("/") or is_hidden_path(name):
                    continue
                if suffix_of(name) in IMAGE_SUFFIXES:
                    entries.append(_zip_entry(archive, info, name, path))
                    has_backslashes |= "\\" in info.filename
                elif posixpath.basename(name) in METADATA_NAMES:
                    metadata.append(info.filename)
                else:
                    left_out["other files"] += 1
    except UserError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, zlib.error) as error:
        raise UserError(f"{path}: not a zip archive, or damaged ({error}).") from error
    members, lost = resolve_links(entries)
    left_out["links"] = lost
    return ArchiveIndex(members, dict(+left_out), metadata, has_backslashes)


def _bytes_of_another(path: str, infos: Sequence[zipfile.ZipInfo]) -> int:
    """The length of an archive before this one in the file (`cat a.zip b.zip`), whose members are not listed."""
    first = infos[0].header_offset if infos else 0
    with open(path, "rb") as file:
        return first if file.read(4) == b"PK\3\4" else 0


def _zip_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, path: str) -> ArchiveMember | Link:
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path}: {info.filename} is encrypted or not packed by deflate; pack the archive anew.")
    # programs of Unix write a file's mode there
    if stat.S_ISLNK(info.external_attr >> 16) and info.file_size <= _MAX_PATH_BYTES:
        return Link(name, os.fsdecode(archive.read(info)), is_symbolic=True)
    return ArchiveMember(name, info.header_offset, info.compress_size, info.compress_type == zipfile.ZIP_DEFLATED)


def read_zip_member(fd: int, offset: int, num_bytes: int, is_deflated: bool, path: str) -> bytes:
    """The contents of the member whose local header is at `offset`; b"" if they cannot be unpacked."""
    block = os.pread(fd, _ZIP_HEADER_BYTES + _ZIP_SLACK_BYTES + num_bytes, offset)
    if block[:4] != b"PK\3\4" or len(block) < _ZIP_HEADER_BYTES:
        raise OSError(f"{path}: no zip member at byte {offset}: was the archive changed or truncated?")
    start = _ZIP_HEADER_BYTES + sum(struct.unpack_from("<2H", block, 26))
    data = block[start : start + num_bytes]
    if len(data) < num_bytes:
        data = read_exactly(fd, num_bytes, offset + start, path)
    if not is_deflated:
        return data
    # one rotten member must not end every run at the same place: as a missing image it is listed and left out
    unpacker = zlib.decompressobj(wbits=-15)
    try:
        image = unpacker.decompress(data, _MAX_IMAGE_BYTES)
    except zlib.error:
        return b""
    return image if unpacker.eof else b""
