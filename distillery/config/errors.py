"""The error messages for a key that is unknown, misspelt, removed, in the wrong file or of the wrong type."""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

from distillery.config.sections import ALIASES, FILE_NAMES, MODELS, SUB_MODELS
from distillery.config.yaml_text import parse_yaml

# the predecessor's keys, one or several names of one thing, and what took their place
REPLACED_KEYS = {
    "data": {
        "persistent_workers": "readers are threads that live as long as the loader",
        "cache_image_size": "use image_size, the one size that is stored and trained on",
        "cache_format": "shards have one format; cache_dtype chooses their bytes per value",
        "drop_last": "an epoch's last short batch is always left out; its rows come in other epochs",
        "shuffle_buffer_size": "use window_bytes",
        "use_multi_crop num_crops": "teacher and student see one view; use augment.random_resized_crop",
    },
    "train": {
        "lr": "use learning_rate (null: the recipe's rule)",
        "epochs": "use num_epochs",
        "warmup_steps": "use warmup_epochs; fractions are allowed",
        "use_amp mixed_precision amp": "use precision: auto, bf16, fp16 or fp32",
        "compile_model use_compile torch_compile": "use compile",
        "channels_last": "the trainer chooses the memory format",
        "gradient_accumulation_steps": "use grad_accumulation_steps",
        "grad_clip": "use max_grad_norm",
        "resume_from": "the same command resumes; --resume_from PATH is a flag of distill_trainer.py",
        "output_dir": "use checkpoint_dir",
        "save_interval": "use save_every (steps)",
        "ssl use_ssl ssl_weight": "there are no self-supervised terms; see distill_loss_weights",
        "temperature": "use loss_options, e.g. {kl_logits: {temperature: 4.0}}",
    },
    "model": {
        "teacher_model": "use teacher_name",
        "student_model": "use student_name",
        "freeze_teacher": "the teacher is always frozen",
        "hidden_dim projection_dim": "use projector: {type, hidden_dim}",
        "teacher_dim student_dim": "widths are read from the models",
    },
}


def owner_of(key: str) -> str | None:
    """The section (data, train or model) of a key or alias; None: there is no such key."""
    name = ALIASES.get(key, key)
    return next((section for section, model in MODELS.items() if name in model.model_fields), None)


def explain_error(error: Any, section: str) -> list[str]:
    """One pydantic error as lines for the user."""
    kind, loc = error["type"], [part for part in error["loc"] if part != "[key]"]
    if kind == "extra_forbidden":
        return [unknown_key(loc[0], section) if len(loc) == 1 else _unknown_sub_key(loc)]
    key = ".".join(map(str, loc))
    if kind == "missing":
        return [f"{key} is required"]
    message = str(error["ctx"]["error"]) if kind == "value_error" else error["msg"]
    if not loc:
        return message.splitlines()
    given = error["input"]
    message = re.sub(r"^(Input|String) should", "expected to", message).replace("expected to be", "expected")
    line = f"{key}: {message}, found {shown(given)}"
    if kind in {"int_type", "float_type", "bool_type"} and _reads_as(given, kind):
        line += "; remove the quotes"
    elif kind == "string_type" and isinstance(given, int | float):
        line += "; put it in quotes"
    elif kind in {"greater_than", "greater_than_equal", "less_than", "less_than_equal"} and len(loc) == 1:
        line += f" ({MODELS[section].model_fields[key].description})"
    return [line]


def _reads_as(given: Any, kind: str) -> bool:
    try:
        value = parse_yaml(given) if isinstance(given, str) else None
    except ValueError:
        return False
    return type(value).__name__ == kind.removesuffix("_type")


def shown(value: Any) -> str:
    """A value as it would stand in the file, cut at 60 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def unknown_key(key: str, section: str | None) -> str:
    """What to type instead of a top-level key that is none; section None: of --set, which takes all files' keys."""
    owner = owner_of(key)
    if owner is not None:
        return f"unknown key '{key}'; it belongs in {FILE_NAMES[owner]}, the file of --{owner}_config"
    own_first = sorted(MODELS, key=lambda name: name != section)
    for other in own_first:
        for names, successor in REPLACED_KEYS[other].items():
            if key in names.split():
                where = "" if other == section else f"; see {FILE_NAMES[other]}"
                return f"key '{key}' is gone: {successor}{where}"
    for other in own_first:
        names = [*MODELS[other].model_fields, *(alias for alias in ALIASES if owner_of(alias) == other)]
        near = difflib.get_close_matches(key.lower(), names, n=1, cutoff=0.7)
        if near:
            where = "" if other == section else f" of {FILE_NAMES[other]}"
            return f"unknown key '{key}'; did you mean '{near[0]}'{where}?"
    known = MODELS[section].model_fields if section else [key for m in MODELS.values() for key in m.model_fields]
    return f"unknown key '{key}'; known keys: {', '.join(known)}"


def _unknown_sub_key(loc: Sequence[Any]) -> str:
    known = list(SUB_MODELS[loc[0]].model_fields)
    dotted = ".".join(map(str, loc))
    near = difflib.get_close_matches(str(loc[-1]).lower(), known, n=1, cutoff=0.7)
    if near:
        return f"unknown key '{dotted}'; did you mean '{near[0]}'?"
    return f"unknown key '{dotted}'; known keys there: {', '.join(known)}"
