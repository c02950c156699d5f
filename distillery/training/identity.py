"""What a run is bound to: which keys may differ between two of its starts, and which may not."""

import shlex
from pathlib import Path
from typing import Any

from distillery.config.sections import MODELS, SUB_MODELS
from distillery.config.yaml_text import as_yaml
from distillery.system.errors import UserError
from distillery.system.files import sha256_of

# keys that change neither what is learnt, nor its order, nor figures (knn_k does): a resumed run may have other values
FREE_KEYS = {
    # which images there are stands in shards.json, with the fingerprint that they must have
    "data": {"num_workers", "prefetch_batches", "pin_memory", "read_mode", "eval_datasets", "cache_dir", "use_cached",
             "data_files", "data_dir", "max_failed_fraction", "max_samples", "max_shards", "stage_dir", "stage_gb"},
    "train": {"num_epochs", "log_every", "save_every", "save_every_minutes", "keep_checkpoints", "eval_every_epochs",
              "tensorboard", "tensorboard_histograms", "wandb_project", "compile", "compile_student",
              "compile_teacher", "use_fused_adamw", "max_bad_steps", "gradient_checkpointing", "refresh_shards",
              "checkpoint_dir"},
    # a path may change; the teacher's weights may not, a checkpoint has their hash
    "model": {"teacher_repo", "teacher_checkpoint", "student_repo", "student_checkpoint"},
}  # fmt: skip
# what a run did that began before there was such a key, and the default is another, or was not bound to it (knn_k)
VALUES_BEFORE = {"train": {"optimizer": "adamw", "knn_k": 20}}
# these may change together, as long as their product with the number of processes stays the same
BATCH_KEYS = ("batch_size", "grad_accumulation_steps")


def identity_of(config: dict[str, dict]) -> str:
    """A hash of all in a configuration {"data": {...}, "train": {...}, "model": {...}} that a run is bound to.

    A value that stands for the key in a run of before there was such a key does not count: that run has the same hash.
    """
    bound = {}
    for section, free in FREE_KEYS.items():
        given, usual = _flat(config.get(section, {})), _flat(values_of_run(section, {}))
        bound[section] = {
            name: value
            for name, value in given.items()
            if name.split(".")[0] not in free | {*BATCH_KEYS} and (name not in usual or usual[name] != value)
        }
    return sha256_of(bound)


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section, those of its blocks as "block.key"."""
    found = {}
    for key, value in values.items():
        is_block = key in SUB_MODELS and isinstance(value, dict)
        found |= {f"{key}.{name}": part for name, part in value.items()} if is_block else {key: value}
    return found


def compare_configs(where: Path, before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """The harmless differences between a run's configuration and the present one, a line each.

    A key that the run does not know came with a later version: the run did what the key's default does, or the value in
    VALUES_BEFORE.

    Args:
        where: run folder or checkpoint, for the message.
        before: {"data": {...}, "train": {...}, "model": {...}} of the run.
        now: the same of this start.

    Raises:
        UserError: other differences, listed field by field.
    """
    harmless, refused, values = [], [], []
    for section, free in FREE_KEYS.items():
        old, new = values_of_run(section, before.get(section, {})), now.get(section, {})
        for key in sorted(old.keys() & new.keys()):
            lines = _differences(key, old[key], new[key])
            if key in free or key in BATCH_KEYS:
                harmless += lines
            elif lines:
                refused += lines
                values.append(f"--set {shlex.quote(f'{key}={as_yaml(old[key])}')}")
    if refused:
        raise UserError(
            f"{where} holds a run of another configuration:\n  " + "\n  ".join(refused) + "\n"
            f"Nothing was written. Put the values back to go on with it ({' '.join(values)}), give another "
            "checkpoint_dir for a new run, or --no_resume to start afresh in this one."
        )
    return harmless


def values_of_run(section: str, known: dict[str, Any]) -> dict[str, Any]:
    """What a run did by the keys of a section: those that it knew, and what later ones stand for."""
    defaults = MODELS[section].model_construct().model_dump(mode="json") | VALUES_BEFORE.get(section, {})
    nested = {key: defaults[key] | known[key] for key in SUB_MODELS if key in defaults and key in known}
    return defaults | known | nested


def check_same_models(where: Path, before: dict[str, dict], now: dict[str, dict]) -> None:
    """Raise UserError unless a checkpoint's configuration, `before`, has the models and losses of a run's, `now`."""
    for section, key in [*(("model", key) for key in now["model"]), ("train", "distill_loss_weights")]:
        old, new = before.get(section, {}).get(key, now[section][key]), now[section][key]
        if key not in FREE_KEYS[section] and old != new:
            raise UserError(
                f"{where}: is of another run: its {key} is {old!r}, that of --run is {new!r}. Name the run it belongs "
                "to, or one of this run's checkpoints."
            )


def _differences(key: str, old: Any, new: Any) -> list[str]:
    """'key: old -> new' where they differ; of two mappings, a line for each key that does."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        return [line for name in names for line in _differences(f"{key}.{name}", old.get(name), new.get(name))]
    return [f"{key}: {old!r} -> {new!r}"]


def check_global_batch(before: dict, now_global: int, now_text: str) -> None:
    """Raise UserError when the global batch of a checkpoint is not the present one, with the arithmetic."""
    if before["global_batch_size"] != now_global:
        raise UserError(
            f"the run was trained with a global batch of {before['global_batch_text']}; now it would be {now_text}. "
            "A position in the data can only be taken up with the same product: change batch_size or "
            "grad_accumulation_steps."
        )
