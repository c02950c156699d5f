"""Two backbones made comparable: the frozen teacher, the student with its heads, tokens brought onto one grid."""

from collections.abc import Iterable

import torch
from torch import Tensor

from distillery.models.backbone import Backbone, Features
from distillery.standardise import Targets


class FrozenTeacher(Targets):
    """A backbone that never learns: eval mode, no gradient, targets standardised once statistics are set."""

    def __init__(self, backbone: Backbone, standardise: bool | str = True) -> None:
        super().__init__(backbone.widths, standardise)
        self.backbone = backbone.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenTeacher":
        """Stays in eval mode, whatever is asked: batch norm and dropout would change the targets."""
        return super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward pass
    def forward(self, images: Tensor) -> Features:
        """Targets for images [B, 3, H, W] as Backbone takes them."""
        return self.of(self.backbone(images))

    @torch.no_grad()
    def gather_statistics(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics to those of batches of images [B, 3, H, W].

        Several processes must end with the same: let one gather, and hand its statistics_state to the others.

        Raises:
            UserError: fewer than two images, or the same output for every image.
        """
        self.load_statistics(self.statistics_of(self.backbone(images) for images in batches))
