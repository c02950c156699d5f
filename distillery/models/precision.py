"""Run a frozen model in a precision of its own, and measure what that changes.

Two ways lead to bf16 or fp16. Either autocast casts float32 weights in every forward pass, or the weights are kept in
the low type (keep_weights_in) and the forward pass runs without autocast. The second is faster: a frozen model's
weights are cast once, and layer norms run in the low type too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distillery.models.weights import remember_hash

LOW_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# under this least cosine with float32 a low type changes what the student learns
LEAST_COSINE = 0.999


def autocast_for(precision: str, device_type: str) -> torch.autocast:
    """Autocast to bf16 or fp16; for fp32 autocast is off, whatever surrounds it."""
    return torch.autocast(device_type, LOW_TYPES.get(precision), enabled=precision in LOW_TYPES)


def stays_in_float32(module: nn.Module) -> bool:
    """Whether a layer keeps its weights in float32: the statistics of batch norm have no better digits to lose."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@dataclass
class Float32Weights:
    """The weights and buffers that a model had before keep_weights_in."""

    parameters: list[tuple[nn.Parameter, Tensor]]
    buffers: list[tuple[nn.Module, str, Tensor]]

    def put_back(self) -> None:
        """Give the model its float32 weights again."""
        for parameter, value in self.parameters:
            parameter.data = value
        for module, name, value in self.buffers:
            module._buffers[name] = value


def keep_weights_in(model: nn.Module, dtype: torch.dtype) -> Float32Weights:
    """cast_weights, which can be undone. weights_hash still gives the hash of the float32 weights.

    Returns:
        What the model had before. Its memory is free as soon as the caller drops it.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):  # without numbers there is nothing to hash
        remember_hash(model)
    before = Float32Weights(
        [(parameter, parameter.data) for parameter in model.parameters()],
        [(m, name, value) for m in model.modules() for name, value in m._buffers.items() if value is not None],
    )
    cast_weights(model, dtype)
    return before


def cast_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast a raw model's weights and floating buffers in place, except those of batch norm."""
    for module in model.modules():
        if not stays_in_float32(module):
            # _apply, as .to() calls it: rotary embeddings compute their frequencies again instead of rounding them
            module._apply(lambda value: value.to(dtype) if value.is_floating_point() else value, recurse=False)


def least_cosines(now: dict[str, Tensor], float32: dict[str, Tensor]) -> dict[str, float]:
    """Name of a tensor of Features -> smallest cosine over the images; all patches of an image count as one vector.

    Both: Features.tensors() of the same images. A vector that is not finite gives -1.
    """
    pairs = {name: (now[name].flatten(1).double(), value.flatten(1).double()) for name, value in float32.items()}
    cosines = {name: F.cosine_similarity(*pair, dim=1) for name, pair in pairs.items()}
    return {name: values.nan_to_num(nan=-1.0).min().item() for name, values in cosines.items()}
