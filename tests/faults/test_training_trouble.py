"""Numbers that go wrong, memory that runs out, disks that do not answer: a message with figures, and nothing lost."""

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from processes import fork, wait
from training import STUDENTS, assert_same_run, flags_of, of_folder, start, straight_run
from workplace import ROOT, at_call

import data_loader
from distillery.losses import objective
from distillery.system import errors, signals
from distillery.training import engine
from distillery.training import run as run_module
from distillery.training.checkpoints import checkpoint_dir

SETTINGS = STUDENTS["vit"]


def nan_in_teacher_at(step: int):
    """The teacher's features of one step are NaN, every time it is tried."""

    def hit() -> None:
        align, train_step, now = objective.align, engine.train_step, {}

        def broken(student, teacher, *at_most):
            if now["step"] == step:
                teacher.pooled.fill_(float("nan"))
            return align(student, teacher, *at_most)

        def noting(task, batches, number, epoch):
            now["step"] = number
            return train_step(task, batches, number, epoch)

        engine.train_step = noting
        now["step"] = -1
        objective.align = broken

    return hit


def finite_student(state: dict) -> None:
    assert all(value.isfinite().all() for value in state["student"].values() if value.is_floating_point())


def test_nan_stops_with_step_rate_images_and_the_last_good_checkpoint_which_stays_good(place, folder):
    run_dir = folder / "run"
    first = start(place, run_dir, SETTINGS, before=nan_in_teacher_at(6))
    assert first.wait() == 1
    last = checkpoint_dir(run_dir) / "step_00000006.pt"
    assert "not finite at step 6 (epoch 1): loss=nan" in first.text
    assert "lr=" in first.text
    assert "images (global_idx): [" in first.text
    assert f"Last good checkpoint: {last}" in first.text
    assert "Traceback" not in first.text
    finite_student(torch.load(last, weights_only=True))
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 0, again.text
    assert_same_run(straight_run(place, "vit"), run_dir)


@pytest.mark.parametrize("student", STUDENTS)
def test_max_bad_steps_are_skipped_counted_and_never_reach_the_saved_weights(place, folder, student):
    run_dir, settings = folder / "run", STUDENTS[student] | {"max_bad_steps": 1}
    run = start(place, run_dir, settings, before=nan_in_teacher_at(3))
    assert run.wait() == 0, run.text
    for path in checkpoint_dir(run_dir).glob("*.pt"):
        state = torch.load(path, weights_only=True)
        finite_student(state)
        assert all(value.isfinite().all() for value in state["ema"].values() if value.is_floating_point())
    assert of_folder(run_dir).last_checkpoint()["num_bad_steps"] == 1
    assert [row["loss"] is None for row in of_folder(run_dir).rows("train")].count(True) == 1


@pytest.mark.parametrize(
    "allocate",
    [lambda: torch.empty(1 << 50), lambda: bytearray(1 << 50), lambda: _raise(torch.OutOfMemoryError("CUDA is full"))],
    ids=["torch on the CPU", "Python", "CUDA"],
)
def test_out_of_memory_gives_the_figures_and_a_command_and_keeps_the_checkpoints(place, folder, allocate):
    run_dir = folder / "run"
    first = start(place, run_dir, SETTINGS, before=lambda: at_call(engine, "forward_losses", 9, allocate))
    assert first.wait() == 1
    assert (
        "out of memory at step 4: batch_size 4, grad_accumulation_steps 2, image_size 32, precision fp32" in first.text
    )
    assert "--set batch_size=2 --set grad_accumulation_steps=4" in first.text
    assert "Traceback" not in first.text
    smaller = start(place, run_dir, SETTINGS | {"batch_size": 2, "grad_accumulation_steps": 4})
    assert smaller.wait() == 0, smaller.text
    assert [row["step"] for row in of_folder(run_dir).rows("train")] == list(range(1, 11))


def _raise(error: Exception) -> None:
    raise error


def test_a_disk_that_stops_answering_is_named_within_the_watchdogs_time(place, folder):
    def hit() -> None:
        data_loader.PretrainingLoader = functools.partial(data_loader.PretrainingLoader, stall_s=0.5)
        preadv, calls = os.preadv, {"number": 0}

        def stalling(fd, buffers, offset, *flags):
            calls["number"] += bool(os.readlink(f"/proc/self/fd/{fd}").startswith(str(place.folder / "cache/images")))
            if calls["number"] > 70:  # past the teacher's statistics
                time.sleep(60)
            return preadv(fd, buffers, offset, *flags)

        os.preadv = stalling

    began = time.monotonic()
    first = start(place, folder / "run", SETTINGS | {"eval_every_epochs": 0}, before=hit)
    assert first.wait() == 1, first.text
    assert time.monotonic() - began < 20
    assert "a read has not come back for" in first.text
    assert str(place.folder / "cache") in first.text
    again = start(place, folder / "run", SETTINGS | {"eval_every_epochs": 0})
    assert again.wait() == 0, again.text


