"""A record made again from the bytes of its shard: how a shard is adopted, verified and found damaged."""

import math
import os
from pathlib import Path

import numpy as np
import xxhash

from distillery.records import check_meta, decode_checksums, encode_checksums, parse_json, valid_rows
from distillery.shard_format import DTYPES, crc32, payload_header, read_member, read_meta, shard_tail
from distillery.system.errors import UserError
from distillery.system.files import MAX_MEMBER_BYTES, open_regular, read_blocks


def record_of_shard(path: Path) -> dict:
    """The record of a shard from the shard alone, every byte of it compared with what it should be.

    Raises:
        UserError: the shard is damaged or not of this format (FutureFormatError: of a later one).
    """
    text = read_meta(path)
    record = check_meta(parse_json(path, text), path)
    size, digest, row_digests, payload_crc, tail = hash_shard(path, record)
    wrong = np.flatnonzero(row_digests != decode_checksums(record["row_checksums"]))
    if len(wrong):
        raise UserError(f"{path}: damaged: {len(wrong)} rows differ from their checksums, the first is row {wrong[0]}.")
    # the rest of the file follows from its rows, labels and description: no byte of it is taken on trust
    shape = (record["num_samples"], *record["image_shape"])
    labels = np.frombuffer(read_member(path, "data/2"), "<i8") if record["identity"]["labels"] else None
    if tail != shard_tail(payload_crc, record["dtype"], shape, valid_rows(record), labels, text):
        raise UserError(f"{path}: damaged: the bytes after its rows are not those of this shard.")
    return record | {"bytes": size, "hash": digest}


def rehash_record(path: Path, record: dict) -> dict:
    """The record of a predecessor's shard, which does not describe itself, with all that its bytes decide afresh."""
    size, digest, row_digests, _, _ = hash_shard(path, record, own_format=False)
    return record | {"bytes": size, "hash": digest, "row_checksums": encode_checksums(row_digests)}


def hash_shard(path: Path, record: dict, *, own_format: bool = True) -> tuple[int, str, np.ndarray, int, bytes]:
    """One sequential read of a shard.

    Args:
        path: the shard.
        record: where its rows are: payload_offset, num_samples, image_shape, dtype.
        own_format: the shard must begin as ours do, and the bytes after its rows are wanted.
    Returns:
        (size in bytes, file hash, XXH3-64 of every row as uint64 [N], CRC-32 of the rows, the bytes after them or b"").
    """
    row_bytes = math.prod(record["image_shape"]) * np.dtype(DTYPES[record["dtype"]]).itemsize
    digests = np.zeros(record["num_samples"], np.uint64)
    file_hash, row_hash, payload_crc, tail = xxhash.xxh3_128(), xxhash.xxh3_64(), 0, bytearray()
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = b"".join(map(bytes, read_blocks(file, record["payload_offset"])))
        file_hash.update(head)
        if own_format and head != payload_header():
            raise UserError(f"{path}: damaged: it does not begin as a shard does.")
        row, left = 0, row_bytes
        for block in read_blocks(file, len(digests) * row_bytes):
            file_hash.update(block)
            payload_crc = crc32(block, payload_crc)
            while block:
                part = block[:left]
                row_hash.update(part)
                block, left = block[len(part) :], left - len(part)
                if left == 0:
                    digests[row] = row_hash.intdigest()
                    row_hash.reset()
                    row, left = row + 1, row_bytes
        for block in read_blocks(file, size):
            file_hash.update(block)
            if own_format:
                tail += block
            if len(tail) > MAX_MEMBER_BYTES:
                raise UserError(f"{path}: more bytes after its rows than any shard has.")
    return size, f"xxh3_128:{file_hash.hexdigest()}", digests, payload_crc, bytes(tail)
