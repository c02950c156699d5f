"""What a run says of its learning: pure functions of the rows of metrics.jsonl."""

import pytest
import torch

from distillery.training.engine import forward_losses, train_step
from distillery.training.learning import (
    Course,
    explained_until,
    first_lines,
    is_first_look,
    rate_advice,
    term_advice,
)
from distillery.training.log import RunLog, read_rows
from distillery.training.task import Schedule
from tests.training.test_engine import batches, build_task


def train_rows(last_step: int, every: int = 10, **terms) -> list[dict]:
    """Rows up to a step; terms: name -> a function of the step."""
    return [
        {"kind": "train", "step": step, "epoch": 0, "loss": 1.0}
        | {f"explained/{name}": share(step) for name, share in terms.items()}
        for step in range(every, last_step + 1, every)
    ]


def course(total=1000, rate=1e-3, rule=None, warmup=50) -> Course:
    return Course(Schedule(rate, 1e-6, warmup, total), rule, 1)


def test_a_share_is_the_mean_of_the_last_hundred_steps_or_the_last_row_where_rows_are_rarer():
    rows = [{"kind": "start", "step": 0}, *train_rows(300, cls=lambda step: step / 1000)]
    assert explained_until(rows, 300) == {"cls": pytest.approx(0.255)}  # steps 210 to 300
    assert explained_until(rows, 200) == {"cls": pytest.approx(0.155)}
    assert explained_until(train_rows(1000, 250, cls=lambda step: step / 1000), 1000) == {"cls": 1.0}
    assert explained_until(rows[:1], 0) == {}


def test_what_a_run_began_with_does_not_hide_what_it_explains_by_now():
    rows = train_rows(100, cls=lambda step: 0.4 if step > 50 else -500.0)
    assert explained_until(rows, 100) == {"cls": pytest.approx(0.4)}


def test_steps_without_a_term_and_values_that_were_not_finite_do_not_count():
    rows = train_rows(40, cls=lambda step: None if step == 30 else 0.5)
    rows[3]["explained/patch"] = 0.1  # the only step of a hybrid run that ran the teacher
    assert explained_until(rows, 40) == {"cls": 0.5, "patch": 0.1}


@pytest.mark.parametrize("log_every, step", [(1, 100), (10, 100), (30, 120), (100, 100), (101, 101), (250, 250)])
def test_the_first_look_is_at_the_first_row_after_a_hundred_steps_and_once(log_every, step):
    rows = range(log_every, 1000, log_every)
    assert [number for number in rows if is_first_look(number, log_every)] == [step]


def test_a_term_whose_targets_do_not_vary_has_no_share():
    rows = train_rows(200, cls=lambda _: 0.0, patch=lambda _: 0.14)
    assert explained_until(rows, 200) == {"patch": 0.14}
    assert term_advice(rows, course(), 200) == []


def test_the_first_line_names_the_share_of_each_term():
    rows = train_rows(100, cls=lambda _: 0.312, patch=lambda _: 0.22)
    assert first_lines(rows, course(), 100) == [
        "learning: step 100: the student explains 31 % of cls and 22 % of patch (share of the targets' variance)"
    ]
    assert first_lines(train_rows(100), course(), 100) == []  # no loss that compares row by row


def test_a_term_that_has_not_begun_after_the_warm_up_is_named():
    rows = train_rows(200, cls=lambda _: 0.3, patch=lambda _: -0.001)
    (line,) = term_advice(rows, course(), 200)
    assert line.startswith("learning: the student still explains 0 % of patch after 200 steps, warm-up included.")
    assert "learning_rate (now 0.000" in line
    assert term_advice(rows, course(warmup=200), 200) == []
    assert term_advice(rows[:5], course(total=50, warmup=2), 50) == []  # too few steps to say so


def test_a_term_that_stands_still_for_a_quarter_of_the_run_at_a_high_rate_is_named():
    rows = train_rows(1000, cls=lambda step: step / 1000, patch=lambda step: min(0.1, step / 1000))
    (line,) = term_advice(rows, course(), 500)
    assert line.startswith("learning: patch has stopped: 10 % now, 10 % at step 250, at a learning rate of 0.00")
    assert line.endswith("try a new run with --set learning_rate=0.0005")
    assert term_advice(rows, course(), 300) == []  # a quarter ago it was the warm-up
    assert term_advice(rows, course(), 900) == []  # the rate is low by now
    assert term_advice(train_rows(500, cls=lambda _: 0.95), course(), 500) == []  # nothing left to gain


@pytest.mark.parametrize(
    "rate, rule, text",
    [(0.02, 1e-3, "0.02 is 20 times the 0.001"), (2e-4, 1e-3, "0.0002 is 1/5 of the 0.001"),
     (3e-3, 1e-3, None), (3e-4, 1e-3, None), (1e-3, None, None)],
)  # fmt: skip
def test_a_learning_rate_set_by_hand_is_named_where_it_is_four_times_off_the_rule(rate, rule, text):
    lines = rate_advice(course(rate=rate, rule=rule))
    assert len(lines) == (text is not None)
    assert text is None or text in lines[0]
    assert first_lines(train_rows(100, cls=lambda _: 0.5), course(rate=rate, rule=rule), 100)[1:] == lines


def test_a_run_that_was_killed_and_went_on_says_the_same(tmp_path):
    rows = train_rows(500, cls=lambda step: step / 700, patch=lambda step: min(0.1, step / 1000))

    def write(log, since: int) -> None:
        for row in rows:
            if row["step"] > since:
                log.write(**row)

    log = RunLog(tmp_path, tensorboard=False, wandb_project=None, is_main=True)
    write(log, 0)
    log.truncate_after(320)
    write(log, 320)
    assert len(read_rows(log.path)) == len(rows) + 1  # the resume
    for step, lines_of in ((100, first_lines), (500, term_advice)):
        lines = lines_of(read_rows(log.path), course(), step)
        assert lines == lines_of(rows, course(), step) and lines


def test_a_step_of_several_batches_has_the_mean_of_their_shares():
    task, data = build_task(accumulation_steps=2), batches(2)
    with torch.no_grad():
        each = [forward_losses(task, batch) for batch in data]
    losses = train_step(task, data, 0, 0)
    for name in ("explained/cls", "explained/patch"):
        assert losses[name].item() == pytest.approx(sum(of[name].item() for of in each) / 2, rel=1e-4)
