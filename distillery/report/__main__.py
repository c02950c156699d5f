"""A run or a cache in pictures and plain words: one HTML file that needs nothing but itself.

python -m distillery.report RUN_DIR       # report.html and plots/*.png; also while the run is going on
python -m distillery.report CACHE_DIR     # ./cache_report.html: what the images look like, what failed
"""

import argparse
import os
from pathlib import Path

from distillery.report.cache_page import CACHE_REPORT_NAME, is_cache, write_cache_report
from distillery.report.facts import load_run
from distillery.report.page import summary_table, write_report
from distillery.system.errors import EXIT_DONE, UserError, run_command
from distillery.system.files import expand_path


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
    if out is None and not os.access(folder, os.W_OK):
        raise UserError(f"{folder} may only be read: name a place for the report with --out FILE")
    reason: str | None = "left out: --no_pictures"
    if not arguments.no_pictures:
        from distillery.models.configured import choose_device
        from distillery.report.pictures import draw_run, why_not

        reason = why_not(lambda: draw_run(folder, choose_device("auto")))
    path = write_report(folder, out, reason)
    table = summary_table(folder)
    if table:
        print(table)
    print(f"report: {path}")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
