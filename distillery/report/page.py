"""The report of a run: its HTML page, its plots and its table for the console. It omits what has not happened yet."""

import base64
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from distillery.evaluate import columns, progress
from distillery.evaluate.by_class import read_by_class
from distillery.report import facts
from distillery.report.canvas import text_of
from distillery.report.curves import draw_all
from distillery.report.render import clock, render
from distillery.report.style import datasets_of, is_number, of_kind, to_png, to_svg
from distillery.system.console import format_seconds
from distillery.system.files import sha256_of, write_atomic
from distillery.training.log import quality_of

CAPTIONS = {
    "knn": "Images are classified by their {k} nearest labelled neighbours in feature space.",
    "linear": "Logistic regression on the frozen features.",
    "knn_in_teacher_bank": "The student's features in the teacher's space, looked up among the teacher's own features "
    "of the training images.",
    "miou": "Segmentation by a linear probe on frozen patch features: mean IoU over classes.",
    "knn_miou": "Segmentation by the nearest labelled patches: mean IoU over classes.",
    "effective_rank": "How many dimensions the features use (RankMe). Near 1 the features have collapsed.",
    "loss": "What the optimiser sees. Where there are many steps the line is a mean and the band its range.",
    "explained": "1 - MSE / variance of the targets: at 0% the student knows no more than their mean, at 100% it gives "
    "them exactly.",
    "learning_rate": "A warm-up, then a cosine.",
    "grad_norm": "The optimiser clips it to max_grad_norm.",
    "throughput": "Over all processes. Waiting for data should stay below one percent.",
    "time_shares": "Student: forward, losses, backward. Other: augmentation, logging, saving.",
    "shards": "Above, the shards of each epoch, the paler the smaller the part of their images that it reads; below, "
    "how often each has been read. The present epoch counts as a whole.",
    "timeline": "Shaded: from the last sign of life to the resume.",
}
# what stands in a section of its own, below the curves
COURSE_PICTURES = ("time_shares", "shards", "timeline")
REPORT_NAME = "report.html"


def build_page(run: facts.RunRecord, pictures: dict[str, str], no_pictures: str | None = None) -> str:
    """The whole HTML page.

    Args:
        run: its record.
        pictures: stem -> <svg> text.
        no_pictures: why there are no pictures of the features, where that is known.
    """
    student, teacher = run.get("model", "student_name"), run.get("model", "teacher_name")
    sections: dict[str, list[tuple[str, str]]] = {"Curves": [], "Course of the run": []}
    for stem, svg in pictures.items():
        sections["Course of the run" if stem in COURSE_PICTURES else "Curves"].append((svg, _caption(stem, run)))
    return render(
        "run.html",
        title=f"{student} learns from {teacher}" if student and teacher else f"Run {run.run_dir.name}",
        run=run,
        facts=facts,
        columns=columns,
        progress=progress,
        state=_state(run),
        tiles=_tiles(run),
        results={dataset: run.evaluation(dataset) for dataset in datasets_of(run.rows)},
        features=_features(run),
        by_class=_by_class(run),
        no_pictures=no_pictures,
        sections=sections,
        config={section: {key: _yaml_value(v) for key, v in values.items()} for section, values in run.config.items()},
    )


def _state(run: facts.RunRecord) -> tuple[str, str, str]:
    """The dot's class, the state in a word or two, how far the run is."""
    if not run.train_rows:
        return "", "Not started", "no training step has been logged yet"
    step, total = run.step, run.total_steps
    last, ended = run.train_rows[-1].get("time", 0), of_kind(run.rows, "end")
    if run.is_finished:
        dot, word = "done", "Finished"
    elif ended and ended[-1].get("time", 0) >= last:
        dot, word = "stopped", f"Interrupted by {ended[-1].get('reason', 'a signal')}"
    else:
        dot, word = "going", f"Under way at {clock(last)} UTC"
    position = f"step {step:,}" + (f" of {total:,} ({step / total:.0%})" if total else "")
    times = f", {format_seconds(run.seconds)} of training" if run.seconds >= 1 else ""
    num_resumes = len(run.resumes)
    resumed = f", resumed {'once' if num_resumes == 1 else f'{num_resumes} times'}" if num_resumes else ""
    return dot, word, f"{position}{times}{resumed}"


