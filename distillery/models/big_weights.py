"""Load a model of a billion parameters and more straight into a low type: its float32 weights are never in memory.

The model is built without memory for its weights. The file is mapped, not read. Each weight is cast and put on the
device as it comes, so that on a GPU the host holds one weight at a time. The processes of a node share the pages of the
file.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distillery.models.builders import BuiltModel, ModelSpec, build_model
from distillery.models.precision import LOW_TYPES, cast_weights, stays_in_float32
from distillery.models.weights import WeightsDigest, load_weights, remember_hash

# below, float32 weights fit beside those that they are cast to, and the two can be compared
BIG_MODEL = 1_000_000_000


@dataclass(frozen=True)
class LowWeights:
    """What a frozen model's weights are to be kept in, and where: "bf16" or "fp16", and the device."""

    precision: str
    device: torch.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the precision."""
        return LOW_TYPES[self.precision]


def build_big(spec: ModelSpec, image_size: int, low: LowWeights) -> BuiltModel | None:
    """A big model with its weights in a low type on the device; None where the usual way has to be taken.

    The usual way: a model of fewer than BIG_MODEL parameters, one of torch.hub or torchvision without a checkpoint of
    its own, and one whose weights do not all come through load_state_dict.

    Args:
        spec: the model.
        image_size: of the images, px.
        low: what its weights are kept in, and where.
    Raises:
        UserError: as build_model and load_weights.
    """
    if spec.checkpoint is None and not (spec.source == "timm" and spec.takes_published_weights):
        return None
    with torch.random.fork_rng(devices=[]), _weights_straight_into(low):  # the usual way draws what it always drew
        built = build_model(dataclasses.replace(spec, pretrained=False), image_size)
        if sum(parameter.numel() for parameter in built.model.parameters()) < BIG_MODEL:
            return None
        if spec.checkpoint is not None:
            load_weights(built.model, spec.checkpoint, with_logits=spec.needs_classifier, role=spec.role)
        else:
            built = build_model(spec, image_size)
    if any(value.is_meta for value in built.model.state_dict().values()):
        return None
    cast_weights(built.model.to(low.device), low.dtype)  # of the buffers that no file holds
    return built


@contextlib.contextmanager
def _weights_straight_into(low: LowWeights) -> Iterator[None]:
    """Inside, weights of new models take no memory, load_state_dict casts them one by one, torch.load maps its file."""
    register, load_state_dict, load = nn.Module.register_parameter, nn.Module.load_state_dict, torch.load

    @functools.wraps(register)
    def register_without_memory(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.is_floating_point():
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(module, name, param)

    @functools.wraps(load_state_dict)
    def load_cast(module: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = True) -> Any:
        state, digest = _cast_state(module, state_dict, low)
        nn.Module.register_parameter = register  # what is loaded replaces the parameter, and is one of the module's now
        try:
            answer = load_state_dict(module, state, strict=strict, assign=True)
        finally:
            nn.Module.register_parameter = register_without_memory
        if digest is not None:
            remember_hash(module, digest)
        return answer

    @functools.wraps(load)
    def load_mapped(*arguments: Any, **options: Any) -> Any:
        try:
            return load(*arguments, **{"mmap": True} | options)
        except (RuntimeError, ValueError):  # an old format, or no path: it can only be read
            return load(*arguments, **options)

    nn.Module.register_parameter, nn.Module.load_state_dict = register_without_memory, load_cast
    torch.load = load_mapped
    try:
        yield
    finally:
        nn.Module.register_parameter, nn.Module.load_state_dict, torch.load = register, load_state_dict, load


def _cast_state(model: nn.Module, state: Mapping[str, Tensor], low: LowWeights) -> tuple[dict[str, Tensor], str | None]:
    """A state dict for a model in the low type on the device, and weights_hash of the originals where all are there."""
    in_float32 = {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if stays_in_float32(module)
        for key in module.state_dict()
    }
    digest, cast, is_whole = WeightsDigest(), dict(state), True
    for name, own in model.state_dict().items():
        value = state.get(name, own)
        if value.is_meta:
            is_whole = False
            continue
        if value.is_floating_point():
            value = value.detach().float()
        digest.add(name, value)
        if name in state:
            dtype = low.dtype if value.is_floating_point() and name not in in_float32 else value.dtype
            # a copy even where nothing is cast: what is mapped would follow the file
            cast[name] = value.to(dtype, copy=True).to(low.device)
    return cast, digest.hexdigest() if is_whole else None
