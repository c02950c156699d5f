"""What a cache folder says about itself: a record beside each shard; index.json and failures.jsonl as views of them.

Whatever is lost can be made again from what is left: the views from the records, a record from its shard, a shard by
stage 1. Nothing here trusts a file: every field is checked before use, no pickle is executed.
"""

import base64
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import xxhash

from distillery.files import canonical_json, sha256_of, write_atomic
from distillery.process import UserError
from distillery.shard_format import DTYPES, open_regular, read_meta

FORMAT_VERSION = 3
INDEX_NAME = "index.json"
FAILURES_NAME = "failures.jsonl"
SHARD_PATTERN = re.compile(r"images_(?:shard|s\d{3,})_\d{5,}\.pt")
_CHUNK_BYTES = 8 << 20


def shard_name(shard_idx: int) -> str:
    """images_shard_00007.pt for 7."""
    return f"images_shard_{shard_idx:05d}.pt"


def record_path(shard_path: Path) -> Path:
    """The record that stands beside a shard."""
    return shard_path.with_suffix(".json")


def encode_checksums(values: np.ndarray) -> dict:
    """uint64 [N] as it stands in a record."""
    return {"algorithm": "xxh3_64", "values": base64.b64encode(values.astype("<u8").tobytes()).decode()}


def decode_checksums(entry: dict) -> np.ndarray:
    """uint64 [N] out of a record."""
    return np.frombuffer(base64.b64decode(entry["values"], validate=True), dtype="<u8")


def read_record(path: Path) -> dict:
    """A shard's record, checked key by key.

    Raises:
        FileNotFoundError: there is none.
        UserError: it is damaged, or of a future format.
    """
    with open_regular(path) as file:
        text = file.read()
    return check_record(parse_json(path, text), path)


def record_of_shard(path: Path) -> dict:
    """The record of a shard made again from the shard alone, every row's checksum compared.

    Raises:
        UserError: the shard is damaged or not of this format.
    """
    record = parse_json(path, read_meta(path))
    size, digest, row_digests = _hash_file(path, record)
    record |= {"bytes": size, "hash": digest}
    check_record(record, path)
    wrong = np.flatnonzero(row_digests != decode_checksums(record["row_checksums"]))
    if len(wrong):
        raise UserError(f"{path}: damaged: {len(wrong)} rows differ from their checksums, the first is row {wrong[0]}.")
    return record


