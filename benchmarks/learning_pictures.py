"""The pictures of benchmarks.learning: k-NN over images and seconds, or over images seen by number of images."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning_suites import Suite
from benchmarks.learning_tables import Result, by_label, comparable_curves, knn_of, untrained_and_teachers
from distillery.report.style import short_count


def draw(suite: Suite, runs: Sequence[Result], path: Path) -> Path | None:
    """Draw a suite's picture; returns its path, None where the suite has none or nothing is measured."""
    if suite.picture is None or not runs:
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    groups = by_label(suite, runs)
    axes = draw_data(figure, groups) if suite.picture == "data" else draw_curves(figure, suite, groups)
    axes.set_ylabel("k-NN top-1, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    student = ", ".join(dict.fromkeys(run["student"] for run in runs))
    figure.suptitle(f"{runs[0]['setting']['teacher']} to {student}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def draw_curves(figure: Any, suite: Suite, groups: dict[str, list[Result]]) -> Any:
    """A panel over images seen and one over seconds: median and range over seeds; returns the first."""
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("images", "seconds"), ("images seen", "seconds"), strict=True):
        for name, runs in groups.items():
            curves = comparable_curves(suite, name, runs)
            x = np.median([[point[key] for point in curve] for curve in curves], axis=0)
            y = 100 * np.array([[point["knn"] for point in curve] for curve in curves])
            style = "-" if name.startswith("ours") else "--"
            (line,) = axes.plot(x, np.median(y, axis=0), style, marker="o", markersize=3, label=name)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), alpha=0.2, color=line.get_color())
        draw_references(axes, groups)
        axes.set_xlabel(label)
        if key == "images":
            axes.xaxis.set_major_formatter(lambda value, _: short_count(value))
    return panels[0]


def draw_data(figure: Any, groups: dict[str, list[Result]]) -> Any:
    """The ends of all runs over images seen: a line for each number of distinct images, live runs as crosses."""
    axes = figure.subplots()
    runs = [run for group in groups.values() for run in group]
    for images in sorted({run["images"] for run in runs}):
        color = None
        for is_live, style in ((False, "o-"), (True, "x")):
            ends = sorted(
                (run["images_seen"], 100 * knn_of(run))
                for run in runs
                if run["images"] == images and (run["views"] is None) == is_live
            )
            if ends:
                label = f"{images:,} images{', live teacher' if is_live else ''}"
                (line,) = axes.plot(*zip(*ends, strict=True), style, color=color, label=label, markersize=7)
                color = line.get_color()
    draw_references(axes, groups)
    axes.set_xscale("log")
    axes.set_xlabel("images seen")
    return axes


def draw_references(axes: Any, groups: dict[str, list[Result]]) -> None:
    """The teacher as a line. The axis begins at the lowest trained student, so the untrained one is named alone."""
    runs = [run for group in groups.values() for run in group]
    untrained, teachers = untrained_and_teachers(runs)
    lowest = min([knn_of(run) for run in runs] + [point["knn"] for run in runs for point in run["curve"][1:]])
    axes.set_ylim(bottom=100 * lowest - 2)
    measured = [("untrained student", untrained, "grey"), *((name, [row], "black") for name, row in teachers.items())]
    for name, rows, color in measured:
        if rows:
            share = 100 * statistics.median(row["knn_top1"] for row in rows)
            axes.axhline(share, color=color, linestyle=":", label=f"{name} ({share:.1f} %)")
    axes.grid(alpha=0.3)