def test_memory_and_open_files_stay_flat_over_thirty_epochs(place, folder):
    def hit() -> None:
        epoch, seen = run_module.train_epoch, []

        def measured(*args):
            epoch(*args)
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen.append((pages, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))))
            os.write(1, f"\nEPOCH {seen[-1]}\n".encode())

        run_module.train_epoch = measured

    run = start(place, folder / "run", SETTINGS | {"num_epochs": 30, "eval_every_epochs": 5}, before=hit)
    assert run.wait() == 0, run.text
    seen = [eval(line.removeprefix("EPOCH ")) for line in run.text.splitlines() if line.startswith("EPOCH")]
    pages, files, threads = zip(*seen, strict=True)
    assert len(seen) == 30
    assert max(pages[-5:]) < 1.02 * max(pages[10:15])
    assert len(set(files[5:])) == 1
    # a reading thread may still be about to end; a leak would be one or more an epoch
    assert max(threads[-5:]) <= max(threads[5:15]) + 2


@pytest.mark.skipif(os.geteuid() != 0, reason="a private /dev/shm takes root")
def test_a_tiny_dev_shm_is_enough(place, tmp_path):
    arguments = flags_of(place, tmp_path / "run", SETTINGS | {"num_epochs": 1})
    script = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    command = [sys.executable, str(ROOT / "distill_trainer.py"), *arguments]
    unshare = ["unshare", "--mount", "sh", "-c", script, "sh"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("mount namespaces are not allowed here")
    done = subprocess.run([*unshare, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_end_of_the_slurm_job_is_a_time_limit(place, folder):
    end = int(time.time()) + 12  # on a busy machine the start alone takes some seconds
    first = start(
        place, folder / "run", SETTINGS | {"num_epochs": 10_000}, environment={"SLURM_JOB_END_TIME": str(end)}
    )
    assert first.wait() == 75, first.text
    assert "the end of the Slurm job: saved at step" in first.text


def test_a_shard_that_vanishes_in_mid_run_is_no_wrong_configuration(place, folder):
    run_dir, cache = folder / "run", shutil.copytree(place.folder / "cache", folder / "cache")
    settings = SETTINGS | {"num_epochs": 10_000, "cache_dir": cache, "save_every": 1, "eval_every_epochs": 0}
    run = start(place, run_dir, settings)
    while run.poll() is None and not list(checkpoint_dir(run_dir).glob("*.json")):
        time.sleep(0.02)
    for shard in cache.glob("images_shard_*.pt"):
        shard.unlink()
    assert run.wait() == 1, run.text
    assert "images_shard_0000" in run.text and "Traceback" not in run.text


def test_max_minutes_saves_and_leaves(place, folder):
    run_dir = folder / "run"
    for minutes in ("0.02", "0.1", "0.5", "2"):  # on a busy machine the first is over before the first step
        first = start(place, run_dir, SETTINGS | {"num_epochs": 10_000}, "--max_minutes", minutes)
        assert first.wait() == 75, first.text
        if "the time limit: saved at step" in first.text:
            break
        assert "the time limit: nothing to save yet at step 0" in first.text
    assert list(checkpoint_dir(run_dir).glob("*.pt"))


@pytest.mark.parametrize("end, early_s", [(-5, None), (50, 5), (10_000, 120)])
def test_slurms_end_counts_when_it_lies_ahead_and_early_enough_to_save(monkeypatch, end, early_s):
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + end))
    left = signals.StopFlag()._deadline - time.monotonic()
    assert left == math.inf if early_s is None else left == pytest.approx(end - early_s, abs=1.5)


@pytest.mark.parametrize("end", ["", "soon", "Unknown"])
def test_an_end_that_slurm_does_not_know_is_none(monkeypatch, end):
    monkeypatch.setenv("SLURM_JOB_END_TIME", end)
    assert signals.slurm_seconds_left() == math.inf


@pytest.mark.parametrize(
    "numbers, leaves",
    [
        ([signal.SIGUSR1, signal.SIGTERM], False),  # Slurm's warning and its end
        ([signal.SIGUSR1, signal.SIGUSR1], False),  # an echo, passed on by a launcher
        ([signal.SIGTERM, signal.SIGINT], True),
        ([signal.SIGTERM, None, signal.SIGTERM], True),
    ],
)
def test_an_echo_or_slurms_next_signal_does_not_drop_the_work_in_hand(numbers, leaves):
    def work() -> None:
        with signals.StopFlag():
            for number in numbers:
                if number is None:
                    time.sleep(signals._ECHO_S + 0.1)
                else:
                    os.kill(os.getpid(), number)

    assert wait(fork(work)) == (errors.EXIT_INTERRUPTED if leaves else 0)
