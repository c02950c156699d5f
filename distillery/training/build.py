"""Build the objects of a run from its configuration: device, models, optimiser, schedule, training task."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from distillery.config.keys_train import TrainConfig
from distillery.config.load import Configs
from distillery.losses.objective import Objective
from distillery.losses.queue import EmbeddingQueue
from distillery.losses.registry import fields_needed, needs_second_view, queue_size_of
from distillery.losses.targets import PHI_S, FrozenTeacher, Targets
from distillery.losses.total import check_tokens
from distillery.models.backbone import Backbone, memory_format_of
from distillery.models.configured import (
    build_student_backbone,
    build_teacher_backbone,
    choose_precision,
    choose_teacher_precision,
    low_weights,
    on_device,
    place_teacher,
)
from distillery.models.drop_path import StochasticDepth
from distillery.models.pair import StudentWithHeads
from distillery.models.views import Augmentation
from distillery.reading.loader import held_batches
from distillery.reading.shard_draws import rows_of_draw
from distillery.system import distributed
from distillery.system.errors import UserError
from distillery.teacher_cache.opening import images_to_compare
from distillery.teacher_cache.reader import TeacherCache
from distillery.teacher_cache.targets import StoredTargets, check_fields
from distillery.training.batches import StepBatch, live_batch, stored_batch
from distillery.training.bindings import teacher_hash
from distillery.training.compilation import decide_compiled
from distillery.training.optimizer import build_optimizer, default_learning_rate
from distillery.training.task import Ema, Schedule, Task


def build_teacher(configs: Configs, device: torch.device) -> FrozenTeacher:
    """The teacher, on the device and in its own precision (`teacher_precision`)."""
    train = configs.train
    with_logits = "logits" in fields_needed(train.distill_loss_weights)
    precision = choose_teacher_precision(train, device)
    low = low_weights(train, device, precision)
    backbone = build_teacher_backbone(configs.model, configs.data, with_logits=with_logits, low=low)
    backbone = place_teacher(backbone, train, device, precision, lambda: images_to_compare(configs.data))
    return FrozenTeacher(backbone, train.standardise_targets, precision).to(device)


def build_models(
    configs: Configs, device: torch.device, cache: TeacherCache | None = None
) -> tuple[Targets, StudentWithHeads]:
    """Teacher and student with its heads, on the device; the student's initial weights depend on the seed alone.

    cache: the teacher's stored outputs; where every step takes them, only what is known of them is returned.
    """
    train = configs.train
    fields = fields_needed(train.distill_loss_weights)
    if cache is not None:
        check_fields(cache, train)
    if cache is None or train.teacher_cache.mode == "hybrid":
        teacher = build_teacher(configs, device)
        check_tokens(teacher.backbone, "teacher", train.distill_loss_weights, train.teacher_cache.tokens)
    else:
        teacher = Targets(cache.widths, train.standardise_targets).to(device)
    torch.manual_seed(train.seed)
    backbone = build_student_backbone(configs.model, configs.data, gradient_checkpointing=train.gradient_checkpointing)
    check_tokens(backbone, "student", train.distill_loss_weights, train.teacher_cache.tokens)
    student = StudentWithHeads(
        backbone,
        teacher.widths,
        fields,
        configs.model.projector.model_dump(),
    )
    return teacher, on_device(student.train(), device)  # a hub entry may give it in eval mode


def build_schedule(
    train: TrainConfig, student: nn.Module, steps_in_epoch: int, steps_before: int = 0, epochs_before: int = 0
) -> Schedule:
    """The schedule of the whole run; a warm-up longer than the run is clipped.

    steps_before, epochs_before: what the finished epochs took, where they may have been of another length.
    """
    total = steps_before + steps_in_epoch * max(0, train.num_epochs - epochs_before)
    warmup = 0.05 * total if train.warmup_epochs is None else train.warmup_epochs * steps_in_epoch
    learning_rate = train.learning_rate or default_learning_rate(global_batch_size(train), student, train.optimizer)
    return Schedule(learning_rate, min(train.min_lr, learning_rate), min(total, round(warmup)), total)


def finished_epochs(state: dict[str, Any] | None, train: TrainConfig) -> tuple[int, int]:
    """(steps, epochs) before the epoch that a checkpoint stands in, (0, 0) without one."""
    if state is None:
        return 0, 0
    place = state["progress"]
    return place["step"] - place["samples"] // global_batch_size(train), place["epoch"]


def global_batch_size(train: TrainConfig) -> int:
    """Images per optimiser step over all processes."""
    return train.batch_size * distributed.world_size() * train.grad_accumulation_steps


def steps_per_epoch(train: TrainConfig, valid_rows: Sequence[int], shards_per_epoch: int | None) -> int:
    """Optimiser steps of every epoch.

    Raises:
        UserError: not even one step.
    """
    rows = rows_of_draw(valid_rows, shards_per_epoch)
    steps = rows // global_batch_size(train)
    if steps == 0:
        raise UserError(
            f"one step takes {global_batch_size(train)} images (batch_size {train.batch_size} x "
            f"{distributed.world_size()} processes x grad_accumulation_steps {train.grad_accumulation_steps}), "
            f"an epoch has {rows}. Use a smaller batch_size or more shards_per_epoch."
        )
    return min(steps, train.max_steps_per_epoch or steps)


def build_task(
    configs: Configs,
    teacher: Targets,
    student: StudentWithHeads,
    schedule: Schedule,
    normalized: bool,
    device: torch.device,
    cache: TeacherCache | None = None,
    *,
    compiled: dict[str, bool] | None = None,
) -> Task:
    """Everything a training step touches.

    normalized: whether the loader's float batches are normalised already; cache: the teacher's stored outputs;
    compiled: what the checkpoint says of it that the run goes on from.
    """
    data, train = configs.data, configs.train
    augmentation = Augmentation(**train.augment.model_dump(), mean=data.mean, std=data.std)
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (data.mean, data.std))

    def to_float(images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            return (images.float() / 255 - mean) / std
        return images.float() if normalized else (images.float() - mean) / std

    stored = None if cache is None else StoredTargets(cache, teacher, augmentation, train)
    depth = StochasticDepth(student)  # before anything holds the layers that it replaces
    objective = Objective(
        student,
        train.distill_loss_weights,
        train.loss_options,
        stored_losses=stored and stored.loss_weights,
        grid_at_most=stored and stored.grid,
    )
    queue_size = queue_size_of(train.distill_loss_weights, train.loss_options)
    return Task(
        student=student,
        objective=objective,
        objective_call=_wrap_for_ranks(objective, device),
        teacher=teacher,
        teacher_call=teacher,
        optimizer=build_optimizer(student, train, device),
        schedule=schedule,
        loss_weights=train.distill_loss_weights,
        augment=augmentation,
        to_float=to_float,
        device=device,
        precision=choose_precision(train.precision, device),
        max_grad_norm=train.max_grad_norm,
        accumulation_steps=train.grad_accumulation_steps,
        seed=train.seed,
        ema=Ema(student.student.model, train.ema_decay, student.heads) if train.ema_decay else None,
        depth=depth,
        queue=queue_size and EmbeddingQueue(queue_size, teacher.widths["pooled"], device),
        stored=stored,
        max_bad_steps=train.max_bad_steps,
        memory_format=memory_format_of(student, device),
        compiled=decide_compiled(train, device, schedule.total_steps, compiled),
    )


def _wrap_for_ranks(objective: Objective, device: torch.device) -> nn.Module:
    """What a step calls: of several ranks, DistributedDataParallel around the objective, which may be compiled."""
    if distributed.world_size() == 1:
        return objective
    # constants need no broadcast in every forward pass, batch-norm statistics do
    has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in objective.modules())
    return nn.parallel.DistributedDataParallel(
        objective,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=has_batch_norm,
    )


def crop_while_decoding(loader: Any, task: Task) -> list[str]:
    """Let the loader of a compressed cache decode only what each view shows, where no step needs more of an image.

    The draws are those of the task's augmentation. Call it before the loader is iterated.

    Returns:
        A line for the console that says where crops are made, and why; none where there are no crops, or no encoded
        images.
    """
    augment, seed = task.augment, task.seed
    if not loader.is_encoded or not augment.crops:
        return []
    whole = f"crops: cut on the device out of whole images of {loader.image_shape[-1]} px: "
    if task.stored is not None:
        return [whole + "the teacher's stored outputs are of such views"]
    if needs_second_view(task.loss_weights):
        return [whole + "a loss compares two views of an image"]
    task.augment = augment.without_crop()
    loader.crop_boxes = lambda global_idx, epoch: augment.boxes(global_idx, seed=seed, epoch=epoch)
    return ["crops: cut out of the stored images while they are decoded, before they are resized"]


def spread_batches(dataset: Any, num_images: int, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised images [B, 3, H, W] spread evenly over a data set, the same whatever the number of processes.

    Of a data set of an epoch's shards: over all shards, as data are often sorted by class.
    """
    dataset = getattr(dataset, "base_dataset", dataset)
    count = min(num_images, len(dataset))
    rows = [i * len(dataset) // count for i in range(count)]
    for start in range(0, count, batch_size):
        yield torch.stack(dataset.__getitems__(rows[start : start + batch_size])).to(device)


def loaded_teacher(configs: Configs, teacher: Targets, cache: TeacherCache | None, device: torch.device) -> Backbone:
    """The teacher's backbone, to be evaluated; read from its weights where the run itself does without it."""
    if not isinstance(teacher, FrozenTeacher):
        teacher = build_teacher(configs, device)
        teacher_hash(teacher, cache)
    return teacher.backbone


def first_images(loader: Any, task: Task, epoch: int) -> StepBatch:
    """A few images, normalised, in an epoch's views and on the device: a batch for engine.check_first_step."""
    if task.stored is None and loader.crop_boxes is None:
        images = next(spread_batches(loader.dataset, 8, 8, task.device))
        return _on_device(live_batch(task, images, torch.arange(len(images)), epoch), task.device)
    images, global_idx = loader.peek(8)
    # the loader cuts the views of the epoch that it stands in
    make, epoch = (live_batch, loader.epoch) if task.stored is None else (stored_batch, epoch)
    batch = _on_device(make(task, images, global_idx, epoch), task.device)
    return batch._replace(images=task.to_float(batch.images))


def first_batches(loader: Any, task: Task, epoch: int) -> list[StepBatch]:
    """The loader's next batch as each kind of step of the run takes it, on the device."""
    batches = held_batches(loader)
    images, global_idx = next(batches)
    batches.close()
    kinds = [] if task.stored is None else [stored_batch]
    if task.stored is None or task.stored.live_fraction:
        kinds.append(live_batch)
    return [_on_device(make(task, images, global_idx, epoch), task.device) for make in kinds]


def _on_device(batch: StepBatch, device: torch.device) -> StepBatch:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def gather_statistics(loader: Any, task: Task) -> dict[str, Tensor]:
    """Statistics of the teacher's features, on the CPU, for Targets.load_statistics: of stored outputs where it can."""
    found = {}
    if task.stored is None or task.stored.live_fields:
        task.teacher.gather_statistics(spread_batches(loader.dataset, 2048, 64, task.device))
        found = {name: value.cpu() for name, value in task.teacher.statistics_state().items()}
    return found if task.stored is None else found | stored_statistics(loader, task)


def stored_statistics(loader: Any, task: Task, num_images: int = 2048) -> dict[str, Tensor]:
    """Statistics of stored outputs, for Targets.load_statistics.

    The pass that stored them has means and deviations over all images and views. PHI-S needs covariances too: those
    come from one view of the first num_images of the loader's order.
    """
    if task.teacher.method != PHI_S:
        return task.stored.cache.statistics
    batches = itertools.islice(loader, math.ceil(num_images / loader.batch_size))
    return task.teacher.statistics_of(
        task.stored.features(task.stored.read(global_idx, epoch=0)) for _, global_idx in batches
    )
