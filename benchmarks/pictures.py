"""The pictures of README.md, cut out of what finished runs have drawn of themselves.

make pictures RUN=DIR                       # docs/pca.png from that run folder, docs/report.png from the demo's
python -m benchmarks.pictures --pca DIR     # one alone; likewise --report DIR, which needs Chromium
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from distillery.models.configured import choose_device
from distillery.report.canvas import GAP_PX, LINE_PX, TILE_PX
from distillery.report.facts import PCA_NAME, PLOTS_NAME
from distillery.report.page import write_report
from distillery.report.pictures import draw_run

DOCS = Path(__file__).resolve().parents[1] / "docs"
PCA_ROWS = 3
PAGE_PX = "1040,860"  # width, height


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pca", type=Path, metavar="DIR", help="run whose features become docs/pca.png")
    parser.add_argument("--report", type=Path, metavar="DIR", help="run whose report.html becomes docs/report.png")
    arguments = parser.parse_args()
    if arguments.pca is not None:
        draw_run(arguments.pca, choose_device("auto"))
        with Image.open(arguments.pca / PLOTS_NAME / PCA_NAME) as pca:
            height = LINE_PX + PCA_ROWS * (TILE_PX + GAP_PX) - GAP_PX
            pca.crop((0, 0, pca.width, height)).save(DOCS / "pca.png", optimize=True)
    if arguments.report is not None:
        screenshot(write_report(arguments.report).resolve(), DOCS / "report.png")
    return 0


def screenshot(page: Path, out: Path) -> None:
    """The top of a page, in 128 colours."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("docs/report.png needs Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={folder}"]
        shot = Path(folder) / "page.png"
        command = [browser, *flags, f"--window-size={PAGE_PX}", f"--screenshot={shot}", f"file://{page}"]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        Image.open(shot).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
