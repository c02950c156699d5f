"""Read index.json into arrays, and check it before anything relies on it."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from distillery.cache.archive import DTYPES, ENCODED_DTYPE, pixel_dtype_of, row_bytes_of
from distillery.cache.encoded import is_encoded
from distillery.cache.images import INDEX_NAME, SHARD_PATTERN
from distillery.cache.store import FORMAT_VERSION
from distillery.sources.masks import MASK_DTYPES
from distillery.system.errors import UserError, stage1_command

# what an index of this project has and its predecessor's has not
OWN_KEYS = frozenset({"complete", "fingerprint", "preprocess", "image_shape"})
_MAX_COUNT = 1 << 53
# of an encoded row in its shard: its offset, and whether it is valid
_LEAST_ENCODED_BYTES = 9
# key of a row of index.json -> field of CacheIndex
_SHARD_ARRAYS = {
    "global_start": "shard_starts",
    "num_samples": "shard_rows",
    "num_failed": "shard_failed",
    "bytes": "shard_bytes",
}


@dataclass(frozen=True)
class CacheIndex:
    """What index.json says, in arrays: one entry per shard (S shards), in order of global_start.

    class_names: label -> name, where the source has names; caches of earlier versions do not say.
    mask_dtype: how masks are stored beside the images; None: there are none. mask_classes: all class numbers in them.
    """

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
    class_names: dict[int, str] = field(default_factory=dict)
    mask_dtype: str | None = None
    mask_classes: tuple[int, ...] = ()

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
    def is_encoded(self) -> bool:
        """Whether rows are encoded images, each of its own length, to be decoded when they are read."""
        return is_encoded(self.dtype)

    @property
    def pixel_dtype(self) -> str:
        """What the pixels are: as they are stored, or of encoded images uint8."""
        return pixel_dtype_of(self.dtype)

    @property
    def row_bytes(self) -> int:
        """Bytes of one image as a raw batch holds it: as it is stored, or of an encoded one its uint8 pixels."""
        return row_bytes_of(self.image_shape, self.dtype)

    @property
    def num_valid(self) -> int:
        """Rows that hold an image: all but those that could not be decoded."""
        return int(self.shard_rows.sum() - self.shard_failed.sum())

    def shard_path(self, s: int) -> Path:
        """The file of the s-th shard listed."""
        return self.directory / self.shard_names[s]

    @property
    def mask_row_bytes(self) -> int:
        """Bytes of one stored mask, which has the height and width of its image."""
        return math.prod(self.image_shape[1:]) * np.dtype(MASK_DTYPES[self.mask_dtype]).itemsize

    def only(self, shards: slice | list[int]) -> "CacheIndex":
        """The index of some of its shards."""
        names = np.array(self.shard_names, object)[shards].tolist()
        arrays = {name: getattr(self, name)[shards] for name in _SHARD_ARRAYS.values()}
        return replace(self, shard_names=names, num_samples=int(arrays["shard_rows"].sum()), **arrays)


def whole_number(row: dict, key: str) -> int:
    """A whole number of rows, bytes or the like out of a file that anybody may have written."""
    value = row[key]
    if type(value) is not int or not 0 <= value < _MAX_COUNT:
        raise UserError(f"{row.get('shard_path', INDEX_NAME)!r} has {key} {value!r}; expected a whole number >= 0.")
    return value


def checked_preprocess(facts: dict) -> dict:
    """The preprocess entry of an index, when a reader can normalise by it; ValueError or TypeError otherwise."""
    mean, std = ([float(value) for value in facts[key]] for key in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"mean {mean} and std {std}")
    if type(facts["normalized"]) is not bool:
        raise TypeError(f"normalized {facts['normalized']!r}")
    return facts


def shard_arrays(rows: list[dict]) -> dict:
    """CacheIndex's fields about the S shards out of index.json's rows."""
    names = [row["shard_path"] for row in rows]
    return {"shard_names": names} | {
        name: np.array([whole_number(row, key) for row in rows], dtype=np.int64) for key, name in _SHARD_ARRAYS.items()
    }


def own_fields(content: dict) -> dict:
    """CacheIndex's fields out of an index.json of this project; one of MALFORMED where it is not sound."""
    if type(content.get("format_version")) is not int or content["format_version"] != FORMAT_VERSION:
        raise ValueError(f"format_version {content.get('format_version')!r}")
    return shard_arrays(content["shards"]) | {
        "verified": True,
        "num_samples": whole_number(content, "num_samples"),
        "source_num_samples": whole_number(content, "source_num_samples"),
        "complete": bool(content["complete"]),
        "fingerprint": str(content["fingerprint"]),
        "source": dict(content["source"]),
        "preprocess": checked_preprocess(content["preprocess"]),
        "dtype": content["dtype"],
        "image_shape": tuple(content["image_shape"]),
        "shard_size": whole_number(content, "shard_size"),
        "labels": bool(content["labels"]),
        "class_names": {int(number): str(name) for number, name in content.get("class_names", {}).items()},
        "mask_dtype": content.get("mask_dtype"),
        "mask_classes": tuple(int(number) for number in content.get("mask_classes", [])),
    }


def checked_index(index: CacheIndex) -> CacheIndex:
    """Raise UserError unless names stay inside the folder and ranges are ascending, disjoint and inside the source."""
    path = index.directory / INDEX_NAME
    for name in index.shard_names:
        if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
            raise UserError(f"{path}: refused: {name!r} is no shard's name (expected images_shard_00000.pt and so on).")
    if not index.shard_names:
        raise UserError(f"{path}: lists no shards. Run: {stage1_command()}")
    if len(set(index.shard_names)) < len(index.shard_names):
        raise UserError(f"{path}: lists a shard twice. It is made again by: {stage1_command()}")
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
    if (
        index.dtype not in {*DTYPES, ENCODED_DTYPE}
        or len(index.image_shape) != 3
        or not all(type(extent) is int and 0 < extent < _MAX_COUNT for extent in index.image_shape)
        or index.mask_dtype not in (None, *MASK_DTYPES)
        or (index.is_encoded and index.mask_dtype is not None)
    ):
        raise UserError(
            f"{path}: dtype {index.dtype!r}, mask_dtype {index.mask_dtype!r} and image_shape {index.image_shape} are "
            "not of this format."
        )
    if index.verified and int(index.shard_rows.sum()) != index.num_samples:
        raise UserError(f"{path}: num_samples {index.num_samples}, the shards listed hold {index.shard_rows.sum()}.")
    if ends[-1] > index.source_num_samples:
        raise UserError(f"{path}: lists rows up to {ends[-1]} of a source of {index.source_num_samples}.")
    least = _LEAST_ENCODED_BYTES if index.is_encoded else index.row_bytes
    for s, rows in enumerate(index.shard_rows.tolist()):
        if rows * least > index.shard_bytes[s]:
            raise UserError(
                f"{path}: {index.shard_names[s]} cannot hold {rows} images in {index.shard_bytes[s]} bytes."
            )
    return index
