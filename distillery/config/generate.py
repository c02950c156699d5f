"""Write what follows from the descriptions of the keys: schemas, comments in the YAML files, tables in the docs.

python -m distillery.config.generate      # or: make schemas
"""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from distillery.config.sections import ALIASES, FILE_NAMES, MODELS, REQUIRED_KEYS, SUB_MODELS
from distillery.config.yaml_text import as_yaml, parse_yaml
from distillery.system.errors import EXIT_DONE, run_command
from distillery.system.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
# behind a validator of our own pydantic leaves its limits as they are
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_COMMENT_COLUMN = 40
# a key's line in a YAML file, commented out or not: "  hflip: true      # mirror left-right with probability 0.5"
_KEY_LINE = re.compile(
    r"(?P<start>(?P<hash># )?(?P<indent> *)(?P<key>[a-z_0-9]+):(?: +(?P<value>[^# ][^#]*?))?)(?: *#.*)?\Z"
)
_HEADING = re.compile(r"# -{4} (.*?) -{4,}\Z")
_PAGE = """\
# Configuration

Made from `distillery/config/keys_*.py` by `make schemas`; edit those files, not this one.

- Every key stands in exactly one of the three files; `--set KEY=VALUE` (dots for nesting, YAML for the value) finds it.
- A key left out has its default. An unknown key is an error that names the nearest known one.
- `~` and `$VARIABLES` in paths are expanded when the path is used.
- The first line of the shipped files, `# yaml-language-server: $schema=...`, gives editors with a YAML language server
  (VS Code with the YAML extension, Neovim, Emacs, JetBrains) completion, these texts and errors while typing.
- The comments of the shipped files are the first sentences of the meanings below.
- Ready ones to copy: [configs/](../configs).
"""


def schema_name(section: str) -> str:
    """schemas/<this> for a section: data, train or model."""
    return FILE_NAMES[section].replace(".yaml", ".schema.json")


def build_schema(section: str) -> dict[str, Any]:
    """The JSON Schema (draft 7, what editors know best) of one YAML file.

    The schema covers single keys: types, ranges, choices, defaults, meanings. Only load_configs checks the rules
    between keys.
    """
    model = MODELS[section]
    raw = model.model_json_schema()
    schema = _plain(raw, raw.pop("$defs", {}))
    properties = schema["properties"]
    for key, entry in model.model_fields.items():
        if isinstance(entry.default, dict | BaseModel):
            properties[key]["type"] = ["object", "null"]  # a heading whose keys are all commented out
    required = list(REQUIRED_KEYS.get(section, ()))
    for alias, name in ALIASES.items():
        if name not in properties:
            continue
        properties[alias] = properties[name] | {"description": f"the same as {name}: {properties[name]['description']}"}
        if name in required:
            required.remove(name)
            schema["anyOf"] = [{"required": [name]}, {"required": [alias]}]
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": FILE_NAMES[section]}
    return head | schema | ({"required": required} if required else {})


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    """The schema as draft 7 has it: references written out, lists of one kind of member, no title that is the key."""
    if isinstance(schema, list):
        return [_plain(entry, definitions) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        named = definitions[schema["$ref"].rpartition("/")[2]]
        schema = named | {key: value for key, value in schema.items() if key != "$ref"}
    if "prefixItems" in schema:
        members = schema["prefixItems"]
        assert all(member == members[0] for member in members), "draft 7 knows one kind of member"
        schema = {key: value for key, value in schema.items() if key != "prefixItems"} | {"items": members[0]}
    return {_LIMITS.get(key, key): _plain(value, definitions) for key, value in schema.items() if key != "title"}


def generated_files(root: Path = ROOT) -> dict[Path, str]:
    """Path -> what shall stand there: three schemas, the three YAML files with comments, docs/configuration.md."""
    files = {}
    for section, name in FILE_NAMES.items():
        files[root / "schemas" / schema_name(section)] = json.dumps(build_schema(section), indent=2) + "\n"
        files[root / name] = with_comments((root / name).read_text(), section)
    texts = {section: files[root / name] for section, name in FILE_NAMES.items()}
    files[root / "docs" / "configuration.md"] = configuration_page(texts)
    return files


def main() -> int:
    """Write the files that are not current and say which."""
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text.encode())
            print(f"written: {path.relative_to(ROOT)}")
    return EXIT_DONE


