"""The files that describe a folder of teacher outputs: a record for each shard, index.json and statistics.json.

This is the counterpart of distillery.cache.images. It trusts no file on disk, executes no pickle and does not import
torch.
"""

import base64
import contextlib
import json
import math
import os
import re
from pathlib import Path

import numpy as np

from distillery.cache.fields import FIELD_DTYPES, Field, place_fields
from distillery.cache.images import INDEX_NAME, holds_first_rows, index_text
from distillery.cache.store import FORMAT_VERSION, MALFORMED, ShardKind, decode_checksums, read_index
from distillery.system.errors import UserError, teacher_command
from distillery.system.files import hash_file, open_regular, sha256_of

FOLDER_NAME = "teacher"
STATISTICS_NAME = "statistics.json"
BASIS_NAME = "token_basis.pt"
FILES_NAME = "teacher_files.json"
TEACHER_PATTERN = re.compile(r"teacher_shard_\d{5,}\.pt")
# in the order in which they stand in a shard
FIELD_NAMES = ("pooled", "tokens", "logits")
_MAX_COUNT = 1 << 53


def teacher_shard_name(shard_idx: int) -> str:
    """teacher_shard_00007.pt for 7."""
    return f"teacher_shard_{shard_idx:05d}.pt"


def teacher_folders(cache_dir: Path) -> list[Path]:
    """The folders of teacher outputs below an image cache."""
    return sorted(path for path in (cache_dir / FOLDER_NAME).glob("*") if path.is_dir())


def file_hash(path: os.PathLike) -> str:
    """XXH3-128 of a file's bytes, "xxh3_128:<hex>"."""
    with open_regular(path) as file:
        return hash_file(file)


def encode_sums(count: int, total: np.ndarray, squares: np.ndarray) -> dict:
    """Sums over a shard's vectors, float64 [D], as they stand in its record, exactly."""
    return {"count": count, "sum": _encode(total), "squares": _encode(squares)}


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.asarray(values, "<f8").tobytes()).decode()


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text, validate=True), "<f8")


def fields_of(record: dict) -> list[Field]:
    """Where the tensors of a shard are: in the order of FIELD_NAMES."""
    entries = sorted(record["fields"].items(), key=lambda item: FIELD_NAMES.index(item[0]))
    return place_fields({name: (entry["dtype"], tuple(entry["shape"])) for name, entry in entries})


def valid_teacher_rows(record: dict) -> np.ndarray:
    """bool [N]: the rows whose image could be decoded."""
    valid = np.ones(record["num_samples"], bool)
    valid[record["failed_rows"]] = False
    return valid


def _is_consistent(record: dict, name: str) -> bool:
    counts = [record[key] for key in ("shard_idx", "global_start", "num_samples", "num_views", "bytes")]
    shapes = [entry["shape"] for entry in record["fields"].values()]
    if not all(type(value) is int and 0 <= value < _MAX_COUNT for value in [*counts, *sum(shapes, [])]):
        return False
    rows, views, failed = record["num_samples"], record["num_views"], record["failed_rows"]
    return bool(
        record["format_version"] == FORMAT_VERSION
        and TEACHER_PATTERN.fullmatch(name)
        and record["shard_path"] == name == teacher_shard_name(record["shard_idx"])
        and min(rows, views) > 0
        and "pooled" in record["fields"]
        and set(record["fields"]) <= set(FIELD_NAMES)
        and all(entry["dtype"] in FIELD_DTYPES for entry in record["fields"].values())
        and all(shape[:2] == [rows, views] and len(shape) in (3, 4) and min(shape) > 0 for shape in shapes)
        and sum(field.size for field in fields_of(record)) < record["bytes"]
        and set(record["checksums"]) == set(record["fields"])
        and all(len(decode_checksums(entry)) == rows * views for entry in record["checksums"].values())
        and all(type(row) is int and 0 <= row < rows for row in failed)
        and sorted(set(failed)) == failed
        and set(record["sums"]) <= {"pooled", "tokens"}
        and all(len(_decode(sums["sum"])) == len(_decode(sums["squares"])) for sums in record["sums"].values())
        and all(type(sums["count"]) is int for sums in record["sums"].values())
        and all(type(version) is str for version in record["libraries"].values())
        and record["fingerprint"] == sha256_of(record["identity"])
        and _is_hash(record["images_hash"])
        and (record["basis_hash"] is None or _is_hash(record["basis_hash"]))
        and _is_hash(record["hash"])
    )


def _is_hash(text: str) -> bool:
    return re.fullmatch(r"xxh3_128:[0-9a-f]{32}", text) is not None


def teacher_index_of(records: list[dict], num_target: int | None) -> dict:
    """index.json's content: a pure function of the records and of how many rows there shall be (None: these)."""
    first, num_rows = records[0], sum(record["num_samples"] for record in records)
    return {
        "format_version": FORMAT_VERSION,
        "num_samples": num_rows,
        "num_views": first["num_views"],
        "complete": holds_first_rows(records, num_target or num_rows),
        "fingerprint": first["fingerprint"],
        "identity": first["identity"],
        "basis_hash": first["basis_hash"],
        "fields": {
            name: {"dtype": entry["dtype"], "view_shape": entry["shape"][2:]} for name, entry in first["fields"].items()
        },
        "shards": [
            {key: record[key] for key in ("shard_path", "global_start", "num_samples", "bytes", "hash", "images_hash")}
            | {"num_failed": len(record["failed_rows"])}
            for record in records
        ],
    }


