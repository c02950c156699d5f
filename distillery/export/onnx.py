"""Export the backbone to ONNX with a dynamic batch; compare it with PyTorch before the file gets its final name."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from distillery.models.backbone import Backbone

ONNX_TOLERANCE = 1e-4
OTHER_FORMATS = "Take another format, e.g. --format safetensors"


def build_onnx(backbone: Backbone) -> bytes:
    """The pooled features as an ONNX model: "images" float32 [batch, 3, H, W] -> "features" [batch, D].

    It is checked by onnx.checker, and compared with PyTorch where onnxruntime is installed.

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
    generator = torch.Generator().manual_seed(0)
    traced_on, compared_on = (torch.randn(batch, 3, *backbone.img_size, generator=generator) for batch in (2, 3))
    try:
        content, is_dynamic = _trace(backbone, traced_on)
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
    compare_onnx(backbone, content, compared_on)
    return content


def _trace(backbone: Backbone, images: Tensor) -> tuple[bytes, bool]:
    """The model, and whether its batch size is open."""
    import torch

    from distillery.export.plain_attention import PlainAttention

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, images: Tensor) -> Tensor:
            with PlainAttention():
                return self.backbone(images).pooled

    program = torch.onnx.export(
        Pooled().eval(),
        (images,),
        input_names=["images"],
        output_names=["features"],
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


def compare_onnx(backbone: Backbone, content: bytes, images: Tensor) -> None:
    """Run both on a batch of another size than the traced one; without onnxruntime there is nothing to compare.

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
        theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise UserError(f"onnxruntime cannot run the ONNX model: {_first_cause(error)}. {OTHER_FORMATS}") from error
    with torch.no_grad():
        ours = backbone(images).pooled
    difference = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12)).item()
    if not difference <= ONNX_TOLERANCE:
        raise UserError(
            f"the ONNX model differs from PyTorch by {difference:.1e} of the largest feature, at most "
            f"{ONNX_TOLERANCE:.0e} is allowed: it is not written. {OTHER_FORMATS}"
        )
