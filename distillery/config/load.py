"""Read the three YAML files as strict models: every key has a default, and every error names the fix.

    configs = load_configs("data_config.yaml", "train_config_kd.yaml", "model_config_kd.yaml", ["batch_size=128"])

A key belongs to exactly one of the three files, so `--set KEY=VALUE` finds its file by the key. Paths stay as the user
wrote them; the code that opens a path expands it (cache_path and checkpoint_path do).
"""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from distillery.config.errors import explain_error, owner_of, shown, unknown_key
from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.config.keys_train import TrainConfig
from distillery.config.sections import ALIASES, FILE_NAMES, MODELS, REQUIRED_KEYS
from distillery.config.types import StrictModel
from distillery.config.yaml_text import Dumper, parse_yaml, read_yaml
from distillery.system.errors import UserError
from distillery.system.files import expand_path

ConfigInput = str | os.PathLike | Mapping[str, Any] | StrictModel
# data set names that are formats: the files say more
FILE_FORMATS = ("parquet", "arrow", "imagefolder", "webdataset")


@dataclass(frozen=True)
class Configs:
    """The configuration of one command; train and model are None where the command was not given them."""

    data: DataConfig
    train: TrainConfig | None = None
    model: ModelConfig | None = None

    def as_dict(self) -> dict[str, dict]:
        """Plain JSON values in sections data, train, model: what run folders and checkpoints keep."""
        sections = {section: getattr(self, section) for section in MODELS}
        return {section: config.model_dump(mode="json") for section, config in sections.items() if config is not None}


def load_data_config(source: ConfigInput, overrides: Sequence[str] = (), *, require_source: bool = True) -> DataConfig:
    """Read data_config.yaml from a path, a dict (partial: defaults fill in) or a DataConfig.

    Args:
        source: path, parsed YAML, or a finished config.
        overrides: KEY=VALUE texts, as --set takes them.
        require_source: False where a finished cache (cache_dir) or a raw data set (dataset_name) alone is enough.
    Raises:
        MissingFileError: the file is not there.
        UserError: every problem found, one line each.
    """
    required = REQUIRED_KEYS["data"] if require_source else ()
    config = _load({"data": source}, overrides, {"data": required})["data"]
    if config.dataset_name is None and config.cache_dir is None:
        raise UserError("data_config: cache_dir (a finished cache) or dataset_name (raw images) is required")
    return config


def load_train_config(
    source: ConfigInput, overrides: Sequence[str] = (), *, require_checkpoint_dir: bool = True
) -> TrainConfig:
    """Read train_config_kd.yaml; arguments and errors as in load_data_config."""
    required = REQUIRED_KEYS["train"] if require_checkpoint_dir else ()
    return _load({"train": source}, overrides, {"train": required})["train"]


def load_model_config(source: ConfigInput, overrides: Sequence[str] = ()) -> ModelConfig:
    """Read model_config_kd.yaml; arguments and errors as in load_data_config."""
    return _load({"model": source}, overrides, {})["model"]


def load_configs(
    data: ConfigInput, train: ConfigInput | None = None, model: ConfigInput | None = None, overrides: Sequence[str] = ()
) -> Configs:
    """Read a command's configuration files, apply --set to the file that owns each key, and check them together.

    Raises:
        MissingFileError: a file is not there.
        UserError: every problem found in any of the files, one line each.
    """
    given = {"data": data, "train": train, "model": model}
    sources = {section: source for section, source in given.items() if source is not None}
    configs = Configs(**_load(sources, overrides, REQUIRED_KEYS))
    check_configs(configs)
    return configs


def check_configs(configs: Configs) -> None:
    """What is certain to fail, across keys and files, before any disk is touched.

    Raises:
        UserError: every problem found, one line each.
    """
    data, train = configs.data, configs.train
    problems = []
    if data.shards_per_epoch and data.max_shards and data.shards_per_epoch > data.max_shards:
        problems.append(
            f"shards_per_epoch ({data.shards_per_epoch}) is above max_shards ({data.max_shards}): "
            "set shards_per_epoch: null for all of them"
        )
    if train and data.max_samples and train.batch_size > data.max_samples:
        problems.append(
            f"batch_size ({train.batch_size}) is above max_samples ({data.max_samples}): no epoch has a full batch"
        )
    if problems:
        raise UserError("\n".join(problems))


def dump_configs(configs: Configs) -> str:
    """YAML text of the configuration as resolved, every key written out; load_dumped_configs gives it back."""
    return yaml.dump(
        configs.as_dict(), Dumper=Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
    )


def load_dumped_configs(path: str | os.PathLike) -> Configs:
    """Read what dump_configs wrote.

    Raises:
        MissingFileError: the file is not there.
        UserError: it is not such a file, or its keys are not this version's.
    """
    sections = read_yaml(expand_path(path), "Name a run folder's config.yaml.")
    if "data" not in sections or not sections.keys() <= MODELS.keys():
        raise UserError(f"{path}: expected the sections data, train, model, found {', '.join(map(str, sections))}")
    for section, values in sections.items():
        if not isinstance(values, dict):
            raise UserError(f"{path}: {section}: expected keys with values, found {shown(values)}")
    labels = {section: f"{path}: {section}" for section in sections}
    return Configs(**_load(sections, (), {}, labels))


