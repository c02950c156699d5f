"""The table of a suite of benchmarks.learning: medians over seeds, with the least and the most."""

import statistics
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

import numpy as np

from benchmarks.learning_suites import Suite

Result = dict[str, Any]
NOT_MEASURED = "not measured yet"


def by_label(suite: Suite, runs: Iterable[Result]) -> dict[str, list[Result]]:
    """The runs of each label by seed, in the suite's order; borrowed ones next, labels that it no longer has last."""
    runs = sorted(runs, key=lambda run: run["seed"])
    known = [*suite.labels, *suite.borrowed]
    labels = [*known, *sorted({run["label"] for run in runs} - set(known))]
    groups = {label: [run for run in runs if run["label"] == label] for label in labels}
    return {label: group for label, group in groups.items() if group}


def knn_of(run: Result) -> float:
    """Of the student after the last step, 0..1."""
    return run["rows"]["student"]["knn_top1"]


def knn_at(curve: Sequence[dict[str, Any]], seconds: float) -> float:
    """k-NN at a moment, on the straight line between the evaluations around it; before the first, the first."""
    return float(np.interp(seconds, [point["seconds"] for point in curve], [point["knn"] for point in curve]))


def seconds_of(run: Result) -> float | None:
    """From the start to the last step, evaluations left out, the teacher's outputs included; None: no training."""
    return run["curve"][-1]["seconds"] if run["curve"] else None


