"""Take the student away: its weights under the model's own names, or ONNX, with a configuration and a model card.

    python -m distillery.export --run DIR --out DIR                        # model.safetensors for timm.create_model
    python -m distillery.export --run DIR --out DIR --format onnx --ema    # model.onnx of the averaged weights

Only the student leaves: teacher, heads and optimiser stay behind.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.export_card import build_card
from distillery.files import expand_path, write_atomic
from distillery.process import EXIT_DONE, UserError, run_command
from distillery.report_facts import dataset_label

if TYPE_CHECKING:  # --help and wrong arguments answer before torch is imported
    from torch import Tensor, nn

    from distillery.models import Backbone

FORMATS = ("timm", "safetensors", "onnx")
WEIGHTS_NAME, ONNX_NAME, CONFIG_NAME, CARD_NAME = "model.safetensors", "model.onnx", "config.json", "README.md"
ONNX_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Student:
    """A student ready to leave; the backbone holds the weights, for images normalised with its own mean and std."""

    backbone: Backbone
    weights: dict[str, Tensor]
    config: dict[str, dict[str, Any]]
    step: int
    is_ema: bool
    timm_kwargs: dict[str, Any] | None  # None: not a timm model


def export_student(
    run_dir: Path, out_dir: Path, format: str = "timm", checkpoint: Path | None = None, ema: bool = False
) -> list[Path]:
    """Write a run's student into a folder.

    Args:
        run_dir: the run folder.
        out_dir: made if need be; files of the same names are replaced.
        format: "timm" and "safetensors" write model.safetensors with exactly the raw model's keys, without classifier
            (timm: refused for a student that timm cannot build); "onnx" writes model.onnx with a dynamic batch.
        checkpoint: a checkpoint file; the run's newest complete one by default.
        ema: the averaged weights instead of the last ones.
    Returns:
        The files written: the weights, config.json and README.md.
    Raises:
        UserError: no checkpoint, no EMA weights, an unknown format, or weights that are not this student's.
    """
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    student = load_student(run_dir, checkpoint, ema=ema)
    source = student.config["model"]["student_source"]
    if format == "timm" and student.timm_kwargs is None:
        raise UserError(f"the student comes from {source}, which timm cannot build: use --format safetensors or onnx")
    out_dir.mkdir(parents=True, exist_ok=True)
    weights_path = out_dir / (ONNX_NAME if format == "onnx" else WEIGHTS_NAME)
    if format == "onnx":
        write_onnx(student.backbone, weights_path)
    else:
        write_safetensors(student.weights, weights_path)
        if student.timm_kwargs is not None:
            check_timm_loads(student, weights_path)
    config = describe(student)
    config_path, card_path = out_dir / CONFIG_NAME, out_dir / CARD_NAME
    write_atomic(config_path, json.dumps(config, indent=2).encode() + b"\n")
    write_atomic(card_path, build_card(run_dir, config, weights_path.name).encode())
    return [weights_path, config_path, card_path]


def load_student(run_dir: Path, checkpoint: Path | None = None, *, ema: bool = False) -> Student:
    """The student of a run's checkpoint, rebuilt from the configuration in it."""
    from distillery.checkpoint import latest_checkpoint, load_checkpoint

    path = checkpoint or latest_checkpoint(run_dir)
    if path is None:
        raise UserError(
            f"{run_dir} has no complete checkpoint. Start distill_trainer.py, or name one: --checkpoint PATH"
        )
    state = load_checkpoint(path)
    weights = state.get("ema") if ema else state["student"]
    if weights is None:
        raise UserError(f"{path} has no averaged weights: the run had ema_decay: null. Leave --ema out.")
    config = state["config"]
    backbone = build_bare_student(config)
    weights = own_weights(backbone.model, weights, path)
    backbone.model.load_state_dict(weights)
    backbone.eval()
    is_timm = config["model"]["student_source"] == "timm"
    timm_kwargs = find_timm_kwargs(config["model"], backbone.img_size) if is_timm else None
    return Student(backbone, weights, config, state["progress"]["step"], ema, timm_kwargs)


def build_bare_student(config: dict[str, dict[str, Any]]) -> Backbone:
    """The student's backbone as the trainer builds it, untrained, without classifier where it can be left out.

    Args:
        config: sections data and model, as in a checkpoint.
    Returns:
        A backbone that takes images normalised with its own mean and std.
    """
    from distillery.models import build_backbone

    data, model = config["data"], config["model"]

    def build(data_mean: tuple[float, ...], data_std: tuple[float, ...]) -> Backbone:
        return build_backbone(
            source=model["student_source"],
            name=model["student_name"],
            repo=model.get("student_repo"),
            pretrained=False,
            img_size=model.get("student_img_size"),
            kwargs=without_classes(model),
            mean=model.get("student_mean"),
            std=model.get("student_std"),
            data_mean=data_mean,
            data_std=data_std,
            image_size=data["image_size"],
            use_cls_token=model.get("use_cls_token", True),
        )

    as_trained = build(data["mean"], data["std"])
    return build(as_trained.mean, as_trained.std)


