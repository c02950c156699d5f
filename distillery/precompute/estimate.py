"""Estimate what stage 1 costs, from a few decoded images: bytes, files, memory and hours."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from distillery.cache.archive import DTYPES, row_bytes_of
from distillery.cache.encoded import RowEncoding, is_encoded
from distillery.cache.plan import CachePlan, Survey
from distillery.config.keys_data import DataConfig
from distillery.precompute.pipeline import PUBLISH_AHEAD
from distillery.precompute.pool import keep_freed_memory, memory_bytes, needs_resampler
from distillery.precompute.worker import Unit, UnitResult, encode_unit, make_rows
from distillery.sources.base import Source
from distillery.sources.hub import HubSplit
from distillery.sources.jpeg import JPEG_START
from distillery.sources.pixels import DecodeError, PreprocessSpec, decode_image, library_versions
from distillery.sources.resizing import load_resampler
from distillery.system.console import format_bytes, format_duration
from distillery.system.errors import UserError
from distillery.system.machine import free_bytes, free_inodes, is_network_file_system

# measured (Private_* of smaps_rollup, Python 3.11, torch 2.14), without torch and with it, which resizes: a decode
# worker, and the server that all of them are forked from and share the rest with
_WORKER_BYTES, _SERVER_BYTES = {False: 8 << 20, True: 84 << 20}, {False: 27 << 20, True: 290 << 20}
# Pillow's image, its conversion and the array of the same pixels are there at once
_COPIES_OF_PIXELS = 3
_FIRST = 8
# for what is measured beside the configuration's own way: nobody shall wait long for it
_ASIDE_S = 2.0
# of the seconds that decoding takes: a smaller gain is not worth other pixels
_GAIN_WORTH_A_LINE = 0.2


@dataclass(frozen=True)
class DecodeSpeed:
    """A few images of the source, made into rows by this process.

    seconds: an image, by one worker; encoded_bytes: of an image, on average; pixels: of the largest; needs_torch: to
    resize them; jpeg_bytes: of the row of a compressed cache, on average, None: not measured; other: the other value of
    jpeg_decode, with the seconds that an image takes by it and the pixels that the median image has; None: it would
    make no difference.
    """

    num_images: int
    seconds: float
    encoded_bytes: float
    pixels: int
    needs_torch: bool
    jpeg_bytes: float | None = None
    other: tuple[str, float, float] | None = None


def jpeg_encoding(data: DataConfig) -> RowEncoding:
    """How images become rows of a compressed cache, whether or not the configuration asks for one."""
    return RowEncoding(data.row_size, data.jpeg_quality)


def row_bytes_of_plan(plan: CachePlan, speed: DecodeSpeed | None) -> float:
    """Bytes of a row and its mask; of encoded rows what was measured, or else what is typical."""
    if plan.rows_vary and speed is not None and speed.jpeg_bytes is not None:
        return speed.jpeg_bytes
    return plan.row_bytes


def _row_bytes(plan: CachePlan, survey: Survey, speed: DecodeSpeed | None) -> float:
    """As row_bytes_of_plan, but encoded rows that are there already tell more than a sample."""
    if plan.rows_vary and survey.row_bytes is not None:
        return survey.row_bytes
    return row_bytes_of_plan(plan, speed)


def bytes_to_write(plan: CachePlan, survey: Survey, speed: DecodeSpeed | None = None) -> int:
    """Of the shards that are missing; of encoded rows more or less."""
    return round(_num_rows(plan, survey.missing) * _row_bytes(plan, survey, speed))


def job_lines(
    title: str, source: Source, plan: CachePlan, shards: range, survey: Survey, speed: DecodeSpeed | None = None
) -> list[str]:
    """What one process will make of one cache.

    Args:
        title: what the cache is of.
        source: where its images come from.
        plan: what it shall be.
        shards: this process's share.
        survey: what is there of them.
        speed: what measure_decoding found, which tells the bytes of encoded rows; None: nothing was measured.
    """
    whole, to_write = (
        _size_text(plan, count)
        for count in (plan.num_rows * _row_bytes(plan, survey, speed), bytes_to_write(plan, survey, speed))
    )
    state = progress_text(survey)
    if len(shards) < plan.num_shards:
        state = f"this job's share: shards {shards.start}..{shards.stop - 1}; {state}"
    return [
        f"{title}: {source.describe()}",
        f"  -> {plan.directory}",
        f"  {plan.num_rows} of {plan.source_num_samples} images, {_stored(plan)}: {plan.num_shards} shards of "
        f"{plan.shard_size}, {whole}",
        f"  {state}; {to_write} to write",
        *(f"  WARNING: {note}" for note in survey.notes),
    ]


def progress_text(survey: Survey) -> str:
    """How many shards are done, and how many are not; those to check are kept where their bytes agree."""
    text = f"{len(survey.done)} done, {len(survey.missing) + len(survey.to_check)} to go"
    return f"{text}, {len(survey.to_check)} of them to check" if survey.to_check else text


def _size_text(plan: CachePlan, num_bytes: float) -> str:
    """Bytes of a plan's rows, which nobody knows exactly before encoded ones are made."""
    return f"{'about ' if plan.rows_vary and num_bytes else ''}{format_bytes(round(num_bytes))}"


