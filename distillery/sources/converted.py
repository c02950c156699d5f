"""Files that load_dataset must convert (csv, json, hdf5, ...): its arrow files, and the root of relative paths."""

import glob
import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillery.sources.listing import FileList, check_split
from distillery.sources.tables import Beside
from distillery.system.errors import RunError, UserError

# a conversion by folder has so many parts at most; beyond, relative paths are refused
_MOST_FOLDERS = 1000


@dataclass(frozen=True)
class Converted:
    """One split as arrow files.

    Args:
        files: the arrow files.
        features: what load_dataset says about the columns.
        beside: where the paths in them begin; its identity is that of the files before the conversion.
        has_folders: whether a conversion by_folder would say where relative paths begin, as this one does not.
    """

    files: FileList
    features: dict
    beside: Beside
    has_folders: bool


def convert(
    builder: object,
    dataset_name: str,
    dataset_config: str | None,
    split: str,
    prepare: Callable[[Callable], None],
    *,
    by_folder: bool = False,
) -> Converted:
    """Let load_dataset convert one split.

    Args:
        builder: of datasets, for the whole data set.
        dataset_name: the builder's, as load_dataset takes it.
        dataset_config: the same.
        split: the one that is wanted.
        prepare: calls a function, again while a network fails.
        by_folder: as one part for each folder of files, so that every row's folder is known: paths in a csv or json
            file are meant to begin there. Else it is known where all files lie in one.
    Raises:
        UserError: there is no such split, it has no rows, or it cannot be converted.
        RunError: the network or the disk failed.
    """
    check_split(split, builder.config.data_files or [split], dataset_name)
    urls = [str(url) for url in (builder.config.data_files or {}).get(split, [])]
    parts = _parts_by_folder(urls)
    num_folders = len(parts)
    if by_folder:
        by_part = {f"part{number:05d}": files for number, (_, files) in enumerate(parts)}
        tables = _tables(_builder_of(dataset_name, dataset_config, by_part), dataset_name, list(by_part), prepare)
    else:
        parts = parts if num_folders == 1 else [(None, urls)]
        tables = _tables(builder, dataset_name, [split], prepare)
    paths, folders, shown = [], [], []
    for table, (folder, part) in zip(tables, parts, strict=True):
        if table is not None:
            found = [entry["filename"] for entry in table.cache_files]
            paths += found
            folders += [folder] * len(found)
            # rows keep their numbers where one file became one
            shown += part if len(part) == len(found) == 1 else found
    if not paths:
        raise UserError(f"{dataset_name}: split {split!r} holds no rows.")
    sizes = np.array([os.stat(path).st_size for path in paths], np.int64)
    files = FileList("", [os.path.basename(path) for path in paths], sizes, paths)
    features = next(table.features for table in tables if table is not None).to_dict()
    beside = Beside(folders, shown, _identity(urls, builder.base_path))
    return Converted(files, features, beside, not by_folder and 1 < num_folders <= _MOST_FOLDERS)


def _parts_by_folder(urls: list[str]) -> list[tuple[str | None, list[str]]]:
    """Files in their order, neighbours of one folder together; None for the folder of what is elsewhere."""
    folders = [None if "://" in url else os.path.dirname(os.path.abspath(url)) for url in urls]
    pairs = itertools.groupby(zip(folders, urls, strict=True), key=lambda pair: pair[0])
    return [(folder, [url for _, url in group]) for folder, group in pairs] or [(None, [])]


def _builder_of(dataset_name: str, dataset_config: str | None, data_files: dict[str, list[str]]) -> object:
    import datasets

    patterns = {part: [url if "://" in url else glob.escape(url) for url in urls] for part, urls in data_files.items()}
    return datasets.load_dataset_builder(dataset_name, dataset_config, data_files=patterns)


def _tables(builder: object, dataset_name: str, splits: list[str], prepare: Callable[[Callable], None]) -> list:
    """The converted splits as datasets' Dataset; None for one without rows."""
    try:
        # no_checks: a card speaks of the splits it knows, not of parts
        checks = {} if len(splits) == 1 else {"verification_mode": "no_checks"}
        prepare(lambda: builder.download_and_prepare(**checks))
    except Exception as error:  # load_dataset raises whatever its network and file libraries raise
        is_remote = any("://" in str(url) for urls in (builder.config.data_files or {}).values() for url in urls)
        raise _failure(dataset_name, error, is_remote) from error
    return [builder.as_dataset(split=split) if builder.info.splits[split].num_examples else None for split in splits]


def _failure(dataset_name: str, error: Exception, is_remote: bool) -> Exception:
    """The first cause in one line: what load_dataset itself raises says only that something failed."""
    causes = list(causes_of(error))
    reasons = dict.fromkeys(" ".join(str(cause).split())[:300] for cause in (causes[-1], error) if str(cause).strip())
    is_of_the_disk = any(isinstance(cause, OSError) and cause.errno is not None for cause in causes)
    kind = RunError if is_remote or is_of_the_disk else UserError
    return kind(f"load_dataset could not prepare {dataset_name}: {'; '.join(reasons) or type(error).__name__}")


def causes_of(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def name_in_repository(url: str, base_path: str | None) -> str:
    """hf://datasets/me/x@<sha>/data/a.parquet -> data/a.parquet; for local files, the path below the folder."""
    if url.startswith("hf://"):
        return re.sub(r"^hf://[^@]*@[^/]+/", "", url)
    if "://" in url or not base_path or not os.path.isabs(url):
        return url
    if not Path(url).is_relative_to(base_path):  # load_dataset lists a folder by where its link leads
        base_path = os.path.realpath(base_path)
    return Path(os.path.relpath(url, base_path)).as_posix()


def _identity(urls: list[str], base_path: str | None) -> dict | None:
    """What identifies the files before the conversion; None where they are elsewhere."""
    if not urls or any("://" in url for url in urls):
        return None
    root = base_path or os.path.commonpath([os.path.dirname(url) for url in urls])
    names = [name_in_repository(url, root) for url in urls]
    return FileList("", names, np.array([os.stat(url).st_size for url in urls], np.int64), urls).identity(
        with_ends=True
    )
