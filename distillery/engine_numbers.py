"""Numbers that went wrong: found without making the host wait, told with what helps to find the cause."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class BadSteps:
    """Counts steps whose loss or gradient is not finite, on the device, and keeps what the last such step had.

    The optimiser leaves these steps out by itself (GradScaler, on the device as well); here is the book-keeping.

    Args:
        device: of the losses.
        allowed: so many such steps in a run are no error.
        gradients_count: False for fp16, whose scaler tries factors until the gradient is finite again.
    """

    def __init__(self, device: torch.device, allowed: int, *, gradients_count: bool = True) -> None:
        self.allowed, self.gradients_count = allowed, gradients_count
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        # names of the losses, which not all steps need have in common -> (is bad, step, epoch, losses), images
        self._last: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}

    def note(self, step: int, epoch: int, losses: dict[str, Tensor], rows: Tensor) -> Tensor:
        """See whether a step was bad.

        Args:
            step: its number.
            epoch: its epoch's.
            losses: scalars on the device: the loss, its parts, grad_norm.
            rows: global_idx of the step's images on this rank, int64 [n], the same n every time.

        Returns:
            bool scalar on the device.
        """
        is_bad = ~torch.isfinite(losses["loss"])
        if self.gradients_count:
            is_bad = is_bad | ~torch.isfinite(losses["grad_norm"])
        place = [torch.full((), number, dtype=torch.float64, device=rows.device) for number in (step, epoch)]
        now = torch.stack([is_bad.double(), *place, *(value.double() for value in losses.values())])
        before, rows_before = self._last.get(tuple(losses), (now, rows))
        self._last[tuple(losses)] = torch.where(is_bad, now, before), torch.where(is_bad, rows, rows_before)
        self.count += is_bad
        return is_bad

    def exceeded(self) -> bool:
        """Whether there were more than allowed; waits for the device."""
        return self.count.item() > self.allowed

    def describe(self, learning_rate: Callable[[int], float]) -> str:
        """The last bad step in words. learning_rate: from a step to its rate."""
        if self.count.item() == 0:
            return "loss or gradient is not finite on another process of this run"
        found = [(values.tolist(), names, rows.tolist()) for names, (values, rows) in self._last.items()]
        # the first two values order them: bad ones after good ones, then by step
        (_, step, epoch, *values), names, rows = max(found, key=lambda each: each[0][:2])
        parts = ", ".join(f"{name}={value:.4g}" for name, value in zip(names, values, strict=True))
        return (
            f"loss or gradient is not finite at step {int(step)} (epoch {int(epoch)}): {parts}, "
            f"lr={learning_rate(int(step)):.3e}; {self.count.item()} such steps, max_bad_steps is {self.allowed}; "
            f"images (global_idx): {rows}"
        )


def undo_where(is_bad: Tensor, tensors: list[Tensor], before: list[Tensor]) -> None:
    """Put tensors back in place where a step was bad: a NaN would stay in running statistics for ever."""
    for tensor, old in zip(tensors, before, strict=True):
        tensor.copy_(torch.where(is_bad, old, tensor))


def check_weights(model: nn.Module) -> None:
    """Raise FloatingPointError when a weight or buffer is not finite: such a student must never be saved."""
    tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    # one answer for all tensors: each question of its own would make the host wait for the device
    is_finite = torch.stack([value.isfinite().all() for value in tensors.values()]).tolist()
    bad = [name for name, good in zip(tensors, is_finite, strict=True) if not good]
    if bad:
        raise FloatingPointError(f"{len(bad)} tensors of the student are not finite, the first is {bad[0]}; not saved.")
