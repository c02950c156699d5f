"""Compressed caches for tests, made by the real writer from cuts of scikit-learn's two photographs."""

from pathlib import Path

import numpy as np
import torch
from caches import MEAN, STD, Images
from sklearn.datasets import load_sample_images

from distillery.cache.encoded import RowEncoding
from distillery.cache.plan import CachePlan, survey_cache
from distillery.precompute.pipeline import make_cache
from distillery.sources.pixels import PreprocessSpec
from distillery.system.signals import StopFlag


class Photographs(Images):
    """A source of cuts of photographs of several shapes, all at least `size` px high and wide."""

    def pixels(self, i: int) -> np.ndarray:
        height, width = ((1, 1), (1, 1.5), (1.25, 1))[i % 3]
        height, width = round(self.size * height), round(self.size * width)
        photograph = load_sample_images().images[i % 2]
        top, left = (31 * i) % (427 - height), (47 * i) % (640 - width)
        return photograph[top : top + height, left : left + width]


def make_photograph_cache(
    directory: Path,
    num_rows: int = 20,
    *,
    dtype: str = "jpeg",
    size: int = 32,
    stored_size: int | str | None = None,
    resize_mode: str = "squash",
    quality: int = 90,
    source_size: int = 48,
    shard_size: int = 8,
    bad: tuple[int, ...] = (),
) -> Photographs:
    """Stage 1 of `num_rows` cuts of source_size px; stored_size: None is `size`. Returns the source."""
    source = Photographs(num_rows, source_size, bad, labels=True)
    spec = PreprocessSpec(size, resize_mode, "bicubic", MEAN, STD)
    encoding = RowEncoding(stored_size or size, quality) if dtype == "jpeg" else None
    plan = CachePlan(
        directory, spec, dtype, shard_size, num_rows, 1000, {"kind": "photographs"}, True, encoding=encoding
    )
    with StopFlag() as stop:
        survey = survey_cache(plan, list(range(plan.num_shards)))
        make_cache(plan, source, survey=survey, batch_size=shard_size, num_workers=1, stop=stop)
    return source


def encoded_rows(directory: Path) -> dict[int, bytes]:
    """global_idx -> the encoded image of every valid row, by plain torch.load."""
    rows = {}
    for number, path in enumerate(sorted(directory.glob("images_shard_*.pt"))):
        shard = torch.load(path, weights_only=True)
        data, offsets = shard["encoded"].numpy().tobytes(), shard["offsets"].tolist()
        start = number * 8
        rows |= {start + i: data[offsets[i] : offsets[i + 1]] for i in range(len(offsets) - 1) if shard["valid"][i]}
    return rows
