"""What the pages of a run and of a cache are made of: the frame, tiles, figures, tables; one file, no scripts."""

import html
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distillery.report.style import COLOURS


def escape(value: Any) -> str:
    """Any value as text of a page."""
    return html.escape(str(value))


def clock(seconds: float) -> str:
    """Unix time as date and time of day, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def page(title: str, parts: Iterable[str], foot: str) -> str:
    """The whole page: head with the style sheet, heading, parts ("" ones left out), foot (HTML)."""
    css = Path(__file__).with_name("report.css").read_text()
    body = "\n".join([f"<h1>{escape(title)}</h1>", *(part for part in parts if part)])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # without this a browser asks the server for /favicon.ico
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n"
        f"{_with_own_ids(body)}\n<footer>{foot}</footer>\n</main>\n</body>\n</html>\n"
    )


def _with_own_ids(body: str) -> str:
    """Each <svg> of the page with ids that no other one has: matplotlib calls the parts of every figure the same."""
    number = itertools.count()

    def own(match: re.Match) -> str:
        prefix = f"p{next(number)}"
        svg = re.sub(r'\bid="', f'id="{prefix}-', match.group())
        return re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)

    return re.sub(r"<svg.*?</svg>", own, body, flags=re.DOTALL)


def themed_svg(svg: str) -> str:
    """A picture for the page: colours as CSS variables, as wide as the column it stands in."""
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # a size in points would overrule the column
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', svg, count=1)


def figure(picture: str, caption: str) -> str:
    """A card with an <svg> or <img> and its caption (HTML)."""
    picture = themed_svg(picture) if picture.startswith("<svg") else picture
    return f'<figure class="card">{picture}<figcaption>{caption}</figcaption></figure>'


def figures(heading: str, cards: Sequence[str], kind: str = "charts") -> str:
    """A section of cards beside each other, "" without any; kind: "charts", or "pictures", which are wider."""
    return f'<h2>{heading}</h2>\n<div class="{kind}">\n{"".join(cards)}\n</div>' if cards else ""


def tiles(shown: Iterable[tuple[str, str, str, str]]) -> str:
    """Key figures: (name, value, note, class) each; "" without any."""
    cells = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt>'
        f'<dd class="{kind}">{escape(value)}<small>{escape(note)}</small></dd></div>'
        for name, value, note, kind in shown
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells in a card that scrolls where it is too wide."""
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in line) + "</tr>" for line in lines)
    return f'<div class="card scroll"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def details(summary: str, facts: Mapping[str, Any]) -> str:
    """Names and values that unfold."""
    lines = "".join(
        f"<tr><td><code>{escape(key)}</code></td><td><code>{escape(value)}</code></td></tr>"
        for key, value in facts.items()
    )
    return f'<details class="card"><summary>{escape(summary)}</summary><table>{lines}</table></details>'
