"""Write README.md of an exported student: what it is, how to load it, its training data and its scores."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from distillery.config.load import dataset_label
from distillery.config.yaml_text import as_yaml
from distillery.export import onnx_export
from distillery.export.results import results, rows_of
from distillery.export.student import hub_folder
from distillery.export.teacher_card import closeness_section, describe_space, introduction, usage_in_teacher_space

if TYPE_CHECKING:
    from distillery.export.student import Student
    from distillery.losses.teacher_space import TeacherSpace

# of a model's own pretrained_cfg: by these timm adapts the weights to other channels or a new classifier
_STRUCTURE = ("first_conv", "classifier", "fixed_input_size")
# of train_config_kd.yaml: what would be needed to train the student again
_RECIPE = ("batch_size", "grad_accumulation_steps", "num_epochs", "max_steps_per_epoch", "optimizer", "learning_rate",
           "min_lr", "warmup_epochs", "weight_decay", "max_grad_norm", "ema_decay", "loss_options",
           "standardise_targets", "augment", "precision", "seed")  # fmt: skip


def build_card(run_dir: Path, config: dict[str, Any], format: str) -> str:
    """The card's text.

    Args:
        run_dir: the run, for its results and the fingerprint of its data.
        config: the config.json of the export.
        format: of the export, as of --format.
    """
    facts = config["distillation"]
    in_teacher_space = facts["space"] == "teacher"
    losses = ", ".join(f"{weight:g} x {name}" for name, weight in facts["losses"].items() if weight)
    takes = config["pretrained_cfg"]
    seen = f", {facts['images_seen']:,} images seen" if facts["images_seen"] else ""
    recipe = "\n".join(f"| {name} | `{as_yaml(value)}` |" for name, value in facts["recipe"].items())
    rows = rows_of(run_dir, facts["step"], facts["weights"])
    measured = results(rows)
    of_whom = "The student's own features, which its heads take:\n\n" if in_teacher_space else ""
    parts = [
        _front_matter(config),
        *(introduction(config) if in_teacher_space else _introduction(config)),
        "## Use",
        usage_in_teacher_space(config, format) if in_teacher_space else f"```python\n{_usage(config, format)}```",
        *_hub_note(config, format),
        f"Input: float32 `[batch, {', '.join(map(str, takes['input_size']))}]`, RGB in 0..1, then `(x - mean) / std` "
        f"with mean {takes['mean']} and std {takes['std']}.",
        *([onnx_export.card_section(config["onnx"])] if "onnx" in config else []),
        *(closeness_section(config, rows) if in_teacher_space else []),
        "## Training",
        f"{facts['step']:,} steps{seen}; losses {losses}; {facts['weights']} weights{_fingerprint(run_dir)}.",
        f"| recipe | |\n|---|---|\n{recipe}",
        f"## Results\n\n{of_whom}{measured}" if measured else "",
        "## Licences",
        _licences(facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(config: dict[str, Any]) -> list[str]:
    facts = config["distillation"]
    return [
        f"# {config['architecture']}, distilled from {facts['teacher']}",
        f"An image feature extractor with {config['num_features']} dimensions, trained without labels to produce the "
        f"features of {facts['teacher']} ({facts['teacher_source']}) on images of {facts['dataset']}.",
    ]


def _front_matter(config: dict[str, Any]) -> str:
    """The YAML block that the hub reads; it claims a licence only where everything known agrees on it."""
    facts = config["distillation"]
    origin = facts["origin"]
    start = set() if origin["is_student_from_scratch"] else {origin["student_start_license"]}
    licences = {origin["teacher_license"]} | start
    is_known = len(licences) == 1 and None not in licences
    metadata = {
        # what the hub's own snippet loads: timm does not know the heads
        "library_name": "timm" if (facts["student_source"], facts["space"]) == ("timm", "backbone") else "pytorch",
        "license": licences.pop() if is_known else "other",
        **({} if is_known else {"license_name": "to-be-checked"}),
        "pipeline_tag": "image-feature-extraction",
        "tags": ["image-feature-extraction", "knowledge-distillation"],
        **({"base_model": origin["teacher"]} if origin["teacher"] else {}),
        **({"datasets": [origin["data"]]} if origin["data"] else {}),
    }
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _licences(facts: dict[str, Any]) -> str:
    origin = facts["origin"]

    def stated(side: str) -> str:
        licence, hub_id = origin[f"{side}_license"], origin["teacher" if side == "teacher" else "student_start"]
        page = f"https://huggingface.co/{hub_id}" if hub_id else ""
        if not licence:
            return f"must be checked{': ' + page if page else ' where the weights came from'}"
        return f"{licence} (as timm states it{'; ' + page if page else ''})"

    page = f": https://huggingface.co/datasets/{origin['data']}" if origin["data"] else " where they came from"
    lines = [
        "| part | licence |",
        "|---|---|",
        f"| teacher's weights, {facts['teacher']} | {stated('teacher')} |",
        f"| images, {facts['dataset']} | must be checked{page} |",
    ]
    if facts.get("hub_code"):
        lines.append("| code in hub/, of the student's torch.hub folder | must be checked where it came from |")
    if not origin["is_student_from_scratch"]:
        lines.insert(3, f"| weights the student began with | {stated('student_start')} |")
    note = (
        "The student is made from all of these. `license` at the top of this file is the weights' where they agree; "
        "publish the student only after the terms of the images are checked too."
    )
    return "\n".join(lines) + f"\n\n{note}"


def _hub_note(config: dict[str, Any], format: str) -> list[str]:
    if format != "huggingface":
        return []
    if config["distillation"]["space"] == "teacher":
        return ["`USER/NAME` is where the folder was uploaded to (`hf upload USER/NAME .`)."]
    return [
        "`local-dir:` takes the path of this folder. Uploaded (`hf upload USER/NAME .`), it is "
        '`timm.create_model("hf-hub:USER/NAME", pretrained=True)` for everyone; `num_classes=10` adds a new classifier.'
    ]


def _usage(config: dict[str, Any], format: str) -> str:
    if format == "onnx":
        return onnx_export.usage(config["onnx"])
    features = config["distillation"]["features"]
    imports = ["torch"] if "torch." in features else []
    source, arguments = config["distillation"]["student_source"], config["model_args"]
    if format == "huggingface":
        imports, load = [*imports, "timm"], 'timm.create_model("local-dir:.", pretrained=True)'
    elif source == "timm":
        given = "".join(f"    {name}={value!r},\n" for name, value in arguments.items())
        load = f'timm.create_model(\n    "{config["architecture"]}",\n    num_classes=0,\n{given}'
        imports, load = [*imports, "timm"], f'{load}    checkpoint_path="model.safetensors",\n)'
    else:
        return _usage_of_other_source(config, imports)
    return _imports(imports) + f"\nmodel = {load}.eval()\nfeatures = {features}\n"


def _usage_of_other_source(config: dict[str, Any], imports: list[str]) -> str:
    facts = config["distillation"]
    arguments = "".join(f", {name}={value!r}" for name, value in config["model_args"].items())
    if facts["student_source"] == "torchvision":
        imports = [*imports, "torchvision"]
        load = f'torchvision.models.get_model("{config["architecture"]}"{arguments})'
    else:
        imports = [*imports, "torch"]
        where = ', source="local"' if hub_folder(facts) else ""
        load = f'torch.hub.load("{facts["student_repo"]}", "{config["architecture"]}"{where}{arguments})'
    return (
        _imports(imports) + "from safetensors.torch import load_file\n"
        f"\nmodel = {load}\n"
        'model.load_state_dict(load_file("model.safetensors"))\n'
        f"model.eval()\nfeatures = {facts['features']}\n"
    )


def _imports(names: list[str]) -> str:
    return "".join(f"import {name}\n" for name in sorted(set(names)))


def _fingerprint(run_dir: Path) -> str:
    path = run_dir / "shards.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_bytes())
    return f"; data fingerprint `{content['fingerprint']}` ({len(content['shards'])} shards)"


def describe(student: Student, features: str | None = None, space: TeacherSpace | None = None) -> dict[str, Any]:
    """config.json: timm's hub format where timm knows the model, and what the distillation was.

    Args:
        student: rebuilt.
        features: find_feature_call(student.backbone), of an export in the student's own space.
        space: of an export in the teacher's.
    """
    data, model, train = (student.config[section] for section in ("data", "model", "train"))
    backbone, trained = student.backbone, student.trained
    known = getattr(backbone.model, "pretrained_cfg", {})
    architecture = known.get("architecture", student.architecture)
    return {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.pooled_width if space is None else next(iter(space.widths.values())),
        "model_args": student.model_args,
        # of a folder that timm does not load, where nobody would look into its pretrained_cfg
        **({} if space is None else {"mean": list(backbone.mean), "std": list(backbone.std)}),
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
            **({"space": "backbone", "features": features} if space is None else describe_space(student, space)),
            "student_source": model["student_source"],
            "student_repo": model.get("student_repo"),
            "teacher": model["teacher_name"],
            "teacher_source": model["teacher_source"],
            "dataset": dataset_label(data),
            "losses": train["distill_loss_weights"],
            "step": trained.step,
            "weights": "averaged" if trained.is_averaged else "last",
            "images_seen": trained.global_batch_size and trained.step * trained.global_batch_size,
            "recipe": _recipe(student),
            "origin": find_origin(data, model),
        },
    }


def _recipe(student: Student) -> dict[str, Any]:
    from distillery.training.optimizer import default_learning_rate

    data, model, train = (student.config[section] for section in ("data", "model", "train"))
    recipe = {name: train[name] for name in _RECIPE if name in train}
    if student.trained.global_batch_size:
        # runs of earlier versions do not say
        size, name = student.trained.global_batch_size, train.get("optimizer", "adamw")
        recipe["learning_rate"] = train["learning_rate"] or default_learning_rate(size, student.backbone, name)
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
