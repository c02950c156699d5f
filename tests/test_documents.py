"""What the documents name exists: files, links and their headings, error messages."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distillery"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")]
ROOMS = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] not in "_.")
NAMED = re.compile(rf"(?<![\w./-])((?:distillery|tests|benchmarks|examples|slurm|{ROOMS})/[\w/]+\.(?:py|sbatch))\b")

# what varies in a message of docs/troubleshooting.md
PLACEHOLDER = re.compile(r"\.\.\.|\b[NM]\b|HOST:PORT|[A-Z]+(?:_[A-Z]+)?=\w*|\b[A-Z]{3,}_[A-Z]+|\b[\w.]+_hash\b")


def anchors(text: str) -> set[str]:
    """The headings of a document as GitHub links to them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_that_a_document_names_exists(path):
    for name in NAMED.findall(path.read_text()):
        assert (ROOT / name).is_file() or (PACKAGE / name).is_file(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_within_the_documents_leads_somewhere(path):
    text = path.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if "://" not in link:
            name, _, heading = link.partition("#")
            target = path.parent / name if name else path
            assert target.exists(), link
            assert not heading or heading in anchors(target.read_text()), link


def texts_of(path: Path) -> list[str]:
    """The strings of a module; in an f-string a NUL stands for each value."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    formatted = [
        "".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return formatted + [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_the_messages_under_troubleshooting_are_those_of_the_code():
    rows = re.findall(r"^\| (`.*?`)[^`|]* \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.MULTILINE)
    messages = {message for row in rows for message in re.findall(r"`([^`]+)`", row)} - {"Gloo connectFullMesh failed"}
    texts = [text for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("*.py")] for text in texts_of(path)]
    assert len(messages) > 20
    for message in messages:
        parts = [part.strip() for part in PLACEHOLDER.split(message) if len(part.strip()) > 3]
        assert parts and all(any(part in text for text in texts) for part in parts), message
