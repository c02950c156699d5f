"""What is said of keys that do not fit: unknown, misspelt, of another file, gone, or of the wrong type."""

import difflib
import fnmatch
import json
import re
from collections.abc import Sequence
from typing import Any

from distillery.config.sections import ALIASES, FILE_NAMES, MODELS, SUB_MODELS
from distillery.config.yaml_text import parse_yaml

# what took the place of the predecessor's keys; * stands for anything
REPLACED_KEYS = {
    "data": {
        "persistent_workers": "readers are threads that live as long as the loader",
        "cache_image_size": "use image_size, the one size that is stored and trained on",
        "cache_format": "shards have one format; cache_dtype chooses their bytes per value",
        "drop_last": "an epoch's last short batch is always left out; its rows come in other epochs",
        "shuffle_buffer*": "use window_bytes",
        "streaming": "parquet and arrow files are read in place, everything else through the cache",
        "normali[sz]e*": "use mean and std; they are applied exactly once",
        "*multi_crop*|*crops*|*crop_scale": "teacher and student see one view; use augment.random_resized_crop",
        "max_images|num_samples|num_images": "use max_samples",
        "subset_fraction|data_fraction": "use max_samples, or shards_per_epoch for a new share each epoch",
        "num_shards_per_epoch|random_shards*": "use shards_per_epoch",
        "dataset_path|data_path|data_root|dataset_root|root": "use data_dir with dataset_name: imagefolder",
        "hf_token|token|use_auth_token": "log in once with: hf auth login",
        "trust_remote_code": "data sets with code of their own are not run; convert them to parquet",
    },
    "train": {
        "lr|base_lr|peak_lr": "use learning_rate (null: the recipe's rule)",
        "epochs|max_epochs|n_epochs": "use num_epochs",
        "lr_min|eta_min|min_learning_rate": "use min_lr",
        "warmup_steps|warmup_ratio|warmup": "use warmup_epochs; fractions are allowed",
        "steps_per_epoch|max_steps": "use max_steps_per_epoch",
        "optimizer|optim": "the optimiser is AdamW; see learning_rate and weight_decay",
        "*scheduler|lr_schedule": "the schedule is warm-up, then a cosine down to min_lr",
        "use_amp|amp*|mixed_precision|fp16|bf16|dtype": "use precision: auto, bf16, fp16 or fp32",
        "compile|compile_model|compile_mode|use_compile|torch_compile": "use compile_student and compile_teacher",
        "channels_last|use_channels_last": "the trainer chooses the memory format",
        "gradient_accumulation*|accum*": "use grad_accumulation_steps",
        "clip_grad*|grad_clip*|gradient_clip*|max_norm": "use max_grad_norm",
        "fused|use_fused|fused_adamw": "use use_fused_adamw",
        "use_ema|ema|ema_momentum": "use ema_decay (null: off)",
        "resume*": "the same command resumes; --resume_from PATH and --no_resume are flags of distill_trainer.py",
        "output_dir|save_dir|run_dir|log_dir|checkpoint_path": "use checkpoint_dir",
        "save_freq*|save_interval*|save_steps|save_every_*|checkpoint_every|checkpoint_freq*": "use save_every (steps)",
        "keep_last*|max_checkpoints|save_total_limit": "use keep_checkpoints",
        "log_freq*|log_interval|logging_steps": "use log_every (steps)",
        "eval_every|eval_freq*|eval_interval": "use eval_every_epochs",
        "use_wandb|wandb": "use wandb_project (null: off)",
        "use_tensorboard": "use tensorboard",
        "ssl*|use_ssl*|barlow*|vicreg*|simclr*": "there are no self-supervised terms; see distill_loss_weights",
        "loss_weights|*_loss_weight|cls_weight|patch_weight|lambda_*|alpha|loss_type": "use distill_loss_weights",
        "temperature|*_temperature": "use loss_options, e.g. {kl_logits: {temperature: 4.0}}",
        "use_augmentation*|augmentation*|transforms|horizontal_flip": "use augment",
        "random_seed": "use seed",
        "device": "use the flag --device of distill_trainer.py",
    },
    "model": {
        "teacher_model|teacher": "use teacher_name",
        "student_model|student|model_name|backbone*": "use student_name",
        "teacher_weights|teacher_ckpt|teacher_checkpoint_path": "use teacher_checkpoint",
        "student_weights|student_ckpt|student_checkpoint_path": "use student_checkpoint",
        "pretrained": "use teacher_pretrained and student_pretrained",
        "freeze_teacher": "the teacher is always frozen",
        "img_size": "use student_img_size and teacher_img_size (null: from image_size)",
        "hidden_dim|use_project*|projector_*|projection*|proj_*": "use projector: {type, hidden_dim}",
        "*_dim|*_width": "widths are read from the models",
        "patch_size|*_patch_size": "patch sizes are read from the models; student_kwargs can set one",
        "drop_path": "use drop_path_rate",
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
        return f"unknown key '{key}'; it belongs in {FILE_NAMES[owner]}"
    own_first = sorted(MODELS, key=lambda name: name != section)
    for other in own_first:
        for patterns, successor in REPLACED_KEYS[other].items():
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns.split("|")):
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
