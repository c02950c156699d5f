"""What all figures of a report share: series from rows, colours, axes, and the output as SVG or PNG.

Every colour has one meaning everywhere: the student is blue, its teacher orange, the untrained student grey. COLOUR
holds the colours of a light page. render.themed_svg replaces each by the CSS variable of the same name, so a dark page
shows its own.
"""

from __future__ import annotations

import io
import math
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOUR = SimpleNamespace(
    ink="#1b2430",
    muted="#5d6877",
    grid="#dfe3e8",
    student="#0b6bcb",
    teacher="#b8520a",
    untrained="#7c8696",
    third="#8442b5",
    fourth="#0a7d62",
    fifth="#b3265e",
)
# a run has thousands of rows, a picture a few hundred columns: more points only make the file larger
MAX_POINTS = 300
SIZE_INCHES = (4.1, 2.65)
RC = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": COLOUR.ink,
    "axes.labelcolor": COLOUR.muted,
    "axes.edgecolor": COLOUR.grid,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": COLOUR.ink,
    "axes.titlepad": 12,
    "grid.color": COLOUR.grid,
    "grid.linewidth": 0.7,
    "xtick.color": COLOUR.muted,
    "ytick.color": COLOUR.muted,
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


def datasets_of(rows: Rows) -> list[str]:
    """The evaluation sets that the rows speak of, in their order."""
    return list(dict.fromkeys(row["dataset"] for row in of_kind(rows, "eval") if "dataset" in row))


def mark_resumes(axes: Axes, rows: Rows) -> None:
    """A thin dotted line where the run was interrupted and went on."""
    for row in of_kind(rows, "resume"):
        axes.axvline(row["step"], color=COLOUR.muted, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)


def of_kind(rows: Rows, kind: str) -> Rows:
    """The rows of one kind."""
    return [row for row in rows if row.get("kind") == kind]


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


# characters that fit side by side above a picture, and those that a curve's sign and the space after it take
_LEGEND_LENGTH, _SIGN_LENGTH = 44, 6


def add_legend(axes: Axes, handlelength: float = 1.9, columnspacing: float = 1.6) -> None:
    """Names of the curves between the title and the picture, in as few lines as fit."""
    lengths = [len(label) + _SIGN_LENGTH for label in axes.get_legend_handles_labels()[1]]

    def is_fitting(columns: int) -> bool:
        parts = np.array_split(lengths, columns)  # as matplotlib does
        return sum(max(part, default=0) for part in parts) <= _LEGEND_LENGTH

    columns = next((columns for columns in (5, 4, 3, 2) if is_fitting(columns)), 1)
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=10 + 14 * -(-len(lengths) // columns))
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=columns, handlelength=handlelength,
        columnspacing=columnspacing, borderaxespad=0.4, borderpad=0.0,
    )  # fmt: skip


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
