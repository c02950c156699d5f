import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from distillery.config import sections
from distillery.config.errors import REPLACED_KEYS
from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.config.keys_train import TrainConfig
from distillery.config.load import (
    Configs,
    check_configs,
    dump_configs,
    load_configs,
    load_data_config,
    load_dumped_configs,
    load_model_config,
    load_train_config,
)
from distillery.config.yaml_text import parse_yaml
from distillery.system.errors import MissingFileError, UserError

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = {section: ROOT / name for section, name in sections.FILE_NAMES.items()}
ALL_SHIPPED = tuple(SHIPPED[section] for section in ("data", "train", "model"))
DATA = {"dataset_name": "some/images", "cache_dir": "cache"}
TRAIN = {"checkpoint_dir": "run"}
LOADERS = {
    "data": lambda values: load_data_config({**DATA, **values}),
    "train": lambda values: load_train_config({**TRAIN, **values}),
    "model": load_model_config,
}
# a key line of a shipped file, commented out or not: "  hflip: true      # mirror left-right with probability 0.5"
KEY_LINE = re.compile(r"^(?P<hash># )?(?P<indent> *)(?P<key>[a-z_0-9]+):(?: [^#]*)?(?P<comment>#.*)?$")


def model_keys(model: type[BaseModel]) -> dict[str, object]:
    """Dotted key -> default, sub-models included; eval_datasets' keys under the example's name."""
    keys = {}
    for key, entry in model.model_fields.items():
        keys[key] = entry.get_default(call_default_factory=True)
        sub_model = sections.SUB_MODELS.get(key)
        if sub_model is not None:
            prefix = f"{key}.cifar10" if key == "eval_datasets" else key
            keys |= {f"{prefix}.{name}": default for name, default in model_keys(sub_model).items()}
    return keys


