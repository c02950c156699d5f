import time

import pytest
import torch

from distillery.training.watch import StepClock


def test_images_steps_and_waiting_are_counted_since_the_last_row():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.part("wait"):
            time.sleep(0.03)
        time.sleep(0.01)
        clock.count(8)
    figures = clock.summary()
    assert figures["step_seconds"] == pytest.approx(0.04, rel=0.5)
    assert figures["images_per_second"] == pytest.approx(8 / figures["step_seconds"])
    assert 0.5 < figures["data_wait_fraction"] < 0.95
    clock.count(4)
    time.sleep(0.01)
    again = clock.summary()
    assert again["data_wait_fraction"] == 0.0
    assert again["images_per_second"] == pytest.approx(4 / again["step_seconds"])


def test_each_part_of_a_step_has_its_share_and_the_shares_do_not_pass_the_whole():
    clock = StepClock(torch.device("cpu"))
    for part, seconds in (("teacher", 0.04), ("student", 0.02), ("student", 0.02), ("optimizer", 0.01)):
        with clock.part(part):
            time.sleep(seconds)
    clock.count(8)
    figures = clock.summary()
    shares = {name: value for name, value in figures.items() if name.endswith("_fraction")}
    assert list(shares) == ["data_wait_fraction", "teacher_fraction", "student_fraction", "optimizer_fraction"]
    assert shares["data_wait_fraction"] == 0.0 and 0.9 < sum(shares.values()) <= 1.0
    assert shares["teacher_fraction"] == pytest.approx(shares["student_fraction"], rel=0.4)
    assert shares["optimizer_fraction"] < shares["student_fraction"]


def test_time_before_a_restart_belongs_to_no_row():
    clock = StepClock(torch.device("cpu"))
    with clock.part("teacher"):
        time.sleep(0.02)
    clock.restart()
    time.sleep(0.002)
    assert clock.summary()["teacher_fraction"] == 0.0


def test_a_row_without_a_step_is_finite():
    figures = StepClock(torch.device("cpu")).summary()
    assert figures["images_per_second"] == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_host_that_waits_while_the_gpu_works_does_not_count_as_waiting():
    clock = StepClock(torch.device("cuda"))
    torch.cuda._sleep(400_000_000)  # a few tenths of a second of work
    with clock.part("wait"):
        time.sleep(0.05)
    clock.count(1)
    assert clock.summary()["data_wait_fraction"] < 0.1
