"""Stage 2's plan: a few real steps timed; nothing is written."""

import itertools
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from distillery.build import global_batch_size
from distillery.cache.images import shard_name
from distillery.config.keys_data import DataConfig
from distillery.config.load import Configs
from distillery.engine import Task, batches_by_step, train_step
from distillery.planner import StepSpeed, TrainingFacts, advice_lines, training_advice, training_lines
from distillery.reading.loader import DevicePrefetcher
from distillery.reading.shard_draws import rows_of_draw
from distillery.system import distributed
from distillery.system.errors import UserError
from distillery.system.machine import memory_left
from distillery.system.signals import slurm_seconds_left

_NUM_STEPS, _BUDGET_S = 5, 20.0
_READ_BATCHES, _READ_S = 24, 2.0


class SyntheticLoader:
    """Random images in the place of a cache that is not there yet; the counts are those the cache would have."""

    normalized = True
    fingerprint = "synthetic"

    def __init__(self, num_images: int, shard_size: int, batch_size: int, image_size: int) -> None:
        self.num_images, self.batch_size, self.image_shape = num_images, batch_size, (3, image_size, image_size)
        starts = range(0, num_images, shard_size)
        self.valid_rows_per_shard = [min(shard_size, num_images - start) for start in starts]
        self.shard_names = [shard_name(number) for number in range(len(starts))]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The same batch without end: (float32 [B, 3, H, W], int64 [B])."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, *self.image_shape, generator=generator)
        while True:
            yield images, torch.arange(self.batch_size) % self.num_images


def plan_loader(configs: Configs, build_loader: Callable[[], Any]) -> Any:
    """What --dry_run trains on for a moment: the run's own loader, or random images where nothing is cached yet.

    Raises:
        UserError: there is no cache, and how many images it would have is not known before a download.
    """
    data = configs.data
    has_cache = data.cache_dir is not None and (data.cache_path / "index.json").exists()
    if has_cache or data.use_cached is False or data.dataset_name is None:
        return build_loader()
    from distillery.sources.hub import NotDownloadedError
    from distillery.sources.registry import open_source

    limits = [data.max_samples, data.max_shards and data.max_shards * data.cache_shard_size]
    try:
        limits.append(len(open_source(**data.source_arguments, download=False)))
    except NotDownloadedError as error:
        limits.append(error.facts.num_rows)
    num_images = min((limit for limit in limits if limit), default=None)
    if num_images is None:
        raise UserError(
            f"there is no cache at {data.cache_dir}, and the hub does not say how many images {data.dataset_name} has. "
            "Give the number for this plan: --set max_samples=N, or make the cache first."
        )
    if distributed.is_main():
        print(f"there is no cache at {data.cache_dir} yet: the plan is for {num_images:,} images, on random ones")
    return SyntheticLoader(num_images, data.cache_shard_size, configs.train.batch_size, data.image_size)


def plan_run(configs: Configs, task: Task, loader: Any, steps_in_epoch: int, steps_done: int, epoch: int) -> list[str]:
    """Lines for the console: speed, hours, memory, disk, advice. The task is trained for a few steps."""
    speed = measure_steps(task, loader, epoch)
    facts = training_facts(configs, task, loader, steps_in_epoch, steps_done)
    return [*training_lines(facts, speed), *advice_lines(training_advice(facts, speed))]


def training_facts(
    configs: Configs, task: Task, loader: Any, steps_in_epoch: int, steps_done: int = 0
) -> TrainingFacts:
    """What the configuration and the loader say of a run."""
    data, train, rows = configs.data, configs.train, loader.valid_rows_per_shard
    batch = global_batch_size(train)
    weights = sum(value.numel() * value.element_size() for value in task.student.state_dict().values())
    trained = sum(value.numel() * value.element_size() for value in task.student.parameters() if value.requires_grad)
    return TrainingFacts(
        num_images=sum(rows),
        global_batch=batch,
        steps_in_epoch=steps_in_epoch,
        shard_steps=rows_of_draw(rows, data.shards_per_epoch) // batch,
        whole_steps=sum(rows) // batch,
        num_epochs=train.num_epochs,
        total_steps=task.schedule.total_steps,
        steps_done=steps_done,
        warmup_steps=task.schedule.warmup_steps,
        max_steps_per_epoch=train.max_steps_per_epoch,
        shards_per_epoch=data.shards_per_epoch,
        save_every=train.save_every or steps_in_epoch,
        keep_checkpoints=train.keep_checkpoints,
        # AdamW keeps two moments of every trained weight
        checkpoint_bytes=weights + 2 * trained + (weights if train.ema_decay else 0),
        eval_every_epochs=train.eval_every_epochs,
        num_eval_datasets=len(data.eval_datasets),
        has_crop=train.augment.random_resized_crop is not None,
        precision=task.precision,
        on_cuda=task.device.type == "cuda",
        row_bytes=_row_bytes(data) if loader.shard_names is not None else 0,
        seconds_left=slurm_seconds_left(),
        memory_left=memory_left(),
    )


def _row_bytes(data: DataConfig) -> int:
    item = {"float32": 4, "uint8": 1}.get(data.cache_dtype, 2)
    return 3 * data.image_size**2 * item


def measure_steps(task: Task, loader: Any, epoch: int) -> StepSpeed:
    """Time a few optimiser steps of the task, after one that pays for what happens once."""
    batches = loader if task.stored is None else task.stored.batches(loader, epoch=epoch, step=0)
    groups = batches_by_step(DevicePrefetcher(batches, task.device), task.accumulation_steps)
    began, steps = time.monotonic(), 0
    for step in range(1 + _NUM_STEPS):
        if step <= 1:  # the first pays for what happens once
            task.clock.restart()
        with task.clock.part("wait"):
            group = next(groups, None)
        if group is None:
            break
        train_step(task, group, step, epoch)
        task.clock.count(sum(len(batch[0]) for batch in group))
        steps = max(1, step)
        # all together: one process that goes on would wait for the others' gradients
        if distributed.any_rank(time.monotonic() - began > _BUDGET_S)[0]:
            break
    row = task.clock.summary()
    groups.close()
    return StepSpeed(
        num_steps=steps,
        images_per_step=task.accumulation_steps * loader.batch_size,
        step_seconds=row["step_seconds"],
        wait_fraction=row["data_wait_fraction"],
        teacher_fraction=row["teacher_fraction"],
        student_fraction=row["student_fraction"],
        loader_images=None if isinstance(loader, SyntheticLoader) else measure_loader(loader),
        **_memory(task.device),
    )


def measure_loader(loader: Any) -> float:
    """Images/s that the loader gives when nothing else is done, after the batches that it has read ahead."""
    batches = iter(loader)
    for _ in range(min(loader.prefetch_batches, len(loader) // 2)):
        next(batches)
    num_images, began = 0, time.perf_counter()
    for batch in itertools.islice(batches, _READ_BATCHES):
        num_images += len(batch[0])
        if time.perf_counter() - began > _READ_S:
            break
    return num_images / (time.perf_counter() - began)


def _memory(device: torch.device) -> dict[str, int | None]:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return {"memory_bytes": torch.cuda.max_memory_reserved(device), "memory_total": total}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": kibibytes * 1024, "memory_total": None}
