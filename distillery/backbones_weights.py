"""Local weights for raw models, whatever tool has saved them."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distillery.files import expand_path
from distillery.process import MissingFileError, UserError

# what checkpoints of other tools, DistributedDataParallel and torch.compile put around a state dict
WRAPPER_KEYS = ("state_dict", "model", "student", "teacher")
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
CLASSIFIER_NAMES = ("fc", "classifier", "head", "heads", "linear")


def load_weights(model: nn.Module, path: str | Path, *, with_logits: bool = False) -> None:
    """Load a local .pt, .pth or .safetensors file into a raw model, strictly.

    Wrappers of other tools, DDP and torch.compile are taken off; position embeddings are resampled to the model's
    input size. The classifier alone may be missing, superfluous or of another shape, unless logits are wanted.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is no weights file, or its tensors are not this model's.
    """
    path = expand_path(path)
    state = _convert(model, _unwrap(_read_state(path), model.state_dict().keys()), path)
    own = model.state_dict()
    if not with_logits:
        heads = _classifier_prefixes(model)
        state = {k: v for k, v in state.items() if not k.startswith(heads) or _shape(own.get(k)) == _shape(v)}
        state = {k: v for k, v in own.items() if k.startswith(heads)} | state
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if _shape(own[k]) != _shape(state[k]))
    if missing or unexpected or reshaped:
        raise UserError(
            f"{path} does not fit the model: {len(missing)} of its {len(own)} tensors missing{_some(missing)}, "
            f"{len(unexpected)} unexpected{_some(unexpected)}, {len(reshaped)} of another shape"
            f"{_some([f'{k} {_shape(state[k])} for {_shape(own[k])}' for k in reshaped])}. Check name and kwargs"
        )
    model.load_state_dict(state)


def _read_state(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}: check teacher_checkpoint or student_checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights: {error}. It must be .safetensors, or a state dict that "
            "torch.load(weights_only=True) takes"
        ) from error


def _unwrap(state: Any, own_keys: Iterable[str]) -> dict[str, Tensor]:
    while isinstance(state, dict) and (key := next((k for k in WRAPPER_KEYS if isinstance(state.get(k), dict)), None)):
        state = state[key]
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    while not state.keys() & set(own_keys):
        prefix = next((p for p in WRAPPER_PREFIXES if state and all(k.startswith(p) for k in state)), None)
        if prefix is None:
            break
        state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def _convert(model: nn.Module, state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Bring another layout or input size to the model's: timm's own filter, torchvision's for its ViT."""
    from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings

    convert = getattr(sys.modules.get(type(model).__module__), "checkpoint_filter_fn", None)
    try:
        if isinstance(model, VisionTransformer) and "encoder.pos_embedding" in state:
            return dict(interpolate_embeddings(model.image_size, model.patch_size, state))
        return convert(state, model) if convert and hasattr(model, "pretrained_cfg") else state
    except Exception as error:
        raise UserError(f"{path} does not fit the model: {type(error).__name__}: {error}") from error


def _classifier_prefixes(model: nn.Module) -> tuple[str, ...]:
    named = getattr(model, "pretrained_cfg", {}).get("classifier") or CLASSIFIER_NAMES
    return tuple(f"{name}." for name in ([named] if isinstance(named, str) else named))


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def _some(items: list[str]) -> str:
    return f" ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})" if items else ""
