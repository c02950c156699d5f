"""What is derived from the keys in config_keys_*.py: JSON Schemas for editors, the YAML files' comments, the tables.

    python -m distillery.config_schema      # writes what is not current (make schemas)

config_keys_*.py alone say what a key means; after a change there this command carries it everywhere.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from distillery.config_docs import README_BEGIN, README_END, configuration_page, readme_table, with_comments
from distillery.config_keys import ALIASES, FILE_NAMES, MODELS, REQUIRED_KEYS
from distillery.system.errors import EXIT_DONE, UserError, run_command
from distillery.system.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
# behind a validator of our own pydantic leaves its limits as they are
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}


def schema_name(section: str) -> str:
    """schemas/<this> for a section: data, train or model."""
    return FILE_NAMES[section].replace(".yaml", ".schema.json")


def build_schema(section: str) -> dict[str, Any]:
    """The JSON Schema (draft 7, what editors know best) of one YAML file.

    It says what can be said of single keys: types, ranges, choices, defaults, meanings. What holds between keys is
    checked by load_configs only.
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
    """Path -> what shall stand there: three schemas, the three YAML files with comments, docs and README with tables.

    Raises:
        UserError: README.md has lost the marks that the table stands between.
    """
    files = {}
    for section, name in FILE_NAMES.items():
        files[root / "schemas" / schema_name(section)] = json.dumps(build_schema(section), indent=2) + "\n"
        files[root / name] = with_comments((root / name).read_text(), section)
    texts = {section: files[root / name] for section, name in FILE_NAMES.items()}
    files[root / "docs" / "configuration.md"] = configuration_page(texts)
    readme = (root / "README.md").read_text()
    if readme.count(README_BEGIN) != 1 or readme.count(README_END) != 1:
        raise UserError(f"{root / 'README.md'}: expected once each the lines {README_BEGIN} and {README_END}")
    before, rest = readme.split(README_BEGIN)
    after = rest.split(README_END)[1]
    files[root / "README.md"] = f"{before}{README_BEGIN}\n{readme_table()}{README_END}{after}"
    return files


def main() -> int:
    """Write the files that are not current and say which."""
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text.encode())
            print(f"written: {path.relative_to(ROOT)}")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
