"""The HTML page of a run's report: a function per part, each "" where there is nothing to show yet."""

import html
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from distillery.progress import format_seconds
from distillery.report_facts import (
    COLLAPSE_NOTE,
    MEASURES,
    MODELS,
    PASSING_NOTE,
    RunFacts,
    format_measure,
    has_collapsed,
    passes_teacher,
    summary_sentences,
)
from distillery.report_plots import COLOURS, datasets_of, is_number, of_kind

CAPTIONS = {
    "knn": "Images are classified by their {k} nearest labelled neighbours in feature space.",
    "linear": "Logistic regression on the frozen features.",
    "effective_rank": "How many dimensions the features use (RankMe). Near 1 the features have collapsed.",
    "loss": "What the optimiser sees. Where there are many steps the line is a mean and the band its range.",
    "learning_rate": "A warm-up, then a cosine.",
    "grad_norm": "The optimiser clips it to max_grad_norm.",
    "throughput": "Over all processes. Waiting for data should stay below one percent.",
    "shards": "A run that leaves shards out has not seen all of the data.",
}


def build_page(run: RunFacts, pictures: dict[str, str]) -> str:
    """The whole HTML page; pictures: stem -> <svg> text."""
    title = _title(run)
    css = Path(__file__).with_name("report.css").read_text()
    body = "\n".join(
        [
            f"<h1>{_text(title)}</h1>",
            _state_html(run),
            _summary_html(run),
            _tiles_html(run),
            _results_html(run),
            _charts_html(run, pictures),
            _history_html(run),
            _config_html(run),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # without this a browser asks the server for /favicon.ico
        '<link rel="icon" href="data:,">\n'
        f"<title>{_text(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f"<footer>Run folder <code>{_text(str(run.run_dir))}</code>. Made by "
        "<code>python -m distillery.report</code>; the figures come from metrics.jsonl.</footer>\n"
        "</main>\n</body>\n</html>\n"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))


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
        dot, word = "stopped", f"Interrupted by {_text(ended[-1].get('reason', 'a signal'))}"
    else:
        dot, word = "going", f"Under way at {_clock(last)} UTC"
    position = f"step {step:,}" + (f" of {total:,} ({step / total:.0%})" if total else "")
    times = f", {format_seconds(run.seconds)} of training" if run.seconds >= 1 else ""
    num_resumes = len(run.resumes)
    resumed = f", resumed {'once' if num_resumes == 1 else f'{num_resumes} times'}" if num_resumes else ""
    return f'<p class="state"><span class="dot {dot}"></span><b>{word}</b>: {position}{times}{resumed}</p>'


def _summary_html(run: RunFacts) -> str:
    return f'<p class="lead">{" ".join(_text(sentence) for sentence in summary_sentences(run))}</p>'


