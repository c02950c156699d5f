"""Stochastic depth that gives a sample the same draws in every batch, as the augmentation does.

The layers of timm and torchvision draw from the process's generator. The samples that skip a block would then change
with the number of processes that share a batch. Here the draw is a function of (seed, epoch, global_idx, layer).
"""

import torch
from torch import Tensor, nn

from distillery.models.draws import draw_uniform

# another stream of numbers than the augmentation's, which has the same address
_PURPOSE = 0x5DEECE66D


class DropPath(nn.Module):
    """Leaves out a residual branch for some samples; which ones, StochasticDepth says before every batch.

    A layer that its block calls twice leaves out both for the same samples, and one that sees a sample as several rows
    (MobileViT's groups of pixels, TNT's words of a patch) leaves out all of them.

    Args:
        drop_prob: how often a branch is left out.
        batch: holds the factors of all layers for the present batch.
        column: this layer's.
    """

    def __init__(self, drop_prob: float, batch: "BatchFactors", column: int) -> None:
        super().__init__()
        self.drop_prob, self.batch, self.column = drop_prob, batch, column

    def forward(self, x: Tensor) -> Tensor:
        """x [B x rows, ...] times 0 or 1 / (1 - drop_prob), sample by sample; x itself in eval mode."""
        if not self.training:
            return x
        factors = self.batch.of_type(x.dtype)[:, self.column]
        if len(x) != len(factors):
            factors = factors.repeat_interleave(len(x) // len(factors))
        return x * factors.view(-1, *[1] * (x.ndim - 1))


class BatchFactors:
    """What all layers of a student read: the factors of a batch, [B, L], one column a layer.

    Tensors that are replaced before every batch: a compiled student takes them as inputs, and does not compile again.

    factors: float32; low: the same in the type that autocast computes most branches in (some stay in float32, as those
    behind a LayerScale): cast once for all layers.
    """

    factors: Tensor
    low: Tensor

    def of_type(self, dtype: torch.dtype) -> Tensor:
        """The factors in a branch's type."""
        return self.low if dtype == self.low.dtype else self.factors.to(dtype)


class StochasticDepth:
    """Puts DropPath in the place of a student's own layers of this kind, and draws for all of them."""

    def __init__(self, student: nn.Module) -> None:
        from timm.layers import DropPath as TimmDropPath
        from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth

        self.layers: list[DropPath] = []
        self._batch = BatchFactors()
        for module in list(student.modules()):
            for name, child in module.named_children():
                if isinstance(child, TimmDropPath):
                    self._replace(module, name, child.drop_prob)
                elif isinstance(child, TorchvisionStochasticDepth) and child.mode == "row":
                    self._replace(module, name, child.p)

    def _replace(self, module: nn.Module, name: str, drop_prob: float) -> None:
        layer = DropPath(drop_prob, self._batch, len(self.layers)) if drop_prob else nn.Identity()
        setattr(module, name, layer)
        if drop_prob:
            self.layers.append(layer)

    def draw(self, global_idx: Tensor, *, seed: int, epoch: int) -> Tensor:
        """The factors of a batch for `use`: global_idx int64 [B] -> float32 [B, L] on its device, L layers."""
        draws = draw_uniform(global_idx, seed=seed ^ _PURPOSE, epoch=epoch, count=len(self.layers))
        keep = torch.tensor([1 - layer.drop_prob for layer in self.layers], device=draws.device)
        return (draws < keep).float() / keep

    def use(self, factors: Tensor, dtype: torch.dtype = torch.float32) -> None:
        """Let the layers leave out what `draw` has decided for the batch that comes next.

        factors: on the layers' device; dtype: that autocast computes in.
        """
        self._batch.factors, self._batch.low = factors, factors.to(dtype)
