"""A cache folder as its readers see it: index.json in arrays, where a shard's rows are, which of them hold an image.

    python -m distillery.cache verify DIR     # reads every byte, writes nothing; exit status 1 when anything is wrong

Three layouts are read: ours (format_version 3) and the two of this project's predecessor, which carry no hashes and are
therefore flagged as unverified.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillery.process import MissingFileError, UserError, run_command
from distillery.records import (
    FORMAT_VERSION,
    INDEX_NAME,
    SHARD_PATTERN,
    check_record,
    decode_checksums,
    parse_json,
    read_record,
    record_path,
)
from distillery.shard_format import DTYPES, find_payload, open_regular, read_member, read_meta

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CacheIndex:
    """What index.json says, in arrays: one entry per shard (S shards), in order of global_start."""

    directory: Path
    format_version: int
    verified: bool
    num_samples: int
    source_num_samples: int
    complete: bool
    fingerprint: str
    source: dict
    preprocess: dict
    dtype: str
    image_shape: tuple[int, int, int]
    shard_size: int
    labels: bool
    shard_names: list[str]
    shard_starts: np.ndarray
    shard_rows: np.ndarray
    shard_failed: np.ndarray
    shard_bytes: np.ndarray

    @property
    def normalized(self) -> bool:
        """Whether the stored values are already (x / 255 - mean) / std."""
        return bool(self.preprocess["normalized"])

    @property
    def mean(self) -> tuple[float, ...]:
        """Per channel, of pixel values in 0..1."""
        return tuple(self.preprocess["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Per channel, of pixel values in 0..1."""
        return tuple(self.preprocess["std"])

    @property
    def row_bytes(self) -> int:
        """Bytes of one stored image."""
        return int(np.prod(self.image_shape)) * np.dtype(DTYPES[self.dtype]).itemsize

    @property
    def num_valid(self) -> int:
        """Rows that hold an image: all but those that could not be decoded."""
        return int(self.shard_rows.sum() - self.shard_failed.sum())

    def shard_path(self, s: int) -> Path:
        """The file of the s-th shard listed."""
        return self.directory / self.shard_names[s]


@dataclass(frozen=True)
class ShardLayout:
    """Where the N rows of a shard are and which of them hold an image.

    payload_offset: byte offset of row 0 in the file; valid: bool [N]; row_checksums: uint64 [N], XXH3-64 of each row's
    bytes, or None in a predecessor's cache.
    """

    payload_offset: int
    valid: np.ndarray
    row_checksums: np.ndarray | None


def stage1_command(what: str = "") -> str:
    """The command that repairs a cache, for error messages."""
    return f"python precompute_cache.py --data_config data_config.yaml{what}"


def load_index(directory: str | os.PathLike) -> CacheIndex:
    """Open a cache folder of any of the three layouts.

    Raises:
        MissingFileError: no cache there.
        UserError: its index is damaged, of a future format, hostile or contradicts itself.
    """
    directory = Path(directory)
    path = directory / INDEX_NAME
    if not path.exists():
        if slices := sorted(directory.glob("index_shard_*.json")):
            return _index_of_seed(directory, *_merge_slices(slices), normalized=False)
        raise MissingFileError(
            f"Index file not found: {path}. Run: {stage1_command(' --train_config train_config_kd.yaml')}"
        )
    with open_regular(path) as file:
        index = parse_json(path, file.read())
    version = index.get("format_version", 1)
    if type(version) is not int or version > FORMAT_VERSION:
        raise UserError(f"{path}: format_version {version!r} is of a later version of this project; update the code.")
    if version < FORMAT_VERSION:
        return _index_of_seed(directory, index, index.get("shards"), normalized=True)
    try:
        return _checked_index(
            CacheIndex(
                directory=directory,
                format_version=version,
                verified=True,
                num_samples=index["num_samples"],
                source_num_samples=index["source_num_samples"],
                complete=bool(index["complete"]),
                fingerprint=index["fingerprint"],
                source=index["source"],
                preprocess=index["preprocess"],
                dtype=index["dtype"],
                image_shape=tuple(index["image_shape"]),
                shard_size=index["shard_size"],
                labels=bool(index["labels"]),
                **_shard_arrays(index["shards"]),
            )
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path}: damaged ({type(error).__name__}: {error}). It is made again by: {stage1_command()}"
        ) from error