def _stored(plan: CachePlan) -> str:
    """What a row is."""
    spec = plan.spec
    size = f"{spec.image_size} px ({spec.resize_mode}, {spec.interpolation})"
    if plan.encoding is not None:
        return f"{plan.dtype} ({plan.encoding.describe()}), to be read as {size}"
    return f"{size}, {plan.dtype}" + ("" if plan.mask_dtype is None else f" and {plan.mask_dtype} masks")


def dtype_line(plan: CachePlan, encoding: RowEncoding, speed: DecodeSpeed | None) -> str:
    """What the images of a plan would take as each cache_dtype, for the user to choose; encoding: of jpeg."""
    sizes = {name: format_bytes(plan.num_rows * row_bytes_of(plan.image_shape, name)) for name in DTYPES}
    jpeg = ""
    if speed is not None and speed.jpeg_bytes is not None:
        jpeg = (
            f"jpeg about {format_bytes(plan.num_rows * speed.jpeg_bytes)} ({speed.jpeg_bytes:,.0f} bytes an image, "
            f"measured; {encoding.describe()}), "
        )
    return (
        f"the same images by cache_dtype: {jpeg}uint8 {sizes['uint8']}, float16 and bfloat16 {sizes['float16']}, "
        f"float32 {sizes['float32']}"
    )


def room_lines(data: DataConfig, num_bytes: int) -> list[str]:
    """The room there is for so many bytes, and what is used to make them."""
    free, workers = free_bytes(data.cache_path), data.workers
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    lines = [f"free space: {format_bytes(free)} (a quota may be less); up to {workers} decode workers; {versions}"]
    if num_bytes > free:
        lines.append(f"WARNING: {format_bytes(num_bytes)} are to be written, {format_bytes(free)} are free.")
    if is_network_file_system(data.cache_path):
        lines.append(
            "note: the cache is on a network file system; for training, stage_dir copies it to the node's own disk."
        )
    return lines


def measure_decoding(
    source: Source, spec: PreprocessSpec, dtype: str, encoding: RowEncoding, num_images: int = 64
) -> DecodeSpeed | None:
    """Take images from the middle of a source through all that a worker does, into memory; nothing touches a disk.

    Args:
        source: of the images.
        spec: how they become pixels.
        dtype: what is stored; "jpeg": rows of a compressed cache.
        encoding: of such rows; they are measured whatever is stored.
        num_images: to take.
    Returns:
        None where not one of them could be decoded.
    """
    keep_freed_memory()  # as the workers do
    images = _sample(source, num_images)
    count = len(images)
    its_encoding = encoding if is_encoded(dtype) else None
    needs_torch = needs_resampler(spec, images[:_FIRST], its_encoding)
    if needs_torch:
        load_resampler().set_num_threads(1)  # as many as a worker has
    # the first few pay for what is imported and allocated once
    parts = [images[:_FIRST], *([images[_FIRST:]] if count > _FIRST else [])]
    row_bytes = row_bytes_of((3, spec.image_size, spec.image_size), dtype)
    memory = memoryview(bytearray(max(map(len, parts)) * row_bytes))
    units = [Unit(0, part, spec, dtype, encoding=its_encoding) for part in parts]
    results = [make_rows(unit, memory[: len(unit.images) * row_bytes]) for unit in units]
    num_decoded = len(parts[-1]) - len(results[-1].failures)
    if not num_decoded:
        return None
    return DecodeSpeed(
        num_images=num_decoded,
        seconds=max(results[-1].seconds / num_decoded, 1e-9),
        encoded_bytes=sum(map(len, images)) / count,
        pixels=max(_num_pixels(data, units[0].decode_spec) for data in images[:_FIRST]),
        needs_torch=needs_torch,
        jpeg_bytes=_jpeg_bytes(units[-1], results[-1], encoding),
        other=_decode_otherwise(units[-1], results[-1], memory[: len(parts[-1]) * row_bytes]),
    )


