"""The pictures of a run, from the rows of its metrics.jsonl: one function per picture, None where there is nothing yet.

Every colour stands for one thing everywhere: the student is blue, its teacher orange, the untrained student grey. The
colours are those of a light page; report.py turns them into CSS variables, so that they follow a dark one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# hex colour -> name of its CSS variable
COLOURS = {
    "#1b2430": "ink",
    "#5d6877": "muted",
    "#dfe3e8": "grid",
    "#0b6bcb": "student",
    "#b8520a": "teacher",
    "#7c8696": "untrained",
    "#8442b5": "third",
    "#0a7d62": "fourth",
    "#b3265e": "fifth",
}
INK, MUTED, GRID, STUDENT, TEACHER, UNTRAINED, THIRD, FOURTH, FIFTH = COLOURS
TERM_COLOURS = (THIRD, FOURTH, FIFTH, TEACHER)
MODEL_COLOURS = {"student": STUDENT, "student_ema": THIRD, "teacher": TEACHER, "untrained": UNTRAINED}
# a run has thousands of rows, a picture a few hundred columns: more points only make the file larger
MAX_POINTS = 300
SIZE_INCHES = (4.1, 2.65)

RC = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.titlepad": 12,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.major.width": 0.8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: readable by machines, and in the page's own type
}

Rows = list[dict[str, Any]]


def series(rows: Rows, name: str, x: str = "step") -> tuple[np.ndarray, np.ndarray]:
    """The finite values of one field and where they were measured: two float arrays of one length."""
    points = [(row[x], row[name]) for row in rows if is_number(row.get(name)) and is_number(row.get(x))]
    array = np.array(points, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def is_number(value: Any) -> bool:
    """Whether a row's value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def thin(x: np.ndarray, y: np.ndarray, max_points: int = MAX_POINTS) -> tuple[np.ndarray, ...]:
    """At most `max_points` neighbouring means of a long series, with the least and greatest value of each.

    Returns:
        x, mean, min, max: arrays of one length.
    """
    if len(x) <= max_points:
        return x, y, y, y
    parts = [(px.mean(), py.mean(), py.min(), py.max()) for px, py in
             zip(np.array_split(x, max_points), np.array_split(y, max_points), strict=True)]  # fmt: skip
    return tuple(np.array(parts).T)


def draw_line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str | None = None) -> None:
    """A curve; a long one as its mean with its range as a band, a single point as a dot."""
    x, mean, low, high = thin(x, y)
    axes.plot(x, mean, color=colour, label=label, marker="o" if len(x) == 1 else None, markersize=4)
    if (high > low).any():
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def new_figure(title: str, rows: int = 1) -> tuple[Figure, Any]:
    """A figure with one or more axes below each other; it belongs to no window and needs no closing."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].set_title(title)
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes[-1].set_xlabel("step")
    return figure, axes if rows > 1 else axes[0]


def short_count(value: float) -> str:
    """1500 -> '1.5k', 2000000 -> '2M': for axes."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:g}"


def mark_resumes(axes: Axes, rows: Rows) -> None:
    """A thin dotted line where the run was interrupted and went on."""
    for row in of_kind(rows, "resume"):
        axes.axvline(row["step"], color=MUTED, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)


def of_kind(rows: Rows, kind: str) -> Rows:
    """The rows of one kind."""
    return [row for row in rows if row.get("kind") == kind]


def draw_loss(rows: Rows) -> Figure | None:
    """The loss and its terms; on a logarithmic axis once it has fallen to a fifth."""
    train = of_kind(rows, "train")
    terms = sorted({name for row in train for name in row if name.startswith("loss/")})
    if not len(series(train, "loss")[0]):
        return None
    figure, axes = new_figure("Loss")
    # a single term is the loss itself, times its weight
    for number, name in enumerate(terms if len(terms) > 1 else []):
        draw_line(axes, *series(train, name), TERM_COLOURS[number % len(TERM_COLOURS)], name.removeprefix("loss/"))
    draw_line(axes, *series(train, "loss"), STUDENT, "weighted sum" if len(terms) > 1 else None)
    # of the curves as drawn: one lucky batch in a thousand must not stretch the axis
    values = np.concatenate([thin(*series(train, name))[1] for name in ("loss", *terms)])
    if values.min() > 0 and values.max() / values.min() > 5:
        use_log_axis(axes, values)
    else:
        axes.set_ylim(bottom=min(0.0, values.min()))
    mark_resumes(axes, rows)
    if len(terms) > 1:
        add_legend(axes)
    return figure


