"""What a run advises at its start: sizes at which both models have one grid, and how many passes still pay."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distillery.config.keys_data import DataConfig
from distillery.models.backbone import Backbone
from distillery.reading.shard_draws import ShardDraws

# distinct images -> the most passes over them at which k-NN was still higher than at the measured number before; of
# the suite data in docs/results.md
ROSE_UNTIL = {2_000: 40, 5_000: 40, 12_500: 20, 50_000: 20}
# sides of two grids that differ by more are not meant to be equal
_LARGEST_RATIO = 4 / 3
_SIZE_ARGUMENTS = ("img_size", "image_size")


def grid_advice(
    teacher: Backbone, student: Backbone, arguments: Mapping[str, Mapping[str, Any]] | None = None
) -> list[str]:
    """The input size at which teacher and student have as many tokens along each side, in a line.

    The teacher's size is preferred, as it may change without a change to what the student becomes.

    Args:
        teacher: that a step runs.
        student: the backbone without its heads.
        arguments: "teacher", "student" -> arguments of that model's constructor, which win over its *_img_size.
    Returns:
        No line where the grids are equal, where a side differs by more than a third, or where no square input gives
        either model the other's grid.
    """
    sides = list(zip(teacher.grid, student.grid, strict=True))
    if teacher.grid == student.grid or any(max(pair) > _LARGEST_RATIO * min(pair) for pair in sides):
        return []
    for role, model, grid in (("teacher", teacher, student.grid), ("student", student, teacher.grid)):
        if (size := _size_for_grid(model, grid)) is None:
            continue
        named = next((name for name in _SIZE_ARGUMENTS if name in (arguments or {}).get(role, {})), None)
        key = f"{role}_img_size" if named is None else f"{role}_kwargs.{named}"
        share = math.prod(grid) / math.prod(model.grid)
        return [
            f"advice: {key}: {size} gives both models {grid[0]}x{grid[1]} patch tokens and the {role} {share:.0%} of "
            f"its present number. As they are, the teacher's {teacher.grid[0]}x{teacher.grid[1]} are resampled to the "
            f"student's {student.grid[0]}x{student.grid[1]}."
        ]
    return []


def _size_for_grid(model: Backbone, grid: tuple[int, int]) -> int | None:
    """Height and width in px at which a model has this grid; None where it is no whole number of its own cells."""
    if any(length % cells for length, cells in zip(model.img_size, model.grid, strict=True)):
        return None  # the border's cells are cut or overlap: the grid does not grow with the image
    height, width = (
        new * (length // cells) for new, length, cells in zip(grid, model.img_size, model.grid, strict=True)
    )
    return height if height == width else None


def images_of_run(data: DataConfig, rows: Sequence[int], epoch_rows: int, num_epochs: int) -> int:
    """How many different images a run sees at the most.

    Args:
        data: chooses the shards of an epoch.
        rows: valid images of each shard.
        epoch_rows: images that an epoch reads.
        num_epochs: of the whole run.
    """
    draws = ShardDraws(
        len(rows), data.shards_per_epoch, data.random_subset_seed, data.shard_subset_mode,
        shard_rows=np.asarray(rows), max_rows=epoch_rows, min_rows=epoch_rows,
    )  # fmt: skip
    is_seen = np.zeros(len(rows), dtype=bool)
    for epoch in range(1 if draws.mode == "fixed" else num_epochs):
        is_seen[draws(epoch)] = True
        if is_seen.all():
            break
    return min(int(np.asarray(rows)[is_seen].sum()), epoch_rows * num_epochs)


def passes_advice(num_images: int, images_seen: int) -> list[str]:
    """How often a run sees each of its images, where more was measured to pay: a line, or none.

    Args:
        num_images: different images that the run sees.
        images_seen: those of all its steps.
    """
    passes = images_seen / num_images
    measured = min(ROSE_UNTIL, key=lambda count: abs(math.log(count / num_images)))
    if passes >= ROSE_UNTIL[measured]:
        return []
    times = "once" if f"{passes:.2g}" == "1" else f"{passes:.3g} times"
    return [
        f"advice: each of the run's {num_images:,} images is seen {times}. In our measurements of {measured:,} images "
        f"(docs/results.md) quality still rose at {ROSE_UNTIL[measured]} passes."
    ]
