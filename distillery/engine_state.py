"""A run's state as a checkpoint holds it: everything that a step changes, taken and put back."""

from typing import Any

import torch

from distillery.engine import Progress, Task


def state_of(task: Task, progress: Progress) -> dict[str, Any]:
    """Weights, optimiser, averages, random state and position, as plain values and tensors."""
    return {
        "student": task.student.student.model.state_dict(),
        "heads": task.student.heads.state_dict(),
        "optimizer": task.optimizer.state_dict(),
        "ema": task.ema.state if task.ema else None,
        # what the next step draws is seeded by its number; this is here for those who look
        "rng": {"torch": torch.get_rng_state()},
        "progress": {"step": progress.step, "epoch": progress.epoch, "samples": progress.samples},
        "scaler": task.scaler.state_dict(),
        "target_statistics": task.teacher_module.statistics_state(),
        "queue": task.queue.state() if task.queue else None,
        "num_bad_steps": task.bad_steps.count.item(),
        "learning_rate": task.schedule.at(max(0, progress.step - 1)),
    }


def restore(task: Task, progress: Progress, state: dict[str, Any], global_batch: int) -> None:
    """Put a task and its progress where `state` was taken; global_batch: images per optimiser step."""
    task.student.student.model.load_state_dict(state["student"])
    task.student.heads.load_state_dict(state["heads"])
    # how a step is computed is not part of a run: a saved choice would outlive a move from CPU to CUDA
    own = task.optimizer.state_dict()["param_groups"]
    for saved, present in zip(state["optimizer"]["param_groups"], own, strict=True):
        saved.update({key: present[key] for key in ("fused", "foreach", "capturable")})
    task.optimizer.load_state_dict(state["optimizer"])
    task.scaler.load_state_dict(state["scaler"])
    task.bad_steps.count.fill_(state["num_bad_steps"])
    if state["target_statistics"]:
        task.teacher_module.load_statistics(state["target_statistics"])
    if task.queue is not None and state.get("queue") is not None:
        task.queue.load_state(state["queue"])
    if task.ema is not None and state["ema"] is not None:
        task.ema.state = {name: value.to(task.device) for name, value in state["ema"].items()}
    place = state["progress"]
    progress.step, progress.epoch, progress.samples = place["step"], place["epoch"], place["samples"]
    progress.epoch_start = progress.step - progress.samples // global_batch
