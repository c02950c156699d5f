"""Write an exported student into a folder, in one of the formats of --format."""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from distillery.export.card import build_card, describe
from distillery.export.expressions import evaluate, find_feature_call, find_forward, is_same, sample_features
from distillery.export.onnx_export import OnnxOptions, make_onnx
from distillery.export.standalone import CODE_NAME, check_alone, code_of, hub_code, weights_of
from distillery.export.student import Student, hub_folder, load_from_hub, load_student
from distillery.export.teacher_card import reservations
from distillery.system.errors import UserError
from distillery.system.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.training.trained import Weights

FORMATS = ("timm", "safetensors", "huggingface", "onnx")
SPACES = ("backbone", "teacher")
WEIGHTS_NAME, ONNX_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "model.onnx", "config.json", "README.md"


def export_student(
    run_dir: Path,
    out_dir: Path,
    format: str | None = None,
    checkpoint: Path | None = None,
    weights: Weights = "auto",
    space: Literal["backbone", "teacher"] = "backbone",
    *,
    onnx: OnnxOptions | None = None,
) -> list[Path]:
    """Write a run's student into a folder.

    In its own space: "timm", "safetensors" and "huggingface" write model.safetensors with exactly the raw model's keys,
    without classifier (timm and huggingface: refused for a student that timm cannot build); the card of "huggingface"
    loads the folder, here or on the hub, instead of the file. In the teacher's space: "safetensors" and "huggingface"
    write model.safetensors with keys student.* and heads.*, and student.py, which loads and runs it; their cards load
    it from here or from the hub. "onnx" writes model.onnx.

    Args:
        run_dir: the run folder.
        out_dir: made if need be; files of an earlier export are replaced. Where others of it would stay beside them, or
            files of these names are of no export, the folder is refused.
        format: of FORMATS; None: "timm", in the teacher's space "safetensors".
        checkpoint: a checkpoint file; the run's newest complete one by default.
        weights: "auto": the averaged ones where the run has them (ema_decay), else the last; "student", "ema".
        space: "backbone": the student's own features; "teacher": those of its teacher, as well as it has learnt them.
        onnx: what the flags of --format onnx say; None: their defaults.
    Returns:
        The files written: the weights, config.json, README.md and what else there is.
    Raises:
        UserError: no checkpoint, no EMA weights, an unknown format or space, an out_dir that is a file or has files of
            another export, weights that are not this student's, a model that cannot be written as ONNX or is then too
            far from PyTorch, a run without heads for the teacher's space, code of the student that needs more than its
            .py files. Nothing is written then.
    """
    format = format or {"backbone": "timm", "teacher": "safetensors"}.get(space)
    _check_choice(format, space)
    onnx = onnx or OnnxOptions()
    onnx.check(format)
    student = load_student(run_dir, checkpoint, weights=weights)
    _check_folder(out_dir, format, space)
    build = _build_in_teacher_space if space == "teacher" else _build_in_own_space
    # the card's results are those of the run that the checkpoint lies in: it may be another, or one set aside
    of_run = run_dir if checkpoint is None else checkpoint.resolve().parent.parent
    return _write(build(student, of_run, out_dir, format, onnx), out_dir)


def _check_choice(format: str, space: str) -> None:
    for what, value, known in (("space", space, SPACES), ("format", format, FORMATS)):
        if value not in known:
            raise UserError(f"unknown {what} {value!r}; known: {', '.join(known)}")
    if (format, space) == ("timm", "teacher"):
        raise UserError(
            "--format timm holds the student alone, and timm cannot load the heads of --space teacher: use --format "
            "safetensors (the default there), huggingface or onnx"
        )


