import threading
import time
from collections import OrderedDict

import pytest
import torch
from torch import nn

from distillery.system.errors import RunError
from distillery.training import checkpoints
from distillery.training.checkpoints import (
    CheckpointWriter,
    HostCopies,
    Proof,
    checkpoint_path,
    is_complete,
    load_checkpoint,
    save_checkpoint,
)


def state_at(step: int) -> dict:
    return {"student": {"weight": torch.full((64,), float(step))}, "progress": {"step": step}}


def test_a_copy_keeps_types_versions_and_memory_formats_and_shares_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    state = {"model": model.state_dict(), "group": [{"betas": (0.9, 0.999), "params": [0, 1]}], "ema": None}
    copied, is_copied = HostCopies().take(state)
    is_copied()
    assert type(copied["model"]) is OrderedDict
    assert copied["model"]._metadata == state["model"]._metadata
    assert copied["group"] == state["group"] and copied["ema"] is None
    assert copied["model"]["0.weight"].stride() == state["model"]["0.weight"].stride()
    before = {name: value.clone() for name, value in state["model"].items()}
    with torch.no_grad():
        for value in state["model"].values():
            value.zero_()
    assert all(torch.equal(copied["model"][name], value) for name, value in before.items())


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    go_on = threading.Event()

    def slow(*arguments, **options):
        go_on.wait(20)
        return save_checkpoint(*arguments, **options)

    monkeypatch.setattr(checkpoints, "save_checkpoint", slow)
    writer = CheckpointWriter(tmp_path, None, in_background=True)
    state = state_at(3)
    writer.save(state, 3, keep=2)
    state["student"]["weight"].fill_(9)  # the next step
    state["progress"]["step"] = 4
    go_on.set()
    assert writer.wait() == checkpoint_path(tmp_path, 3)
    found = torch.load(checkpoint_path(tmp_path, 3), weights_only=True)
    assert found["progress"] == {"step": 3}
    assert torch.equal(found["student"]["weight"], torch.full((64,), 3.0))
    writer.close()


def test_one_checkpoint_is_on_the_disk_before_the_next_is_begun(tmp_path):
    writer = CheckpointWriter(tmp_path, None, in_background=True)
    for step in range(1, 6):
        writer.save(state_at(step), step, keep=2)
        assert step == 1 or is_complete(checkpoint_path(tmp_path, step - 1))
    writer.close()
    assert [step for step in range(1, 6) if is_complete(checkpoint_path(tmp_path, step))] == [4, 5]


def test_a_failed_write_is_told_at_the_next_checkpoint_and_not_twice(tmp_path, monkeypatch, capsys):
    good = CheckpointWriter(tmp_path, None, in_background=True)
    good.save(state_at(1), 1, keep=2)
    good.close()

    def fail(*_, **__):
        raise RunError("the disk is full")

    monkeypatch.setattr(checkpoints, "save_checkpoint", fail)
    writer = CheckpointWriter(tmp_path, checkpoint_path(tmp_path, 1), in_background=True)
    writer.save(state_at(2), 2, keep=2)
    with pytest.raises(RunError, match="the disk is full"):
        writer.save(state_at(3), 3, keep=2)
    assert writer.wait() == writer.last == checkpoint_path(tmp_path, 1)
    writer.save(state_at(4), 4, keep=2)
    writer.close()
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_without_a_background_a_checkpoint_is_on_the_disk_at_once(tmp_path):
    writer = CheckpointWriter(tmp_path, None, in_background=False)
    writer.save(state_at(1), 1, keep=2)
    assert writer.last == checkpoint_path(tmp_path, 1) and is_complete(writer.last)


