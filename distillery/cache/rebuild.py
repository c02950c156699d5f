"""Rebuild index.json without the data set: from records, from shards, or from a cache of the predecessor.

A predecessor's cache (v1 or v2) is upgraded in place. Each shard is hashed and gets a record beside it; then index.json
is written from the records. The shards themselves do not change. The upgraded cache's identity names its origin, so
stage 1 never adds shards to it.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from distillery.cache.archive import ForeignShardError, find_payload, row_bytes_of
from distillery.cache.fields import digest_file
from distillery.cache.folder import load_index, predecessor_image_format
from distillery.cache.images import IMAGE_SHARDS, INDEX_NAME, PREDECESSOR, SHARD_PATTERN, image_fields
from distillery.cache.index import CacheIndex
from distillery.cache.plan import is_untouched
from distillery.cache.store import (
    FORMAT_VERSION,
    FutureFormatError,
    encode_checksums,
    parse_json,
    record_path,
    record_text,
)
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import read_regular, sha256_of, write_atomic
from distillery.system.machine import usable_cpus


@dataclass(frozen=True)
class RebuildReport:
    """What rebuild_index did. index: the new index.json; problems: one line for each shard that had to be left out."""

    index: dict
    num_hashed: int
    was_upgraded: bool
    problems: list[str]


def rebuild_index(directory: Path, num_target: int | None = None) -> RebuildReport:
    """Make the records that are missing or damaged, index.json and failures.jsonl again; no shard is made or changed.

    Args:
        directory: a cache folder of any layout.
        num_target: rows the cache shall have, for index.json's "complete"; None: all of the source.
    Raises:
        MissingFileError: there is no shard, or one that a predecessor's index lists is gone.
        UserError: the folder is of a later version, or holds shards of two configurations, or a predecessor's shard is
            damaged.
    """
    directory = Path(directory)
    names = sorted(path.name for path in directory.glob("images_*.pt") if SHARD_PATTERN.fullmatch(path.name))
    if not names:
        raise MissingFileError(f"{directory}: holds no shards, so there is no index to make.")
    index, facts = _old_index(directory)
    problems: list[str] = []
    if index is not None and not index.verified:
        # shards first, all of them: a kill on the way leaves the old index in charge
        hashed = _in_threads(lambda row: _upgrade_shard(index, *row), enumerate(index.shard_names))
    else:
        hashed = _in_threads(lambda name: _renew_record(directory / name, facts, problems), names)
    was_upgraded = index is not None and not index.verified
    if (made := IMAGE_SHARDS.scan(directory).write_views(num_target)) is None:
        raise UserError("\n".join([f"{directory}: no shard is whole:", *problems]))
    return RebuildReport(made, sum(hashed), was_upgraded, sorted(problems))


def _in_threads(function: Callable, items: Iterable) -> list:
    with ThreadPoolExecutor(usable_cpus()) as pool:
        return list(pool.map(function, items))


def _old_index(directory: Path) -> tuple[CacheIndex | None, dict]:
    """(the index as a reader takes it, the same as JSON); (None, {}) where it is missing or damaged."""
    path = directory / INDEX_NAME
    try:
        index = load_index(directory)
    except FutureFormatError:
        raise
    except UserError:
        if _is_predecessors(path):
            raise
        return None, {}
    return index, parse_json(path, read_regular(path)) if index.verified else {}


def _is_predecessors(path: Path) -> bool:
    """Whether what stands in the place of an index is a predecessor's list of shards, however wrong."""
    try:
        text = parse_json(path, read_regular(path))
    except FileNotFoundError:
        return any(path.parent.glob("index_shard_*.json"))
    except (OSError, UserError):
        return False
    return "format_version" not in text and isinstance(text.get("shards"), list)


def _renew_record(path: Path, facts: dict, problems: list[str]) -> bool:
    """Keep a record that is whole and newer than its shard, else take it from the shard; whether that was hashed."""
    recorded = record_path(path)
    try:
        if is_untouched(path, IMAGE_SHARDS.read_record(recorded)):
            return False
    except FutureFormatError:
        raise
    except (FileNotFoundError, UserError):
        pass
    try:
        try:
            record = IMAGE_SHARDS.record_of_shard(path)
        except ForeignShardError:
            record = _record_by_index(path, facts)
    except FutureFormatError:
        raise
    except UserError as error:
        # a record that stays would keep the bad shard listed
        recorded.unlink(missing_ok=True)
        problems.append(str(error))
    else:
        write_atomic(recorded, record_text(record))
    return True


def _record_by_index(path: Path, facts: dict) -> dict:
    """Restore the lost record of an upgraded shard from its row of index.json; the shard's hash must still agree."""
    keys = ("source", "preprocess", "dtype", "image_shape", "shard_size", "labels")
    for s, row in enumerate(facts.get("shards", [])):
        if row["shard_path"] == path.name and facts["source"].get("kind") == PREDECESSOR:
            identity = {key: facts[key] for key in keys}
            record = _record_of(path, s, row, identity, facts["source_num_samples"])
            if record["hash"] != row["hash"]:
                raise UserError(f"{path}: damaged: its bytes are not those that index.json has the hash of.")
            return record
    raise UserError(f"{path}: this project's stage 1 did not write it, and no index of the predecessor lists it.")


def _upgrade_shard(index: CacheIndex, s: int, name: str) -> bool:
    """Hash a predecessor's shard and write a record beside it."""
    row = {"global_start": int(index.shard_starts[s]), "num_samples": int(index.shard_rows[s])}
    identity = {
        "source": {"kind": PREDECESSOR, "layout": f"v{index.format_version}", "unverified": True},
        "preprocess": index.preprocess,
        "dtype": index.dtype,
        "image_shape": list(index.image_shape),
        "shard_size": index.shard_size,
        "labels": False,
    }
    path = index.directory / name
    record = _record_of(path, s, row, identity, index.source_num_samples)
    write_atomic(record_path(path), record_text(record))
    return True


def _record_of(path: Path, shard_idx: int, row: dict, identity: dict, source_num_samples: int) -> dict:
    """A record of a file of torch.save that holds {"images": [N, 3, H, W]}.

    Raises:
        UserError: it holds something else, or its bytes are not those its archive has the CRC of.
    """
    offset, size, crc = find_payload(path)
    dtype, shape = predecessor_image_format(path)
    if (dtype, list(shape)) != (identity["dtype"], identity["image_shape"]):
        raise UserError(f"{path}: holds {dtype} {list(shape)}, others {identity['dtype']} {identity['image_shape']}.")
    expected = row["num_samples"] * row_bytes_of(shape, dtype)
    if size != expected:
        raise UserError(f"{path}: holds {size} bytes of images, its index promises {expected}.")
    record = {
        "format_version": FORMAT_VERSION,
        "shard_path": path.name,
        "shard_idx": shard_idx,
        "global_start": row["global_start"],
        "num_samples": row["num_samples"],
        "num_failed": 0,
        "failures": [],
        "source_num_samples": source_num_samples,
        "identity": identity,
        "fingerprint": sha256_of(identity),
        "dtype": dtype,
        "image_shape": list(shape),
        "payload_offset": offset,
        "libraries": {},
    }
    digest = digest_file(path, image_fields(record))
    if digest.crcs != [crc]:
        raise UserError(f"{path}: damaged: its images do not have the CRC that its archive says.")
    checksums = encode_checksums(digest.checksums["images"])
    record |= {"bytes": digest.size, "hash": digest.hash, "row_checksums": checksums}
    return IMAGE_SHARDS.check_record(record, path)
