"""Find what is wrong in a folder of images: compare every byte with its hash and every view with the records."""

import contextlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from distillery.cache.folder import load_index, load_shard_layout
from distillery.cache.images import (
    FAILURES_NAME,
    IMAGE_SHARDS,
    INDEX_NAME,
    SHARD_PATTERN,
    index_text,
    is_predecessors,
    rehash_record,
)
from distillery.cache.index import CacheIndex
from distillery.cache.lease_names import LEASES_NAME, lease_problems
from distillery.cache.store import FutureFormatError, ShardKind, parse_json, record_path
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import is_locked, read_regular
from distillery.system.machine import usable_cpus

_OTHER_NAMES = {INDEX_NAME, FAILURES_NAME, "eval", "teacher"}


class Problem(NamedTuple):
    """Something wrong in a folder of shards.

    remove: the file to take away before stage 1 runs again, or None where running stage 1 is enough. Silent corruption
        changes none of the file's times, by which stage 1 chooses what to hash.
    """

    text: str
    remove: Path | None = None


def verify_shard(
    kind: ShardKind, path: Path, remake: Callable[[Path, dict | None], dict] | None = None
) -> tuple[list[Problem], dict | None]:
    """(what is wrong with a shard of any kind and its record; the record made from the shard, None: it is not whole).

    remake: gives a shard's record from its bytes, and from the record that stands beside it; None: from its bytes.
    """
    record, recorded, problems = None, record_path(path), []
    try:
        record = kind.read_record(recorded)
    except FutureFormatError:
        raise
    except FileNotFoundError:
        problems.append(Problem(f"{recorded}: missing"))
    except (UserError, OSError) as error:
        problems.append(Problem(naming(recorded, error), recorded))
    try:
        remade = remake(path, record) if remake else kind.record_of_shard(path)
    except FileNotFoundError:
        return [Problem(f"{path}: missing")], None
    except (UserError, OSError) as error:
        return [*problems, Problem(naming(path, error), path)], None
    if record is not None and remade != record:
        problems.append(Problem(f"{path}: differs from its record in {differing_keys(remade, record)}", path))
    return problems, remade


def shard_names(directory: Path, kind: ShardKind) -> set[str]:
    """Names of the shards of a folder, also of those of which only the record is left."""
    paths = [Path(entry.name) for entry in os.scandir(directory)]
    names = {path.stem + ".pt" for path in paths if path.suffix in (".pt", ".json")}
    return {name for name in names if kind.pattern.fullmatch(name)}


def verify_views(kind: ShardKind, directory: Path, index: dict | None) -> Iterator[Problem]:
    """Views that differ from what the folder's records say; index: index.json's content, None: not to be compared."""
    if not (records := kind.scan(directory).records()):
        return
    expected, views = kind.views_of(records, None)
    views.pop(INDEX_NAME)
    if index is not None:
        # whether a cache is complete depends on max_samples, which only the configuration knows
        expected |= {"complete": index.get("complete")}
        views[INDEX_NAME] = index_text(expected)
    for path, content in ((directory / name, content) for name, content in views.items()):
        try:
            is_same = read_regular(path) == content
        except FileNotFoundError:
            is_same = not content
        except (UserError, OSError) as error:
            yield Problem(naming(path, error), path)
            continue
        if not is_same:
            keys = f" in {differing_keys(index, expected)}" if path.name == INDEX_NAME else ""
            yield Problem(f"{path}: differs from the records{keys}")


def foreign_files(directory: Path, is_known: Callable[[str], bool]) -> Iterator[Problem]:
    """Files that belong to no finished cache; is_known: by its name."""
    for entry in os.scandir(directory):
        if entry.name == LEASES_NAME and entry.is_dir(follow_symlinks=False):
            yield from (Problem(f"{path}: {reason}") for path, reason in lease_problems(directory))
        elif not is_known(entry.name) and not entry.name.startswith(".nfs"):
            reason = "not part of a cache; move it elsewhere"
            if ".tmp-" in entry.name:
                reason = "left by a killed run; stage 1 removes it"
                with contextlib.suppress(FileNotFoundError):
                    if is_locked(Path(entry.path)):
                        reason = "a process is writing it; verify again when that has ended"
            yield Problem(f"{entry.path}: {reason}")


