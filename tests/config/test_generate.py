import json
import re
from pathlib import Path

import pytest

from distillery.config.generate import build_schema, find_field, generated_files, schema_name, with_comments
from distillery.config.load import load_configs
from distillery.config.sections import ALIASES, FILE_NAMES, MODELS, SUB_MODELS
from distillery.config.yaml_text import as_yaml, parse_yaml
from distillery.losses.registry import LOSSES

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = [ROOT, ROOT / "examples" / "demo", *sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir())]
READY = FOLDERS[2:]
FORM = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "null": type(None), "array": list,
        "object": dict}  # fmt: skip


def is_of_form(value, name):
    is_number = name in ("integer", "number")
    return isinstance(value, FORM[name]) and not (is_number and isinstance(value, bool))


def accepts(schema, value):
    """What a JSON Schema validator answers, for the words that the generated schemas use."""
    known = {"$schema", "title", "description", "default", "type", "anyOf", "enum", "minimum", "maximum", "minLength",
             "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems", "items", "properties", "required",
             "additionalProperties", "const"}  # fmt: skip
    assert schema.keys() <= known, schema.keys() - known
    types = schema.get("type", [])
    if types and not any(is_of_form(value, name) for name in ([types] if isinstance(types, str) else types)):
        return False
    if "anyOf" in schema and not any(accepts(part, value) for part in schema["anyOf"]):
        return False
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return False
    if isinstance(value, str) and len(value) < schema.get("minLength", 0):
        return False
    if isinstance(value, int | float) and not isinstance(value, bool):
        low, high = schema.get("minimum", value), schema.get("maximum", value)
        over, under = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
        return low <= value <= high and (over is None or value > over) and (under is None or value < under)
    if isinstance(value, list):
        fits = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return fits and all(accepts(schema.get("items", {}), entry) for entry in value)
    if isinstance(value, dict):
        known, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        if others is False and not value.keys() <= known.keys():
            return False
        others = others if isinstance(others, dict) else {}
        return set(schema.get("required", [])) <= value.keys() and all(
            accepts(known.get(key, others), entry) for key, entry in value.items()
        )
    return True


# ---- what is generated -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(generated_files()), ids=lambda path: path.name)
def test_generated_files_are_current(path):
    text = generated_files()[path]
    assert path.exists(), "run: make schemas"
    if path.suffix == ".json":  # the order of a schema's words is pydantic's own affair
        assert json.loads(path.read_text()) == json.loads(text), "run: make schemas"
    else:
        assert path.read_text() == text, "run: make schemas"


@pytest.mark.parametrize("section", MODELS)
def test_a_schema_has_every_key_and_alias_with_meaning_and_default(section):
    properties, fields = build_schema(section)["properties"], MODELS[section].model_fields
    aliases = {alias for alias, name in ALIASES.items() if name in fields}
    assert properties.keys() == fields.keys() | aliases
    for key, schema in properties.items():
        assert schema["description"]
        assert "default" in schema, key
    for name, model in SUB_MODELS.items():
        if name in properties:
            below = properties[name]
            below = below["additionalProperties"] if name == "eval_datasets" else below
            assert below["properties"].keys() == model.model_fields.keys()


def test_comments_come_from_the_keys_and_leave_values_alone():
    text = "# note: a word about batches\nbatch_size: 7   # old\nnum_epochs: 100\nlearning_rate: null\naugment:\n"
    text += "  blur: 0.5\ndistill_loss_weights: {cls: 1}  # hand-made\n  # end\n"
    new = with_comments(text, "train")
    assert parse_yaml(new) == parse_yaml(text)
    assert "old" not in new and "hand-made" not in new and new.endswith("  # end\n")
    assert re.search(r"^batch_size: 7 {2,}# images per process and step \(default 64\)$", new, re.M)
    assert re.search(r"^  blur: 0.5 {2,}# probability 0..1 of a Gaussian blur \(default 0.0\)$", new, re.M)
    # a default is stated where the value differs from it; a comment is the description's first sentence
    assert re.search(r"^num_epochs: 100 {2,}# length of the run in epochs$", new, re.M)
    assert re.search(r"^learning_rate: null {2,}# peak; null: the recipe's rule, printed at the start$", new, re.M)
    assert re.search(r"^augment:$", new, re.M)
    assert new.startswith("# note: a word about batches\n")
    assert with_comments(new, "train") == new


