"""What a cache folder says about itself: a record beside each shard; index.json and failures.jsonl as views of them.

Whatever is lost can be made again from what is left: the views from the records, a record from its shard, a shard by
stage 1. Nothing here trusts a file: every field is checked before use, no pickle is executed.
"""

import base64
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from distillery.shard_format import DTYPES
from distillery.system.errors import UserError
from distillery.system.files import canonical_json, holds, read_regular, sha256_of, write_atomic

FORMAT_VERSION = 3
INDEX_NAME = "index.json"
FAILURES_NAME = "failures.jsonl"
SHARD_PATTERN = re.compile(r"images_(?:shard|s\d{3,})_\d{5,}\.pt")
# source kind of an upgraded cache of this project's predecessor, whose shards carry no description of themselves
PREDECESSOR = "predecessor"
_MAX_RECORD_BYTES = 256 << 20
_MAX_ROWS = 1 << 53  # the largest count that JSON readers of other languages keep exact


class FutureFormatError(UserError):
    """Written by a later version of this project: never taken for damage, never written over."""


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


def read_guarded(path: Path) -> dict:
    """A file that record_text wrote, every byte checked with the hash it carries; errors as read_record."""
    text = read_regular(path, _MAX_RECORD_BYTES)
    record = parse_json(path, text)
    check_version(record, path)
    record.pop("record_hash", None)
    try:
        is_intact = record_text(record) == text
    except (ValueError, RecursionError):
        is_intact = False
    if not is_intact:
        raise UserError(f"{path}: damaged: its text is not the one its record_hash was taken of.")
    return record


def record_text(record: dict) -> bytes:
    """A record as it stands on disk, with the hash that guards it."""
    text = json.dumps(record, sort_keys=True, allow_nan=False)
    guarded = record | {"record_hash": f"xxh3_64:{xxhash.xxh3_64_hexdigest(text.encode())}"}
    return json.dumps(guarded, sort_keys=True).encode() + b"\n"


def valid_rows(record: dict) -> np.ndarray:
    """bool [N]: the rows that hold an image."""
    valid = np.ones(record["num_samples"], dtype=bool)
    valid[[entry["global_idx"] - record["global_start"] for entry in record["failures"]]] = False
    return valid


def is_predecessors(record: dict) -> bool:
    """Whether a record is of an upgraded cache of the predecessor, whose shards do not describe themselves."""
    return record["identity"]["source"].get("kind") == PREDECESSOR


def check_version(record: dict, path: Path) -> None:
    """Raise FutureFormatError when a record, an index or a shard's description is of a later version."""
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FutureFormatError(
            f"{path}: format_version {version} is of a later version of this project; update the code. "
            f"(If none ever wrote here, {path.name} is damaged: remove it.)"
        )


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


class RecordScan:
    """All readable records of a folder whose shards are there; a second look reads only the files that changed.

    Args:
        directory: the folder.
        pattern: what a shard's name matches.
        read: gives a record, checked; FileNotFoundError or UserError where it is lost or damaged.
        bulk: keys that are left out: needed only by whoever reads the rows.
    """

    def __init__(
        self,
        directory: Path,
        *,
        pattern: re.Pattern,
        read: Callable[[Path], dict],
        bulk: Sequence[str],
    ) -> None:
        self.directory, self.pattern, self.read, self.bulk = directory, pattern, read, bulk
        self._seen: dict[str, tuple[tuple, dict | None]] = {}

    def records(self) -> list[dict]:
        """The records by global_start, unreadable ones left out (their shards are hashed and adopted by stage 1).

        Raises:
            FutureFormatError: one is of a later version.
        """
        entries = {entry.name: entry for entry in os.scandir(self.directory)}
        found = []
        for name, entry in entries.items():
            shard = name.removesuffix(".json") + ".pt"
            if not name.endswith(".json") or shard not in entries or not self.pattern.fullmatch(shard):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another writer dropped it just now
                continue
            stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
            if self._seen.get(name, (None,))[0] != stamp:
                self._seen[name] = (stamp, self._read(Path(entry.path)))
            if record := self._seen[name][1]:
                found.append(record)
        return sorted(found, key=lambda record: record["global_start"])

    def _read(self, path: Path) -> dict | None:
        try:
            record = self.read(path)
        except (FutureFormatError, PermissionError):
            raise
        except (UserError, OSError):
            return None
        return {key: value for key, value in record.items() if key not in self.bulk}


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


def keep_views(scan: RecordScan, views_of: Callable[[list[dict]], tuple[dict, dict[Path, bytes]]]) -> dict | None:
    """Write what views_of makes of a folder's records, again until no other writer published meanwhile.

    Args:
        scan: of the folder.
        views_of: gives the index, and path -> content of each file that is a view; one without content is removed.
    Returns:
        The index; None where there are no records.
    Raises:
        UserError: as write_views.
    """
    while True:
        records = scan.records()
        if not records:
            return None
        for record in records[1:]:
            if record["fingerprint"] != records[0]["fingerprint"]:
                raise UserError(
                    f"{scan.directory}: {records[0]['shard_path']} and {record['shard_path']} were made with different "
                    "configurations, by two jobs at the same time. Remove the ones you do not want."
                )
        index, views = views_of(records)
        for path, content in views.items():
            if not content:
                if os.path.lexists(path):  # a folder that can only be read has nothing to be removed
                    path.unlink(missing_ok=True)
            elif not holds(path, content):
                write_atomic(path, content)
        if scan.records() == records:
            return index
