"""Build raw models from timm, torchvision and torch.hub, at the input size of the images.

A new kind of model is one builder, (ModelSpec, image_size in px) -> BuiltModel, and one line in BUILDERS. INTERFACES in
adapters.py lists what a model must offer: in most cases forward_features.
"""

import ast
import difflib
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from distillery.models.isolation import repository_of
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

SIZE_KEYS = "teacher_img_size or student_img_size"
WEIGHTS_REMEDY = (
    "Without internet here, run precompute_cache.py --download_only on a login node first, "
    "or name a local file with teacher_checkpoint or student_checkpoint"
)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model as the configuration describes it.

    source: one of BUILDERS.
    name: as the source knows it; a timm name may carry a tag.
    repo: for torch_hub, "owner/name[:ref]" or a folder with hubconf.py.
    pretrained: take the source's weights.
    checkpoint: local weights, which replace the source's: `pretrained` then downloads nothing. FILE#ENTRY names one of
        several models in the file.
    img_size: the model's input in px; None: the data's image_size, rounded to the model's patch. `img_size` in kwargs
        wins.
    kwargs: passed to the model's constructor.
    mean, std: the model's own normalisation; None: what the model states, else the data's.
    use_cls_token: pooled is the class token, or the attention pooling of a model that has one; false, or without a
        class token: the mean of the patches, or the model's own pooling.
    drop_path_rate: passed to timm models that take it.
    with_logits: keep the classifier and give its output.
    projection: pooled is what comes out of the classifier's place, where an image-text model has its projection into
        text space. timm alone.
    mirror: the features are means over the image and its mirror image.
    out_indices: intermediate layers for Features.layers, numbered as in timm's forward_intermediates.
    gradient_checkpointing: keep only the input of each block, and compute the rest again in the backward pass.
    role: "teacher" or "student": which of the two a checkpoint with both is read for.
    """

    source: str
    name: str
    repo: str | None = None
    pretrained: bool
    checkpoint: str | Path | None = None
    img_size: int | None = None
    kwargs: Mapping[str, Any] | None = None
    mean: Iterable[float] | None = None
    std: Iterable[float] | None = None
    use_cls_token: bool = True
    drop_path_rate: float | None = None
    with_logits: bool = False
    projection: bool = False
    mirror: bool = False
    out_indices: Sequence[int] | None = None
    gradient_checkpointing: bool = False
    role: str | None = None

    @property
    def label(self) -> str:
        """The model's name in messages."""
        return f"{self.source} model {self.name!r}"

    @property
    def takes_published_weights(self) -> bool:
        """Whether the source's weights are loaded."""
        return self.pretrained and self.checkpoint is None

    @property
    def is_on_hub(self) -> bool:
        """Whether the name is that of a repository of the Hugging Face hub, which describes the model."""
        return self.source == "timm" and self.name.startswith(("hf-hub:", "hf_hub:"))

    @property
    def needs_classifier(self) -> bool:
        """Whether the model is built, and its weights are loaded, with what is in the classifier's place."""
        return self.with_logits or self.projection


@dataclass(frozen=True)
class BuiltModel:
    """A raw model, the input it gets (height, width in px) and its own normalisation where it states one."""

    model: nn.Module
    img_size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def build_model(spec: ModelSpec, image_size: int) -> BuiltModel:
    """The raw model of a source, with the source's weights or untrained; a checkpoint is not loaded yet.

    Raises:
        UserError: unknown names, arguments that the model does not take, weights that cannot be had.
    """
    if spec.source not in BUILDERS:
        raise UserError(f"unknown model source {spec.source!r}; known: {', '.join(BUILDERS)}")
    return BUILDERS[spec.source](spec, image_size)


def build_timm(spec: ModelSpec, image_size: int) -> BuiltModel:
    """A timm model, its position embedding resampled to the input size, without classifier unless it is needed.

    Raises:
        UserError: as build_model; and with spec.projection, a classifier of images in the projection's place.
    """
    import timm

    if ":" not in spec.name:  # not of a repository (hf-hub:) or folder (local-dir:)
        architecture, _, tag = spec.name.partition(".")
        if not timm.is_model(spec.name):
            raise _unknown(spec.label, architecture, timm.list_models())
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        if tag and tagged and spec.name not in tagged:
            raise _unknown(spec.label, spec.name, tagged)
    kwargs = {} if spec.needs_classifier else {"num_classes": 0}
    kwargs |= spec.kwargs or {}
    explicit = kwargs.get("img_size", spec.img_size)
    optional = {"img_size": explicit or image_size, "drop_path_rate": spec.drop_path_rate}
    model, takes_size = _create_timm(spec, optional, kwargs)
    size = _input_size(spec.label, explicit, image_size, patch_size_of(model))
    if takes_size and not explicit and size != _pair(image_size):
        model, _ = _create_timm(spec, optional | {"img_size": size}, kwargs)
    if spec.projection:
        _check_projection(spec.label, model)
    config = model.pretrained_cfg
    return BuiltModel(model, size, config.get("mean"), config.get("std"))