def _shard_arrays(rows: list[dict]) -> dict:
    columns = {
        "global_start": "shard_starts",
        "num_samples": "shard_rows",
        "num_failed": "shard_failed",
        "bytes": "shard_bytes",
    }
    for row in rows:
        for key in columns:
            if type(row[key]) is not int or row[key] < 0:
                raise UserError(f"shard {row['shard_path']!r} has {key} {row[key]!r}; expected a whole number >= 0.")
    arrays = {name: np.array([row[key] for row in rows], dtype=np.int64) for key, name in columns.items()}
    return {"shard_names": [row["shard_path"] for row in rows], **arrays}


def _checked_index(index: CacheIndex) -> CacheIndex:
    """Raise UserError unless names stay inside the folder and ranges are ascending, disjoint and inside the source."""
    path = index.directory / INDEX_NAME
    for name in index.shard_names:
        if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
            raise UserError(f"{path}: refused: {name!r} is no shard's name (expected images_shard_00000.pt and so on).")
    if not index.shard_names:
        raise UserError(f"{path}: lists no shards. Run: {stage1_command()}")
    ends = index.shard_starts + index.shard_rows
    overlapping = np.flatnonzero(index.shard_starts[1:] < ends[:-1])
    if len(overlapping):
        a, b = overlapping[0], overlapping[0] + 1
        raise UserError(
            f"{path}: {index.shard_names[a]} and {index.shard_names[b]} overlap or are out of order "
            f"(rows {index.shard_starts[a]}..{ends[a] - 1} and {index.shard_starts[b]}..{ends[b] - 1})."
        )
    if (index.shard_rows <= 0).any() or (index.shard_failed > index.shard_rows).any():
        raise UserError(f"{path}: a shard without rows, or with more failures than rows.")
    if index.dtype not in DTYPES or len(index.image_shape) != 3 or min(index.image_shape) < 1:
        raise UserError(f"{path}: dtype {index.dtype!r} and image_shape {index.image_shape} are not of this format.")
    if index.verified and int(index.shard_rows.sum()) != index.num_samples:
        raise UserError(f"{path}: num_samples {index.num_samples}, the shards listed hold {index.shard_rows.sum()}.")
    return index


def _merge_slices(paths: list[Path]) -> tuple[dict, list[dict]]:
    """The predecessor's one index per array task as one: (facts of the first, all shard rows by global_start)."""
    slices = []
    for path in paths:
        with open_regular(path) as file:
            slices.append(parse_json(path, file.read()))
    rows = sorted((row for part in slices for row in part.get("shards", [])), key=lambda row: row["global_start"])
    return slices[0], rows


def _index_of_seed(directory: Path, facts: dict, rows: list[dict] | None, *, normalized: bool) -> CacheIndex:
    """A predecessor's index. Its num_samples may be the data set's size: what counts is what the shards hold."""
    try:
        rows = [
            {"shard_path": row["shard_path"], "global_start": row["global_start"], "num_samples": row["num_samples"],
             "num_failed": 0, "bytes": (directory / row["shard_path"]).stat().st_size}
            for row in rows or [] if SHARD_PATTERN.fullmatch(str(row["shard_path"])) or _refuse_name(directory, row)
        ]  # fmt: skip
        arrays = _shard_arrays(rows)
    except FileNotFoundError as error:
        raise MissingFileError(f"{error.filename}: listed in the index of {directory}, but not there.") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: its index is damaged ({type(error).__name__}: {error}).") from error
    if not rows:
        raise UserError(f"{directory}: its index lists no shards. Run: {stage1_command()}")
    dtype, shape = _seed_image_format(directory / rows[0]["shard_path"])
    return _checked_index(
        CacheIndex(
            directory=directory,
            format_version=1 if normalized else 2,
            verified=False,
            num_samples=int(arrays["shard_rows"].sum()),
            source_num_samples=int(facts.get("num_samples", arrays["shard_rows"].sum())),
            complete=False,
            fingerprint="",
            source={},
            preprocess={
                "image_size": shape[1],
                "mean": IMAGENET_MEAN,
                "std": IMAGENET_STD,
                "normalized": normalized,
            },
            dtype=dtype,
            image_shape=shape,
            shard_size=int(arrays["shard_rows"].max()),
            labels=False,
            **arrays,
        )
    )