def test_defaults_are_written_as_they_may_be_typed():
    for value in (None, True, 1e-6, 0.5, 3, "auto", (0.1, 2.0), {"cls": 1.0, "b": None}, {}):
        assert parse_yaml(as_yaml(value)) == (list(value) if isinstance(value, tuple) else value)
    assert as_yaml(1e-6) == "1e-6"


def test_names_chosen_by_the_user_are_no_keys():
    assert find_field("train", ["distill_loss_weights", "cls"]) is None
    assert find_field("data", ["eval_datasets", "cifar10"]) is None
    assert find_field("data", ["eval_datasets", "cifar10", "max_train"]) is not None


# ---- the shipped and ready files ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
@pytest.mark.parametrize("section", MODELS)
def test_yaml_files_name_their_schema_and_fit_it(folder, section):
    path = folder / FILE_NAMES[section]
    match = re.match(r"# yaml-language-server: \$schema=(\S+)\n", path.read_text())
    schema = (folder / match[1]).resolve()
    assert schema == ROOT / "schemas" / schema_name(section)
    assert accepts(json.loads(schema.read_text()), parse_yaml(path.read_text()))


@pytest.mark.parametrize(
    "section, values",
    [
        ("data", {"cache_dir": "a"}),
        ("data", {"dataset_name": "a", "cache_dir": "b", "image_size": 0}),
        ("data", {"dataset_name": "a", "cache_dir": "b", "imagesize": 3}),
        ("data", {"dataset_name": "a", "cache_dir": "b", "mean": [1.0, 2.0]}),
        ("train", {"checkpoint_dir": "a", "learning_rate": 0}),
        ("train", {"checkpoint_dir": "a", "ema_decay": 1}),
        ("train", {"checkpoint_dir": "a", "augment": {"blur": 2}}),
        ("train", {"checkpoint_dir": "a", "precision": "float16"}),
        ("model", {"projector": {"type": "conv"}}),
    ],
)
def test_schemas_refuse_what_the_loader_refuses(section, values):
    assert not accepts(build_schema(section), values)


def test_schemas_take_both_names_of_a_key_and_an_empty_heading():
    assert accepts(build_schema("data"), {"dataset_name": "a", "cache_root": "b", "eval_datasets": None})


@pytest.mark.parametrize("folder", READY, ids=lambda path: path.name)
def test_ready_configurations_load_together(folder):
    configs = load_configs(*(folder / FILE_NAMES[section] for section in ("data", "train", "model")))
    assert configs.train.distill_loss_weights.keys() <= LOSSES.keys()
    assert configs.data.eval_datasets, "a ready run can be watched"
    assert configs.data.shards_per_epoch is None and configs.train.max_steps_per_epoch is None


@pytest.mark.parametrize("folder", READY, ids=lambda path: path.name)
def test_ready_configurations_name_models_that_timm_has(folder):
    import timm

    model = load_configs(*(folder / FILE_NAMES[section] for section in ("data", "train", "model"))).model
    for side in ("teacher", "student"):
        assert getattr(model, f"{side}_source") == "timm"
        assert timm.is_model(getattr(model, f"{side}_name"))
    assert timm.models.is_model_pretrained(model.teacher_name)


def test_the_readme_of_the_ready_configurations_lists_each():
    text = (ROOT / "configs" / "README.md").read_text()
    assert re.findall(r"^\| (\w+) \|", text, re.M)[1:] == [
        "cifar10",
        "imagenet_500k_1gpu",
        "imagenet_500k_8gpu",
        "dense",
        "ade20k_voc",
    ]
    assert {path.name for path in READY} == {
        "cifar10",
        "imagenet_500k_1gpu",
        "imagenet_500k_8gpu",
        "dense",
        "ade20k_voc",
    }


def test_the_readme_shows_eight_keys_that_load_together(tmp_path):
    [block] = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    files = re.findall(r"^# (\w+\.yaml).*\n((?:[^#].*\n)*)", block, re.M)
    assert [name for name, _ in files] == list(FILE_NAMES.values())
    for name, text in files:
        (tmp_path / name).write_text(text)
    load_configs(*(tmp_path / FILE_NAMES[section] for section in ("data", "train", "model")))
    assert sum(len(parse_yaml(text)) for _, text in files) == 8
