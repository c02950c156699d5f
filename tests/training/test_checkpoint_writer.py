import threading
from collections import OrderedDict

import pytest
import torch
from torch import nn

from distillery.system.errors import RunError
from distillery.training import checkpoints
from distillery.training.checkpoints import (
    CheckpointWriter,
    checkpoint_path,
    copy_to_host,
    is_complete,
    save_checkpoint,
)


def state_at(step: int) -> dict:
    return {"student": {"weight": torch.full((64,), float(step))}, "progress": {"step": step}}


def test_a_copy_keeps_types_versions_and_memory_formats_and_shares_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).to(memory_format=torch.channels_last)
    state = {"model": model.state_dict(), "group": [{"betas": (0.9, 0.999), "params": [0, 1]}], "ema": None}
    copied = copy_to_host(state)
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
