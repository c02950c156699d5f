"""The lines that a run prints about its models, its schedule and its memory."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from distillery.config.keys_train import TrainConfig
from distillery.config.load import Configs
from distillery.losses.registry import fields_needed
from distillery.losses.targets import FrozenTeacher
from distillery.models.configured import choose_precision
from distillery.system import distributed
from distillery.system.allocation import is_out_of_memory
from distillery.system.console import format_bytes
from distillery.system.errors import RunError, UserError
from distillery.teacher_cache.estimate import describe_cache, describe_saving
from distillery.training.advice import grid_advice, images_of_run, passes_advice
from distillery.training.bindings import plan_of
from distillery.training.build import global_batch_size, loaded_teacher
from distillery.training.checkpoints import CheckpointWriter
from distillery.training.optimizer import rate_rule
from distillery.training.task import Position, Schedule, Task


def describe_run(
    configs: Configs, task: Task, steps_in_epoch: int, rows: Sequence[int], *, is_new: bool, is_plan: bool
) -> list[str]:
    """What a run will do, in lines for the console.

    rows: images of each shard; is_new: it has no checkpoint yet; is_plan: also what the teacher's stored outputs cost
    and save.
    """
    model, num_images = configs.model, sum(rows)
    sizes, cache = plan_of(task, num_images), task.stored and task.stored.cache
    lines = [
        f"teacher {model.teacher_name} ({sizes['teacher_parameters'] / 1e6:.2f} M parameters) -> student "
        f"{model.student_name} ({sizes['student_parameters'] / 1e6:.2f} M) on {task.device}, {task.precision}",
        *describe_schedule(configs, task.schedule, steps_in_epoch, num_images),
    ]
    if is_plan:
        teacher = loaded_teacher(configs, task.teacher, cache, task.device)
        lines += describe_saving(configs, teacher, task.student, cache, num_images)
    elif cache is not None:
        lines.append(describe_cache(cache, configs, num_images))
    return [*lines, *advise(configs, task, steps_in_epoch, rows, is_new=is_new)]


def advise(configs: Configs, task: Task, steps_in_epoch: int, rows: Sequence[int], *, is_new: bool) -> list[str]:
    """Advice on the sizes of both models and on the number of passes; arguments as of describe_run."""
    data, train, model, lines = configs.data, configs.train, configs.model, []
    # with another input size it is another teacher: none to advise where a run has begun or outputs are stored
    is_free = is_new and isinstance(task.teacher, FrozenTeacher) and task.stored is None
    if is_free and "tokens" in fields_needed(train.distill_loss_weights):
        arguments = {"teacher": model.teacher_kwargs, "student": model.student_kwargs}
        lines += grid_advice(task.teacher.backbone, task.student.student, arguments)
    batch = global_batch_size(train)
    num_images = images_of_run(data, rows, steps_in_epoch * batch, train.num_epochs)
    return [*lines, *passes_advice(num_images, task.schedule.total_steps * batch)]


def describe_changes(state: dict[str, Any], train: TrainConfig, task: Task) -> list[str]:
    """Notes for the user where a run goes on with another num_epochs or precision than its checkpoint `state` has."""
    notes = []
    if state["config"]["train"]["num_epochs"] != train.num_epochs:
        before, now = state["learning_rate"], task.schedule.at(state["progress"]["step"])
        notes.append(f"num_epochs changed: a new schedule; the learning rate goes from {before:.3g} to {now:.3g}")
    if (before := state.get("precision", task.precision)) != task.precision:
        notes.append(f"the run was computed in {before} so far, and goes on in {task.precision} on this device")
    return notes


@contextlib.contextmanager
def advice_on_errors(
    configs: Configs, device: torch.device, position: Position, first_step: int, checkpoints: CheckpointWriter
) -> Iterator[None]:
    """Inside, errors say what to do about them; at the end the checkpoints are closed.

    first_step: the step at which this process begins. A UserError after it ends the run with status 1: status 2 means
    that nothing is written.
    """
    try:
        yield
    except FloatingPointError as error:
        checkpoints.close()  # an error of what is being written must not hide this one
        last = f". Last good checkpoint: {checkpoints.last or 'none yet'}" if distributed.is_main() else ""
        raise RunError(f"{error}{last}") from error
    except UserError as error:
        if position.step <= first_step:
            raise
        raise RunError(str(error)) from error
    except Exception as error:
        if "Expected more than 1 value per channel" in str(error):
            batch = configs.train.batch_size
            raise RunError(
                f"batch_size {batch}: the student's batch norm needs two images or more. Raise batch_size"
            ) from error
        if not is_out_of_memory(error):
            raise
        raise RunError(memory_advice(configs.train, configs.data.image_size, device, position.step)) from error
    finally:
        checkpoints.close()


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


def describe_batch(train: TrainConfig) -> str:
    """The images of a step and what makes their number, in words."""
    factors = f"{train.batch_size} x {distributed.world_size()} processes x {train.grad_accumulation_steps}"
    return f"{global_batch_size(train)} images (batch_size x processes x grad_accumulation_steps = {factors})"


def describe_schedule(configs: Configs, schedule: Schedule, steps_in_epoch: int, num_images: int) -> list[str]:
    """What the run will do, in lines for the console: steps, images seen, warm-up, learning rate."""
    train = configs.train
    seen = steps_in_epoch * global_batch_size(train)
    rule = "" if train.learning_rate else f" (learning_rate: null, {train.optimizer}: {rate_rule(train.optimizer)})"
    lines = [
        f"schedule: {train.num_epochs} epochs x {steps_in_epoch} steps = {schedule.total_steps} steps of "
        f"{global_batch_size(train)} images (batch_size {train.batch_size} x {distributed.world_size()} processes x "
        f"accumulation {train.grad_accumulation_steps})",
        f"  an epoch sees {seen} of {num_images} images ({100 * seen / num_images:.3g} %), the run "
        f"{seen * train.num_epochs} ({seen * train.num_epochs / num_images:.3g} times the data)",
        f"  learning rate {schedule.learning_rate:.3g}{rule}, warm-up {schedule.warmup_steps} steps, cosine to "
        f"{schedule.min_lr:.3g}; weight decay {train.weight_decay:g}",
    ]
    if train.warmup_epochs is not None and train.warmup_epochs > train.num_epochs:
        lines.append(
            f"  warmup_epochs {train.warmup_epochs:g} is longer than the run: clipped to {schedule.warmup_steps} steps"
        )
    return lines
