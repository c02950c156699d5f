"""Find the columns of parquet and arrow files that hold the images and the labels."""

import json
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from distillery.sources.base import number_labels
from distillery.sources.cells import is_bytes, is_list, is_text, plain_type, shorten
from distillery.system.errors import UserError

MASK_NAMES = (
    "mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "segmentation_mask",
    "segmentation_map", "semantic_mask", "seg",
)  # fmt: skip
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class")
_LISTED_COLUMNS = 12
_TYPE_CHARACTERS = 60
# what to take first where image_column is not given; from _WEAK on only what looks like images
_FEATURE, _STRUCT, _BYTES, _FEATURE_TEXT, _WEAK = range(5)


def features_of(schema: object) -> dict:
    """What datasets wrote about the columns: {"img": {"_type": "Image"}, ...}; {} where it wrote nothing readable."""
    try:
        return json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"] or {}
    except (KeyError, TypeError, ValueError):
        return {}


def feature_of(features: dict, name: str | None) -> dict:
    """What is known of one column; {} where that is nothing, or a list of things."""
    feature = features.get(name)
    return feature if isinstance(feature, dict) else {}


def types_of(schemas: Iterable[object]) -> dict:
    """{column: pyarrow type} over all files: the first that is not null, as a file without a value has it."""
    import pyarrow as pa

    kinds: dict = {}
    for schema in schemas:
        for name, kind in zip(schema.names, schema.types, strict=True):
            if name not in kinds or (pa.types.is_null(kinds[name]) and not pa.types.is_null(kind)):
                kinds[name] = kind
    return kinds


def _may_hold_images(kind: object) -> bool:
    """Whether cells.py reads images from this type: bytes, {bytes, path}, text, nulls, lists of these."""
    import pyarrow as pa

    kind = plain_type(kind)
    if pa.types.is_struct(kind):
        # get_field_index: -1 also where there are two of one name
        at_bytes, at_path = kind.get_field_index("bytes"), kind.get_field_index("path")
        if at_bytes >= 0:
            return _may_hold_images(kind.field(at_bytes).type)
        return at_path >= 0 and is_text(plain_type(kind.field(at_path).type))
    if is_list(kind):
        return _may_hold_images(kind.value_type)
    return is_bytes(kind) or is_text(kind) or pa.types.is_null(kind)


def _rank(kind: object, is_image_feature: bool) -> int | None:
    """The place of a column among those that images could be taken from; None where they cannot."""
    import pyarrow as pa

    if not _may_hold_images(kind) or pa.types.is_null(kind):
        return None
    kind = plain_type(kind)
    if is_image_feature:
        return _FEATURE_TEXT if is_text(kind) else _FEATURE
    if pa.types.is_struct(kind):
        return _STRUCT if kind.get_field_index("bytes") >= 0 else _WEAK
    return _BYTES if is_bytes(kind) and not pa.types.is_fixed_size_binary(kind) else _WEAK


def find_image_column(
    kinds: dict, features: dict, wanted: str | None, where: str, look: Callable[[str], str | None]
) -> str:
    """The column to take images from.

    Where it is not given: one of feature type Image before {bytes, path} before bytes; and where that leaves a choice,
    one whose first cells are images. A column of paths or lists is taken where nothing else holds images.

    Args:
        kinds: {column: pyarrow type}.
        features: what datasets wrote about the columns.
        wanted: image_column of the configuration.
        where: a file, for the messages.
        look: what the first cells of a column look like, as cells.evidence_of.
    Raises:
        UserError: it is not there or holds no images, or there are several; the message lists the columns.
    """
    if wanted is None:
        return _choose_image_column(kinds, features, where, look)
    if wanted not in kinds:
        raise UserError(f"{where}: there is no image_column {wanted!r}. The columns are: {_listing(kinds)}.")
    check_image_type(wanted, kinds[wanted], where, kinds)
    return wanted


