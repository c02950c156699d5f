"""The sizes that a cache's images had in the source, for its report."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from distillery.cache.images import decode_sizes, read_record, valid_rows
from distillery.cache.store import record_path
from distillery.report_axes import FOURTH, RC, STUDENT, UNTRAINED, new_figure, short_count, to_svg
from distillery.report_html import figure, table
from distillery.system.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from distillery.cache.index import CacheIndex

# shards whose records are read
SIZED_SHARDS = 256


def source_sizes(index: CacheIndex) -> np.ndarray:
    """int64 [N, 2]: height and width in px that images had; of at most SIZED_SHARDS shards, spread evenly."""
    count = min(SIZED_SHARDS, len(index.shard_names))
    found = [np.zeros((0, 2), np.int64)]
    for shard in np.arange(count) * len(index.shard_names) // max(1, count):
        try:
            record = read_record(record_path(index.shard_path(shard)))
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