def use_log_axis(axes: Axes, values: np.ndarray) -> None:
    """A logarithmic y axis around `values`, plain numbers at 1, 2 and 5 of a decade, at 1 when it spans many."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = values.min(), values.max()
    axes.set_yscale("log")
    axes.set_ylim(low / 1.3, high * 1.3)
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high / low < 50 else (1.0,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def add_legend(axes: Axes) -> None:
    """Names of the curves in one line between the title and the picture."""
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=24)
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=5, handlelength=1.9, columnspacing=1.6, borderaxespad=0.4,
        borderpad=0.0,
    )  # fmt: skip


def draw_learning_rate(rows: Rows) -> Figure | None:
    """The learning rate over the steps."""
    return draw_single(rows, "lr", "Learning rate")


def draw_grad_norm(rows: Rows) -> Figure | None:
    """The gradient's norm before clipping, logarithmic where it spans more than a decade."""
    return draw_single(rows, "grad_norm", "Gradient norm, before clipping", may_be_log=True)


def draw_single(rows: Rows, name: str, title: str, *, may_be_log: bool = False) -> Figure | None:
    """One field of the train rows."""
    from matplotlib.ticker import FuncFormatter

    x, y = series(of_kind(rows, "train"), name)
    if not len(x):
        return None
    figure, axes = new_figure(title)
    draw_line(axes, x, y, STUDENT)
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
    draw_line(upper, *series(train, "images_per_second"), STUDENT)
    upper.set_ylim(bottom=0)
    upper.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    x, waiting = series(train, "data_wait_fraction")
    if len(x):
        draw_line(lower, x, waiting, TEACHER)
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
    is_share = name.endswith("_top1")
    formatter = PercentFormatter(1.0) if is_share else FuncFormatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_major_formatter(formatter)
    if not is_share:
        axes.set_ylim(bottom=0)
    axes.margins(y=0.12)
    add_legend(axes)
    return figure


def shard_counts(rows: Rows) -> np.ndarray:
    """How often each shard was trained on, from the `shards` (list of shard numbers) that rows may carry; int64 [S]."""
    seen = [shard for row in rows if isinstance(row.get("shards"), list) for shard in row["shards"]]
    return np.bincount(np.array(seen, dtype=np.int64)) if seen else np.zeros(0, dtype=np.int64)


def draw_coverage(rows: Rows, num_shards: int | None = None) -> Figure | None:
    """How often each shard was trained on."""
    from matplotlib.ticker import MaxNLocator

    counts = shard_counts(rows)
    if not len(counts):
        return None
    counts = np.pad(counts, (0, max(0, (num_shards or 0) - len(counts))))
    figure, axes = new_figure(f"Shards trained on: {(counts > 0).sum():,} of {len(counts):,}")
    edges = np.arange(len(counts) + 1)
    axes.stairs(counts, edges, fill=True, color=STUDENT, alpha=0.8)
    axes.set_xlim(0, len(counts))
    axes.set_xlabel("shard")
    axes.set_ylabel("times seen")
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return figure


def datasets_of(rows: Rows) -> list[str]:
    """The evaluation sets that the rows speak of, in their order."""
    return list(dict.fromkeys(row["dataset"] for row in of_kind(rows, "eval") if "dataset" in row))


def draw_all(rows: Rows, num_shards: int | None = None) -> dict[str, Figure]:
    """File stem -> picture, in the order of the report; pictures without data are left out."""
    import matplotlib

    builders: dict[str, Callable[[], Figure | None]] = {}
    for dataset in datasets_of(rows):
        for name, title in QUALITIES.items():
            stem = f"{name.removesuffix('_top1')}_{dataset}"
            builders[stem] = lambda d=dataset, n=name, t=title: draw_quality(rows, d, n, t)
    builders["loss"] = lambda: draw_loss(rows)
    builders["learning_rate"] = lambda: draw_learning_rate(rows)
    builders["grad_norm"] = lambda: draw_grad_norm(rows)
    builders["throughput"] = lambda: draw_throughput(rows)
    builders["shards"] = lambda: draw_coverage(rows, num_shards)
    with matplotlib.rc_context(RC):
        return dict(_drawn(builders))


QUALITIES = {"knn_top1": "k-NN accuracy", "linear_top1": "Linear probe accuracy", "effective_rank": "Effective rank"}


def to_png(figure: Figure) -> bytes:
    """The picture for a light page, 220 dots per inch."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context(RC):
        figure.savefig(buffer, format="png", dpi=220, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure) -> str:
    """The picture as an <svg> element; the same figure always gives the same text."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(RC | {"svg.hashsalt": "distillery"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].strip()


def _drawn(builders: dict[str, Callable[[], Figure | None]]) -> Iterable[tuple[str, Figure]]:
    for stem, build in builders.items():
        figure = build()
        if figure is not None:
            yield stem, figure