def _check_folder(out_dir: Path, format: str, space: str) -> None:
    """Refuse a place where no folder can be, where files are that no export has made, or where student.py of an earlier
    export would get other weights."""
    if (place := next(path for path in (out_dir, *out_dir.parents) if path.exists())) and not place.is_dir():
        raise UserError(f"--out {out_dir}: {place} is a file. Name a folder, which is made if need be")
    names = (CONFIG_NAME, CARD_NAME, WEIGHTS_NAME, ONNX_NAME, CODE_NAME)
    present = [name for name in names if (out_dir / name).exists()]
    if present and not _is_export(out_dir):
        raise UserError(
            f"--out {out_dir} holds {', '.join(present)}, and no {CONFIG_NAME} of an export: they would be "
            "overwritten. Name another folder, or move them away"
        )
    if format != "onnx" and space == "backbone" and (out_dir / CODE_NAME).exists():
        raise UserError(
            f"--out {out_dir} holds {CODE_NAME} of an export with --space teacher, which the new {WEIGHTS_NAME} would "
            f"not fit. Name another folder, or remove that one: {shlex.join(['rm', '-r', str(out_dir)])}"
        )


def _is_export(folder: Path) -> bool:
    """Whether the config.json there is one of card.describe."""
    try:
        return "distillation" in json.loads((folder / CONFIG_NAME).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _build_in_own_space(
    student: Student, run_dir: Path, out_dir: Path, format: str, onnx: OnnxOptions
) -> dict[str, bytes]:
    """The files of an export of the raw model, checked."""
    source = student.config["model"]["student_source"]
    if format in ("timm", "huggingface") and not student.is_timm:
        raise UserError(f"the student comes from {source}, which timm cannot build: use --format safetensors or onnx")
    features = find_feature_call(student.backbone)
    config = describe(student, features)
    if format == "onnx":
        model, config["onnx"] = make_onnx(student.trained, student.backbone, "backbone", onnx)
        return _with_texts(model, config, run_dir, format)
    files = _with_texts(_as_safetensors(student.weights), config, run_dir, format)
    with tempfile.TemporaryDirectory() as folder:
        _write(files, Path(folder))
        check_weights_load(student, Path(folder, WEIGHTS_NAME), features)
        if format == "huggingface":
            check_folder_loads(student, Path(folder), features)
    return files


def _build_in_teacher_space(
    student: Student, run_dir: Path, out_dir: Path, format: str, onnx: OnnxOptions
) -> dict[str, bytes]:
    """The files of an export with folded heads, checked."""
    space = student.trained.in_teacher_space()
    config = describe(student, space=space)
    for sentence in reservations(config["distillation"]):
        print(sentence.replace("`", ""), file=sys.stderr)
    if format == "onnx":
        model, config["onnx"] = make_onnx(student.trained, space, "teacher", onnx)
        return _with_texts(model, config, run_dir, format)
    files = _with_texts(_as_safetensors(weights_of(student, space)), config, run_dir, format)
    files[CODE_NAME] = code_of(student, space, find_forward(student.backbone, space.heads)).encode()
    if (hub := hub_folder(student.config["model"])) is not None:
        files |= hub_code(hub, out_dir)
    with tempfile.TemporaryDirectory() as folder:
        _write(files, Path(folder))
        check_alone(Path(folder), student, space)
    return files


def _with_texts(model: bytes, config: dict, run_dir: Path, format: str) -> dict[str, bytes]:
    return {
        ONNX_NAME if format == "onnx" else WEIGHTS_NAME: model,
        CONFIG_NAME: json.dumps(config, indent=2).encode() + b"\n",
        CARD_NAME: build_card(run_dir, config, format).encode(),
    }


def _write(files: Mapping[str, bytes], folder: Path) -> list[Path]:
    """Write each file atomically; names may have folders in them."""
    paths = {folder / name: content for name, content in files.items()}
    # config.json first: by it the folder of an export that was killed is known as one
    for path in sorted(paths, key=lambda path: path.name != CONFIG_NAME):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, paths[path])
    return list(paths)


def _as_safetensors(weights: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(weights, metadata={"format": "pt"})


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
        model = load_from_hub(student.config["model"], arguments)
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
    found = evaluate(features, model=model.eval(), images=images)
    assert is_same(found, wanted.pooled), f"built anew, the model has other {features}"
