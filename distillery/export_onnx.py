"""A student's backbone as an ONNX model with a dynamic batch, compared with PyTorch before it gets its name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distillery.files import write_atomic
from distillery.process import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from distillery.models import Backbone

ONNX_TOLERANCE = 1e-4


def write_onnx(backbone: Backbone, path: Path) -> None:
    """Write the pooled features as an ONNX model: "images" float32 [batch, 3, H, W] -> "features" [batch, D].

    It is checked before it gets its name: by onnx.checker, and against PyTorch where onnxruntime is installed.

    Raises:
        UserError: a package is missing.
    """
    import torch

    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it, and says so less plainly
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}, which is not installed. Run: pip install onnx onnxscript"
        ) from error

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, images: Tensor) -> Tensor:
            return self.backbone(images).pooled

    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, *backbone.img_size, generator=generator)
    program = torch.onnx.export(
        Pooled().eval(),
        (images,),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        dynamo=True,
        verbose=False,
    )
    content = program.model_proto.SerializeToString()
    onnx.checker.check_model(content)
    compare_onnx(backbone, content, torch.randn(3, 3, *backbone.img_size, generator=generator))
    write_atomic(path, content)


def compare_onnx(backbone: Backbone, content: bytes, images: Tensor) -> None:
    """Run both on a batch of another size than the traced one; without onnxruntime there is nothing to compare.

    Raises:
        RuntimeError: they differ.
    """
    import torch

    try:
        import onnxruntime
    except ImportError:
        return
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    theirs = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    with torch.no_grad():
        ours = backbone(images).pooled
    difference = ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12)).item()
    if difference > ONNX_TOLERANCE:
        raise RuntimeError(f"the ONNX model differs from PyTorch by {difference:.1e} of the largest feature")
