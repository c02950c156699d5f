"""What shards of every kind share: a record beside each shard, the scan of a folder, and the folder's views.

A record is made from the bytes of its shard. The views (index.json and the like) are made from the records. This file
trusts no file on disk, executes no pickle and does not import torch.
"""

import base64
import json
import os
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from distillery.cache.archive import read_meta
from distillery.cache.fields import Field, digest_file, frame_of
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import holds, read_regular, write_atomic

FORMAT_VERSION = 3
# what a damaged or hostile record or index makes Python raise
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, struct.error)
_MAX_RECORD_BYTES = 256 << 20
# how often the views are written while others publish: a round is a scan of the folder, minutes in the biggest ones
_ROUNDS = 3


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


def read_index(path: Path, command: str) -> dict:
    """index.json's content, of which nothing but the version is checked yet; command: makes it again.

    Raises:
        MissingFileError: there is none.
        UserError: it is no JSON object, or of a later version (FutureFormatError).
    """
    try:
        index = parse_json(path, read_regular(path))
    except FileNotFoundError as error:
        raise MissingFileError(f"Index file not found: {path}. Run: {command}") from error
    except UserError as error:
        raise UserError(f"{error} It is made again by: {command}") from error
    check_version(index, path)
    return index


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


@dataclass(frozen=True)
class ShardKind:
    """What images and teacher outputs each have of their own.

    pattern: of a shard's file name.
    is_consistent: whether a record's fields agree with each other and with the shard's file name.
    fields_of: a record's big tensors, with their places in the shard.
    checksums_of: field -> its rows' checksums as they stand in a record.
    small_tensors: what else the shard of a record and path holds: name -> values.
    views_of: (index.json's content, file name -> bytes of each view; b"" for one that shall not be there), of a
        folder's records by global_start and of how many rows there shall be (None: all of the source).
    bulk: keys of a record that only readers of the rows need; a scan leaves them out.
    """

    pattern: re.Pattern
    is_consistent: Callable[[dict, str], bool]
    fields_of: Callable[[dict], list[Field]]
    checksums_of: Callable[[dict], Mapping[str, dict]]
    small_tensors: Callable[[dict, Path], Mapping[str, np.ndarray]]
    views_of: Callable[[list[dict], int | None], tuple[dict, dict[str, bytes]]]
    bulk: Sequence[str]

    def check_record(self, record: dict, path: Path) -> dict:
        """Raise UserError unless `record` is a well-formed record of the shard beside `path`; returns it."""
        try:
            is_consistent = self.is_consistent(record, path.with_suffix(".pt").name)
        except MALFORMED as error:
            raise UserError(f"{path}: not a shard's record ({type(error).__name__}: {error}).") from error
        if not is_consistent:
            raise UserError(f"{path}: its fields contradict each other or the file's name.")
        return record

    def read_record(self, path: Path) -> dict:
        """A record, every byte checked with the hash it carries, then key by key.

        Raises:
            FileNotFoundError: there is none.
            UserError: it is damaged, or of a future format (FutureFormatError).
        """
        return self.check_record(read_guarded(path), path)

    def meta_inside(self, path: Path) -> tuple[dict, str]:
        """(what a shard says of itself, checked: a record without the shard's own size and hash; its JSON text).

        Raises:
            UserError: it is damaged, or no such shard. FutureFormatError: it is of a later version.
        """
        text = read_meta(path)
        meta = parse_json(path, text)
        check_version(meta, path)
        self.check_record(meta | {"bytes": path.lstat().st_size, "hash": "xxh3_128:" + "0" * 32}, path)
        return meta, text

    def record_or_meta(self, path: Path) -> dict:
        """The record of the shard at `path`; where that is lost or damaged, what the shard says of itself."""
        try:
            return self.read_record(record_path(path))
        except FutureFormatError:
            raise
        except (FileNotFoundError, UserError):
            return self.meta_inside(path)[0]

    def record_of_shard(self, path: Path) -> dict:
        """Make the record of a shard from the shard alone, and check every byte of the shard.

        Raises:
            UserError: the shard is damaged or not of this format (FutureFormatError: of a later one).
        """
        meta, text = self.meta_inside(path)
        fields = self.fields_of(meta)
        digest = digest_file(path, fields)
        for name, entry in self.checksums_of(meta).items():
            wrong = np.flatnonzero(digest.checksums[name] != decode_checksums(entry))
            if len(wrong):
                row, view = divmod(int(wrong[0]), meta.get("num_views", 1))
                first = f"row {row}, view {view}" if "num_views" in meta else f"row {row}"
                raise UserError(
                    f"{path}: damaged: {len(wrong)} rows of {name} differ from their checksums, the first is {first}."
                )
        # the rows and the description determine all other bytes of the file: they are checked too
        if digest.frame != frame_of(fields, digest.crcs, self.small_tensors(meta, path), text):
            raise UserError(f"{path}: damaged: the bytes around its rows are not those of this shard.")
        return meta | {"bytes": digest.size, "hash": digest.hash}

    def scan(self, directory: Path) -> "RecordScan":
        """The records of a folder."""
        return RecordScan(self, directory)


