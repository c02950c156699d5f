"""The student of a finished or running run, rebuilt from a checkpoint alone: no teacher, no data, no optimiser."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from distillery.config.keys_model import ModelConfig
from distillery.losses.targets import Targets
from distillery.losses.teacher_space import TeacherSpace, fold_heads, last_linear
from distillery.models.backbone import Backbone, build_backbone
from distillery.models.builders import ModelSpec
from distillery.models.pair import build_projector
from distillery.models.weights import weights_hash, with_pooling
from distillery.system.errors import UserError
from distillery.training.checkpoints import latest_checkpoint, load_checkpoint

Weights = Literal["auto", "student", "ema"]


@dataclass(frozen=True)
class TrainedStudent:
    """The student of a checkpoint, in eval mode, on the CPU.

    backbone: with its weights. weights: those of the raw model. head_weights: of the heads as trained, towards targets
    that are standardised with `statistics`. config: the run's, sections data, model and train. global_batch_size:
    images per step, None where the checkpoint does not say. is_averaged: whether these are the averaged weights;
    heads_are_averaged: likewise of the heads, which runs of earlier versions did not average.
    """

    backbone: Backbone
    weights: dict[str, Tensor]
    head_weights: dict[str, Tensor]
    statistics: dict[str, Tensor]
    config: dict[str, dict[str, Any]]
    step: int
    global_batch_size: int | None
    is_averaged: bool
    heads_are_averaged: bool

    def in_teacher_space(self) -> TeacherSpace:
        """The student with folded heads: its features are those of the teacher, in the teacher's units.

        Raises:
            UserError: the run has no head for pooled features or tokens.
        """
        heads = build_heads(self.head_weights, self.config, self.backbone)
        method = self.config["train"].get("standardise_targets", True)
        targets = Targets({field: last_linear(head).out_features for field, head in heads.items()}, method)
        if self.statistics:
            targets.load_statistics(self.statistics)
        return TeacherSpace(self.backbone, fold_heads(heads, targets)).eval()


def load_trained(
    run_dir: Path,
    checkpoint: Path | None = None,
    *,
    weights: Weights = "auto",
    data_mean: Iterable[float] | None = None,
    data_std: Iterable[float] | None = None,
) -> TrainedStudent:
    """The student of a run's checkpoint, rebuilt from the configuration in it.

    Args:
        run_dir: the run folder.
        checkpoint: a checkpoint file; None: the run's newest complete one.
        weights: "auto": the averaged ones where the run has them (ema_decay), else the last ones.
        data_mean: with data_std: what the images that it will get are normalised with; None: the student's own.
        data_std: see data_mean.
    Raises:
        UserError: no checkpoint, no averaged weights, or weights that are not this student's.
    """
    path = checkpoint or latest_checkpoint(run_dir)
    if path is None:
        raise UserError(
            f"{run_dir} has no complete checkpoint. Start distill_trainer.py, or name one: --checkpoint PATH"
        )
    state = load_checkpoint(path)
    is_averaged = state.get("ema") is not None if weights == "auto" else weights == "ema"
    chosen = state.get("ema") if is_averaged else state["student"]
    if chosen is None:
        raise UserError(f"{path} has no averaged weights: the run had ema_decay: null. Use --weights student.")
    averaged_heads = state.get("ema_heads") if is_averaged else None
    config = state["config"]
    backbone = build_bare_student(config, data_mean, data_std)
    own = own_weights(backbone.model, chosen, path)
    backbone.model.load_state_dict(own)
    return TrainedStudent(
        backbone=backbone.eval(),
        weights=own,
        head_weights=averaged_heads or state["heads"],
        statistics=state.get("target_statistics") or {},
        config=config,
        step=state["progress"]["step"],
        global_batch_size=state.get("global_batch_size"),
        is_averaged=is_averaged,
        heads_are_averaged=bool(averaged_heads),
    )


def build_bare_student(
    config: dict[str, dict[str, Any]],
    data_mean: Iterable[float] | None = None,
    data_std: Iterable[float] | None = None,
) -> Backbone:
    """The student's backbone as the trainer builds it, untrained, without classifier where it can be left out.

    Args:
        config: sections data and model, as in a checkpoint.
        data_mean: as of load_trained.
        data_std: as of load_trained.
    """
    data, model = config["data"], config["model"]
    # without validation: an older checkpoint may lack keys
    given = ModelConfig.model_construct(**model).side("student")
    untrained = {"pretrained": False, "checkpoint": None, "drop_path_rate": None, "out_indices": None}
    spec = ModelSpec(**given | untrained | {"kwargs": without_classes(model)})
    built = build_backbone(spec, data_mean=data["mean"], data_std=data["std"], image_size=data["image_size"])
    built.set_data_normalisation(data_mean or built.mean, data_std or built.std)
    return built


def without_classes(model: dict[str, Any]) -> dict[str, Any]:
    """student_kwargs, for a timm model without the number of classes: no loss trains the student's own classifier."""
    kwargs = dict(model.get("student_kwargs") or {})
    if model["student_source"] == "timm":
        kwargs.pop("num_classes", None)
    return kwargs


def own_weights(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
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


def build_heads(state: Mapping[str, Tensor], config: dict[str, dict[str, Any]], backbone: Backbone) -> nn.ModuleDict:
    """The heads of a checkpoint; their widths are those of the saved weights.

    Args:
        state: the checkpoint's `heads`.
        config: its sections.
        backbone: the student's.
    """
    projector, heads = dict(config["model"].get("projector") or {}), nn.ModuleDict()
    own = backbone.widths
    for field in dict.fromkeys(name.partition(".")[0] for name in state):
        if field not in own:  # logits and inner layers: a bare student does not give them
            continue
        weights = [value for name, value in state.items() if name.startswith(f"{field}.") and value.ndim == 2]
        if projector.get("type") != "linear":
            projector["hidden_dim"] = len(weights[0])
        heads[field] = build_projector(own[field], len(weights[-1]), **projector)
    heads.load_state_dict({name: value for name, value in state.items() if name.partition(".")[0] in heads})
    return heads


def check_teacher(teacher: Backbone, states: Mapping[Path, Mapping[str, Any]]) -> None:
    """Raise UserError unless the students were trained towards a teacher of these weights, pooled in this way.

    states: path of a checkpoint -> its content.
    """
    now = with_pooling(weights_hash(teacher.model), teacher.pooling)
    for path, state in states.items():
        trained = state.get("teacher_hash")
        if trained not in (None, now):
            raise UserError(
                f"{path}: its student was trained towards a teacher of other weights ({trained}) than there are now "
                f"({now}). Put the teacher's files (teacher_name, teacher_repo, teacher_checkpoint) back."
            )
