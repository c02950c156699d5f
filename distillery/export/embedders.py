"""The models that embeddings are made with: a run's student or teacher, its untrained student, any other model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distillery.config.keys_data import DataConfig
from distillery.config.keys_model import ModelConfig
from distillery.config.load import Configs
from distillery.models.backbone import Backbone
from distillery.models.configured import build_student_backbone, choose_precision, on_device
from distillery.models.weights import weights_hash
from distillery.system.errors import UserError
from distillery.training.build import build_teacher
from distillery.training.checkpoints import latest_checkpoint, load_checkpoint
from distillery.training.trained import Weights, check_teacher, load_trained


@dataclass(frozen=True)
class Embedder:
    """A model that gives embeddings, in eval mode on its device.

    module: images normalised as the data are -> Features whose pooled is the embedding. width: its channels. precision:
    bf16, fp16 or fp32, what it is computed in on CUDA. identity: plain values that decide the embeddings of an image.
    """

    module: nn.Module
    width: int
    precision: str
    identity: dict[str, Any]

    @property
    def label(self) -> str:
        """One line for the console."""
        facts = self.identity
        step = f" at step {facts['step']}" if "step" in facts else ""
        averaged = ", averaged weights" if facts.get("averaged") else ""
        space = ", in its teacher's space" if facts["space"] == "teacher" else ""
        return f"{facts['name']} ({facts['role']}{step}{averaged}{space}): {self.width} channels, {self.precision}"


def teacher_embedder(configs: Configs, data: DataConfig, device: torch.device, run_dir: Path | None = None) -> Embedder:
    """The teacher as training runs it, in its own precision.

    Args:
        configs: the run's: its data section gives the teacher's input size.
        data: of the images to come.
        device: where it goes.
        run_dir: the run folder, where it is a run's.
    Raises:
        UserError: the run's student was trained towards a teacher of other weights.
    """
    backbone = build_teacher(configs, device).backbone
    checkpoint = None if run_dir is None else latest_checkpoint(run_dir)
    check_teacher(backbone, {checkpoint: load_checkpoint(checkpoint)} if checkpoint else {})
    facts = {"role": "teacher", "space": "backbone", "precision": backbone.precision}
    return _embedder(backbone, backbone, data, device, facts | _facts_of(backbone, configs.model.side("teacher")))


def untrained_embedder(configs: Configs, data: DataConfig, device: torch.device, role: str) -> Embedder:
    """The student before its first step, as the trainer draws it; role: what to call it. Arguments as of the teacher's.

    With student_pretrained or student_checkpoint it has those weights.
    """
    torch.manual_seed(configs.train.seed)
    backbone = build_student_backbone(configs.model, configs.data)
    facts = {"role": role, "space": "backbone", "precision": choose_precision(configs.train.precision, device)}
    return _embedder(backbone, backbone, data, device, facts | _facts_of(backbone, configs.model.side("student")))


def student_embedder(
    run_dir: Path,
    data: DataConfig,
    device: torch.device,
    *,
    space: str = "backbone",
    checkpoint: Path | None = None,
    weights: Weights = "auto",
) -> Embedder:
    """The student of a run's checkpoint.

    Args:
        run_dir: the run folder.
        data: of the images to come.
        device: where it goes.
        space: "teacher": behind its head, in the units of the teacher's own features.
        checkpoint: as of load_trained.
        weights: as of load_trained.
    Raises:
        UserError: as load_trained; or the run has no head for pooled features.
    """
    trained = load_trained(run_dir, checkpoint, weights=weights)
    module = backbone = trained.backbone
    facts = {
        "role": "student",
        "space": space,
        "precision": choose_precision(trained.config["train"].get("precision", "auto"), device),
        "step": trained.step,
        "averaged": trained.is_averaged,
    }
    if space == "teacher":
        module = trained.in_teacher_space()
        if "pooled" not in module.widths:
            raise UserError(
                "this run has no head for pooled features: no loss of its distill_loss_weights compares them (cls, mse "
                "and others do). Its student is only there in its own space: --space backbone"
            )
        facts["heads_hash"] = weights_hash(module.heads["pooled"])
    # without validation: an older checkpoint may lack keys
    given = ModelConfig.model_construct(**trained.config["model"]).side("student")
    return _embedder(module, backbone, data, device, facts | _facts_of(backbone, given))


def _facts_of(backbone: Backbone, given: dict[str, Any]) -> dict[str, Any]:
    """Which model it is: what its source calls it, its input, its weights. given: its side of the configuration."""
    facts = {key: given[key] for key in ("source", "name", "kwargs", "use_cls_token")} | {
        "projection": backbone.projection,
        "img_size": backbone.img_size,
        "mean": backbone.mean,
        "std": backbone.std,
        "weights_hash": weights_hash(backbone.model),
    }
    # only where it is set: what was embedded before this key goes on
    return facts | {"mirror": True} if backbone.mirror else facts


def _embedder(
    module: nn.Module, backbone: Backbone, data: DataConfig, device: torch.device, identity: dict[str, Any]
) -> Embedder:
    backbone.set_data_normalisation(data.mean, data.std)
    width = backbone.pooled_width if module is backbone else module.widths["pooled"]
    return Embedder(on_device(module.eval(), device), width, identity["precision"], identity)
