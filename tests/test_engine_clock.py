import time

import pytest
import torch

from distillery.engine_clock import StepClock


def test_images_steps_and_waiting_are_counted_since_the_last_row():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.waiting():
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


def test_a_row_without_a_step_is_finite():
    figures = StepClock(torch.device("cpu")).summary()
    assert figures["images_per_second"] == 0.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_a_host_that_waits_while_the_gpu_works_does_not_count_as_waiting():
    clock = StepClock(torch.device("cuda"))
    torch.cuda._sleep(400_000_000)  # a few tenths of a second of work
    with clock.waiting():
        time.sleep(0.05)
    clock.count(1)
    assert clock.summary()["data_wait_fraction"] < 0.1
