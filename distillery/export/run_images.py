"""Real images for an ONNX graph: from the evaluation sets or the cache of the run, as the graph takes them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.export.onnx import noise
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from distillery.models.backbone import Backbone
    from distillery.reading.datasets import CachedTensorDataset

COMPARED_IMAGES = 256
# with fewer, the nearest ten would be a large part of all: they would agree whatever the graph gives
FEWEST_IMAGES = 50
# a number that divides neither 256 nor what a graph was traced with: the last batch is short, so two sizes are seen
BATCH = 24


@dataclass(frozen=True)
class ImageRows:
    """Some images, read when they are iterated: batches of float32 [B, 3, H, W].

    dataset: None: noise. rows: which of them. where: for people. backbone: at whose size and normalisation they come.
    """

    dataset: CachedTensorDataset | None
    rows: np.ndarray
    where: str
    backbone: Backbone

    @property
    def have_neighbours(self) -> bool:
        """Whether these are images, not noise, and enough for k-NN."""
        return self.dataset is not None and len(self) >= FEWEST_IMAGES

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Tensor]:
        import torch

        if self.dataset is None:
            yield from noise(len(self.rows), self.backbone.img_size).split(BATCH)
            return
        own, index = self.backbone, self.dataset.index
        for start in range(0, len(self.rows), BATCH):
            images = torch.stack(self.dataset.__getitems__(self.rows[start : start + BATCH]))
            own.set_data_normalisation(index.mean, index.std)
            try:
                prepared = own.prepare(images)
            finally:
                own.set_data_normalisation(own.mean, own.std)
            yield prepared


def find_images(data: dict[str, Any], backbone: Backbone, num_calibration: int) -> tuple[ImageRows | None, ImageRows]:
    """(images to calibrate with, images to compare on).

    The first are spread over the run's cache. The second are those of the first test split of eval_datasets that is
    cached and has enough; else images of the cache that are not among the first; where it has too few, the same ones;
    without a cache, noise, and the first are None. A cache that cannot be read counts as none, and a line says so.

    Args:
        data: the run's section.
        backbone: takes images normalised with its own mean and std, as the graph does.
        num_calibration: images to calibrate with, 0 for none; a smaller cache gives all that it has.
    Raises:
        UserError: images to calibrate with are wanted, and the cache cannot be read.
    """
    try:
        return _choose(data, backbone, num_calibration)
    except UserError as error:
        if num_calibration:
            raise
        return None, noise_rows(backbone, error)


def noise_rows(backbone: Backbone, error: UserError | None = None) -> ImageRows:
    """Random noise in place of images.

    Args:
        backbone: at whose size.
        error: why images cannot be read, which is printed; None: there are none.
    """
    import numpy as np

    reason = "the run has no cache here"
    if error is not None:
        print(f"the images of the run cannot be read: {error}", file=sys.stderr)
        reason = "the images of the run could not be read"
    return ImageRows(None, np.arange(32), f"32 images of random noise, because {reason}", backbone)


def _choose(data: dict[str, Any], backbone: Backbone, num_calibration: int) -> tuple[ImageRows | None, ImageRows]:
    import numpy as np

    cache_dir = expand_path(data["cache_dir"])
    cache = _open(cache_dir)
    chosen = np.empty(0, np.int64)
    if cache is not None:
        chosen = _spread(np.arange(len(cache)), num_calibration)
    calibration = None
    if len(chosen):
        calibration = ImageRows(cache, chosen, f"{len(chosen)} images of the cache", backbone)
    for name in data.get("eval_datasets") or {}:
        test = _open(cache_dir / "eval" / name / "test")
        if test is not None and len(test) >= FEWEST_IMAGES:
            rows = _spread(np.arange(len(test)), COMPARED_IMAGES)
            return calibration, ImageRows(test, rows, f"{len(rows)} images of {name}/test", backbone)
    if cache is None:
        return None, noise_rows(backbone)
    others = np.setdiff1d(np.arange(len(cache)), chosen)
    if len(others) >= FEWEST_IMAGES or not len(chosen):
        rows = _spread(others, COMPARED_IMAGES)
        where = f"{len(rows)} images of the cache" + (", none of them calibrated with" if len(chosen) else "")
        return calibration, ImageRows(cache, rows, where, backbone)
    rows = _spread(np.arange(len(cache)), COMPARED_IMAGES)
    return calibration, ImageRows(
        cache, rows, f"{len(rows)} images of the cache, some of them calibrated with: it has few", backbone
    )


def _open(directory: Path) -> CachedTensorDataset | None:
    """The images of a cache; None where there is none."""
    from distillery.reading.datasets import CachedTensorDataset

    try:
        return CachedTensorDataset(directory)
    except MissingFileError:
        return None


def _spread(rows: np.ndarray, count: int) -> np.ndarray:
    """`count` of the rows at equal distances, or all."""
    import numpy as np

    if count >= len(rows):
        return rows
    return rows[np.arange(count, dtype=np.int64) * len(rows) // count]
