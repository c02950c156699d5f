"""Which columns of a parquet or arrow file hold the images and the labels."""

import json

from distillery.process import UserError

LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class")


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


def is_text(kind: object) -> bool:
    """Whether a pyarrow type is text, in any of its layouts."""
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _holds_images(kind: object) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return "bytes" in [field.name for field in kind]
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def find_image_column(schema: object, features: dict, wanted: str | None, where: str) -> str:
    """The column to take images from: `wanted`, the one of feature type Image, or the first of bytes.

    Raises:
        UserError: it is not there or holds no images; the message lists the columns.
    """
    kinds = {field.name: field.type for field in schema}
    if wanted is None:
        by_feature = [name for name in kinds if feature_of(features, name).get("_type") == "Image"]
        candidates = by_feature or [name for name, kind in kinds.items() if _holds_images(kind)]
        if not candidates:
            raise UserError(f"{where}: no column holds images. image_column must be one of: {_listing(kinds)}.")
        wanted = candidates[0]
    if wanted not in kinds:
        raise UserError(f"{where}: there is no image_column {wanted!r}. The columns are: {_listing(kinds)}.")
    if not (_holds_images(kinds[wanted]) or is_text(kinds[wanted])):
        raise UserError(
            f"{where}: image_column {wanted!r} is {kinds[wanted]}; images are bytes, {{bytes, path}} or paths. "
            f"The columns are: {_listing(kinds)}."
        )
    return wanted


def find_label_column(schema: object, features: dict, wanted: str | None, required: bool, where: str) -> str | None:
    """The column to take labels from: `wanted`, or if required one of type ClassLabel or with a usual name.

    Raises:
        UserError: it is not there; the message lists the columns.
    """
    kinds = {field.name: field.type for field in schema}
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


def _listing(kinds: dict) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
