"""Rebuild the student of a checkpoint as it was trained: backbone, weights, and how timm builds the same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.config.keys_model import ModelConfig
from distillery.system.errors import UserError
from distillery.system.files import expand_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.models.backbone import Backbone


@dataclass(frozen=True)
class Student:
    """A student ready to leave; the backbone holds the weights, for images normalised with its own mean and std.

    global_batch_size: images per step, None where the checkpoint does not say; architecture: what the source calls the
    model; model_args: what its constructor needs besides, at the student's input size; is_timm: whether that is timm's.
    """

    backbone: Backbone
    weights: dict[str, Tensor]
    config: dict[str, dict[str, Any]]
    step: int
    global_batch_size: int | None
    is_ema: bool
    architecture: str
    model_args: dict[str, Any]
    is_timm: bool


def load_student(run_dir: Path, checkpoint: Path | None = None, *, ema: bool = False) -> Student:
    """The student of a run's checkpoint, rebuilt from the configuration in it.

    Raises:
        UserError: no checkpoint, no averaged weights, or weights that are not this student's.
    """
    from distillery.training.checkpoints import latest_checkpoint, load_checkpoint

    path = checkpoint or latest_checkpoint(run_dir)
    if path is None:
        raise UserError(
            f"{run_dir} has no complete checkpoint. Start distill_trainer.py, or name one: --checkpoint PATH"
        )
    state = load_checkpoint(path)
    weights = state.get("ema") if ema else state["student"]
    if weights is None:
        raise UserError(f"{path} has no averaged weights: the run had ema_decay: null. Use --weights student.")
    config = state["config"]
    backbone = build_bare_student(config)
    weights = own_weights(backbone.model, weights, path)
    backbone.model.load_state_dict(weights)
    backbone.eval()
    is_timm = config["model"]["student_source"] == "timm"
    find_call = find_timm_call if is_timm else find_other_call
    architecture, model_args = find_call(config["model"], backbone.img_size)
    return Student(
        backbone=backbone,
        weights=weights,
        config=config,
        step=state["progress"]["step"],
        global_batch_size=state.get("global_batch_size"),
        is_ema=ema,
        architecture=architecture,
        model_args=model_args,
        is_timm=is_timm,
    )


def build_bare_student(config: dict[str, dict[str, Any]]) -> Backbone:
    """The student's backbone as the trainer builds it, untrained, without classifier where it can be left out.

    Args:
        config: sections data and model, as in a checkpoint.
    Returns:
        A backbone that takes images normalised with its own mean and std.
    """
    from distillery.models.backbone import build_backbone
    from distillery.models.builders import ModelSpec

    data, model = config["data"], config["model"]
    # without validation: an older checkpoint may lack keys
    given = ModelConfig.model_construct(**model).side("student")
    untrained = {"pretrained": False, "checkpoint": None, "drop_path_rate": None, "out_indices": None}
    spec = ModelSpec(**given | untrained | {"kwargs": without_classes(model)})
    as_trained = build_backbone(spec, data_mean=data["mean"], data_std=data["std"], image_size=data["image_size"])
    mean, std = as_trained.mean, as_trained.std
    return build_backbone(spec, data_mean=mean, data_std=std, image_size=data["image_size"])


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


def find_timm_call(model: dict[str, Any], img_size: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """The architecture and the arguments with which timm.create_model builds the student at its input size.

    Args:
        model: the keys of model_config_kd.yaml.
        img_size: height and width of its input, px.
    """
    import timm

    architecture, of_folder = read_timm_name(model["student_name"])
    own = without_classes(model)
    kwargs = {name: value for name, value in (of_folder | own).items() if name != "num_classes"}
    if "img_size" in own:
        return architecture, kwargs
    native = timm.create_model(architecture, num_classes=0, **kwargs)
    if "img_size" not in of_folder and tuple(native.pretrained_cfg["input_size"][1:]) == img_size:
        return architecture, kwargs
    sized = kwargs | {"img_size": img_size[0] if img_size[0] == img_size[1] else img_size}
    try:
        timm.create_model(architecture, num_classes=0, **sized)
    except TypeError:
        return architecture, kwargs  # a convolutional model: it takes any size
    return architecture, sized


def find_other_call(model: dict[str, Any], img_size: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """The name and the arguments with which torchvision or torch.hub builds the student without pretrained weights."""
    name, kwargs = model["student_name"], dict(model.get("student_kwargs") or {})
    if model["student_source"] == "torchvision":
        kwargs = {key: value for key, value in kwargs.items() if key != "weights"} | {"weights": None}
        return name, kwargs | ({"image_size": img_size[0]} if name.startswith("vit_") else {})
    try:
        load_from_hub(model["student_repo"], name, {"pretrained": False} | kwargs)
    except TypeError:
        return name, kwargs  # its entry point does not know the word
    return name, {"pretrained": False} | kwargs


def load_from_hub(repo: str, name: str, kwargs: dict[str, Any]) -> nn.Module:
    """A model of a local folder with hubconf.py, or of GitHub's owner/name[:ref]."""
    import torch

    folder = expand_path(repo)
    if folder.is_dir():
        return torch.hub.load(str(folder), name, source="local", **kwargs)
    return torch.hub.load(repo, name, trust_repo=True, verbose=False, **kwargs)


def read_timm_name(name: str) -> tuple[str, dict[str, Any]]:
    """Architecture and arguments of a timm model: those in config.json where the name is a folder's or repository's.

    Args:
        name: an architecture, with a tag or without; "local-dir:FOLDER"; "hf-hub:USER/NAME".
    """
    kind, _, place = name.partition(":")
    if not place:
        return name, {}
    from timm.models import _hub

    load = _hub.load_model_config_from_path if kind == "local-dir" else _hub.load_model_config_from_hf
    _, architecture, arguments = load(place)
    return architecture, dict(arguments or {})
