"""The types of configuration values: each has a range, and one error message for a value that does not fit."""

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator

# YAML 1.2 numbers that PyYAML, which follows 1.1, reads as text: 1e-4, 2.5e3
EXPONENT_NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+\Z")
_AREA_RANGE = "two numbers [lo, hi] with 0 < lo <= hi <= 1"


def _number(value: Any) -> Any:
    is_exponent = isinstance(value, str) and EXPONENT_NUMBER.match(value)
    return float(value) if is_exponent else value


def _path_text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _numbers(expected: str, count: int) -> BeforeValidator:
    def convert(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) != count:
            raise ValueError(f"expected {expected}")
        return tuple(value)

    return BeforeValidator(convert)


def _one_message(expected: str) -> WrapValidator:
    def validate(value: Any, handler: Any) -> Any:
        try:
            return handler(value)
        except ValidationError:
            # a union answers with one error for each member
            raise ValueError(f"expected {expected}") from None

    return WrapValidator(validate)


def _ascending(value: tuple[float, float]) -> tuple[float, float]:
    if not 0 < value[0] <= value[1] <= 1:
        raise ValueError(f"expected {_AREA_RANGE}")
    return value


def _of_unit_pixels(values: tuple[float, ...]) -> tuple[float, ...]:
    if max(values) > 1:
        raise ValueError("expected numbers of pixels in 0..1; of pixels in 0..255, divide them by 255")
    return values


def folder_name(name: str) -> str:
    """The name, if it can be a folder's; else ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise ValueError("expected a name of letters, digits, _ and - (it becomes a folder)")
    return name


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[str, Field(min_length=1), BeforeValidator(_path_text)]
FilePatterns = Annotated[
    PathText | list[PathText] | dict[str, PathText | list[PathText]],
    _one_message("a path or pattern, a list of them, or {split: path or list}"),
]
PositiveInt = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Number = Annotated[float, BeforeValidator(_number)]
PositiveNumber = Annotated[Number, Field(gt=0)]
NonNegativeNumber = Annotated[Number, Field(ge=0)]
Share = Annotated[Number, Field(ge=0, le=1)]
Mean = Annotated[tuple[Number, Number, Number], AfterValidator(_of_unit_pixels), _numbers("three numbers [r, g, b]", 3)]
Std = Annotated[
    tuple[PositiveNumber, PositiveNumber, PositiveNumber],
    AfterValidator(_of_unit_pixels),
    _numbers("three numbers > 0 [r, g, b]", 3),
]
AreaRange = Annotated[tuple[Number, Number], AfterValidator(_ascending), _numbers(_AREA_RANGE, 2)]
OutIndices = Annotated[list[int], Field(min_length=1)]
ModelSource = Literal["timm", "torchvision", "torch_hub"]
Choice = Annotated[bool | Literal["auto"], _one_message("auto, true or false")]
StoredSize = Annotated[PositiveInt | Literal["original"], _one_message("a whole number of px, or original")]
Standardisation = Annotated[bool | Literal["phi_s"], _one_message("true, false or phi_s")]


class StrictModel(BaseModel):
    """No unknown keys, no conversions, no changes afterwards, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
