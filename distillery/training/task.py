"""What a run trains with: the schedule, where the run stands, and all that a training step touches."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distillery.losses.objective import Objective
from distillery.losses.queue import EmbeddingQueue
from distillery.losses.targets import FrozenTeacher, Targets
from distillery.models.drop_path import StochasticDepth
from distillery.models.pair import StudentWithHeads
from distillery.models.precision import autocast_for
from distillery.models.views import Augmentation
from distillery.teacher_cache.targets import StoredTargets
from distillery.training.compilation import Compiled
from distillery.training.watch import BadSteps, RunningStatistics, StepClock


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the run: linear warm-up, then half a cosine down to min_lr. Steps are optimiser steps."""

    learning_rate: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The learning rate of step `step` (from 0): a pure function, so a resumed run cannot drift."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - 1 - self.warmup_steps)
        return self.min_lr + (self.learning_rate - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass
class Position:
    """Where a run stands.

    samples: of the current epoch's global order, consumed by all ranks together; epoch_start: step it began at.
    """

    step: int = 0
    epoch: int = 0
    samples: int = 0
    epoch_start: int = 0

    def next_epoch(self) -> None:
        """Stand at the beginning of the epoch after this one."""
        self.epoch, self.samples, self.epoch_start = self.epoch + 1, 0, self.step


@dataclass
class Task:
    """All that a training step touches.

    student, teacher: the modules themselves; the teacher's hold its weights only where a step runs it.
    objective: the student with its losses. objective_call, teacher_call: what a step calls: the module, or its DDP.
    augment: draws and makes the view that both models see.
    to_float: from the loader's batch to normalised float32 on the device.
    compiled: which parts torch.compile compiles.
    depth: the student's stochastic depth, where it has any.
    stored: targets of batches that come with the teacher's outputs.
    queue: past teacher features, where a loss compares with them.
    """

    student: StudentWithHeads
    objective: Objective
    objective_call: nn.Module
    teacher: Targets
    teacher_call: Callable[[Tensor], Any]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    loss_weights: dict[str, float]
    augment: Augmentation
    to_float: Callable[[Tensor], Tensor]
    device: torch.device
    precision: str
    max_grad_norm: float | None
    accumulation_steps: int
    seed: int
    ema: "Ema | None" = None
    depth: StochasticDepth | None = None
    stored: StoredTargets | None = None
    queue: EmbeddingQueue | None = None
    max_bad_steps: int = 0
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: Compiled = Compiled()
    view_call: Callable[[Tensor, Tensor], Tensor] = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    bad_steps: BadSteps = field(init=False)
    statistics: RunningStatistics | None = field(init=False)
    clock: StepClock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = StepClock(self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.bad_steps = BadSteps(self.device, self.max_bad_steps, gradients_count=self.precision != "fp16")
        self.statistics = RunningStatistics(self.student) if self.max_bad_steps else None
        self.view_call = self._view_of_stored_images
        # nothing is compiled before it is called; the shapes of a step never change
        if self.compiled.student:
            self.objective.compile(dynamic=False)
            self.view_call = torch.compile(self.view_call, dynamic=False)
        if self.compiled.teacher and isinstance(self.teacher, FrozenTeacher):
            self.teacher.compile(dynamic=False)

    def make_view(self, images: Tensor, parameters: Tensor) -> Tensor:
        """The view of normalised images [B, 3, H, W] that `augment` has drawn, in the student's memory format."""
        return self.augment.apply(images, parameters).contiguous(memory_format=self.memory_format)

    def _view_of_stored_images(self, images: Tensor, parameters: Tensor) -> Tensor:
        """make_view of images as the loader yields them."""
        return self.make_view(self.to_float(images), parameters)

    def autocast(self) -> Any:
        """Mixed precision for the student; losses are computed in float32, the teacher has a precision of its own."""
        return autocast_for(self.precision, self.device.type)


class Ema:
    """Exponential moving average of the student's and the heads' parameters and batch-norm statistics.

    Counters are copied. The averages of the heads belong to those of the backbone: without them an averaged student
    could not take its teacher's place.
    """

    def __init__(self, model: nn.Module, decay: float, heads: nn.Module | None = None) -> None:
        self.decay = decay
        now, heads_now = (
            {} if module is None else {name: value.detach() for name, value in module.state_dict().items()}
            for module in (model, heads)
        )
        self.state, self.heads = ({name: value.clone() for name, value in of.items()} for of in (now, heads_now))
        self._heads_now = heads_now
        pairs = [(self.state[name], value) for name, value in now.items()]
        pairs += [(self.heads[name], value) for name, value in heads_now.items()]
        # (averages, the model's own tensors): these stay the same objects, steps and checkpoints change their values
        self._averaged, self._copied = (
            [pair for pair in pairs if pair[1].is_floating_point() == is_float] for is_float in (True, False)
        )

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the model's present weights."""
        # in one call each: hundreds of small kernels take the host longer than the arithmetic takes the GPU
        if self._averaged:
            torch._foreach_lerp_(*map(list, zip(*self._averaged, strict=True)), 1 - self.decay)
        if self._copied:
            torch._foreach_copy_(*map(list, zip(*self._copied, strict=True)))

    def load_state(self, state: Mapping[str, Tensor], heads: Mapping[str, Tensor] | None = None) -> None:
        """Put the averages back that a checkpoint has; where an older one has none of the heads, they begin now."""
        for averages, saved in ((self.state, state), (self.heads, heads or self._heads_now)):
            for name, value in averages.items():
                value.copy_(saved[name])
