"""How a run went, in pictures: the shards it has read, where a step's time goes, interruptions on the clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distillery.report_axes import (
    FIFTH,
    FOURTH,
    GRID,
    STUDENT,
    TEACHER,
    UNTRAINED,
    Rows,
    add_legend,
    is_number,
    mark_resumes,
    new_figure,
    of_kind,
    series,
    short_count,
    thin,
)
from distillery.training.log import unpack_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# cells of the coverage map: more would be narrower than a pixel
MAX_MAP_EPOCHS, MAX_MAP_SHARDS = 120, 240
# field of the train rows, name, colour; from the bottom up
TIME_SHARES = (
    ("student_fraction", "student", STUDENT),
    ("teacher_fraction", "teacher", TEACHER),
    ("optimizer_fraction", "optimiser", FOURTH),
    ("data_wait_fraction", "data", FIFTH),
)
TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))


def epoch_shares(row: dict[str, Any], shard_rows: Sequence[int] | None) -> tuple[np.ndarray, float]:
    """The shards that an epoch row names, int64 [K], and the share of their images that the epoch reads, 0..1."""
    shards = np.array(unpack_numbers(row.get("shards") or []), dtype=np.int64)
    images = row.get("images")
    if not is_number(images) or not shard_rows or not len(shards) or shards.max() >= len(shard_rows):
        return shards, 1.0
    return shards, min(1.0, images / max(1, np.asarray(shard_rows)[shards].sum()))


def coverage_map(
    rows: Rows, num_shards: int | None = None, shard_rows: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How often each shard was read.

    Args:
        rows: of any kind; those of kind epoch with `shards` count.
        num_shards: of the run, where that is known.
        shard_rows: images in each of them, where that is known; else an epoch reads its shards whole.
    Returns:
        the map, float [epochs, shards], share of a cell's images read, both axes reduced to what a picture shows;
        times each shard was read, float [S].
    """
    epochs = [epoch_shares(row, shard_rows) for row in of_kind(rows, "epoch")]
    epochs = [(shards, share) for shards, share in epochs if len(shards)]
    size = max([num_shards or 0, *(int(shards.max()) + 1 for shards, _ in epochs)])
    times = np.zeros(size)
    height, width = min(len(epochs), MAX_MAP_EPOCHS), min(size, MAX_MAP_SHARDS)
    cells = np.zeros((height, width))
    if not epochs:
        return cells, times
    column = np.arange(size) * width // size
    per_column = np.bincount(column, minlength=width)
    for number, (shards, share) in enumerate(epochs):
        times[shards] += share
        cells[number * height // len(epochs)] += np.bincount(column[shards], minlength=width) * share / per_column
    per_row = np.bincount(np.arange(len(epochs)) * height // len(epochs), minlength=height)
    return cells / per_row[:, None], times


def draw_coverage(rows: Rows, num_shards: int | None = None, shard_rows: Sequence[int] | None = None) -> Figure | None:
    """Above, which shard was read in which epoch; below, how often in all."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    cells, times = coverage_map(rows, num_shards, shard_rows)
    if not cells.size:
        return None
    figure, (upper, lower) = new_figure(f"Shards trained on: {(times > 0).sum():,} of {len(times):,}", rows=2)
    colours = LinearSegmentedColormap.from_list("share", [(*to_rgb(STUDENT), 0.07), (*to_rgb(STUDENT), 1.0)])
    num_epochs = sum(1 for row in of_kind(rows, "epoch") if row.get("shards"))
    # interpolation none: the cells go into the SVG as they are, and a browser scales them without blur
    upper.imshow(
        cells, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none", extent=(0, len(times), num_epochs, 0)
    )
    upper.grid(False)
    if num_epochs <= 40:
        upper.hlines(range(1, num_epochs), 0, len(times), color=GRID, linewidth=0.8)
    if len(times) <= 60:
        upper.vlines(range(1, len(times)), 0, num_epochs, color=GRID, linewidth=0.8)
    upper.set_ylabel("epoch")
    bars = [part.mean() for part in np.array_split(times, cells.shape[1])]
    lower.stairs(bars, np.linspace(0, len(times), len(bars) + 1), fill=True, color=STUDENT, alpha=0.8)
    lower.set_ylim(bottom=0)
    lower.set_xlim(0, len(times))
    lower.set_xlabel("shard")
    lower.set_ylabel("times")
    upper.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    lower.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=bool(times.max() >= 2)))
    lower.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def draw_time_shares(rows: Rows) -> Figure | None:
    """Where a step's time goes: student, teacher, optimiser, waiting for data, and what is left."""
    from matplotlib.ticker import PercentFormatter

    names = [name for name, _, _ in TIME_SHARES]
    train = [row for row in of_kind(rows, "train") if all(is_number(row.get(name)) for name in names)]
    if not train:
        return None
    x, first = thin(*series(train, names[0]))[:2]
    shares = [first, *(thin(*series(train, name))[1] for name in names[1:])]
    shares.append(np.clip(1.0 - sum(shares), 0.0, None))
    if len(x) == 1:  # an area needs two ends
        x, shares = np.array([x[0] - 0.5, x[0] + 0.5]), [np.repeat(share, 2) for share in shares]
    figure, axes = new_figure("Where the time goes")
    labels, colours = [label for _, label, _ in TIME_SHARES], [colour for _, _, colour in TIME_SHARES]
    axes.stackplot(x, *shares, labels=[*labels, "other"], colors=[*colours, UNTRAINED], alpha=0.85, linewidth=0)
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    mark_resumes(axes, rows)
    add_legend(axes, handlelength=0.8, columnspacing=0.7)
    return figure


def draw_timeline(rows: Rows) -> Figure | None:
    """Steps over the time of day, the pauses between an interruption and the resume shaded; None without a resume."""
    from matplotlib.ticker import FuncFormatter

    timed = [row for row in rows if is_number(row.get("time")) and is_number(row.get("step"))]
    starts = [number for number, row in enumerate(timed) if row.get("kind") == "resume"]
    if not starts or len(of_kind(timed, "train")) < 2:
        return None
    began = timed[0]["time"]
    span = max(row["time"] for row in timed) - began
    seconds, unit = next(((s, u) for s, u in TIME_UNITS if span >= 2 * s), TIME_UNITS[-1])
    figure, axes = new_figure("Progress on the clock")
    for start, stop in zip([0, *starts], [*starts, len(timed)], strict=True):
        part = timed[start:stop]
        x = [(row["time"] - began) / seconds for row in part]
        y = [row["step"] for row in part]
        axes.plot(x, y, color=STUDENT, marker="o" if len(part) == 1 else None, markersize=3)
    for start in starts:
        resume, before = timed[start], timed[max(0, start - 1)]
        stopped = resume["stopped"] if is_number(resume.get("stopped")) else before["time"]
        pause = [(moment - began) / seconds for moment in (stopped, resume["time"])]
        axes.axvspan(*pause, color=TEACHER, alpha=0.22, linewidth=0)
        axes.axvline(pause[1], color=TEACHER, linewidth=0.9)
    axes.set_ylabel("step")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel(f"{unit} since the start")
    axes.set_xlim(0, max(span / seconds, math.ulp(1.0)))
    return figure
