"""The report of a cache: sample images, their statistics, the failures and the source.

The page may be written anywhere but into the cache folder: a finished cache holds only files that its index lists.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distillery.cache.images import FAILURES_NAME, IMAGE_SHARDS, INDEX_NAME, decode_sizes, valid_rows
from distillery.cache.store import record_path
from distillery.report.render import render
from distillery.report.style import COLOUR, RC, new_figure, short_count, to_svg
from distillery.system.errors import UserError
from distillery.system.files import read_regular, write_atomic
from distillery.training.log import METRICS_NAME

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distillery.cache.index import CacheIndex

CACHE_REPORT_NAME = "cache_report.html"
# images on the contact sheet, and those that the statistics are taken of
CONTACTS, SAMPLED = 60, 1024
CONTACT_PX, BATCH_SIZE = 96, 64
SHOWN_FAILURES, SHOWN_SHARDS = 100, 60
# standard deviation of an image's pixels, 0..1: one colour, as placeholders for missing pictures are
BLANK_STD = 0.01
# shards whose records are read
SIZED_SHARDS = 256


def is_cache(folder: Path) -> bool:
    """Whether a folder holds a cache, of any layout, and no run."""
    has_index = (folder / INDEX_NAME).exists() or any(folder.glob("index_shard_*.json"))
    return has_index and not (folder / METRICS_NAME).exists()


def write_cache_report(cache_dir: Path, out: Path) -> Path:
    """Write the page of a cache.

    Raises:
        UserError: `out` lies in the cache folder; the cache is damaged.
    """
    from distillery.cache.folder import load_index

    out = out.resolve()
    if cache_dir.resolve() in out.parents:
        raise UserError(
            f"{out} lies in the cache folder, where every file is declared by the index. Give another place: "
            f"python -m distillery.report {cache_dir} --out {cache_dir.resolve().parent / CACHE_REPORT_NAME}"
        )
    index = load_index(cache_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, build_cache_page(index).encode())
    return out


def build_cache_page(index: CacheIndex) -> str:
    """The whole HTML page."""
    rows, pixels, jpegs = sample(index)
    failures = read_failures(index.directory)
    usual_bytes, row_bytes = float(np.median(index.shard_bytes)), index.row_bytes
    # of encoded rows hardly two shards have the same number of bytes
    is_unusual = 2 * (index.shard_failed > 0) + (not index.is_encoded) * (index.shard_bytes != usual_bytes)
    if index.is_encoded:
        row_bytes = round(index.shard_bytes.sum() / index.shard_rows.sum())
    _, height, width = index.image_shape
    return render(
        "cache.html",
        title=f"Cache {index.directory.name}",
        index=index,
        height=height,
        width=width,
        contacts=dict(zip(rows, jpegs, strict=True)),
        sizes=sizes_before(index),
        statistics=statistics_of(index, pixels) if pixels else None,
        failures=failures,
        reasons=Counter(entry.get("reason", "?") for entry in failures).most_common(20),
        shown_failures=SHOWN_FAILURES,
        shown_shards=sorted(np.argsort(-is_unusual, kind="stable")[:SHOWN_SHARDS].tolist()),
        usual_bytes=usual_bytes,
        row_bytes=row_bytes,
        origin=origin_of(index),
    )


def sample(index: CacheIndex) -> tuple[list[int], dict[str, np.ndarray], list[str]]:
    """Rows spread evenly over a cache.

    Returns:
        global_idx of those on the contact sheet; mean, std (float [N, 3] per image and channel, of pixels in 0..1) and
        histogram (int [3, 64], of all of them); the contact sheet's images, JPEG in base64. All three are empty where
        no image could be decoded.
    """
    from distillery.reading.rows import CachedRows

    if index.num_valid == 0:
        return [], {}, []
    reader = CachedRows(index)
    valid = index.shard_rows - index.shard_failed
    ends = np.cumsum(valid)
    chosen = np.unique(np.arange(min(SAMPLED, index.num_valid)) * index.num_valid // min(SAMPLED, index.num_valid))
    shown = set((np.arange(min(CONTACTS, len(chosen))) * len(chosen) // min(CONTACTS, len(chosen))).tolist())
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (index.mean, index.std))
    numbers, contacts, moments, histogram = [], [], [], np.zeros((3, 64), np.int64)
    for start in range(0, len(chosen), BATCH_SIZE):
        rows = chosen[start : start + BATCH_SIZE]
        shards = np.searchsorted(ends, rows, side="right")
        out = np.empty((len(rows), *index.image_shape), np.float32)
        global_idx = np.empty(len(rows), np.int64)
        reader.fill(shards, rows - (ends - valid)[shards], out.reshape(len(rows), -1).view(np.uint8), global_idx)
        pixels = np.clip(out * std + mean, 0, 1)
        moments.append(np.stack([pixels.mean(axis=(2, 3)), pixels.std(axis=(2, 3))]))
        for channel in range(3):
            histogram[channel] += np.histogram(pixels[:, channel], bins=64, range=(0, 1))[0]
        for row in range(len(rows)):
            if start + row in shown:
                numbers.append(int(global_idx[row]))
                contacts.append(_thumbnail(pixels[row]))
    means, stds = np.concatenate(moments, axis=1)
    return numbers, {"mean": means, "std": stds, "histogram": histogram}, contacts


def _thumbnail(pixels: np.ndarray) -> str:
    """An image, float [3, H, W] in 0..1, at the contact sheet's size: JPEG in base64."""
    from PIL import Image

    image = Image.fromarray((255 * pixels).round().astype(np.uint8).transpose(1, 2, 0))
    small = max(image.size) < CONTACT_PX
    scale = CONTACT_PX / max(image.size)
    size = tuple(max(1, round(extent * scale)) for extent in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()


def read_failures(directory: Path) -> list[dict[str, Any]]:
    """The lines of failures.jsonl; [] where nothing failed."""
    try:
        lines = read_regular(directory / FAILURES_NAME).splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def statistics_of(index: CacheIndex, pixels: dict[str, np.ndarray]) -> dict[str, Any]:
    """Mean and deviation of each channel, beside those of the normalisation, and two pictures; pixels: of `sample`."""
    means, stds = pixels["mean"], pixels["std"]
    overall = means.mean(axis=0)
    deviation = np.sqrt((stds**2 + means**2).mean(axis=0) - overall**2)
    return {
        "count": len(means),
        "channels": list(zip(("red", "green", "blue"), overall, deviation, index.mean, index.std, strict=True)),
        "num_blank": int((stds.max(axis=1) < BLANK_STD).sum()),
        "values_svg": to_svg(draw_values(pixels["histogram"])),
        "brightness_svg": to_svg(draw_brightness(means.mean(axis=1))),
    }


def draw_values(histogram: np.ndarray) -> Figure:
    """How often each pixel value occurs, a line for each channel; histogram: int [3, bins]."""
    import matplotlib
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context(RC):
        figure, axes = new_figure("Pixel values")
        edges = np.linspace(0, 255, histogram.shape[1] + 1)
        for counts, colour, name in zip(
            histogram, (COLOUR.fifth, COLOUR.fourth, COLOUR.student), ("red", "green", "blue"), strict=True
        ):
            axes.stairs(counts / max(1, counts.sum()), edges, color=colour, label=name, linewidth=1.4)
        axes.set_xlim(0, 255)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
        axes.set_xlabel("value, 0..255")
        axes.legend(loc="upper center", ncols=3, borderaxespad=0.2)
    return figure


def draw_brightness(brightness: np.ndarray) -> Figure:
    """How many images are how bright; brightness: float [N], 0..1."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context(RC):
        figure, axes = new_figure("Brightness of the images")
        counts, edges = np.histogram(255 * brightness, bins=32, range=(0, 255))
        axes.stairs(counts, edges, fill=True, color=COLOUR.untrained)
        axes.set_xlim(0, 255)
        axes.set_xlabel("mean value, 0..255")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    return figure


def origin_of(index: CacheIndex) -> dict[str, Any]:
    """What the bytes depend on and what made them: name -> value."""
    try:
        libraries = IMAGE_SHARDS.read_record(record_path(index.shard_path(0)))["libraries"]
    except (OSError, UserError, KeyError):
        libraries = {}
    folders = sorted(path.parent for path in index.directory.glob(f"eval/*/*/{INDEX_NAME}"))
    return {
        "fingerprint": index.fingerprint or "-",
        "format_version": index.format_version,
        "dtype": index.dtype,
        "image_shape": list(index.image_shape),
        "labels": index.labels,
        **{f"source.{key}": json.dumps(value) for key, value in index.source.items()},
        **{f"preprocess.{key}": json.dumps(value) for key, value in index.preprocess.items()},
        **{f"made with {key}": value for key, value in libraries.items()},
        **{f"evaluation set {path.parent.name}/{path.name}": f"python -m distillery.report {path}" for path in folders},
    }


def source_sizes(index: CacheIndex) -> np.ndarray:
    """int64 [N, 2]: height and width in px that images had; of at most SIZED_SHARDS shards, spread evenly."""
    count = min(SIZED_SHARDS, len(index.shard_names))
    found = [np.zeros((0, 2), np.int64)]
    for shard in np.arange(count) * len(index.shard_names) // max(1, count):
        try:
            record = IMAGE_SHARDS.read_record(record_path(index.shard_path(shard)))
        except (OSError, UserError):  # lost or damaged, for verify to tell
            continue
        if "source_sizes" in record:
            found.append(decode_sizes(record["source_sizes"])[valid_rows(record)].astype(np.int64))
    return np.concatenate(found)


def sizes_before(index: CacheIndex) -> dict[str, Any]:
    """The sizes that the images had before they were brought to one; {} where they are not recorded."""
    sizes, stored = source_sizes(index), index.image_shape[1]
    if not len(sizes):
        return {}
    shorter = np.sort(sizes.min(axis=1))
    return {
        "count": len(sizes),
        "commonest": [(size, n / len(sizes)) for size, n in Counter(map(tuple, sizes.tolist())).most_common(5)],
        "smallest": shorter[0],
        "median": shorter[len(shorter) // 2],
        "largest": shorter[-1],
        "enlarged": (shorter < stored).mean(),
        "svg": to_svg(draw_sizes(sizes, stored)),
    }


def draw_sizes(sizes: np.ndarray, stored: int) -> Figure:
    """How many images had how long sides; sizes: int [N, 2]; stored: px, the side they have now."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    with matplotlib.rc_context(RC):
        figure, axes = new_figure("Sides of the images in the source")
        # a little room on both sides, also where all have one size
        edges = np.geomspace(0.8 * max(1, min(sizes.min(), stored)), 1.25 * max(sizes.max(), stored), 41)
        for side, colour, name in (
            (sizes.min(axis=1), COLOUR.student, "shorter"),
            (sizes.max(axis=1), COLOUR.fourth, "longer"),
        ):
            axes.stairs(np.histogram(side, bins=edges)[0], edges, color=colour, label=name, linewidth=1.4)
        axes.axvline(stored, color=COLOUR.untrained, linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(FuncFormatter(lambda _value, _: ""))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("px, logarithmic")
        axes.legend(loc="upper right", borderaxespad=0.2)
    return figure
