"""The train and test split of an evaluation set: rows spread over each split, and one class numbering for both."""

import copy
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from distillery.sources.base import Source
from distillery.system.errors import UserError
from distillery.system.files import sha256_of

# a run of neighbouring rows costs one jump in the file; so many runs reach every class of a sorted ImageNet
_MAX_RUNS = 1000
_SHOWN_NAMES = 5


class PartOfSource(Source):
    """Some rows of another source, with labels of another numbering.

    Args:
        source: the other source.
        rows: ascending row numbers of the source, int64 [N]; None: all of them.
        class_names: the classes by their new numbers, at least all that the source has; None: its own numbers.
    Raises:
        UserError: a label of the source has no name.
    """

    def __init__(
        self, source: Source, *, rows: np.ndarray | None = None, class_names: Sequence[str] | None = None
    ) -> None:
        self._source, self._rows = source, rows
        self._new_numbers: np.ndarray | None = None
        identity = source.identity
        if rows is not None:
            digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
            identity = identity | {"num_rows": len(rows), "rows": f"{len(rows)} of {len(source)}, sha256:{digest}"}
        if class_names is not None:
            position = {name: number for number, name in enumerate(class_names)}
            self._new_numbers = np.array([position[name] for name in source.class_names], np.int64)
            identity = identity | {"classes": f"sha256:{sha256_of(list(class_names))}"}
        self.class_names = source.class_names if class_names is None else list(class_names)
        self.named_by_feature = source.named_by_feature
        super().__init__(identity, source.file_bytes)

    def describe(self) -> str:
        """One line for the plan."""
        line = self._source.describe()
        return line if self._rows is None else f"{line}; {len(self):,} of them, spread over the split"

    def _read(self, start: int, stop: int) -> list[bytes]:
        return [image for run in self._runs(start, stop) for image in self._source.read(*run)]

    def _read_views(self, start: int, stop: int) -> list[bytes | memoryview]:
        return [image for run in self._runs(start, stop) for image in self._source.read_views(*run)]

    def masks(self, start: int, stop: int) -> list[bytes | memoryview] | None:
        """The encoded masks of the rows, as the other source gives them."""
        parts = [self._source.masks(*run) for run in self._runs(start, stop)]
        return None if None in parts else [mask for part in parts for mask in part]

    def _runs(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(first row, row after the last) in the source of each run of neighbours."""
        if self._rows is None:
            return [(start, stop)]
        rows = self._rows[start:stop]
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return [(int(run[0]), int(run[-1]) + 1) for run in runs if len(run)]

    def _all_labels(self) -> np.ndarray | None:
        labels = self._source.labels(0, len(self._source))
        if labels is None:
            return None
        if self._new_numbers is not None:
            if labels.max(initial=-1) >= len(self._new_numbers):
                raise UserError(
                    f"{self._source.describe()}: label {labels.max()} has no name among the "
                    f"{len(self._new_numbers)} class names of its column."
                )
            labels = np.where(labels < 0, labels, self._new_numbers[labels])
        return labels if self._rows is None else labels[self._rows]

    def __getstate__(self) -> dict:
        # copy.copy must open files of its own here too
        return {**super().__getstate__(), "_source": copy.copy(self._source)}


def spread_rows(num_rows: int, limit: int) -> np.ndarray:
    """`limit` of num_rows rows, int64 ascending: up to 1,000 runs of neighbours at equal distances.

    The first rows would not do: a split that is sorted by class has few of its classes there.
    """
    num_runs = min(limit, _MAX_RUNS)
    place = np.arange(limit, dtype=np.int64)
    run = place * num_runs // limit
    return place + run * (num_rows - limit) // num_runs


def number_as(train: Source, test: Source, where: str) -> Source:
    """The test split with its classes numbered as in the train split; classes that only it has follow after those.

    Args:
        train: with labels.
        test: with labels.
        where: names the evaluation set in messages.
    Raises:
        UserError: one split has numbers and the other texts, so that nobody knows which is which.
    """
    names, own = train.class_names, test.class_names
    if names is None and own is None or own is None and train.named_by_feature:
        return test  # numbers in both
    if names is None and test.named_by_feature:
        return test
    if not all(map(_has_a_label, (train, test))):
        return test  # label_warnings says so
    if names is None or own is None:
        kinds = ["numbers" if known is None else "texts" for known in (names, own)]
        raise UserError(
            f"{where}: the labels of train_split are {kinds[0]}, those of test_split {kinds[1]}: which number is which "
            "text is not known. Give both the same kind of labels (label_column)."
        )
    if own == names[: len(own)]:
        return test  # its own numbers are the right ones already
    return PartOfSource(test, class_names=[*names, *(name for name in own if name not in set(names))])


def _has_a_label(source: Source) -> bool:
    return bool((source.labels(0, len(source)) >= 0).any())


def label_warnings(train: np.ndarray, test: np.ndarray, names: Mapping[int, str]) -> list[str]:
    """What makes the accuracy of an evaluation set mean little: images without a label, a class without an example, or
    a single class.

    Args:
        train: int64 [N], labels of the bank, negative where there is none.
        test: int64 [M], likewise.
        names: class number -> name, as far as they are known.
    """
    warnings = []
    for split, labels in (("train", train), ("test", test)):
        if num_absent := int((labels < 0).sum()):
            text = f"{num_absent:,} of the {len(labels):,} images of the {split} split have no label"
            is_useless = num_absent == len(labels)
            warnings.append(text + (": choose a split that has labels" if is_useless else ": they are left out"))
    classes, counts = np.unique(test[test >= 0], return_counts=True)
    if not len(classes):
        return warnings
    if len(classes) == 1:
        name = names.get(int(classes[0]), str(classes[0]))
        warnings.append(f"the test split has a single class, {name!r}: its accuracy says nothing")
    absent = ~np.isin(classes, train)
    if absent.any():
        missing = [repr(names.get(number, str(number))) for number in classes[absent].tolist()]
        listed = ", ".join(missing[:_SHOWN_NAMES]) + (", ..." if len(missing) > _SHOWN_NAMES else "")
        warnings.append(
            f"{len(missing)} of the {len(classes)} classes of the test split have no image in the train split: "
            f"{listed}. Their {counts[absent].sum():,} test images ({counts[absent].sum() / counts.sum():.0%}) count "
            "as wrong for every model"
        )
    return warnings
