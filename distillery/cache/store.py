"""Records beside shards of any kind: guarded text, the scan of a folder, and views made of the records."""

import base64
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import xxhash

from distillery.system.errors import UserError
from distillery.system.files import holds, read_regular, write_atomic

FORMAT_VERSION = 3
_MAX_RECORD_BYTES = 256 << 20


class FutureFormatError(UserError):
    """Written by a later version of this project: never taken for damage, never written over."""


def record_path(shard_path: Path) -> Path:
    """The record that stands beside a shard."""
    return shard_path.with_suffix(".json")


def encode_checksums(values: np.ndarray) -> dict:
    """uint64 [N] as it stands in a record."""
    return {"algorithm": "xxh3_64", "values": base64.b64encode(values.astype("<u8").tobytes()).decode()}


def decode_checksums(entry: dict) -> np.ndarray:
    """uint64 [N] out of a record."""
    return np.frombuffer(base64.b64decode(entry["values"], validate=True), dtype="<u8")


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


def check_version(record: dict, path: Path) -> None:
    """Raise FutureFormatError when a record, an index or a shard's description is of a later version."""
    version = record.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FutureFormatError(
            f"{path}: format_version {version} is of a later version of this project; update the code. "
            f"(If none ever wrote here, {path.name} is damaged: remove it.)"
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
