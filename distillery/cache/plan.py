"""Plan a cache: what it must hold, and what its folder already holds. Planning reads only; it writes nothing."""

import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

from distillery.cache.archive import ForeignShardError, pixel_dtype_of, read_meta, row_bytes_of
from distillery.cache.encoded import RowEncoding
from distillery.cache.images import (
    FAILURES_NAME,
    IMAGE_SHARDS,
    INDEX_NAME,
    SHARD_PATTERN,
    is_predecessors,
    place_image_fields,
    shard_name,
)
from distillery.cache.store import FutureFormatError, ShardKind, check_version, parse_json, record_path
from distillery.sources.masks import MASK_POLICY_VERSION
from distillery.sources.pixels import PreprocessSpec, library_versions
from distillery.system.errors import UserError
from distillery.system.files import read_regular, sha256_of


class ShardPlan(Protocol):
    """What a folder of shards shall be: a CachePlan, or the TeacherPlan of a teacher's outputs over one."""

    kind: ShardKind
    directory: Path
    identity: dict
    fingerprint: str
    num_rows: int
    row_bytes: int
    rows_vary: bool

    def rows_of(self, shard_idx: int) -> tuple[int, int]:
        """(first row, row after the last) of a shard in the source."""

    def shard_path(self, shard_idx: int) -> Path:
        """Where the shard is published."""


