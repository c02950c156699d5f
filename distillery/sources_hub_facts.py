"""What the hub says of a data set that has not been downloaded: files, bytes, images."""

import re
from dataclasses import dataclass

from distillery.system.console import format_bytes
from distillery.system.errors import UserError


@dataclass(frozen=True)
class HubFacts:
    """One split on the hub. num_bytes, num_rows: None where the hub does not say."""

    dataset_name: str
    kind: str
    split: str
    num_files: int
    num_bytes: int | None
    num_rows: int | None

    def describe(self) -> str:
        """One line for the plan."""
        count = "images" if self.num_rows is None else f"{self.num_rows:,} images"
        size = "of unknown size" if self.num_bytes is None else f"{format_bytes(self.num_bytes)} to download"
        files = f"{self.num_files:,} file{'s' * (self.num_files != 1)}"
        return f"{self.kind}: {count} in {files} ({size}), split {self.split!r}, from {self.dataset_name} on the hub"


class NotDownloadedError(UserError):
    """Raised instead of downloading; facts: what would be downloaded."""

    def __init__(self, facts: HubFacts) -> None:
        super().__init__(f"not downloaded: {facts.describe()}")
        self.facts = facts


def facts_of(builder: object, dataset_name: str, kind: str, split: str, urls: list[str]) -> HubFacts:
    """What is known of one split from a datasets builder and the URLs of its files, with one more look at the hub."""
    splits = builder.info.splits or {}
    known = splits[split].num_examples if split in splits else None
    return HubFacts(dataset_name, kind, split, len(urls), _bytes_of(urls), known or None)


def _bytes_of(urls: list[str]) -> int | None:
    """The files' sizes as the hub lists them; None for files elsewhere, or where it does not answer."""
    from huggingface_hub import HfApi

    places = [re.match(r"hf://datasets/([^@]+)@([^/]+)/(.*)", url) for url in urls]
    if not places or not all(places) or len({place.group(1, 2) for place in places}) != 1:
        return None
    repository, revision = places[0].group(1, 2)
    wanted = {place[3] for place in places}
    try:
        entries = HfApi().list_repo_tree(repository, repo_type="dataset", revision=revision, recursive=True)
        sizes = {entry.path: entry.size for entry in entries if hasattr(entry, "size")}
    except Exception:  # whatever the client's network raises: a plan without this figure is better than none
        return None
    return sum(sizes[path] for path in wanted) if wanted <= sizes.keys() else None