def _jpeg_bytes(unit: Unit, result: UnitResult, encoding: RowEncoding) -> float | None:
    """DecodeSpeed.jpeg_bytes, for a unit with its result; None: no encoder is there, or no image can be decoded."""
    if result.row_sizes is None:
        try:
            images = unit.images[: _affordable(unit, result)]
            result = encode_unit(replace(unit, images=images, encoding=encoding), memoryview(bytearray()))
        except UserError:
            return None
    sizes = result.row_sizes[result.row_sizes > 0]
    return float(sizes.mean()) if len(sizes) else None


def sampled_row_bytes(source: Source, plan: CachePlan, num_images: int = 16) -> float:
    """Bytes of an encoded row, on average, of a few images from the middle of the source."""
    images = _sample(source, num_images)
    if plan.encoding.stored_size == "original":
        return sum(map(len, images)) / len(images)
    result = encode_unit(Unit(0, images, plan.spec, plan.dtype, encoding=plan.encoding), memoryview(bytearray()))
    sizes = result.row_sizes[result.row_sizes > 0]
    return float(sizes.mean()) if len(sizes) else plan.row_bytes


def _sample(source: Source, num_images: int) -> list[bytes]:
    """Encoded images from the middle of a source."""
    count = min(num_images, len(source))
    start = (len(source) - count) // 2
    return source.read(start, start + count)


def _affordable(unit: Unit, result: UnitResult) -> int:
    """So many of a unit's images as were made in _ASIDE_S."""
    return max(1, int(len(unit.images) * min(1.0, _ASIDE_S / max(result.seconds, 1e-9))))


