"""How far the student has come: the line that follows an evaluation, and advice where the student does not learn.

The functions are pure: they see the rows of metrics.jsonl, so that an interrupted run says the same.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from distillery.evaluate.columns import STUDENT, TEACHER, UNTRAINED, title_of
from distillery.training.learning import FIRST_LOOK, WINDOW, Course, explained_until, percent, rate_advice, term_advice
from distillery.training.log import quality_of

COLLAPSE_NOTE = (
    "The student's features have collapsed: they are nearly the same for every image. Look at the loss curve, lower "
    "the learning rate, and check that the teacher's targets are standardised (standardise_targets: true)."
)

# percentage points below the untrained student that are no chance
LEAST_LOSS = 1.0

Rows = Sequence[Mapping[str, Any]]


def has_collapsed(row: Mapping[str, Any]) -> bool:
    """Whether an eval row says that the features are nearly the same for every image."""
    return row.get("collapsed") is True


def progress_lines(rows: Rows, course: Course, *, step: int, epoch: int) -> list[str]:
    """One line on how far the student is after an epoch, and one more for each thing that needs a look.

    Args:
        rows: of metrics.jsonl, those of this evaluation included, where there was one.
        course: of the run.
        step: the last one of the epoch.
        epoch: how many are done.
    """
    before = course.look_before(epoch)
    students = {row["dataset"]: row for row in rows if _is_of(row, STUDENT) and row["epoch"] == epoch}
    parts, shapes, advice = [], [], []
    for name, row in students.items():
        where = f" on {name}" if len(students) > 1 else ""
        baselines = [_last(rows, name, model) for model in (UNTRAINED, TEACHER)]
        earlier = next((r for r in rows if _is_of(r, STUDENT, name) and before and r["epoch"] == before), {})
        parts.append(_quality(row, *baselines, earlier, where, before))
        shapes += _shape(row, baselines[1], where)
        advice += _advice(row, *baselines, is_early=step < course.schedule.warmup_steps + WINDOW)
    parts.append(_explained(rows, step, before))
    text = "; ".join(part for part in [*parts, *shapes] if part)
    advice += term_advice(rows, course, step)
    if step < FIRST_LOOK and not before:  # too short a run to have said it
        advice += rate_advice(course)
    return [f"learning: epoch {epoch}: {text}", *advice] if text else advice


def _is_of(row: Mapping[str, Any], model: str, dataset: str | None = None) -> bool:
    is_of_model = row.get("kind") == "eval" and row.get("model") == model
    return is_of_model and dataset in (None, row.get("dataset"))


def _last(rows: Rows, dataset: str, model: str) -> Mapping[str, Any]:
    return next((row for row in reversed(rows) if _is_of(row, model, dataset)), {})


def _value(row: Mapping[str, Any], name: str) -> float | None:
    """The quality of a row in per cent, where it is of the same measure."""
    found = quality_of(row)
    return 100 * found[1] if found is not None and found[0] == name else None


def _quality(
    row: Mapping[str, Any],
    untrained: Mapping[str, Any],
    teacher: Mapping[str, Any],
    earlier: Mapping[str, Any],
    where: str,
    before: int,
) -> str:
    """The student's quality, between its untrained self and its teacher."""
    if (found := quality_of(row)) is None:
        return ""
    name, now = found[0], 100 * found[1]
    low, high, then = (_value(other, name) for other in (untrained, teacher, earlier))
    baselines = (("untrained", low), ("teacher", high))
    text = ", ".join(f"{title} {value:.1f}" for title, value in baselines if value is not None)
    if None not in (low, high) and low <= now <= high and low < high:
        text += f": {percent((now - low) / (high - low))} of the way"
    notes = [text] if text else []
    if then is not None:
        notes.append(f"{now - then:+.1f} since epoch {before}")
    return f"{title_of(name)}{where} {now:.1f} %" + (f" ({'; '.join(notes)})" if notes else "")


def _explained(rows: Rows, step: int, before: int) -> str:
    """The explained share of each loss, with the change since the look after `before` epochs."""
    # a train row counts epochs from 0: those of the first `before` epochs
    earlier = [row["step"] for row in rows if row.get("kind") == "train" and row["epoch"] < before]
    then = explained_until(rows, earlier[-1]) if earlier else {}
    terms = []
    for name, share in explained_until(rows, step).items():
        change = f" ({round(100 * (share - then[name])):+d} points)" if name in then else ""
        terms.append(f"{name} {percent(share)}{change}")
    return f"explained: {', '.join(terms)}" if terms else ""


def _shape(row: Mapping[str, Any], teacher: Mapping[str, Any], where: str) -> list[str]:
    """How many dimensions the features use, and how alike they are to the teacher's."""
    shown = []
    if row.get("effective_rank") is not None:
        of_teacher = teacher.get("effective_rank")
        note = "" if of_teacher is None else f" (teacher {of_teacher:.3g})"
        shown.append(f"effective rank{where} {row['effective_rank']:.3g}{note}")
    if row.get("cka") is not None:
        shown.append(f"agreement{where} {row['cka']:.2f} (CKA)")
    return shown


def _advice(
    row: Mapping[str, Any], untrained: Mapping[str, Any], teacher: Mapping[str, Any], *, is_early: bool
) -> list[str]:
    """What an eval row of the student gives reason to say; is_early: too early to compare with the untrained one."""
    lines = []
    if has_collapsed(row):
        lines.append(f"learning: {row['dataset']}: {COLLAPSE_NOTE}")
    found = quality_of(row)
    name, now = (found[0], 100 * found[1]) if found else ("", 0.0)
    low, high = (_value(other, name) for other in (untrained, teacher))
    if not is_early and low is not None and now < low - LEAST_LOSS:
        advice = "lower learning_rate"
        if row.get("weights") == "averaged":
            advice += ", or wait: averaged weights (ema_decay) are young at first"
        if high is not None and high < low:
            advice = f"the teacher too is below it, at {high:.1f} %: take a teacher that suits these images"
        lines.append(
            f"learning: {row['dataset']}: {title_of(name)} {now:.1f} % is below the untrained student's {low:.1f} %: "
            + advice
        )
    return lines