def without_classes(model: dict[str, Any]) -> dict[str, Any]:
    """student_kwargs, for a timm model without the number of classes: no loss trains the student's own classifier."""
    kwargs = dict(model.get("student_kwargs") or {})
    if model["student_source"] == "timm":
        kwargs.pop("num_classes", None)
    return kwargs


def own_weights(model: nn.Module, weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The weights that the model has a place for; only a classifier may be left over.

    Raises:
        UserError: a tensor is missing, has another shape, or belongs to no part of the model.
    """
    own = model.state_dict()
    missing = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier))
    unknown = [name for name in weights if name not in own and not name.startswith(prefixes)]
    if missing or unknown:
        raise UserError(
            f"{path}: its weights are not those of the student in its configuration: {len(missing)} of {len(own)} "
            f"tensors missing or of another shape {missing[:3]}, {len(unknown)} unknown {unknown[:3]}"
        )
    return {name: weights[name].detach().cpu().clone().contiguous() for name in own}


def find_timm_kwargs(model: dict[str, Any], img_size: tuple[int, int]) -> dict[str, Any]:
    """What timm.create_model needs besides the name to build the student at its input size (height, width in px)."""
    import timm

    kwargs = without_classes(model)
    native = timm.create_model(model["student_name"], num_classes=0, **kwargs)
    if "img_size" in kwargs or tuple(native.pretrained_cfg["input_size"][1:]) == img_size:
        return kwargs
    sized = kwargs | {"img_size": img_size[0] if img_size[0] == img_size[1] else img_size}
    try:
        timm.create_model(model["student_name"], num_classes=0, **sized)
    except TypeError:
        return kwargs  # a convolutional model: it takes any size
    return sized


def write_safetensors(weights: dict[str, Tensor], path: Path) -> None:
    """Write a state dict as safetensors, atomically."""
    from safetensors.torch import save

    write_atomic(path, save(weights, metadata={"format": "pt"}))


def check_timm_loads(student: Student, path: Path) -> None:
    """Build the student as its user will, from the file just written: timm loads strictly, so nothing is missing."""
    import timm

    name = student.config["model"]["student_name"]
    timm.create_model(name, num_classes=0, checkpoint_path=str(path), **(student.timm_kwargs or {}))


def write_onnx(backbone: Backbone, path: Path) -> None:
    """Write the pooled features as an ONNX model: "images" float32 [batch, 3, H, W] -> "features" [batch, D].

    It is checked before it gets its name: by onnx.checker, and against PyTorch where onnxruntime is installed.

    Raises:
        UserError: a package is missing.
    """
    import torch

    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it, and says so less plainly
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}, which is not installed. Run: pip install onnx onnxscript"
        ) from error

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, images: Tensor) -> Tensor:
            return self.backbone(images).pooled

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *backbone.img_size, generator=generator)
    program = torch.onnx.export(
        Pooled().eval(),
        (images,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    content = program.model_proto.SerializeToString()
    onnx.checker.check_model(content)
    compare_onnx(backbone, content, torch.randn(3, 3, *backbone.img_size, generator=generator))
    write_atomic(path, content)


def compare_onnx(backbone: Backbone, content: bytes, images: Tensor) -> None:
    """Run both on a batch of another size than the traced one; without onnxruntime there is nothing to compare.

    Raises:
        RuntimeError: they differ.
    """
    import torch

    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        ours = backbone(images).pooled
    difference = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12)).item()
    if difference > ONNX_TOLERANCE:
        raise RuntimeError(f"the ONNX model differs from PyTorch by {difference:.1e} of the largest feature")


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
    architecture = getattr(backbone.model, "pretrained_cfg", {}).get("architecture", model["student_name"])
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
        },
    }


def main() -> int:
    """Export one student."""
    parser = argparse.ArgumentParser(
        prog="python -m distillery.export", description=__doc__.split("\n\n")[0], allow_abbrev=False
    )
    parser.add_argument("--run", required=True, type=Path, metavar="DIR", help="run folder (checkpoint_dir)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write, made if need be")
    parser.add_argument("--format", choices=FORMATS, default="timm", help="default: timm")
    parser.add_argument("--checkpoint", type=Path, metavar="PATH", help="default: the newest of the run")
    parser.add_argument("--ema", action="store_true", help="the averaged weights (ema_decay) instead of the last ones")
    arguments = parser.parse_args()
    checkpoint = expand_path(arguments.checkpoint) if arguments.checkpoint else None
    written = export_student(
        expand_path(arguments.run), expand_path(arguments.out), arguments.format, checkpoint, arguments.ema
    )
    for path in written:
        print(path)
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
