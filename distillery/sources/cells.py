"""Read encoded images from the cells of a column: bytes, {bytes, path}, paths, data URIs, base64, lists of one."""

import base64
import binascii
import errno
import itertools
import os
import re
import stat
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from distillery.sources.listing import IMAGE_SUFFIXES, suffix_of
from distillery.system.errors import MissingFileError, UserError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_DATA_URI = re.compile(r"data:([^,]*),(.*)", re.DOTALL | re.IGNORECASE)
# JPEG (its fourth byte is a marker), PNG, GIF, WEBP, BMP, TIFF, PPM, JPEG 2000, AVIF, ICO
_MAGIC = re.compile(
    rb"\xff\xd8\xff[\xc0-\xfe]|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*"
    rb"|P[1-6][ \t\r\n#]|\0\0\0\x0cjP  |\xff\x4f\xff\x51|....ftypavi[fs]|\x00\x00\x01\x00[\x01-\xff]\x00",
    re.DOTALL,
)
_BASE64_HEAD = re.compile(r"[A-Za-z0-9+/_-]{24}")
# what is so long without a dot was meant as base64, not as a path
_PACKED = re.compile(r"[A-Za-z0-9+/_=\s-]{100,}")
_NO_PATH_ERRNOS = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP)
_SHOWN_CHARACTERS = 80
Encoded = bytes | memoryview


@dataclass(frozen=True)
class Several:
    """What a cell holds that is a list of more than one; first: the first of them."""

    count: int
    first: "Value"


Value = Encoded | str | Several | None


@dataclass(frozen=True)
class Place:
    """Where cells are, for paths and messages.

    Args:
        table: the file they are read from.
        column: their name.
        folder: relative paths begin there; None: the images they name are not on this machine.
    """

    table: str
    column: str
    folder: str | None


def is_text(kind: object) -> bool:
    """Whether a pyarrow type is text, in any of its layouts."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_bytes(kind: object) -> bool:
    """Whether a pyarrow type is bytes, in any of its layouts."""
    import pyarrow as pa

    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    return any(test(kind) for test in tests)


def is_list(kind: object) -> bool:
    """Whether a pyarrow type is a list, in any of its layouts."""
    import pyarrow as pa

    tests = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
             pa.types.is_large_list_view)  # fmt: skip
    return any(test(kind) for test in tests)


def plain_type(kind: object) -> object:
    """A pyarrow type without what only says how its values are kept: extension and dictionary."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.BaseExtensionType):
            kind = kind.storage_type
        elif pa.types.is_dictionary(kind):
            kind = kind.value_type
        else:
            return kind


def values_of(cells: object) -> list[Value]:
    """What each cell of a pyarrow array holds; bytes in place, nothing is read from other files.

    Args:
        cells: bytes, text, a struct of `bytes` and `path` (the bytes come first), all null, or a list, a dictionary or
            an extension of these.
    Raises:
        OSError: lists whose lengths contradict their items.
    """
    import pyarrow as pa

    kind = cells.type
    if isinstance(kind, pa.BaseExtensionType):
        return values_of(cells.storage)
    if pa.types.is_dictionary(kind):
        used = cells.indices.unique().drop_null()
        values = dict(zip(used.to_pylist(), values_of(cells.dictionary.take(used)), strict=True))
        return [values.get(index) for index in cells.indices.to_pylist()]
    if pa.types.is_struct(kind):
        # flatten, not field: only this takes the struct's own nulls and offset into account
        fields = dict(zip([field.name for field in kind], cells.flatten(), strict=True))
        values = values_of(fields["bytes"]) if "bytes" in fields else [None] * len(cells)
        if "path" in fields and is_text(plain_type(fields["path"].type)) and None in values:
            paths = values_of(fields["path"])
            return [path if value is None else value for value, path in zip(values, paths, strict=True)]
        return values
    if is_list(kind):
        return _values_of_lists(cells)
    return _texts(cells) if is_text(kind) else _views(cells)


def _values_of_lists(cells: object) -> list[Value]:
    import pyarrow.compute as pc

    items, lengths = values_of(cells.flatten()), pc.list_value_length(cells).to_pylist()
    edges = [0, *itertools.accumulate(length or 0 for length in lengths)]
    if edges[-1] != len(items):
        raise OSError(f"lists of {edges[-1]} items hold {len(items)}: damaged")
    values: list[Value] = []
    for start, end in itertools.pairwise(edges):
        held = items[start:end]
        values.append(held[0] if len(held) == 1 else Several(len(held), held[0]) if held else None)
    return values


def _texts(cells: object) -> list[str | None]:
    import pyarrow as pa

    try:
        return cells.to_pylist()
    except UnicodeDecodeError:  # a path need not be UTF-8, whatever its column promises
        return [None if text is None else os.fsdecode(text) for text in cells.cast(pa.large_binary()).to_pylist()]


def _views(cells: object) -> list[Encoded | None]:
    """The values of a pyarrow array of bytes, in place; None for nulls."""
    import pyarrow as pa

    if not (pa.types.is_binary(cells.type) or pa.types.is_large_binary(cells.type)) or not len(cells):
        return cells.to_pylist()
    _, starts, data = cells.buffers()
    starts = np.frombuffer(starts, np.int64 if pa.types.is_large_binary(cells.type) else np.int32)
    edges = starts[cells.offset : cells.offset + len(cells) + 1].tolist()
    memory = memoryview(data if data is not None else b"").cast("B")
    views = [memory[start:stop] for start, stop in zip(edges, edges[1:], strict=False)]
    if cells.null_count:
        return [view if valid else None for view, valid in zip(views, cells.is_valid().to_pylist(), strict=True)]
    return views


