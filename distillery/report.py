"""A run or a cache in pictures and plain words: one HTML file that needs nothing but itself.

python -m distillery.report RUN_DIR       # report.html and plots/*.png; also while the run is going on
python -m distillery.report CACHE_DIR     # ./cache_report.html: what the images look like, what failed
"""

import argparse
import textwrap
from pathlib import Path
from typing import Any

from distillery.report_axes import datasets_of, is_number, to_png, to_svg
from distillery.report_cache import CACHE_REPORT_NAME, is_cache, write_cache_report
from distillery.report_facts import (
    COLLAPSE_NOTE,
    MEASURES,
    MODELS,
    PASSING_NOTE,
    PLOTS_NAME,
    RunFacts,
    format_measure,
    has_collapsed,
    load_run,
    passes_teacher,
)
from distillery.report_page import build_page
from distillery.report_plots import draw_all
from distillery.system.errors import EXIT_DONE, run_command
from distillery.system.files import expand_path, write_atomic

REPORT_NAME = "report.html"


def write_plots(run_dir: Path) -> list[Path]:
    """Write plots/*.png (loss.png, learning_rate.png, knn_<dataset>.png, ...); pictures without data are left out."""
    return _write_plots(load_run(Path(run_dir)))[0]


def _write_plots(run: RunFacts) -> tuple[list[Path], dict[str, Any]]:
    figures = draw_all(run.rows, run.num_shards, run.shard_rows)
    folder = run.run_dir / PLOTS_NAME
    folder.mkdir(exist_ok=True)
    paths = []
    for stem, figure in figures.items():
        paths.append(folder / f"{stem}.png")
        write_atomic(paths[-1], to_png(figure))
    return paths, figures


def write_report(run_dir: Path, out: Path | None = None, no_pictures: str | None = None) -> Path:
    """Write plots/*.png and report.html: one file, light and dark, printable, without scripts or network.

    Works at any time of a run: what has not happened yet is left out.

    Args:
        run_dir: the run folder.
        out: where to; None: report.html in the run folder.
        no_pictures: why pictures of the features could not be drawn; the page says so where there are none.
    """
    run = load_run(Path(run_dir))
    _, figures = _write_plots(run)
    path = out or run.run_dir / REPORT_NAME
    svgs = {stem: to_svg(figure) for stem, figure in figures.items()}
    write_atomic(path, build_page(run, svgs, no_pictures).encode())
    return path


def summary_table(run_dir: Path) -> str:
    """The last evaluation as text for the console: untrained, student, teacher on every data set; '' without one."""
    run = load_run(Path(run_dir))
    lines = []
    for dataset in datasets_of(run.rows):
        models = run.evaluation(dataset)
        shown = [measure for measure in MEASURES if any(is_number(row.get(measure[0])) for row in models.values())]
        lines.append(f"{dataset:<20}" + "".join(f"  {title:>14}" for _, title, _ in shown))
        for model, row in models.items():
            cells = [f"  {format_measure(row, name, form):>{max(14, len(title))}}" for name, title, form in shown]
            lines.append(f"  {MODELS[model]:<18}{''.join(cells)}")
        if passes_teacher(models):
            lines += _wrapped(PASSING_NOTE)
        if has_collapsed(models.get("student", {})):
            lines += _wrapped(COLLAPSE_NOTE)
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent="  ", subsequent_indent="  ")


def main() -> int:
    """Write the report of a run folder or of a cache."""
    parser = argparse.ArgumentParser(
        prog="python -m distillery.report", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="run folder (checkpoint_dir), or cache (cache_dir)")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: report.html in the run folder; for a cache ./cache_report.html",
    )
    parser.add_argument(
        "--no_pictures", action="store_true", help="leave out the pictures of the features, which need the models"
    )
    arguments = parser.parse_args()
    folder, out = expand_path(arguments.folder), arguments.out and expand_path(arguments.out)
    if is_cache(folder):
        print(f"report: {write_cache_report(folder, out or Path(CACHE_REPORT_NAME))}")
        return EXIT_DONE
    load_run(folder)  # a folder that is no run is refused before torch is imported
    reason: str | None = "left out: --no_pictures"
    if not arguments.no_pictures:
        from distillery.models.configured import choose_device
        from distillery.pictures import draw_run, why_not

        reason = why_not(lambda: draw_run(folder, choose_device("auto")))
    path = write_report(folder, out, reason)
    table = summary_table(folder)
    if table:
        print(table)
    print(f"report: {path}")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
