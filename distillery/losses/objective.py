"""What a training step differentiates: the student with its heads and the weighted losses, as one module."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from distillery.losses.total import total_loss
from distillery.models.backbone import Features
from distillery.models.pair import StudentWithHeads, align


class Objective(nn.Module):
    """From a view and the teacher's targets to the losses.

    One module, so that torch.compile and DistributedDataParallel take the student and the losses together: the losses
    are many small operations, which cost a GPU more than their arithmetic when each is a kernel of its own.

    Args:
        student: with a head for every field that a loss compares.
        weights: loss name -> weight.
        options: loss name -> its options.
        stored_weights: the losses of a step on stored outputs, where these are fewer; None: all.
        stored_grid: (h, w) of stored tokens.
    """

    def __init__(
        self,
        student: StudentWithHeads,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        stored_weights: Mapping[str, float] | None = None,
        stored_grid: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.weights, self.options = dict(weights), dict(options or {})
        self.stored_weights = self.weights if stored_weights is None else dict(stored_weights)
        self.stored_grid = stored_grid

    def forward(
        self,
        view: Tensor,
        targets: Features,
        *,
        second_view: Features | None = None,
        queue: Tensor | None = None,
        is_stored: bool = False,
    ) -> dict[str, Tensor]:
        """Losses of a view [B, 3, H, W], normalised, as total_loss returns them.

        targets: the teacher's, on its own grid; second_view, queue: as of total_loss; is_stored: of stored outputs.
        """
        outputs, targets = align(self.student(view), targets, self.stored_grid if is_stored else None)
        weights = self.stored_weights if is_stored else self.weights
        losses = total_loss(outputs, targets, weights, self.options, second_view=second_view, queue=queue)
        if is_stored and self.stored_weights.keys() != self.weights.keys():
            # heads without a loss in this step: DistributedDataParallel waits for a gradient of every parameter
            trained = (value.sum() for value in self.student.heads.parameters() if value.requires_grad)
            losses["loss"] = losses["loss"] + 0 * sum(trained)
        return losses
