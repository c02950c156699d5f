"""Read and write the torch.save archive of a shard byte by byte, without torch."""

import contextlib
import errno
import math
import os
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distillery.system.errors import UserError
from distillery.system.files import MAX_MEMBER_BYTES, open_regular

PAYLOAD_OFFSET = 128
_STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "uint8": "Byte",
    "int8": "Char",
    "int16": "Short",
    "bool": "Bool",
    "int64": "Long",
}
_ALIGNMENT_BYTES = 64
_ZIP64_LIMIT = 0xFFFFFFFF
_HAS_DATA_DESCRIPTOR = 0x0008

try:
    from isal.isal_zlib import crc32
except ImportError:  # an accelerator only, 16 times as fast: the same numbers
    from zlib import crc32

# of images whose rows all have the same number of bytes
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "uint8": np.uint8}
# of images whose rows are encoded files, each of its own length
ENCODED_DTYPE = "jpeg"


@dataclass
class ZipMember:
    """A member of the archive: offset is its local header's; offset, size and what follows from them in bytes."""

    name: str
    offset: int
    size: int
    crc: int


def local_header(name: str, offset: int) -> bytes:
    """A zip local header at `offset`, padded so that the data after it is aligned; sizes and CRC follow the data."""
    encoded = name.encode()
    start = offset + 30 + len(encoded) + 4
    padding = -start % _ALIGNMENT_BYTES
    if offset == 0:
        padding = PAYLOAD_OFFSET - start
    # extra field "FB" is how torch.save pads
    extra = struct.pack("<2sH", b"FB", padding) + b"\0" * padding
    fixed = struct.pack("<4s5H3I2H", b"PK\3\4", 45, _HAS_DATA_DESCRIPTOR, 0, 0, 0x21, 0, 0, 0, len(encoded), len(extra))
    return fixed + encoded + extra


def data_descriptor(member: ZipMember) -> bytes:
    """What follows a member's data: its CRC-32 and size."""
    sizes = "QQ" if member.size >= _ZIP64_LIMIT else "II"
    return struct.pack(f"<4sI{sizes}", b"PK\7\10", member.crc, member.size, member.size)


def central_header(member: ZipMember) -> bytes:
    """A member's entry in the archive's directory."""
    wide, extra = [], b""
    size = member.size
    if member.size >= _ZIP64_LIMIT:
        wide += [member.size, member.size]
        size = _ZIP64_LIMIT
    offset = member.offset
    if member.offset >= _ZIP64_LIMIT:
        wide.append(member.offset)
        offset = _ZIP64_LIMIT
    if wide:
        extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide)
    name = member.name.encode()
    fixed = struct.pack("<4s6H", b"PK\1\2", 45, 45, _HAS_DATA_DESCRIPTOR, 0, 0, 0x21)
    fixed += struct.pack("<3I5H2I", member.crc, size, size, len(name), len(extra), 0, 0, 0, 0, offset)
    return fixed + name + extra


def end_of_archive(count: int, directory_offset: int, directory_size: int) -> bytes:
    """What follows the directory of `count` members."""
    zip64_record = b""
    if directory_offset >= _ZIP64_LIMIT:
        position = directory_offset + directory_size
        zip64_record = struct.pack(
            "<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, directory_size, directory_offset
        ) + struct.pack("<4sIQI", b"PK\6\7", 0, position, 1)
    return zip64_record + struct.pack(
        "<4s4H2IH", b"PK\5\6", 0, 0, count, count, directory_size, min(directory_offset, _ZIP64_LIMIT), 0
    )


def _integer(value: int) -> bytes:
    if value < 256:
        return b"K" + bytes([value])
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _tensor(key: int, dtype: str, shape: tuple[int, ...]) -> bytes:
    """One contiguous tensor, as torch does: _rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict())."""
    stride, step = [], 1
    for extent in reversed(shape):
        stride.insert(0, step)
        step *= extent
    storage_type = f"ctorch\n{_STORAGES[dtype]}Storage\n".encode()
    storage = b"(" + _text("storage") + storage_type + _text(str(key)) + _text("cpu") + _integer(step) + b"tQ"
    dims = b"".join(b"(" + b"".join(map(_integer, values)) + b"t" for values in (shape, stride))
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + _integer(0) + dims + b"\x89ccollections\nOrderedDict\n)RtR"
    )


def pickle_of(tensors: dict[str, tuple[str, tuple[int, ...]]], meta: str) -> bytes:
    """Pickle (protocol 2) of {name: tensor, ..., "meta": meta} where tensor k lives in the archive member data/k."""
    items = b"".join(_text(name) + _tensor(key, *spec) for key, (name, spec) in enumerate(tensors.items()))
    return b"\x80\x02}(" + items + _text("meta") + _text(meta) + b"u."


def pixel_dtype_of(dtype: str) -> str:
    """What the pixels of a stored image are, one of DTYPES: encoded ones are uint8 once they are decoded."""
    return "uint8" if dtype == ENCODED_DTYPE else dtype


