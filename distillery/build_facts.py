"""What a run says of itself: the data and the teacher it is bound to, what was compiled, what to do without memory."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillery.build import build_teacher, describe_schedule
from distillery.config.keys_data import DataConfig
from distillery.config.keys_train import TrainConfig
from distillery.config.load import Configs
from distillery.engine import Task
from distillery.losses.targets import PHI_S, FrozenTeacher, Targets
from distillery.metrics import pack_numbers
from distillery.models.backbone import Backbone
from distillery.models.configured import choose_precision
from distillery.models.weights import weights_hash
from distillery.reading.order import EpochOrder
from distillery.system.console import format_bytes
from distillery.system.errors import UserError, teacher_command
from distillery.system.files import sha256_of
from distillery.teacher_cache.estimate import describe_cache, describe_saving
from distillery.teacher_cache.reader import TeacherCache


def compiled_graphs() -> str:
    """How much of what is called torch.compile has really compiled, for the console."""
    from torch._dynamo.utils import counters

    graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
    return f"torch.compile: {graphs} graphs, {breaks} graph breaks" + (
        "" if graphs else "; nothing was compiled: set compile_student and compile_teacher to false"
    )


def shards_of(loader: Any) -> dict[str, Any]:
    """What a run keeps of the data it is started on, for run_folder.freeze_shards."""
    if loader.shard_names is not None:
        fingerprint, names = loader.fingerprint, loader.shard_names
    else:
        decoder = loader.dataset.decoder
        fingerprint = sha256_of({"source": decoder.source.identity, "preprocess": decoder.spec.identity()})
        names = []
    rows = loader.valid_rows_per_shard
    return {"fingerprint": fingerprint, "shards": list(names), "rows": list(rows) if names else [sum(rows)]}


def epoch_facts(loader: Any, epoch: int) -> dict[str, Any]:
    """What an epoch reads, for its row of metrics.jsonl: images, and of a cache the places of the shards in the run's
    list, packed (metrics.unpack_numbers).
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
        UserError: use_cached asks for the other kind of images.
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


def plan_of(task: Task, num_images: int) -> dict[str, int]:
    """What a run says of itself in metrics.jsonl: steps, images there are, parameters without heads."""
    models = {"student": task.student.student.model}
    if isinstance(task.teacher_module, FrozenTeacher):
        models["teacher"] = task.teacher_module.backbone.model
    sizes = {f"{side}_parameters": sum(p.numel() for p in model.parameters()) for side, model in models.items()}
    if "teacher" not in models:
        sizes["teacher_parameters"] = task.stored.cache.identity["resolved"]["num_parameters"]
    return {"total_steps": task.schedule.total_steps, "num_images": num_images, **sizes}


def describe_run(configs: Configs, task: Task, steps_in_epoch: int, num_images: int, *, is_plan: bool) -> list[str]:
    """What a run will do, in lines for the console; is_plan: also what the teacher's stored outputs cost and save."""
    model, sizes = configs.model, plan_of(task, num_images)
    cache = task.stored and task.stored.cache
    lines = [
        f"teacher {model.teacher_name} ({sizes['teacher_parameters'] / 1e6:.2f} M parameters) -> student "
        f"{model.student_name} ({sizes['student_parameters'] / 1e6:.2f} M) on {task.device}, {task.precision}",
        *describe_schedule(configs, task.schedule, steps_in_epoch, num_images),
    ]
    if is_plan:
        teacher = loaded_teacher(configs, task.teacher_module, cache, task.device)
        lines += describe_saving(configs, teacher, task.student, cache, num_images)
    elif cache is not None:
        lines.append(describe_cache(cache, configs, num_images))
    return lines


