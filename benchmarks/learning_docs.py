"""The tables and pictures of benchmarks.learning in docs/results.md: they stand between markers, made of the results.

<!-- learning:budget4 -->
...
<!-- /learning -->
"""

import re
from pathlib import Path

from benchmarks.learning_pictures import draw
from benchmarks.learning_results import Results, runs_of
from benchmarks.learning_suites import Suite
from benchmarks.learning_tables import table_of
from distillery.system.errors import UserError
from distillery.system.files import write_atomic

PAGE = "results.md"


def block_of(suite: Suite, results: Results) -> str:
    """What stands between a suite's markers."""
    runs = runs_of(suite, results.out)
    table = table_of(suite, runs, results.left_out())
    if suite.picture is None or not runs:
        return table
    return f"{table}\n\n![k-NN of the suite {suite.name}]({picture_name(suite)})"


def picture_name(suite: Suite) -> str:
    """The file in docs/."""
    return f"learning_{suite.name}.png"


def markers_of(name: str) -> re.Pattern:
    """Matches a suite's block with its markers; the group is what stands between them."""
    return re.compile(rf"(?<=<!-- learning:{re.escape(name)} -->\n)(.*?)(?=\n<!-- /learning -->)", re.DOTALL)


def write_docs(suite: Suite, results: Results, docs: Path) -> None:
    """Put a suite's table into docs/results.md, and draw its picture beside it.

    Raises:
        UserError: the page has no markers of this suite.
    """
    page = docs / PAGE
    text, markers = page.read_text(), markers_of(suite.name)
    if not markers.search(text):
        raise UserError(
            f"{page} has no line <!-- learning:{suite.name} --> with <!-- /learning --> after it. Add both."
        )
    draw(suite, runs_of(suite, results.out), docs / picture_name(suite))
    write_atomic(page, markers.sub(lambda _: block_of(suite, results), text).encode())
    print(f"written: {page}, {suite.name}")