def row_bytes_of(image_shape: Sequence[int], dtype: str) -> int:
    """Bytes of one image as a raw batch holds it: as it is stored, or of an encoded one the pixels."""
    return math.prod(image_shape) * np.dtype(DTYPES[pixel_dtype_of(dtype)]).itemsize


class ForeignShardError(UserError):
    """A healthy file of torch.save that this project's stage 1 did not write."""


def payload_header() -> bytes:
    """The first PAYLOAD_OFFSET bytes of every shard."""
    return local_header("archive/data/0", 0)


def archive_tail(
    members: list[ZipMember],
    end: int,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    small: Mapping[str, np.ndarray],
    meta: str,
) -> bytes:
    """All bytes after the data of the last big tensor.

    Args:
        members: the big tensors, in the order of their places.
        end: the byte after the last one's data.
        tensors: name -> (dtype, shape) of the big ones, in that order.
        small: name -> values of the tensors that follow.
        meta: the shard's description of itself.
    """
    tensors = tensors | {name: (values.dtype.name, values.shape) for name, values in small.items()}
    contents = {f"archive/data/{key}": values.tobytes() for key, values in enumerate(small.values(), len(members))}
    contents["archive/data.pkl"] = pickle_of(tensors, meta)
    contents["archive/byteorder"] = b"little"
    contents["archive/version"] = b"3\n"
    tail, members = data_descriptor(members[-1]), list(members)
    for name, value in contents.items():
        member = ZipMember(name, end + len(tail), len(value), crc32(value))
        members.append(member)
        tail += local_header(name, member.offset) + value + data_descriptor(member)
    directory = b"".join(map(central_header, members))
    return tail + directory + end_of_archive(len(members), end + len(tail), len(directory))


@contextlib.contextmanager
def _open_archive(path: os.PathLike) -> Iterator[tuple[zipfile.ZipFile, int]]:
    """(the zip archive, its file descriptor); whatever hostile bytes make zipfile raise is a UserError."""
    with open_regular(path) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive, file.fileno()
        except UserError:
            raise
        except (zipfile.BadZipFile, KeyError, EOFError, struct.error, zlib.error, NotImplementedError, RuntimeError,
                ValueError, OverflowError, MemoryError) as error:  # fmt: skip
            raise UserError(f"{path}: damaged, or no shard of this project ({error}).") from error
        except OSError as error:
            if error.errno != errno.EINVAL:  # a seek to where the archive's directory claims something is
                raise
            raise UserError(f"{path}: damaged: its directory points outside the file.") from error


def read_member(path: os.PathLike, name: str) -> bytes:
    """One small member of a shard's archive, its CRC checked, without unpickling anything.

    Raises:
        UserError: not such an archive, or the member is missing, damaged or larger than any shard's would be.
    """
    with _open_archive(path) as (archive, _):
        info = archive.getinfo(f"archive/{name}")
        if info.file_size > MAX_MEMBER_BYTES or info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: its {name} is compressed or claims {info.file_size} bytes; no shard's is.")
        return archive.read(info)


def read_meta(path: os.PathLike) -> str:
    """The JSON text a shard carries about itself, found by walking the pickle's opcodes; nothing is executed.

    Raises:
        ForeignShardError: a healthy file of torch.save, but none of ours. UserError: damaged.
    """
    texts = []
    try:
        for opcode, argument, _ in pickletools.genops(read_member(path, "data.pkl")):
            if opcode.name == "BINUNICODE":
                texts.append(argument)
        if len(texts) < 2 or texts[-2] != "meta":
            raise ValueError("it carries no description of itself")
    except (ValueError, IndexError, OverflowError, MemoryError, struct.error) as error:
        if _is_foreign(path):
            raise ForeignShardError(f"{path}: this project's stage 1 did not write it.") from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: its pickle is damaged ({error}).") from error
    return texts[-1]


def _is_foreign(path: os.PathLike) -> bool:
    """Whether a file has what torch.save writes, and does not begin as our shards do."""
    header = payload_header()
    try:
        with _open_archive(path) as (archive, fd):
            has_pickle = any(name.endswith("/data.pkl") for name in archive.namelist())
            return has_pickle and os.pread(fd, len(header), 0) != header
    except UserError:
        return False


def find_payload(path: os.PathLike) -> tuple[int, int, int]:
    """(offset, size, CRC-32) of the images in any torch.save file of one big tensor: its largest storage.

    Raises:
        UserError: the file is damaged, or no such file.
    """
    with _open_archive(path) as (archive, fd):
        storages = [info for info in archive.infolist() if re.fullmatch(r".*/data/\d+", info.filename)]
        if not storages:
            raise UserError(f"{path}: damaged, or not written by torch.save: it holds no tensor.")
        info = max(storages, key=lambda member: member.file_size)
        name_bytes, extra_bytes = struct.unpack("<2H", os.pread(fd, 30, info.header_offset)[26:])
        offset = info.header_offset + 30 + name_bytes + extra_bytes
        if info.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: its images are compressed; rows cannot be read in place.")
        if offset + info.file_size > os.fstat(fd).st_size:
            raise UserError(f"{path}: damaged: its images end after the file does.")
        return offset, info.file_size, info.CRC