def spread_batches(dataset: Any, num_images: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised images [B, 3, H, W] spread evenly over a data set, the same whatever the number of processes.

    Of a data set of an epoch's shards: over all shards, as data are often sorted by class.
    """
    dataset = getattr(dataset, "base_dataset", dataset)
    count = min(num_images, len(dataset))
    rows = [i * len(dataset) // count for i in range(count)]
    for start in range(0, count, batch_size):
        yield torch.stack(dataset.__getitems__(rows[start : start + batch_size])).to(device)


def teacher_hash(teacher: Targets, cache: TeacherCache | None) -> str:
    """weights_hash of the run's teacher, loaded or not, and how it pools where that is not the usual way.

    Raises:
        UserError: it is loaded, and its outputs have been stored with other weights, or pooled in another way.
    """
    if not isinstance(teacher, FrozenTeacher):
        return _with_pooling(cache.weights_hash, cache.identity["resolved"].get("pooling"))
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
    return _with_pooling(found, pooling)


def _with_pooling(weights: str, pooling: str | None) -> str:
    return weights if pooling is None else f"{weights}, pooled by {pooling}"


def loaded_teacher(configs: Configs, teacher: Targets, cache: TeacherCache | None, device: torch.device) -> Backbone:
    """The teacher's backbone, to be evaluated; read from its weights where the run itself does without it."""
    if not isinstance(teacher, FrozenTeacher):
        teacher = build_teacher(configs, device)
        teacher_hash(teacher, cache)
    return teacher.backbone


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


def first_images(loader: Any, task: Task) -> tuple[Tensor, ...]:
    """A few images, normalised, their global_idx and their stored outputs, for engine.check_first_step."""
    if task.stored is None:
        images = next(spread_batches(loader.dataset, 8, 8, task.device))
        return images, torch.arange(len(images), device=task.device)
    batches = iter(loader)
    images, global_idx = next(batches)
    batches.close()
    stored = task.stored.read(global_idx, epoch=0)
    images, *others = (values[:8].to(task.device) for values in (images, global_idx, *stored))
    return task.to_float(images), *others


def gather_statistics(loader: Any, task: Task) -> dict[str, Tensor]:
    """Statistics of the teacher's features, on the CPU, for Targets.load_statistics: of stored outputs where it can."""
    found = {}
    if task.stored is None or task.stored.live_fields:
        task.teacher_module.gather_statistics(spread_batches(loader.dataset, 2048, 64, task.device))
        found = {name: value.cpu() for name, value in task.teacher_module.statistics_state().items()}
    return found if task.stored is None else found | stored_statistics(loader, task)


def stored_statistics(loader: Any, task: Task, num_images: int = 2048) -> dict[str, Tensor]:
    """Statistics of stored outputs, for Targets.load_statistics.

    The pass that stored them has means and deviations over all images and views. PHI-S needs covariances too: those
    come from one view of the first num_images of the loader's order.
    """
    if task.teacher_module.standardise != PHI_S:
        return task.stored.cache.statistics
    batches = itertools.islice(loader, math.ceil(num_images / loader.batch_size))
    return task.teacher_module.statistics_of(
        task.stored.features(task.stored.read(global_idx, epoch=0)) for _, global_idx in batches
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or (torch has no error of its own for that) on the CPU."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def memory_advice(train: TrainConfig, image_size: int, device: torch.device, step: int) -> str:
    """What to do after running out of memory, with the figures at hand."""
    batch, steps, precision = train.batch_size, train.grad_accumulation_steps, choose_precision(train.precision, device)
    text = (
        f"out of memory at step {step}: batch_size {batch}, grad_accumulation_steps {steps}, image_size {image_size}, "
        f"precision {precision}"
    )
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        taken = torch.cuda.max_memory_reserved(device)
        text += f"; {format_bytes(taken)} of the GPU's {format_bytes(total)} were taken, {format_bytes(free)} are free"
    text += ". The checkpoints are intact; run the same command with"
    if batch % 2 == 0:
        text += f" --set batch_size={batch // 2} --set grad_accumulation_steps={2 * steps} (the same global batch),"
    if not train.gradient_checkpointing:
        text += " --set gradient_checkpointing=true (slower),"
    if precision == "fp32" and device.type == "cuda":
        text += " precision: bf16 (a new run),"
    return text + " a smaller student or teacher_img_size, or on more memory."
