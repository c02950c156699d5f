"""What a checkpoint holds of a task, and what of it a task of another precision takes."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from distillery.system.errors import UserError
from distillery.training.checkpoints import read_numbers, restore, state_of, state_on_device
from distillery.training.engine import train_step
from distillery.training.task import Position
from distillery.training.watch import finite_weights
from tests.training.test_engine import batches, build_task

NEVER = 2**31 - 1


def test_a_checkpoint_whose_optimiser_grouped_the_weights_otherwise_is_refused():
    state = state_of(trained("fp32"), Position())
    first, *rest = state["optimizer"]["param_groups"]
    state["optimizer"]["param_groups"] = [first | {"params": first["params"][1:]}, *rest]
    with pytest.raises(UserError, match="of an earlier version, whose optimiser grouped the weights in another way"):
        resumed(state, "fp32")


def test_moments_of_another_layout_are_laid_out_as_their_weights():
    state = state_of(trained("fp32"), Position())
    moments = state["optimizer"]["state"]
    number, name = next((n, k) for n, of in moments.items() for k, v in of.items() if v.ndim == 4 and v.shape[1] > 1)
    expected = moments[number][name].clone()
    moments[number][name] = expected.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    task = resumed(state, "fp32")
    weights = [value for group in task.optimizer.param_groups for value in group["params"]]
    found = task.optimizer.state[weights[number]][name]
    assert torch.equal(found, expected) and found.stride() == weights[number].stride()


def trained(precision: str):
    task = build_task(precision=precision)
    train_step(task, batches(1), 0, 0)
    return task


def resumed(state: dict, precision: str):
    task = build_task(precision=precision)
    restore(task, Position(), state, 8)
    return task


def test_numbers_of_the_device_are_tensors_until_they_are_read_and_plain_numbers_in_a_checkpoint():
    task = trained("fp16")
    state = state_on_device(task, Position())
    numbers = [state["num_bad_steps"], state["scaler"]["scale"], state["scaler"]["_growth_tracker"]]
    assert all(isinstance(value, Tensor) for value in numbers)
    plain = read_numbers(state)
    assert plain["scaler"] == task.scaler.state_dict()
    assert [type(value) for value in plain["scaler"].values()] == [float, float, float, int, int]
    assert plain["num_bad_steps"] == 0 and type(plain["num_bad_steps"]) is int
    assert list(plain) == list(state_of(task, Position()))


# of a checkpoint from before, in which every precision had a scaler
OLD_SCALER = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": NEVER, "_growth_tracker": 9}


@pytest.mark.parametrize("before", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("now", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_scale_is_taken_up_at_the_precision_it_belongs_to_alone(before, now, is_old):
    state = state_of(trained(before), Position())
    assert state["precision"] == before
    if before == "fp16":  # unlike what a task begins with
        state["scaler"] |= {"scale": 512.0, "_growth_tracker": 7}
    elif is_old:
        state["scaler"] = dict(OLD_SCALER)
    if is_old:
        del state["precision"]
    scaler = resumed(state, now).scaler
    assert scaler.is_enabled() == (now == "fp16")
    if now != "fp16":
        assert scaler.get_scale() == 1
    elif before == "fp16":
        assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (512.0, 7)
    else:
        assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (65536.0, 0)


def test_fp16_resumed_from_bf16_has_gradients_that_do_not_vanish_and_a_scale_that_grows():
    task = resumed(state_of(trained("bf16"), Position()), "fp16")
    task.scaler._growth_interval = 2
    for step in range(2):
        train_step(task, batches(1), step, 0)
    assert task.scaler.get_scale() == 2 * 65536.0


class Waits(TorchDispatchMode):
    """Notes every operator that gives the host a number of a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [value for value in args if isinstance(value, Tensor)]
        is_number = isinstance(out, bool | int | float) or isinstance(out, Tensor) and not out.is_cuda
        if is_number and any(value.is_cuda for value in tensors):
            self.found.append(str(func))
        return out


def on_fake_cuda(task):
    """The task with all that a step touches as fake CUDA tensors, inside FakeTensorMode."""
    cuda = torch.device("cuda", 0)
    for module in (*task.student.modules(), *task.teacher.modules()):
        for tensors in (module._parameters, module._buffers):
            for name, value in tensors.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype, device=cuda)
                    tensors[name] = nn.Parameter(fake) if isinstance(value, nn.Parameter) else fake
    task.optimizer = torch.optim.AdamW(task.student.parameters(), lr=0.0)
    for value in task.student.parameters():
        task.optimizer.state[value] = {"exp_avg": torch.zeros_like(value), "step": torch.zeros((), device=cuda)}
    task.scaler._scale, task.scaler._growth_tracker = torch.ones((), device=cuda), torch.zeros((), device=cuda)
    task.bad_steps.count = torch.zeros((), dtype=torch.int64, device=cuda)


def test_taking_the_state_of_a_task_on_a_gpu_never_makes_the_host_wait():
    task = build_task(precision="fp16")
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_fake_cuda(task)
        with Waits() as waits:
            state = state_on_device(task, Position(step=3))
            names, is_finite = finite_weights(task.student)
    assert waits.found == []
    assert is_finite.shape == (len(names),) and is_finite.is_cuda
    found = [*state["student"].values(), *state["heads"].values(), state["num_bad_steps"], state["scaler"]["scale"]]
    assert {value.device.type for value in found} == {"cuda"}
