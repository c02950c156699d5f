"""The curves of a run, from the rows of its metrics.jsonl: a function for each, None where there is nothing yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from distillery.report_axes import (
    FIFTH,
    FOURTH,
    RC,
    STUDENT,
    TEACHER,
    THIRD,
    UNTRAINED,
    Rows,
    add_legend,
    datasets_of,
    draw_line,
    mark_resumes,
    new_figure,
    of_kind,
    series,
    short_count,
    thin,
    use_log_axis,
)
from distillery.report_course import draw_coverage, draw_time_shares, draw_timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TERM_COLOURS = (THIRD, FOURTH, FIFTH, TEACHER)
MODEL_COLOURS = {"student": STUDENT, "student_ema": THIRD, "teacher": TEACHER, "untrained": UNTRAINED}


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
    # in a hybrid run some terms may be of the steps alone that run the teacher: sums of all terms, or of all there are
    whole = [row for row in train if all(name in row for name in terms)] or train
    draw_line(axes, *series(whole, "loss"), STUDENT, "weighted sum" if len(terms) > 1 else None)
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


def draw_all(rows: Rows, num_shards: int | None = None, shard_rows: Sequence[int] | None = None) -> dict[str, Figure]:
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
    builders["time_shares"] = lambda: draw_time_shares(rows)
    builders["shards"] = lambda: draw_coverage(rows, num_shards, shard_rows)
    builders["timeline"] = lambda: draw_timeline(rows)
    with matplotlib.rc_context(RC):
        return dict(_drawn(builders))


QUALITIES = {"knn_top1": "k-NN accuracy", "linear_top1": "Linear probe accuracy", "effective_rank": "Effective rank"}


def _drawn(builders: dict[str, Callable[[], Figure | None]]) -> Iterable[tuple[str, Figure]]:
    for stem, build in builders.items():
        figure = build()
        if figure is not None:
            yield stem, figure
