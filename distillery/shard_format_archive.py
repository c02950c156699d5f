"""The parts of the zip archive that torch.save writes, byte by byte, and its pickle, opcode by opcode.

Sources: PKWARE APPNOTE 6.3.10 (zip, zip64); torch/serialization.py (records data.pkl, byteorder, data/N, version).
"""

import struct
from dataclasses import dataclass

PAYLOAD_OFFSET = 128
_STORAGES = {
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "uint8": "Byte",
    "int8": "Char",
    "bool": "Bool",
    "int64": "Long",
}
_ALIGNMENT_BYTES = 64
_ZIP64_LIMIT = 0xFFFFFFFF
_HAS_DATA_DESCRIPTOR = 0x0008


@dataclass
class Member:
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


def data_descriptor(member: Member) -> bytes:
    """What follows a member's data: its CRC-32 and size."""
    sizes = "QQ" if member.size >= _ZIP64_LIMIT else "II"
    return struct.pack(f"<4sI{sizes}", b"PK\7\10", member.crc, member.size, member.size)


def central_header(member: Member) -> bytes:
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
