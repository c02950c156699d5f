import io
import re
import subprocess
import sys

import pytest

from distillery.system import console
from distillery.system.console import ProgressLine, format_duration, format_field, format_seconds
from distillery.training.log import epoch_line, training_fields


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_one_line_per_interval_and_one_at_the_end(clock):
    stream = io.StringIO()
    with ProgressLine(1000, "images", "stage 1", every_s=10, stream=stream) as progress:
        for _ in range(100):
            clock[0] += 0.5
            progress.advance(10)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5  # 50 s of work: at 10, 20, 30, 40 and 50 s; the last one is the end and is not repeated
    assert "\r" not in stream.getvalue()
    assert lines[0] == "stage 1:  20 % | 200/1,000 images | 20 images/s | ETA 0:40"
    assert lines[-1] == "stage 1: 100 % | 1,000/1,000 images | 20 images/s | took 0:50"


def test_the_last_state_is_shown_even_when_no_interval_has_passed(clock):
    stream = io.StringIO()
    with ProgressLine(10, "steps", "train", every_s=60, stream=stream) as progress:
        clock[0] += 2
        progress.advance(10, loss=0.123456, lr=3e-4)
    assert stream.getvalue() == "train: 100 % | 10/10 steps | 5 steps/s | took 0:02 | loss 0.1235 | lr 0.0003\n"


def test_what_became_known_after_the_last_unit_is_shown_too(clock):
    stream = io.StringIO()
    with ProgressLine(10, "images", "stage 1", every_s=5, stream=stream) as progress:
        clock[0] += 5
        progress.advance(10, shards=1)
        progress.advance(0, shards=2)
    assert [line.rpartition(" | ")[2] for line in stream.getvalue().splitlines()] == ["shards 1", "shards 2"]


def test_units_done_before_a_resume_count_as_done_but_not_for_the_rate(clock):
    progress = ProgressLine(1000, "images", "stage 1", initial=600, stream=io.StringIO())
    clock[0] += 4
    progress.advance(40)
    assert progress.done == 640
    assert progress.rate == pytest.approx(10)


def test_a_pause_at_the_start_is_forgotten_after_a_few_lines(clock):
    stream = io.StringIO()
    progress = ProgressLine(10_000, "steps", "train", every_s=10, stream=stream)
    clock[0] += 600  # a model that is compiled in the first step
    for _ in range(20):
        clock[0] += 10
        progress.advance(100)
    lines = stream.getvalue().splitlines()
    assert "0.16 steps/s" in lines[0]
    assert "10 steps/s | ETA 13:20" in lines[-1]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["log file", "terminal"])
def test_a_pause_counts_neither_for_the_rate_nor_for_the_end(clock, monkeypatch, stream):
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with ProgressLine(1000, "steps", "train", every_s=10, stream=stream) as progress:
        for _ in range(5):
            with progress.paused():
                clock[0] += 300
            for _ in range(20):
                clock[0] += 1
                progress.advance(2)
        assert progress.rate == pytest.approx(2)
        text = stream.getvalue()
        assert ("2 steps/s | ETA 6:40" if not stream.isatty() else "[01:40<06:40,  2.00 steps/s]") in text
    assert {float(rate) for rate in re.findall(r"([\d.]+) steps/s", text)} == {2}


def test_a_stalled_start_says_that_the_end_is_not_known(clock):
    stream = io.StringIO()
    with ProgressLine(5, "images", "stage 1", stream=stream):
        clock[0] += 1
    assert "ETA ?" in stream.getvalue()


def test_without_a_total_neither_a_percentage_nor_an_end_is_invented(clock):
    stream = io.StringIO()
    with ProgressLine(None, "images", "features", stream=stream) as progress:
        clock[0] += 1
        progress.advance(3)
    assert stream.getvalue() == "features: 3 images | 3 images/s | took 0:01\n"


