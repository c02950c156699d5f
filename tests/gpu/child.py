"""Run cases on fake CUDA tensors, a line of JSON for each: python -m tests.gpu.child [NAME ...] (test_fake_cuda.py)."""

if __name__ == "__main__":
    from tests.gpu.preload import restart_with_library

    restart_with_library()

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from distillery.training.checkpoints import restore, state_of
from distillery.training.engine import check_first_step, train_step
from distillery.training.task import Position
from tests.gpu import planted
from tests.gpu.cases import CASES, settings_of
from tests.gpu.fake_cuda import FAKE, Watch, place_of_error, pretended_cuda
from tests.gpu.interface import batches_of, first_images, make_task, steps_of, teacher_pass
from tests.gpu.launches import table, watch_step


def run_case(name: str) -> list[str]:
    """All that is wrong with a case."""
    watch, found = Watch(), []
    with pretended_cuda(watch), _reported(found, "building it"):
        made = make_task(*settings_of(CASES[name]))
        task = made.task
        batches = {step: batches_of(made, step) for step in steps_of(task)}
        images = first_images(made)
        with FAKE, watch:
            with _watched(watch, found, "first-step check", may_wait=True):
                check_first_step(task, images)
            for step in batches:
                with _watched(watch, found, "first step", may_wait=True):
                    train_step(task, batches[step], step, 0)
            with _watched(watch, found, "checkpoint", may_wait=True):
                _checkpoint(task)
            for step in batches:
                with _watched(watch, found, "step"):
                    found += _wrong_losses(task, train_step(task, batches[step], step, 0))
            if made.outputs is not None:
                for what, may_wait in (("teacher's first pass", True), ("teacher's pass", False)):
                    with _watched(watch, found, what, may_wait=may_wait):
                        _check_outputs(teacher_pass(made), made.outputs.spec.view_fields)
    return list(dict.fromkeys(found))


def _checkpoint(task) -> None:
    """Save and resume: a checkpoint comes back on the CPU."""
    state = tree_map_only(Tensor, lambda value: value.to("cpu"), state_of(task, Position(step=1)))
    position = Position()
    restore(task, position, state, global_batch=1)
    assert position.step == 1


def _wrong_losses(task, losses: dict[str, Tensor]) -> list[str]:
    wrong = [name for name, value in losses.items() if (value.device, value.dtype) != (task.device, torch.float32)]
    wrong += [name for name, value in task.student.named_parameters() if value.dtype != torch.float32]
    return [f"step: {name} is not float32 on {task.device}" for name in wrong]


def _check_outputs(stored: dict[str, Tensor], fields: dict) -> None:
    """What the pass stores has the form that its specification says."""
    for name, (dtype, shape) in fields.items():
        assert (stored[name].dtype, stored[name].shape[1:]) == (getattr(torch, dtype), shape), name


@contextlib.contextmanager
def _watched(watch: Watch, found: list[str], what: str, *, may_wait: bool = False) -> Iterator[None]:
    """Report under the name `what` all that goes wrong inside; an error of one part hides no other's."""
    watch.forget()
    with _reported(found, what):
        yield
    found += [f"{what}: {problem}" for problem in ([] if may_wait else watch.waits) + watch.mixes]


@contextlib.contextmanager
def _reported(found: list[str], what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        found.append(f"{what}: {place_of_error(error)}: {type(error).__name__}: {text}")


def run_planted(name: str) -> list[str]:
    """What is seen of a fault that was planted."""
    watch, found = Watch(), []
    with pretended_cuda(watch), FAKE, watch, _watched(watch, found, "step"):
        planted.PLANTED[name][0]()
    return found


def run_launches(_: str) -> SimpleNamespace:
    """The kernels of the step as shipped."""
    watch = watch_step()
    return SimpleNamespace(
        total=watch.launches.total(), table=table(watch.launches), problems=watch.waits + watch.mixes
    )


def main(names: list[str]) -> None:
    """Print a line for each name; without names, for all."""
    torch.set_num_threads(1)
    work: dict[str, Callable] = {name: run_case for name in CASES} | {name: run_planted for name in planted.PLANTED}
    work["launches"] = run_launches
    for name in names or work:
        began, result = time.perf_counter(), work[name](name)
        if isinstance(result, SimpleNamespace):
            result = vars(result)
        print(
            json.dumps({"name": name, "seconds": round(time.perf_counter() - began, 2), "result": result}), flush=True
        )


if __name__ == "__main__":
    main(sys.argv[1:])