def find_mask_column(
    kinds: dict,
    features: dict,
    image_column: str | None,
    wanted: str | None,
    where: str,
    look: Callable[[str], str | None],
) -> str:
    """The column to take masks from; arguments as find_image_column.

    Where it is not given: the only one that holds images and has a usual name (MASK_NAMES), else the only one that
    holds images beside the column of the images.

    Args:
        kinds: {column: pyarrow type}.
        features: what datasets wrote about the columns.
        image_column: of the configuration.
        wanted: mask_column of the configuration.
        where: a file, for the messages.
        look: what the first cells of a column look like.
    Raises:
        UserError: it is not there or holds no images, or several could be it; the message lists the columns.
    """
    if wanted is not None:
        if wanted not in kinds or wanted == image_column:
            found = "is the image_column too" if wanted in kinds else "is not there"
            raise UserError(f"{where}: mask_column {wanted!r} {found}. The columns are: {_listing(kinds)}.")
        check_image_type(wanted, kinds[wanted], where, kinds, "mask_column")
        return wanted

    def holds_images(name: str) -> bool:
        rank = _rank(kinds[name], feature_of(features, name).get("_type") == "Image")
        return rank is not None and (look(name) == "image" or (rank < _WEAK and look(name) is None))

    holders = [name for name in kinds if name != image_column and holds_images(name)]
    likely = [name for name in holders if name.lower() in MASK_NAMES]
    if not likely and len(holders) > 1 and image_column is None:
        image_column = find_image_column(kinds, features, None, where, look)
    likely = likely or [name for name in holders if name != image_column]
    if len(likely) == 1 and (image_column is not None or len(holders) > 1):
        return likely[0]
    found = f"several columns may hold the masks: {', '.join(likely)}" if len(likely) > 1 else "no column holds masks"
    raise UserError(f"{where}: {found}. Set mask_column and image_column; the columns are: {_listing(kinds)}.")


def check_image_type(name: str, kind: object, where: str, kinds: dict, key: str = "image_column") -> None:
    """Raise the error that says which types can hold images, unless this is one; key: whose value `name` is."""
    if not _may_hold_images(kind):
        raise UserError(
            f"{where}: {key} {name!r} is {_type_name(kind)}; images are bytes, {{bytes, path}} or paths. "
            f"The columns are: {_listing(kinds)}."
        )


def _choose_image_column(kinds: dict, features: dict, where: str, look: Callable[[str], str | None]) -> str:
    ranks = {name: _rank(kind, feature_of(features, name).get("_type") == "Image") for name, kind in kinds.items()}
    ranks = {name: rank for name, rank in ranks.items() if rank is not None}
    strong = [name for name, rank in ranks.items() if rank < _WEAK]
    if len(strong) == 1 and (ranks[strong[0]] <= _STRUCT or len(ranks) == 1):
        return strong[0]
    looks = {name: look(name) for name in ranks}
    # a column of nulls so far may still be the one
    likely = [name for name in ranks if looks[name] == "image" or (name in strong and looks[name] is None)] or strong
    if not likely:
        urls = [name for name in ranks if looks[name] == "url"]
        hint = f" {urls[0]!r} holds addresses: images must be local, download them first." if urls else ""
        raise UserError(f"{where}: no column holds images.{hint} image_column must be one of: {_listing(kinds)}.")
    best = min(ranks[name] for name in likely)
    likely = [name for name in likely if ranks[name] == best]
    if best > _STRUCT:
        likely = [name for name in likely if looks[name] == "image"] or likely
        if len(likely) > 1:
            raise UserError(
                f"{where}: several columns may hold the images: {_listing({name: kinds[name] for name in likely})}. "
                f"Choose one with image_column: {likely[0]}"
            )
    return likely[0]


def find_label_column(kinds: dict, features: dict, wanted: str | None, required: bool, where: str) -> str | None:
    """The column to take labels from: `wanted`, or if required one of type ClassLabel or with a usual name.

    Raises:
        UserError: it is not there; the message lists the columns.
    """
    if wanted is None and required:
        usual = [name for name in LABEL_NAMES if name in kinds]
        by_feature = [name for name in kinds if feature_of(features, name).get("_type") == "ClassLabel"]
        candidates = [name for name in usual if name in by_feature] + by_feature + usual
        if not candidates:
            raise UserError(f"{where}: no column looks like labels. label_column must be one of: {_listing(kinds)}.")
        wanted = candidates[0]
    if wanted is not None and wanted not in kinds:
        raise UserError(f"{where}: there is no label_column {wanted!r}. The columns are: {_listing(kinds)}.")
    return wanted


