"""A cache in pictures and plain words: what its images look like, their statistics, what failed, what it was made of.

The page goes anywhere but into the cache folder: a finished cache holds nothing that its index does not declare.
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
from distillery.report.html import details, escape, figure, page, table, tiles
from distillery.report.style import FIFTH, FOURTH, RC, STUDENT, UNTRAINED, new_figure, short_count, to_svg
from distillery.system.console import format_bytes
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
            f"python -m distillery.report {cache_dir} --out {CACHE_REPORT_NAME}"
        )
    index = load_index(cache_dir)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, build_cache_page(index).encode())
    return out


def build_cache_page(index: CacheIndex) -> str:
    """The whole HTML page."""
    rows, pixels, contacts = sample(index)
    failures = read_failures(index.directory)
    parts = [
        _state_html(index),
        _tiles_html(index),
        f"<h2>Images</h2>\n<p>{len(rows):,} rows spread evenly, as the models get them, normalisation taken back; the "
        "number is the place in the source (global_idx).</p>",
        '<div class="card contacts">' + "".join(contacts) + "</div>",
        sizes_html(index),
        _statistics_html(index, pixels),
        _failures_html(index, failures),
        _shards_html(index),
        _facts_html(index),
    ]
    foot = f"Cache <code>{escape(index.directory)}</code>. Made by <code>python -m distillery.report</code>."
    return page(f"Cache {index.directory.name}", parts, foot)


def sample(index: CacheIndex) -> tuple[list[int], dict[str, np.ndarray], list[str]]:
    """Rows spread evenly over a cache.

    Returns:
        global_idx of those on the contact sheet; mean, std (float [N, 3] per image and channel, of pixels in 0..1) and
        histogram (int [3, 64], of all of them); the contact sheet's cells as HTML.
    """
    from distillery.reading.rows import CachedRows

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
                contacts.append(_contact_html(pixels[row], numbers[-1]))
    means, stds = np.concatenate(moments, axis=1)
    return numbers, {"mean": means, "std": stds, "histogram": histogram}, contacts


def _contact_html(pixels: np.ndarray, global_idx: int) -> str:
    """One image of the contact sheet; pixels: float [3, H, W], 0..1."""
    from PIL import Image

    image = Image.fromarray((255 * pixels).round().astype(np.uint8).transpose(1, 2, 0))
    small = max(image.size) < CONTACT_PX
    scale = CONTACT_PX / max(image.size)
    size = tuple(max(1, round(extent * scale)) for extent in image.size)
    image = image.resize(size, Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<div><img src="data:image/jpeg;base64,{data}" alt="image {global_idx}">{global_idx:,}</div>'


def read_failures(directory: Path) -> list[dict[str, Any]]:
    """The lines of failures.jsonl; [] where nothing failed."""
    try:
        lines = read_regular(directory / FAILURES_NAME).splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def _state_html(index: CacheIndex) -> str:
    if not index.verified:
        dot, word = "stopped", "Without checksums: a cache of the predecessor, which cannot be verified"
    elif index.complete:
        dot, word = "done", "Complete"
    else:
        dot, word = "going", f"Incomplete: {index.num_samples:,} of {index.source_num_samples:,} rows"
    return f'<p class="state"><span class="dot {dot}"></span><b>{word}</b></p>'


def _tiles_html(index: CacheIndex) -> str:
    _, height, width = index.image_shape
    failed = int(index.shard_failed.sum())
    share = f"{failed / max(1, index.num_samples):.2%} of the rows" if failed else "every image could be decoded"
    return tiles(
        [
            ("images", f"{index.num_valid:,}", f"of {index.source_num_samples:,} in the source", ""),
            ("size", f"{height} px" if height == width else f"{height} x {width} px", index.dtype, ""),
            ("on disk", format_bytes(int(index.shard_bytes.sum())), f"{index.row_bytes:,} bytes an image", ""),
            ("shards", f"{len(index.shard_names):,}", f"of {index.shard_size:,} images", ""),
            ("failed", f"{failed:,}", share, ""),
        ]
    )


def _statistics_html(index: CacheIndex, pixels: dict[str, np.ndarray]) -> str:
    """Mean and deviation of each channel, beside those of the normalisation, and two pictures."""
    means, stds = pixels["mean"], pixels["std"]
    overall = means.mean(axis=0)
    deviation = np.sqrt((stds**2 + means**2).mean(axis=0) - overall**2)
    given = np.array(index.mean), np.array(index.std)
    lines = [
        [
            name,
            f"{overall[c]:.3f}<small>{given[0][c]:.3f}</small>",
            f"{deviation[c]:.3f}<small>{given[1][c]:.3f}</small>",
            f"{(overall[c] - given[0][c]) / given[1][c]:+.2f}",
            f"{deviation[c] / given[1][c]:.2f}",
        ]
        for c, name in enumerate(("red", "green", "blue"))
    ]
    head = ["channel", "mean", "std", "mean after", "std after"]
    num_blank = int((stds.max(axis=1) < BLANK_STD).sum())
    note = f'<p class="warn">{num_blank:,} of these {len(means):,} images are of one colour.</p>' if num_blank else ""
    cards = [
        figure(to_svg(draw_values(pixels["histogram"])), "Over all sampled images; the normalisation is taken back."),
        figure(
            to_svg(draw_brightness(means.mean(axis=1))), "Mean of an image's pixels: black and white ones stand out."
        ),
    ]
    return (
        f"<h2>Statistics of {len(means):,} images</h2>\n<p>Of pixels in 0..1; in small print the values that they are "
        "normalised with. After that, a mean of 0 and a deviation of 1 would be perfect.</p>\n"
        f'<div class="narrow">{table(head, lines)}</div>{note}\n<div class="charts spaced">{"".join(cards)}</div>'
    )


def draw_values(histogram: np.ndarray) -> Figure:
    """How often each pixel value occurs, a line for each channel; histogram: int [3, bins]."""
    import matplotlib
    from matplotlib.ticker import PercentFormatter

    with matplotlib.rc_context(RC):
        figure, axes = new_figure("Pixel values")
        edges = np.linspace(0, 255, histogram.shape[1] + 1)
        for counts, colour, name in zip(histogram, (FIFTH, FOURTH, STUDENT), ("red", "green", "blue"), strict=True):
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
        axes.stairs(counts, edges, fill=True, color=UNTRAINED)
        axes.set_xlim(0, 255)
        axes.set_xlabel("mean value, 0..255")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    return figure


def _failures_html(index: CacheIndex, failures: list[dict[str, Any]]) -> str:
    if not failures:
        return ""
    reasons = Counter(entry.get("reason", "?") for entry in failures)
    by_reason = [[escape(reason), f"{count:,}"] for reason, count in reasons.most_common(20)]
    shown = [
        [f"{entry['global_idx']:,}", f"{entry.get('shard_idx', '-')}", escape(entry.get("reason", "?"))]
        for entry in failures[:SHOWN_FAILURES]
    ]
    more = f"<p>{len(failures) - SHOWN_FAILURES:,} more in {FAILURES_NAME}.</p>" if len(failures) > len(shown) else ""
    return (
        f"<h2>Images that could not be decoded: {len(failures):,}</h2>\n"
        "<p>They keep their numbers, and training never sees them.</p>\n"
        f'<div class="words">{table(["reason", "images"], by_reason)}</div>\n<div class="words">'
        f"{table(['global_idx', 'shard', 'reason'], shown)}</div>{more}"
    )


def _shards_html(index: CacheIndex) -> str:
    """A line for each shard, as far as a page bears it: what is uncommon first."""
    usual = np.median(index.shard_bytes)
    order = np.argsort(-(2 * (index.shard_failed > 0) + (index.shard_bytes != usual)), kind="stable")[:SHOWN_SHARDS]
    lines = [
        [
            f"<code>{escape(index.shard_names[s])}</code>",
            f"{index.shard_starts[s]:,} - {index.shard_starts[s] + index.shard_rows[s] - 1:,}",
            f"{index.shard_rows[s]:,}",
            f"{index.shard_failed[s]:,}",
            format_bytes(int(index.shard_bytes[s])),
        ]
        for s in sorted(order.tolist())
    ]
    left = len(index.shard_names) - len(lines)
    more = f"<p>{left:,} more, of {format_bytes(float(usual))} each as a rule.</p>" if left else ""
    head = ["shard", "rows of the source", "rows", "failed", "bytes"]
    return f"<h2>Shards</h2>\n{table(head, lines)}{more}"


def _facts_html(index: CacheIndex) -> str:
    """What the bytes depend on, what made them, and how to check them."""
    try:
        libraries = IMAGE_SHARDS.read_record(record_path(index.shard_path(0)))["libraries"]
    except (OSError, UserError, KeyError):
        libraries = {}
    folders = sorted(path.parent for path in index.directory.glob(f"eval/*/*/{INDEX_NAME}"))
    facts = {
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
    return (
        "<h2>What it was made of</h2>\n<p>A change of source or preprocessing makes another fingerprint, and stage 1 "
        "refuses the folder; other versions of the libraries are said, not refused. To compare every byte with the "
        "hashes of the records: "
        f"<code>python -m distillery.cache verify {escape(index.directory)}</code></p>\n"
        + details("fingerprint, source, preprocessing", facts).replace("<details ", "<details open ")
    )


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


def sizes_html(index: CacheIndex) -> str:
    """The sizes that the images had before they were brought to one."""
    sizes, stored = source_sizes(index), index.image_shape[1]
    if not len(sizes):
        return "<h2>Sizes before resizing</h2>\n<p>Not recorded: the shards are of an earlier version.</p>"
    commonest = Counter(map(tuple, sizes.tolist())).most_common(5)
    lines = [[f"{width:,} x {height:,} px", f"{count / len(sizes):.1%}"] for (height, width), count in commonest]
    sides = np.sort(sizes.min(axis=1))
    enlarged = (sides < stored).mean()
    note = f'<p class="warn">{enlarged:.1%} had a shorter side below {stored} px: enlarged.</p>' if enlarged else ""
    chart = figure(
        to_svg(draw_sizes(sizes, stored)), f"Line: {stored} px, the stored size. Shorter side: smallest {sides[0]:,}, "
        f"median {sides[len(sides) // 2]:,}, largest {sides[-1]:,} px.",
    )  # fmt: skip
    return (
        f"<h2>Sizes before resizing</h2>\n<p>Of {len(sizes):,} images, width x height, upright.</p>\n"
        f'<div class="charts">{chart}<div>{table(["commonest", "share"], lines)}{note}</div></div>'
    )


def draw_sizes(sizes: np.ndarray, stored: int) -> Figure:
    """How many images had how long sides; sizes: int [N, 2]; stored: px, the side they have now."""
    import matplotlib
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    with matplotlib.rc_context(RC):
        figure, axes = new_figure("Sides of the images in the source")
        # a little room on both sides, also where all have one size
        edges = np.geomspace(0.8 * max(1, min(sizes.min(), stored)), 1.25 * max(sizes.max(), stored), 41)
        for side, colour, name in ((sizes.min(axis=1), STUDENT, "shorter"), (sizes.max(axis=1), FOURTH, "longer")):
            axes.stairs(np.histogram(side, bins=edges)[0], edges, color=colour, label=name, linewidth=1.4)
        axes.axvline(stored, color=UNTRAINED, linewidth=1)
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
