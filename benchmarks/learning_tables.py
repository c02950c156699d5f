"""What benchmarks.learning prints and draws: rows over seeds as min, mean, max; curves over images and over seconds."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def over_seeds(values: Sequence[float | None]) -> list[float] | None:
    """[min, mean, max]; None where a value is missing."""
    if not values or any(value is None for value in values):
        return None
    return [min(values), statistics.fmean(values), max(values)]


def runs_by_name(content: dict, kind: str) -> dict[str, list[dict]]:
    """The runs of a kind, those of one contender together, in the order of their first run."""
    found: dict[str, list[dict]] = {}
    for run in content["runs"]:
        if run["kind"] == kind:
            found.setdefault(run["name"], []).append(run)
    return found


def main_rows(content: dict) -> list[dict]:
    """A row for each contender, for the untrained student and for the teacher.

    knn, linear: [min, mean, max] over seeds, after the last step; knn_at_equal_time: at the seconds at which the
    fastest contender was done on average, interpolated between evaluations; knn_by_epoch: mean.
    """
    named = runs_by_name(content, "contender")
    if not named:
        return []
    totals = {name: statistics.fmean(run["curve"][-1]["seconds"] for run in runs) for name, runs in named.items()}
    deadline = min(totals.values())
    rows = [
        _row(name, [run["rows"]["student"] for run in runs])
        | {
            "images": runs[0]["curve"][-1]["images"],
            "seconds": totals[name],
            "prepare_seconds": statistics.fmean(run["prepare_seconds"] for run in runs),
            "knn_by_epoch": [statistics.fmean(points) for points in zip(*map(_knn, runs), strict=True)],
            "equal_time_seconds": deadline,
            "knn_at_equal_time": over_seeds([knn_at(run["curve"], deadline) for run in runs]),
        }
        for name, runs in named.items()
    ]
    everyone = [run["rows"] for runs in named.values() for run in runs]
    untrained = list({run["seed"]: run["rows"]["untrained"] for runs in named.values() for run in runs}.values())
    teachers = [found["teacher"] for found in everyone if "teacher" in found][:1]
    rows.insert(0, _row("untrained student", untrained))
    return rows + [_row("teacher", [teacher]) for teacher in teachers]


def _row(name: str, measured: list[dict[str, Any]]) -> dict:
    return {
        "name": name,
        "seeds": len(measured),
        "knn": over_seeds([row["knn_top1"] for row in measured]),
        "linear": over_seeds([row["linear_top1"] for row in measured]),
    }


def _knn(run: dict) -> list[float]:
    return [point["knn"] for point in run["curve"]]


def knn_at(curve: list[dict], seconds: float) -> float:
    """k-NN at a moment, on the straight line between the evaluations around it; before the first, the first."""
    return float(np.interp(seconds, [point["seconds"] for point in curve], [point["knn"] for point in curve]))


def ablation_rows(content: dict) -> list[dict]:
    """A row for each variant: k-NN and linear probe after the last step, k-NN by epoch."""
    return [
        _row(name, [run["rows"]["student"] for run in runs]) | {"knn_by_epoch": _knn(runs[0])}
        for name, runs in runs_by_name(content, "ablation").items()
    ]


def percent(values: Sequence[float] | float | None) -> str:
    """One share, or min / mean / max where they differ, in percent."""
    if values is None:
        return ""
    shares = [values] if isinstance(values, float) else list(values)
    shares = shares[:1] if len(set(shares)) == 1 else shares
    return " / ".join(f"{100 * share:.1f}" for share in shares) + " %"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns as wide as their widest cell."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def print_tables(content: dict, *, equal_time: bool) -> None:
    """The tables on the console, as markdown."""
    setting, rows = content["setting"], content["results"]
    images = max((row.get("images", 0) for row in rows), default=0)
    print(
        f"\n{setting['teacher']} -> {setting['student']}, {images:,} images seen, batch {setting['batch_size']}; k-NN "
        f"with k {setting['knn_k']}, {setting['bank']:,} training and {setting['test_images']:,} test images; min / "
        "mean / max over seeds\n"
    )
    if rows:
        print(markdown(*_main_table(rows, equal_time)))
    for name, reason in content["left_out"].items():
        print(f"left out: {name}: {reason}")
    if content["ablation"]:
        print(f"\nablation, {setting['ablation_epochs']} epochs, one seed\n")
        header = ["recipe", "k-NN", "linear probe", "k-NN by epoch"]
        cells = [_cells(row) for row in content["ablation"]]
        print(markdown(header, [[name, knn, linear, epochs] for name, _, knn, linear, epochs in cells]))
    print()


def _main_table(rows: list[dict], equal_time: bool) -> tuple[list[str], list[list[str]]]:
    header = ["", "seeds", "k-NN", "linear probe", "k-NN by epoch", "seconds"]
    lines = []
    for row in rows:
        seconds = f"{row['seconds']:,.0f}" if "seconds" in row else ""
        if row.get("prepare_seconds"):
            seconds += f" ({row['prepare_seconds']:,.0f} for the teacher's outputs)"
        line = [*_cells(row), seconds]
        lines.append([*line, percent(row.get("knn_at_equal_time"))] if equal_time else line)
    if equal_time:
        deadline = next(row["equal_time_seconds"] for row in rows if "seconds" in row)
        header.append(f"k-NN after {deadline:,.0f} s")
    return header, lines


def _cells(row: dict) -> list[str]:
    by_epoch = " / ".join(f"{100 * share:.1f}" for share in row.get("knn_by_epoch", [])[1:])
    return [row["name"], str(row["seeds"]), percent(row["knn"]), percent(row["linear"]), by_epoch]


def draw(content: dict, path: Path) -> None:
    """k-NN over images seen and over seconds, mean and range over seeds; untrained student and teacher as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, label in zip(panels, ("images", "seconds"), ("images seen", "seconds"), strict=True):
        for name, runs in runs_by_name(content, "contender").items():
            x = np.array([[point[key] for point in run["curve"]] for run in runs]).mean(axis=0)
            y = 100 * np.array([_knn(run) for run in runs])
            style = {} if name.startswith("ours") else {"linestyle": "--"}
            (line,) = axes.plot(x, y.mean(axis=0), marker="o", markersize=3, label=name, **style)
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), alpha=0.2, color=line.get_color())
        for row in content["results"]:
            if row["name"] in ("teacher", "untrained student"):
                color, share = "black" if row["name"] == "teacher" else "grey", 100 * row["knn"][1]
                axes.axhline(share, color=color, linestyle=":", label=f"{row['name']} ({share:.1f} %)")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("k-NN top-1, %")
    if panels[0].lines:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    setting = content["setting"]
    figure.suptitle(f"{setting['teacher']} -> {setting['student']}, {setting['epochs']} epochs", fontsize=10)
    figure.savefig(path, dpi=120)