def statistics_of(records: list[dict]) -> dict:
    """statistics.json's content: mean and standard deviation per dimension over all images and views, float64.

    The shards' sums are added in the order of the shards: the result does not depend on which job made which.
    """
    found = {}
    for name in records[0]["sums"]:
        count = sum(record["sums"][name]["count"] for record in records)
        total = np.sum([_decode(record["sums"][name]["sum"]) for record in records], axis=0)
        squares = np.sum([_decode(record["sums"][name]["squares"]) for record in records], axis=0)
        mean = total / max(1, count)
        found[f"{name}_mean"] = mean.tolist()
        found[f"{name}_std"] = np.sqrt(np.maximum(squares / max(1, count) - mean**2, 0)).tolist()
        found[f"{name}_count"] = count
    return found


def _views_of(records: list[dict], num_target: int | None) -> tuple[dict, dict[str, bytes]]:
    index = teacher_index_of(records, num_target)
    statistics = json.dumps(statistics_of(records), indent=1).encode() + b"\n"
    return index, {STATISTICS_NAME: statistics, INDEX_NAME: index_text(index)}


TEACHER_SHARDS = ShardKind(
    pattern=TEACHER_PATTERN,
    is_consistent=_is_consistent,
    fields_of=fields_of,
    checksums_of=lambda record: record["checksums"],
    small_tensors=lambda record, path: {"valid": valid_teacher_rows(record)},
    views_of=_views_of,
    bulk=("checksums",),
)


def mark_as_current(directory: Path) -> None:
    """Have no folder beside this one look newer: of several that a configuration may mean, the newest is taken."""
    with contextlib.suppress(OSError):  # there is none yet; or it can only be read, and nothing was made
        if any(made_at(other) >= made_at(directory) for other in directory.parent.iterdir() if other != directory):
            os.utime(directory / INDEX_NAME)


def made_at(directory: Path) -> int:
    """When a folder was made or marked as current, ns; 0 where there is no index."""
    try:
        return (directory / INDEX_NAME).stat().st_mtime_ns
    except (FileNotFoundError, NotADirectoryError):
        return 0


def read_teacher_index(directory: Path) -> dict:
    """index.json of a folder of teacher outputs, every field checked before it is used.

    Raises:
        MissingFileError: there is none. UserError: damaged or hostile. FutureFormatError: of a later version.
    """
    path = directory / INDEX_NAME
    index = read_index(path, teacher_command())
    try:
        is_sound = _is_sound(index)
    except MALFORMED as error:
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error}). Run: {teacher_command()}") from error
    if not is_sound:
        raise UserError(f"{path}: damaged: its fields contradict each other. Run: {teacher_command()}")
    return index


def _is_sound(index: dict) -> bool:
    rows = index["shards"]
    counts = [row[key] for row in rows for key in ("global_start", "num_samples", "num_failed", "bytes")]
    extents = [extent for entry in index["fields"].values() for extent in entry["view_shape"]]
    facts, form = index["identity"]["resolved"], index["identity"]["stored"]["tokens"]
    token_width = 1 if facts["token_width"] is None else facts["token_width"]  # None: it gives no tokens
    extents += [*facts["grid"], facts["pooled_width"], token_width, form.get("token_grid", 1)]
    if not all(type(value) is int and 0 <= value < _MAX_COUNT for value in [*counts, *extents, index["num_views"]]):
        return False
    ends = [row["global_start"] + row["num_samples"] for row in rows]
    view_bytes = sum(
        math.prod(entry["view_shape"]) * np.dtype(FIELD_DTYPES[entry["dtype"]]).itemsize
        for entry in index["fields"].values()
    )
    return bool(
        rows
        and index["num_views"] > 0
        and "pooled" in index["fields"]
        and set(index["fields"]) <= set(FIELD_NAMES)
        and len(facts["grid"]) == 2
        and type(facts["weights_hash"]) is str
        and type(form["form"]) is str
        and all(extent > 0 for extent in extents)
        and all(len(entry["view_shape"]) in (1, 2) for entry in index["fields"].values())
        and all(TEACHER_PATTERN.fullmatch(row["shard_path"]) and row["num_samples"] > 0 for row in rows)
        and all(row["num_samples"] * index["num_views"] * view_bytes < row["bytes"] for row in rows)
        and all(_is_hash(row["hash"]) and _is_hash(row["images_hash"]) for row in rows)
        and all(end <= row["global_start"] for end, row in zip(ends, rows[1:], strict=False))
        and index["num_samples"] == sum(row["num_samples"] for row in rows)
        and index["fingerprint"] == sha256_of(index["identity"])
        and (index["basis_hash"] is None or _is_hash(index["basis_hash"]))
    )
