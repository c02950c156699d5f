"""A page as headless Chromium shows it: at any width, without network."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

from PIL import Image

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr")  # fmt: skip
# the boxes of an element of the framed page, and the least height of a line of text in a picture
PROBE = """
addEventListener('load', () => {
  const page = document.querySelector('iframe').contentDocument;
  const boxes = name => [...page.querySelectorAll(name)].map(element => {
    const {width, height, right} = element.getBoundingClientRect();
    return {width, height, right};
  });
  document.title = JSON.stringify({
    width: page.defaultView.innerWidth, scroll_width: page.documentElement.scrollWidth,
    svg: boxes('figure svg'), img: boxes('img'),
    smallest_text_px: Math.min(...boxes('figure text').map(box => box.height)),
  });
});
"""


def inspect(path: Path, width_px: int, folder: Path) -> dict:
    """What the page at `path` looks like in a frame of that width (Chromium's own windows are 500 px at least).

    Returns:
        width, scroll_width, svg and img (boxes), smallest_text_px; errors: lines of the console.
    """
    frame = folder / "frame.html"
    frame.write_text(
        f'<iframe width="{width_px}" height="900" style="border: 0" srcdoc="{html.escape(path.read_text())}"></iframe>'
        f"<script>{PROBE}</script>"
    )
    done = run(folder, "--window-size=1600,1000", "--dump-dom", f"file://{frame}")
    found = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert found, done.stderr
    return json.loads(html.unescape(found.group(1))) | {
        "errors": [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    }


def screenshot(path: Path, width_px: int, out: Path, *, dark: bool = False) -> Image.Image:
    """The top of the page as a picture."""
    mode = ["--blink-settings=preferredColorScheme=0"] if dark else []
    run(out.parent, *mode, f"--window-size={width_px},1000", f"--screenshot={out}", f"file://{path}")
    return Image.open(out).convert("RGB")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Chromium with a profile of its own."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)
