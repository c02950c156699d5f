"""What the card and config.json of a student in its teacher's space say beside the rest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.export import onnx_export
from distillery.export.results import closeness
from distillery.export.student import hub_folder
from distillery.losses.registry import LOSSES

if TYPE_CHECKING:
    from distillery.export.student import Student
    from distillery.losses.teacher_space import TeacherSpace

# field of Features -> what it is called in a sentence
_NAMES = {"pooled": "the image feature", "tokens": "the patch tokens"}
# LossTerm.fixes -> what that means for one who uses the outputs; the first that a field's losses have counts
_SCALES = {
    "values": "",
    "directions": "Of {output} the losses fix no scale: measured from {origin}, the directions are the teacher's, the "
    "lengths are not.",
    "channels": "Of {output} the losses fix no scale: each {channel} rises and falls with the teacher's, at a scale "
    "and an offset of its own.",
    "relations": "Of {output} the losses fix neither direction nor scale, only how alike two of them are: do not put "
    "them beside the teacher's.",
}
# what was undone in the heads -> what the losses saw: from where directions count, and what a channel was
_SEEN = {
    True: {"origin": "the teacher's mean", "channel": "channel"},
    "phi_s": {"origin": "the teacher's mean", "channel": "channel of the rotated features"},
    False: {"origin": "zero", "channel": "channel"},
}
_UNDONE = {
    True: "The heads were trained towards targets of which each channel had its mean subtracted and was divided by its "
    "standard deviation (`standardise_targets: true`). This is undone in the last layer of each head",
    "phi_s": "The heads were trained towards targets that were rotated and divided by one scale (PHI-S, "
    "`standardise_targets: phi_s`), after their mean was subtracted. This is undone in the last layer of each head",
    False: "The heads were trained towards the teacher's features as they are, so nothing had to be undone",
}


def describe_space(student: Student, space: TeacherSpace) -> dict[str, Any]:
    """What config.json says of the outputs: their widths, the student's grid, what was undone in the heads."""
    method = student.config["train"].get("standardise_targets", True)
    return {
        "space": "teacher",
        "outputs": space.widths,
        "grid": list(student.backbone.grid),
        "standardisation_undone": method if student.trained.statistics else False,
        "heads": "averaged" if student.trained.heads_are_averaged else "last",
        "use_cls_token": student.config["model"]["use_cls_token"],
        "teacher_projection": student.config["model"].get("teacher_projection", False),
        "teacher_mirror": student.config["model"].get("teacher_mirror", False),
        "hub_code": hub_folder(student.config["model"]) is not None,
    }


def reservations(facts: dict[str, Any]) -> list[str]:
    """A sentence for each output that is not there, and one where the heads are not of the student's own weights.

    Args:
        facts: config["distillation"] of the export.
    """
    sentences = [
        f"`{field}` is left out: no loss of the run compares {name}, so there is no head that gives them."
        for field, name in {"pooled": "image features", "tokens": "patch tokens"}.items()
        if field not in facts["outputs"]
    ]
    if facts["heads"] != facts["weights"]:
        sentences.append(
            f"The student's weights are {facts['weights']}, those of its heads are the {facts['heads']}: the run is of "
            "a version that did not average heads. With `--weights student` both are the last."
        )
    return sentences


def introduction(config: dict[str, Any]) -> list[str]:
    """The title and the first paragraph."""
    facts = config["distillation"]
    given = " and ".join(_NAMES[field] for field in facts["outputs"])
    return [
        f"# {config['architecture']} in the place of {facts['teacher']}",
        f"It gives {given} of {facts['teacher']} ({facts['teacher_source']}), as well as it has learnt them without "
        f"labels on images of {facts['dataset']}, in the units of the teacher's own features: an index, a classifier "
        "or a decoder made for these can be used with it.",
    ]


def usage_in_teacher_space(config: dict[str, Any], format: str) -> str:
    """How the export is loaded, and what comes out."""
    facts = config["distillation"]
    source = "class token or attention pooling where it has one, else its own pooling"
    if facts["teacher_projection"]:
        source = "feature after its projection into text space"
    elif not facts["use_cls_token"]:
        source = "mean of patch tokens, or its own pooling"
    if facts["teacher_mirror"]:
        source += ", the mean over image and mirror image"
    height, width = config["pretrained_cfg"]["input_size"][1:]
    rows, columns = facts["grid"]
    texts = {
        "pooled": f"the image feature (the teacher's {source})",
        "tokens": f"the patch tokens, row by row on the student's grid: {rows} x {columns} for {height} x {width} px",
    }
    if format == "onnx":
        shapes = {output["name"]: output["shape"] for output in config["onnx"]["outputs"]}
    else:
        between = {"pooled": [], "tokens": [rows * columns]}
        shapes = {field: ["batch", *between[field], wide] for field, wide in facts["outputs"].items()}
    lines = [f"- `{field}` [{', '.join(map(str, shape))}]: {texts[field]}." for field, shape in shapes.items()]
    note = "" if format == "onnx" else f"Images of another size are resized to {height} x {width} px."
    code = onnx_export.usage(config["onnx"]) if format == "onnx" else _code(facts, format)
    return "\n\n".join(filter(None, [f"```python\n{code}```", "\n".join(lines), *reservations(facts), note]))


def _code(facts: dict[str, Any], format: str) -> str:
    is_hub = format == "huggingface"
    needs = ["import sys", "", "import torch", *(["from huggingface_hub import snapshot_download"] if is_hub else [])]
    where = 'snapshot_download("USER/NAME")' if is_hub else '"."  # the path of this folder'
    return "\n".join(
        [
            *needs,
            "",
            f"folder = {where}",
            "sys.path.insert(0, folder)",
            "from student import load_student",
            "",
            "model = load_student(folder)",
            "with torch.no_grad():",
            f"    outputs = model(images)  # {', '.join([*facts['outputs'], 'grid'])}",
            "",
        ]
    )


def closeness_section(config: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """How close the outputs are to the teacher's: what was undone, what the losses leave open, the figures.

    Args:
        config: of the export.
        rows: rows_of the run.
    """
    from distillery.training.checkpoints import checkpoint_path

    facts = config["distillation"]
    table = closeness(rows)
    if table:
        table = f"On the test images of the run's evaluation sets:\n\n{table}"
    # with the step: the run may go on, and figures of its newest checkpoint would be of another student
    missing = (
        "How close the outputs are has not been measured: `python -m distillery.evaluate --run DIR --checkpoint "
        f"{checkpoint_path(Path('DIR'), facts['step'])}` does it on the run's `eval_datasets`, which it needs. "
        "The next export has the figures."
    )
    return [
        "## How close it is to the teacher",
        f"{_UNDONE[facts['standardisation_undone']]}.",
        *scale_remarks(facts),
        table or missing,
    ]


def scale_remarks(facts: dict[str, Any]) -> list[str]:
    """A sentence for each output whose losses leave its scale, or more, open."""
    fixed = {field: set() for field in facts["outputs"]}
    for name, weight in facts["losses"].items():
        if weight and LOSSES[name].field in fixed:
            fixed[LOSSES[name].field].add(LOSSES[name].fixes)
    kinds = {field: next(kind for kind in _SCALES if kind in of) for field, of in fixed.items()}
    seen = _SEEN[facts["standardisation_undone"]]
    return [_SCALES[kind].format(output=f"`{field}`", **seen) for field, kind in kinds.items() if _SCALES[kind]]
