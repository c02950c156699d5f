"""config.json of an exported student: timm's hub format, and where the student comes from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.config.load import dataset_label

if TYPE_CHECKING:
    from distillery.export_student import Student

# of a model's own pretrained_cfg: by these timm adapts the weights to other channels or a new classifier
_STRUCTURE = ("first_conv", "classifier", "fixed_input_size")
# of train_config_kd.yaml: what would be needed to train the student again
_RECIPE = ("batch_size", "grad_accumulation_steps", "num_epochs", "max_steps_per_epoch", "learning_rate", "min_lr",
           "warmup_epochs", "weight_decay", "max_grad_norm", "ema_decay", "loss_options", "standardise_targets",
           "augment", "precision", "seed")  # fmt: skip


def describe(student: Student, features: str) -> dict[str, Any]:
    """config.json: timm's hub format where timm knows the model, and what the distillation was.

    Args:
        student: rebuilt.
        features: find_feature_call(student.backbone).
    """
    data, model, train = (student.config[section] for section in ("data", "model", "train"))
    backbone = student.backbone
    known = getattr(backbone.model, "pretrained_cfg", {})
    architecture = known.get("architecture", student.architecture)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.pooled_width,
        "model_args": student.model_args,
        "pretrained_cfg": {
            "architecture": architecture,
            "input_size": [3, *backbone.img_size],
            "mean": list(backbone.mean),
            "std": list(backbone.std),
            "interpolation": data["interpolation"],
            "crop_pct": 1.0,
            "crop_mode": "squash" if data["resize_mode"] == "squash" else "center",
            "num_classes": 0,
            **{name: known[name] for name in _STRUCTURE if known.get(name) is not None},
        },
        "distillation": {
            "features": features,
            "student_source": model["student_source"],
            "student_repo": model.get("student_repo"),
            "teacher": model["teacher_name"],
            "teacher_source": model["teacher_source"],
            "dataset": dataset_label(data),
            "losses": train["distill_loss_weights"],
            "step": student.step,
            "weights": "averaged" if student.is_ema else "last",
            "images_seen": student.global_batch_size and student.step * student.global_batch_size,
            "recipe": _recipe(student),
            "origin": find_origin(data, model),
        },
    }


def _recipe(student: Student) -> dict[str, Any]:
    from distillery.training.engine import default_learning_rate

    data, model, train = (student.config[section] for section in ("data", "model", "train"))
    recipe = {name: train[name] for name in _RECIPE if name in train}
    if student.global_batch_size:
        size = student.global_batch_size
        recipe["learning_rate"] = train["learning_rate"] or default_learning_rate(size, student.backbone)
        recipe["global_batch_size"] = size
    return recipe | {"image_size": data["image_size"], "teacher_img_size": model.get("teacher_img_size")}


def find_origin(data: dict[str, Any], model: dict[str, Any]) -> dict[str, str | bool | None]:
    """Where the student comes from, as far as it is known for certain.

    Returns:
        hub ids of the teacher, of the weights that the student began with and of the data set, and the licences of the
        weights as timm states them; None: not known here, or (the student's, if is_student_from_scratch) no weights.
    """
    name = data.get("dataset_name") or ""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    teacher, student = (_timm_weights(model, side) for side in ("teacher", "student"))
    return {
        "teacher": teacher.get("hf_hub_id"),
        "teacher_license": teacher.get("license"),
        "is_student_from_scratch": not (model.get("student_pretrained") or model.get("student_checkpoint")),
        "student_start": student.get("hf_hub_id"),
        "student_start_license": student.get("license"),
        "data": name if is_hub_id else None,
    }


def _timm_weights(model: dict[str, Any], side: str) -> dict[str, Any]:
    """What timm says of the published weights that a model began with; {} where it had others, or none."""
    is_published = model.get(f"{side}_pretrained") and not model.get(f"{side}_checkpoint")
    if model[f"{side}_source"] != "timm" or not is_published:
        return {}
    kind, _, place = model[f"{side}_name"].partition(":")
    if place:  # a folder, or a repository whose licence its owner states there
        return {} if kind == "local-dir" else {"hf_hub_id": place.partition("@")[0]}
    import timm

    known = timm.get_pretrained_cfg(model[f"{side}_name"])
    return known.to_dict() if known is not None else {}
