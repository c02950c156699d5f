"""Measure how fast the rows of a compressed cache are decoded, and say whether that keeps up with the run's steps."""

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distillery.system.machine import usable_cpus

_NUM_ROWS, _ROUNDS, _BUDGET_S = 48, 5, 1.0


@dataclass(frozen=True)
class DecodingSpeed:
    """How fast a loader decodes.

    images_per_core: images/s of one thread that has a core to itself; num_cores: that the loader's threads have;
    image_size: px, of the result; is_cropped: whether only what a view shows is decoded.
    """

    images_per_core: float
    num_cores: int
    image_size: int
    is_cropped: bool

    @property
    def images(self) -> float:
        """Images/s of all cores, if they did nothing else."""
        return self.images_per_core * self.num_cores

    def cores_for(self, images: float) -> int:
        """Cores that decode so many images/s."""
        return math.ceil(images / self.images_per_core)


def measure_decoding(loader: Any) -> DecodingSpeed | None:
    """Time one thread on rows spread over the data, as the loader's threads work; None where nothing is decoded.

    The rows are read once before, so that the disk does not count.
    """
    if not loader.is_encoded:
        return None
    rows, dataset = loader.rows(), getattr(loader.dataset, "base_dataset", loader.dataset)
    count = min(_NUM_ROWS, len(dataset))
    places = dataset.locate(np.arange(count) * len(dataset) // count)
    out, global_idx = np.empty((count, rows.row_bytes), np.uint8), np.empty(count, np.int64)
    num_threads, seconds = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        rows.fill(*places, out, global_idx)
        while len(seconds) < _ROUNDS and sum(seconds) < _BUDGET_S:
            began = time.perf_counter()
            rows.fill(*places, out, global_idx)
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(num_threads)
    return DecodingSpeed(
        count / min(seconds),
        min(loader.num_threads, usable_cpus()),
        loader.image_shape[-1],
        loader.crop_boxes is not None,
    )


def decoding_line(speed: DecodingSpeed, computed_images: float) -> str:
    """Whether decoding keeps up; computed_images: images/s that the steps take if they never wait.

    The threads share the interpreter's lock, so many of them reach less than the product.
    """
    verdict = "decoding keeps up" if speed.images >= computed_images else "decoding does not keep up"
    return (
        f"decoding {speed.image_size} px {'crops' if speed.is_cropped else 'images'}: {speed.images_per_core:,.0f} "
        f"images/s a core, {speed.num_cores} threads: at most {speed.images:,.0f}; the steps take "
        f"{computed_images:,.0f}: {verdict}"
    )


def decoding_advice(speed: DecodingSpeed, computed_images: float, wait: float, bytes_ratio: float) -> str:
    """What to change where the steps wait for the decoding.

    wait: share of the time that they wait; bytes_ratio: how many times as large the images are as uint8.
    """
    return (
        f"decoding is slower than computing: some {wait:.0%} of the time would be spent waiting for data. "
        f"{speed.cores_for(computed_images)} cores a process would keep up (num_workers: null takes all that there "
        f"are); or take cache_dtype: uint8, which is not decoded and has {bytes_ratio:.1f} times the bytes"
    )
