"""Where the time between two logged steps went, as the device saw it."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class StepClock:
    """Counts steps and images since the last row, and the time the device stood without data.

    On CUDA the times are those of events on the stream. The host runs ahead of the GPU: what it waits for the loader
    says nothing about whether the GPU ever ran out of work.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._waits: list[tuple[Any, Any]] = []
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
    def waiting(self) -> Iterator[None]:
        """Around the fetching of a step's batches."""
        begin = self._mark()
        yield
        self._waits.append((begin, self._mark()))

    def count(self, num_images: int) -> None:
        """One step more, of so many images."""
        self._steps += 1
        self._images += num_images

    def summary(self) -> dict[str, float]:
        """images_per_second (of this process), step_seconds, data_wait_fraction since the last call."""
        end = self._mark()
        if self._on_cuda:
            end.synchronize()
        elapsed = max(1e-9, self._seconds(self._began, end))
        waited = sum(self._seconds(*wait) for wait in self._waits)
        figures = {
            "images_per_second": self._images / elapsed,
            "step_seconds": elapsed / max(1, self._steps),
            "data_wait_fraction": min(1.0, waited / elapsed),
        }
        self._waits, self._steps, self._images, self._began = [], 0, 0, end
        return figures