@dataclass(frozen=True)
class CachePlan:
    """What the cache shall be: everything that decides its bytes, and how many rows it shall hold.

    num_rows: rows wanted, the first so many of the source; image sizes in px inside `spec`; mask_dtype: of the masks
    stored beside the images, one of MASK_DTYPES, None: none; encoding: of the rows, where dtype is jpeg.
    """

    directory: Path
    spec: PreprocessSpec
    dtype: str
    shard_size: int
    num_rows: int
    source_num_samples: int
    source_identity: dict
    labels: bool
    mask_dtype: str | None = None
    encoding: RowEncoding | None = None
    kind: ClassVar[ShardKind] = IMAGE_SHARDS

    @cached_property
    def identity(self) -> dict:
        """All that decides the bytes; its hash is the fingerprint, its differences the message when it changes."""
        masks = {"dtype": self.mask_dtype, "resampler": "nearest", "policy_version": MASK_POLICY_VERSION}
        return {
            "source": self.source_identity,
            "preprocess": self.spec.identity()
            | {"normalized": pixel_dtype_of(self.dtype) != "uint8"}
            | ({} if self.encoding is None else self.encoding.identity()),
            "dtype": self.dtype,
            "image_shape": list(self.image_shape),
            "shard_size": self.shard_size,
            "labels": self.labels,
            **({} if self.mask_dtype is None else {"masks": masks}),
        }

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the identity."""
        return sha256_of(self.identity)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """[3, H, W] of a stored image."""
        return 3, self.spec.image_size, self.spec.image_size

    @property
    def image_bytes(self) -> int | None:
        """Bytes of a stored image; None: images are encoded, each has its own length."""
        return row_bytes_of(self.image_shape, self.dtype) if self.encoding is None else None

    @property
    def row_bytes(self) -> int:
        """Bytes of a stored image and its mask; of an encoded image what is typical (RowEncoding.typical_bytes)."""
        if self.encoding is not None:
            return self.encoding.typical_bytes(self.spec.image_size)
        fields = place_image_fields(1, self.dtype, self.image_shape, self.mask_dtype)
        return sum(field.row_bytes for field in fields)

    @property
    def rows_vary(self) -> bool:
        """Whether each row has its own length, and row_bytes is only what is typical."""
        return self.encoding is not None

    @property
    def num_shards(self) -> int:
        """Shards of the whole cache, the short last one included."""
        return -(-self.num_rows // self.shard_size)

    def rows_of(self, shard_idx: int) -> tuple[int, int]:
        """(first row, row after the last) of a shard in the source."""
        start = shard_idx * self.shard_size
        return start, min(self.num_rows, start + self.shard_size)

    def shard_path(self, shard_idx: int) -> Path:
        """Where the shard is published."""
        return self.directory / shard_name(shard_idx)

    def why_outdated(self, record: dict) -> str | None:
        """Why a whole shard of this identity is to be made again: the short last one of a cache that now grows."""
        start, stop = self.rows_of(record["shard_idx"])
        rows = record["num_samples"]
        return f"holds the first {rows} of {stop - start} rows" if rows < stop - start else None


@dataclass(frozen=True)
class Survey:
    """What a folder holds of a plan's shards.

    done: finished; to_check: to hash before they count; missing: to make, where there is none or an outdated one.
    notes: what the user should know although it stops nothing. row_bytes: of an encoded row, on average, in the shards
    there are or in a sample; None: not known.
    """

    done: list[int]
    to_check: list[int]
    missing: list[int]
    notes: list[str] = field(default_factory=list)
    row_bytes: float | None = None


def survey_cache(plan: CachePlan, shards: Iterable[int]) -> Survey:
    """Compare a folder with a plan; reads records and file sizes only, writes nothing.

    A shard counts as finished when its record parses, its size agrees and it was not touched since its record was
    written; anything else is hashed before it counts.

    Raises:
        UserError: the folder holds a cache of another configuration, with the differences field by field; or of a later
            or earlier format; or a link or pipe under a shard's name.
    """
    # in this order: another job may make the folder between the two questions
    if not os.path.lexists(plan.directory):
        return Survey([], [], list(shards))
    if not plan.directory.is_dir():
        raise UserError(f"{plan.directory} is a file, or a symbolic link to nothing. Give another cache_dir.")
    try:
        return _survey_folder(plan, shards)
    except PermissionError as error:
        raise UserError(
            f"{error.filename}: may not be read by this user; the cache must be readable to go on."
        ) from error


def _survey_folder(plan: CachePlan, shards: Iterable[int]) -> Survey:
    _check_folder(plan.directory)
    shards, records = list(shards), IMAGE_SHARDS.scan(plan.directory).records()
    # all of them, not only this job's share: two jobs of different configurations must not fill one folder
    for record in records:
        if is_predecessors(record):
            raise _earlier_format(plan.directory)
        _check_same_identity(plan, record["identity"], plan.directory / record["shard_path"])
    found = {record["shard_idx"]: record for record in records}
    names = set(os.listdir(plan.directory))
    for shard_idx in shards:
        path = plan.shard_path(shard_idx)
        if shard_idx not in found and path.name in names:
            _check_same_identity(plan, _identity_inside(path), path)
    return survey_shards(plan, shards, found, plan.why_outdated, _library_notes(records))


def survey_shards(
    plan: ShardPlan,
    shards: Iterable[int],
    records: dict[int, dict],
    why_outdated: Callable[[dict], str | None],
    notes: Sequence[str] = (),
) -> Survey:
    """Sort shards of any kind by what their records say.

    Args:
        plan: what the folder shall be.
        shards: their numbers.
        records: shard_idx -> record, of those that are readable.
        why_outdated: why a whole shard with this record is to be made again; None: it is not.
        notes: for the survey.
    """
    done, to_check, missing = [], [], []
    # one call, not one for each shard: many processes may begin on a folder at the same time
    names = set(os.listdir(plan.directory))
    for shard_idx in shards:
        path, record = plan.shard_path(shard_idx), records.get(shard_idx)
        if path.name not in names:
            missing.append(shard_idx)
        elif record is None or not is_untouched(path, record):
            to_check.append(shard_idx)
        elif why_outdated(record):
            missing.append(shard_idx)
        else:
            done.append(shard_idx)
    rows, num_bytes = (sum(record[key] for record in records.values()) for key in ("num_samples", "bytes"))
    return Survey(done, to_check, missing, list(notes), num_bytes / rows if rows else None)


def is_untouched(path: Path, record: dict) -> bool:
    """Whether a shard has the size its record says and was not written, renamed or replaced after it.

    To the precision of the file system's clock, some ms; and a medium that returns other bytes than it was given
    changes no time: what this does not see, verify does.
    """
    status, recorded = path.lstat(), record_path(path).lstat()
    return status.st_size == record["bytes"] and status.st_ctime_ns <= recorded.st_ctime_ns


def _library_notes(records: Iterable[dict]) -> list[str]:
    """One line for each library that could change pixels and has another version now than when a shard was made."""
    now = library_versions()
    then: dict[str, set[str]] = {}
    for record in records:
        for name, version in record["libraries"].items():
            if now.get(name) != version:
                then.setdefault(name, set()).add(version)
    return [
        f"shards of this cache were made with {name} {', '.join(sorted(versions))}, now it is "
        f"{now.get(name, 'not installed')}: pixels of new shards may differ in the last bits"
        for name, versions in sorted(then.items())
    ]


def _check_folder(directory: Path) -> None:
    """Refuse links and pipes in the place of a cache's files, and indexes of a future format or the predecessor's."""
    has_shards = has_records = False
    for entry in os.scandir(directory):
        is_shard, is_record = (bool(SHARD_PATTERN.fullmatch(entry.name.removesuffix(end) + ".pt"))
                               and entry.name.endswith(end) for end in (".pt", ".json"))  # fmt: skip
        is_ours = is_shard or is_record or entry.name in {INDEX_NAME, FAILURES_NAME}
        if is_ours and not entry.is_file(follow_symlinks=False):
            raise UserError(
                f"{entry.path} is a symbolic link, a pipe or a folder. A cache folder may itself be a symbolic link, "
                "its files may not: put the file in its place, or remove it."
            )
        has_shards, has_records = has_shards or is_shard, has_records or is_record
    path = directory / INDEX_NAME
    version = 3
    try:
        if path.exists():
            index = parse_json(path, read_regular(path))
            check_version(index, path)
            version = index.get("format_version")
    except FutureFormatError:
        raise
    except UserError:
        pass  # damaged: it is only a view, and is made again
    if has_shards and not has_records and (version is None or any(directory.glob("index_shard_*.json"))):
        raise _earlier_format(directory)


def _earlier_format(directory: Path) -> UserError:
    return UserError(
        f"{directory} holds a cache of an earlier format. Training reads it as it is; "
        "for a new cache give another cache_dir."
    )


def _identity_inside(path: Path) -> dict | None:
    try:
        facts = parse_json(path, read_meta(path))
        check_version(facts, path)
        return facts.get("identity")
    except ForeignShardError as error:
        raise UserError(f"{error} Stage 1 does not write over it: move it away, or give another cache_dir.") from error
    except (FutureFormatError, PermissionError):
        raise
    except (UserError, OSError):
        return None  # damaged beyond reading: it will be made again


def _check_same_identity(plan: CachePlan, found: dict | None, path: Path) -> None:
    if found is None or found == plan.identity:
        return
    changed = list(differences(found, plan.identity))
    if {key for key, _, _ in changed} == {"source.classes"}:
        raise UserError(
            f"{plan.directory} was made with its classes numbered apart from those of the train split: its labels are "
            f"not comparable. Remove it (rm -r {shlex.quote(str(plan.directory))}) and run the same command again."
        )
    # not the whole cache for one evaluation set
    is_evaluation = plan.directory.parent.parent.name == "eval"
    remedy = "give another cache_dir"
    if is_evaluation:
        remedy = f"remove that folder (rm -r {shlex.quote(str(plan.directory))}): the same command makes it anew"
    then, now = found.get("source", {}), plan.source_identity
    if "files" in then and all(key.startswith(("source.files.", "source.num_rows")) for key, _, _ in changed):
        counts = [_count_files(then), _count_files(now)]
        difference = ", with other names or content" if counts[0] == counts[1] else ""
        raise UserError(
            f"{path} was made of other files: {counts[0]} then, {counts[1]} now{difference}. Nothing was written. Put "
            f"the files back as they were, or {remedy}."
        )
    remedy = f"Put the values back, or {remedy}"
    if {key for key, _, _ in changed} == {"preprocess.encoder"}:
        encoder = str(changed[0][1]).replace(" ", "==")
        remedy = f"Install the version of the cache (pip install {encoder}), or give another cache_dir"
    lines = [f"  {key}: the cache has {a!r}, now it would be {b!r}" for key, a, b in changed]
    raise UserError(
        f"{path} was made with another configuration:\n" + "\n".join(lines) + f"\nNothing was written. {remedy}."
    )


def _count_files(source: dict) -> str:
    """How much a source is, of its identity."""
    files = source["files"]
    size = f", {files['bytes']:,} bytes" if "bytes" in files else ""
    return f"{source['num_rows']:,} images in {files['count']:,} file{'s' * (files['count'] != 1)}{size}"


def rows_made_of(directory: Path, source_identity: dict) -> int:
    """How many rows of this very source a folder holds."""
    records = IMAGE_SHARDS.scan(directory).records() if directory.is_dir() else []
    return sum(record["num_samples"] for record in records if record["identity"]["source"] == source_identity)


# what an identity means that does not name a key
_UNNAMED = {"jpeg_decode": "exact", "projection": False, "mirror": False}


def differences(a: object, b: object, prefix: str = "") -> Iterator[tuple[str, object, object]]:
    """(dotted key, value in a, value in b) wherever two nested dicts differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            unnamed = _UNNAMED.get(key)
            yield from differences(a.get(key, unnamed), b.get(key, unnamed), f"{prefix}.{key}" if prefix else key)
    elif a != b:
        yield prefix, a, b
