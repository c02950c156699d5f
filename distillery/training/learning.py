"""Is the student learning? What the train rows of metrics.jsonl say of it, in lines for the console.

The functions are pure: a run that was interrupted says what it would have said without. This file does not import
torch.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distillery.losses.registry import EXPLAINED

if TYPE_CHECKING:
    from distillery.training.task import Schedule

# a single step's number is noisy: figures are medians over the rows of so many steps
WINDOW = 100
# the step at which a run speaks of its learning for the first time, whatever the length of its epochs
FIRST_LOOK = 100
# shares of the variance, 0..1: what counts as not begun, as no rise over a quarter of the run, as nothing left to gain
NEAR_ZERO, LEAST_RISE, NEARLY_ALL = 0.02, 0.005, 0.9
# of the schedule's highest: while the rate is above it, a term ought to rise
HIGH_RATE = 0.5
# between a learning_rate set by hand and that of the rule
FAR_FACTOR = 4


@dataclass(frozen=True)
class Course:
    """What a run's configuration says of its course.

    rule_rate: what the rule behind `learning_rate: null` gives, where the rate is set by hand; None: the rule holds.
    every: epochs between two looks at the student (eval_every_epochs); 0: there is only the last.
    """

    schedule: "Schedule"
    rule_rate: float | None
    every: int

    def look_before(self, epoch: int) -> int:
        """The epoch of the last look before that after `epoch` epochs; 0: none."""
        return (epoch - 1) // self.every * self.every if self.every and epoch else 0


def explained_until(rows: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Loss name -> the share of its targets' variance that the student explains: the median over the last 100 steps.

    rows: of metrics.jsonl, of any kind; those after `step` do not count. Of fewer than 200 steps the first half does
    not count either: a run may begin far below 0. Where no row is left, the last one says it. A loss whose targets do
    not vary, which is exactly 0 in all rows, has none.
    """
    train = [row for row in rows if row.get("kind") == "train" and row["step"] <= step]
    train = [row for row in train if row["step"] > step - min(WINDOW, step // 2)] or train[-1:]
    found: dict[str, list[float]] = {}
    for row in train:
        for name, value in row.items():
            if name.startswith(EXPLAINED) and value is not None:
                found.setdefault(name.removeprefix(EXPLAINED), []).append(value)
    return {name: statistics.median(values) for name, values in found.items() if any(values)}


def is_first_look(step: int, log_every: int) -> bool:
    """Whether the row of `step` is the first one after a hundred steps."""
    return step - log_every < FIRST_LOOK <= step


def first_lines(rows: Sequence[Mapping[str, Any]], course: Course, step: int) -> list[str]:
    """What a run says of its learning after its first steps; rows: of metrics.jsonl up to `step`."""
    shares = explained_until(rows, step)
    terms = [f"{percent(value) if value > 0 else 'nothing'} of {name}" for name, value in shares.items()]
    lines = []
    if terms:
        text = f"the student explains {in_words(terms)} (share of the targets' variance)"
        lines.append(f"learning: step {step:,}: {text}")
    return [*lines, *term_advice(rows, course, step), *rate_advice(course)]


def term_advice(rows: Sequence[Mapping[str, Any]], course: Course, step: int) -> list[str]:
    """A line for each loss of which the student has learnt nothing after the warm-up, or no more for a quarter of the
    run although the learning rate is high.
    """
    schedule, rate = course.schedule, course.schedule.at(step - 1)
    if step < schedule.warmup_steps + WINDOW:  # the figures are to be of the steps after the warm-up
        return []
    before = step - schedule.total_steps // 4
    is_late = before >= schedule.warmup_steps + WINDOW and rate >= HIGH_RATE * schedule.learning_rate
    then = explained_until(rows, before) if is_late else {}
    lines = []
    for name, value in explained_until(rows, step).items():
        if value < NEAR_ZERO:
            lines.append(
                f"learning: the student still explains {percent(value)} of {name} after {step:,} steps, warm-up "
                f"included. Look at the teacher's weights, teacher_mean and teacher_std, at the images and at "
                f"learning_rate (now {rate:.3g})"
            )
        elif name in then and value < min(NEARLY_ALL, then[name] + LEAST_RISE):
            lines.append(
                f"learning: {name} has stopped: {percent(value)} now, {percent(then[name])} at step {before:,}, at a "
                f"learning rate of {rate:.3g}. It may go on as the rate falls; if not, try a new run with "
                f"--set learning_rate={schedule.learning_rate / 2:.2g}"
            )
    return lines


def rate_advice(course: Course) -> list[str]:
    """A line where a learning rate set by hand is far from what the rule would give."""
    rate, rule = course.schedule.learning_rate, course.rule_rate
    if rule is None or rule / FAR_FACTOR < rate < rule * FAR_FACTOR:
        return []
    text = f"{rate / rule:.3g} times" if rate > rule else f"1/{rule / rate:.3g} of"
    return [
        f"learning: learning_rate {rate:.3g} is {text} the {rule:.3g} that the rule gives for this batch and student. "
        "Where the student learns too little, try a new run with --set learning_rate=null"
    ]


def percent(share: float) -> str:
    """0.312 -> '31 %'."""
    return f"{round(100 * share)} %"


def in_words(parts: Iterable[str]) -> str:
    """['a', 'b', 'c'] -> 'a, b and c'."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
