"""Zip and tar archives of images, read in place: an index of offsets made once, then one pread an image."""

import os
import struct
import tarfile
import zipfile
import zlib
from dataclasses import dataclass

from distillery.process import UserError
from distillery.sources_base import IMAGE_SUFFIXES, is_hidden, suffix_of

_MAX_OPEN_FILES = 64
_ZIP_HEADER_BYTES = 30
# room for the name and the extra field of a local header, so that one read nearly always has the data too
_ZIP_SLACK_BYTES = 320
_MAX_IMAGE_BYTES = 1 << 30  # no image file is larger; a zip bomb is


@dataclass(frozen=True, slots=True)
class Member:
    """A file inside an archive: where its header (zip) or its data (tar) begins, how long it is as it lies there."""

    name: str
    offset: int
    num_bytes: int
    is_deflated: bool = False


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


def index_zip(path: str) -> tuple[list[Member], int]:
    """The images of a zip archive in the order they lie in it, by its central directory; and how many other files.

    Raises:
        UserError: not a zip archive, or one whose images are encrypted or packed in another way than deflate.
    """
    members, others = [], 0
    try:
        with zipfile.ZipFile(path) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise UserError(f"{path}: not a zip archive, or damaged ({error}).") from error
    for info in infos:
        if info.is_dir() or any(map(is_hidden, info.filename.split("/"))):
            continue
        if suffix_of(info.filename) not in IMAGE_SUFFIXES:
            others += 1
            continue
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}: {info.filename} is encrypted or not packed by deflate; pack the archive anew.")
        is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
        members.append(Member(info.filename, info.header_offset, info.compress_size, is_deflated))
    return members, others


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


def index_tar(path: str) -> list[Member]:
    """The regular files of an uncompressed tar archive: one pass over its headers.

    Raises:
        UserError: not such an archive, or a truncated one.
    """
    members = _index_plain_tar(path)
    if members is not None:
        return members
    members = []
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                if info.isreg():
                    members.append(Member(info.name, info.offset_data, info.size))
                # tarfile keeps every header it has seen
                archive.members = []
    except (tarfile.TarError, EOFError) as error:
        raise UserError(
            f"{path}: not an uncompressed tar archive, or truncated ({error}). "
            "Unpack .tar.gz to .tar: images hardly shrink, and compressed archives cannot be read by offset."
        ) from error
    return members


def _index_plain_tar(path: str) -> list[Member] | None:
    """index_tar for archives of nothing but plain headers, in a third of the time; None leaves all others to tarfile.

    Source: POSIX.1-1988 ustar header layout.
    """
    members, offset = [], 0
    with open(path, "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        while True:
            header = os.pread(file.fileno(), 512, offset)
            if len(header) == 512 and not any(header):
                return members
            try:
                checksum, num_bytes = int(header[148:154], 8), int(header[124:135], 8)
            except ValueError:
                return None
            # the checksum counts its own eight bytes as spaces; types 0 and 5 are files and folders
            if sum(header) - sum(header[148:156]) + 8 * 32 != checksum or header[156] not in b"05":
                return None
            name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
            if prefix:
                name = prefix + b"/" + name
            offset += 512
            if header[156] == ord("0"):
                members.append(Member(name.decode("utf-8", "surrogateescape"), offset, num_bytes))
            elif num_bytes:
                return None
            offset += -(-num_bytes // 512) * 512
            if offset > size:
                return None
