"""The student in the teacher's place: its head's outputs in the units of the teacher's own features.

A head is trained towards standardised targets. What undoes the standardisation is linear, so it goes into the weights
of the head's last layer: a folded head is no larger and no slower than the trained one.
"""

import contextlib
import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from distillery.losses.targets import Targets
from distillery.models.backbone import Backbone, Features
from distillery.system.errors import UserError

# fields whose heads stand in for features of the teacher; logits and inner layers do not
SPACE_FIELDS = ("pooled", "tokens")


class TeacherSpace(nn.Module):
    """A student whose pooled feature and tokens are those of its teacher, as well as it has learnt them.

    Args:
        backbone: the student's.
        heads: folded (fold_heads), for `pooled`, `tokens` or both.
    """

    def __init__(self, backbone: Backbone, heads: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.student, self.heads = backbone, nn.ModuleDict(heads)

    @property
    def widths(self) -> dict[str, int]:
        """Field -> the teacher's width."""
        return {field: last_linear(head).out_features for field, head in self.heads.items()}

    def forward(self, images: Tensor) -> Features:
        """Features of images [B, 3, H, W] as the backbone takes them, on the student's grid.

        A field without a head is None: its loss was not part of the run.
        """
        own = self.student(images)
        given = own.tensors()
        # autocast would round the sum with the teacher's mean, which may be far above its deviation, to 3 digits
        with contextlib.ExitStack() as stack:
            if torch.is_autocast_enabled(images.device.type):
                stack.enter_context(torch.autocast(images.device.type, enabled=False))
            made = {field: head(given[field].float()) for field, head in self.heads.items()}
        return Features(made.get("pooled"), made.get("tokens"), own.grid)


def fold_heads(heads: nn.ModuleDict, targets: Targets) -> nn.ModuleDict:
    """Copies of the trained heads of SPACE_FIELDS that give the teacher's own features.

    Args:
        heads: of StudentWithHeads.
        targets: with the statistics that the run was trained with.
    Raises:
        UserError: there is no such head.
    """
    folded = nn.ModuleDict()
    for field in SPACE_FIELDS:
        if field in heads:
            folded[field] = copy.deepcopy(heads[field])
            _fold(last_linear(folded[field]), *targets.way_back(field))
    if not folded:
        raise UserError(
            "this run has no head for pooled features or patches: no loss of its distill_loss_weights compares them "
            "(cls, mse, patch and others do). Its student is only there in its own space: --space backbone"
        )
    return folded.requires_grad_(False)


def last_linear(head: nn.Module) -> nn.Linear:
    """The layer of a head that gives the teacher's width."""
    layer = head if isinstance(head, nn.Linear) else head[-1]
    assert isinstance(layer, nn.Linear), "every projector ends with a linear layer"
    return layer


@torch.no_grad()
def _fold(layer: nn.Linear, matrix: Tensor, mean: Tensor) -> None:
    """Make a layer give outputs @ matrix + mean."""
    weight, bias = layer.weight.double().cpu(), layer.bias.double().cpu()
    layer.weight.copy_(matrix.T @ weight)
    layer.bias.copy_(bias @ matrix + mean)