def find_field(section: str, path: list[str]) -> FieldInfo | None:
    """The field of a dotted key, given as its parts; None for names that the user chooses (losses, data sets)."""
    name, *rest = path
    entry = MODELS[section].model_fields.get(name)
    if entry is None or not rest:
        return entry
    if name not in SUB_MODELS:
        return None
    below = rest[1:] if name == "eval_datasets" else rest
    return SUB_MODELS[name].model_fields.get(below[0]) if len(below) == 1 else None


def default_of(section: str, path: list[str], entry: FieldInfo) -> str:
    """ "required", or the default as it would stand in the file."""
    if entry.is_required() or (len(path) == 1 and path[0] in REQUIRED_KEYS.get(section, ())):
        return "required"
    return as_yaml(entry.get_default())


def alias_of(path: list[str]) -> str | None:
    """The other name of a top-level key, if it has one."""
    return next((alias for alias, name in ALIASES.items() if [name] == path), None)


def keys_in(text: str, section: str) -> Iterator[tuple[str, re.Match | None, list[str], FieldInfo | None]]:
    """For each line of a YAML file: the line, its match as a key's line, the key's parts, its field."""
    parents: list[str] = []
    for line in text.splitlines():
        match = _KEY_LINE.match(line)
        if match is None:
            yield line, None, [], None
            continue
        path = [*parents[: len(match["indent"]) // 2], match["key"]]
        if match["hash"] and path[0] not in MODELS[section].model_fields:
            yield line, None, [], None  # prose with a colon
            continue
        parents = path
        yield line, match, path, find_field(section, path)


def with_comments(text: str, section: str) -> str:
    """The YAML file with the comment of every key written anew; its values and all other lines stay."""
    lines, values = [], parse_yaml(text)
    for line, match, path, entry in keys_in(text, section):
        if entry is None or (path[-1] in SUB_MODELS and not match["value"]):
            lines.append(line)  # the keys below a heading such as augment speak for themselves
            continue
        comment = entry.description.partition(". ")[0]
        default = default_of(section, path, entry)
        if not match["hash"] and default not in ("required", as_yaml(functools.reduce(dict.get, path, values))):
            comment += f" (default {default})"
        lines.append(f"{match['start']:{_COMMENT_COLUMN - 2}}  # {comment}")
    return "\n".join(lines) + "\n"


def configuration_page(texts: dict[str, str]) -> str:
    """docs/configuration.md: every key in the order and under the headings of the three files (section -> text)."""
    parts = [_PAGE]
    for section, text in texts.items():
        parts.append(f"\n## {FILE_NAMES[section]}\n")
        for line, _, path, entry in keys_in(text, section):
            if heading := _HEADING.match(line):
                title = heading[1][0].upper() + heading[1][1:]
                parts.append(f"\n### {title}\n\n| key | default | meaning, unit |\n|---|---|---|\n")
            elif entry is not None and not _is_group(path, line):
                name = ".".join(path)
                if path[0] == "eval_datasets" and len(path) > 1:
                    name = ".".join(["eval_datasets", "NAME", *path[2:]])
                parts.append(_row(name, section, path, entry))
    return "".join(parts)


def _is_group(path: list[str], line: str) -> bool:
    """Whether the keys below are listed instead: augment, projector; eval_datasets comes once, with its default."""
    return path[-1] in SUB_MODELS and (path[-1] != "eval_datasets" or line.startswith("#"))


def _row(name: str, section: str, path: list[str], entry: FieldInfo) -> str:
    alias = alias_of(path)
    default = default_of(section, path, entry)
    shown = default if default == "required" else f"`{default}`"
    meaning = entry.description.replace("|", "\\|")
    return f"| `{name}`{f' (`{alias}`)' if alias else ''} | {shown} | {meaning} |\n"


if __name__ == "__main__":
    run_command(main)
