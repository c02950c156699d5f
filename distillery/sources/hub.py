"""Find the local files of a data set that is on the Hugging Face hub or in a folder that load_dataset takes.

Parquet, arrow, image folder and webdataset repositories are downloaded into HF_HOME and read in place. load_dataset
converts the other formats (json, csv, hdf5, ...); their images are read from the arrow files in its cache.
"""

import glob
import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from distillery.sources.converted import causes_of, convert, name_in_repository
from distillery.sources.listing import DataFiles, FileList, check_split, suffix_of
from distillery.sources.tables import Beside
from distillery.system.console import format_bytes
from distillery.system.errors import RunError, UserError
from distillery.system.files import canonical_json, sha256_of, write_atomic

T = TypeVar("T")
_RETRIES = 6
# huggingface_hub itself asks for 23 s before it says that it cannot connect: there may be no network at all
_LOOKUP_PATIENCE_S = 30
_LONGEST_WAIT_S = 120
_TRANSIENT_STATUS = {408, 425, 429, 500, 502, 503, 504, 520, 522, 524}
_NETWORK_MODULES = {"httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "ssl", "socket"}
# files that load_dataset converts, by these names
FORMATS = ("csv", "json")
_TABLE_SUFFIXES = {".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow"}
_FINAL_ERRORS = {"OfflineModeIsEnabled", "DatasetNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError"}


@dataclass(frozen=True)
class Resolution:
    """What a data set's name stands for.

    Args:
        kind: the source that reads `files`.
        features: what the data set's card says about its columns.
        origin: what identifies the rows beside the files' names and edges.
        beside: where the paths in `files` begin, where that is not the files' own folder.
        by_folder: resolves once more, so that `beside` knows the folders of relative paths; None: it does, or none can.
    """

    kind: str
    files: FileList
    features: dict | None
    origin: dict
    beside: Beside | None = None
    by_folder: "Callable[[], Resolution] | None" = None


def resolve_dataset(
    dataset_name: str,
    *,
    kinds: tuple[str, ...],
    dataset_config: str | None,
    dataset_revision: str | None,
    data_files: DataFiles,
    data_dir: str | None,
    split: str,
    download: bool = True,
) -> Resolution:
    """Find and download one split of what load_dataset(dataset_name, ...) would load.

    What was found is noted under HF_HOME, so that nodes without internet find the same files again.

    Args:
        dataset_name: a hub id, an existing local folder, or the name of a kind whose data_files are URLs.
        kinds: the kinds that are read in place.
        dataset_config: a configuration of the data set, where it has several.
        dataset_revision: branch, tag or commit; ignored for a local folder.
        data_files: in the repository or folder, or URLs.
        data_dir: a folder of the repository.
        split: the one to find.
        download: if False, report files that are not on this machine instead of downloading them.
    Raises:
        UserError: no such data set, configuration or split, or it cannot be reached and was not downloaded before.
        NotDownloadedError: it would have to be downloaded.
        RunError: the download was given up after several tries.
    """
    import datasets

    if dataset_name in FORMATS and data_files is None and data_dir is None:
        raise UserError(f"dataset_name: {dataset_name} needs data_files (paths or patterns) or data_dir (a folder).")
    is_local = Path(dataset_name).exists()
    request = [dataset_name, dataset_config, dataset_revision, data_files, data_dir, split]
    note = None if is_local else _note_path(request)
    known = _read_note(note) if note is not None else None
    is_offline = datasets.config.HF_HUB_OFFLINE
    if known is not None and (is_offline or not download or re.fullmatch("[0-9a-f]{40}", dataset_revision or "")):
        return known
    arguments = {"data_dir": data_dir, "data_files": data_files, "revision": None if is_local else dataset_revision}
    try:
        builder = with_retries(
            lambda: datasets.load_dataset_builder(dataset_name, dataset_config, **arguments),
            f"looking up {dataset_name}",
            # with the files at hand there is no point in waiting for a network that may not be there at all
            tries=1 if known is not None or is_offline or not download else _RETRIES,
            patience_s=_LOOKUP_PATIENCE_S,
        )
    except Exception as error:  # load_dataset_builder raises whatever its network and file libraries raise
        if known is not None and not _is_final(error):
            print(f"{dataset_name}: the hub cannot be reached; reading what was downloaded before", file=sys.stderr)
            return known
        raise _unreachable(dataset_name, error) from error
    kind = type(builder).__module__.rpartition(".")[2]
    if kind == "cache" and known is not None:
        return known
    features = builder.info.features.to_dict() if builder.info.features is not None else None
    listed = builder.config.data_files or {}
    is_here = is_local or bool(listed) and not any("://" in str(url) for urls in listed.values() for url in urls)
    if not download and not is_here:
        check_split(split, listed or [split], dataset_name)
        urls = [str(url) for url in listed.get(split, [])]
        raise NotDownloadedError(look_up_split(builder, dataset_name, kind, split, urls))
    if kind not in kinds:
        return _converted(builder, dataset_name, dataset_config, split, is_local=is_local)
    if is_local and kind == "imagefolder" and data_files is None:
        _note_tables(dataset_name)
    check_split(split, builder.config.data_files, dataset_name)
    urls = [str(url) for url in builder.config.data_files[split]]
    files = _download(builder, urls, dataset_name)
    origin = {} if is_local else {"dataset_name": dataset_name, "revision": _revision_of(urls)}
    resolution = Resolution(kind, files, features, origin)
    if note is not None:
        _write_note(note, resolution)
    return resolution


def _note_tables(folder: str) -> None:
    """Name the tables beside images that load_dataset does not look at: labels may be meant to come from one."""
    names = [name for name in sorted(os.listdir(folder)) if suffix_of(name) in _TABLE_SUFFIXES]
    names = [name for name in names if not name.startswith("metadata.")]
    if names:
        print(
            f"note: {folder} is read as an image folder, without {', '.join(names[:3])}{', ...' * (len(names) > 3)}; "
            f"to read the table, write data_files: {names[0]}",
            file=sys.stderr,
        )


def _unreachable(dataset_name: str, error: Exception) -> Exception:
    text = " ".join(str(error).split())[:400]
    if isinstance(error, ValueError) and "config" in text.lower():
        return UserError(f"dataset_config of {dataset_name}: {text}")
    if Path(dataset_name).exists() or dataset_name in FORMATS:
        hint = (
            " load_dataset takes [, * and ? in a folder's name for a pattern: rename it."
            if glob.has_magic(dataset_name)
            else ""
        )
        return UserError(f"{dataset_name} cannot be loaded: {text}.{hint}")
    return UserError(
        f"dataset_name {dataset_name!r} is neither a local path nor to be had from the Hugging Face hub "
        f"({type(error).__name__}: {text}). For a node without internet: run stage 1 with --download_only where there "
        "is some, and let HF_HOME point to the same folder on both."
    )


def _download(builder: object, urls: list[str], dataset_name: str) -> FileList:
    import datasets

    manager = datasets.DownloadManager(dataset_name=dataset_name, base_path=builder.base_path)
    try:
        paths = with_retries(lambda: manager.download(urls), f"downloading {dataset_name}")
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RunError(f"Downloading {dataset_name} failed: {reason} What has arrived is kept: try again.") from error
    paths = [os.path.abspath(path) for path in paths]
    sizes = np.array([os.stat(path).st_size for path in paths], np.int64)
    names = [name_in_repository(url, builder.base_path) for url in urls]
    return FileList("", names, sizes, paths)


def _revision_of(urls: list[str]) -> str | None:
    """The commit that hub URLs are pinned to."""
    commits = {match.group(1) for url in urls if (match := re.match(r"hf://[^@]*@([0-9a-f]{40})/", url))}
    return commits.pop() if len(commits) == 1 else None


def _converted(
    builder: object,
    dataset_name: str,
    dataset_config: str | None,
    split: str,
    *,
    is_local: bool,
    by_folder: bool = False,
) -> Resolution:
    """Let load_dataset convert what is not read in place, and take the arrow files of its cache."""

    def prepare(call: Callable[[], None]) -> None:
        with_retries(call, f"preparing {dataset_name}")

    def resolve_by_folder() -> Resolution:
        return _converted(builder, dataset_name, dataset_config, split, is_local=is_local, by_folder=True)

    found = convert(builder, dataset_name, dataset_config, split, prepare, by_folder=by_folder)
    origin: dict = {"kind": "load_dataset"}
    if is_local or found.beside.identity is not None:
        origin["files"] = found.beside.identity
    else:
        # arrow files differ with the version of the library that writes them: the commit says what is in them
        origin |= {"dataset_name": dataset_name, "dataset_config": builder.config.name, "revision": builder.hash}
        origin["files"] = {"count": len(found.files)}
    again = resolve_by_folder if found.has_folders else None
    return Resolution("arrow", found.files, found.features, origin, found.beside, again)


def _note_path(request: list) -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "distillery" / f"{sha256_of(request)[:32]}.json"


def _write_note(note: Path, resolution: Resolution) -> None:
    home, files = str(note.parent.parent), resolution.files
    # relative where possible: HF_HOME may be mounted elsewhere on the node that reads this
    paths = [os.path.relpath(path, home) if path.startswith(home + os.sep) else path for path in files.paths]
    content = {
        "kind": resolution.kind,
        "names": files.names,
        "sizes": files.sizes.tolist(),
        "paths": paths,
        "features": resolution.features,
        "origin": resolution.origin,
    }
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, canonical_json(content))
    except OSError as error:  # a read-only HF_HOME serves this run all the same
        print(f"warning: {note} cannot be written ({error}); offline nodes will not find the data set", file=sys.stderr)


