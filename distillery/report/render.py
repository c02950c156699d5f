"""Render a page from a template in templates/: one HTML file with its style sheet and pictures, no scripts."""

import itertools
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distillery.report.style import COLOUR, is_number
from distillery.system.console import format_bytes, format_seconds

_FOLDER = Path(__file__).parent


def render(template: str, **values: Any) -> str:
    """The page that templates/<template> makes of the values; texts among them are escaped."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": lambda value, spec=",": format(value, spec),
        "bytes": format_bytes,
        "seconds": format_seconds,
        "clock": clock,
        "themed": themed_svg,
    }
    environment.tests["finite"] = is_number
    css = (_FOLDER / "report.css").read_text()
    return _with_own_ids(environment.get_template(template).render(css=css, **values))


def clock(seconds: float) -> str:
    """Unix time as date and time of day, UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def themed_svg(svg: str) -> str:
    """A picture for the page: colours as CSS variables, as wide as the column it stands in."""
    for name, colour in vars(COLOUR).items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # a size in points would overrule the column
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', svg, count=1)


def _with_own_ids(page: str) -> str:
    """Each <svg> of the page with ids that no other one has: matplotlib calls the parts of every figure the same."""
    number = itertools.count()

    def own(match: re.Match) -> str:
        prefix = f"p{next(number)}"
        svg = re.sub(r'\bid="', f'id="{prefix}-', match.group())
        return re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)

    return re.sub(r"<svg.*?</svg>", own, page, flags=re.DOTALL)
