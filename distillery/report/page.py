"""The HTML page of a run's report: a function per part, each "" where there is nothing to show yet."""

import base64
import json
import textwrap
from pathlib import Path
from typing import Any

from distillery.evaluate.columns import COLUMNS, MODELS, format_cell
from distillery.report.curves import draw_all
from distillery.report.facts import (
    COLLAPSE_NOTE,
    NEIGHBOURS_NAME,
    PASSING_NOTE,
    PCA_NAME,
    PLOTS_NAME,
    RunFacts,
    has_collapsed,
    load_run,
    passes_teacher,
    summary_sentences,
)
from distillery.report.html import clock, details, escape, figure, figures, page, table, tiles
from distillery.report.style import datasets_of, is_number, of_kind, to_png, to_svg
from distillery.system.console import format_seconds
from distillery.system.files import write_atomic

CAPTIONS = {
    "knn": "Images are classified by their {k} nearest labelled neighbours in feature space.",
    "linear": "Logistic regression on the frozen features.",
    "effective_rank": "How many dimensions the features use (RankMe). Near 1 the features have collapsed.",
    "loss": "What the optimiser sees. Where there are many steps the line is a mean and the band its range.",
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


def build_page(run: RunFacts, pictures: dict[str, str], no_pictures: str | None = None) -> str:
    """The whole HTML page.

    Args:
        run: the facts.
        pictures: stem -> <svg> text.
        no_pictures: why there are no pictures of the features, where that is known.
    """
    curves = {stem: svg for stem, svg in pictures.items() if stem not in COURSE_PICTURES}
    parts = [
        _state_html(run),
        _summary_html(run),
        _tiles_html(run),
        _results_html(run),
        _features_html(run, no_pictures),
        figures("Curves", _captioned(run, curves)),
        figures(
            "Course of the run", _captioned(run, {stem: pictures[stem] for stem in COURSE_PICTURES if stem in pictures})
        ),
        _history_html(run),
        _config_html(run),
    ]
    foot = (
        f"Run folder <code>{escape(run.run_dir)}</code>. Made by <code>python -m distillery.report</code>; the figures "
        "come from metrics.jsonl."
    )
    return page(_title(run), parts, foot)


def _title(run: RunFacts) -> str:
    student, teacher = run.get("model", "student_name"), run.get("model", "teacher_name")
    return f"{student} learns from {teacher}" if student and teacher else f"Run {run.run_dir.name}"


def _state_html(run: RunFacts) -> str:
    if not run.train_rows:
        return '<p class="state"><span class="dot"></span><b>Not started</b>: no training step has been logged yet</p>'
    step, total = run.step, run.total_steps
    last, ended = run.train_rows[-1].get("time", 0), of_kind(run.rows, "end")
    if run.is_finished:
        dot, word = "done", "Finished"
    elif ended and ended[-1].get("time", 0) >= last:
        dot, word = "stopped", f"Interrupted by {escape(ended[-1].get('reason', 'a signal'))}"
    else:
        dot, word = "going", f"Under way at {clock(last)} UTC"
    position = f"step {step:,}" + (f" of {total:,} ({step / total:.0%})" if total else "")
    times = f", {format_seconds(run.seconds)} of training" if run.seconds >= 1 else ""
    num_resumes = len(run.resumes)
    resumed = f", resumed {'once' if num_resumes == 1 else f'{num_resumes} times'}" if num_resumes else ""
    return f'<p class="state"><span class="dot {dot}"></span><b>{word}</b>: {position}{times}{resumed}</p>'


def _summary_html(run: RunFacts) -> str:
    return f'<p class="lead">{" ".join(escape(sentence) for sentence in summary_sentences(run))}</p>'


def _tiles_html(run: RunFacts) -> str:
    shown = []
    for dataset in datasets_of(run.rows)[:1]:
        models = run.evaluation(dataset)
        for model in ("student", "teacher", "untrained"):
            if is_number(models.get(model, {}).get("knn_top1")):
                shown.append((MODELS[model], f"{models[model]['knn_top1']:.1%}", f"k-NN, {dataset}", model))
    if run.train_rows:
        last = run.train_rows[-1]
        if is_number(last.get("loss")):
            shown.append(("loss", f"{last['loss']:.4g}", f"at step {last['step']:,}", ""))
        speeds = [row["images_per_second"] for row in run.train_rows if is_number(row.get("images_per_second"))]
        waits = [row["data_wait_fraction"] for row in run.train_rows if is_number(row.get("data_wait_fraction"))]
        if speeds:
            waiting = f"{sorted(waits)[len(waits) // 2]:.1%} waiting for data" if waits else "median"
            shown.append(("images per second", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", waiting, ""))
    return tiles(shown)


def _results_html(run: RunFacts) -> str:
    blocks = [_result_table_html(dataset, run.evaluation(dataset)) for dataset in datasets_of(run.rows)]
    return "<h2>Results</h2>\n" + "\n".join(blocks) if blocks else ""


def _result_table_html(dataset: str, models: dict[str, dict[str, Any]]) -> str:
    shown = [measure for measure in COLUMNS if any(is_number(row.get(measure[0])) for row in models.values())]
    head = "".join(f"<th>{title}</th>" for _, title, _ in shown)
    teacher = models.get("teacher", {}).get("knn_top1")
    lines = []
    for model, row in models.items():
        cells = "".join(f"<td>{_measure_html(row, name, form, model)}</td>" for name, _, form in shown)
        share = f"{row['knn_top1'] / teacher:.0%}" if teacher and is_number(row.get("knn_top1")) else "-"
        step = f"{row['step']:,}" if model.startswith("student") else "-"
        lines.append(f'<tr><th class="{model}">{MODELS[model]}</th>{cells}<td>{share}</td><td>{step}</td></tr>')
    block = (
        f'<div class="card scroll"><table><thead><tr><th>{escape(dataset)}</th>{head}<th>k-NN, share of teacher</th>'
        f"<th>at step</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    notes = f'<p class="note">{PASSING_NOTE}</p>' if passes_teacher(models) else ""
    if has_collapsed(models.get("student", {})):
        notes += f'<p class="warn">{COLLAPSE_NOTE}</p>'
    return block + notes


def _measure_html(row: dict[str, Any], name: str, form: str, model: str) -> str:
    text = format_cell(row, name, form)
    if name != "knn_top1" or text == "-":
        return text
    return f'{text}<span class="bar {model}"><i style="width:{100 * row[name]:.1f}%"></i></span>'


def _features_html(run: RunFacts, no_pictures: str | None) -> str:
    """The pictures that distillery/report/pictures.py has left in plots/."""
    shown = []
    for name, title in ((PCA_NAME, "Patch features"), (NEIGHBOURS_NAME, "Nearest neighbours")):
        path = run.run_dir / PLOTS_NAME / name
        if path.exists():
            data = base64.b64encode(path.read_bytes()).decode()
            image = f'<img src="data:image/png;base64,{data}" alt="{title}">'
            shown.append(figure(image, f"<b>{title}.</b> {escape(_description(path))}"))
    if shown:
        return figures("What the models see", shown, "pictures")
    if not run.train_rows:
        return ""
    reason = (
        escape(no_pictures)
        if no_pictures
        else "they are drawn at the end of the run, or by <code>python -m distillery.report</code>"
    )
    return f'<h2>What the models see</h2>\n<p class="state">No pictures of the features: {reason}</p>'


def _description(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get("Description", "")


def _captioned(run: RunFacts, pictures: dict[str, str]) -> list[str]:
    return [figure(svg, _caption(stem, run)) for stem, svg in pictures.items()]


def _caption(stem: str, run: RunFacts) -> str:
    kind = max((name for name in CAPTIONS if stem == name or stem.startswith(f"{name}_")), key=len)
    return CAPTIONS[kind].format(k=run.get("train", "knn_k") or "k")


def _history_html(run: RunFacts) -> str:
    if not run.interruptions:
        return ""
    lines = []
    for entry in run.interruptions:
        stopped, lost = entry["stopped"], entry["lost_steps"]
        pause = f"<small>after {format_seconds(entry['time'] - stopped)}</small>" if is_number(stopped) else ""
        again = f"<small>{lost:,} logged steps done again</small>" if lost else ""
        lines.append(
            [
                (clock(stopped) if is_number(stopped) else "-") + f"<small>{escape(entry['reason'])}</small>",
                f"{clock(entry['time'])}{pause}",
                f"step {entry['step']:,}{again}",
            ]
        )
    return (
        "<h2>Interruptions</h2>\n<p>The run went on from a checkpoint each time (dotted lines in the curves).</p>\n"
        f'<div class="words narrow">{table(["stopped (UTC)", "resumed (UTC)", "from"], lines)}</div>'
    )


def _config_html(run: RunFacts) -> str:
    blocks = [
        details(section, {key: _yaml_value(value) for key, value in values.items()})
        for section, values in run.config.items()
    ]
    return "<h2>Configuration</h2>\n" + "\n".join(blocks) if blocks else ""


def _yaml_value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) or value is None else str(value)


def write_plots(run_dir: Path) -> list[Path]:
    """Write plots/*.png (loss.png, learning_rate.png, knn_<dataset>.png, ...); pictures without data are left out."""
    return _write_plots(load_run(Path(run_dir)))[0]


def _write_plots(run: RunFacts) -> tuple[list[Path], dict[str, Any]]:
    figures = draw_all(run.rows, run.num_shards, run.shard_rows)
    folder = run.run_dir / PLOTS_NAME
    folder.mkdir(exist_ok=True)
    paths = []
    for stem, drawn in figures.items():
        paths.append(folder / f"{stem}.png")
        write_atomic(paths[-1], to_png(drawn))
    return paths, figures


def write_report(run_dir: Path, out: Path | None = None, no_pictures: str | None = None) -> Path:
    """Write plots/*.png and report.html: one file, light and dark, printable, without scripts or network.

    Works at any time of a run: what has not happened yet is left out.

    Args:
        run_dir: the run folder.
        out: where to; None: report.html in the run folder.
        no_pictures: why pictures of the features could not be drawn; the page says so where there are none.
    """
    run = load_run(Path(run_dir))
    _, figures = _write_plots(run)
    path = out or run.run_dir / REPORT_NAME
    svgs = {stem: to_svg(figure) for stem, figure in figures.items()}
    write_atomic(path, build_page(run, svgs, no_pictures).encode())
    return path


def summary_table(run_dir: Path) -> str:
    """The last evaluation as text for the console: untrained, student, teacher on every data set; '' without one."""
    run = load_run(Path(run_dir))
    lines = []
    for dataset in datasets_of(run.rows):
        models = run.evaluation(dataset)
        shown = [measure for measure in COLUMNS if any(is_number(row.get(measure[0])) for row in models.values())]
        lines.append(f"{dataset:<20}" + "".join(f"  {title:>14}" for _, title, _ in shown))
        for model, row in models.items():
            cells = [f"  {format_cell(row, name, form):>{max(14, len(title))}}" for name, title, form in shown]
            lines.append(f"  {MODELS[model]:<18}{''.join(cells)}")
        if passes_teacher(models):
            lines += _wrapped(PASSING_NOTE)
        if has_collapsed(models.get("student", {})):
            lines += _wrapped(COLLAPSE_NOTE)
    return "\n".join(lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, width=100, initial_indent="  ", subsequent_indent="  ")
