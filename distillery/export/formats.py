"""Write an exported student into a folder, in one of the formats of --format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from distillery.export.card import build_card, describe
from distillery.export.expressions import evaluate_call, find_feature_call, is_same, sample_features
from distillery.export.onnx_export import OnnxOptions, make_onnx
from distillery.export.student import Student, load_from_hub, load_student
from distillery.system.errors import UserError
from distillery.system.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.training.trained import Weights

FORMATS = ("timm", "safetensors", "huggingface", "onnx")
WEIGHTS_NAME, ONNX_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "model.onnx", "config.json", "README.md"


def export_student(
    run_dir: Path,
    out_dir: Path,
    format: str = "timm",
    checkpoint: Path | None = None,
    weights: Weights = "auto",
    *,
    space: str = "backbone",
    onnx: OnnxOptions | None = None,
) -> list[Path]:
    """Write a run's student into a folder.

    Args:
        run_dir: the run folder.
        out_dir: made if need be; files of the same names are replaced.
        format: "timm", "safetensors" and "huggingface" write model.safetensors with exactly the raw model's keys,
            without classifier (timm and huggingface: refused for a student that timm cannot build); the card of
            "huggingface" loads the folder, here or on the hub, instead of the file; "onnx" writes model.onnx.
        checkpoint: a checkpoint file; the run's newest complete one by default.
        weights: "auto": the averaged ones where the run has them (ema_decay), else the last; "student", "ema".
        space: "backbone", or with "onnx" "teacher": the outputs stand in for the teacher's features.
        onnx: what the flags of --format onnx say; None: their defaults.
    Returns:
        The files written: the weights, config.json and README.md.
    Raises:
        UserError: no checkpoint, no EMA weights, an unknown format, weights that are not this student's, a model that
            cannot be written as ONNX or is then too far from PyTorch. Nothing is written then.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    if space == "teacher" and format != "onnx":
        raise UserError("--space teacher is for --format onnx")
    options = onnx or OnnxOptions()
    options.check(format)
    student = load_student(run_dir, checkpoint, weights=weights)
    source = student.config["model"]["student_source"]
    if format in ("timm", "huggingface") and not student.is_timm:
        raise UserError(f"the student comes from {source}, which timm cannot build: use --format safetensors or onnx")
    features = find_feature_call(student.backbone)
    config = describe(student, features)
    if format == "onnx":
        onnx_model, config["onnx"] = make_onnx(student.trained, space, options)
    out_dir.mkdir(parents=True, exist_ok=True)
    weights_path = out_dir / (ONNX_NAME if format == "onnx" else WEIGHTS_NAME)
    if format == "onnx":
        write_atomic(weights_path, onnx_model)
    else:
        write_safetensors(student.weights, weights_path)
        check_weights_load(student, weights_path, features)
    config_path, card_path = out_dir / CONFIG_NAME, out_dir / CARD_NAME
    write_atomic(config_path, json.dumps(config, indent=2).encode() + b"\n")
    loaded_from = "local-dir:." if format == "huggingface" else weights_path.name
    write_atomic(card_path, build_card(run_dir, config, loaded_from).encode())
    if format == "huggingface":
        check_folder_loads(student, out_dir, features)
    return [weights_path, config_path, card_path]


def write_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, atomically."""
    from safetensors.torch import save

    write_atomic(path, save(weights, metadata={"format": "pt"}))


def check_weights_load(student: Student, path: Path, features: str) -> None:
    """Build the student as its user will, with the file just written: loading is strict, so nothing is missing."""
    name, arguments = student.architecture, student.model_args
    if student.is_timm:
        import timm

        model = timm.create_model(name, num_classes=0, checkpoint_path=str(path), **arguments)
    elif student.config["model"]["student_source"] == "torchvision":
        import torchvision

        model = torchvision.models.get_model(name, **arguments)
        model.load_state_dict(student.weights)
    else:
        model = load_from_hub(student.config["model"]["student_repo"], name, arguments)
        model.load_state_dict(student.weights)
    check_same_features(model, student, features)


def check_folder_loads(student: Student, folder: Path, features: str) -> None:
    """Build the student from the folder alone, as `local-dir:` and, once uploaded, `hf-hub:` do."""
    import timm
    import torch

    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    found = model.state_dict()
    assert found.keys() == student.weights.keys(), "timm builds another model from config.json"
    assert all(torch.equal(found[name], value) for name, value in student.weights.items()), "timm changed weights"
    check_same_features(model, student, features)


def check_same_features(model: nn.Module, student: Student, features: str) -> None:
    """The model as its user has it gives what was trained, by the expression on the card."""
    images, wanted = sample_features(student.backbone)
    assert is_same(evaluate_call(features, model.eval(), images), wanted), f"built anew, the model has other {features}"
