"""Stored teacher outputs against the teacher itself: random views of random images, run again and compared."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distillery.teacher_cache import TeacherCache, decode_tokens, to_device
from distillery.teacher_identity import TeacherCacheSpec
from distillery.teacher_images import TEACHER_BATCH, ImageRows
from distillery.teacher_outputs import LiveTeacher, encode_features

# float16 storage and another batch's rounding stay above .99999, bfloat16 arithmetic on another device above .9995
LEAST_COSINE = 0.999


@dataclass(frozen=True)
class Replay:
    """A view that was run again: which one, of which field, and the cosine of what was stored and what came out."""

    shard: str
    row: int
    view: int
    field: str
    cosine: float


def replay_views(
    cache: TeacherCache, teacher: LiveTeacher, images: ImageRows, count: int, rng: np.random.Generator
) -> Iterator[Replay]:
    """Run random (image, view) pairs through the teacher; a `count` of at least the shards' number misses none of them.

    Args:
        cache: the stored outputs.
        teacher: the one that they are said to be of.
        images: of the image cache that they are said to be of.
        count: pairs.
        rng: chooses them.
    """
    names = [row["shard_path"] for row in cache.index["shards"]]
    starts = np.array([row["global_start"] for row in cache.index["shards"]])
    spec = TeacherCacheSpec({k: v for k, v in cache.identity.items() if k != "resolved"}, cache.identity["resolved"])
    basis = to_device(cache.basis, teacher.device)
    for pairs in _in_batches(_choose_pairs(cache, images, count, rng)):
        shards, rows, views = pairs.T
        stored = cache.read(starts[shards] + rows, views)
        positions, local = images.find(starts[shards] + rows)
        features = teacher.features(
            images.read_rows(positions, local), torch.from_numpy(starts[shards] + rows), torch.from_numpy(views)
        )
        for name, live in encode_features(features, spec, basis).items():
            cosines = _cosines(stored[name], live, cache.basis)
            for shard, row, view, cosine in zip(*pairs.T.tolist(), cosines, strict=True):
                yield Replay(names[shard], row, view, name, cosine)


def _choose_pairs(cache: TeacherCache, images: ImageRows, count: int, rng: np.random.Generator) -> np.ndarray:
    """int64 [n, 3]: (shard, row, view), spread over the shards, in their order; rows without an image are left out."""
    rows = cache.index["shards"]
    order, pairs = rng.permutation(len(rows)), []
    for i in range(count):
        entry = rows[shard := int(order[i % len(order)])]
        valid = np.flatnonzero(images.valid_rows(entry["global_start"], entry["num_samples"]))
        if len(valid):
            pairs.append((shard, int(rng.choice(valid)), int(rng.integers(cache.num_views))))
    return np.array(sorted(pairs), np.int64).reshape(-1, 3)


def _in_batches(pairs: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(pairs), TEACHER_BATCH):
        yield pairs[first : first + TEACHER_BATCH]


def _cosines(stored: Tensor, live: Tensor, basis: dict[str, Tensor] | None) -> list[float]:
    """Cosine of each image's stored and live vectors, all patches as one vector; NaN counts as -1."""
    live = live.cpu()
    if live.dtype == torch.int8:
        # without the mean, which is the same on both sides and would hide a difference
        stored, live = stored - basis["mean"], decode_tokens(live, basis) - basis["mean"]
    cosines = F.cosine_similarity(stored.flatten(1).double(), live.flatten(1).double(), dim=1)
    return cosines.nan_to_num(nan=-1.0).tolist()
