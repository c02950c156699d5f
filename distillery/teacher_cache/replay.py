"""Compare stored teacher outputs with the teacher itself: it runs random views of random images again."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distillery.reading.rows import TEACHER_BATCH, ImageRows
from distillery.teacher_cache.identity import TeacherCacheSpec
from distillery.teacher_cache.outputs import LiveTeacher, check_magnitudes, encode_features
from distillery.teacher_cache.reader import TeacherCache, decode_tokens, to_device

# float16 storage and another batch's rounding stay above .99999, bfloat16 arithmetic on another device above .9995
LEAST_COSINE = 0.999
# of the lengths, which a cosine does not see
LARGEST_RATIO = 1.05


@dataclass(frozen=True)
class Replay:
    """A view that was run again: which one, of which field, and how what came out compares with what was stored.

    cosine: of the two; ratio: of their lengths, now over stored.
    """

    shard: str
    row: int
    view: int
    field: str
    cosine: float
    ratio: float

    @property
    def agrees(self) -> bool:
        """Whether it is what was stored, but for rounding."""
        return self.cosine >= LEAST_COSINE and 1 / LARGEST_RATIO <= self.ratio <= LARGEST_RATIO

    def describe(self) -> str:
        """Where it is and how it differs, in words."""
        what = f"has cosine {self.cosine:.6f} with what the teacher says now, expected {LEAST_COSINE} or more"
        if self.cosine >= LEAST_COSINE:
            what = f"is {self.ratio:.3g} times as long now, expected 1 ({LARGEST_RATIO} at most)"
        return f"{self.shard}: row {self.row}, view {self.view}: {self.field} {what}"


def replay_views(
    cache: TeacherCache,
    teacher: LiveTeacher,
    images: ImageRows,
    count: int,
    rng: np.random.Generator,
    shards: Sequence[int] | None = None,
) -> Iterator[Replay]:
    """Run random (image, view) pairs through the teacher; a `count` of at least the shards' number misses none of them.

    Args:
        cache: the stored outputs.
        teacher: the teacher that should have made them.
        images: the images that they should belong to.
        count: pairs.
        rng: chooses them.
        shards: of the outputs', by their places in the index; None: all.
    """
    names = [row["shard_path"] for row in cache.index["shards"]]
    starts = np.array([row["global_start"] for row in cache.index["shards"]])
    spec = TeacherCacheSpec({k: v for k, v in cache.identity.items() if k != "resolved"}, cache.identity["resolved"])
    basis = to_device(cache.basis, teacher.device)
    chosen = range(len(names)) if shards is None else shards
    for pairs in _in_batches(_choose_pairs(cache, images, count, rng, chosen)):
        of_shard, rows, views = pairs.T
        global_idx = starts[of_shard] + rows
        stored = cache.read(global_idx, views)
        found = images.read_rows(*images.find(global_idx))
        features = teacher.features(found, torch.from_numpy(global_idx), torch.from_numpy(views))
        encoded, largest = encode_features(features, spec, basis)
        check_magnitudes(largest.cpu(), spec)
        for name, live in encoded.items():
            compared = zip(*pairs.T.tolist(), *_compare(stored[name], live, cache.basis), strict=True)
            for shard, row, view, cosine, ratio in compared:
                yield Replay(names[shard], row, view, name, cosine, ratio)


def _choose_pairs(
    cache: TeacherCache, images: ImageRows, count: int, rng: np.random.Generator, shards: Sequence[int]
) -> np.ndarray:
    """int64 [n, 3]: (shard, row, view), spread over the shards, in their order; rows without an image are left out."""
    rows = cache.index["shards"]
    order, pairs = rng.permutation(np.array(shards, np.int64)), []
    for i in range(count if len(order) else 0):
        entry = rows[shard := int(order[i % len(order)])]
        valid = np.flatnonzero(images.valid_rows(entry["global_start"], entry["num_samples"]))
        if len(valid):
            pairs.append((shard, int(rng.choice(valid)), int(rng.integers(cache.num_views))))
    return np.array(sorted(pairs), np.int64).reshape(-1, 3)


def _in_batches(pairs: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(pairs), TEACHER_BATCH):
        yield pairs[first : first + TEACHER_BATCH]


def _compare(stored: Tensor, live: Tensor, basis: dict[str, Tensor] | None) -> tuple[list[float], list[float]]:
    """(cosine, ratio of lengths) of each image's stored and live vectors, all patches as one vector.

    Equal vectors, zeros too, give 1 and 1; NaN gives -1 and 0.
    """
    live = live.cpu()
    if live.dtype == torch.int8:
        # without the mean, which is the same on both sides and would hide a difference
        stored, live = stored - basis["mean"], decode_tokens(live, basis) - basis["mean"]
    stored, live = stored.flatten(1).double(), live.flatten(1).double()
    is_equal = (stored == live).all(1)
    cosines = F.cosine_similarity(stored, live, dim=1).masked_fill(is_equal, 1.0)
    ratios = (live.norm(dim=1) / stored.norm(dim=1)).masked_fill(is_equal, 1.0)
    return cosines.nan_to_num(nan=-1.0).tolist(), ratios.nan_to_num(nan=0.0).tolist()
