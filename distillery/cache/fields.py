"""The large tensors of a shard, in an archive as distillery.cache.archive writes it.

The place of each tensor in the file follows from the sizes alone, so rows of every tensor can be written and read in
place. This file does not import torch.
"""

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xxhash

from distillery.cache.archive import DTYPES, ZipMember, archive_tail, crc32, data_descriptor, local_header
from distillery.sources.masks import MASK_DTYPES
from distillery.system.errors import UserError
from distillery.system.files import MAX_MEMBER_BYTES, open_regular, read_blocks

# of teacher outputs
FIELD_DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
_ITEM_BYTES = {name: np.dtype(dtype).itemsize for name, dtype in (DTYPES | FIELD_DTYPES | MASK_DTYPES).items()}


@dataclass(frozen=True)
class Field:
    """A big tensor of a shard: num_rows rows with a checksum each; `offset` is its first byte in the file.

    A row is an image, or what the teacher says of one view of one image. row_sizes: int64 [num_rows], bytes of each row
    where they differ; None: all have row_bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_rows: int
    offset: int
    header_offset: int = 0
    row_sizes: np.ndarray | None = None

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, where all have the same."""
        return math.prod(self.shape) // self.num_rows * _ITEM_BYTES[self.dtype]

    @property
    def size(self) -> int:
        """Bytes of all."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.size


def place_fields(specs: Mapping[str, tuple[str, tuple[int, ...]]], *, row_dims: int = 2) -> list[Field]:
    """Where the tensors name -> (dtype, shape) stand in a shard, in this order; the first row_dims number the rows."""
    fields, position = [], 0
    for key, (name, (dtype, shape)) in enumerate(specs.items()):
        offset = position + len(local_header(_member_name(key), position))
        fields.append(Field(name, dtype, tuple(shape), math.prod(shape[:row_dims]), offset, position))
        position = fields[-1].end + len(data_descriptor(_member(key, fields[-1], 0)))
    return fields


def frame_of(
    fields: list[Field], crcs: list[int], small: Mapping[str, np.ndarray], meta: str
) -> list[tuple[int, bytes]]:
    """(offset, bytes) of all that stands in a shard around its big tensors.

    Args:
        fields: by place_fields.
        crcs: CRC-32 of each field's bytes.
        small: the small tensors that follow: valid, bool [N], and where there are labels, int64 [N].
        meta: the shard's description of itself.
    """
    members = [_member(key, field, crc) for key, (field, crc) in enumerate(zip(fields, crcs, strict=True))]
    pieces = [(0, local_header(members[0].name, 0))]
    for before, field, after in zip(members, fields, members[1:], strict=False):
        pieces.append((field.end, data_descriptor(before) + local_header(after.name, after.offset)))
    tensors = {field.name: (field.dtype, field.shape) for field in fields}
    return [*pieces, (fields[-1].end, archive_tail(members, fields[-1].end, tensors, small, meta))]


def _member_name(key: int) -> str:
    return f"archive/data/{key}"


def _member(key: int, field: Field, crc: int) -> ZipMember:
    return ZipMember(_member_name(key), field.header_offset, field.size, crc)


@dataclass(frozen=True)
class FileDigest:
    """What one sequential read of a shard says.

    size: in bytes; hash: "xxh3_128:<hex>"; crcs: CRC-32 of each field; checksums: field -> uint64 [num_rows],
    XXH3-64 of every row; frame: all other bytes, in the pieces of frame_of.
    """

    size: int
    hash: str
    crcs: list[int]
    checksums: dict[str, np.ndarray]
    frame: list[tuple[int, bytes]]


def digest_file(path: os.PathLike, fields: list[Field], max_frame_bytes: int = MAX_MEMBER_BYTES) -> FileDigest:
    """Read a whole shard once: the one pass over its bytes, for images and teacher outputs.

    Raises:
        UserError: it ends inside a field, or has more than max_frame_bytes around its fields.
    """
    file_hash, crcs, checksums, frame = xxhash.xxh3_128(), [], {}, []
    with open_regular(path) as file:
        size, position = os.fstat(file.fileno()).st_size, 0
        # also before memory is taken for the checksums of rows that a forged record claims
        if not 0 < size - sum(field.size for field in fields) <= max_frame_bytes:
            raise UserError(f"{path}: {size} bytes are not those of a shard with the rows it claims.")
        for field in fields:
            frame.append((position, b"".join(map(bytes, _hashed(file, field.offset - position, file_hash)))))
            crc, digests = 0, _RowDigests(field)
            for block in _hashed(file, field.size, file_hash):
                crc = crc32(block, crc)
                digests.update(block)
            if digests.row < len(digests.values):
                raise UserError(f"{path}: {size} bytes; it ends before its {field.name} do.")
            crcs.append(crc)
            checksums[field.name], position = digests.values, field.end
        frame.append((position, b"".join(map(bytes, _hashed(file, size - position, file_hash)))))
    return FileDigest(size, f"xxh3_128:{file_hash.hexdigest()}", crcs, checksums, frame)


def _hashed(file, count: int, file_hash: "xxhash.xxh3_128") -> Iterator[memoryview]:
    for block in read_blocks(file, count):
        file_hash.update(block)
        yield block


class _RowDigests:
    """XXH3-64 of every row of a stream of bytes that comes in blocks of any length."""

    def __init__(self, field: Field) -> None:
        self.values = np.zeros(field.num_rows, np.uint64)
        sizes = itertools.repeat(field.row_bytes) if field.row_sizes is None else field.row_sizes.tolist()
        self.row, self._left = 0, 0
        self._hash, self._sizes = xxhash.xxh3_64(), iter(sizes)
        self._begin_row()

    def update(self, block: memoryview) -> None:
        while block:
            part = block[: self._left]
            self._hash.update(part)
            block, self._left = block[len(part) :], self._left - len(part)
            if self._left == 0:
                self._end_row()

    def _end_row(self) -> None:
        self.values[self.row] = self._hash.intdigest()
        self._hash.reset()
        self.row += 1
        self._begin_row()

    def _begin_row(self) -> None:
        """Take up the next row that has any bytes."""
        self._left = next(self._sizes, 0)
        while self._left == 0 and self.row < len(self.values):
            self.values[self.row], self.row = xxhash.xxh3_64_intdigest(b""), self.row + 1
            self._left = next(self._sizes, 0)
