"""The line after an evaluation, and the advice with it."""

import pytest

from distillery.evaluate.progress import progress_lines
from distillery.training.learning import Course
from distillery.training.task import Schedule

SCHEDULE = Schedule(1e-3, 1e-6, 10, 600)


def eval_row(model: str, epoch: int, knn: float, dataset: str = "digits", **fields) -> dict:
    row = {"kind": "eval", "step": 200 * epoch, "epoch": epoch, "dataset": dataset, "model": model, "knn_top1": knn}
    return row | {"effective_rank": 20.2, "cka": 0.714} | fields


def train_rows(epochs: int, **at_epoch) -> list[dict]:
    """20 rows an epoch; at_epoch: loss -> its share in each epoch."""
    return [
        {"kind": "train", "step": step, "epoch": (step - 1) // 200, "loss": 1.0}
        | {f"explained/{name}": shares[(step - 1) // 200] for name, shares in at_epoch.items()}
        for step in range(10, 200 * epochs + 1, 10)
    ]


def rows_of_run(**fields) -> list[dict]:
    return [
        eval_row("untrained", 0, 0.315), eval_row("teacher", 0, 0.856),
        *train_rows(3, cls=(0.5, 0.67, 0.71), patch=(0.5, 0.58, 0.6)),
        eval_row("student", 2, 0.641), eval_row("student", 3, 0.673, effective_rank=24.04, **fields),
    ]  # fmt: skip


def said(rows: list[dict], epoch: int = 3, every: int = 1, rule: float | None = None) -> list[str]:
    return progress_lines(rows, Course(SCHEDULE, rule, every), step=200 * epoch, epoch=epoch)


def test_one_line_says_where_the_student_stands_and_what_changed_since_the_last_look():
    assert said(rows_of_run()) == [
        "learning: epoch 3: k-NN 67.3 % (untrained 31.5, teacher 85.6: 66 % of the way; +3.2 since epoch 2); "
        "explained: cls 71 % (+4 points), patch 60 % (+2 points); effective rank 24 (teacher 20.2); agreement 0.71 "
        "(CKA)"
    ]


def test_rows_of_later_epochs_do_not_change_what_was_said():
    rows = rows_of_run()
    before = said(rows[:-1], epoch=2)
    assert said(rows, epoch=2) == before and "k-NN 64.1 %" in before[0]


@pytest.mark.parametrize(
    "every, epoch, changes", [(2, 3, "cls 71 % (+4 points)"), (0, 3, "cls 71 %,"), (5, 3, "cls 71 %,")]
)
def test_without_evaluation_sets_the_line_has_the_terms_alone(every, epoch, changes):
    (line,) = said([row for row in rows_of_run() if row["kind"] == "train"], epoch, every)
    assert line.startswith(f"learning: epoch 3: explained: {changes}")


def test_with_nothing_to_say_there_is_no_line():
    assert said([]) == []


def test_several_sets_are_named_and_sets_of_masks_have_their_own_measure():
    rows = rows_of_run()
    for model, epoch, miou in (("untrained", 0, 0.1), ("teacher", 0, 0.5), ("student", 3, 0.3)):
        rows.append({"kind": "eval", "step": 0, "epoch": epoch, "dataset": "pets", "model": model, "knn_miou": miou})
    (line,) = said(rows)
    assert "k-NN on digits 67.3 % (" in line and "effective rank on digits 24 (teacher 20.2)" in line
    assert "; k-NN mIoU on pets 30.0 % (untrained 10.0, teacher 50.0: 50 % of the way); explained:" in line


def test_a_collapsed_student_is_said_to_be_one():
    lines = said(rows_of_run(collapsed=True))
    assert len(lines) == 2 and lines[1].startswith("learning: digits: The student's features have collapsed")


def test_a_student_below_its_untrained_self_is_said_to_be_and_where_the_teacher_is_no_better_that_too():
    rows = rows_of_run(knn_top1=0.3)
    assert said(rows)[1:] == [
        "learning: digits: k-NN 30.0 % is below the untrained student's 31.5 %: lower learning_rate"
    ]
    rows[1]["knn_top1"] = 0.2
    assert said(rows)[1].endswith("the teacher too is below it, at 20.0 %: take a teacher that suits these images")


def test_a_run_too_short_for_a_first_look_says_what_its_learning_rate_is_to_the_rule():
    rows = train_rows(1, cls=(0.5,))[:4]
    course = Course(SCHEDULE, 1e-4, 1)
    assert "10 times" in progress_lines(rows, course, step=40, epoch=1)[1]
    assert len(progress_lines(rows, course, step=80, epoch=2)) == 1  # it has been said