def _read_note(note: Path) -> Resolution | None:
    """The resolution noted by an earlier run, if all its files are still there in full."""
    home = str(note.parent.parent)
    try:
        content = json.loads(note.read_text())
        paths = [os.path.join(home, path) for path in content["paths"]]
        sizes = np.array([os.stat(path).st_size for path in paths], np.int64)
        if sizes.tolist() != content["sizes"]:
            return None
        return Resolution(
            content["kind"],
            FileList("", content["names"], sizes, paths),
            content["features"],
            content["origin"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def with_retries(
    call: Callable[[], T],
    what: str,
    *,
    tries: int = _RETRIES,
    patience_s: float = math.inf,
    sleep: Callable[[float], None] = time.sleep,
) -> T:
    """call(), again after a wait that doubles (with jitter, or as long as the server asks) while the network fails.

    Args:
        call: what is tried.
        what: it does, for the message.
        tries: at most.
        patience_s: no further try once the calls themselves, without the waits, have taken so long.
        sleep: waits so many seconds.
    Raises:
        Exception: the call's own, at once where waiting cannot help, else after the last try.
    """
    spent_s = 0.0
    for attempt in range(1, tries + 1):
        began = time.monotonic()
        try:
            return call()
        except Exception as error:
            spent_s += time.monotonic() - began
            if attempt == tries or spent_s > patience_s or not _is_transient(error):
                raise
            # jitter, so that the tasks of a job array do not all come back at the same moment
            wait_s = max(_retry_after_s(error), 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            reason = " ".join(str(error).split())[:200]
            print(
                f"{what}: {type(error).__name__}: {reason}; trying again in {wait_s:.0f} s",
                file=sys.stderr,
            )
            sleep(wait_s)
    raise AssertionError("unreachable: the last try returns or raises")


def _is_final(error: Exception) -> bool:
    """Whether the hub has answered that the data set, repository or revision does not exist."""
    names = {type(cause).__name__ for cause in causes_of(error)}
    return not names.isdisjoint(_FINAL_ERRORS - {"OfflineModeIsEnabled"})


def _is_transient(error: Exception) -> bool:
    for cause in causes_of(error):
        if type(cause).__name__ in _FINAL_ERRORS:
            return False
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status is not None:
            return status in _TRANSIENT_STATUS
        if (
            isinstance(cause, ConnectionError | TimeoutError)
            or type(cause).__module__.split(".")[0] in _NETWORK_MODULES
        ):
            return True
        # huggingface_hub reports a short body so, as a plain OSError
        if "Consistency check failed" in str(cause):
            return True
    return False


def _retry_after_s(error: Exception) -> float:
    """Seconds the server asked to wait, within reason; 0 where it did not."""
    for cause in causes_of(error):
        headers = getattr(getattr(cause, "response", None), "headers", None) or {}
        text = headers.get("Retry-After") or headers.get("retry-after") or ""
        if text.isdecimal():
            return min(float(text), _LONGEST_WAIT_S)
    return 0.0


@dataclass(frozen=True)
class HubSplit:
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
    """Raised instead of downloading; hub_split: what would be downloaded."""

    def __init__(self, hub_split: HubSplit) -> None:
        super().__init__(f"not downloaded: {hub_split.describe()}")
        self.hub_split = hub_split


def look_up_split(builder: object, dataset_name: str, kind: str, split: str, urls: list[str]) -> HubSplit:
    """What is known of one split from a datasets builder and the URLs of its files, with one more look at the hub."""
    splits = builder.info.splits or {}
    known = splits[split].num_examples if split in splits else None
    return HubSplit(dataset_name, kind, split, len(urls), _bytes_of(urls), known or None)


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