def _tiles(run: facts.RunRecord) -> list[tuple[str, str, str, str]]:
    """Key figures: name, value, note, CSS class."""
    shown = []
    for dataset in datasets_of(run.rows)[:1]:
        models = run.evaluation(dataset)
        for model in ("student", "teacher", "untrained"):
            found = quality_of(models.get(model, {}))
            if found is not None:
                name, value = found
                shown.append((columns.MODELS[model], f"{value:.1%}", f"{columns.title_of(name)}, {dataset}", model))
    if run.train_rows:
        last = run.train_rows[-1]
        if is_number(last.get("loss")):
            shown.append(("loss", f"{last['loss']:.4g}", f"at step {last['step']:,}", ""))
        speeds = [row["images_per_second"] for row in run.train_rows if is_number(row.get("images_per_second"))]
        waits = [row["data_wait_fraction"] for row in run.train_rows if is_number(row.get("data_wait_fraction"))]
        if speeds:
            waiting = f"{sorted(waits)[len(waits) // 2]:.1%} waiting for data" if waits else "median"
            shown.append(("images per second", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", waiting, ""))
    return shown


def _features(run: facts.RunRecord) -> list[tuple[str, str, str]]:
    """The pictures that distillery/report/pictures.py has left in plots/: title, PNG in base64, description."""
    shown = []
    for name, title in ((facts.PCA_NAME, "Patch features"), (facts.NEIGHBOURS_NAME, "Nearest neighbours")):
        path = run.run_dir / facts.PLOTS_NAME / name
        if path.exists():
            shown.append((title, base64.b64encode(path.read_bytes()).decode(), _description(path)))
    return shown


def _by_class(run: facts.RunRecord) -> dict[str, dict[str, Any]]:
    """Data set -> what the student lost class by class, with the picture of its confusions (PNG in base64, or None)."""
    shown = {}
    for dataset in datasets_of(run.rows):
        content = read_by_class(run.run_dir, dataset)
        if content is not None:
            path = run.run_dir / facts.PLOTS_NAME / facts.confusions_name(dataset)
            has_picture = bool(content["confusions"]) and text_of(path, "Source") == sha256_of(content)
            shown[dataset] = content | {
                "png": base64.b64encode(path.read_bytes()).decode() if has_picture else None,
                "description": _description(path) if has_picture else "",
            }
    return shown


def _description(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description", "")


def _caption(stem: str, run: facts.RunRecord) -> str:
    kind = max((name for name in CAPTIONS if stem == name or stem.startswith(f"{name}_")), key=len)
    return CAPTIONS[kind].format(k=run.get("train", "knn_k") or "k")


def _yaml_value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) or value is None else str(value)


def write_report(run_dir: Path, out: Path | None = None, no_pictures: str | None = None) -> Path:
    """Write plots/*.png (loss.png, knn_<dataset>.png, ...) and report.html.

    The page is one file, light and dark, printable, without scripts or network.

    Works at any time of a run: what has not happened yet is left out.

    Args:
        run_dir: the run folder. Where it may only be read, plots/ stays as it is.
        out: where to; None: report.html in the run folder.
        no_pictures: why pictures of the features could not be drawn; the page says so where there are none.
    """
    run = facts.load_run(Path(run_dir))
    figures = draw_all(run.rows, run.num_shards, run.shard_rows)
    plots = run.run_dir / facts.PLOTS_NAME
    try:
        plots.mkdir(exist_ok=True)
        for stem, drawn in figures.items():
            write_atomic(plots / f"{stem}.png", to_png(drawn))
    except OSError as error:
        print(f"{plots}: not written ({error.strerror})", file=sys.stderr)
    path = out or run.run_dir / REPORT_NAME
    svgs = {stem: to_svg(figure) for stem, figure in figures.items()}
    write_atomic(path, build_page(run, svgs, no_pictures).encode())
    return path


def summary_table(run_dir: Path) -> str:
    """The last evaluation as text for the console: untrained, student, teacher on every data set; '' without one."""
    run = facts.load_run(Path(run_dir))
    lines = []
    for dataset in datasets_of(run.rows):
        models = run.evaluation(dataset)
        shown = columns.columns_of(models.values(), columns.COLUMNS)
        lines.append(f"{dataset:<20}" + "".join(f"  {title:>14}" for _, title, _ in shown))
        for model, row in models.items():
            cells = [f"  {columns.format_cell(row, name, form):>{max(14, len(title))}}" for name, title, form in shown]
            lines.append(f"  {columns.MODELS[model]:<18}{''.join(cells)}")
        lines += _wrapped(facts.protocol_of(models))
        if facts.passes_teacher(models):
            lines += _wrapped(facts.PASSING_NOTE)
        if progress.has_collapsed(models.get("student", {})):
            lines += _wrapped(progress.COLLAPSE_NOTE)
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent="  ", subsequent_indent="  ")
