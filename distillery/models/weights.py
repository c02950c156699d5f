"""Load local weights into raw models, from the files of many training tools."""

import argparse
import pickle
import re
import sys
from pathlib import Path, PosixPath
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from distillery.models.checkpoint_entries import Entry, choose_entry, split_entry
from distillery.system import distributed
from distillery.system.errors import MissingFileError, UserError

# in checkpoints beside the weights: how the program was called (DINO, MAE, DeiT); plain values
_HARMLESS = [argparse.Namespace, PosixPath]
# heads that a self-supervised method adds to a backbone (DINO, SwAV, MoCo, BYOL, MAE)
_METHOD_HEAD = re.compile("head|project|prototype|predict|decoder|queue|mask_token")
# attribute of a raw model: the hash of the weights that those it has now were cast from
_HASH = "hash_of_original_weights"
CLASSIFIER_NAMES = ("fc", "classifier", "head", "heads", "linear")


def load_weights(model: nn.Module, path: str | Path, *, with_logits: bool = False, role: str | None = None) -> None:
    """Load a local .pt, .pth or .safetensors file, or an exported folder, into a raw model, strictly.

    It removes the wrappers of other tools, DDP and torch.compile, and resamples position embeddings to the model's
    input size. From a file with several models it takes the role's, or the entry after a # (file.pth#teacher), and
    prints which. The classifier alone may be missing, superfluous or of another shape, unless logits are wanted; batch
    norm's count of batches may be missing, as PyTorch has it. Heads of a self-supervised method are left out, and those
    of a student that was exported in its teacher's space.

    Args:
        model: the raw model.
        path: the file, or a folder with model.safetensors; # and an entry may follow.
        with_logits: the classifier must be there.
        role: "teacher" or "student"; None: as a teacher.
    Raises:
        MissingFileError: there is no such file, or none in the folder.
        UserError: it is no weights file, its tensors are not this model's, or several of its entries fit alike.
    """
    path, name = split_entry(path)
    heads = () if with_logits else _classifier_prefixes(model)
    own = model.state_dict()
    entry, others = choose_entry(_read_state(path), own, _classifier_prefixes(model), path, name, role)
    own_parts = {key.partition(".")[0] for key in own} | {name for name, _ in model.named_children()}
    beside = {k for k in entry.state if (top := k.partition(".")[0]) not in own_parts and _METHOD_HEAD.search(top)}
    left_out = sorted({*entry.left_out, *beside})
    if (others or left_out) and distributed.is_main():
        print(_describe(path, entry, others, left_out, role))
    state = _convert(model, {k: v for k, v in entry.state.items() if k not in beside}, path)
    state = {k: v for k, v in state.items() if not k.startswith(heads) or _shape(own.get(k)) == _shape(v)}
    state = {k: v for k, v in own.items() if k.startswith(heads)} | state
    state = {k: v for k, v in own.items() if _is_counter_of(k, state)} | state
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    reshaped = sorted(k for k in own.keys() & state.keys() if _shape(own[k]) != _shape(state[k]))
    if missing or unexpected or reshaped:
        raise UserError(
            f"{path} does not fit the model: {len(missing)} of its {len(own)} tensors missing{_some(missing)}, "
            f"{len(unexpected)} unexpected{_some(unexpected)}, {len(reshaped)} of another shape"
            f"{_some([f'{k} {_shape(state[k])} for {_shape(own[k])}' for k in reshaped])}. Check name and kwargs"
        )
    model.load_state_dict(state)


def _describe(path: Path, entry: Entry, others: list[Entry], left_out: list[str], role: str | None) -> str:
    line = f"{role or 'teacher'}_checkpoint {path}: {entry.name or 'the top'} is loaded"
    if others:
        line += f", not {', '.join(other.name or 'the top' for other in others)} (for another: {path.name}#NAME)"
    if left_out:
        line += f"; {len(left_out)} tensors beside it are left out{_some(left_out)}"
    return line


def _is_counter_of(key: str, state: dict[str, Tensor]) -> bool:
    """Whether a name is batch norm's count of batches (PyTorch has it since 0.4.1), beside averages that are there."""
    layer, _, last = key.rpartition(".")
    return last == "num_batches_tracked" and f"{layer}.running_mean" in state


def _read_state(path: Path) -> Any:
    if not path.is_file():
        raise MissingFileError(f"no checkpoint at {path}: check teacher_checkpoint or student_checkpoint")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals(_HARMLESS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as weights: {_reason(error)}. It must be .safetensors, or a state dict: "
            "torch.save(model.state_dict(), PATH)"
        ) from error


def _reason(error: Exception) -> str:
    text = str(error)
    if "Unsupported global" in text or "TorchScript" in text:  # torch's own text advises to run what the file holds
        return "it holds more than tensors, which may be code"
    if isinstance(error, pickle.UnpicklingError | EOFError):
        return "torch.save has not written it, or not to its end (a git-lfs pointer, a web page, another format?)"
    return f"{type(error).__name__}: {text}"


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


class WeightsDigest:
    """XXH3-128 over weights and buffers as they come, names included."""

    def __init__(self) -> None:
        self._digest = xxhash.xxh3_128()

    def add(self, name: str, value: Tensor) -> None:
        """Take in the next tensor of a state dict."""
        self._digest.update(name.encode())
        self._digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())

    def hexdigest(self) -> str:
        """The hash of what has been added."""
        return self._digest.hexdigest()


def weights_hash(model: nn.Module) -> str:
    """XXH3-128 over a raw model's weights and buffers, names included.

    Of a model whose weights were cast, the hash that remember_hash kept: it says which weights they are, whatever they
    are kept in.
    """
    kept = getattr(model, _HASH, None)
    if kept is not None:
        return kept
    digest = WeightsDigest()
    for name, value in model.state_dict().items():
        digest.add(name, value)
    return digest.hexdigest()


def with_pooling(weights: str, pooling: str | None) -> str:
    """weights_hash of a teacher, and how it pools where that is not the usual way: what a checkpoint is bound to."""
    return weights if pooling is None else f"{weights}, pooled by {pooling}"


def remember_hash(model: nn.Module, digest: str | None = None) -> None:
    """Keep the hash of a raw model's present weights, or `digest` in its place, before they are cast."""
    setattr(model, _HASH, digest or weights_hash(model))
