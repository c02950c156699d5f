"""The two layouts of this project's predecessor, without hashes and therefore flagged as unverified.

v1: index.json = {num_samples, shards: [{shard_path, num_samples, global_start}]}; the images are normalised.
v2: one index_shard_NNN.json per array task with the same rows; the images are in 0..1, not normalised.
"""

from pathlib import Path

from distillery.cache_index import MALFORMED, CacheIndex, checked_index, shard_arrays, whole_number
from distillery.records import SHARD_PATTERN, parse_json
from distillery.shard_format import DTYPES
from distillery.system.errors import MissingFileError, UserError, stage1_command
from distillery.system.files import open_regular, read_regular

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def merge_slices(paths: list[Path]) -> tuple[dict, list[dict]]:
    """The predecessor's one index per array task as one: (facts of the first, all shard rows by global_start)."""
    slices = [parse_json(path, read_regular(path)) for path in paths]
    try:
        rows = sorted(
            (row for part in slices for row in part["shards"]), key=lambda row: whole_number(row, "global_start")
        )
    except MALFORMED as error:
        raise UserError(f"{paths[0].parent}: an index_shard_*.json is damaged ({error!r}).") from error
    return slices[0], rows


def index_of_seed(directory: Path, facts: dict, rows: list[dict] | None, *, normalized: bool) -> CacheIndex:
    """A predecessor's index. Its num_samples may be the data set's size: what counts is what the shards hold."""
    try:
        if not rows:
            raise UserError(f"{directory}: its index lists no shards. Run: {stage1_command()}")
        arrays = shard_arrays([_seed_row(directory, row) for row in rows])
        dtype, shape = seed_image_format(directory / rows[0]["shard_path"])
        num_rows = int(arrays["shard_rows"].sum())
        end = int((arrays["shard_starts"] + arrays["shard_rows"]).max())
        return checked_index(
            CacheIndex(
                directory=directory,
                format_version=1 if normalized else 2,
                verified=False,
                num_samples=num_rows,
                source_num_samples=max(end, whole_number(facts, "num_samples") if "num_samples" in facts else 0),
                complete=False,
                fingerprint="",
                source={},
                preprocess={
                    "image_size": shape[1],
                    "mean": list(IMAGENET_MEAN),
                    "std": list(IMAGENET_STD),
                    "normalized": normalized,
                },
                dtype=dtype,
                image_shape=shape,
                shard_size=int(arrays["shard_rows"].max()),
                labels=False,
                **arrays,
            )
        )
    except MALFORMED as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{directory}: its index is damaged ({type(error).__name__}: {error}).") from error


def _seed_row(directory: Path, row: dict) -> dict:
    name = row["shard_path"]
    if not isinstance(name, str) or not SHARD_PATTERN.fullmatch(name):
        raise UserError(f"{directory}: refused: its index names {name!r}, which is no shard's name.")
    try:
        size = (directory / name).lstat().st_size
    except FileNotFoundError as error:
        raise MissingFileError(f"{error.filename}: listed in the index of {directory}, but not there.") from error
    return {**row, "num_failed": 0, "bytes": size}


def seed_image_format(path: Path) -> tuple[str, tuple[int, int, int]]:
    """(dtype, [3, H, W]) of a predecessor's shard; torch reads only the header thanks to mmap, and runs nothing."""
    import torch

    open_regular(path).close()
    try:
        images = torch.load(path, weights_only=True, mmap=True, map_location="cpu")["images"]
        dtype, shape = str(images.dtype).removeprefix("torch."), tuple(images.shape)
    except Exception as error:  # torch raises nearly anything on hostile bytes
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged, or not written by torch.save ({type(error).__name__}: {reason}).") from error
    if dtype not in DTYPES or len(shape) != 4:
        raise UserError(f"{path}: its images are {dtype} {shape}; expected [N, 3, H, W] of {', '.join(DTYPES)}.")
    return dtype, shape[1:]