@dataclass
class _Draft:
    """One file's keys on their way to the model: aliases folded, overrides applied, nothing checked yet."""

    label: str
    values: dict[str, Any]
    overridden: list[tuple[str, ...]] = field(default_factory=list)

    def is_overridden(self, loc: tuple[str | int, ...]) -> bool:
        """Whether --set gave the value at `loc`, or one part of that value."""
        return bool(loc) and any(path[: len(loc)] == loc[: len(path)] for path in self.overridden)


def _load(
    sources: Mapping[str, ConfigInput],
    overrides: Sequence[str],
    required: Mapping[str, Sequence[str]],
    labels: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    problems: list[str] = []
    drafts = {
        section: _read_draft(section, source, (labels or {}).get(section), problems)
        for section, source in sources.items()
    }
    for text in overrides:
        problem = _apply_override(text, drafts)
        if problem:
            problems.append(f"--set {text}: {problem}")
    configs = {}
    for section, draft in drafts.items():
        model = MODELS[section]
        for key in required.get(section, ()):
            if draft.values.get(key) is None:
                problems.append(f"{draft.label}: {key} is required: {model.model_fields[key].description}")
        # a heading whose keys are all commented out reads as null
        values = {key: value for key, value in draft.values.items() if value is not None or not _is_heading(model, key)}
        try:
            configs[section] = model.model_validate(values)
        except ValidationError as failure:
            for error in failure.errors(include_url=False):
                label = "--set" if draft.is_overridden(error["loc"]) else draft.label
                problems += [f"{label}: {line}" for line in explain_error(error, section)]
    if problems:
        raise UserError("\n".join(problems))
    return configs


def _read_draft(section: str, source: ConfigInput, label: str | None, problems: list[str]) -> _Draft:
    if isinstance(source, BaseModel):
        draft = _Draft(FILE_NAMES[section].removesuffix(".yaml"), source.model_dump())
    elif isinstance(source, Mapping):
        draft = _Draft(label or FILE_NAMES[section].removesuffix(".yaml"), copy.deepcopy(dict(source)))
    else:
        shipped = Path(__file__).resolve().parents[2] / FILE_NAMES[section]
        values = read_yaml(expand_path(source), f"Copy the shipped one and edit it: cp {shipped} {source}")
        draft = _Draft(str(source), values)
    for key in [key for key in draft.values if not isinstance(key, str)]:
        problems.append(f"{draft.label}: {unknown_key(str(key), section)}")
        del draft.values[key]
    _fold_aliases(draft, MODELS[section], problems)
    return draft


def _is_heading(model: type[StrictModel], key: str) -> bool:
    return key in model.model_fields and isinstance(model.model_fields[key].default, dict | BaseModel)


def _fold_aliases(draft: _Draft, model: type[StrictModel], problems: list[str]) -> None:
    for alias, name in ALIASES.items():
        if alias not in draft.values or name not in model.model_fields:
            continue
        by_alias = draft.values.pop(alias)
        by_name = draft.values.get(name)
        if by_name is None:
            draft.values[name] = by_alias
        elif by_alias is not None and by_alias != by_name:
            problems.append(
                f"{draft.label}: '{name}' and '{alias}' are one key under two names and differ "
                f"({shown(by_name)} and {shown(by_alias)}); keep '{name}'"
            )


def _apply_override(text: str, drafts: Mapping[str, _Draft]) -> str | None:
    """Put KEY=VALUE into the draft that owns KEY; the problem, if there is one, is returned."""
    key, equals, value_text = text.partition("=")
    name, *path = key.strip().split(".")
    if not equals or not all((name, *path)):
        return "expected KEY=VALUE, e.g. batch_size=128 or augment.hflip=false"
    owner = owner_of(name)
    if owner is None:
        return unknown_key(name, None)
    if owner not in drafts:
        return f"'{name}' belongs in {FILE_NAMES[owner]}, which this command was not given"
    try:
        value = parse_yaml(value_text)
    except ValueError as error:
        return f"the value is no YAML: {error}"
    name = ALIASES.get(name, name)
    target, steps = drafts[owner].values, (name, *path)
    drafts[owner].overridden.append(steps)
    if path and target.get(name) is None and _is_heading(MODELS[owner], name):
        # one weight set on its own must not drop the default ones beside it
        default = MODELS[owner].model_fields[name].get_default()
        target[name] = default.model_dump() if isinstance(default, BaseModel) else default
    for depth, step in enumerate(steps[:-1], start=1):
        if target.get(step) is None:
            target[step] = {}
        target = target[step]
        if not isinstance(target, dict):
            return f"'{'.'.join(steps[:depth])}' is {shown(target)} and has no keys of its own"
    target[steps[-1]] = value
    return None


def dataset_label(data: dict[str, Any]) -> str | None:
    """The data set's name for people: the hub id, or the folder or files that a format such as parquet names."""
    name = data.get("dataset_name")
    if name not in FILE_FORMATS:
        return name
    files = data.get("data_files") or data.get("data_dir") or name
    files = list(files.values()) if isinstance(files, dict) else files
    files = files if isinstance(files, list) else [files]
    more = f" and {len(files) - 1} more" if len(files) > 1 else ""
    return f"{Path(str(files[0])).name}{more}"