def naming(path: Path, error: Exception) -> str:
    """An error's text, with the file it is about."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"


def differing_keys(a: dict, b: dict) -> str:
    """The keys in which two records or indexes differ."""
    return ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))) or "their spelling"


def verify_cache(directory: Path, progress: Callable[[int], None] | None = None) -> list[str]:
    """Every problem of a cache folder, each naming its file; an empty list when all is well. Writes nothing.

    progress: called with a number of bytes as they are read.
    """
    return [problem.text for problem in find_problems(directory, progress)]


def find_problems(directory: Path, progress: Callable[[int], None] | None = None) -> list[Problem]:
    """verify_cache, with what to remove before stage 1 can repair it.

    Raises:
        MissingFileError: no cache there.
        FutureFormatError: the index or a record is of a later version.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME
    index, problems = _load_index(directory)
    if index is not None and not index.verified:
        return _verify_predecessors(index)
    listed = {} if index is None else {name: s for s, name in enumerate(index.shard_names)}
    # of shards and records: a record alone says that its shard is lost, where no index does
    on_disk = shard_names(directory, IMAGE_SHARDS)
    lock, fingerprints = threading.Lock(), {}

    def check(name: str) -> list[Problem]:
        found = list(_verify_shard(directory / name, index, listed.get(name), fingerprints))
        if progress and (directory / name).exists():
            with lock:
                progress((directory / name).stat().st_size)
        return found

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for found in pool.map(check, sorted(on_disk | set(listed))):
            problems += found
    if index is None:
        problems += _verify_agreement(directory, fingerprints)
    problems += verify_views(IMAGE_SHARDS, directory, None if index is None else parse_json(path, read_regular(path)))
    is_upgraded = any(map(is_predecessors, IMAGE_SHARDS.scan(directory).records()))
    return problems + list(
        foreign_files(
            directory,
            lambda name: (
                name in _OTHER_NAMES
                or SHARD_PATTERN.fullmatch(Path(name).stem + ".pt")
                or (is_upgraded and name.startswith("index_shard_"))
            ),
        )
    )


def _load_index(directory: Path) -> tuple[CacheIndex | None, list[Problem]]:
    """(the index, or None where it is damaged, or missing beside shards or records; the problem then)."""
    try:
        return load_index(directory), []
    except FutureFormatError:
        raise
    except MissingFileError:
        if not shard_names(directory, IMAGE_SHARDS):
            raise
        return None, [Problem(f"{directory / INDEX_NAME}: missing")]
    except UserError as error:
        return None, [Problem(str(error))]


def _verify_agreement(directory: Path, fingerprints: dict[str, str]) -> Iterator[Problem]:
    """Without an index: shards whose own description is of another cache than that of most."""
    counts = Counter(fingerprints.values()).most_common(2)
    if len(counts) < 2:
        return
    (most, count), (_, second) = counts
    for name, fingerprint in sorted(fingerprints.items()):
        if count == second:
            yield Problem(f"{directory / name}: as many shards here are of another cache; keep those of one of them")
        elif fingerprint != most:
            yield Problem(f"{directory / name}: of another cache than most shards here", directory / name)


def _verify_shard(
    path: Path, index: CacheIndex | None, s: int | None, fingerprints: dict[str, str]
) -> Iterator[Problem]:
    """What is wrong with a shard and its record; `fingerprints` gets the one that the shard itself says."""
    problems, remade = verify_shard(IMAGE_SHARDS, path, _remake)
    yield from problems
    if remade is None:
        return
    fingerprints[path.name] = remade["fingerprint"]
    if index is not None and s is None:
        yield Problem(f"{path}: not listed in index.json", path if remade["fingerprint"] != index.fingerprint else None)
    if index is not None and s is not None:
        expected = {
            "fingerprint": index.fingerprint,
            "global_start": int(index.shard_starts[s]),
            "num_samples": int(index.shard_rows[s]),
            "num_failed": int(index.shard_failed[s]),
            "bytes": int(index.shard_bytes[s]),
        }
        if wrong := [key for key, value in expected.items() if remade[key] != value]:
            is_foreign = remade["fingerprint"] != index.fingerprint
            yield Problem(f"{path}: differs from index.json in {', '.join(wrong)}", path if is_foreign else None)


def _remake(path: Path, record: dict | None) -> dict:
    is_old = record is not None and is_predecessors(record)
    return rehash_record(path, record) if is_old else IMAGE_SHARDS.record_of_shard(path)


def _verify_predecessors(index: CacheIndex) -> list[Problem]:
    problems = []
    for s in range(len(index.shard_names)):
        try:
            load_shard_layout(index, s)
        except UserError as error:
            problems.append(Problem(str(error)))
    return problems


def folders_of(directory: Path) -> list[Path]:
    """A cache folder and the evaluation caches below it."""
    patterns = (INDEX_NAME, "images_*.pt", "images_*.json")
    below = {path.parent for pattern in patterns for path in directory.glob(f"eval/*/*/{pattern}")}
    return [directory, *sorted(below)]
