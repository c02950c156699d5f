"""The student of a checkpoint, and the call with which timm, torchvision or torch.hub builds the same model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.system.files import expand_path

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.models.backbone import Backbone
    from distillery.training.trained import TrainedStudent, Weights


@dataclass(frozen=True)
class Student:
    """A student ready to leave.

    trained: takes images normalised with its own mean and std. architecture: what the source calls the model;
    model_args: what its constructor needs besides, at the student's input size; is_timm: whether that is timm's.
    """

    trained: TrainedStudent
    architecture: str
    model_args: dict[str, Any]
    is_timm: bool

    @property
    def backbone(self) -> Backbone:
        """The student's."""
        return self.trained.backbone

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights of the raw model."""
        return self.trained.weights

    @property
    def config(self) -> dict[str, dict[str, Any]]:
        """The run's: sections data, model and train."""
        return self.trained.config


def load_student(run_dir: Path, checkpoint: Path | None = None, *, weights: Weights = "auto") -> Student:
    """The student of a run's checkpoint, and how its source builds the same model; errors as of load_trained."""
    from distillery.training.trained import load_trained

    trained = load_trained(run_dir, checkpoint, weights=weights)
    model = trained.config["model"]
    is_timm = model["student_source"] == "timm"
    find_call = find_timm_call if is_timm else find_other_call
    architecture, model_args = find_call(model, trained.backbone.img_size)
    return Student(trained, architecture, model_args, is_timm)


def find_timm_call(model: dict[str, Any], img_size: tuple[int, int]) -> tuple[str, dict[str, Any]]:
    """The architecture and the arguments with which timm.create_model builds the student at its input size.

    Args:
        model: the keys of model_config_kd.yaml.
        img_size: height and width of its input, px.
    """
    import timm

    from distillery.training.trained import without_classes

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
        load_from_hub(model, {"pretrained": False} | kwargs)
    except TypeError:
        return name, kwargs  # its entry point does not know the word
    return name, {"pretrained": False} | kwargs


def hub_folder(model: dict[str, Any]) -> Path | None:
    """The local folder of a torch.hub student; None for one of GitHub or of another source."""
    if model["student_source"] != "torch_hub":
        return None
    folder = expand_path(model["student_repo"])
    return folder if folder.is_dir() else None


def load_from_hub(model: dict[str, Any], kwargs: dict[str, Any]) -> nn.Module:
    """A torch.hub student, of a local folder with hubconf.py or of GitHub's owner/name[:ref].

    Args:
        model: the keys of model_config_kd.yaml.
        kwargs: of its entry point.
    """
    import torch

    from distillery.models.isolation import repository_of

    folder, name = hub_folder(model), model["student_name"]
    if folder is None:
        return torch.hub.load(model["student_repo"], name, trust_repo=True, verbose=False, **kwargs)
    with repository_of([folder]).active():
        return torch.hub.load(str(folder), name, source="local", **kwargs)


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