def comparable_curves(suite: Suite, label: str, runs: Sequence[Result]) -> list[list[dict[str, Any]]]:
    """The curves of a label's runs that have as many points as the suite asks for now, else as the last of them."""
    curves = [run["curve"] for run in runs]
    wanted = [run.epochs // run.eval_every + 1 for run in suite.runs if run.label == label]
    points = next((count for count in wanted if count in map(len, curves)), len(curves[-1]))
    return [curve for curve in curves if len(curve) == points]


def untrained_and_teachers(runs: Iterable[Result]) -> tuple[list[Result], dict[str, Result]]:
    """The evaluation rows of the untrained students, one for each student and seed, and of each teacher by its name."""
    runs = list(runs)
    untrained = {(run["student"], run["seed"]): run["rows"]["untrained"] for run in runs if "untrained" in run["rows"]}
    teachers: dict[str, Result] = {}
    for run in runs:
        if "teacher" in run["rows"]:
            name = "teacher, mirrored" if run["recipe"].get("teacher_mirror") else "teacher"
            teachers.setdefault(name, run["rows"]["teacher"])
    return list(untrained.values()), teachers


def percent(values: Sequence[float | None], *, sign: bool = False) -> str:
    """The median in percent, with least and most where they differ; empty where a value is missing."""
    if not values or any(value is None for value in values):
        return ""
    form = "{:+z.1f}" if sign else "{:.1f}"
    shown = [form.format(100 * value) for value in (statistics.median(values), min(values), max(values))]
    return shown[0] if shown[1] == shown[2] else f"{shown[0]} ({shown[1]} to {shown[2]})"


def equal_seconds(groups: dict[str, list[Result]]) -> float | None:
    """The median seconds of the label that was done first; None where runs had different machines or threads."""
    runs = [run for group in groups.values() for run in group]
    if any(run["machine"] != runs[0]["machine"] or seconds_of(run) is None for run in runs):
        return None
    return min(statistics.median(map(seconds_of, group)) for group in groups.values())


def columns_of(suite: Suite, groups: dict[str, list[Result]]) -> dict[str, Callable[[list[Result]], str]]:
    """Heading -> what makes the cell of a label's runs."""
    columns: dict[str, Callable[[list[Result]], str]] = {}
    if suite.picture == "data":
        columns["images"] = lambda runs: f"{runs[0]['images']:,}"
        columns["passes"] = lambda runs: f"{runs[0]['epochs']:,}"
        columns["images seen"] = lambda runs: f"{runs[0]['images_seen']:,}"
    columns["seeds"] = lambda runs: f"{len(runs)}"
    columns["k-NN, %"] = lambda runs: percent([knn_of(run) for run in runs])
    if suite.baseline in groups:
        base = {run["seed"]: knn_of(run) for run in groups[suite.baseline]}
        columns[f"k-NN against {suite.baseline}, same seed"] = lambda runs: percent(
            [knn_of(run) - base[run["seed"]] for run in runs if run["seed"] in base], sign=True
        )
    columns["linear probe, %"] = lambda runs: percent([run["rows"]["student"].get("linear_top1") for run in runs])
    columns["seconds"] = _seconds_cell
    if suite.equal_time and len(groups) > 1 and (deadline := equal_seconds(groups)) is not None:
        columns[f"k-NN after {deadline:,.0f} s, %"] = lambda runs: percent(
            [knn_at(run["curve"], deadline) for run in runs]
        )
    return columns


def _seconds_cell(runs: list[Result]) -> str:
    if any(seconds_of(run) is None for run in runs):
        return ""
    text = f"{statistics.median(map(seconds_of, runs)):,.0f}"
    if any(run["prepare_seconds"] for run in runs):
        prepare = statistics.median(run["prepare_seconds"] for run in runs)
        text += f" ({prepare:,.0f} for the teacher's outputs)"
    return text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with columns as wide as their widest cell."""
    widths = [max(3, *(len(line[i]) for line in (header, *rows))) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def table_of(suite: Suite, runs: Sequence[Result], left_out: dict[str, str]) -> str:
    """What is known about a suite, as markdown: the setting, the table, what is missing."""
    lines = [f"{label}: left out: {reason}" for label, reason in left_out.items()]
    if not runs:
        return "\n\n".join([NOT_MEASURED, *lines])
    groups = by_label(suite, runs)
    columns = columns_of(suite, groups)
    rows = [[label, *(cell(group) for cell in columns.values())] for label, group in groups.items()]
    untrained, teachers = untrained_and_teachers(runs)
    rows.insert(0, _row("untrained student", untrained, columns))
    rows += [_row(name, [row], columns) for name, row in teachers.items()]
    table = markdown(["", *columns], [row for row in rows if row])
    return "\n\n".join([heading_of(runs), table, *lines, *notes_of(suite, groups, left_out)])


def _row(name: str, measured: list[Result], columns: Iterable[str]) -> list[str]:
    """The row of a model that nothing was trained for; empty where it was not measured."""
    cells = {
        "seeds": f"{len(measured)}",
        "k-NN, %": percent([row["knn_top1"] for row in measured]),
        "linear probe, %": percent([row.get("linear_top1") for row in measured]),
    }
    return [name, *(cells.get(heading, "") for heading in columns)] if measured else []


def heading_of(runs: Sequence[Result]) -> str:
    """What all figures of a table have in common."""
    setting, evaluation = runs[0]["setting"], runs[0]["evaluation"]
    students = ", ".join(dict.fromkeys(run["student"] for run in runs))
    revisions = ", ".join(dict.fromkeys(run["revision"] for run in runs))
    machines = dict.fromkeys(
        f"{machine['threads']} of {machine['cpus']} CPUs ({machine['machine']})"
        for machine in (run["machine"] for run in runs)
    )
    return (
        f"{setting['teacher']} to {students}, batch {setting['batch_size']}. k-NN with k {evaluation['knn_k']}, a bank "
        f"of {evaluation['bank']:,} and {evaluation['test_images']:,} test images. Median over seeds, in brackets the "
        f"least and the most. A run had {' or '.join(machines)}. Revision {revisions}."
    )


def notes_of(suite: Suite, groups: dict[str, list[Result]], left_out: Container[str]) -> list[str]:
    """What a reader must know about the figures: what is not there yet, and what does not compare."""
    notes = []
    done = {(run["label"], run["seed"]) for runs in groups.values() for run in runs}
    borrowed = [(label, seed) for label, (_, _, seed) in suite.borrowed.items()]
    wanted = [*((run.label, run.seed) for run in suite.runs), *borrowed]
    missing: dict[str, list[str]] = {}
    for label, seed in wanted:
        if (label, seed) not in done and label not in left_out:
            missing.setdefault(label, []).append(f"{seed}")
    if missing:
        count = sum(map(len, missing.values()))
        # the seeds of a label only where it has some already
        parts = [f"{label} (seed {', '.join(seeds)})" if label in groups else label for label, seeds in missing.items()]
        notes.append(f"Not measured yet, {count} of {len(wanted)} runs: {'; '.join(parts)}.")
    if suite.equal_time and len(groups) > 1 and equal_seconds(groups) is None:
        notes.append("Not compared at equal time: the runs had different machines or numbers of threads.")
    for label, runs in groups.items():
        if suite.picture == "curves" and (lost := len(runs) - len(comparable_curves(suite, label, runs))):
            notes.append(f"The picture leaves out {lost} of {len(runs)} curves of {label}, which have other lengths.")
        others = [run for run in runs if run.get("prepare_threads") not in (None, run["machine"]["threads"])]
        if others:
            notes.append(f"The teacher's outputs of {label} were made with {others[0]['prepare_threads']} threads.")
        # results of an earlier version may lack a key
        keys = set.intersection(*(set(run["recipe"]) for run in runs))
        first = runs[0]["recipe"]
        differing = sorted(key for key in keys if any(run["recipe"][key] != first[key] for run in runs))
        if differing:
            notes.append(f"The runs of {label} differ in {', '.join(differing)}.")
    return notes