def test_copies_are_made_in_the_memory_of_the_copies_before_them():
    copies, state = (
        HostCopies(),
        state_at(1) | {"queue": {"rows": torch.ones(3, 2)}, "ema": None, "empty": torch.ones(0)},
    )
    first, _ = copies.take(state)
    places = [first["student"]["weight"].data_ptr(), first["queue"]["rows"].data_ptr()]
    state["student"]["weight"] += 1
    second, _ = copies.take(state)
    assert [second["student"]["weight"].data_ptr(), second["queue"]["rows"].data_ptr()] == places
    assert torch.equal(second["student"]["weight"], torch.full((64,), 2.0))


def test_a_state_that_has_become_another_is_copied_into_memory_that_fits():
    copies = HostCopies()
    copies.take({"a": torch.ones(3), "b": torch.ones(4)})
    state = {"a": torch.ones(3, dtype=torch.float64), "b": torch.full((2, 2), 5.0), "c": torch.arange(3)}
    for _ in range(2):
        found, _ = copies.take(state)
        assert all(
            torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in state.items()
        )


class OnGpu(torch.Tensor):
    """An ordinary tensor that says it is on a GPU."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


def on_gpu(value: torch.Tensor) -> torch.Tensor:
    return torch.Tensor._make_subclass(OnGpu, value)


class Stream:
    """What a GPU does with copies and events: later, in their order, up to where someone has waited for it."""

    def __init__(self, monkeypatch) -> None:
        self.log, self.work, self.reached = [], [], threading.Event()
        copy, stream = torch.Tensor.copy_, self

        def enqueue(memory, value, non_blocking=False):
            assert non_blocking
            now = value.clone()  # later changes are later work of the stream
            stream.log.append("copy")
            stream.work.append(lambda: copy(memory, now))
            return memory

        class Event:
            def __init__(self, *, blocking: bool) -> None:
                self.sleeps = blocking

            def record(self) -> None:
                stream.log.append("event")

            def synchronize(self) -> None:
                assert self.sleeps and threading.current_thread() is not threading.main_thread()
                stream.reached.wait(20)
                while stream.work:
                    stream.work.pop(0)()
                stream.log.append("waited")

        def save(*arguments, **options):
            stream.log.append("write")
            return save_checkpoint(*arguments, **options)

        def memory_for(like: torch.Tensor) -> torch.Tensor:
            stream.log.append("pinned" if like.is_cuda else "pageable")
            return torch.full(like.shape, 77, dtype=like.dtype)

        monkeypatch.setattr(torch.Tensor, "copy_", enqueue)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(checkpoints, "save_checkpoint", save)
        monkeypatch.setattr(checkpoints, "_host_memory", memory_for)


def gpu_state(step: int) -> dict:
    """As a checkpoint is, with two numbers that the device has."""
    numbers = {
        "scaler": {"scale": on_gpu(torch.tensor(2.0)), "growth_factor": 2.0},
        "num_bad_steps": on_gpu(torch.tensor(0)),
    }
    state = {"student": {"weight": on_gpu(torch.full((64,), float(step)))}, "progress": {"step": step}}
    return state | {"heads": {}, "optimizer": {}, "config": {}} | numbers


def proof(*, finite: bool = True, lost: bool = False) -> Proof:
    return Proof(["a", "b"], on_gpu(torch.tensor([True, finite])), on_gpu(torch.tensor(lost)))


def test_from_a_gpu_all_copies_are_begun_then_one_event_and_the_thread_waits_for_it_before_it_writes(
    tmp_path, monkeypatch
):
    stream = Stream(monkeypatch)
    writer = CheckpointWriter(tmp_path, None, in_background=True)
    state = gpu_state(3)
    writer.save(state, 3, keep=2, proof=proof())
    assert stream.log == 5 * ["pinned", "copy"] + ["event"]  # the weight, two numbers, two of the proof
    state["student"]["weight"].fill_(9)  # the next step
    stream.reached.set()
    assert writer.wait() == checkpoint_path(tmp_path, 3)
    assert stream.log[-2:] == ["waited", "write"]
    writer.save(gpu_state(4), 4, keep=2, proof=proof())
    writer.wait()
    assert stream.log.count("pinned") == 5 and stream.log.count("event") == 2  # memory is made once
    monkeypatch.undo()
    for step in (3, 4):
        found = load_checkpoint(checkpoint_path(tmp_path, step))
        assert torch.equal(found["student"]["weight"], torch.full((64,), float(step)))
        assert type(found["student"]["weight"]) is torch.Tensor
        assert found["scaler"] == {"scale": 2.0, "growth_factor": 2.0}
        assert type(found["num_bad_steps"]) is int


def test_memory_is_not_used_again_before_what_it_holds_is_on_the_disk(tmp_path, monkeypatch):
    stream = Stream(monkeypatch)
    writer = CheckpointWriter(tmp_path, None, in_background=True)
    writer.save(gpu_state(3), 3, keep=2)
    second = threading.Thread(target=lambda: writer.save(gpu_state(4), 4, keep=2))
    second.start()
    second.join(0.2)
    assert second.is_alive() and stream.log.count("event") == 1
    stream.reached.set()
    second.join(20)
    writer.close()
    monkeypatch.undo()
    assert load_checkpoint(checkpoint_path(tmp_path, 3))["student"]["weight"][0] == 3
    assert stream.log.index("write") < len(stream.log) - 1 - stream.log[::-1].index("event")


@pytest.mark.parametrize("in_background", [True, False])
def test_a_weight_that_is_not_finite_is_never_written_and_told_once(tmp_path, monkeypatch, in_background):
    if in_background:
        Stream(monkeypatch).reached.set()
    writer = CheckpointWriter(tmp_path, checkpoint_path(tmp_path, 1), in_background=in_background)
    with pytest.raises(FloatingPointError, match="1 tensors of the student are not finite, the first is b; not saved"):
        writer.save(gpu_state(3), 3, keep=2, proof=proof(finite=False))
        for _ in range(400):  # as after every logged step
            writer.raise_if_failed()
            time.sleep(0.01)
    writer.raise_if_failed()
    assert writer.wait() == checkpoint_path(tmp_path, 1)
    assert not (tmp_path / "checkpoints").exists()


def test_a_lost_run_writes_nothing_and_leaves_the_error_to_its_next_look_at_the_numbers(tmp_path):
    writer = CheckpointWriter(tmp_path, checkpoint_path(tmp_path, 1), in_background=False)
    writer.save(state_at(3), 3, keep=2, proof=proof(lost=True))
    assert writer.wait() == checkpoint_path(tmp_path, 1)
    assert not (tmp_path / "checkpoints").exists()


def test_minutes_count_from_the_start_and_from_every_checkpoint(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now[0])
    writer = CheckpointWriter(tmp_path, checkpoint_path(tmp_path, 1), in_background=False)
    now[0] += 90
    assert writer.minutes_since_last() == 1.5
    writer.save(state_at(3), 3, keep=2)
    assert writer.minutes_since_last() == 0
    now[0] += 30
    assert writer.minutes_since_last() == 0.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu_a_checkpoint_is_begun_without_a_wait_and_holds_what_was_there(tmp_path):
    writer = CheckpointWriter(tmp_path, None, in_background=True)
    weight = torch.zeros(1 << 20, device="cuda")
    for step in (1, 2, 3):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")  # the first makes the memory
        try:
            torch.cuda._sleep(10_000_000)
            weight += 1
            writer.save({"student": {"weight": weight}, "num_bad_steps": weight[0]}, step, keep=3)
            weight += 100
            weight -= 100
        finally:
            torch.cuda.set_sync_debug_mode("default")
    writer.close()
    for step in (1, 2, 3):
        found = torch.load(checkpoint_path(tmp_path, step), weights_only=True)
        assert found["num_bad_steps"] == step and torch.equal(
            found["student"]["weight"], torch.full((1 << 20,), step).float()
        )
