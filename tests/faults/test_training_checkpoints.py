"""Checkpoints while the process is killed, the disk fills and files are damaged: there is always a good one."""

import os
import resource
import signal
import subprocess
import time

import pytest
import torch
from processes import fork, wait
from scale import scaled
from training import STUDENTS, assert_same_run, of_folder, start, straight_run
from workplace import at_call, send

from distillery.training import checkpoints, engine
from distillery.training.checkpoints import checkpoint_dir, latest_checkpoint, load_checkpoint, save_checkpoint

SETTINGS = STUDENTS["vit"]


def content(step: int) -> dict:
    weight = torch.full((20_000,), float(step))
    return {"student": {"weight": weight}, "heads": {}, "optimizer": {}, "progress": {"step": step}, "config": {}}


def save_without_end(run_dir, first_step: int) -> None:
    for step in range(first_step, 10**9):
        save_checkpoint(run_dir, content(step), step, keep=1)


def test_killed_in_the_middle_of_saving_there_is_always_a_good_checkpoint(folder, rng, tally):
    save_checkpoint(folder, content(1), 1, keep=1)
    step = 1
    for _ in range(scaled(100)):
        child = fork(lambda first=step + 1: save_without_end(folder, first))
        time.sleep(rng.uniform(0.004, 0.02))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        state = load_checkpoint(latest_checkpoint(folder))
        assert state["progress"]["step"] >= step  # never back in time
        step = state["progress"]["step"]
        assert torch.equal(state["student"]["weight"], content(step)["student"]["weight"])
        tally["kills in the middle of saving a checkpoint"] += 1
    assert step > 20, "the kills came before anything was saved"
    save_checkpoint(folder, content(step + 1), step + 1, keep=1)
    names = sorted(path.name for path in checkpoint_dir(folder).iterdir())
    assert names == [f"step_{step + 1:08d}.json", f"step_{step + 1:08d}.pt"]  # nothing is left lying about


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "no record"])
def test_a_damaged_newest_checkpoint_costs_a_few_steps_and_is_named(place, folder, rng, tally, damage):
    run_dir = folder / "run"
    first = start(place, run_dir, SETTINGS, before=lambda: at_call(engine, "train_step", 8, send(signal.SIGTERM)))
    assert first.wait() == 75, first.text
    newest = checkpoint_dir(run_dir) / "step_00000008.pt"
    data = bytearray(newest.read_bytes())
    if damage == "no record":
        newest.with_suffix(".json").unlink()
    elif damage == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        newest.write_bytes(data)
    else:
        newest.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 0, again.text
    assert f"going back to {checkpoint_dir(run_dir) / 'step_00000006.pt'}" in again.text
    assert str(newest) in again.text
    assert_same_run(straight_run(place, "vit"), run_dir)
    tally["damaged newest checkpoints passed over"] += 1


def test_when_every_checkpoint_is_damaged_the_run_does_not_begin_anew_without_a_word(place, folder):
    run_dir = folder / "run"
    first = start(place, run_dir, SETTINGS, before=lambda: at_call(engine, "train_step", 3, send(signal.SIGTERM)))
    assert first.wait() == 75, first.text
    for path in checkpoint_dir(run_dir).glob("*.pt"):
        path.write_bytes(path.read_bytes()[:-1])
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 2
    assert "none of the 2 checkpoints is complete and undamaged" in again.text


def test_checkpoints_copied_without_their_records_are_taken(place, folder):
    run_dir = folder / "run"
    first = start(place, run_dir, SETTINGS, before=lambda: at_call(engine, "train_step", 8, send(signal.SIGTERM)))
    assert first.wait() == 75, first.text
    for path in checkpoint_dir(run_dir).glob("*.json"):
        path.unlink()
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 0, again.text
    assert "step_00000008.pt has no record, but can be read: taking it" in again.text
    assert_same_run(straight_run(place, "vit"), run_dir)


def test_a_file_size_limit_in_a_save_is_one_message_and_the_same_command_goes_on(place, folder, tally):
    run_dir = folder / "run"

    def hit() -> None:
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # noqa: E731
        at_call(checkpoints, "_write", 3, limit)

    first = start(place, run_dir, SETTINGS, before=hit)
    assert first.wait() == 1
    assert "could not be written (File too large); the checkpoints before it are intact" in first.text
    assert "Traceback" not in first.text
    assert latest_checkpoint(run_dir) == checkpoint_dir(run_dir) / "step_00000004.pt"
    assert not list(checkpoint_dir(run_dir).glob(".*"))
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 0, again.text
    assert_same_run(straight_run(place, "vit"), run_dir)
    tally["checkpoints that a full disk cut off"] += 1


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 9 MB: two checkpoints fit and a third does not."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_keeps_the_old_checkpoint_and_the_same_command_goes_on_when_there_is_room(place, small_disk, tally):
    run_dir = small_disk / "run"
    first = start(place, run_dir, SETTINGS)
    assert first.wait() == 1
    assert "No space left on device" in first.text
    assert "Traceback" not in first.text
    kept = latest_checkpoint(run_dir)
    assert kept is not None
    load_checkpoint(kept)
    subprocess.run(["mount", "-o", "remount,size=60m", small_disk], check=True)
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 0, again.text
    assert_same_run(straight_run(place, "vit"), run_dir)
    tally["checkpoints that a full disk cut off"] += 1


def test_the_best_by_knn_and_the_newest_stay(place, folder):
    run_dir = folder / "run"
    run = start(place, run_dir, SETTINGS | {"num_epochs": 5, "keep_checkpoints": 1, "save_every": 0})
    assert run.wait() == 0, run.text
    scores = {row["step"]: row["knn_top1"] for row in of_folder(run_dir).rows("eval") if row["model"] == "student"}
    # the last evaluation comes after the last save: it is among the newest
    before_last = {step: score for step, score in scores.items() if step < 25}
    best = max(before_last, key=before_last.get)
    steps = {int(path.stem.removeprefix("step_")) for path in checkpoint_dir(run_dir).glob("*.pt")}
    assert steps == {best, 25}
