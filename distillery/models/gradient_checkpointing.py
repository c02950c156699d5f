"""Gradient checkpointing for any raw model: keep a block's input, and recompute its inside in the backward pass."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from distillery.system.errors import UserError

# a sequence of layers without blocks (VGG) is cut into pieces; shorter ones are stems, not worth it
_LEAST_LAYERS = 6


def use_gradient_checkpointing(
    model: nn.Module, label: str, outputs: Callable[[], Sequence[Tensor]] | None = None
) -> None:
    """Keep only what enters each block of a raw model, and compute its inside again in the backward pass.

    timm's own way where the model has it; else every element of its sequences of layers, wherever they are. Layers
    that overwrite their input are set to leave it: it is what was kept. Batch norm sees each batch twice in such a
    block: its running averages move about twice as fast, the gradients are the same.

    Args:
        model: the raw model, changed in place.
        label: its name in messages.
        outputs: what the model gives for some image, with a graph. The gradients are compared with those without
            checkpointing, and a way that changes them is not taken; None: not compared.
    Raises:
        UserError: the model has no sequence of layers, or every way changes its gradients.
    """
    expected = outputs and _gradients_of(model, outputs)
    for layer in model.modules():
        if getattr(layer, "inplace", None) is True:
            layer.inplace = False
    ways = _ways(model)
    for take, undo in ways:
        try:
            take()
            if expected is None or _is_same(_gradients_of(model, outputs), expected):
                return
        except (AssertionError, NotImplementedError, RuntimeError, AttributeError, TypeError):
            pass  # timm's word for: not this model; or an error of this way alone
        undo()
    raise UserError(
        f"{label} has no sequence of layers to compute again (nn.Sequential or nn.ModuleList): set "
        "gradient_checkpointing: false"
        if not ways
        else f"{label}: computing its blocks again gives other gradients: set gradient_checkpointing: false"
    )


Way = tuple[Callable[[], Any], Callable[[], Any]]


def _ways(model: nn.Module) -> list[Way]:
    """(take it, undo it) of each way there is, the cheapest first."""
    ways: list[Way] = []
    if hasattr(model, "set_grad_checkpointing"):
        own = model.set_grad_checkpointing
        ways.append((functools.partial(own, True), functools.partial(_try, own, False)))
    blocks, chains = _blocks_of(model), _chains_of(model)
    if not blocks and not chains:
        blocks = list(_elements(model))
    for run in (_run_block, _run_block_on_copies) if blocks or chains else ():
        forwards = {block: functools.partial(checkpoint, run, block, use_reentrant=False) for block in blocks}
        forwards |= {chain: functools.partial(_run_in_pieces, chain) for chain in chains}
        ways.append((functools.partial(_set_forwards, forwards), functools.partial(_unset_forwards, forwards)))
    return ways


def _set_forwards(forwards: dict[nn.Module, Callable]) -> None:
    # of the class's function and the block, not of the bound method: a deep copy must run its own weights
    for block, forward in forwards.items():
        block.forward = forward


def _unset_forwards(forwards: dict[nn.Module, Callable]) -> None:
    for block in forwards:
        block.__dict__.pop("forward", None)


def _try(own: Callable, enable: bool) -> None:
    with contextlib.suppress(AssertionError, NotImplementedError):
        own(enable)


def _run_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return type(block).forward(block, *args, **kwargs)


def _run_block_on_copies(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """For blocks that overwrite their input, whatever it is made of."""
    args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
    return type(block).forward(block, *args, **kwargs)


def _run_in_pieces(chain: nn.Sequential, x: Tensor) -> Tensor:
    size = math.ceil(len(chain) ** 0.5)
    for start in range(0, len(chain), size):
        x = checkpoint(_run_layers, chain, start, start + size, x, use_reentrant=False)
    return x


def _run_layers(chain: nn.Sequential, start: int, end: int, x: Tensor) -> Tensor:
    for layer in list(chain)[start:end]:
        x = layer(x)
    return x


def _sequences(model: nn.Module) -> Iterator[nn.Sequential | nn.ModuleList]:
    """The outermost sequences of layers."""
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList):
            yield child
        else:
            yield from _sequences(child)


def _elements(model: nn.Module) -> Iterator[nn.Module]:
    for sequence in _sequences(model):
        yield from sequence


def _blocks_of(model: nn.Module) -> list[nn.Module]:
    """The elements of its sequences that have an inside; without any, its children that have one."""
    found = [element for element in _elements(model) if any(element.children())]
    return found or [child for child in model.children() if _num_layers(child) >= _LEAST_LAYERS]


def _chains_of(model: nn.Module) -> list[nn.Sequential]:
    """Long sequences of plain layers, which run one by one."""
    sequences = [one for one in _sequences(model) if isinstance(one, nn.Sequential) and len(one) >= _LEAST_LAYERS]
    return [one for one in sequences if not any(any(layer.children()) for layer in one)]


def _num_layers(model: nn.Module) -> int:
    return sum(1 for _ in model.modules()) - 1


def _gradients_of(model: nn.Module, outputs: Callable[[], Sequence[Tensor]]) -> list[Tensor | None]:
    """Of a fixed weighted sum of the outputs, for each parameter; modes, buffers and random numbers stay."""
    modes = {part: part.training for part in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return []
    try:
        model.train()  # dropout too is computed again
        for part in model.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()  # one image of one pixel has no variance
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            given = outputs()
            total = sum((value.float() * torch.randn(value.shape)).sum() for value in given)
            return list(torch.autograd.grad(total, parameters, allow_unused=True))
    finally:
        for part, mode in modes.items():
            part.training = mode
        for name, buffer in model.named_buffers():
            buffer.data.copy_(buffers[name])


def _is_same(found: list[Tensor | None], expected: list[Tensor | None]) -> bool:
    """Whether two lists of gradients differ by rounding alone."""
    if [one is None for one in found] != [one is None for one in expected]:
        return False
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None]
    whole = sum(float(b.norm()) ** 2 for _, b in pairs) ** 0.5
    return all(float((a - b).norm()) <= 1e-3 * float(b.norm()) + 1e-5 * whole for a, b in pairs)
