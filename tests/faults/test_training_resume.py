"""Interrupted anywhere, by anything, and run again: the run ends as if nothing had happened, to the last bit."""

import os
import signal
import time

import pytest
from training import SOAK, STUDENTS, assert_same_run, of_folder, seeded, start, straight_run
from workplace import at_call, send

KILL = signal.SIGKILL


def modules():
    import distill_trainer
    from distillery import checkpoint, engine, evaluate

    return distill_trainer, checkpoint, engine, evaluate


# where a run may be when the signal comes: (function, which call of it, whether after the call)
POINTS = {
    "before_the_first_step": lambda: (modules()[0], "check_first_step", 1),
    "in_the_first_step": lambda: (modules()[2], "forward_losses", 1),
    "in_the_middle_of_a_step": lambda: (modules()[2], "forward_losses", 6),
    "at_an_epoch_border": lambda: (modules()[0], "check_weights", 3),
    "in_the_last_step": lambda: (modules()[2], "forward_losses", 20),
    "in_the_first_evaluation": lambda: (modules()[3], "extract_features", 2),
    "in_a_later_evaluation": lambda: (modules()[3], "extract_features", 6),
    "in_the_last_evaluation": lambda: (modules()[3], "extract_features", 8),
    "in_a_checkpoint_write": lambda: (modules()[1].torch, "save", 2),
    "between_a_checkpoint_and_its_record": lambda: (modules()[1], "write_atomic", 1),
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("point, number", [(p, SIGNALS[i % 4]) for i, p in enumerate(POINTS)])
def test_a_signal_anywhere_ends_with_status_75_and_the_same_command_with_the_straight_run(
    place, tmp_path, point, number
):
    run_dir, settings = tmp_path / "run", STUDENTS["vit"]
    first = start(place, run_dir, settings, before=lambda: at_call(*POINTS[point](), send(number)))
    assert first.wait() == 75, first.text
    assert f"{number.name}: saved at step" in first.text
    assert (run_dir / "PREEMPTED").exists()
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert not (run_dir / "PREEMPTED").exists()
    assert_same_run(straight_run(place, "vit"), run_dir)


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_and_run_again_equals_the_straight_run(place, tmp_path, point):
    run_dir, settings = tmp_path / "run", STUDENTS["vit"]
    first = start(place, run_dir, settings, before=lambda: at_call(*POINTS[point](), send(KILL)))
    assert first.wait() == -KILL, first.text
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert_same_run(straight_run(place, "vit"), run_dir)


@pytest.mark.parametrize("student", STUDENTS)
def test_interrupted_three_times_in_a_row_with_other_workers_each_time_equals_the_straight_run(
    place, tmp_path, student
):
    run_dir, settings = tmp_path / "run", STUDENTS[student]
    statuses = []
    for number, step in ((signal.SIGTERM, 1), (signal.SIGUSR1, 3), (KILL, 4)):
        changes = {"num_workers": len(statuses) * 2, "prefetch_batches": 1 + len(statuses), "save_every": 2 + step}
        run = start(
            place, run_dir, settings | changes, before=lambda n=number, s=step: at_call(modules()[0], "train_one_epoch", 1, lambda: at_call(modules()[2], "train_step", s, send(n)))
        )  # fmt: skip
        statuses.append(run.wait())
    assert statuses == [75, 75, -KILL]
    last = start(place, run_dir, settings)
    assert last.wait() == 0, last.text
    assert_same_run(straight_run(place, student), run_dir)
    assert [row["step"] for row in of_folder(run_dir).rows("resume")] == sorted(
        row["step"] for row in of_folder(run_dir).rows("resume")
    )


def test_killed_at_random_moments_until_it_is_done_equals_the_straight_run(place, tmp_path):
    rng, kills = seeded("random kills"), 0
    for number in range(SOAK):
        run_dir, settings, status = tmp_path / str(number), STUDENTS["resnet"], None
        for _ in range(6):
            run = start(place, run_dir, settings)
            time.sleep(rng.uniform(0.0, 1.5))
            os.kill(run.pid, KILL)
            status = run.wait()
            kills += status == -KILL
        if status != 0:
            run = start(place, run_dir, settings)
            assert run.wait() == 0, run.text
        assert_same_run(straight_run(place, "resnet"), run_dir)
    print(f"{kills} kills survived")