def file_keys(path: Path) -> dict[str, str]:
    """Dotted key -> the comment after it, as the shipped file has them; a key that is also an example keeps both."""
    comments, parents = {}, []
    for match in filter(None, map(KEY_LINE.match, path.read_text().splitlines())):
        parents = [*parents[: len(match["indent"]) // 2], match["key"]]
        key = ".".join(parents)
        comments[key] = comments.get(key, "") + (match["comment"] or "")
    return comments


def uncommented_example(path: Path) -> str:
    text = re.sub(r"^eval_datasets: .*\n", "", path.read_text(), flags=re.M)
    return re.sub(r"^# (eval_datasets:|  )", r"\1", text, flags=re.M)


# ---- the shipped files -------------------------------------------------------------------------------------


def test_shipped_files_load_together():
    configs = load_configs(*ALL_SHIPPED)
    assert configs.data.dataset_name == "ILSVRC/imagenet-1k"
    assert configs.data.shards_per_epoch == 15
    assert configs.model.teacher_name == "vit_base_patch14_dinov2.lvd142m"


@pytest.mark.parametrize("section", SHIPPED)
def test_shipped_file_names_every_key_and_no_other(section):
    optional_parents = {"eval_datasets.cifar10"}
    expected = set(model_keys(sections.MODELS[section]))
    free_names = {"distill_loss_weights.cls", "distill_loss_weights.patch"}
    assert set(file_keys(SHIPPED[section])) - optional_parents - free_names == expected


@pytest.mark.parametrize("section", SHIPPED)
def test_shipped_comments_state_the_default_exactly_where_the_value_differs_from_it(section):
    model, comments = sections.MODELS[section], file_keys(SHIPPED[section])
    values = model_keys(model) | model.model_validate(parse_yaml(SHIPPED[section].read_bytes())).model_dump()
    for key, default in model_keys(model).items():
        if isinstance(default, BaseModel):
            continue
        assert comments[key].startswith("# "), key
        stated = re.findall(r"\(default (.*)\)$", comments[key])
        is_required = key in sections.REQUIRED_KEYS.get(section, ())
        assert [parse_yaml(text) for text in stated] == (
            [default] if values[key] != default and not is_required else []
        )


@pytest.mark.parametrize("section", SHIPPED)
def test_shipped_values_differ_from_the_defaults_only_where_meant(section):
    model = sections.MODELS[section]
    values = model.model_validate(parse_yaml(SHIPPED[section].read_bytes()))
    differing = {key for key, entry in model.model_fields.items() if getattr(values, key) != entry.get_default()}
    meant = {
        "data": {"dataset_name", "cache_dir", "shards_per_epoch"},
        "train": {"checkpoint_dir"},
        "model": set(),
    }
    assert differing == meant[section]


def test_commented_example_of_eval_datasets_loads(tmp_path):
    path = tmp_path / "data_config.yaml"
    path.write_text(uncommented_example(SHIPPED["data"]))
    evaluated = load_data_config(path).eval_datasets
    assert list(evaluated) == ["cifar10"]
    assert evaluated["cifar10"].label_column == "label"


@pytest.mark.parametrize("path", ALL_SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_short_enough_to_edit(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 75
    assert max(map(len, lines)) <= 112


# ---- the models --------------------------------------------------------------------------------------------


def test_keys_of_the_three_files_are_disjoint():
    names = {section: set(model.model_fields) for section, model in sections.MODELS.items()}
    for one, other in itertools.combinations(names, 2):
        assert not names[one] & names[other]
    assert not set(sections.ALIASES) & set().union(*names.values())
    assert set(sections.ALIASES.values()) <= set().union(*names.values())


@pytest.mark.parametrize("model", [*sections.MODELS.values(), *sections.SUB_MODELS.values()])
def test_every_field_has_a_description_and_a_json_schema(model):
    assert all(entry.description for entry in model.model_fields.values())
    assert set(json.loads(json.dumps(model.model_json_schema()))["properties"]) == set(model.model_fields)


def test_sub_models_are_listed_for_their_unknown_key_messages():
    nested = set()
    for model in sections.MODELS.values():
        for key, entry in model.model_fields.items():
            if re.search(r"#/\$defs/(?!JsonValue)", json.dumps(model.model_json_schema()["properties"][key])):
                nested.add(key)
            assert not isinstance(entry.default, BaseModel) or type(entry.default) is sections.SUB_MODELS[key]
    assert nested == set(sections.SUB_MODELS)


@pytest.mark.parametrize("key", ["learning_rate", "min_lr", "weight_decay"])
@pytest.mark.parametrize("text, value", [("1e-4", 1e-4), ("1", 1.0), ("2.5e-3", 2.5e-3), ("1E-5", 1e-5), ("0.5", 0.5)])
def test_floats_may_be_written_as_in_python(tmp_path, key, text, value):
    path = tmp_path / "train.yaml"
    path.write_text(f"{key}: {text}\n")
    loaded = getattr(load_train_config(path, require_checkpoint_dir=False), key)
    assert loaded == value
    assert type(loaded) is float


def test_exponent_number_of_plain_pyyaml_is_a_float():
    values = yaml.safe_load("learning_rate: 1e-4\naugment: {random_resized_crop: [1e-1, 1]}")
    assert values["learning_rate"] == "1e-4"
    train = load_train_config({**TRAIN, **values})
    assert train.learning_rate == 1e-4
    assert train.augment.random_resized_crop == (0.1, 1.0)


def test_exponent_numbers_inside_free_options_are_numbers_too(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_text("checkpoint_dir: run\nloss_options: {cls: {eps: 1e-8}}\n")
    assert load_train_config(path).loss_options == {"cls": {"eps": 1e-8}}


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        ("data", "image_size", "64", 'image_size: expected a valid integer, found "64"; remove the quotes'),
        ("data", "image_size", 64.0, "image_size: expected a valid integer, found 64.0"),
        ("data", "image_size", True, "image_size: expected a valid integer, found true"),
        ("data", "image_size", 0, "image_size: expected greater than 0, found 0"),
        ("data", "image_size", None, "image_size: expected a valid integer, found null"),
        ("data", "cache_shard_size", -1, "greater than 0"),
        ("data", "max_samples", 0, "greater than 0"),
        ("data", "max_shards", 0, "greater than 0"),
        ("data", "shards_per_epoch", 0, "null: all of them"),
        ("data", "num_workers", -1, "greater than or equal to 0"),
        ("data", "prefetch_batches", 0, "greater than 0"),
        ("data", "random_subset_seed", -1, "greater than or equal to 0"),
        ("data", "random_subset_seed", 2**63, "less than"),
        ("data", "run_bytes", 0, "greater than 0"),
        ("data", "max_failed_fraction", 1.5, "less than or equal to 1"),
        ("data", "pin_memory", 1, "pin_memory: expected a valid boolean, found 1"),
        ("data", "use_cached", "true", "remove the quotes"),
        ("data", "split", 5, "split: expected a valid string, found 5; put it in quotes"),
        ("data", "split", "", "at least 1 character"),
        ("data", "mean", [0.5, 0.5], r"mean: expected three numbers \[r, g, b\], found \[0.5, 0.5\]"),
        ("data", "mean", 0.5, "expected three numbers"),
        ("data", "mean", [123.7, 116.3, 103.5], "expected numbers of pixels in 0..1; of pixels in 0..255, divide"),
        ("model", "teacher_std", [58.4, 57.1, 57.4], "expected numbers of pixels in 0..1; of pixels in 0..255, divide"),
        ("data", "stored_size", "orig", "stored_size: expected a whole number of px, or original, found .orig."),
        ("data", "mean", [0.5, 0.5, "a"], "mean.2: expected a valid number"),
        ("data", "std", [0.2, 0.0, 0.2], "std.1: expected greater than 0"),
        ("data", "resize_mode", "pad", "resize_mode: expected 'squash' or 'crop', found \"pad\""),
        ("data", "interpolation", "nearest", "'bilinear', 'bicubic' or 'lanczos'"),
        ("data", "cache_dtype", "float64", "'float32', 'float16', 'bfloat16', 'uint8' or 'jpeg'"),
        ("data", "shard_subset_mode", "random", "'cycle', 'independent' or 'fixed'"),
        ("data", "shuffle", True, "'block' or 'none'"),
        ("data", "data_files", 3, "a path or pattern, a list of them"),
        ("data", "eval_datasets", {"../x": {"dataset_name": "a"}}, "it becomes a folder"),
        ("data", "eval_datasets", {"x": {}}, "eval_datasets.x.dataset_name is required"),
        ("data", "eval_datasets", {"x": {"dataset_name": "a", "max_train": 0}}, "eval_datasets.x.max_train"),
        ("train", "batch_size", 0, "greater than 0"),
        ("train", "learning_rate", 0, "the recipe's rule"),
        ("train", "learning_rate", "0.1", "remove the quotes"),
        ("train", "learning_rate", True, "found true"),
        ("train", "learning_rate", float("nan"), "finite number"),
        ("train", "weight_decay", float("inf"), "finite number"),
        ("train", "min_lr", -1e-6, "greater than or equal to 0"),
        ("train", "max_grad_norm", 0, "null: no clipping"),
        ("train", "ema_decay", 1, "less than 1"),
        ("train", "seed", -1, "greater than or equal to 0"),
        ("train", "keep_checkpoints", 0, "greater than 0"),
        ("train", "precision", "float16", "'auto', 'bf16', 'fp16' or 'fp32'"),
        ("train", "distill_loss_weights", {"cls": 0.0}, "at least one weight > 0"),
        ("train", "distill_loss_weights", {"cls": 1, "patch": -1}, "distill_loss_weights.patch: expected greater than"),
        ("train", "loss_options", {"kl": {"temperature": 2}}, "loss_options.kl: distill_loss_weights has no 'kl'"),
        ("train", "augment", {"color_jitter": 2}, "augment.color_jitter"),
        ("train", "augment", {"random_resized_crop": [0.5, 0.2]}, "0 < lo <= hi <= 1"),
        ("train", "augment", {"random_resized_crop": [0, 1]}, "0 < lo <= hi <= 1"),
        ("train", "augment", {"random_resized_crop": [0.5, 1.1]}, "0 < lo <= hi <= 1"),
        ("train", "augment", {"random_resized_crop": 0.5}, "0 < lo <= hi <= 1"),
        ("model", "teacher_freeze", False, "expected true: the teacher never learns"),
        ("model", "drop_path_rate", 1, "less than 1"),
        ("model", "teacher_source", "hub", "'timm', 'torchvision' or 'torch_hub'"),
        ("model", "teacher_source", "torch_hub", "needs teacher_repo"),
        ("model", "student_repo", "folder", "student_repo is read with student_source: torch_hub only"),
        ("model", "student_mean", [0, 0, 0], "student_mean and student_std go together"),
        ("model", "projector", {"type": "conv"}, "projector.type: expected 'linear' or 'mlp'"),
        ("model", "teacher_kwargs", {"a": (1, 2)}, "teacher_kwargs.a"),
    ],
)
def test_wrong_value_is_refused_with_what_was_expected(section, key, value, message):
    with pytest.raises(UserError, match=message):
        LOADERS[section]({key: value})


def test_a_projection_into_text_space_is_timms_alone():
    with pytest.raises(UserError, match="teacher_projection is read with teacher_source: timm only, found torchvision"):
        load_model_config({"teacher_projection": True, "teacher_source": "torchvision"})


ODD_SCALARS = [None, True, 3, -1.5, 10**30, float("nan"), "x", "", b"x", object()]
ODD_VALUES = [*ODD_SCALARS, [], [1, [2]], {}, {"a": 1}, {1: {2: 3}}]


@pytest.mark.parametrize("section, key", [(s, key) for s, m in sections.MODELS.items() for key in model_keys(m)])
def test_any_value_of_any_key_loads_or_is_a_user_error(section, key):
    refused = 0
    for value in ODD_VALUES:
        *parents, last = key.split(".")
        values = {last: value} if parents[:1] != ["eval_datasets"] else {"dataset_name": "a", last: value}
        for parent in reversed(parents):
            values = {parent: values}
        try:
            LOADERS[section](values)
        except UserError as error:
            assert last in str(error)
            refused += 1
    assert refused > 0


def test_cross_field_rules():
    assert load_train_config({**TRAIN, "learning_rate": 1e-6}).min_lr == 1e-6
    with pytest.raises(UserError, match="min_lr .* is above learning_rate"):
        load_train_config({**TRAIN, "learning_rate": 1e-7})
    assert load_data_config({**DATA, "run_bytes": 8, "window_bytes": 8}).window_bytes == 8
    with pytest.raises(UserError, match="window_bytes .* is smaller than run_bytes"):
        load_data_config({**DATA, "run_bytes": 8, "window_bytes": 7})


@pytest.mark.parametrize(
    "values, message",
    [
        ({"stored_size": 256}, "stored_size: only with cache_dtype: jpeg, and this is float32"),
        ({"jpeg_quality": 80, "cache_dtype": "uint8"}, "jpeg_quality: only with cache_dtype: jpeg, and this is uint8"),
        ({"cache_dtype": "jpeg", "stored_size": 200}, r"stored_size \(200\) is smaller than image_size \(224\)"),
        ({"cache_dtype": "jpeg", "stored_size": "original", "jpeg_quality": 80}, "nothing is encoded"),
        ({"stage_gb": 100}, "stage_gb: only with stage_dir"),
    ],
)
def test_keys_of_jpeg_rows_and_of_the_stage_go_together(values, message):
    with pytest.raises(UserError, match=message):
        load_data_config({**DATA, **values})


def test_accepted_forms_of_flexible_keys():
    assert load_data_config({**DATA, "data_files": {"train": ["a", "b"], "test": "c"}}).data_files["test"] == "c"
    assert load_data_config({**DATA, "data_files": ["a", "b"]}).data_files == ["a", "b"]
    assert load_data_config({**DATA, "std": [1, 1, 1]}).std == (1.0, 1.0, 1.0)
    assert load_model_config({"teacher_freeze": True}).teacher_freeze is True
    assert load_model_config({"teacher_source": "torch_hub", "teacher_repo": "folder"}).teacher_repo == "folder"


def test_pathlib_paths_are_taken_as_text(tmp_path):
    data = load_data_config({**DATA, "cache_dir": tmp_path, "data_files": {"train": tmp_path / "a.parquet"}})
    assert data.cache_dir == str(tmp_path)
    assert data.data_files == {"train": str(tmp_path / "a.parquet")}


def test_paths_stay_as_written_and_expand_on_demand(monkeypatch):
    monkeypatch.setenv("PLACE", "/somewhere")
    data = load_data_config({**DATA, "cache_dir": "$PLACE/cache"})
    train = load_train_config({"checkpoint_dir": "~/run"})
    assert data.cache_dir == "$PLACE/cache"
    assert data.cache_path == Path("/somewhere/cache")
    assert train.checkpoint_path == Path(os.path.expanduser("~/run"))


@pytest.mark.parametrize("num_workers, workers", [(None, 11), (0, 1), (1, 1), (3, 3)])
def test_no_number_of_workers_is_every_cpu_and_0_counts_as_1(monkeypatch, num_workers, workers):
    monkeypatch.setattr("distillery.config.keys_data.usable_cpus", lambda: 11)
    assert load_data_config({**DATA, "num_workers": num_workers}).workers == workers


def test_expanding_a_missing_folder_says_which_key():
    with pytest.raises(UserError, match="cache_dir is required"):
        _ = load_data_config({"dataset_name": "x"}, require_source=False).cache_path
    with pytest.raises(UserError, match="checkpoint_dir is required"):
        _ = load_train_config({}, require_checkpoint_dir=False).checkpoint_path


# ---- keys that are missing, unknown, replaced or doubled ---------------------------------------------------


def test_required_keys_are_named_with_their_meaning():
    with pytest.raises(UserError, match="(?s)dataset_name is required: hub id.*cache_dir is required: folder"):
        load_data_config({})
    with pytest.raises(UserError, match="checkpoint_dir is required: the run's folder"):
        load_train_config({})
    with pytest.raises(UserError, match="cache_dir is required"):
        load_data_config({**DATA, "cache_dir": None})
    assert load_model_config({}) == ModelConfig()


def test_partial_dicts_load_where_the_rest_is_not_needed():
    assert load_train_config({}, require_checkpoint_dir=False) == TrainConfig()
    assert load_data_config({"cache_dir": "c"}, require_source=False) == DataConfig(cache_dir="c")
    assert load_data_config({"dataset_name": "d"}, require_source=False) == DataConfig(dataset_name="d")
    with pytest.raises(UserError, match="cache_dir .* or dataset_name .* is required"):
        load_data_config({}, require_source=False)


def test_misspelt_key_of_a_file_reads_as_the_contract_promises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data_config.yaml").write_text("dataset_name: a\ncache_dir: b\nshard_per_epoch: 3\n")
    with pytest.raises(UserError) as caught:
        load_data_config("data_config.yaml")
    assert str(caught.value) == "data_config.yaml: unknown key 'shard_per_epoch'; did you mean 'shards_per_epoch'?"


@pytest.mark.parametrize(
    "section, values, message",
    [
        ("data", {"Image_Size": 3}, "unknown key 'Image_Size'; did you mean 'image_size'"),
        ("data", {"zzz": 1}, "unknown key 'zzz'; known keys: dataset_name, dataset_config"),
        ("data", {7: 1}, "unknown key '7'; known keys: dataset_name"),
        ("data", {"batch_size": 1}, "batch_size'; it belongs in train_config_kd.yaml, the file of --train_config"),
        ("data", {"batchsize": 1}, "did you mean 'batch_size' of train_config_kd.yaml"),
        ("train", {"cache_root": "x"}, "cache_root'; it belongs in data_config.yaml, the file of --data_config"),
        ("model", {"projector": {"hiden_dim": 3}}, "unknown key 'projector.hiden_dim'; did you mean 'hidden_dim'"),
        ("train", {"augment": {"q": 3}}, "unknown key 'augment.q'; known keys there: hflip, random_resized_crop"),
        ("data", {"eval_datasets": {"x": {"dataset_name": "a", "max_tran": 1}}}, "did you mean 'max_train'"),
        ("data", {"eval_datasets": {3: {"dataset_name": "a"}}}, "eval_datasets.3: .*string.*found 3"),
    ],
)
def test_unknown_key_gets_the_nearest_known_one(section, values, message):
    with pytest.raises(UserError, match=message):
        LOADERS[section](values)


PREDECESSOR_KEYS = {
    "data": "persistent_workers cache_image_size use_multi_crop num_crops drop_last cache_format shuffle_buffer_size",
    "train": "lr epochs resume_from use_amp mixed_precision amp compile_model use_compile torch_compile channels_last "
    "use_ssl ssl ssl_weight warmup_steps gradient_accumulation_steps grad_clip temperature save_interval output_dir",
    "model": "teacher_model student_model teacher_dim student_dim projection_dim freeze_teacher hidden_dim",
}


@pytest.mark.parametrize(
    "section, key", [(section, key) for section, keys in PREDECESSOR_KEYS.items() for key in keys.split()]
)
def test_key_of_the_predecessor_says_what_took_its_place_in_whichever_file_it_stands(section, key):
    with pytest.raises(UserError, match=f"key '{key}' is gone: [^;]+"):
        LOADERS[section]({key: 1})
    elsewhere = "train" if section != "train" else "data"
    with pytest.raises(UserError, match=f"key '{key}' is gone: .*; see {sections.FILE_NAMES[section]}"):
        LOADERS[elsewhere]({key: 1})


def test_replacements_name_only_keys_that_exist():
    known = {key for model in sections.MODELS.values() for key in model_keys(model)}
    others = {"distill_trainer", "kl_logits", "resume_from"}
    words = {
        word
        for replaced in REPLACED_KEYS.values()
        for message in replaced.values()
        for word in re.findall(r"[a-z]+(?:_[a-z]+)+", message)
    }
    assert words - others <= known | {key.split(".")[-1] for key in known}


@pytest.mark.parametrize("alias, name", sections.ALIASES.items())
def test_alias_is_the_key_and_both_names_may_only_agree(alias, name):
    one, other = {"cache_root": ("a", "b"), "use_cached_tensors": (True, False), "prefetch_factor": (2, 8)}[alias]
    values = {key: value for key, value in DATA.items() if key != name}
    assert getattr(load_data_config({**values, alias: one}), name) == one
    assert getattr(load_data_config({**values, alias: one, name: one}), name) == one
    assert getattr(load_data_config({**values, alias: one, name: None}), name) == one
    assert getattr(load_data_config({**values, alias: None, name: one}), name) == one
    with pytest.raises(UserError, match=f"'{name}' and '{alias}' are one key under two names and differ"):
        load_data_config({**values, alias: one, name: other})


def test_all_problems_of_all_files_come_in_one_error_one_line_each():
    with pytest.raises(UserError) as caught:
        load_configs(
            {"image_size": 0, "zzz": 1}, {"batch_size": 0, "lr": 1}, {"projector": {"type": 1}}, ["foo", "seed=-1"]
        )
    lines = str(caught.value).splitlines()
    assert len(lines) == 10
    assert sorted({line.split(":")[0] for line in lines}) == [
        "--set", "--set foo", "data_config", "model_config_kd", "train_config_kd",
    ]  # fmt: skip


# ---- the files as text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"c\.yaml is empty"),
        ("# only a comment\n", r"c\.yaml is empty"),
        ("- a\n- b\n", "expected lines of the form KEY: VALUE, found a list"),
        ("just words\n", "found a str"),
        ("cache_dir: a\nmean: [0.1, 0.2\nsplit: x\n", r"c\.yaml: line 3, column \d+: "),
        ("cache_dir: a\n\tsplit: x\n", "line 2.*indent with spaces"),
        ("cache_dir: a\nsplit: x\ncache_dir: b\n", "line 3, column 1: key 'cache_dir' stands here and on line 1"),
        ("eval_datasets:\n  x: {dataset_name: a, dataset_name: a}\n", "line 2.*key 'dataset_name' stands here"),
        ("a: 1\n---\nb: 2\n", "line 2.*document"),
        ("cache_dir: !!python/object/apply:os.getcwd []\n", "line 1.*python/object"),
    ],
)
def test_damaged_file_is_one_message_with_its_line(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_data_config(path)


def test_file_that_is_no_text_is_a_message(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"cache_dir: \xff\xfe\n")
    with pytest.raises(UserError, match="no UTF-8 text"):
        load_data_config(path)
    with pytest.raises(UserError, match="cannot be read"):
        load_data_config(tmp_path)


def test_missing_file_says_what_to_type(tmp_path):
    with pytest.raises(MissingFileError, match=r"train.yaml not found.*cp .*train_config_kd\.yaml .*train\.yaml"):
        load_train_config(tmp_path / "train.yaml")


def test_heading_whose_keys_are_all_commented_out_keeps_its_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("checkpoint_dir: a\naugment:\n  # hflip: false\nloss_options:\n")
    assert load_train_config(path) == TrainConfig(checkpoint_dir="a")


def test_date_stays_text(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("dataset_name: a\ncache_dir: b\ndataset_revision: 2024-02-31\n")
    assert load_data_config(path).dataset_revision == "2024-02-31"


# ---- --set -------------------------------------------------------------------------------------------------


def test_overrides_find_their_file_and_are_read_as_yaml():
    configs = load_configs(
        *ALL_SHIPPED,
        overrides=[
            "image_size=96",
            "mean=[0.5, 0.5, 0.5]",
            "learning_rate=1e-3",
            "augment.hflip=false",
            "augment.random_resized_crop=[0.4, 1]",
            "student_kwargs.patch_size=4",
            "cache_root=/other",
            "data_files.train=a=b.parquet",
            "eval_datasets.tiny.dataset_name=some/set",
            "eval_datasets.tiny.max_test=5",
            "shards_per_epoch=",
            "batch_size=1",
            "batch_size=32",
        ],
    )
    assert configs.data.image_size == 96
    assert configs.data.mean == (0.5, 0.5, 0.5)
    assert configs.data.cache_dir == "/other"
    assert configs.data.data_files == {"train": "a=b.parquet"}
    assert configs.data.eval_datasets["tiny"].max_test == 5
    assert configs.data.shards_per_epoch is None
    assert configs.train.learning_rate == 1e-3
    assert configs.train.augment.random_resized_crop == (0.4, 1.0)
    assert configs.train.augment.hflip is False
    assert configs.train.batch_size == 32
    assert configs.model.student_kwargs == {"patch_size": 4}


def test_nested_override_keeps_the_default_neighbours():
    train = load_train_config(TRAIN, ["distill_loss_weights.patch=0.1"])
    assert train.distill_loss_weights == {"cls": 1.0, "patch": 0.1}
    assert load_train_config(TRAIN).distill_loss_weights == {"cls": 1.0, "patch": 2.0}


def test_overrides_leave_the_callers_dict_alone():
    values = {**TRAIN, "augment": {"hflip": True}}
    load_train_config(values, ["augment.hflip=false", "seed=3"])
    assert values == {**TRAIN, "augment": {"hflip": True}}


def test_overrides_work_on_a_finished_config():
    data = load_data_config(DATA)
    assert load_data_config(data) == data
    assert load_data_config(data, ["image_size=32"]).image_size == 32
    assert data.image_size == 224


@pytest.mark.parametrize(
    "override, message",
    [
        ("foo", "--set foo: expected KEY=VALUE"),
        ("=3", "expected KEY=VALUE"),
        ("augment..x=3", "expected KEY=VALUE"),
        ("image_sise=3", "--set image_sise=3: unknown key 'image_sise'; did you mean 'image_size'"),
        ("zzz=3", "unknown key 'zzz'; known keys: dataset_name.*batch_size.*teacher_name"),
        ("lr=3", "--set lr=3: key 'lr' is gone: use learning_rate"),
        ("batch_size=3", "'batch_size' belongs in train_config_kd.yaml, which this command was not given"),
        ("max_samples=[", "the value is no YAML"),
        ("split.x=3", "'split' is \"train\" and has no keys of its own"),
        ("image_size=abc", '--set: image_size: expected a valid integer, found "abc"'),
        ("eval_datasets.x.max_train=3", "data_config: eval_datasets.x.dataset_name is required"),
    ],
)
def test_wrong_override_is_named_as_such(override, message):
    with pytest.raises(UserError, match=message):
        load_configs({**DATA, "split": "train"}, overrides=[override])


def test_error_beside_an_override_is_blamed_on_the_file():
    with pytest.raises(UserError, match="^train_config_kd: augment.blur: expected a valid number"):
        load_train_config({**TRAIN, "augment": {"blur": "much"}}, ["augment.hflip=false"])


# ---- all three together, dump and load ---------------------------------------------------------------------


def test_train_and_model_may_be_absent():
    configs = load_configs(DATA)
    assert (configs.train, configs.model) == (None, None)
    assert set(configs.as_dict()) == {"data"}


@pytest.mark.parametrize(
    "data, train, message",
    [
        ({"shards_per_epoch": 3, "max_shards": 2}, {}, r"shards_per_epoch \(3\) is above max_shards \(2\)"),
        ({"max_samples": 10}, {"batch_size": 11}, "no epoch has a full batch"),
    ],
)
def test_combination_that_must_fail_is_refused(data, train, message):
    with pytest.raises(UserError, match=message):
        load_configs({**DATA, **data}, {**TRAIN, **train})


def test_combinations_at_the_limit_pass():
    check_configs(Configs(load_data_config({**DATA, "use_cached": False})))
    load_configs({**DATA, "shards_per_epoch": 3, "max_shards": 3, "max_samples": 10}, {**TRAIN, "batch_size": 10})


def test_dumped_configuration_loads_back_equal(tmp_path):
    configs = load_configs(
        *ALL_SHIPPED,
        overrides=[
            "cache_dir=$HOME/ü",
            "dataset_revision='1e5'",
            "dataset_config='2024-01-01'",
            "split='null'",
            "max_failed_fraction=1e-7",
            "loss_options={cls: {eps: 1e-8, name: '1e-8', flags: [true, null, 'no']}}",
            "augment.random_resized_crop=[0.25, 1]",
            "eval_datasets.x={dataset_name: parquet, data_files: {train: [a, b], test: c}}",
            "teacher_mean=[0, 0, 0]",
            "teacher_std=[1, 1, 1]",
        ],
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_configs(configs), encoding="utf-8")
    again = load_dumped_configs(path)
    assert again == configs
    assert again.as_dict() == configs.as_dict()
    assert dump_configs(again) == dump_configs(configs)


def test_partial_configuration_round_trips(tmp_path):
    path = tmp_path / "config.yaml"
    for configs in (Configs(DataConfig(cache_dir="c")), Configs(load_data_config(DATA), TrainConfig())):
        path.write_text(dump_configs(configs))
        assert load_dumped_configs(path) == configs


def test_what_is_no_dump_is_refused(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(MissingFileError, match="Name a run folder"):
        load_dumped_configs(path)
    path.write_text("cache_dir: x\n")
    with pytest.raises(UserError, match="expected the sections data, train, model, found cache_dir"):
        load_dumped_configs(path)
    path.write_text("data: {image_sise: 3}\n")
    with pytest.raises(UserError, match="config.yaml: data: unknown key 'image_sise'; did you mean 'image_size'"):
        load_dumped_configs(path)
    path.write_text("data: {}\ntrain: 3\n")
    with pytest.raises(UserError, match="config.yaml: train: expected keys"):
        load_dumped_configs(path)


def test_as_dict_is_plain_json():
    plain = load_configs(*ALL_SHIPPED).as_dict()
    assert json.loads(json.dumps(plain)) == plain


def test_import_brings_neither_torch_nor_numpy():
    code = "import sys, distillery.config; print(sorted({'torch', 'numpy', 'datasets', 'timm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "entry, found",
    [
        ({"ignore_index": 0}, "ignore_index: only with task: segmentation"),
        ({"mask_column": "mask", "num_classes": 3}, "mask_column and num_classes: only with task: segmentation"),
        ({"task": "segmentation", "label_column": "label"}, "label_column: only with task: classification"),
    ],
)
def test_keys_of_the_other_task_are_refused(entry, found):
    with pytest.raises(UserError, match=found):
        load_configs({"dataset_name": "parquet", "eval_datasets": {"e": {"dataset_name": "parquet"} | entry}})
