"""Find what is wrong in a folder of teacher outputs, read-only: for `python -m distillery.cache verify`."""

from collections.abc import Iterator
from pathlib import Path

from distillery.cache.images import INDEX_NAME
from distillery.cache.store import FutureFormatError
from distillery.cache.verify import Problem, foreign_files, naming, shard_names, verify_shard, verify_views
from distillery.system.errors import MissingFileError, UserError
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


def find_teacher_problems(directory: Path) -> Iterator[Problem]:
    """What is wrong in a folder of teacher outputs.

    Every byte is compared with its hash and every view with the records; writes nothing.
    """
    index = problem = None
    try:
        index = read_teacher_index(directory)
    except FutureFormatError:
        raise
    except UserError as error:
        problem = error
    shards = shard_names(directory, TEACHER_SHARDS) | {row["shard_path"] for row in (index["shards"] if index else [])}
    for name in sorted(shards):
        yield from verify_shard(TEACHER_SHARDS, directory / name)[0]
    if index is None:
        # a pass that was stopped before its first shard has left no index, and nothing is wrong
        if shards or not isinstance(problem, MissingFileError):
            yield Problem(str(problem))
        return
    if not TEACHER_SHARDS.scan(directory).records():
        return
    yield from verify_views(TEACHER_SHARDS, directory, index)
    yield from _basis_problems(directory / BASIS_NAME, index["basis_hash"])
    yield from _files_problems(directory / FILES_NAME, index["fingerprint"])
    names = {INDEX_NAME, STATISTICS_NAME, FILES_NAME} | ({BASIS_NAME} if index["basis_hash"] else set())
    yield from foreign_files(
        directory, lambda name: name in names or TEACHER_PATTERN.fullmatch(Path(name).stem + ".pt")
    )


def _basis_problems(path: Path, expected: str | None) -> Iterator[Problem]:
    try:
        if expected is not None and file_hash(path) != expected:
            yield Problem(f"{path}: damaged, or not the basis that the shards were made with", path)
    except (UserError, OSError) as error:
        yield Problem(f"{path}: {error}")


def _files_problems(path: Path, fingerprint: str) -> Iterator[Problem]:
    try:
        if check_files_record(path)["fingerprint"] != fingerprint:
            yield Problem(f"{path}: is of other teacher outputs", path)
    except FutureFormatError:
        raise
    except FileNotFoundError:
        return
    except (UserError, OSError) as error:
        yield Problem(naming(path, error), path)