def test_a_terminal_gets_a_bar_with_the_fields():
    stream = Terminal()
    with ProgressLine(4, "steps", "train", stream=stream) as progress:
        progress.message("checkpoint saved")
        for _ in range(4):
            progress.advance(1, loss=0.5)
    text = stream.getvalue()
    assert "\r" in text
    assert re.search(r"train: 100%.*4/4", text)
    assert "loss 0.5" in text
    assert "checkpoint saved\n" in text


def test_a_disabled_rank_writes_nothing_and_still_counts(clock):
    stream = io.StringIO()
    with ProgressLine(4, "steps", "train", enabled=False, stream=stream) as progress:
        clock[0] += 100
        progress.advance(4)
        progress.message("hello")
    assert stream.getvalue() == ""
    assert progress.done == 4


def test_a_message_is_a_line_of_its_own_in_a_log_file():
    stream = io.StringIO()
    ProgressLine(4, "steps", "train", stream=stream).message("epoch 1 done")
    assert stream.getvalue() == "epoch 1 done\n"


ROW = {"loss": 0.5, "lr": 1e-3, "images_per_second": 500.0, "step_seconds": 0.1, "data_wait_fraction": 0.012,
       "teacher_fraction": 0.38, "student_fraction": 0.52, "optimizer_fraction": 0.06}  # fmt: skip


def test_the_console_says_loss_rate_speed_and_where_the_time_went(clock):
    stream = io.StringIO()
    with ProgressLine(4, "steps", "training", every_s=5, stream=stream) as progress:
        clock[0] += 6
        progress.advance(2, **training_fields(ROW))
    assert stream.getvalue().splitlines()[0] == (
        "training:  50 % | 2/4 steps | 0.33 steps/s | ETA 0:06 | loss 0.5 | lr 0.001 | images/s 500 | "
        "data/teacher/student/optimizer 1/38/52/6 %"
    )


def test_an_epoch_is_one_line_with_the_means_of_its_rows_and_the_last_learning_rate():
    rows = [ROW, ROW | {"loss": 0.3, "lr": 2e-3}]
    assert epoch_line(3, 100, 1500, rows) == (
        "epoch 3 of 100: step 1,500 | loss 0.4 | lr 0.002 | images/s 500 | data/teacher/student/optimizer 1/38/52/6 %"
    )
    assert epoch_line(1, 2, 5, []) == "epoch 1 of 2: step 5"


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00"), (75.4, "1:15"), (3700, "1:01:40"), (90000, "1 d 1:00:00"), (float("inf"), "?"), (float("nan"), "?")],
)
def test_durations_read_like_a_clock(seconds, text):
    assert format_seconds(seconds) == text


def test_numbers_are_short_and_words_stay():
    assert format_field(0.000123456) == "0.0001235"
    assert format_field(7) == "7"
    assert format_field("cached") == "cached"


def test_importing_it_loads_neither_torch_nor_tqdm():
    slow = ("torch", "tqdm", "tensorboard")
    code = f"import sys, distillery.system.console; print([name for name in {slow} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_line_of_an_epoch_takes_rows_that_have_not_all_losses_in_common():
    shares = {
        name: 0.25 for name in ("data_wait_fraction", "teacher_fraction", "student_fraction", "optimizer_fraction")
    }
    rows = [{"loss": loss, "lr": 0.1, "images_per_second": 5.0} | shares for loss in (1.0, 3.0)]
    expected = epoch_line(1, 2, 10, rows)
    assert "loss 2 " in expected
    for number in range(2):
        assert (
            epoch_line(1, 2, 10, [row | ({"loss/patch": 1.0} if i == number else {}) for i, row in enumerate(rows)])
            == expected
        )


@pytest.mark.parametrize(
    "seconds, text",
    [(0.5, "0.5 s"), (12.3, "12 s"), (90, "1.5 min"), (5400, "1.5 h"), (100_000, "28 h"), (200_000, "2.3 days")],
)
def test_durations_are_told_as_people_read_them(seconds, text):
    assert format_duration(seconds) == text