def _check_projection(label: str, model: nn.Module) -> None:
    """Raise UserError where a timm model has a classifier, or nothing, in the place of a projection."""
    from timm.data import infer_imagenet_subset

    # CLIP's projections are narrower than the features, those of small PE models up to 2.7 times as wide
    if 0 < model.num_classes <= 4 * model.num_features and not infer_imagenet_subset(model):
        return
    found = f"a classifier of {model.num_classes} classes" if model.num_classes else "nothing"
    raise UserError(
        f"teacher_projection: {label} has {found} in the place of a projection into text space. Set it to false (a "
        "SigLIP model's own feature is in text space already), or take weights that have one, such as "
        "vit_base_patch16_clip_224.openai"
    )


def _create_timm(spec: ModelSpec, optional: dict[str, Any], kwargs: dict[str, Any]) -> tuple[nn.Module, bool]:
    """The model, and whether it took an img_size: optional arguments that its class does not know are left out."""
    import timm

    optional = {key: value for key, value in optional.items() if value is not None}
    while True:
        try:
            model = timm.create_model(spec.name, pretrained=spec.takes_published_weights, **(optional | kwargs))
            return model, "img_size" in optional | kwargs
        except TypeError as error:
            rejected = [key for key in optional if key not in kwargs and f"'{key}'" in str(error)]
            if not rejected:
                raise _refused_arguments(spec.label, error, kwargs) from error
            optional = {key: value for key, value in optional.items() if key not in rejected}
        except Exception as error:
            is_network = spec.is_on_hub and isinstance(error, OSError)
            raise _load_error(spec.label, spec.takes_published_weights or is_network, error) from error


def build_torchvision(spec: ModelSpec, image_size: int) -> BuiltModel:
    """A torchvision classification model; kwargs may choose `weights`, e.g. IMAGENET1K_V1."""
    from torchvision import models as tv
    from torchvision.models.vision_transformer import interpolate_embeddings

    if spec.name not in tv.list_models(module=tv):
        raise _unknown(spec.label, spec.name, tv.list_models(module=tv))
    kwargs = dict(spec.kwargs or {})
    choices = tv.get_model_weights(spec.name)
    chosen = kwargs.pop("weights", "DEFAULT")
    if chosen not in choices.__members__:
        raise _unknown(f"weights {chosen!r} of {spec.label}", str(chosen), choices.__members__)
    weights, pretrained = choices[chosen], spec.takes_published_weights
    patch = _pair(int(spec.name.rsplit("_", 1)[1])) if spec.name.startswith("vit_") else None
    size = _input_size(spec.label, kwargs.get("image_size", spec.img_size), image_size, patch)
    if patch:
        kwargs["image_size"] = size[0]
    try:
        # a ViT refuses weights of another input size: these are loaded after resampling their position embedding
        model = tv.get_model(spec.name, weights=weights if pretrained and not patch else None, **kwargs)
        if pretrained and patch:
            state = weights.get_state_dict(progress=False, check_hash=True)
            model.load_state_dict(interpolate_embeddings(size[0], patch[0], state))
    except TypeError as error:
        raise _refused_arguments(spec.label, error, kwargs) from error
    except Exception as error:
        raise _load_error(spec.label, pretrained, error) from error
    transforms = weights.transforms()
    return BuiltModel(model, size, tuple(transforms.mean), tuple(transforms.std))


def build_torch_hub(spec: ModelSpec, image_size: int) -> BuiltModel:
    """A model from a hub repository "owner/name[:ref]" or a local folder with hubconf.py (an existing folder wins).

    That hubconf.py runs with this user's rights, as torch.hub's always does.
    """
    if not spec.repo:
        raise UserError(f"{spec.label}: set teacher_repo or student_repo to owner/name or a folder")
    label, kwargs = f"{spec.label} of {spec.repo}", dict(spec.kwargs or {})
    folder = expand_path(spec.repo)
    places = [folder]
    if folder.is_dir():
        if not (folder / "hubconf.py").is_file():
            raise MissingFileError(f"{label}: there is no hubconf.py in {folder}")
        load = functools.partial(torch.hub.load, str(folder), spec.name, source="local")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w./-]+)?", spec.repo):
        label = f"{label} on GitHub (no folder of that name is here)"
        load = functools.partial(torch.hub.load, spec.repo, spec.name, source="github", verbose=False)
        places = _hub_downloads(spec.repo)
    else:
        raise MissingFileError(f"{label}: {folder} is no folder, and {spec.repo!r} no owner/name[:ref] of GitHub")
    repository = repository_of(places)
    try:
        with repository.active():
            model = _call_hub_entry(functools.partial(load, trust_repo=True, **kwargs), spec.takes_published_weights)
    except TypeError as error:
        raise _refused_arguments(label, error, kwargs) from error
    except Exception as error:
        if "Cannot find callable" in str(error):
            with repository.active():
                raise _unknown(label, spec.name, _hub_names(spec.repo, folder)) from error
        raise _load_error(label, spec.takes_published_weights or not folder.is_dir(), error) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{label}: the entry point returned a {type(model).__name__}, not a torch.nn.Module")
    explicit = kwargs.get("img_size", spec.img_size)
    return BuiltModel(model, _input_size(label, explicit, image_size, patch_size_of(model)))


