"""Check that a run that goes on has the shards, the teacher and the data of its first start."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distillery.config.keys_data import DataConfig
from distillery.losses.targets import FrozenTeacher, Targets
from distillery.models.weights import weights_hash, with_pooling
from distillery.reading.order import EpochOrder
from distillery.system.errors import UserError, teacher_command
from distillery.system.files import sha256_of
from distillery.teacher_cache.reader import TeacherCache
from distillery.training.log import pack_numbers
from distillery.training.task import Task


def shards_of(loader: Any) -> dict[str, Any]:
    """What a run keeps of the data it is started on, for folder.freeze_shards."""
    if loader.shard_names is not None:
        fingerprint, names = loader.fingerprint, loader.shard_names
    else:
        decoder = loader.dataset.decoder
        fingerprint = sha256_of({"source": decoder.source.identity, "preprocess": decoder.spec.identity()})
        names = []
    rows = loader.valid_rows_per_shard
    return {"fingerprint": fingerprint, "shards": list(names), "rows": list(rows) if names else [sum(rows)]}


def epoch_row(loader: Any, epoch: int) -> dict[str, Any]:
    """What an epoch reads, for its row of metrics.jsonl: images, and of a cache the places of the shards in the run's
    list, packed (log.unpack_numbers).
    """
    order = loader.sampling.order(epoch)
    if loader.shard_names is None:
        return {"images": len(order)}
    shards = order.shards
    if order.total - len(order) >= loader.sampling.step_rows:  # a cap ends it early, maybe before some of its shards
        shards = np.concatenate([np.unique(shards) for shards in _shards_by_window(order)])
    return {"images": len(order), "shards": pack_numbers(np.unique(shards).tolist())}


def _shards_by_window(order: EpochOrder) -> Iterator[np.ndarray]:
    position = 0
    while position < len(order):
        end = order.window_bounds(position)[1]
        yield order.rows(position, end)[0]
        position = end


def data_of_frozen(data: DataConfig, frozen: dict[str, Any] | None) -> DataConfig:
    """The data configuration that gives a run's own images again, whatever has been added since it was started.

    Raises:
        UserError: use_cached selects the other kind of images.
    """
    if frozen is None:
        return data
    is_cached = bool(frozen["shards"])
    if data.use_cached not in (None, is_cached):
        kind = "a cache" if is_cached else "raw images"
        raise UserError(
            f"use_cached is {str(data.use_cached).lower()}, and this run was started on {kind}. Set it to null or "
            f"{str(is_cached).lower()} to go on with it, or give another checkpoint_dir for a new run."
        )
    # a cache grows at its end only, by shards and by rows of the last one
    changes = {"max_shards": None, "max_samples": sum(frozen["rows"]), "use_cached": is_cached}
    return data.model_copy(update=changes)


def begin_epoch_again(state: dict[str, Any], shards: dict[str, Any]) -> list[str]:
    """Put a checkpoint's position back to the beginning of its epoch where the run goes on with other shards.

    shards: of this start, as shards_of gives them. Returns a note for the user where that was so.
    """
    place = state["progress"]
    if state["shards"] == shards or not place["samples"]:
        return []
    place["samples"] = 0
    return ["the shards are others than before: the present epoch begins again"]


def plan_of(task: Task, num_images: int) -> dict[str, int]:
    """What a run says of itself in metrics.jsonl: steps, images there are, parameters without heads."""
    models = {"student": task.student.student.model}
    if isinstance(task.teacher, FrozenTeacher):
        models["teacher"] = task.teacher.backbone.model
    sizes = {f"{side}_parameters": sum(p.numel() for p in model.parameters()) for side, model in models.items()}
    if "teacher" not in models:
        sizes["teacher_parameters"] = task.stored.cache.identity["resolved"]["num_parameters"]
    return {"total_steps": task.schedule.total_steps, "num_images": num_images, **sizes}


def teacher_hash(teacher: Targets, cache: TeacherCache | None) -> str:
    """The hash of the run's teacher, loaded or not: its weights and how it pools.

    Raises:
        UserError: it is loaded, and its outputs have been stored with other weights, or pooled in another way.
    """
    if not isinstance(teacher, FrozenTeacher):
        return with_pooling(cache.weights_hash, cache.identity["resolved"].get("pooling"))
    found, pooling = weights_hash(teacher.backbone.model), teacher.backbone.pooling
    if cache is not None and cache.identity["resolved"].get("pooling") != pooling:
        raise UserError(
            f"the outputs in {cache.directory} hold the teacher's class token, and its image feature is now that of "
            f"its attention pooling. Store its outputs again: {teacher_command()}"
        )
    if cache is not None and cache.weights_hash != found:
        raise UserError(
            f"the teacher has other weights ({found}) than the one whose outputs are in {cache.directory} "
            f"({cache.weights_hash}). Put its files back, or store its outputs: {teacher_command()}"
        )
    return with_pooling(found, pooling)


def check_same_teacher(run_dir: Path, state: dict[str, Any], now: str, cache: TeacherCache | None) -> None:
    """Raise UserError when a checkpoint's teacher or stored outputs are not the present ones; now: teacher_hash."""
    if state["teacher_hash"] != now:
        raise UserError(
            f"the teacher has other weights ({now}) than when the run in {run_dir} was started "
            f"({state['teacher_hash']}). Put its files (teacher_name, teacher_repo, teacher_checkpoint) back, or give "
            "another checkpoint_dir."
        )
    before, found = state.get("teacher_cache"), cache and cache.fingerprint
    if before != found:
        raise UserError(
            f"the run in {run_dir} was started on other teacher outputs: fingerprint {(before or 'none')[:12]}, now "
            f"{(found or 'none')[:12]}. Put the teacher's files, the teacher_cache block and cache_dir back, or give "
            "another checkpoint_dir."
        )
