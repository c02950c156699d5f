"""What a training step differentiates: the student with its heads and the weighted losses, as one module."""

from collections.abc import Container, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distillery.losses.registry import fields_needed
from distillery.losses.total import BoundLoss, bind_losses, sum_losses
from distillery.models.backbone import Features, field_of
from distillery.models.pair import StudentWithHeads, align


class Objective(nn.Module):
    """From a view and the teacher's targets to the losses.

    One module, so that torch.compile and DistributedDataParallel take the student and the losses together: the losses
    are many small operations, which cost a GPU more than their arithmetic when each is a kernel of its own.

    Args:
        student: with a head for every field that a loss compares.
        weights: loss name -> weight.
        options: loss name -> its options.
        stored_losses: names of those that a step on stored outputs computes; None: all.
        grid_at_most: (h, w) on which tokens are compared where the student has more; None: its own grid.
    """

    def __init__(
        self,
        student: StudentWithHeads,
        weights: Mapping[str, float],
        options: Mapping[str, Mapping[str, Any]] | None = None,
        *,
        stored_losses: Container[str] | None = None,
        grid_at_most: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.losses = bind_losses(weights, options)
        is_whole = stored_losses is None
        self.stored_losses = [loss for loss in self.losses if is_whole or loss.name in stored_losses]
        self._idle = _heads_without_loss(student, self.stored_losses)
        self.grid_at_most = grid_at_most

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
        outputs, targets = align(self.student(view), targets, self.grid_at_most)
        bound = self.stored_losses if is_stored else self.losses
        losses = sum_losses(outputs, targets, bound, second_view=second_view, queue=queue)
        if is_stored and self._idle:
            # DistributedDataParallel waits for a gradient of every parameter
            losses["loss"] = losses["loss"] + 0 * sum(value.sum() for value in self._idle)
        return losses

    def leave_idle_heads(self) -> None:
        """After the backward passes of a step that was all on stored outputs: heads without a loss keep their weights.

        The optimiser would move them along their momentum, Muon as far as with a gradient.
        """
        for value in self._idle:
            value.grad = None


def _heads_without_loss(student: StudentWithHeads, losses: Sequence[BoundLoss]) -> list[nn.Parameter]:
    """The trained parameters of the heads whose outputs none of the losses compares."""
    fields = fields_needed({loss.name: loss.weight for loss in losses})
    heads = [head for name, head in student.heads.items() if field_of(name) not in fields]
    return [value for head in heads for value in head.parameters() if value.requires_grad]
