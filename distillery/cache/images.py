"""What only image shards have: the fields of their record, and how index.json and failures.jsonl are written."""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from distillery.cache.archive import PAYLOAD_OFFSET, read_member, row_bytes_of
from distillery.cache.encoded import decode_row_sizes, is_encoded, offsets_of, place_encoded_rows
from distillery.cache.fields import Field, digest_file, place_fields
from distillery.cache.store import FORMAT_VERSION, ShardKind, decode_checksums, encode_checksums
from distillery.sources.masks import MASK_DTYPES
from distillery.system.files import canonical_json, sha256_of

INDEX_NAME = "index.json"
FAILURES_NAME = "failures.jsonl"
SHARD_PATTERN = re.compile(r"images_(?:shard|s\d{3,})_\d{5,}\.pt")
# source kind of an upgraded cache of this project's predecessor, whose shards carry no description of themselves
PREDECESSOR = "predecessor"
_MAX_ROWS = 1 << 53  # the largest count that JSON readers of other languages keep exact


def shard_name(shard_idx: int) -> str:
    """images_shard_00007.pt for 7."""
    return f"images_shard_{shard_idx:05d}.pt"


def encode_sizes(values: np.ndarray) -> dict:
    """uint32 [N, 2] as it stands in a record."""
    return {"unit": "px, height and width", "values": base64.b64encode(values.astype("<u4").tobytes()).decode()}


def decode_sizes(entry: dict) -> np.ndarray:
    """uint32 [N, 2] out of a record."""
    return np.frombuffer(base64.b64decode(entry["values"], validate=True), dtype="<u4").reshape(-1, 2)


def valid_rows(record: dict) -> np.ndarray:
    """bool [N]: the rows that hold an image."""
    valid = np.ones(record["num_samples"], dtype=bool)
    valid[[entry["global_idx"] - record["global_start"] for entry in record["failures"]]] = False
    return valid


def is_predecessors(record: dict) -> bool:
    """Whether a record is of an upgraded cache of the predecessor, whose shards do not describe themselves."""
    return record["identity"]["source"].get("kind") == PREDECESSOR


def _is_consistent(record: dict, name: str) -> bool:
    identity, failures, shape = record["identity"], record["failures"], record["image_shape"]
    counts = [record[key] for key in ("format_version", "num_samples", "global_start", "bytes", "shard_idx",
                                      "payload_offset", "source_num_samples", "num_failed")]  # fmt: skip
    if not all(type(value) is int and 0 <= value < _MAX_ROWS for value in [*counts, *shape, identity["shard_size"]]):
        return False
    start, rows = record["global_start"], record["num_samples"]
    row_bytes = row_bytes_of(shape, record["dtype"])
    failed = [entry["global_idx"] - start for entry in failures]
    follows_its_number = (name, start) == (
        shard_name(record["shard_idx"]),
        record["shard_idx"] * identity["shard_size"],
    )
    return bool(
        record["format_version"] == FORMAT_VERSION
        and record["shard_path"] == name
        and (is_predecessors(record) or follows_its_number)
        and 0 < rows <= identity["shard_size"]
        and start + rows <= record["source_num_samples"]
        and len(shape) == 3
        and row_bytes > 0
        and (identity["dtype"], identity["image_shape"]) == (record["dtype"], shape)
        and type(identity["labels"]) is bool
        and all(type(version) is str for version in record["libraries"].values())
        and len(failures) == record["num_failed"]
        and all(type(row) is int and 0 <= row < rows for row in failed)
        and sorted(set(failed)) == failed
        and len(decode_checksums(record["row_checksums"])) == rows
        # shards of earlier versions, and the predecessor's, do not have them
        and ("source_sizes" not in record or len(decode_sizes(record["source_sizes"])) == rows)
        and all(number.isdecimal() and type(name) is str for number, name in record.get("class_names", {}).items())
        and _are_masks_consistent(record)
        and _are_row_sizes_consistent(record, failed)
        and max(field.end for field in image_fields(record)) <= record["bytes"]
        and record["fingerprint"] == sha256_of(identity)
        and re.fullmatch(r"xxh3_128:[0-9a-f]{32}", record["hash"])
    )


def _are_masks_consistent(record: dict) -> bool:
    """Whether what a record says of masks agrees with its identity, which alone says that there are any."""
    masks = record["identity"].get("masks")
    if masks is None:
        return not any(key.startswith("mask_") for key in record)
    classes = record["mask_classes"]
    return (
        record["mask_dtype"] == masks["dtype"]
        and masks["dtype"] in MASK_DTYPES
        and not record["identity"]["labels"]
        and record["payload_offset"] == PAYLOAD_OFFSET
        and len(decode_checksums(record["mask_checksums"])) == record["num_samples"]
        and all(type(number) is int and 0 <= number < 2**15 for number in classes)
        and sorted(set(classes)) == classes
    )


def _are_row_sizes_consistent(record: dict, failed: list[int]) -> bool:
    """Whether a record says how long its encoded rows are, those without an image being empty; others do not."""
    if not is_encoded(record["dtype"]):
        return "row_sizes" not in record
    is_empty = np.zeros(record["num_samples"], bool)
    is_empty[failed] = True
    sizes = decode_row_sizes(record)
    return (
        len(sizes) == record["num_samples"]
        and np.array_equal(sizes == 0, is_empty)
        and record["payload_offset"] == PAYLOAD_OFFSET
        and record["identity"].get("masks") is None
    )


