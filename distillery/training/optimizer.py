"""The optimiser of a run: Muon for the student's weight matrices and AdamW for the rest, or AdamW for everything.

The heads are AdamW's. They may be as wide as their teacher, where Muon's matrix products would take longer than all
else in a step.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.optim.muon import zeropower_via_newtonschulz
from torch import Tensor, nn

from distillery.config.keys_train import TrainConfig
from distillery.models.configured import choose_precision
from distillery.models.pair import StudentWithHeads
from distillery.models.precision import LOW_TYPES

# five steps of the Newton-Schulz iteration, from modded-nanogpt: singular values above 0.2 % of the matrix's norm come
# to between 0.9 and 1.2, smaller ones stay below
NEWTON_SCHULZ = [
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
]
MOMENTUM = 0.95
# what timm's and torchvision's models call their tokens and position embeddings
TOKENS = re.compile(r"(.*_)?((cls|class|reg|register|dist)_tokens?|pos_embed(ding)?)(_?\d+|_win(dow)?)?")
# peak learning rates at 64 images a step, of students with batch norm
RATES = {"muon": 8e-3, "adamw": 2e-3}


def build_optimizer(student: StudentWithHeads, train: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """The optimiser of a student with its heads, as `optimizer` says; its groups' lr is 0 until a schedule sets it.

    Norms, biases, tokens and position embeddings are not decayed.
    """
    matrices = matrices_of(student.student) if train.optimizer == "muon" else set()
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "decayed": [], "plain": []}
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or TOKENS.fullmatch(name.rpartition(".")[2]) is not None
            groups["matrices" if parameter in matrices else "plain" if is_plain else "decayed"].append(parameter)
    decays = {"weight_decay": train.weight_decay}
    options = {"lr": 0.0, "betas": (0.9, 0.999), "fused": train.use_fused_adamw and device.type == "cuda"}
    rest = [{"params": groups["decayed"]} | decays, {"params": groups["plain"], "weight_decay": 0.0}]
    if train.optimizer == "adamw":
        return torch.optim.AdamW(rest, **options)
    dtype = LOW_TYPES["bf16"] if choose_precision("auto", device) == "bf16" else torch.float32
    return Muon([{"params": groups["matrices"], "orthogonal": True} | decays, *rest], dtype=dtype, **options)


def default_learning_rate(global_batch_size: int, student: nn.Module, optimizer: str) -> float:
    """The rule behind `learning_rate: null`, which rate_rule puts into words.

    Under batch norm the scale of the weights does not matter, and they take larger steps (arXiv:1706.05350). The
    square root is the scaling of adaptive optimisers (Malladi et al. 2022, arXiv:2205.10287), taken for Muon as well.
    The values at 64 images were chosen on CIFAR-10 at 32 px: for a ResNet-20, and half of it for a small ViT.
    """
    rate = RATES[optimizer] * min(2.0, math.sqrt(global_batch_size / 64))
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in student.modules())
    return rate if has_batch_norm else rate / 2


def rate_rule(optimizer: str) -> str:
    """default_learning_rate in words."""
    rate = RATES[optimizer]
    return f"{rate:.3g} x sqrt(global batch / 64), at most {2 * rate:.3g}; half of it without batch norm"


def state_bytes(student: StudentWithHeads, train: TrainConfig) -> int:
    """Bytes that the optimiser keeps: one moment of each of Muon's matrices, two of all else that is trained."""
    matrices = matrices_of(student.student) if train.optimizer == "muon" else set()
    trained = (value for value in student.parameters() if value.requires_grad)
    return sum((1 if value in matrices else 2) * value.numel() * value.element_size() for value in trained)


def matrices_of(model: nn.Module) -> set[nn.Parameter]:
    """The weights that Muon takes: those of linear layers and of convolutions.

    Tables such as position biases are no maps from inputs to outputs. Neither is a convolution in groups, each of which
    has inputs of its own.
    """
    found = set()
    for module in model.modules():
        is_convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.groups == 1
        if isinstance(module, nn.Linear) or is_convolution:
            found.add(module.weight)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            found.add(module.in_proj_weight)
    return found


class Muon(torch.optim.AdamW):
    """Muon for the parameter groups with `orthogonal: True`, AdamW for the others, in one optimiser.

    A matrix moves along its momentum (Nesterov) with all singular values set to 1. The step is scaled to the size that
    AdamW's would have, so one learning rate serves both. A convolution [out, in, h, w] is the matrix [out, in h w].
    The matrices of one shape are computed together, as many small products would keep a GPU waiting for the host.

    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/. The scale 0.2 sqrt(max(out, in)) and the
    decoupled weight decay are those of Moonlight, arXiv:2502.16982.

    Args:
        groups: parameter groups; those of `orthogonal: True` hold parameters of two or more dimensions.
        dtype: in which the directions are computed; bfloat16 has digits enough.
        options: of torch.optim.AdamW.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], *, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        super().__init__([{"orthogonal": False} | group for group in groups], **options)
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `found_inf`, where the caller has set it to 1, leaves everything as it is."""
        everything = self.param_groups
        self.param_groups = [group for group in everything if not group["orthogonal"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = everything
        for group in everything:
            if group["orthogonal"]:
                self._step_matrices(group)
        return loss

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[tuple, list[Tensor]] = {}
        for value in group["params"]:
            if value.grad is not None:
                by_shape.setdefault((len(value), value[0].numel()), []).append(value)
        found_inf, rate = getattr(self, "found_inf", None), group["lr"]
        is_bad = None if found_inf is None else found_inf > 0
        if found_inf is not None:
            rate = rate * (1 - found_inf)
        kept = 1 - rate * group["weight_decay"]
        for (rows, columns), weights in by_shape.items():
            momenta = [self._momentum_of(weight) for weight in weights]
            momentum = torch.stack([value.flatten(1) for value in momenta])
            gradient = torch.stack([weight.grad.flatten(1) for weight in weights])
            if is_bad is not None:  # a gradient that equals the momentum changes it by nothing
                gradient = torch.where(is_bad, momentum, gradient)
            momentum.lerp_(gradient, 1 - MOMENTUM)
            change = zeropower_via_newtonschulz(
                gradient.lerp_(momentum, MOMENTUM), len(NEWTON_SCHULZ), NEWTON_SCHULZ, dtype=self.dtype
            ).to(momentum.dtype)
            change *= -rate * (0.2 * max(rows, columns) ** 0.5)
            torch._foreach_copy_(momenta, _shaped(momentum, momenta))
            torch._foreach_mul_(weights, kept)
            torch._foreach_add_(weights, _shaped(change, weights))

    def _momentum_of(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            # AdamW wants a step of every parameter that has a state; its own average of gradients has the same name
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(weight)
        return state["exp_avg"]


def _shaped(matrices: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Matrices [n, out, in h w] as the n tensors of `like` are shaped."""
    return [matrix.reshape(value.shape) for matrix, value in zip(matrices, like, strict=True)]
