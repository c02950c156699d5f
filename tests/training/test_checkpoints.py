import errno
import os

import pytest
import torch

from distillery.system.errors import MissingFileError, RunError, UserError
from distillery.training import checkpoints
from distillery.training.checkpoints import (
    checkpoint_dir,
    is_complete,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)


def state_at(step: int) -> dict:
    return {
        "student": {"weight": torch.full((3,), float(step))},
        "heads": {},
        "optimizer": {"state": {}},
        "ema": None,
        "rng": {"torch": torch.get_rng_state()},
        "progress": {"step": step, "epoch": 0, "samples": 0},
        "config": {"data": {}},
    }


def names(run_dir) -> list[str]:
    return sorted(path.name for path in checkpoint_dir(run_dir).iterdir())


def test_a_saved_state_comes_back(tmp_path):
    path = save_checkpoint(tmp_path, state_at(500), 500, keep=3)
    assert path.name == "step_00000500.pt"
    assert torch.equal(load_checkpoint(path)["student"]["weight"], torch.full((3,), 500.0))
    assert torch.load(path, weights_only=True)["progress"]["step"] == 500


def test_only_the_newest_and_the_protected_stay(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save_checkpoint(tmp_path, state_at(step), step, keep=2, protect=(2,))
    kept = [f"step_{step:08d}" for step in (2, 4, 5)]
    assert names(tmp_path) == sorted([f"{name}.pt" for name in kept] + [f"{name}.json" for name in kept])


def test_the_same_state_gives_the_same_bytes_whatever_the_folder(tmp_path):
    first = save_checkpoint(tmp_path / "a", state_at(7), 7, keep=1)
    second = save_checkpoint(tmp_path / "somewhere" / "else", state_at(7), 7, keep=1)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "flip", "no_record", "torn_record", "empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, damage):
    good = save_checkpoint(tmp_path, state_at(1), 1, keep=3)
    bad = save_checkpoint(tmp_path, state_at(2), 2, keep=3)
    data = bytearray(bad.read_bytes())
    if damage == "truncate":
        bad.write_bytes(data[:-100])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        bad.write_bytes(data)
    elif damage == "empty":
        bad.write_bytes(b"")
    elif damage == "no_record":
        bad.with_suffix(".json").unlink()
    else:
        bad.with_suffix(".json").write_text('{"step": 2, "by')
    assert not is_complete(bad)
    assert latest_checkpoint(tmp_path) == good
    assert str(bad) in capsys.readouterr().err


def test_no_checkpoint_yet_is_none(tmp_path):
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch, call, number):
    good = save_checkpoint(tmp_path, state_at(1), 1, keep=1)

    def fail(*_args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints.os, call, fail)
    with pytest.raises(RunError, match="the checkpoints before it are intact"):
        save_checkpoint(tmp_path, state_at(2), 2, keep=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == good
    assert names(tmp_path) == ["step_00000001.json", "step_00000001.pt"]


def test_killed_at_any_call_of_a_save_there_is_always_a_good_checkpoint(tmp_path):
    """The process ends at the n-th fsync, replace or link of the second save, for every n."""
    killed = 0
    for n in range(1, 50):
        run_dir = tmp_path / str(n)
        save_checkpoint(run_dir, state_at(1), 1, keep=1)
        pid = os.fork()
        if pid == 0:
            _die_at_call(n)
            save_checkpoint(run_dir, state_at(2), 2, keep=1)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        newest = latest_checkpoint(run_dir)
        assert newest is not None
        load_checkpoint(newest)
        if status == 0:
            break
        killed += 1
        save_checkpoint(run_dir, state_at(2), 2, keep=1)
        assert names(run_dir) == ["step_00000002.json", "step_00000002.pt"]
    assert status == 0
    assert killed >= 6


def _die_at_call(n: int) -> None:
    count = 0

    def wrap(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == n:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "unlink", "open", "write"):
        setattr(os, name, wrap(getattr(os, name)))


def test_a_missing_checkpoint_is_an_error_with_its_name(tmp_path):
    with pytest.raises(MissingFileError, match="Checkpoint not found: .*gone.pt"):
        load_checkpoint(tmp_path / "gone.pt")


def test_something_else_is_refused(tmp_path):
    torch.save({"model": 1}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="lacks config, heads, optimizer, progress, student"):
        load_checkpoint(tmp_path / "other.pt")


def test_code_in_a_checkpoint_never_runs(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        load_checkpoint(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
