"""Interrupted anywhere, by anything, and run again: the run ends as if nothing had happened, to the last bit."""

import os
import re
import signal
import time

import pytest
from scale import scaled
from training import STUDENTS, assert_same_run, of_folder, start, straight_run
from workplace import at_call, send

from distillery.evaluate import measuring
from distillery.training import checkpoints, engine
from distillery.training import run as run_module

KILL = signal.SIGKILL
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
# where a run of 2 epochs of 5 steps of 2 batches may be when it is hit: the number-th call of a function
POINTS = {
    "before the first step": (engine, "check_first_step", 1),
    "in the first step": (engine, "forward_losses", 1),
    "between the two batches of a step": (engine, "forward_losses", 6),
    "after the last step of an epoch": (run_module, "finite_weights", 3),
    "in the last step": (engine, "forward_losses", 20),
    "in the evaluation before the first step": (measuring, "extract_features", 2),
    "in the evaluation between two epochs": (measuring, "extract_features", 6),
    "in the evaluation at the end": (measuring, "extract_features", 8),
    "in the writing of a checkpoint": (checkpoints.torch, "save", 2),
    "between a checkpoint and its record": (checkpoints, "write_atomic", 1),
}


@pytest.mark.parametrize("point, number", [(point, SIGNALS[i % 4]) for i, point in enumerate(POINTS)])
def test_a_signal_anywhere_ends_with_status_75_and_the_same_command_goes_on_to_the_straight_run(
    place, folder, tally, point, number
):
    run_dir, settings = folder / "run", STUDENTS["vit"]
    first = start(place, run_dir, settings, before=lambda: at_call(*POINTS[point], send(number)))
    assert first.wait() == 75, first.text
    assert re.search(f"{number.name}: (saved|nothing to save yet) at step", first.text)
    assert (run_dir / "PREEMPTED").exists()
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert not (run_dir / "PREEMPTED").exists()
    assert_same_run(straight_run(place, "vit"), run_dir)
    tally["training runs stopped by a signal, then equal to the straight run"] += 1


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_run_again_equals_the_straight_run(place, folder, tally, point):
    run_dir, settings = folder / "run", STUDENTS["vit"]
    first = start(place, run_dir, settings, before=lambda: at_call(*POINTS[point], send(KILL)))
    assert first.wait() == -KILL, first.text
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert_same_run(straight_run(place, "vit"), run_dir)
    tally["training runs killed, then equal to the straight run"] += 1


def write_in_background() -> None:
    """Let this process write checkpoints as with a GPU."""
    original = checkpoints.CheckpointWriter
    checkpoints.CheckpointWriter = lambda *arguments, **_: original(*arguments, in_background=True)


@pytest.mark.parametrize("number, status", [(KILL, -KILL), (signal.SIGTERM, 75)])
@pytest.mark.parametrize(
    "point", ["in the last step", "in the writing of a checkpoint", "between a checkpoint and its record"]
)
def test_interrupted_while_a_thread_writes_the_checkpoints_equals_the_straight_run(
    place, folder, tally, point, number, status
):
    run_dir, settings = folder / "run", STUDENTS["vit"]

    def hit() -> None:
        write_in_background()
        at_call(*POINTS[point], send(number))

    first = start(place, run_dir, settings, before=hit)
    assert first.wait() == status, first.text
    again = start(place, run_dir, settings, before=write_in_background)
    assert again.wait() == 0, again.text
    assert_same_run(straight_run(place, "vit"), run_dir)
    tally["training runs interrupted while a thread wrote checkpoints, then equal to the straight run"] += 1


@pytest.mark.parametrize("student", STUDENTS)
def test_interrupted_three_times_in_a_row_with_other_workers_each_time_equals_the_straight_run(
    place, folder, tally, student
):
    run_dir, settings = folder / "run", STUDENTS[student]
    statuses = []
    for number, step in ((signal.SIGTERM, 1), (signal.SIGUSR1, 3), (KILL, 4)):
        changes = {"num_workers": 2 * len(statuses), "prefetch_batches": 1 + len(statuses), "save_every": 1}
        run = start(
            place,
            run_dir,
            settings | changes,
            before=lambda n=number, s=step: at_call(engine, "train_step", s, send(n)),
        )
        statuses.append(run.wait())
    assert statuses == [75, 75, -KILL]
    last = start(place, run_dir, settings)
    assert last.wait() == 0, last.text
    assert_same_run(straight_run(place, student), run_dir)
    # the steps done before each start: 1, 1 + 3, and 3 of the 4 that the kill left
    assert [row["step"] for row in of_folder(run_dir).rows("resume")] == [1, 4, 7]
    tally["training runs interrupted three times, then equal to the straight run"] += 1


def test_killed_at_random_moments_until_it_is_done_equals_the_straight_run(place, folder, rng, tally):
    straight = straight_run(place, "resnet")
    began = time.monotonic()
    assert start(place, folder / "timed", STUDENTS["resnet"]).wait() == 0
    usual_s = time.monotonic() - began
    for number in range(scaled(4)):
        run_dir, statuses = folder / str(number), []
        while len(statuses) < 8 and 0 not in statuses:
            run = start(place, run_dir, STUDENTS["resnet"])
            time.sleep(rng.uniform(0.3, 0.9) * usual_s)
            os.kill(run.pid, KILL)
            statuses.append(run.wait())
        tally["training runs killed at a random moment"] += statuses.count(-KILL)
        last = start(place, run_dir, STUDENTS["resnet"])
        assert last.wait() == 0, last.text
        assert_same_run(straight, run_dir)


def test_killed_in_the_save_that_a_signal_asked_for_equals_the_straight_run(place, folder, rng, tally):
    for number in range(scaled(5)):
        run_dir, settings = folder / str(number), STUDENTS["vit"]
        step = rng.randrange(1, 10)

        def hit(step: int = step) -> None:
            at_call(engine, "train_step", step, send(signal.SIGTERM))
            fsync = os.fsync
            checkpoints.os.fsync = lambda fd: (time.sleep(0.05), fsync(fd))

        first = start(place, run_dir, settings, before=hit)
        while first.poll() is None and "SIGTERM" not in first.text:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        if first.poll() is None:
            os.kill(first.pid, KILL)
        tally["training runs killed in the save that a signal asked for"] += first.wait() == -KILL
        again = start(place, run_dir, settings)
        assert again.wait() == 0, again.text
        assert_same_run(straight_run(place, "vit"), run_dir)
