"""Read and write YAML: it accepts numbers as people write them, and refuses duplicate keys."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from distillery.config.types import EXPONENT_NUMBER
from distillery.system.errors import MissingFileError, UserError


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with those rules."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Refuse a key that stands twice: PyYAML would silently take the last."""
        node = super().compose_mapping_node(anchor)
        first_lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in first_lines:
                raise yaml.MarkedYAMLError(
                    problem=f"key '{key.value}' stands here and on line {first_lines[name]}; keep one",
                    problem_mark=key.start_mark,
                )
            first_lines[name] = line
        return node


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back equal."""


# the dumper too: it must quote exactly the texts that the loader would not read as text
for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT_NUMBER, list("-+.0123456789"))
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
        for first, resolvers in _class.yaml_implicit_resolvers.items()
    }


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: what is wrong with it, and where.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        advice = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
        raise ValueError(f"{place}{error.problem or error.context}{advice}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"no UTF-8 text: {error}") from None


def read_yaml(path: Path, remedy: str) -> dict[str, Any]:
    """The mapping in a YAML file; an empty value for a whole file, lists and repeated keys are errors."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise MissingFileError(f"{path} not found (looked in {path.absolute().parent}). {remedy}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        values = parse_yaml(data)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if values is None:
        raise UserError(f"{path} is empty. {remedy}")
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected lines of the form KEY: VALUE, found a {type(values).__name__}")
    return values


def as_yaml(value: Any) -> str:
    """A value in YAML's flow style, numbers as people write them: 1e-6, [0.1, 0.2], {cls: 1.0}."""
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_yaml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return re.sub(r"e-0", "e-", repr(value)) if isinstance(value, float) else str(value)
