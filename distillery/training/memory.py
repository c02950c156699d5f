"""Compute the GPU memory that a run takes, and the largest batch that fits, from the sizes of its tensors."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from distillery.config.keys_train import TrainConfig
from distillery.losses.targets import FrozenTeacher
from distillery.models.precision import LOW_TYPES, autocast_for
from distillery.system.console import format_bytes
from distillery.training.optimizer import state_bytes
from distillery.training.task import Task

GB = 10**9
# sizes that GPUs have, for a plan that is made where there is none
USUAL_GPUS = (24 * GB, 40 * GB, 80 * GB)
# of the GPU, for CUDA itself, workspaces, the teacher's forward pass, what the optimiser computes with for a moment,
# and blocks that are free but in pieces
_SET_ASIDE = 0.15


def fit_line(task: Task, train: TrainConfig, image_size: int) -> str:
    """What the models and a step take of a GPU's memory, and the largest batch_size by that arithmetic.

    The task's student runs forward on a few random images, on its device.
    """
    has_gpu = task.device.type == "cuda"
    # where there is no GPU, the plan is for one on which auto is bf16
    precision = "bf16" if train.precision == "auto" and not has_gpu else task.precision
    parts, fixed = [], 0
    if isinstance(task.teacher, FrozenTeacher):
        its = precision if train.teacher_precision == "auto" else train.teacher_precision
        fixed += (size := teacher_bytes(task.teacher.backbone, its))
        parts.append(f"teacher {format_bytes(size)} ({its})")
    fixed += (size := student_bytes(task.student, train))
    parts.append(f"student with optimiser {format_bytes(size)}")
    per_image = activation_bytes(task, image_size, precision)
    parts.append(f"{format_bytes(per_image)} an image for the backward pass")
    sizes = [torch.cuda.get_device_properties(task.device).total_memory] if has_gpu else USUAL_GPUS
    batches = [largest_batch(size, fixed, per_image) for size in sizes]
    most = " / ".join(f"{count:,}" if count else "none" for count in batches)
    of_what = " / ".join(f"{size / GB:.0f}" for size in sizes)
    where = "of this GPU's" if has_gpu else "no GPU here: computed for"
    return (
        f"fits: {' + '.join(parts)} (computed; {_SET_ASIDE:.0%} of the GPU is set aside for all else); {where} "
        f"{of_what} GB: batch_size up to {most}"
    )


def largest_batch(total: int, fixed: int, per_image: int) -> int:
    """Images that fit beside `fixed` bytes, 0 where not one does; all in bytes."""
    return max(0, int((1 - _SET_ASIDE) * total - fixed) // per_image)


def teacher_bytes(model: nn.Module, precision: str) -> int:
    """Bytes of a frozen model's weights and buffers, floating ones in a precision."""
    width = 2 if precision in LOW_TYPES else 4
    tensors = [*model.parameters(), *model.buffers()]
    return sum(value.numel() * (width if value.is_floating_point() else value.element_size()) for value in tensors)


def student_bytes(student: nn.Module, train: TrainConfig) -> int:
    """Bytes of weights, gradients, the optimiser's moments and, with ema_decay, averages."""
    weights = _bytes_of(student.parameters()) + _bytes_of(student.buffers())
    trained = _bytes_of(value for value in student.parameters() if value.requires_grad)
    return weights + trained + state_bytes(student, train) + (weights if train.ema_decay else 0)


def activation_bytes(task: Task, image_size: int, precision: str) -> int:
    """Bytes that autograd keeps of one image between the student's forward and backward pass, at least 1."""
    few, more = (_kept_bytes(task, count, image_size, precision) for count in (2, 4))
    return max(1, (more - few) // 2)


def _kept_bytes(task: Task, count: int, image_size: int, precision: str) -> int:
    """Bytes of the tensors that the student's forward pass keeps for the backward pass, without its weights."""
    images = torch.randn(count, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    if task.depth is not None:
        task.depth.use(task.depth.draw(torch.arange(count, device=task.device), seed=task.seed, epoch=0))
    weights = {value.untyped_storage().data_ptr() for value in task.student.parameters()}
    kept: dict[int, int] = {}

    def note(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return value

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda value: value)
    with hooks, autocast_for(precision, task.device.type):
        outputs = task.student(images.to(task.device))
    del outputs  # until here: an address that is free again would be counted once for two tensors
    return sum(kept.values())


def _bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors)