def images_of(cells: object, place: Place, first_row: int) -> list[Encoded]:
    """The encoded images of a pyarrow array of cells, b"" where there is none.

    Args:
        cells: as values_of takes them.
        place: where they are.
        first_row: the number of the first of them in its file.
    Raises:
        UserError: a cell holds several images, or names one that is no local file.
        OSError: a file that a cell names cannot be read.
    """
    return [
        b"" if value is None else value if isinstance(value, Encoded) else _image_of(value, place, row)
        for row, value in enumerate(values_of(cells), first_row)
    ]


def _image_of(value: str | Several, place: Place, row: int) -> Encoded:
    where = f"{place.table}, row {row}"
    if isinstance(value, Several):
        raise UserError(
            f"{where}: a list of {value.count} images in one cell; one is expected. Give each image a row of its own: "
            f"explode the list (pandas and polars: frame.explode({place.column!r}))."
        )
    if not value.strip():
        return b""
    uri = _DATA_URI.match(value)
    if uri:
        return _from_data_uri(*uri.groups())
    if is_base64_image(value):
        return _from_base64(value)
    if is_url(value):
        raise UserError(
            f"{where}: {shorten(value)} is an address; images must be local. Download them first, then write their "
            "paths or bytes into the column."
        )
    return _read_file(value, place, where)


def is_url(text: str) -> bool:
    """Whether a text is an address elsewhere; file:///a/b.png is a path."""
    return bool(_URL.match(text)) and not text.lower().startswith("file://")


def is_base64_image(text: str) -> bool:
    """Whether a text is base64 that begins like an image; no path with a dot is, nor one in a usual folder."""
    head = "".join(text[:64].split())[:24]
    return bool(_BASE64_HEAD.fullmatch(head)) and bool(_MAGIC.match(_from_base64(head))) and "." not in text


def is_relative_path(value: Value) -> bool:
    """Whether a cell names a file relative to a folder."""
    if not isinstance(value, str) or _DATA_URI.match(value) or _URL.match(value) or is_base64_image(value):
        return False
    return not os.path.isabs(value)


def _from_base64(text: str) -> bytes:
    """The bytes a text stands for, in either alphabet, with line ends and padding or without; itself where in none."""
    packed = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except (binascii.Error, ValueError):  # no image: the row is listed as one that cannot be decoded
        return text.encode(errors="replace")


def _from_data_uri(header: str, data: str) -> bytes:
    """The bytes of data:HEADER,DATA; source: RFC 2397."""
    data_bytes = urllib.parse.unquote_to_bytes(data)
    if header.lower().rstrip().endswith(";base64"):
        return _from_base64(data_bytes.decode(errors="replace"))
    return data_bytes


def _read_file(text: str, place: Place, where: str) -> bytes:
    """The contents of the file that a path names.

    Raises:
        MissingFileError: there is none.
        UserError: it is no file, or cannot be a path.
        OSError: it cannot be read.
    """
    path = text
    if text.lower().startswith("file://"):
        path = urllib.parse.unquote(urllib.parse.urlsplit(text).path)
    if place.folder is None and not os.path.isabs(path):
        raise MissingFileError(
            f"{where}: the path {shorten(text)} is relative, and the images are not in a folder beside the table. "
            "Download the whole data set into one (hf download NAME --repo-type dataset --local-dir FOLDER) and write "
            "dataset_name: FOLDER, or write absolute paths."
        )
    full = os.path.join(place.folder or "", path)
    try:
        # a pipe would wait for a writer, a device never end
        is_file = stat.S_ISREG(os.stat(full).st_mode)
        if is_file:
            with open(full, "rb") as file:
                return file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        if _PACKED.fullmatch(text):
            raise _no_path(text, where) from error
        raise MissingFileError(
            f"{where}: no bytes for an image but its path {shorten(text)}, and there is no file {shorten(full, 300)}."
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_PATH_ERRNOS:
            raise
        raise _no_path(text, where) from error
    raise UserError(f"{where}: the path {shorten(text)} leads to a folder or device; images are files.")


def _no_path(text: str, where: str) -> UserError:
    return UserError(
        f"{where}: the text {shorten(text)} is neither the path of a file nor base64 of an image. Write encoded images "
        "(the bytes of a .png or .jpg file), base64 of these, or paths."
    )


def shorten(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """A cell for a message: quoted, never long."""
    return repr(text if len(text) <= characters else f"{text[: characters - 3]}...")


def evidence_of(values: Sequence[Value]) -> str | None:
    """What most of some values look like: "image" (bytes, or the path of an image file), "url" or "other"; None
    where all are missing.
    """
    kinds = [_kind_of(value) for value in values]
    kinds = [kind for kind in kinds if kind is not None]
    return max(dict.fromkeys(kinds), key=kinds.count) if kinds else None


def _kind_of(value: Value) -> str | None:
    if isinstance(value, Several):
        return _kind_of(value.first)
    if value is None or not len(value):
        return None
    if not isinstance(value, str):
        return "image" if _MAGIC.match(value) else "other"
    if is_url(value):
        return "url"
    is_image = (
        suffix_of(value.strip()) in IMAGE_SUFFIXES or value[:11].lower() == "data:image/" or is_base64_image(value)
    )
    return "image" if is_image else "other"