def index_of(records: list[dict], num_target: int | None = None) -> dict:
    """index.json's content: a pure function of the records and of how many rows the cache shall have (None: all)."""
    identity, first = records[0]["identity"], records[0]
    num_target = min(first["source_num_samples"], num_target or first["source_num_samples"])
    names = {int(number): name for record in records for number, name in record.get("class_names", {}).items()}
    return {
        "format_version": FORMAT_VERSION,
        "num_samples": sum(record["num_samples"] for record in records),
        "source_num_samples": first["source_num_samples"],
        "complete": holds_first_rows(records, num_target),
        "fingerprint": first["fingerprint"],
        "source": identity["source"],
        "preprocess": identity["preprocess"],
        "dtype": first["dtype"],
        "image_shape": first["image_shape"],
        "shard_size": identity["shard_size"],
        "labels": identity["labels"],
        **({"class_names": {str(number): names[number] for number in sorted(names)}} if names else {}),
        **_masks_of(records),
        "cache_image_size": first["image_shape"][1],
        "cache_dtype": first["dtype"],
        "shards": [
            {key: record[key] for key in ("shard_path", "global_start", "num_samples", "num_failed", "bytes", "hash")}
            for record in records
        ],
    }


def _masks_of(records: list[dict]) -> dict:
    """What index.json says of masks: how they are stored, and every class number in them; {} without masks."""
    if "mask_dtype" not in records[0]:
        return {}
    classes = sorted({number for record in records for number in record["mask_classes"]})
    return {"mask_dtype": records[0]["mask_dtype"], "mask_classes": classes}


def holds_first_rows(records: list[dict], num_target: int) -> bool:
    """Whether the shards hold rows 0..num_target - 1 of the source."""
    return num_target <= sum(
        max(0, min(num_target, record["global_start"] + record["num_samples"]) - record["global_start"])
        for record in records
    )


def index_text(index: dict) -> bytes:
    """index.json as it stands on disk."""
    return json.dumps(index, indent=1).encode() + b"\n"


def failures_of(records: Iterable[dict]) -> bytes:
    """failures.jsonl's content."""
    return b"".join(canonical_json(entry) + b"\n" for record in records for entry in record["failures"])


def rehash_record(path: Path, record: dict) -> dict:
    """The record of a predecessor's shard, which does not describe itself, with all that its bytes decide afresh."""
    digest = digest_file(path, image_fields(record))
    checksums = encode_checksums(digest.checksums["images"])
    return record | {"bytes": digest.size, "hash": digest.hash, "row_checksums": checksums}


def image_fields(record: dict) -> list[Field]:
    """The big tensors of a shard: images, [N, 3, H, W], and where there are masks, [N, H, W]; or encoded rows."""
    if is_encoded(record["dtype"]):
        return place_encoded_rows(decode_row_sizes(record))
    rows, shape = record["num_samples"], record["image_shape"]
    if "mask_dtype" in record:
        return place_image_fields(rows, record["dtype"], shape, record["mask_dtype"])
    return [Field("images", record["dtype"], (rows, *shape), rows, record["payload_offset"])]


def place_image_fields(rows: int, dtype: str, shape: Sequence[int], mask_dtype: str | None) -> list[Field]:
    """Where images of `dtype` and `shape` [3, H, W] stand in a shard that is written now, and their masks."""
    big = {"images": (dtype, (rows, *shape))}
    if mask_dtype is not None:
        big["masks"] = (mask_dtype, (rows, *shape[1:]))
    return place_fields(big, row_dims=1)


def small_tensors(
    valid: np.ndarray, labels: np.ndarray | None, row_sizes: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """What a shard holds beside its images.

    Args:
        valid: bool [N].
        labels: int64 [N], or None where there are none.
        row_sizes: int64 [N], bytes of each encoded row, or None where images are not encoded.
    """
    return {
        **({} if row_sizes is None else {"offsets": offsets_of(row_sizes)}),
        "valid": valid.astype(np.bool_),
        **({} if labels is None else {"labels": labels.astype("<i8")}),
    }


def read_labels(path: Path, dtype: str) -> bytes:
    """The labels of a shard that has some, int64 [N], with its CRC checked."""
    return read_member(path, "data/3" if is_encoded(dtype) else "data/2")


def _small_tensors_of(record: dict, path: Path) -> dict[str, np.ndarray]:
    labels = np.frombuffer(read_labels(path, record["dtype"]), "<i8") if record["identity"]["labels"] else None
    row_sizes = decode_row_sizes(record) if is_encoded(record["dtype"]) else None
    return small_tensors(valid_rows(record), labels, row_sizes)


def _views_of(records: list[dict], num_target: int | None) -> tuple[dict, dict[str, bytes]]:
    index = index_of(records, num_target)
    return index, {FAILURES_NAME: failures_of(records), INDEX_NAME: index_text(index)}


IMAGE_SHARDS = ShardKind(
    pattern=SHARD_PATTERN,
    is_consistent=_is_consistent,
    fields_of=image_fields,
    checksums_of=lambda record: (
        {"encoded" if is_encoded(record["dtype"]) else "images": record["row_checksums"]}
        | ({"masks": record["mask_checksums"]} if "mask_dtype" in record else {})
    ),
    small_tensors=_small_tensors_of,
    views_of=_views_of,
    bulk=("row_checksums", "mask_checksums", "row_sizes", "source_sizes"),
)
