"""The figures of a run: losses, rates, quality, shards seen, and the time of each part of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from distillery.losses.registry import EXPLAINED
from distillery.report.style import (
    COLOUR,
    RC,
    Rows,
    add_legend,
    datasets_of,
    draw_line,
    is_number,
    mark_resumes,
    new_figure,
    of_kind,
    series,
    short_count,
    thin,
    use_log_axis,
)
from distillery.training.log import unpack_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# cells of the coverage map: more would be narrower than a pixel
MAX_MAP_EPOCHS, MAX_MAP_SHARDS = 120, 240
# field of the train rows, name, colour; from the bottom up
TIME_SHARES = (
    ("student_fraction", "student", COLOUR.student),
    ("teacher_fraction", "teacher", COLOUR.teacher),
    ("optimizer_fraction", "optimiser", COLOUR.fourth),
    ("data_wait_fraction", "data", COLOUR.fifth),
)
TIME_UNITS = ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
# the first steps may explain less than nothing: an axis down to there would show little of the rest
LEAST_SHOWN = -0.5
TERM_COLOURS = (COLOUR.third, COLOUR.fourth, COLOUR.fifth, COLOUR.teacher, COLOUR.untrained)
MODEL_COLOURS = {
    "student": COLOUR.student,
    "student_ema": COLOUR.third,
    "teacher": COLOUR.teacher,
    "untrained": COLOUR.untrained,
}
# field of the eval rows -> (file stem, title)
QUALITIES = {
    "knn_top1": ("knn", "k-NN accuracy"),
    "knn_top1_in_teacher_bank": ("knn_in_teacher_bank", "k-NN in the teacher's bank"),
    "linear_top1": ("linear", "Linear probe accuracy"),
    "miou": ("miou", "mIoU"),
    "knn_miou": ("knn_miou", "k-NN mIoU"),
    "effective_rank": ("effective_rank", "Effective rank"),
}


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
    pale_to_full = [(*to_rgb(COLOUR.student), alpha) for alpha in (0.07, 1.0)]
    colours = LinearSegmentedColormap.from_list("share", pale_to_full)
    num_epochs = sum(1 for row in of_kind(rows, "epoch") if row.get("shards"))
    # interpolation none: the cells go into the SVG as they are, and a browser scales them without blur
    upper.imshow(
        cells, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="none", extent=(0, len(times), num_epochs, 0)
    )
    upper.grid(False)
    if num_epochs <= 40:
        upper.hlines(range(1, num_epochs), 0, len(times), color=COLOUR.grid, linewidth=0.8)
    if len(times) <= 60:
        upper.vlines(range(1, len(times)), 0, num_epochs, color=COLOUR.grid, linewidth=0.8)
    upper.set_ylabel("epoch")
    bars = [part.mean() for part in np.array_split(times, cells.shape[1])]
    lower.stairs(bars, np.linspace(0, len(times), len(bars) + 1), fill=True, color=COLOUR.student, alpha=0.8)
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
    axes.stackplot(x, *shares, labels=[*labels, "other"], colors=[*colours, COLOUR.untrained], alpha=0.85, linewidth=0)
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
        axes.plot(x, y, color=COLOUR.student, marker="o" if len(part) == 1 else None, markersize=3)
    for start in starts:
        resume, before = timed[start], timed[max(0, start - 1)]
        stopped = resume["stopped"] if is_number(resume.get("stopped")) else before["time"]
        pause = [(moment - began) / seconds for moment in (stopped, resume["time"])]
        axes.axvspan(*pause, color=COLOUR.teacher, alpha=0.22, linewidth=0)
        axes.axvline(pause[1], color=COLOUR.teacher, linewidth=0.9)
    axes.set_ylabel("step")
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.set_xlabel(f"{unit} since the start")
    axes.set_xlim(0, max(span / seconds, math.ulp(1.0)))
    return figure


def draw_loss(rows: Rows) -> Figure | None:
    """The loss and its terms; on a logarithmic axis once it has fallen to a fifth."""
    train = of_kind(rows, "train")
    colours = _term_colours(train)
    terms = [f"loss/{name}" for name in colours]
    if not len(series(train, "loss")[0]):
        return None
    figure, axes = new_figure("Loss")
    # a single term is the loss itself, times its weight
    for name, colour in colours.items() if len(terms) > 1 else ():
        draw_line(axes, *series(train, f"loss/{name}"), colour, name)
    # in a hybrid run some terms may be of the steps alone that run the teacher: sums of all terms, or of all there are
    whole = [row for row in train if all(name in row for name in terms)] or train
    draw_line(axes, *series(whole, "loss"), COLOUR.student, "weighted sum" if len(terms) > 1 else None)
    # of the curves as drawn: one lucky batch in a thousand must not stretch the axis
    curves = [series(whole, "loss"), *(series(train, name) for name in terms)]
    values = np.concatenate([thin(*curve)[1] for curve in curves])
    if values.min() > 0 and values.max() / values.min() > 5:
        use_log_axis(axes, values)
    else:
        axes.set_ylim(bottom=min(0.0, values.min()))
    mark_resumes(axes, rows)
    if len(terms) > 1:
        add_legend(axes)
    return figure


def _term_colours(train: Rows) -> dict[str, str]:
    """Name of a loss -> its colour, the same in every figure."""
    names = sorted({name.removeprefix("loss/") for row in train for name in row if name.startswith("loss/")})
    return {name: TERM_COLOURS[number % len(TERM_COLOURS)] for number, name in enumerate(names)}


def draw_explained(rows: Rows) -> Figure | None:
    """The share of the variance of each loss's targets that the student explains; what is far below 0 is cut off."""
    from matplotlib.ticker import PercentFormatter

    train = of_kind(rows, "train")
    colours = _term_colours(train)
    curves = {name: series(train, f"{EXPLAINED}{name}") for name in colours}
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    if not curves:
        return None
    figure, axes = new_figure("Explained variance of the targets")
    for name, curve in curves.items():
        draw_line(axes, *curve, colours[name], name)
    lowest = min(thin(*curve)[1].min() for curve in curves.values())
    axes.set_ylim(max(LEAST_SHOWN, min(0.0, lowest)), 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    mark_resumes(axes, rows)
    add_legend(axes)
    return figure


def draw_single(rows: Rows, name: str, title: str, *, may_be_log: bool = False) -> Figure | None:
    """One field of the train rows; may_be_log: logarithmic where it spans more than a decade."""
    from matplotlib.ticker import FuncFormatter

    x, y = series(of_kind(rows, "train"), name)
    if not len(x):
        return None
    figure, axes = new_figure(title)
    draw_line(axes, x, y, COLOUR.student)
    means = thin(x, y)[1]
    if may_be_log and means.min() > 0 and means.max() / means.min() > 10:
        use_log_axis(axes, means)
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    mark_resumes(axes, rows)
    return figure


def draw_throughput(rows: Rows) -> Figure | None:
    """Images a second, and below it the share of the time spent waiting for data."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    train = of_kind(rows, "train")
    if not len(series(train, "images_per_second")[0]):
        return None
    figure, (upper, lower) = new_figure("Images per second", rows=2)
    draw_line(upper, *series(train, "images_per_second"), COLOUR.student)
    upper.set_ylim(bottom=0)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    x, waiting = series(train, "data_wait_fraction")
    if len(x):
        draw_line(lower, x, waiting, COLOUR.teacher)
    lower.set_ylim(0, max(0.1, 1.15 * waiting.max(initial=0)))
    lower.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    lower.set_title("Share of the time waiting for data")
    for axes in (upper, lower):
        mark_resumes(axes, rows)
    return figure


def draw_quality(rows: Rows, dataset: str, name: str, title: str) -> Figure | None:
    """One measure of the student over the steps, its teacher's and its untrained self's as level lines."""
    from matplotlib.ticker import FuncFormatter, PercentFormatter

    found = [row for row in of_kind(rows, "eval") if row.get("dataset") == dataset]
    by_model = {model: series([row for row in found if row.get("model") == model], name) for model in MODEL_COLOURS}
    if not len(by_model["student"][0]):
        return None
    figure, axes = new_figure(f"{title}: {dataset}")
    for model in ("teacher", "untrained"):
        values = by_model[model][1]
        if len(values):
            axes.axhline(values[-1], color=MODEL_COLOURS[model], linewidth=1.4, linestyle=(0, (5, 3)), label=model)
    for model in ("student", "student_ema"):
        x, y = by_model[model]
        if not len(x):
            continue
        untrained = by_model["untrained"][1]
        if model == "student" and len(untrained) and x[0] > 0:
            x, y = np.concatenate(([0.0], x)), np.concatenate((untrained[:1], y))
        label = model.replace("_ema", " (EMA)")
        axes.plot(x, y, color=MODEL_COLOURS[model], marker="o", markersize=3.5, label=label, zorder=3)
    is_share = name != "effective_rank"
    formatter = PercentFormatter(1.0) if is_share else FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(formatter)
    if not is_share:
        axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    add_legend(axes)
    return figure


def draw_all(rows: Rows, num_shards: int | None = None, shard_rows: Sequence[int] | None = None) -> dict[str, Figure]:
    """File stem -> picture, in the order of the report; pictures without data are left out."""
    import matplotlib

    with matplotlib.rc_context(RC):
        drawn = {
            f"{stem}_{dataset}": draw_quality(rows, dataset, name, title)
            for dataset in datasets_of(rows)
            for name, (stem, title) in QUALITIES.items()
        }
        drawn |= {
            "loss": draw_loss(rows),
            "explained": draw_explained(rows),
            "learning_rate": draw_single(rows, "lr", "Learning rate"),
            "grad_norm": draw_single(rows, "grad_norm", "Gradient norm, before clipping", may_be_log=True),
            "throughput": draw_throughput(rows),
            "time_shares": draw_time_shares(rows),
            "shards": draw_coverage(rows, num_shards, shard_rows),
            "timeline": draw_timeline(rows),
        }
    return {stem: figure for stem, figure in drawn.items() if figure is not None}
