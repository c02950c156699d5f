"""Raw models from timm, torchvision and torch.hub, at the input size that the images ask for.

A new kind of source is one builder, ModelRequest -> BuiltModel, and one line in BUILDERS.
"""

import ast
import difflib
import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class ModelRequest:
    """What the configuration says about one model; sizes in px."""

    name: str
    repo: str | None = None
    pretrained: bool = False
    img_size: int | None = None  # None: image_size, rounded to the model's patch
    image_size: int = 224
    kwargs: dict[str, Any] = field(default_factory=dict)
    drop_path_rate: float | None = None  # only timm models take it
    with_logits: bool = False  # whether the classifier must be there


@dataclass(frozen=True)
class BuiltModel:
    """A raw model, the input it gets (height, width in px) and its own normalisation where it states one."""

    model: nn.Module
    img_size: tuple[int, int]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def build_timm(want: ModelRequest) -> BuiltModel:
    """A timm model, its position embedding resampled to the input size, without classifier unless logits are wanted."""
    import timm

    label = f"timm model {want.name!r}"
    if ":" not in want.name:  # not of a repository (hf-hub:) or folder (local-dir:)
        architecture, _, tag = want.name.partition(".")
        if not timm.is_model(want.name):
            raise _unknown(label, architecture, timm.list_models())
        tagged = timm.list_models(f"{architecture}.*", pretrained=True)
        if tag and tagged and want.name not in tagged:
            raise _unknown(label, want.name, tagged)
    explicit = want.kwargs.get("img_size", want.img_size)
    kwargs = ({} if want.with_logits else {"num_classes": 0}) | want.kwargs
    optional = {"img_size": explicit or want.image_size, "drop_path_rate": want.drop_path_rate}
    model, takes_size = _create_timm(label, want, optional, kwargs)
    patch = patch_size_of(model)
    size = _pair(explicit) if explicit else round_to_patch(want.image_size, patch or (1, 1))
    if takes_size and not explicit and size != _pair(want.image_size):
        model, _ = _create_timm(label, want, optional | {"img_size": size}, kwargs)
    config = model.pretrained_cfg
    _check_divisible(label, size, patch)
    return BuiltModel(model, size, config.get("mean"), config.get("std"))


def _create_timm(
    label: str, want: ModelRequest, optional: dict[str, Any], kwargs: dict[str, Any]
) -> tuple[nn.Module, bool]:
    """The model, and whether it took an img_size: optional arguments that its class does not know are left out."""
    import timm

    optional = {key: value for key, value in optional.items() if value is not None}
    while True:
        try:
            model = timm.create_model(want.name, pretrained=want.pretrained, **(optional | kwargs))
            return model, "img_size" in optional | kwargs
        except TypeError as error:
            rejected = [key for key in optional if key not in kwargs and f"'{key}'" in str(error)]
            if not rejected:
                raise _refused_arguments(label, error, kwargs) from error
            optional = {key: value for key, value in optional.items() if key not in rejected}
        except Exception as error:
            raise _load_error(label, want.pretrained, error) from error


def build_torchvision(want: ModelRequest) -> BuiltModel:
    """A torchvision classification model; kwargs may choose `weights`, e.g. IMAGENET1K_V1."""
    from torchvision import models as tv
    from torchvision.models.vision_transformer import interpolate_embeddings

    label = f"torchvision model {want.name!r}"
    if want.name not in tv.list_models(module=tv):
        raise _unknown(label, want.name, tv.list_models(module=tv))
    kwargs = dict(want.kwargs)
    choices = tv.get_model_weights(want.name)
    chosen = kwargs.pop("weights", "DEFAULT")
    if chosen not in choices.__members__:
        raise _unknown(f"weights {chosen!r} of {label}", str(chosen), choices.__members__)
    weights = choices[chosen]
    size, patch = _pair(want.img_size or want.image_size), None
    if want.name.startswith("vit_"):
        patch = _pair(int(want.name.rsplit("_", 1)[1]))
        explicit = kwargs.get("image_size", want.img_size)
        size = _pair(explicit) if explicit else round_to_patch(want.image_size, patch)
        _check_divisible(label, size, patch)
        kwargs["image_size"] = size[0]
    try:
        # a ViT refuses weights of another input size: these are loaded after resampling their position embedding
        model = tv.get_model(want.name, weights=weights if want.pretrained and not patch else None, **kwargs)
        if want.pretrained and patch:
            state = weights.get_state_dict(progress=False, check_hash=True)
            model.load_state_dict(interpolate_embeddings(size[0], patch[0], state))
    except TypeError as error:
        raise _refused_arguments(label, error, kwargs) from error
    except Exception as error:
        raise _load_error(label, want.pretrained, error) from error
    transforms = weights.transforms()
    return BuiltModel(model, size, tuple(transforms.mean), tuple(transforms.std))


def build_torch_hub(want: ModelRequest) -> BuiltModel:
    """A model from a hub repository "owner/name[:ref]" or a local folder with hubconf.py (an existing folder wins).

    That hubconf.py runs with this user's rights, as torch.hub's always does.
    """
    if not want.repo:
        raise UserError(f"torch_hub model {want.name!r}: set teacher_repo or student_repo to owner/name or a folder")
    label = f"torch_hub model {want.name!r} of {want.repo}"
    folder = expand_path(want.repo)
    places = [folder]
    if folder.is_dir():
        if not (folder / "hubconf.py").is_file():
            raise MissingFileError(f"{label}: there is no hubconf.py in {folder}")
        load = functools.partial(torch.hub.load, str(folder), want.name, source="local")
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w./-]+)?", want.repo):
        label = f"{label} on GitHub (no folder of that name is here)"
        load = functools.partial(torch.hub.load, want.repo, want.name, source="github", verbose=False)
        places = _hub_downloads(want.repo)
    else:
        raise MissingFileError(f"{label}: {folder} is no folder, and {want.repo!r} no owner/name[:ref] of GitHub")
    repository = repository_of(places)
    try:
        with repository.active():
            model = _call_hub_entry(functools.partial(load, trust_repo=True, **want.kwargs), want.pretrained)
    except TypeError as error:
        raise _refused_arguments(label, error, want.kwargs) from error
    except Exception as error:
        if "Cannot find callable" in str(error):
            with repository.active():
                raise _unknown(label, want.name, _hub_names(want.repo, folder)) from error
        raise _load_error(label, want.pretrained or not folder.is_dir(), error) from error
    if not isinstance(model, nn.Module):
        raise UserError(f"{label}: the entry point returned a {type(model).__name__}, not a torch.nn.Module")
    patch = patch_size_of(model)
    explicit = want.kwargs.get("img_size", want.img_size)
    size = _pair(explicit) if explicit else round_to_patch(want.image_size, patch or (1, 1))
    _check_divisible(label, size, patch)
    return BuiltModel(model, size)


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


BUILDERS: dict[str, Callable[[ModelRequest], BuiltModel]] = {
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


def _check_divisible(label: str, size: tuple[int, int], patch: tuple[int, int] | None) -> None:
    for length, side in zip(size, patch or (), strict=False):
        if length % side:
            below = max(length // side, 1) * side
            raise UserError(
                f"{label}: {length} px is no multiple of its patch of {side} px, the rest would be cut off: "
                f"set {SIZE_KEYS} to {below} or {below + side}, or to null (image_size, rounded)"
            )


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