def _tiles_html(run: RunFacts) -> str:
    tiles = []
    for dataset in datasets_of(run.rows)[:1]:
        models = run.evaluation(dataset)
        for model in ("student", "teacher", "untrained"):
            if is_number(models.get(model, {}).get("knn_top1")):
                tiles.append((MODELS[model], f"{models[model]['knn_top1']:.1%}", f"k-NN, {dataset}", model))
    if run.train_rows:
        last = run.train_rows[-1]
        if is_number(last.get("loss")):
            tiles.append(("loss", f"{last['loss']:.4g}", f"at step {last['step']:,}", ""))
        speeds = [row["images_per_second"] for row in run.train_rows if is_number(row.get("images_per_second"))]
        waits = [row["data_wait_fraction"] for row in run.train_rows if is_number(row.get("data_wait_fraction"))]
        if speeds:
            waiting = f"{sorted(waits)[len(waits) // 2]:.1%} waiting for data" if waits else "median"
            tiles.append(("images per second", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", waiting, ""))
    cells = "".join(
        f'<div class="tile"><dt>{_text(name)}</dt>'
        f'<dd class="{kind}">{_text(value)}<small>{_text(note)}</small></dd></div>'
        for name, value, note, kind in tiles
    )
    return f'<dl class="tiles">{cells}</dl>' if cells else ""


def _results_html(run: RunFacts) -> str:
    blocks = [_result_table_html(dataset, run.evaluation(dataset)) for dataset in datasets_of(run.rows)]
    return "<h2>Results</h2>\n" + "\n".join(blocks) if blocks else ""


def _result_table_html(dataset: str, models: dict[str, dict[str, Any]]) -> str:
    shown = [measure for measure in MEASURES if any(is_number(row.get(measure[0])) for row in models.values())]
    head = "".join(f"<th>{title}</th>" for _, title, _ in shown)
    teacher = models.get("teacher", {}).get("knn_top1")
    lines = []
    for model, row in models.items():
        cells = "".join(f"<td>{_measure_html(row, name, form, model)}</td>" for name, _, form in shown)
        share = f"{row['knn_top1'] / teacher:.0%}" if teacher and is_number(row.get("knn_top1")) else "-"
        step = f"{row['step']:,}" if model.startswith("student") else "-"
        lines.append(f'<tr><th class="{model}">{MODELS[model]}</th>{cells}<td>{share}</td><td>{step}</td></tr>')
    table = (
        f'<div class="card scroll"><table><thead><tr><th>{_text(dataset)}</th>{head}<th>k-NN, share of teacher</th>'
        f"<th>at step</th></tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
    notes = f'<p class="note">{PASSING_NOTE}</p>' if passes_teacher(models) else ""
    if has_collapsed(models.get("student", {})):
        notes += f'<p class="warn">{COLLAPSE_NOTE}</p>'
    return table + notes


def _measure_html(row: dict[str, Any], name: str, form: str, model: str) -> str:
    text = format_measure(row, name, form)
    if name != "knn_top1" or text == "-":
        return text
    return f'{text}<span class="bar {model}"><i style="width:{100 * row[name]:.1f}%"></i></span>'


def _charts_html(run: RunFacts, pictures: dict[str, str]) -> str:
    if not pictures:
        return ""
    figures = "\n".join(
        f'<figure class="card">{themed_svg(svg, f"p{number}")}<figcaption>{_caption(stem, run)}</figcaption></figure>'
        for number, (stem, svg) in enumerate(pictures.items())
    )
    return f'<h2>Curves</h2>\n<div class="charts">\n{figures}\n</div>'


def _caption(stem: str, run: RunFacts) -> str:
    kind = max((name for name in CAPTIONS if stem == name or stem.startswith(f"{name}_")), key=len)
    return CAPTIONS[kind].format(k=run.get("train", "knn_k") or "k")


def themed_svg(svg: str, prefix: str) -> str:
    """A picture for the page: colours as CSS variables, and ids that no other picture on the page has."""
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href="|url\()#', rf"\g<1>#{prefix}-", svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # a size in points would overrule the column it stands in
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r'\1 role="img"', svg, count=1)


def _history_html(run: RunFacts) -> str:
    if not run.resumes:
        return ""
    cells = "".join(f"<tr><td>{_clock(row['time'])}</td><td>step {row['step']:,}</td></tr>" for row in run.resumes)
    return (
        "<h2>Interruptions</h2>\n"
        "<p>The run went on from a checkpoint at these points (dotted lines in the curves).</p>\n"
        '<div class="card scroll narrow"><table><thead><tr><th>resumed (UTC)</th><th>from</th></tr></thead>'
        f"<tbody>{cells}</tbody></table></div>"
    )


def _clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def _config_html(run: RunFacts) -> str:
    blocks = []
    for section, values in run.config.items():
        lines = "".join(
            f"<tr><td><code>{_text(key)}</code></td><td><code>{_text(_yaml_value(value))}</code></td></tr>"
            for key, value in values.items()
        )
        blocks.append(f'<details class="card"><summary>{_text(section)}</summary><table>{lines}</table></details>')
    return "<h2>Configuration</h2>\n" + "\n".join(blocks) if blocks else ""


def _yaml_value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | bool) or value is None else str(value)
