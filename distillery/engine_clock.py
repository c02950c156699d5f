"""Where the time between two logged steps went, as the device saw it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch

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
