"""An image shard's record, checked and made from its bytes; index.json and failures.jsonl as views of the records."""

import base64
import json
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from distillery.cache.archive import DTYPES, crc32, payload_header, read_member, read_meta, shard_tail
from distillery.cache.store import (
    FORMAT_VERSION,
    RecordScan,
    check_version,
    decode_checksums,
    encode_checksums,
    keep_views,
    parse_json,
    read_guarded,
)
from distillery.system.errors import UserError
from distillery.system.files import MAX_MEMBER_BYTES, canonical_json, open_regular, read_blocks, sha256_of

INDEX_NAME = "index.json"
FAILURES_NAME = "failures.jsonl"
SHARD_PATTERN = re.compile(r"images_(?:shard|s\d{3,})_\d{5,}\.pt")
# source kind of an upgraded cache of this project's predecessor, whose shards carry no description of themselves
PREDECESSOR = "predecessor"
_MAX_ROWS = 1 << 53  # the largest count that JSON readers of other languages keep exact


def shard_name(shard_idx: int) -> str:
    """images_shard_00007.pt for 7."""
    return f"images_shard_{shard_idx:05d}.pt"


def encode_sizes(values: np.ndarray) -> dict:
    """uint32 [N, 2] as it stands in a record."""
    return {"unit": "px, height and width", "values": base64.b64encode(values.astype("<u4").tobytes()).decode()}


def decode_sizes(entry: dict) -> np.ndarray:
    """uint32 [N, 2] out of a record."""
    return np.frombuffer(base64.b64decode(entry["values"], validate=True), dtype="<u4").reshape(-1, 2)


def read_record(path: Path) -> dict:
    """A shard's record, every byte checked with the hash it carries, then key by key.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged, or of a future format (FutureFormatError).
    """
    return check_record(read_guarded(path), path)


def valid_rows(record: dict) -> np.ndarray:
    """bool [N]: the rows that hold an image."""
    valid = np.ones(record["num_samples"], dtype=bool)
    valid[[entry["global_idx"] - record["global_start"] for entry in record["failures"]]] = False
    return valid


def is_predecessors(record: dict) -> bool:
    """Whether a record is of an upgraded cache of the predecessor, whose shards do not describe themselves."""
    return record["identity"]["source"].get("kind") == PREDECESSOR


def check_meta(record: dict, path: Path) -> dict:
    """check_record for what a shard says about itself, which leaves its own size and hash open."""
    check_version(record, path)
    check_record(record | {"bytes": path.lstat().st_size, "hash": "xxh3_128:" + "0" * 32}, path)
    return record


def check_record(record: dict, path: Path) -> dict:
    """Raise UserError unless `record` is a well-formed record of the shard beside `path`; returns it."""
    try:
        is_consistent = _is_consistent(record, path.with_suffix(".pt").name)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{path}: not a shard's record ({type(error).__name__}: {error}).") from error
    if not is_consistent:
        raise UserError(f"{path}: its fields contradict each other or the file's name.")
    return record


def _is_consistent(record: dict, name: str) -> bool:
    identity, failures, shape = record["identity"], record["failures"], record["image_shape"]
    counts = [record[key] for key in ("format_version", "num_samples", "global_start", "bytes", "shard_idx",
                                      "payload_offset", "source_num_samples", "num_failed")]  # fmt: skip
    if not all(type(value) is int and 0 <= value < _MAX_ROWS for value in [*counts, *shape, identity["shard_size"]]):
        return False
    start, rows = record["global_start"], record["num_samples"]
    row_bytes = math.prod(shape) * np.dtype(DTYPES[record["dtype"]]).itemsize
    failed = [entry["global_idx"] - start for entry in failures]
    follows_its_number = (name, start) == (
        shard_name(record["shard_idx"]),
        record["shard_idx"] * identity["shard_size"],
    )
    return bool(
        record["format_version"] == FORMAT_VERSION
        and record["shard_path"] == name
        and (is_predecessors(record) or follows_its_number)
        and 0 < rows <= identity["shard_size"]
        and start + rows <= record["source_num_samples"]
        and len(shape) == 3
        and row_bytes > 0
        and (identity["dtype"], identity["image_shape"]) == (record["dtype"], shape)
        and type(identity["labels"]) is bool
        and all(type(version) is str for version in record["libraries"].values())
        and len(failures) == record["num_failed"]
        and all(type(row) is int and 0 <= row < rows for row in failed)
        and sorted(set(failed)) == failed
        and len(decode_checksums(record["row_checksums"])) == rows
        # shards of earlier versions, and the predecessor's, do not have them
        and ("source_sizes" not in record or len(decode_sizes(record["source_sizes"])) == rows)
        and all(number.isdecimal() and type(name) is str for number, name in record.get("class_names", {}).items())
        and record["payload_offset"] + rows * row_bytes <= record["bytes"]
        and record["fingerprint"] == sha256_of(identity)
        and re.fullmatch(r"xxh3_128:[0-9a-f]{32}", record["hash"])
    )


def image_scan(directory: Path) -> RecordScan:
    """The scan of a folder of image shards."""
    return RecordScan(directory, pattern=SHARD_PATTERN, read=read_record, bulk=("row_checksums", "source_sizes"))


def index_of(records: list[dict], num_target: int | None = None) -> dict:
    """index.json's content: a pure function of the records and of how many rows the cache shall have (None: all)."""
    identity, first = records[0]["identity"], records[0]
    num_target = min(first["source_num_samples"], num_target or first["source_num_samples"])
    names = {int(number): name for record in records for number, name in record.get("class_names", {}).items()}
    return {
        "format_version": FORMAT_VERSION,
        "num_samples": sum(record["num_samples"] for record in records),
        "source_num_samples": first["source_num_samples"],
        "complete": holds_first_rows(records, num_target),
        "fingerprint": first["fingerprint"],
        "source": identity["source"],
        "preprocess": identity["preprocess"],
        "dtype": first["dtype"],
        "image_shape": first["image_shape"],
        "shard_size": identity["shard_size"],
        "labels": identity["labels"],
        **({"class_names": {str(number): names[number] for number in sorted(names)}} if names else {}),
        "cache_image_size": first["image_shape"][1],
        "cache_dtype": first["dtype"],
        "shards": [
            {key: record[key] for key in ("shard_path", "global_start", "num_samples", "num_failed", "bytes", "hash")}
            for record in records
        ],
    }


def holds_first_rows(records: list[dict], num_target: int) -> bool:
    """Whether the shards hold rows 0..num_target - 1 of the source."""
    return num_target <= sum(
        max(0, min(num_target, record["global_start"] + record["num_samples"]) - record["global_start"])
        for record in records
    )


def index_text(index: dict) -> bytes:
    """index.json as it stands on disk."""
    return json.dumps(index, indent=1).encode() + b"\n"


def failures_of(records: Iterable[dict]) -> bytes:
    """failures.jsonl's content."""
    return b"".join(canonical_json(entry) + b"\n" for record in records for entry in record["failures"])


def write_views(directory: Path, scan: RecordScan, num_target: int | None = None) -> dict | None:
    """Write index.json and failures.jsonl from the records, again until no other writer published meanwhile.

    Raises:
        UserError: the records are of two configurations: two jobs wrote here at the same time.
    """

    def views_of(records: list[dict]) -> tuple[dict, dict[Path, bytes]]:
        index = index_of(records, num_target)
        return index, {directory / FAILURES_NAME: failures_of(records), directory / INDEX_NAME: index_text(index)}

    return keep_views(scan, views_of)


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
