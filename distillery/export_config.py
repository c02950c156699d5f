"""config.json of an exported student: timm's hub format, and where the student comes from."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.report_facts import dataset_label

if TYPE_CHECKING:
    from distillery.export_student import Student
    from distillery.models import Backbone

# of a model's own pretrained_cfg: by these timm adapts the weights to other channels or a new classifier
_STRUCTURE = ("first_conv", "classifier", "fixed_input_size")
# of train_config_kd.yaml: what would be needed to train the student again
_RECIPE = ("batch_size", "grad_accumulation_steps", "num_epochs", "max_steps_per_epoch", "learning_rate", "min_lr",
           "warmup_epochs", "weight_decay", "max_grad_norm", "ema_decay", "loss_options", "standardise_targets",
           "augment", "precision", "seed")  # fmt: skip

FEATURE_CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "model(images)": lambda model, images: model(images),
    "model.forward_features(images)[:, 0]": lambda model, images: model.forward_features(images)[:, 0],
    "model.forward_features(images)[:, model.num_prefix_tokens:].mean(1)": lambda model, images: model.forward_features(
        images
    )[:, model.num_prefix_tokens :].mean(1),
    "model.fc_norm(model.forward_features(images))[:, 0]": lambda model, images: model.fc_norm(
        model.forward_features(images)
    )[:, 0],
    "model.forward_features(images).mean((2, 3))": lambda model, images: model.forward_features(images).mean((2, 3)),
}


def find_feature_call(backbone: Backbone) -> str | None:
    """The expression that gives the features which were trained and evaluated: found by trying, None if none does."""
    import torch

    images = torch.randn(2, 3, *backbone.img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = backbone(images).pooled
        for text, call in FEATURE_CALLS.items():
            try:
                found = call(backbone.model, images)
            except (AttributeError, IndexError, TypeError, RuntimeError):
                continue  # this kind of model has no such method or output
            if (
                isinstance(found, torch.Tensor)
                and found.shape == wanted.shape
                and torch.allclose(found, wanted, 1e-4, 1e-5)
            ):
                return text
    return None


def describe(student: Student) -> dict[str, Any]:
    """config.json: timm's hub format where timm knows the model, and what the distillation was."""
    data, model, train = (student.config[section] for section in ("data", "model", "train"))
    backbone = student.backbone
    known = getattr(backbone.model, "pretrained_cfg", {})
    architecture = known.get("architecture", model["student_name"])
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.pooled_width,
        "model_args": student.timm_kwargs if student.timm_kwargs is not None else model.get("student_kwargs", {}),
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
            "features": find_feature_call(backbone),
            "student_source": model["student_source"],
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
    from distillery.engine import default_learning_rate

    data, model, train = (student.config[section] for section in ("data", "model", "train"))
    recipe = {name: train[name] for name in _RECIPE if name in train}
    if student.global_batch_size:
        size = student.global_batch_size
        recipe["learning_rate"] = train["learning_rate"] or default_learning_rate(size, student.backbone)
        recipe["global_batch_size"] = size
    return recipe | {"image_size": data["image_size"], "teacher_img_size": model.get("teacher_img_size")}


def find_origin(data: dict[str, Any], model: dict[str, Any]) -> dict[str, str | None]:
    """Where the student comes from, as far as it is known for certain.

    Returns:
        hub ids of the teacher, of the weights that the student began with and of the data set, and the licences of the
        weights as timm states them; None: not known here, or (the student's) trained from scratch.
    """
    name = data.get("dataset_name") or ""
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    teacher, student = (_timm_weights(model, side) for side in ("teacher", "student"))
    return {
        "teacher": teacher.get("hf_hub_id"),
        "teacher_license": teacher.get("license"),
        "student_start": student.get("hf_hub_id"),
        "student_start_license": student.get("license"),
        "data": name if is_hub_id else None,
    }


def _timm_weights(model: dict[str, Any], side: str) -> dict[str, Any]:
    """What timm says of the published weights that a model began with; {} where it had others, or none."""
    is_published = model.get(f"{side}_pretrained") and not model.get(f"{side}_checkpoint")
    if model[f"{side}_source"] != "timm" or not is_published:
        return {}
    import timm

    known = timm.get_pretrained_cfg(model[f"{side}_name"])
    return known.to_dict() if known is not None else {}