def check_record(record: dict, path: Path) -> dict:
    """Raise UserError unless `record` is a well-formed record of the shard beside `path`; returns it."""
    try:
        version = record["format_version"]
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise UserError(f"{path}: format_version {version} is of a later version of this project; update the code.")
        rows, failures = record["num_samples"], record["failures"]
        shape = record["image_shape"]
        sizes = [record[key] for key in ("global_start", "bytes", "shard_idx", "payload_offset", "source_num_samples")]
        ok = (
            version == FORMAT_VERSION
            and record["shard_path"] == path.with_suffix(".pt").name
            and all(type(value) is int and value >= 0 for value in sizes)
            and type(rows) is int
            and 0 < rows <= record["identity"]["shard_size"]
            and len(shape) == 3
            and all(type(extent) is int and extent > 0 for extent in shape)
            and record["dtype"] in DTYPES
            and len(failures) == record["num_failed"]
            and all(0 <= entry["global_idx"] - record["global_start"] < rows for entry in failures)
            and len(decode_checksums(record["row_checksums"])) == rows
            and record["payload_offset"] + rows * int(np.prod(shape)) * np.dtype(DTYPES[record["dtype"]]).itemsize
            <= record["bytes"]
            and record["fingerprint"] == sha256_of(record["identity"])
            and re.fullmatch(r"xxh3_128:[0-9a-f]{32}", record["hash"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a shard's record ({type(error).__name__}: {error}).") from error
    if not ok:
        raise UserError(f"{path}: its fields contradict each other or the file's name.")
    return record


def parse_json(path: Path, text: str | bytes) -> dict:
    """A JSON object, or a UserError that names the file."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no readable JSON ({error}).") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}.")
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _hash_file(path: Path, record: dict) -> tuple[int, str, np.ndarray]:
    """(size, file hash, XXH3-64 of every row) of a shard in one sequential read."""
    try:
        row_bytes = int(np.prod(record["image_shape"])) * np.dtype(DTYPES[record["dtype"]]).itemsize
        rows, position = int(record["num_samples"]), int(record["payload_offset"])
        digests = np.zeros(rows if rows * row_bytes <= path.stat().st_size else 0, dtype=np.uint64)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: its description of itself is damaged ({error}).") from error
    file_hash = xxhash.xxh3_128()
    with open_regular(path) as file:
        file_hash.update(file.read(position))
        per_read = max(1, _CHUNK_BYTES // row_bytes)
        for start in range(0, len(digests), per_read):
            stop = min(len(digests), start + per_read)
            block = memoryview(_read_exactly(file, (stop - start) * row_bytes))
            file_hash.update(block)
            for row in range(start, stop):
                digests[row] = xxhash.xxh3_64_intdigest(
                    block[(row - start) * row_bytes : (row - start + 1) * row_bytes]
                )
        while chunk := file.read(_CHUNK_BYTES):
            file_hash.update(chunk)
        return os.fstat(file.fileno()).st_size, f"xxh3_128:{file_hash.hexdigest()}", digests


def _read_exactly(file, count: int) -> bytes:
    chunks = []
    while count:
        chunk = file.read(count)
        if not chunk:
            break
        chunks.append(chunk)
        count -= len(chunk)
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class RecordScan:
    """All readable records of a folder; a second look reads only the files that changed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: dict[str, tuple[tuple, dict | None]] = {}

    def records(self) -> list[dict]:
        """The records by global_start, unreadable ones left out (their shards are hashed and adopted by stage 1)."""
        found = {}
        for entry in os.scandir(self.directory):
            if entry.name.endswith(".json") and SHARD_PATTERN.fullmatch(entry.name[:-5] + ".pt"):
                status = entry.stat(follow_symlinks=False)
                stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
                if self._seen.get(entry.name, (None,))[0] != stamp:
                    self._seen[entry.name] = (stamp, self._read(Path(entry.path)))
                found[entry.name] = self._seen[entry.name][1]
        return sorted((record for record in found.values() if record), key=lambda record: record["global_start"])

    @staticmethod
    def _read(path: Path) -> dict | None:
        try:
            record = read_record(path)
        except FileNotFoundError:
            return None
        except UserError as error:
            if "later version" in str(error):
                raise
            return None
        del record["row_checksums"]  # the bulk of a record, needed only by whoever reads the rows
        return record


def index_of(records: list[dict], num_target: int | None = None) -> dict:
    """index.json's content: a pure function of the records and of how many rows the cache shall have (None: all)."""
    identity, first = records[0]["identity"], records[0]
    num_target = first["source_num_samples"] if num_target is None else num_target
    rows = sum(record["num_samples"] for record in records)
    return {
        "format_version": FORMAT_VERSION,
        "num_samples": rows,
        "source_num_samples": first["source_num_samples"],
        "complete": rows >= num_target,
        "fingerprint": first["fingerprint"],
        "source": identity["source"],
        "preprocess": identity["preprocess"],
        "dtype": first["dtype"],
        "image_shape": first["image_shape"],
        "shard_size": identity["shard_size"],
        "labels": identity["labels"],
        "cache_image_size": first["image_shape"][1],
        "cache_dtype": first["dtype"],
        "shards": [
            {key: record[key] for key in ("shard_path", "global_start", "num_samples", "num_failed", "bytes", "hash")}
            for record in records
        ],
    }


def failures_of(records: Iterable[dict]) -> bytes:
    """failures.jsonl's content."""
    return b"".join(canonical_json(entry) + b"\n" for record in records for entry in record["failures"])


def write_views(directory: Path, scan: RecordScan, num_target: int | None = None) -> dict | None:
    """Write index.json and failures.jsonl from the records, again until no other writer published meanwhile."""
    while True:
        records = scan.records()
        if not records:
            return None
        index = index_of(records, num_target)
        text = json.dumps(index, indent=1).encode() + b"\n"
        failures = failures_of(records)
        for path, content in ((directory / FAILURES_NAME, failures), (directory / INDEX_NAME, text)):
            if not content:
                path.unlink(missing_ok=True)
            elif not path.is_file() or path.read_bytes() != content:
                write_atomic(path, content)
        if scan.records() == records:
            return index
