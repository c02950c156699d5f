"""What is wrong in a folder of teacher outputs, found without changing it: for `python -m distillery.cache verify`."""

import os
from collections.abc import Iterator
from pathlib import Path

from distillery.cache.images import INDEX_NAME
from distillery.cache.store import FutureFormatError, record_path
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import holds
from distillery.teacher_cache.local_files import check_files_record
from distillery.teacher_cache.records import (
    BASIS_NAME,
    FILES_NAME,
    STATISTICS_NAME,
    TEACHER_PATTERN,
    TEACHER_SHARDS,
    file_hash,
    read_teacher_index,
)


def find_teacher_problems(directory: Path) -> Iterator[tuple[str, Path | None]]:
    """(what is wrong in a folder of teacher outputs, the file to remove before it is made again or None).

    Every byte is compared with its hash and every view with the records; writes nothing.
    """
    index = problem = None
    try:
        index = read_teacher_index(directory)
    except FutureFormatError:
        raise
    except UserError as error:
        problem = error
    shards = {path.stem for path in directory.glob("teacher_*.pt") if TEACHER_PATTERN.fullmatch(path.name)}
    shards |= {path.stem for path in directory.glob("teacher_shard_*.json")}
    shards |= {Path(row["shard_path"]).stem for row in index["shards"]} if index else set()
    for stem in sorted(shards):
        yield from _shard_problems(directory / f"{stem}.pt")
    if index is None:
        # a pass that was stopped before its first shard has left no index, and nothing is wrong
        if shards or not isinstance(problem, MissingFileError):
            yield str(problem), None
        return
    records = TEACHER_SHARDS.scan(directory).records()
    if not records:
        return
    try:
        _, views = TEACHER_SHARDS.views_of(records, _rows_of_complete(records, index))
    except UserError as error:
        yield str(error), None
        return
    for name, content in views.items():
        if not holds(directory / name, content):
            yield f"{directory / name}: differs from the records", None
    yield from _basis_problems(directory / BASIS_NAME, index["basis_hash"])
    yield from _files_problems(directory / FILES_NAME, index["fingerprint"])
    yield from _foreign_files(directory, index)


def _rows_of_complete(records: list[dict], index: dict) -> int:
    """How many rows make the index say `complete` as it does: the records do not know how many there shall be."""
    rows = sum(record["num_samples"] for record in records)
    return rows if index.get("complete") else rows + 1


def _shard_problems(path: Path) -> Iterator[tuple[str, Path | None]]:
    try:
        found = TEACHER_SHARDS.record_of_shard(path)
    except FutureFormatError:
        raise
    except FileNotFoundError:
        yield f"{path}: is gone", path
        return
    except (UserError, OSError) as error:
        yield str(error) if str(path) in str(error) else f"{path}: {error}", path
        return
    try:
        record = TEACHER_SHARDS.read_record(record_path(path))
    except FutureFormatError:
        raise
    except (UserError, OSError) as error:
        yield str(error) if str(path.parent) in str(error) else f"{record_path(path)}: {error}", record_path(path)
        return
    if found != record:
        yield f"{path}: differs from its record", path


def _basis_problems(path: Path, expected: str | None) -> Iterator[tuple[str, Path | None]]:
    try:
        if expected is not None and file_hash(path) != expected:
            yield f"{path}: damaged, or not the basis that the shards were made with", path
    except (UserError, OSError) as error:
        yield f"{path}: {error}", None


def _files_problems(path: Path, fingerprint: str) -> Iterator[tuple[str, Path | None]]:
    try:
        if check_files_record(path)["fingerprint"] != fingerprint:
            yield f"{path}: is of other teacher outputs", path
    except FutureFormatError:
        raise
    except FileNotFoundError:
        return
    except (UserError, OSError) as error:
        yield str(error) if str(path) in str(error) else f"{path}: {error}", path


def _foreign_files(directory: Path, index: dict) -> Iterator[tuple[str, Path | None]]:
    basis = {BASIS_NAME} if index["basis_hash"] else set()
    for entry in os.scandir(directory):
        is_known = entry.name in {INDEX_NAME, STATISTICS_NAME, FILES_NAME} | basis
        is_known = is_known or TEACHER_PATTERN.fullmatch(Path(entry.name).stem + ".pt")
        if not is_known and not entry.name.startswith(".nfs"):
            reason = "left by a killed run; stage 1 removes it" if ".tmp-" in entry.name else "not part of a cache"
            yield f"{entry.path}: {reason}", None
