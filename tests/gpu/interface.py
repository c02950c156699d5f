"""All that these tests know of the engine's interface: how a task, a batch and the pass of stage 1 are made.

    make_task        from configuration to a Task whose models lie on the fake device
    batches_of       the batches of a step, as the loaders give them, on the fake device
    teacher_pass     what stage 1 does with a batch, for its teacher_cache

When a batch, the Task or the teacher cache changes its shape, change it here.
"""

import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distillery.config.load import Configs, load_configs
from distillery.losses.targets import FrozenTeacher
from distillery.models import views
from distillery.models.configured import choose_precision
from distillery.models.views import Augmentation
from distillery.teacher_cache.identity import TeacherCacheSpec, resolved_teacher
from distillery.teacher_cache.outputs import LiveTeacher, encode_features
from distillery.teacher_cache.reader import TeacherCache, to_device
from distillery.teacher_cache.targets import wanted_outputs
from distillery.training import build
from distillery.training.batches import StepBatch, StepLoader
from distillery.training.task import Schedule, Task
from tests.gpu.fake_cuda import CUDA, FAKE, move_to_fake, on_cuda

META = torch.device("meta")


@dataclass
class Made:
    """A task on the fake device and what belongs to it; outputs: of stage 1, where the task reads them."""

    configs: Configs
    task: Task
    outputs: "Outputs | None"


@dataclass
class Outputs:
    """The teacher of stage 1, what it is to store, the cache that reads it, and its token basis on the device."""

    teacher: FrozenTeacher
    spec: TeacherCacheSpec
    cache: "ImaginedCache"
    basis: dict[str, Tensor] | None = None


class ImaginedCache(TeacherCache):
    """A teacher cache without files, of zeros; everything else is the real one's."""

    def __init__(self, spec: TeacherCacheSpec) -> None:
        self.directory, self.identity, self.num_views = Path("imagined"), spec.identity, spec.num_views
        self.fingerprint, self.weights_hash, self.grid = spec.fingerprint, "imagined", spec.token_grid
        self.fields = spec.view_fields
        self.widths = {name: shape[-1] for name, (_, shape) in self.fields.items()}
        self.basis = None
        if spec.identity["stored"]["tokens"]["form"] == "pca":
            dims, self.widths["tokens"] = self.widths["tokens"], spec.resolved["token_width"]
            width = self.widths["tokens"]
            self.basis = {"mean": torch.zeros(width), "components": torch.zeros(dims, width), "scale": torch.ones(dims)}

    def read_stored(self, global_idx: np.ndarray, view: np.ndarray, fields: Any = None) -> dict[str, Tensor]:
        """Zeros of the stored dtype."""
        wanted = self.fields if fields is None else fields
        found = {name: self.fields[name] for name in wanted}
        return {
            name: torch.zeros(len(view), *shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in found.items()
        }


def make_task(data: Mapping, train: Mapping, model: Mapping, overrides: Sequence[str] = ()) -> Made:
    """A Task from the three configurations; standardisation has its statistics, as after a run's start. Outside FAKE.

    data.cache_dtype says what batches come in; train.teacher_cache whether outputs are stored. overrides: KEY=VALUE
    as for --set.
    """
    forget_constants()
    configs = load_configs(
        {"dataset_name": "parquet", "cache_dir": "imagined", **data},
        {"checkpoint_dir": "imagined", **train},
        {"teacher_pretrained": False, **model},
        overrides,
    )
    with META:
        outputs = _outputs(configs) if configs.train.teacher_cache.is_read else None
        cache = outputs and outputs.cache
        teacher, student = build.build_models(configs, META, cache)
    with FAKE:
        for module in (teacher, student, *([outputs.teacher] if outputs else [])):
            move_to_fake(module)
        if cache is not None and cache.basis is not None:
            cache.basis = {name: torch.zeros(value.shape) for name, value in cache.basis.items()}
            outputs.basis = to_device(cache.basis, CUDA)
        teacher.has_statistics = True
        schedule = Schedule(learning_rate=1e-3, min_lr=1e-6, warmup_steps=1, total_steps=1000)
        normalized = configs.data.cache_dtype != "uint8"
        task = build.build_task(configs, teacher, student, schedule, normalized, CUDA, cache)
    return Made(configs, task, outputs)


def _outputs(configs: Configs) -> Outputs:
    teacher = build.build_teacher(configs, META)
    precision = choose_precision(configs.train.precision, CUDA)
    resolved = resolved_teacher(teacher.backbone, "imagined", precision)
    spec = TeacherCacheSpec(wanted_outputs(configs, "imagined"), resolved)
    return Outputs(teacher, spec, ImaginedCache(spec))


def batches_of(made: Made, step: int) -> list[StepBatch]:
    """The batches of a step on the fake device, as the real StepLoader makes them. Outside FAKE."""
    data, train = made.configs.data, made.configs.train
    shape, dtype = (train.batch_size, 3, data.image_size, data.image_size), getattr(torch, data.cache_dtype)
    host = [(torch.zeros(shape, dtype=dtype), torch.arange(train.batch_size))] * train.grad_accumulation_steps
    batches = list(StepLoader(made.task, host, epoch=0, step=step))
    with FAKE:
        return [tree_map_only(Tensor, on_cuda, batch) for batch in batches]


def first_images(made: Made) -> StepBatch:
    """What engine.check_first_step is given. Outside FAKE."""
    batch = batches_of(made, steps_of(made.task)[0])[0]
    with FAKE:
        return batch._replace(images=made.task.to_float(batch.images))


def steps_of(task: Task) -> list[int]:
    """A step of each kind that a run has: on stored outputs, and with the teacher."""
    if task.stored is None:
        return [0]
    kinds = [False, True] if task.stored.live_fraction else [False]
    return [next(step for step in range(100) if task.stored.is_live(step) == live) for live in kinds]


def teacher_pass(made: Made) -> dict[str, Tensor]:
    """What stage 1 computes and stores of a batch; inside FAKE."""
    configs, outputs = made.configs, made.outputs
    data, train = configs.data, configs.train
    teacher = LiveTeacher(
        backbone=outputs.teacher.backbone,
        augmentation=Augmentation(**train.augment.model_dump(), mean=data.mean, std=data.std),
        seed=train.teacher_cache.seed,
        device=CUDA,
        precision=outputs.spec.resolved["precision"],
    )
    images = torch.zeros(train.batch_size, 3, data.image_size, data.image_size, device=CUDA)
    features = teacher.features(images, torch.arange(train.batch_size, device=CUDA), 1)
    return encode_features(features, outputs.spec, outputs.basis)[0]


def forget_constants() -> None:
    """Empty every cache of constants of the project: one on a fake device must not meet the next task's."""
    views._constants.clear()
    for name, module in list(sys.modules.items()):
        if name.startswith("distillery."):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()