def _refuse_name(directory: Path, row: dict) -> bool:
    raise UserError(f"{directory}: refused: its index names {row['shard_path']!r}, which is no shard's name.")


def _seed_image_format(path: Path) -> tuple[str, tuple[int, int, int]]:
    """(dtype, [3, H, W]) of a predecessor's shard; torch reads only the header thanks to mmap."""
    import torch

    images = torch.load(path, weights_only=True, mmap=True)["images"]
    return str(images.dtype).removeprefix("torch."), tuple(images.shape[1:])


def load_shard_layout(index: CacheIndex, s: int) -> ShardLayout:
    """Where the rows of the s-th shard listed are.

    Raises:
        MissingFileError: the shard is gone.
        UserError: its record or archive is damaged, or is not the one the index lists.
    """
    path, rows = index.shard_path(s), int(index.shard_rows[s])
    try:
        if not index.verified:
            offset, size = find_payload(path)
            if size != rows * index.row_bytes:
                raise UserError(f"{path}: holds {size} bytes of images, its index promises {rows * index.row_bytes}.")
            return ShardLayout(offset, np.ones(rows, dtype=bool), None)
        size = path.lstat().st_size
        if size != index.shard_bytes[s]:
            raise UserError(
                f"{path.name} has {size} bytes, index.json says {index.shard_bytes[s]}. "
                f"Run: python -m distillery.cache verify {index.directory}, then stage 1 again."
            )
        record = _record_or_meta(path)
    except FileNotFoundError as error:
        raise MissingFileError(
            f"{error.filename}: listed in the index, but not there. Run: {stage1_command()}"
        ) from error
    if record["fingerprint"] != index.fingerprint or record["num_samples"] != rows:
        raise UserError(f"{path}: is not the shard that index.json lists. Run: {stage1_command()}")
    valid = np.ones(rows, dtype=bool)
    valid[[entry["global_idx"] - record["global_start"] for entry in record["failures"]]] = False
    return ShardLayout(record["payload_offset"], valid, decode_checksums(record["row_checksums"]))


def _record_or_meta(path: Path) -> dict:
    """A shard's record, or when that is lost, the same facts from inside the shard (its bytes and hash left open)."""
    try:
        return read_record(record_path(path))
    except (FileNotFoundError, UserError):
        record = parse_json(path, read_meta(path))
        check_record(record | {"bytes": path.stat().st_size, "hash": "xxh3_128:" + "0" * 32}, path)
        return record


def load_labels(index: CacheIndex, s: int) -> np.ndarray | None:
    """int64 [N] of the s-th shard listed, its CRC checked; None in a cache without labels."""
    if not index.labels:
        return None
    return np.frombuffer(read_member(index.shard_path(s), "data/2"), dtype="<i8")


def main() -> int:
    """python -m distillery.cache verify DIR."""
    parser = argparse.ArgumentParser(prog="python -m distillery.cache", description="Check a cache; reads only.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare every byte with the hashes; writes nothing")
    verify.add_argument("directory", type=Path, metavar="DIR")
    directory = parser.parse_args().directory
    if not directory.is_dir():
        raise MissingFileError(f"{directory}: no such folder. Give the cache_dir of your data_config.yaml.")
    from distillery.verify import report_verification  # that module reads caches through this one

    return report_verification(directory, stage1_command())


if __name__ == "__main__":
    run_command(main)