def _decode_otherwise(unit: Unit, result: UnitResult, memory: memoryview) -> tuple[str, float, float] | None:
    """DecodeSpeed.other, for a unit that was decoded into `memory`; that is written again."""
    sizes = result.source_sizes.tolist()  # zeros where an image could not be decoded
    scaled = replace(unit.decode_spec, jpeg_decode="scaled")
    starts = [bytes(data[: len(JPEG_START)]) for data in unit.images]
    if not any(start == JPEG_START and scaled.jpeg_scale(*size) > 1 for start, size in zip(starts, sizes, strict=True)):
        return None
    other = "exact" if unit.spec.jpeg_decode == "scaled" else "scaled"
    # as many as the other way, where it is the slower one, may take _ASIDE_S for
    count = _affordable(unit, result)
    part = replace(unit, images=unit.images[:count], spec=replace(unit.spec, jpeg_decode=other))
    again, decoded = make_rows(part, memory[: len(memory) // len(unit.images) * count]), sizes[:count]
    num_decoded = sum(1 for height, _ in decoded if height)
    if not num_decoded:
        return None
    return other, again.seconds / num_decoded, float(np.median([height * width for height, width in sizes if height]))


def _num_pixels(data: bytes, spec: PreprocessSpec) -> int:
    try:
        height, width, _ = decode_image(data, spec).shape
    except DecodeError:
        return 0
    return height * width


def plan_lines(
    to_make: Sequence[tuple[CachePlan, Sequence[int]]], folder: Path, num_workers: int, speed: DecodeSpeed | None
) -> list[str]:
    """Files, memory and hours of a job.

    Args:
        to_make: for each cache its plan and the shards that are missing of this job's.
        folder: cache_dir, which may not be there yet.
        num_workers: decode workers.
        speed: what measure_decoding found; None: nothing, and the files alone are counted.
    """
    num_shards, free = sum(len(shards) for _, shards in to_make), free_inodes(folder)
    num_files = 2 * num_shards + 2 * len(to_make)
    lines = [
        f"files: {num_files:,} ({num_shards:,} shards, a record each, index and failures)"
        + ("" if free is None else f"; {free:,} are free")
    ]
    if free is not None and num_files > free:
        lines.append(
            f"WARNING: {num_files:,} files are to be made, the file system has room for {free:,}: "
            "raise cache_shard_size"
        )
    if speed is None:
        return lines
    each = _WORKER_BYTES[speed.needs_torch] + _COPIES_OF_PIXELS * 3 * speed.pixels
    units = max((memory_bytes(num_workers, plan.image_bytes) for plan, _ in to_make), default=0)
    masks = max((_mask_bytes(plan) for plan, _ in to_make), default=0)
    shared = units + masks + _SERVER_BYTES[speed.needs_torch]
    if num_workers == 1:
        lines.append(f"memory: about {format_bytes(each + shared)}: one worker decodes in this process")
    else:
        lines.append(
            f"memory: about {format_bytes(num_workers * each + shared)} beside this process: {num_workers} "
            f"decode workers of {format_bytes(each)}, and {format_bytes(shared)} that they share"
        )
    rate = num_workers / speed.seconds
    by_all = f", {rate:,.0f} by {num_workers}" if num_workers > 1 else ""
    lines.append(
        f"speed: {speed.num_images} images took {1000 * speed.seconds:.3g} ms each here: {1 / speed.seconds:,.0f} "
        f"images/s by one worker{by_all}"
    )
    lines += _other_decode_lines(speed)
    rows = [_num_rows(plan, shards) for plan, shards in to_make]
    if num_images := sum(rows):
        seconds = num_images / rate
        num_bytes = sum(count * row_bytes_of_plan(plan, speed) for count, (plan, _) in zip(rows, to_make, strict=True))
        lines.append(
            f"time: about {format_duration(seconds)} for the {num_images:,} images of this job, if the source "
            f"gives {format_bytes(speed.encoded_bytes * rate)}/s and the cache's disk takes "
            f"{format_bytes(num_bytes / seconds)}/s; a slower one of the two decides"
        )
    return lines


def _mask_bytes(plan: CachePlan) -> int:
    """What the masks of the shards in the making take."""
    if plan.mask_dtype is None:
        return 0
    return (plan.row_bytes - plan.image_bytes) * min(plan.num_rows, (PUBLISH_AHEAD + 1) * plan.shard_size)


def _other_decode_lines(speed: DecodeSpeed) -> list[str]:
    """What the other value of jpeg_decode would cost or gain, where it is worth a line."""
    if speed.other is None:
        return []
    name, seconds, pixels = speed.other
    if name == "scaled" and seconds > (1 - _GAIN_WORTH_A_LINE) * speed.seconds:
        return []
    return [
        f"jpeg_decode: {name} would take {1000 * seconds:.3g} ms an image instead of {1000 * speed.seconds:.3g} "
        f"(the median image has {pixels / 1e6:.2g} megapixels)"
    ]


def _num_rows(plan: CachePlan, shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in map(plan.rows_of, shards))


def remote_lines(title: str, split: HubSplit, limit: int | None, dtype: str, data: DataConfig) -> list[str]:
    """Describe a data set that is not downloaded yet; limit: the most rows to take, None for all; dtype: to store."""
    lines = [f"{title}: {split.describe()}"]
    if split.num_rows is None:
        lines.append("  how many images there are is not known before the download")
    else:
        rows = min(limit or split.num_rows, split.num_rows)
        row_bytes, about = row_bytes_of((3, data.image_size, data.image_size), dtype), ""
        if is_encoded(dtype):
            row_bytes, about = jpeg_encoding(data).typical_bytes(data.image_size), "about "
        num_shards = -(-rows // data.cache_shard_size)
        lines.append(
            f"  {rows:,} of {split.num_rows:,} images: {num_shards:,} shards of {data.cache_shard_size:,}, "
            f"{about}{format_bytes(rows * row_bytes)} to write, {2 * num_shards + 2:,} files"
        )
    lines.append("  nothing was downloaded or decoded for this plan: after --download_only it tells the hours too")
    return lines
