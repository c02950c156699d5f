"""README.md of an exported student: what it is, how to load it, what it was trained on, what it scores."""

import json
from pathlib import Path
from typing import Any

from distillery.metrics import METRICS_NAME, read_rows


def build_card(run_dir: Path, config: dict[str, Any], weights_name: str) -> str:
    """The card's text.

    Args:
        run_dir: the run, for its results and the fingerprint of its data.
        config: the config.json of the export.
        weights_name: "model.safetensors" or "model.onnx".
    """
    facts = config["distillation"]
    library = "timm" if facts["student_source"] == "timm" else "pytorch"
    losses = ", ".join(f"{weight:g} x {name}" for name, weight in facts["losses"].items() if weight)
    size = config["pretrained_cfg"]["input_size"]
    parts = [
        # nobody but the user knows the licences of the teacher's weights and of the images
        f"---\nlibrary_name: {library}\nlicense: unknown\n"
        "tags:\n- image-feature-extraction\n- knowledge-distillation\n---",
        f"# {config['architecture']}, distilled from {facts['teacher']}",
        f"An image feature extractor with {config['num_features']} dimensions, trained without labels to produce the "
        f"features of {facts['teacher']} ({facts['teacher_source']}) on images of {facts['dataset']}. "
        "Set `license` above once the licences of the teacher's weights and of the images are checked.",
        "## Use",
        f"```python\n{_usage(config, weights_name)}```",
        f"Input: float32 `[batch, {', '.join(map(str, size))}]`, RGB in 0..1, then `(x - mean) / std` with "
        f"mean {config['pretrained_cfg']['mean']} and std {config['pretrained_cfg']['std']}.",
        "## Training",
        f"{facts['step']:,} steps; losses {losses}; {facts['weights']} weights{_fingerprint(run_dir)}.",
        _results(run_dir, facts["step"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _usage(config: dict[str, Any], weights_name: str) -> str:
    if weights_name.endswith(".onnx"):
        return (
            "import onnxruntime\n\n"
            f'session = onnxruntime.InferenceSession("{weights_name}")\n'
            'features = session.run(["features"], {"images": images})[0]\n'
        )
    features = f"features = {config['distillation']['features'] or '...'}\n"
    if config["distillation"]["student_source"] != "timm":
        return (
            "from safetensors.torch import load_file\n\n"
            f"model = ...  # {config['architecture']} from {config['distillation']['student_source']}, "
            f"arguments {config['model_args']}\n"
            f'model.load_state_dict(load_file("{weights_name}"))\n'
            f"model.eval()\n{features}"
        )
    arguments = "".join(f"    {name}={value!r},\n" for name, value in config["model_args"].items())
    return (
        "import timm\n\n"
        f'model = timm.create_model(\n    "{config["architecture"]}",\n    num_classes=0,\n{arguments}'
        f'    checkpoint_path="{weights_name}",\n).eval()\n{features}'
    )


def _fingerprint(run_dir: Path) -> str:
    path = run_dir / "shards.json"
    if not path.exists():
        return ""
    content = json.loads(path.read_bytes())
    return f"; data fingerprint `{content['fingerprint']}` ({len(content['shards'])} shards)"


def _results(run_dir: Path, step: int) -> str:
    """A table of the evaluations that belong to the exported step; '' without any."""
    rows = [row for row in read_rows(run_dir / METRICS_NAME) if row.get("kind") == "eval"]
    rows = [row for row in rows if row.get("model") in ("untrained", "teacher") or row.get("step") == step]
    if not any(str(row.get("model")).startswith("student") for row in rows):
        return ""
    lines = ["## Results", "", "| data set | model | k-NN | linear probe |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[name]:.1%}" if row.get(name) is not None else "-" for name in ("knn_top1", "linear_top1")]
        lines.append(f"| {row.get('dataset')} | {row.get('model')} | {' | '.join(cells)} |")
    return "\n".join(lines)
