"""Find the members of uncompressed tar archives by offset, whatever program wrote the archive."""

import os
import tarfile
from collections import Counter
from typing import BinaryIO

from distillery.sources.archives import ArchiveIndex, ArchiveMember, Link, resolve_links
from distillery.system.errors import UserError

_BLOCK_BYTES = 512
_SCAN_BYTES = 1 << 20
_GNU_MAGIC = b"ustar "
_GNU_FOLDER = b"D"  # of an incremental archive: a folder with the list of its files
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK": "zip"}


class _TarInfo(tarfile.TarInfo):
    """A header whose name is right in incremental archives too.

    GNU tar keeps the time of the last access where POSIX has the first part of the name, and tarfile takes it for that.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_TarInfo":
        info = super().frombuf(buf, encoding, errors)
        prefix = buf[345:500].partition(b"\0")[0]
        if prefix and buf[257:263] == _GNU_MAGIC and info.type not in tarfile.GNU_TYPES:
            info.name = info.name.removeprefix(f"{prefix.decode(encoding, errors)}/")
        return info


def index_tar(path: str) -> ArchiveIndex:
    """The regular files of an uncompressed tar archive: one pass over its headers.

    An archive may hold several, one after the other, each with its end mark (`tar -A`, `cat`): all are read. A link to
    a member has that member's bytes; other links, devices and bytes behind the last end mark are counted as left out.

    Raises:
        UserError: not such an archive, a truncated one, or one with a damaged header.
    """
    entries: list[ArchiveMember | Link] = []
    left_out: Counter[str] = Counter()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start, is_marked = 0, False
        while start < size:
            stop = _read_plain_headers(file.fileno(), start, size, entries)
            stop = _read_any_headers(file, stop, entries, left_out)
            next_start = _skip_zeros(file.fileno(), stop, size)
            if next_start == start:
                if not is_marked:
                    raise _unreadable(path, f"no member begins at byte {start:,}")
                left_out["bytes after an end mark"] = size - start
                break
            is_marked, start = next_start > stop, next_start
    if not size:
        raise _unreadable(path, "it is empty")
    members, lost = resolve_links(entries)
    left_out["links"] = lost
    return ArchiveIndex(members, dict(+left_out))


def _unreadable(path: str, reason: str) -> UserError:
    with open(path, "rb") as file:
        head = file.read(8)
    packer = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
    advice = f"Copy or download it again; to look at it: tar -tf {path}"
    if packer is not None:
        reason = f"it is {packer} data"
        advice = "Unpack .tar.gz to .tar: images hardly shrink, and compressed archives cannot be read by offset."
    return UserError(f"{path}: not an uncompressed tar archive, or truncated ({reason}). {advice}")


def _read_plain_headers(fd: int, offset: int, size: int, entries: list[ArchiveMember | Link]) -> int:
    """Append the files from `offset` on while headers are plain, in a third of tarfile's time; returns where they end.

    Source: POSIX.1-1988 ustar header layout.
    """
    while True:
        header = os.pread(fd, _BLOCK_BYTES, offset)
        try:
            checksum, num_bytes = int(header[148:154], 8), int(header[124:135], 8)
        except ValueError:
            return offset
        # the checksum counts its own eight bytes as spaces; types 0 and 5 are files and folders
        if sum(header) - sum(header[148:156]) + 8 * 32 != checksum or header[156] not in b"05":
            return offset
        is_file = header[156] == ord("0")
        stop = offset + _BLOCK_BYTES + -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
        if stop > size or (num_bytes and not is_file):
            return offset
        if is_file:
            name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
            name = prefix + b"/" + name if prefix and header[257:263] != _GNU_MAGIC else name
            entries.append(ArchiveMember(name.decode("utf-8", "surrogateescape"), offset + _BLOCK_BYTES, num_bytes))
        offset = stop


def _read_any_headers(file: BinaryIO, offset: int, entries: list[ArchiveMember | Link], left_out: Counter[str]) -> int:
    """As _read_plain_headers, for headers of every kind (long names, links, sparse files): up to an end mark or damage.

    Raises:
        UserError: the archive ends inside a member.
    """
    header = os.pread(file.fileno(), _BLOCK_BYTES, offset)
    if not any(header):
        return offset
    file.seek(offset)
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_TarInfo) as archive:
            while (info := archive.next()) is not None:
                if info.isreg():
                    entries.append(ArchiveMember(info.name, info.offset_data, info.size, is_sparse=info.issparse()))
                elif info.islnk() or info.issym():
                    entries.append(Link(info.name, info.linkname, is_symbolic=info.issym()))
                elif not info.isdir() and info.type != _GNU_FOLDER:
                    left_out["special files"] += 1
                # tarfile keeps every header it has seen
                archive.members = []
            return archive.offset
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise _unreadable(file.name, str(error)) from error


def _skip_zeros(fd: int, offset: int, size: int) -> int:
    """The first block from `offset` on that is not all zeros, else the end of the file."""
    while offset < size:
        chunk = os.pread(fd, _SCAN_BYTES, offset)
        num_zeros = len(chunk) - len(chunk.lstrip(b"\0"))
        if num_zeros < len(chunk):
            return offset + num_zeros // _BLOCK_BYTES * _BLOCK_BYTES
        offset += len(chunk)
    return size
