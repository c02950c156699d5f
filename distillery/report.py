"""A run in pictures and plain words: plots/*.png, and report.html, which needs nothing but itself.

python -m distillery.report RUN_DIR       # at any time, also while the run is going on
"""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from distillery.files import expand_path, write_atomic
from distillery.process import EXIT_DONE, run_command
from distillery.report_facts import (
    COLLAPSE_NOTE,
    MEASURES,
    MODELS,
    PASSING_NOTE,
    RunFacts,
    format_measure,
    has_collapsed,
    load_run,
    passes_teacher,
)
from distillery.report_page import build_page
from distillery.report_plots import datasets_of, draw_all, is_number, to_png, to_svg

REPORT_NAME, PLOTS_NAME = "report.html", "plots"


def write_plots(run_dir: Path) -> list[Path]:
    """Write plots/*.png (loss.png, learning_rate.png, knn_<dataset>.png, ...); pictures without data are left out."""
    return _write_plots(load_run(Path(run_dir)))[0]


def _write_plots(run: RunFacts) -> tuple[list[Path], dict[str, Any]]:
    figures = draw_all(run.rows, run.num_shards)
    folder = run.run_dir / PLOTS_NAME
    folder.mkdir(exist_ok=True)
    paths = []
    for stem, figure in figures.items():
        paths.append(folder / f"{stem}.png")
        write_atomic(paths[-1], to_png(figure))
    return paths, figures


def write_report(run_dir: Path) -> Path:
    """Write plots/*.png and report.html: one file, light and dark, printable, without scripts or network.

    Works at any time of a run: what has not happened yet is left out.
    """
    run = load_run(Path(run_dir))
    _, figures = _write_plots(run)
    path = run.run_dir / REPORT_NAME
    write_atomic(path, build_page(run, {stem: to_svg(figure) for stem, figure in figures.items()}).encode())
    return path


def summary_table(run_dir: Path) -> str:
    """The last evaluation as text for the console: untrained, student, teacher on every data set; '' without one."""
    run = load_run(Path(run_dir))
    lines = []
    for dataset in datasets_of(run.rows):
        models = run.evaluation(dataset)
        shown = [measure for measure in MEASURES if any(is_number(row.get(measure[0])) for row in models.values())]
        lines.append(f"{dataset:<20}" + "".join(f"{title:>16}" for _, title, _ in shown))
        for model, row in models.items():
            cells = "".join(f"{format_measure(row, name, form):>16}" for name, _, form in shown)
            lines.append(f"  {MODELS[model]:<18}{cells}")
        if passes_teacher(models):
            lines += _wrapped(PASSING_NOTE)
        if has_collapsed(models.get("student", {})):
            lines += _wrapped(COLLAPSE_NOTE)
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent="  ", subsequent_indent="  ")


def main() -> int:
    """Write the report of one run folder."""
    parser = argparse.ArgumentParser(
        prog="python -m distillery.report", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="run folder (checkpoint_dir)")
    run_dir = expand_path(parser.parse_args().run_dir)
    path = write_report(run_dir)
    table = summary_table(run_dir)
    if table:
        print(table)
    print(f"report: {path}")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
