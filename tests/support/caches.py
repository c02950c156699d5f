"""Small caches for tests, made by the real writer from images that can be told apart."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from distillery.cache.encoded import RowEncoding
from distillery.cache.images import place_image_fields, small_tensors
from distillery.cache.plan import CachePlan, survey_cache
from distillery.precompute.pipeline import make_cache
from distillery.sources.pixels import PreprocessSpec
from distillery.system.signals import StopFlag

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def finish(payload, dtype, shape, valid, labels, meta):
    """Complete a shard of images, `shape` [N, 3, H, W] of `dtype`, without masks."""
    return payload.finish(place_image_fields(shape[0], dtype, shape[1:], None), small_tensors(valid, labels), meta)


class Images:
    """A source of PNG images; image i is noise of seed i. Those in `bad` cannot be decoded."""

    def __init__(self, num_rows: int, size: int = 8, bad: tuple[int, ...] = (), labels: bool = False) -> None:
        self.num_rows, self.size, self.bad, self.has_labels = num_rows, size, bad, labels
        self.identity = {"kind": "test", "num_rows": num_rows}
        self.reads: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return self.num_rows

    def pixels(self, i: int) -> np.ndarray:
        return np.random.default_rng(i).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)

    def encoded(self, i: int) -> bytes:
        if i in self.bad:
            return b"no image"
        buffer = io.BytesIO()
        Image.fromarray(self.pixels(i)).save(buffer, "PNG")
        return buffer.getvalue()

    def read(self, start: int, stop: int) -> list[bytes]:
        self.reads.append((start, stop))
        return [self.encoded(i) for i in range(start, stop)]

    def read_views(self, start: int, stop: int) -> list[bytes]:
        return self.read(start, stop)

    class_names = None

    def labels(self, start: int, stop: int) -> np.ndarray | None:
        return np.arange(start, stop) % 7 if self.has_labels else None

    def describe(self) -> str:
        return "test images"


def make_test_cache(
    directory: Path,
    num_rows: int = 40,
    *,
    shard_size: int = 8,
    dtype: str = "float32",
    size: int = 8,
    bad: tuple[int, ...] = (),
    labels: bool = False,
    shards: list[int] | None = None,
    jpeg_decode: str = "exact",
) -> Images:
    """Stage 1 of `num_rows` images; with `shards` only of these, so that the cache has gaps. Returns the source.

    A cache of dtype "jpeg" holds the PNG files as they are: its pixels are those of a uint8 cache.
    """
    source = Images(num_rows, size, bad, labels)
    spec = PreprocessSpec(size, "squash", "bicubic", MEAN, STD, jpeg_decode)
    encoding = RowEncoding("original", 90) if dtype == "jpeg" else None
    plan = CachePlan(directory, spec, dtype, shard_size, num_rows, num_rows, source.identity, labels, encoding=encoding)
    wanted = list(range(plan.num_shards)) if shards is None else shards
    survey = survey_cache(plan, wanted)
    with StopFlag() as stop:
        make_cache(plan, source, survey=survey, batch_size=shard_size, num_workers=1, stop=stop)
    return source


def stored_images(directory: Path) -> dict[int, torch.Tensor]:
    """global_idx -> image as stored, of every valid row, by plain torch.load."""
    import json

    images = {}
    for row in json.loads((directory / "index.json").read_text())["shards"]:
        shard = torch.load(directory / row["shard_path"], weights_only=True)
        for local, (image, valid) in enumerate(zip(shard["images"], shard["valid"], strict=True)):
            if valid:
                images[row["global_start"] + local] = image
    return images


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [3, H, W] -> float32, by the definition, in float64."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (MEAN, STD))
    return ((pixels.double() / 255 - mean) / std).float()
