"""How much of a loss's targets the student explains: the share of their variance, as the R^2 of a regression."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# of the targets' mean square: what varies less is a constant with rounding errors (float32 has 7 digits)
LEAST_VARIANCE = 1e-12
# a step whose numbers are not all finite counts as bad, and this number must not be the reason
LEAST_EXPLAINED = -1e6


def explained_variance(
    student: Tensor | Sequence[Tensor], targets: Tensor | Sequence[Tensor], *, by_direction: bool = False
) -> Tensor:
    """1 - MSE / variance of the targets: 1 where the student gives them exactly, 0 where it knows no more than
    their mean, below 0 where it does worse than that. No gradient.

    MSE is mean (s - t)^2 over all elements. The variance is mean (t - m)^2, m the mean of each channel over images and
    patches: of this batch, on this process. A few images vary less than all, so that of pooled targets the share comes
    out low where the batch is small: of 8 images 0.2 in place of 0.3.

    Args:
        student: [..., D], projected to the targets' width; or the same of several layers.
        targets: as the loss is given them, of the same shapes.
        by_direction: give each row of the student the length first at which it comes nearest to its target: for a loss
            that fixes no length.
    Returns:
        float32 scalar, mean over the layers, at least -1e6; 0 where the targets do not vary, as those of one image.
    """
    if isinstance(student, Tensor):
        return _explained(student, targets, by_direction)
    pairs = zip(student, targets, strict=True)
    return torch.stack([_explained(own, target, by_direction) for own, target in pairs]).mean()


def _explained(student: Tensor, targets: Tensor, by_direction: bool) -> Tensor:
    student, targets = student.detach().float(), targets.detach().float()
    if by_direction:
        student = F.normalize(student, dim=-1)
        student = student * (student * targets).sum(-1, keepdim=True).clamp(min=0)
    variances, means = torch.var_mean(targets, dim=tuple(range(targets.ndim - 1)), correction=0)
    variance = variances.mean()
    share = (1 - F.mse_loss(student, targets) / variance).clamp(min=LEAST_EXPLAINED)
    return torch.where(variance <= LEAST_VARIANCE * means.square().mean(), 0.0, share)