def _call_hub_entry(load: Callable[..., nn.Module], pretrained: bool) -> nn.Module:
    try:
        return load(pretrained=pretrained)
    except TypeError as error:
        if "'pretrained'" not in str(error):
            raise
        return load()


def _hub_downloads(repo: str) -> list[Path]:
    """The folders in which torch.hub keeps, or will keep, a repository "owner/name[:ref]" of GitHub."""
    name, _, ref = repo.partition(":")
    refs = [ref] if ref else ["main", "master"]  # without one torch.hub takes the default branch
    return [Path(torch.hub.get_dir(), f"{name}_{one}".replace("/", "_")) for one in refs]


def _hub_names(repo: str, folder: Path) -> list[str]:
    """The entry points of a hub repository; a local folder's are read without running it again."""
    if not folder.is_dir():
        return torch.hub.list(repo, trust_repo=True, verbose=False)
    nodes = ast.parse((folder / "hubconf.py").read_text()).body
    defined = [node.name for node in nodes if isinstance(node, ast.FunctionDef)]
    imported = [a.asname or a.name for node in nodes if isinstance(node, ast.ImportFrom) for a in node.names]
    return [name for name in defined + imported if not name.startswith("_")]


BUILDERS: dict[str, Callable[[ModelSpec, int], BuiltModel]] = {
    "timm": build_timm,
    "torchvision": build_torchvision,
    "torch_hub": build_torch_hub,
}


def prepare_parameters(model: nn.Module, label: str) -> None:
    """Weights in float32, whatever they were saved in: precision and autocast choose what is computed in.

    Raises:
        UserError: the model has no weights yet.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise UserError(f"{label} has no parameters: it is no network")
    if any(is_lazy(parameter) for parameter in parameters):
        raise UserError(
            f"{label} has lazy layers, whose shapes are not known yet: run it once on images [1, 3, H, W] where it is "
            "built (in hubconf.py)"
        )
    if any(parameter.is_meta for parameter in parameters) and torch.empty(0).device.type != "meta":
        raise UserError(
            f"{label} is on the meta device, without weights: build it on the CPU, or load its weights there"
        )
    if any(parameter.is_floating_point() and parameter.dtype != torch.float32 for parameter in parameters):
        model.float()


def short_error(error: BaseException) -> str:
    """Kind and text of an error in one line of at most 300 characters."""
    text = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
    return text if len(text) <= 300 else f"{text[:300]} ..."


def round_to_patch(image_size: int, patch: tuple[int, int]) -> tuple[int, int]:
    """The multiples of the patch's height and width nearest to image_size, at least one patch each; px."""
    height, width = (max(1, int(image_size / side + 0.5)) * side for side in patch)
    return height, width


def patch_size_of(model: nn.Module) -> tuple[int, int] | None:
    """Height and width in px of the patches a model cuts its input into; None for other stems."""
    embed = getattr(model, "patch_embed", None)
    found = getattr(embed, "patch_size", None) or getattr(model, "patch_size", None)
    if not found or getattr(getattr(embed, "proj", None), "stride", _pair(found)) != _pair(found):
        return None
    return _pair(found)


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def _input_size(
    label: str, explicit: int | Iterable[int] | None, image_size: int, patch: tuple[int, int] | None
) -> tuple[int, int]:
    """Height and width of the model's input in px: what the user chose, else image_size rounded to the patch."""
    size = _pair(explicit) if explicit else round_to_patch(image_size, patch or (1, 1))
    for length, side in zip(size, patch or (), strict=False):
        if length % side:
            below = max(length // side, 1) * side
            raise UserError(
                f"{label}: {length} px is no multiple of its patch of {side} px, the rest would be cut off: "
                f"set {SIZE_KEYS} to {below} or {below + side}, or to null (image_size, rounded)"
            )
    return size


def _unknown(label: str, name: str, known: Iterable[str]) -> UserError:
    near = difflib.get_close_matches(name, list(known), n=5, cutoff=0.5)
    return UserError(f"unknown {label}; " + (f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"))


def _refused_arguments(label: str, error: Exception, kwargs: dict[str, Any]) -> UserError:
    return UserError(f"{label} does not take teacher_kwargs or student_kwargs {kwargs}: {error}")


def _load_error(label: str, pretrained: bool, error: Exception) -> UserError:
    reason = short_error(error)
    if isinstance(error, ImportError) or "Missing dependencies" in reason:
        return UserError(f"{label} could not be built: {reason}. Install that package here")
    if pretrained and not isinstance(error, AssertionError):
        return UserError(f"{label}: no pretrained weights: {reason}. {WEIGHTS_REMEDY}")
    if isinstance(error, AssertionError):  # mostly the model's own, on its input size
        return UserError(f"{label} could not be built: {reason}. Check its kwargs, and {SIZE_KEYS}")
    return UserError(f"{label} could not be built: {reason}. Check its kwargs")