def check_columns(
    schemas: dict, path: str, image_column: str, label_column: str | None, mask_column: str | None = None
) -> None:
    """Check one of several files, schemas {path: pyarrow schema}: the columns are there, once, of types that are read.

    Raises:
        UserError: not so; the message names the file.
    """
    schema = schemas[path]
    kinds = dict(zip(schema.names, schema.types, strict=True))
    for name in (image_column, label_column, mask_column):
        if name is None:
            continue
        if name not in kinds:
            owner = next(other for other, there in schemas.items() if name in there.names)
            raise UserError(f"{path}: there is no column {name!r}, which {owner} has.")
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path}: {schema.names.count(name)} columns are called {name!r}. Rename all but one and write the "
                "file again."
            )
    check_image_type(image_column, kinds[image_column], path, kinds)
    if mask_column is not None:
        check_image_type(mask_column, kinds[mask_column], path, kinds, "mask_column")
    if label_column is not None and not _may_be_label(kinds[label_column]):
        raise UserError(
            f"{path}: label_column {label_column!r} is {_type_name(kinds[label_column])}; labels are integers or texts."
        )


def _may_be_label(kind: object) -> bool:
    import pyarrow as pa

    kind = plain_type(kind)
    tests = (pa.types.is_integer, pa.types.is_boolean, pa.types.is_floating, pa.types.is_decimal, pa.types.is_null)
    return is_text(kind) or any(test(kind) for test in tests)


def labels_in(cells: object, where: str) -> list[int | str | None]:
    """The labels of a pyarrow array; whole numbers kept as floats or decimals are integers, NaN is a missing label.

    Raises:
        UserError: a label is no whole number, too large for int64, or no UTF-8.
    """
    import pyarrow as pa

    try:
        values = cells.to_pylist()
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: a label is not UTF-8 text ({error.reason}).") from error
    kind = plain_type(cells.type)
    if is_text(kind) or pa.types.is_signed_integer(kind):
        return values
    return [None if value is None else _integer(value, where) for value in values]


def _integer(value: object, where: str) -> int | None:
    if value != value:
        return None
    try:
        number = int(value)
    except (OverflowError, ValueError):  # infinite
        number = None
    if number != value:
        raise UserError(
            f"{where}: labels must be all integers or all texts; found {type(value).__name__} {shorten(str(value))}. "
            "Round the column, or make texts of it."
        )
    if not -(2**63) <= number < 2**63:
        raise UserError(
            f"{where}: the label {shorten(str(value))} does not fit into 64 bits; number the classes from 0."
        )
    return number


def number_all_labels(
    parts: Sequence[list[int | str | None]], paths: Sequence[str], column: str
) -> tuple[np.ndarray, list[str] | None]:
    """The labels of all files as int64, as number_labels; parts: those of each file.

    Raises:
        UserError: some are integers and some texts; the message names a file of each.
    """
    kinds: dict[type, str] = {}
    for part, path in zip(parts, paths, strict=True):
        for kind in {str if isinstance(value, str) else int for value in part if value is not None}:
            kinds.setdefault(kind, path)
    if len(kinds) > 1:
        raise UserError(
            f"column {column!r}: labels must be all integers or all texts; found int in {kinds[int]} and str in "
            f"{kinds[str]}."
        )
    return number_labels([value for part in parts for value in part], f"column {column!r} of {paths[0]}")


def _type_name(kind: object) -> str:
    name = str(kind)
    return name if len(name) <= _TYPE_CHARACTERS else f"{name[:_TYPE_CHARACTERS]}..."


def _listing(kinds: dict) -> str:
    listed = [f"{shorten(name)[1:-1]} ({_type_name(kind)})" for name, kind in kinds.items()]
    more = f" and {len(listed) - _LISTED_COLUMNS} more" if len(listed) > _LISTED_COLUMNS else ""
    return ", ".join(listed[:_LISTED_COLUMNS]) + more