class RecordScan:
    """All readable records of a folder whose shards are there; a second look reads only the files that changed."""

    def __init__(self, kind: ShardKind, directory: Path) -> None:
        self.kind, self.directory = kind, directory
        self._seen: dict[str, tuple[tuple, dict | None]] = {}

    def records(self) -> list[dict]:
        """The records by global_start, unreadable ones left out (their shards are hashed by stage 1).

        Raises:
            FutureFormatError: one is of a later version.
        """
        entries = {entry.name: entry for entry in os.scandir(self.directory)}
        found = []
        for name, entry in entries.items():
            shard = name.removesuffix(".json") + ".pt"
            if not name.endswith(".json") or shard not in entries or not self.kind.pattern.fullmatch(shard):
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:  # another writer dropped it just now
                continue
            stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
            if self._seen.get(name, (None,))[0] != stamp:
                try:
                    self._seen[name] = (stamp, self._read(Path(entry.path)))
                except PermissionError:
                    raise
                except OSError:  # a disk that fails now may not the next time: nothing is known of the record
                    continue
            if record := self._seen[name][1]:
                found.append(record)
        return sorted(found, key=lambda record: record["global_start"])

    def _read(self, path: Path) -> dict | None:
        try:
            record = self.kind.read_record(path)
        except FutureFormatError:
            raise
        except UserError:
            return None
        return {key: value for key, value in record.items() if key not in self.kind.bulk}

    def write_views(self, num_target: int | None = None) -> dict | None:
        """Write index.json and the other views of the records, again where other writers published meanwhile.

        Where they publish all the time, it ends after _ROUNDS: each of them writes the views once more when it ends.
        Only an index that has become complete is written in any case.

        num_target: rows there shall be; None: all of the source.

        Returns:
            The index of the records seen last; None where there are none.
        Raises:
            UserError: the records are of two configurations: two jobs wrote here at the same time.
        """
        records, rounds, was_complete = self.records(), 0, False
        while records:
            for record in records[1:]:
                if record["fingerprint"] != records[0]["fingerprint"]:
                    raise UserError(
                        f"{self.directory}: {records[0]['shard_path']} and {record['shard_path']} were made with "
                        "different configurations, by two jobs at the same time. Remove the ones you do not want."
                    )
            index, views = self.kind.views_of(records, num_target)
            if rounds >= _ROUNDS and index["complete"] == was_complete:
                return index
            for name, content in views.items():
                path = self.directory / name
                if not content:
                    if os.path.lexists(path):  # a folder that can only be read has nothing to be removed
                        path.unlink(missing_ok=True)
                elif not holds(path, content):
                    write_atomic(path, content)
            before, records = records, self.records()
            if records == before:
                return index
            rounds, was_complete = rounds + 1, index["complete"]
        return None
