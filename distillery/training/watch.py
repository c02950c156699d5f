"""Watch training: the time of each part of a step, steps that are not finite, broken weights."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# of a step, besides the wait for its data; augmenting, logging and saving are what is left of the whole
PARTS = ("teacher", "student", "optimizer")


class StepClock:
    """Counts steps and images since the last row, the time the device stood without data, and that of a step's parts.

    On CUDA the times are those of events on the stream. The host runs ahead of the GPU: what it waits for the loader
    says nothing about whether the GPU ever ran out of work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self.restart()

    def restart(self) -> None:
        """Forget what was counted so far: what lies between two epochs belongs to no step."""
        self._spans: dict[str, list[tuple[Any, Any]]] = {name: [] for name in ("wait", *PARTS)}
        self._steps = self._images = 0
        self._began = self._mark()

    def _mark(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, begin: Any, end: Any) -> float:
        return begin.elapsed_time(end) / 1000 if self._on_cuda else end - begin

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around "wait", the fetching of a step's batches, or one of PARTS; they must not overlap."""
        begin = self._mark()
        yield
        self._spans[name].append((begin, self._mark()))

    def count(self, num_images: int) -> None:
        """One step more, of so many images."""
        self._steps += 1
        self._images += num_images

    def summary(self) -> dict[str, float]:
        """images_per_second (of this process), step_seconds, and the shares of the time since the last call.

        The shares: data_wait_fraction, teacher_fraction, student_fraction (forward, losses, backward),
        optimizer_fraction (clipping, step, average), 0..1.
        """
        end = self._mark()
        if self._on_cuda:
            end.synchronize()
        elapsed = max(1e-9, self._seconds(self._began, end))
        figures = {"images_per_second": self._images / elapsed, "step_seconds": elapsed / max(1, self._steps)}
        for name, spans in self._spans.items():
            share = min(1.0, sum(self._seconds(*span) for span in spans) / elapsed)
            figures["data_wait_fraction" if name == "wait" else f"{name}_fraction"] = share
        self.restart()
        self._began = end
        return figures


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
        # names of the losses, which not all steps need have in common -> (is bad, step, losses), images
        self._last: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
        self._first_steps: dict[int, int] = {}  # epoch -> its first step here

    def note(self, step: int, epoch: int, names: Sequence[str], values: Tensor, rows: Tensor) -> Tensor:
        """See whether a step was bad.

        Args:
            step: its number.
            epoch: its epoch's.
            names: of the losses: the loss, its parts, at the end grad_norm.
            values: theirs, float32 [n] on the device.
            rows: global_idx of the step's images on this rank, int64 [n], the same n every time.

        Returns:
            bool scalar on the device.
        """
        counted = values if self.gradients_count else values[:-1]
        is_bad = ~(counted.abs() < math.inf).all()  # isfinite() takes four kernels
        self._first_steps.setdefault(epoch, step)
        place = torch.full((1,), step, dtype=torch.float64, device=rows.device)
        now = torch.cat([is_bad[None], place, values])  # float64, in one kernel
        before, rows_before = self._last.get(tuple(names), (now, rows))
        self._last[tuple(names)] = torch.where(is_bad, now, before), torch.where(is_bad, rows, rows_before)
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
        (_, step, *values), names, rows = max(found, key=lambda each: each[0][:2])
        epoch = max(epoch for epoch, first in self._first_steps.items() if first <= step)
        parts = ", ".join(f"{name}={value:.4g}" for name, value in zip(names, values, strict=True))
        return (
            f"loss or gradient is not finite at step {int(step)} (epoch {epoch}): {parts}, "
            f"lr={learning_rate(int(step)):.3e}; {self.count.item()} such steps, max_bad_steps is {self.allowed}; "
            f"images (global_idx): {rows}"
        )


class RunningStatistics:
    """A model's batch-norm means and variances, to put back where a step was bad: a NaN would stay in them for ever.

    The forward pass changes them, whatever comes of the step. They are handled as one vector: some hundred small copies
    take the host longer than the arithmetic takes a GPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [value for value in model.buffers() if value.is_floating_point()]
        self._before: Tensor | None = None

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the present values."""
        if self._tensors:
            self._before = self._flat()

    @torch.no_grad()
    def undo_where(self, is_bad: Tensor) -> None:
        """Put the remembered values back where `is_bad`, a bool scalar on the device, is true."""
        if self._tensors:
            values = torch.where(is_bad, self._before, self._flat())
            sizes = [value.numel() for value in self._tensors]
            pieces = [piece.view_as(own) for piece, own in zip(values.split(sizes), self._tensors, strict=True)]
            torch._foreach_copy_(self._tensors, pieces)

    def _flat(self) -> Tensor:
        return torch.cat([value.flatten() for value in self._tensors])


def finite_weights(model: nn.Module) -> tuple[list[str], Tensor]:
    """The names of a model's weights and buffers, and whether each is finite: bool [n], on its device."""
    tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    # one call and one answer for all tensors; a NaN is not below infinity either
    largest = torch._foreach_norm([value.detach() for value in tensors.values()], math.inf)
    return list(tensors), torch.stack([value.float() for value in largest]) < math.inf


def check_finite(names: list[str], is_finite: Tensor) -> None:
    """Raise FloatingPointError when what finite_weights gave is not all true: such a student must never be saved."""
    bad = [name for name, good in zip(names, is_finite.tolist(), strict=True) if not good]
    if bad:
        raise FloatingPointError(f"{len(bad)} tensors of the student are not finite, the first is {bad[0]}; not saved.")
