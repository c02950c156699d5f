"""What every kind of source shares: the interface, and labels as numbers."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from distillery.system.console import format_bytes
from distillery.system.errors import UserError


class Source(ABC):
    """Encoded images in a fixed order, addressed by global_idx 0..len-1.

    A source pickles small enough to be sent to workers, before and after use: what it has open stays behind and is
    opened again on demand. It is for one thread at a time; copy.copy(source) shares the index and opens its own files.

    Attributes:
        class_names: the classes by label number where they are known, else None.
        named_by_feature: whether these names come from a description of the column, and the labels are numbers.
    """

    class_names: list[str] | None = None
    named_by_feature: bool = False
    # gives the masks in place of the images, row for row; None: opened without masks
    _masks: "Source | None" = None

    def __init__(self, identity: dict, file_bytes: int, left_out: dict[str, int] | None = None) -> None:
        """left_out: counts of what the files hold beside the images, by name; the plan prints them."""
        self._identity = identity
        self._file_bytes = file_bytes
        self._left_out = left_out or {}
        self._handles: dict = {}

    @property
    def identity(self) -> dict:
        """JSON that changes when the rows do: names, sizes and edges of the files; no absolute path, time or host."""
        return self._identity

    @property
    def file_bytes(self) -> int:
        """Bytes of all the files."""
        return self._file_bytes

    def __len__(self) -> int:
        return self._identity["num_rows"]

    def read(self, start: int, stop: int) -> list[bytes]:
        """The encoded images start..stop-1, b"" where there is none. Consecutive calls read the disk sequentially.

        Raises:
            OSError: a file cannot be read; never counted as a bad image.
        """
        self._check_range(start, stop)
        return self._read(start, stop)

    def read_views(self, start: int, stop: int) -> list[bytes | memoryview]:
        """As read, for use at once: what is in memory already need not be copied, and a view keeps all of it there."""
        self._check_range(start, stop)
        return self._read_views(start, stop)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"rows {start} to {stop} of a source of {len(self)}")

    def encoded(self, index: int) -> bytes:
        """One encoded image, b"" where there is none."""
        return self.read(index, index + 1)[0]

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        """int64 [stop - start], -1 where a row has none; None where the source was opened without labels."""
        labels = self._all_labels()
        return None if labels is None else labels[start:stop]

    def masks(self, start: int, stop: int) -> list[bytes | memoryview] | None:
        """The encoded masks of the images start..stop-1, as read_views; None where the source was opened without."""
        return None if self._masks is None else self._masks.read_views(start, stop)

    def describe(self) -> str:
        """One line for the plan."""
        line = describe_source(self._identity | {"bytes": self._file_bytes})
        left_out = ", ".join(f"{number:,} {what}" for what, number in self._left_out.items() if number)
        return f"{line}, {left_out} left out" if left_out else line

    @abstractmethod
    def _read(self, start: int, stop: int) -> list[bytes]: ...

    def _read_views(self, start: int, stop: int) -> list[bytes | memoryview]:
        return self._read(start, stop)

    @abstractmethod
    def _all_labels(self) -> np.ndarray | None: ...

    def __getstate__(self) -> dict:
        # copy.copy must open files of its own for the masks too
        return {**self.__dict__, "_handles": {}, "_masks": copy.copy(self._masks)}


def number_labels(values: Sequence[int | float | str | None], where: str) -> tuple[np.ndarray, list[str] | None]:
    """Labels as int64, -1 for None; texts become the positions of their sorted names, which are returned too.

    Whole numbers kept as floats are integers, NaN is None: so pandas writes a column of integers with one missing.

    Raises:
        UserError: neither all integers nor all texts, or an integer that int64 does not hold.
    """
    values = [_plain_label(value) for value in values]
    given = [value for value in values if value is not None]
    if given and all(isinstance(value, str) for value in given):
        names = sorted(set(given))
        position = {name: number for number, name in enumerate(names)}
        return np.array([position.get(value, -1) for value in values], np.int64), names
    if all(isinstance(value, int) for value in given):
        if given and not -(2**63) <= min(given) <= max(given) < 2**63:
            raise UserError(f"{where}: a label does not fit into 64 bits; number the classes from 0.")
        return np.array([-1 if value is None else value for value in values], np.int64), None
    kinds = ", ".join(sorted({type(value).__name__ for value in given}))
    raise UserError(f"{where}: labels must be all integers or all texts; found {kinds}.")


def _plain_label(value: object) -> object:
    if not isinstance(value, float):
        return value
    if value != value:
        return None
    return int(value) if value.is_integer() else value


class PackedNames:
    """Many short texts as one block of bytes: a list of a million str costs a worker 100 MB."""

    def __init__(self, names: Sequence[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        self._bytes = b"".join(encoded)

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._bytes[start : int(self._ends[index])])


def describe_source(identity: dict) -> str:
    """What a source is, in one line: of its identity, `bytes` of all files added where they are known."""
    count = identity["files"]["count"]
    line = f"{identity['kind']}: {identity['num_rows']:,} images in {count:,} file{'s' * (count != 1)}"
    if (num_bytes := identity.get("bytes", identity["files"].get("bytes"))) is not None:
        line += f" ({format_bytes(num_bytes)})"
    line += f", split {identity['split']!r}"
    for key, name in (
        ("dataset_name", "from"),
        ("revision", "revision"),
        ("image_column", "column"),
        ("mask_column", "masks"),
    ):
        if identity.get(key):
            line += f", {name} {identity[key]}"
    return line
