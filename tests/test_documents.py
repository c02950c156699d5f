"""What the documents name exists: files, links and their headings, modules that are run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "distillery"
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.md")]
ROOMS = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name[0] not in "_.")
NAMED = re.compile(rf"(?<![\w./-])((?:distillery|tests|benchmarks|examples|slurm|{ROOMS})/[\w/]+\.(?:py|sbatch))\b")


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


def test_every_module_that_a_document_or_a_message_tells_to_run_does_something():
    texts = [*DOCUMENTS, *PACKAGE.rglob("*.py"), *ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")]
    found = [re.findall(r"python\s+-m\s+((?:distillery|benchmarks)[.\w]*\w)", path.read_text()) for path in texts]
    names = {name for of_file in found for name in of_file}
    assert {f"distillery.{name}" for name in ("cache", "evaluate", "export", "report", "verify")} <= names
    for name in names:
        place = ROOT / name.replace(".", "/")
        path = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
        assert 'if __name__ == "__main__":' in path.read_text(), name
