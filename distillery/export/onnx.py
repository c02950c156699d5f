"""Export a student to ONNX with a dynamic batch; compare it with PyTorch before the file gets its final name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

ONNX_TOLERANCE = 1e-4
OTHER_FORMATS = "Take another format, e.g. --format safetensors"


# field of Features -> output, in the student's own space and in its teacher's
OWN_OUTPUTS = {"pooled": "features"}
TEACHER_OUTPUTS = {"pooled": "pooled", "tokens": "tokens"}


def build_onnx(module: nn.Module, names: Mapping[str, str] = OWN_OUTPUTS) -> bytes:
    """An ONNX model: "images" float32 [batch, 3, H, W] -> an output for each field that the module gives.

    It is checked by onnx.checker, and compared with PyTorch where onnxruntime is installed.

    Args:
        module: a Backbone in eval mode, or a TeacherSpace of one.
        names: field of Features -> name of the output, in their order.
    Raises:
        UserError: a package is missing, the exporter cannot take the model, or the result differs.
    """
    import torch

    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it, and says so less plainly
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}, which is not installed. Run: pip install onnx onnxscript"
        ) from error
    backbone = getattr(module, "student", module)
    fields = [field for field in names if field in module.widths]
    generator = torch.Generator().manual_seed(0)
    traced_on, compared_on = (torch.randn(batch, 3, *backbone.img_size, generator=generator) for batch in (2, 3))
    try:
        content, is_dynamic = _trace(module, traced_on, {field: names[field] for field in fields})
        onnx.checker.check_model(content)
    except Exception as error:  # whatever a model's code raises when it is run without numbers
        raise UserError(
            f"{type(backbone.model).__name__} cannot be written as ONNX by torch {torch.__version__}: "
            f"{_first_cause(error)}. {OTHER_FORMATS}"
        ) from error
    if not is_dynamic:
        raise UserError(
            f"{type(backbone.model).__name__} cannot be written as ONNX for any batch size: its code makes a constant "
            f"of the one it is traced with, e.g. by len(images). {OTHER_FORMATS}"
        )
    compare_onnx(module, content, compared_on, fields)
    return content


def _trace(module: nn.Module, images: Tensor, names: Mapping[str, str]) -> tuple[bytes, bool]:
    """The model, and whether its batch size is open."""
    import torch

    from distillery.export.plain_attention import PlainAttention

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            with PlainAttention():
                given = self.module(images).tensors()
            return tuple(given[field] for field in names)

    program = torch.onnx.export(
        Outputs().eval(),
        (images,),
        input_names=["images"],
        output_names=list(names.values()),
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    proto = program.model_proto
    return proto.SerializeToString(), bool(proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param)


def _first_cause(error: BaseException) -> str:
    """The first line of what went wrong first: around it the exporter wraps a hundred lines of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\x1b\[\d+m", "", lines[0] if lines else "").strip().rstrip(".")
    return f"{type(error).__name__}: {text}"[:300]


def compare_onnx(module: nn.Module, content: bytes, images: Tensor, fields: Sequence[str] = ("pooled",)) -> None:
    """Run both on a batch of another size than the traced one; without onnxruntime there is nothing to compare.

    Args:
        module: images -> Features.
        content: the ONNX model.
        images: [B, 3, H, W].
        fields: of Features, in the order of the model's outputs.
    Raises:
        UserError: they differ, or onnxruntime cannot run the model.
    """
    import torch

    try:
        import onnxruntime
    except ImportError:
        return
    try:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        theirs = [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise UserError(f"onnxruntime cannot run the ONNX model: {_first_cause(error)}. {OTHER_FORMATS}") from error
    with torch.no_grad():
        given = module(images).tensors()
    pairs = [(given[field], output) for field, output in zip(fields, theirs, strict=True)]
    difference = max(((b - a).abs().max() / a.abs().max().clamp(min=1e-12)).item() for a, b in pairs)
    if not difference <= ONNX_TOLERANCE:
        raise UserError(
            f"the ONNX model differs from PyTorch by {difference:.1e} of the largest feature, at most "
            f"{ONNX_TOLERANCE:.0e} is allowed: it is not written. {OTHER_FORMATS}"
        )
