"""The ONNX export of one student: trace it, make it smaller, compare it with PyTorch on real images, describe it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from distillery.export.onnx import (
    INPUT_NAME,
    OUTPUT_NAMES,
    GraphError,
    OnnxModel,
    at_any_size,
    build_onnx,
    find_backbone,
    noise,
    open_session,
    run_session,
)
from distillery.export.parity import HEADINGS, Agreement, as_dicts, check_limits, measure_agreement, table_rows
from distillery.export.quantise import PRECISIONS, to_float16, to_int8
from distillery.export.run_images import ImageRows, find_images, noise_rows
from distillery.system.console import format_bytes
from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from distillery.training.trained import TrainedStudent

CALIBRATION_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class OnnxOptions:
    """What the flags of --format onnx say.

    precision: fp32, fp16 or int8. calibration_images: for int8; None: 256. min_cosine: in place of the precision's own
    limits, what the mean cosine of every output must reach.
    """

    precision: str = "fp32"
    calibration_images: int | None = None
    min_cosine: float | None = None

    def check(self, format: str) -> None:
        """Refuse flags that would have no effect.

        Raises:
            UserError: a flag is given that this format or precision has no use for, or is out of its range.
        """
        if self.precision not in PRECISIONS:
            raise UserError(f"unknown precision {self.precision!r}; known: {', '.join(PRECISIONS)}")
        if format != "onnx" and self != OnnxOptions():
            raise UserError(
                "--precision, --calibration_images and --min_cosine belong to ONNX, and this is --format "
                f"{format}: add --format onnx, or leave them out"
            )
        if self.calibration_images is not None and self.precision != "int8":
            raise UserError(
                f"--calibration_images is for --precision int8, and this is {self.precision}: add --precision int8, or "
                "leave it out"
            )
        if self.calibration_images is not None and self.calibration_images < 1:
            raise UserError(f"--calibration_images is {self.calibration_images}; it must be 1 or more")
        if self.min_cosine is not None and not -1 <= self.min_cosine <= 1:
            raise UserError(f"--min_cosine is {self.min_cosine}; a cosine is between -1 and 1")


def make_onnx(
    trained: TrainedStudent, module: nn.Module, space: Literal["backbone", "teacher"], options: OnnxOptions
) -> tuple[bytes, dict[str, Any]]:
    """(model.onnx, what config.json and the card say about it); the comparison with PyTorch is printed.

    Args:
        trained: takes images normalised with its own mean and std.
        module: its backbone, or it in its teacher's space.
        space: "backbone": outputs features, and tokens where the model gives patches; "teacher": pooled and tokens, as
            far as the run has their heads.
        options: checked.
    Raises:
        UserError: a package, head or cache is missing, the model cannot be written, or the graph is outside a limit.
    """
    has_runtime = _has_runtime(options)
    num_calibration = (options.calibration_images or CALIBRATION_IMAGES) if options.precision == "int8" else 0
    calibration, compared = find_images(trained.config["data"], trained.backbone, num_calibration)
    if num_calibration and calibration is None:
        raise UserError(
            "--precision int8 is calibrated with images of the run's cache, and there is none at "
            f"{trained.config['data']['cache_dir']}. Make it again: python precompute_cache.py --data_config ..., or "
            "take --precision fp16"
        )
    model = build_onnx(module, OUTPUT_NAMES[space])
    content = _in_precision(model.content, options.precision, calibration)
    facts = _describe(model, options.precision, calibration, len(content))
    if model.fixed_because:
        height, width = model.input_shape[2:]
        print(f"height and width are fixed at {height} x {width} px: {model.fixed_because}")
    if not has_runtime:
        print("not compared with PyTorch: onnxruntime is not installed (pip install onnxruntime)")
        return content, facts
    compared, rows = _compare(content, module, model, compared, num_calibration)
    print("\n".join(format_agreement(rows, options.precision, compared, len(content))))
    check_limits(rows, options.precision, options.min_cosine)
    if options.precision != "fp32":
        _check_other_sizes(content, module, model)
    return content, facts | {"compared_on": compared.where, "agreement": as_dicts(rows)}


def _compare(
    content: bytes, module: nn.Module, model: OnnxModel, compared: ImageRows, num_calibration: int
) -> tuple[ImageRows, list[Agreement]]:
    """(what it was compared on, the agreement): noise where images cannot be read and none is needed."""
    try:
        return compared, measure_agreement(content, module, model.fields, compared, neighbours=compared.have_neighbours)
    except UserError as error:
        if num_calibration or isinstance(error, GraphError):
            raise
        instead = noise_rows(compared.backbone, error)
        return instead, measure_agreement(content, module, model.fields, instead, neighbours=False)


def _has_runtime(options: OnnxOptions) -> bool:
    try:
        import onnxruntime  # noqa: F401
    except ImportError as error:
        asked = "--min_cosine" if options.precision == "fp32" else f"--precision {options.precision}"
        if options != OnnxOptions():
            raise UserError(
                f"{asked} needs the package onnxruntime, which is not installed. Run: pip install onnxruntime"
            ) from error
        return False
    return True


def _in_precision(content: bytes, precision: str, calibration: ImageRows | None) -> bytes:
    if precision == "fp16":
        return to_float16(content)
    return content if calibration is None else to_int8(content, calibration)


def _check_other_sizes(content: bytes, module: nn.Module, model: OnnxModel) -> None:
    """The smaller graph still runs at the sizes that the float32 one was compared at.

    Raises:
        UserError: it does not.
    """
    import torch

    session = open_session(content)
    with at_any_size(find_backbone(module)), torch.no_grad():
        for size in model.sizes_checked:
            images = noise(1, size)
            ours = module(images).tensors()
            for name, values in run_session(session, images).items():
                if values.shape != (expected := ours[model.fields[name]].shape):
                    raise UserError(
                        f"at {size[0]} x {size[1]} px the smaller ONNX model gives {name} {list(values.shape)}, not "
                        f"{list(expected)}. Take --precision fp32"
                    )


def _describe(model: OnnxModel, precision: str, calibration: ImageRows | None, num_bytes: int) -> dict[str, Any]:
    sizes = {"sizes_checked": [list(size) for size in model.sizes_checked]}
    return {
        "precision": precision,
        "opset": model.opset,
        "bytes": num_bytes,
        "input": {"name": INPUT_NAME, "type": "float32", "shape": list(model.input_shape)},
        "outputs": [{"name": name, "type": "float32", "shape": list(shape)} for name, shape in model.outputs.items()],
        **({"size_fixed_because": model.fixed_because} if model.fixed_because else sizes),
        **({"calibrated_with": calibration.where} if calibration else {}),
    }


def format_agreement(rows: list[Agreement], precision: str, compared: ImageRows, num_bytes: int) -> list[str]:
    """The lines of the table for the terminal."""
    cells = [HEADINGS, *table_rows(rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return [f"{precision}, {format_bytes(num_bytes)}, against PyTorch on {compared.where}:", *lines]


def usage(facts: dict[str, Any]) -> str:
    """Python for the card: from `images` to the outputs."""
    names = [output["name"] for output in facts["outputs"]]
    targets = ", ".join(names) if len(names) > 1 else f"({names[0]},)"
    return (
        "import onnxruntime\n\n"
        'session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])\n'
        f'{targets} = session.run({names!r}, {{"{facts["input"]["name"]}": images}})\n'.replace("'", '"')
    )


def card_section(facts: dict[str, Any]) -> str:
    """For the card: inputs and outputs, and how near the graph comes to PyTorch."""
    shapes = [("input", facts["input"]), *(("output", output) for output in facts["outputs"])]
    lines = ["## ONNX", "", "| | name | shape |", "|---|---|---|"]
    lines += [f"| {kind} | `{one['name']}` | {one['type']} `{_shape_text(one['shape'])}` |" for kind, one in shapes]
    if "size_fixed_because" in facts:
        sizes = f"`batch` is any number. Height and width are fixed: {facts['size_fixed_because']}."
    else:
        checked = " and ".join(f"{height} x {width}" for height, width in facts["sizes_checked"])
        sizes = (
            "`batch`, `height` and `width` are any that the model takes; compared with PyTorch in float32 at "
            f"{checked} px too. `patches` are the cells of its grid, row by row."
        )
    calibrated = f", calibrated with {facts['calibrated_with']}" if "calibrated_with" in facts else ""
    lines += ["", f"{facts['precision']}{calibrated}; {format_bytes(facts['bytes'])}; opset {facts['opset']}. {sizes}"]
    return "\n".join([*lines, "", *_agreement_lines(facts)])


def _shape_text(shape: list[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _agreement_lines(facts: dict[str, Any]) -> list[str]:
    if "agreement" not in facts:
        return ["Not compared with PyTorch: onnxruntime was not installed."]
    cells = [HEADINGS, ("---",) * len(HEADINGS), *table_rows(Agreement(**row) for row in facts["agreement"])]
    return [
        f"Against PyTorch in float32 on {facts['compared_on']} (difference: share of the largest value; cosines of "
        "images or patches; agreement: share of the 10 nearest that are the same):",
        "",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
