"""Every byte of a cache against its hashes, every view against the records. Reads only."""

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from distillery.cache import CacheIndex, load_index, load_shard_layout
from distillery.process import EXIT_DONE, EXIT_ERROR, UserError, usable_cpus
from distillery.records import (
    FAILURES_NAME,
    INDEX_NAME,
    SHARD_PATTERN,
    RecordScan,
    failures_of,
    index_of,
    parse_json,
    read_record,
    record_of_shard,
    record_path,
)


def verify_cache(directory: Path, progress=None) -> list[str]:
    """Every problem of a cache folder, each naming its file; an empty list when all is well. Writes nothing.

    progress: called with a number of bytes as they are read.
    """
    directory = Path(directory)
    if (directory / INDEX_NAME).exists() or not list(directory.glob("images_*.json")):
        index = load_index(directory)
        if not index.verified:
            return _verify_seed(index)
        listed = dict(zip(index.shard_names, range(len(index.shard_names)), strict=True))
        problems = []
    else:
        index, listed = None, {}
        problems = [f"{directory / INDEX_NAME}: missing"]
    on_disk = {entry.name for entry in os.scandir(directory) if SHARD_PATTERN.fullmatch(entry.name)}
    lock = threading.Lock()

    def check(name: str) -> list[str]:
        found = list(_verify_shard(directory / name, index, listed.get(name)))
        if progress and (directory / name).exists():
            with lock:
                progress((directory / name).stat().st_size)
        return found

    with ThreadPoolExecutor(usable_cpus()) as pool:
        for found in pool.map(check, sorted(on_disk | set(listed))):
            problems += found
    return problems + list(_verify_views(directory, index))


def _verify_shard(path: Path, index: CacheIndex | None, s: int | None) -> Iterator[str]:
    try:
        record = read_record(record_path(path))
    except FileNotFoundError:
        yield f"{record_path(path)}: missing"
        record = None
    except (UserError, OSError) as error:
        yield f"{record_path(path)}: {error}"
        record = None
    try:
        remade = record_of_shard(path)
    except FileNotFoundError:
        yield f"{path}: missing"
        return
    except (UserError, OSError) as error:
        yield str(error) if str(path) in str(error) else f"{path}: {error}"
        return
    if record is not None and remade != record:
        yield f"{path}: differs from its record in {_differing_keys(remade, record)}"
    if index is not None and s is None:
        yield f"{path}: not listed in index.json"
    if index is not None and s is not None:
        expected = {
            "fingerprint": index.fingerprint,
            "global_start": int(index.shard_starts[s]),
            "num_samples": int(index.shard_rows[s]),
            "num_failed": int(index.shard_failed[s]),
            "bytes": int(index.shard_bytes[s]),
        }
        if wrong := [key for key, value in expected.items() if remade[key] != value]:
            yield f"{path}: differs from index.json in {', '.join(wrong)}"


def _differing_keys(a: dict, b: dict) -> str:
    return ", ".join(sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key)))


def _verify_views(directory: Path, index: CacheIndex | None) -> Iterator[str]:
    """index.json and failures.jsonl against the records, and files that belong to no cache."""
    records = RecordScan(directory).records()
    if index is not None and records:
        text = parse_json(directory / INDEX_NAME, (directory / INDEX_NAME).read_bytes())
        # whether the cache is complete depends on max_samples, which only the configuration knows
        expected = index_of(records) | {"complete": text.get("complete")}
        if text != expected:
            yield f"{directory / INDEX_NAME}: differs from the records in {_differing_keys(text, expected)}"
    failures = directory / FAILURES_NAME
    if (failures.read_bytes() if failures.exists() else b"") != failures_of(records):
        yield f"{failures}: differs from the records"
    for entry in os.scandir(directory):
        known = entry.name in {INDEX_NAME, FAILURES_NAME} or SHARD_PATTERN.fullmatch(Path(entry.name).stem + ".pt")
        if not known and entry.name not in {"eval", "teacher"}:
            yield f"{entry.path}: not part of a cache (a leftover of a killed run? stage 1 removes those)"


def _verify_seed(index: CacheIndex) -> list[str]:
    problems = []
    for s in range(len(index.shard_names)):
        try:
            load_shard_layout(index, s)
        except UserError as error:
            problems.append(str(error))
    return problems


def folders_of(directory: Path) -> list[Path]:
    """A cache folder and the evaluation caches below it."""
    return [directory, *sorted(path.parent for path in directory.glob(f"eval/*/*/{INDEX_NAME}"))]


def report_verification(directory: Path, repair: str) -> int:
    """Verify a folder with its evaluation caches and print the outcome; returns the exit status."""
    problems, shards, size = [], 0, 0
    for folder in folders_of(directory):
        problems += verify_cache(folder)
        shards += len(list(folder.glob("images_*.pt")))
        size += sum(path.stat().st_size for path in folder.glob("images_*.pt"))
    for problem in problems:
        print(f"BAD  {problem}")
    if problems:
        print(f"{len(problems)} problems. Repair (makes again exactly what is bad): {repair}")
        return EXIT_ERROR
    hashes = "every byte as its hash says" if load_index(directory).verified else "no hashes to compare: unverified"
    print(f"OK   {directory}: {shards} shards, {size} bytes, {hashes}")
    return EXIT_DONE
