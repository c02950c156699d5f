"""Stage 1's plan: a few images decoded to tell how long all of them take, and what the hub says without a download."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from distillery.config import DataConfig
from distillery.decode import Unit, write_unit
from distillery.decode_pool import SLOT_BYTES, needs_resampler
from distillery.files import format_bytes
from distillery.plan import CachePlan
from distillery.planner import CacheWork, DecodeSpeed, cache_lines, free_inodes
from distillery.preprocess import (
    DecodeError,
    PreprocessSpec,
    decode_image,
    load_resampler,
)
from distillery.shard_format import DTYPES
from distillery.sources_base import Source
from distillery.sources_hub_facts import HubFacts

_FIRST = 8


def measure_decoding(source: Source, spec: PreprocessSpec, dtype: str, num_images: int = 64) -> DecodeSpeed | None:
    """Take images from the middle of a source through all that a worker does, into memory; nothing touches a disk.

    Returns:
        None where not one of them could be decoded.
    """
    count = min(num_images, len(source))
    start = (len(source) - count) // 2
    images = source.read(start, start + count)
    needs_torch = needs_resampler(spec, images[:_FIRST])
    if needs_torch:
        load_resampler().set_num_threads(1)  # as many as a worker has
    fd = os.memfd_create("decoded-images")
    try:
        # the first few pay for what is imported and allocated once
        parts = [images[:_FIRST], *([images[_FIRST:]] if count > _FIRST else [])]
        results = [write_unit(Unit(f"/proc/self/fd/{fd}", 0, part, spec, dtype)) for part in parts]
    finally:
        os.close(fd)
    num_decoded = len(parts[-1]) - len(results[-1].failures)
    if not num_decoded:
        return None
    return DecodeSpeed(
        num_images=num_decoded,
        seconds=max(results[-1].seconds / num_decoded, 1e-9),
        encoded_bytes=sum(map(len, images)) / count,
        pixels=max(map(_num_pixels, images[:_FIRST])),
        needs_torch=needs_torch,
    )


def _num_pixels(data: bytes) -> int:
    try:
        height, width, _ = decode_image(data).shape
    except DecodeError:
        return 0
    return height * width


def plan_lines(
    to_make: Iterable[tuple[CachePlan, list[int]]], folder: Path, num_workers: int, speed: DecodeSpeed | None
) -> list[str]:
    """Files, memory and hours of a job.

    Args:
        to_make: for each cache its plan and the shards that this job has to make.
        folder: cache_dir, which may not be there yet.
        num_workers: decode workers.
        speed: what measure_decoding found.
    """
    entries = [(plan, shards, _rows(plan, shards)) for plan, shards in to_make]
    work = CacheWork(
        num_images=sum(rows for _, _, rows in entries),
        num_bytes=sum(rows * plan.row_bytes for plan, _, rows in entries),
        num_shards=sum(len(shards) for _, shards, _ in entries),
        num_folders=len(entries),
        num_workers=num_workers,
        unit_bytes=(2 * num_workers + 2) * SLOT_BYTES,
    )
    return cache_lines(work, speed, free_inodes(folder))


def _rows(plan: CachePlan, shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in map(plan.rows_of, shards))


def remote_lines(title: str, facts: HubFacts, limit: int | None, data: DataConfig) -> list[str]:
    """What can be said of a data set that is still on the hub; limit: rows wanted at the most, None for all."""
    lines = [f"{title}: {facts.describe()}"]
    if facts.num_rows is None:
        lines.append("  how many images there are is not known before the download")
    else:
        rows = min(limit or facts.num_rows, facts.num_rows)
        row_bytes = 3 * data.image_size**2 * np.dtype(DTYPES[data.cache_dtype]).itemsize
        num_shards = -(-rows // data.cache_shard_size)
        lines.append(
            f"  {rows:,} of {facts.num_rows:,} images: {num_shards:,} shards of {data.cache_shard_size:,}, "
            f"{format_bytes(rows * row_bytes)} to write, {2 * num_shards + 2:,} files"
        )
    lines.append("  nothing was downloaded or decoded for this plan: after --download_only it tells the hours too")
    return lines
