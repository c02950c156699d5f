"""Trace a student as an ONNX graph: any batch size, any height and width where the model takes them.

The graph holds the raw model and, in the teacher's space, the folded heads. It neither resizes nor normalises: images
come at a size that the model takes, normalised with the student's own mean and std.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.models.backbone import Backbone

# field of Features -> output of the graph; "features" is the name that users of the first version know
OUTPUT_NAMES = {
    "backbone": {"pooled": "features", "tokens": "tokens"},
    "teacher": {"pooled": "pooled", "tokens": "tokens"},
}
INPUT_NAME = "images"
OTHER_FORMATS = "Take another format, e.g. --format safetensors"
# of the largest value: two float32 programs of one model
EXACT = 1e-4


class GraphError(UserError):
    """onnxruntime cannot load a graph, or run it."""


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """A graph and what its user must know.

    input_shape: numbers, and names of the dimensions that are open. outputs: name -> shape, likewise. fields: output ->
    field of Features. sizes_checked: (height, width) in px, other than the student's own, at which the graph gave what
    PyTorch gives. fixed_because: why height and width are numbers; "" where they are open. opset: of ONNX.
    """

    content: bytes
    input_shape: tuple[int | str, ...]
    outputs: dict[str, tuple[int | str, ...]]
    fields: dict[str, str]
    sizes_checked: tuple[tuple[int, int], ...]
    fixed_because: str
    opset: int


def build_onnx(module: nn.Module, names: Mapping[str, str] = OUTPUT_NAMES["backbone"]) -> OnnxModel:
    """The graph of a module in float32: "images" [batch, 3, H, W] -> one output for each field that the module gives.

    Args:
        module: in eval mode; images -> Features. One Backbone is in it, or is it.
        names: field of Features -> name of the output; the order is that of the outputs.
    Raises:
        UserError: a package is missing, or the exporter cannot take the model with an open batch size.
    """
    import torch

    try:
        import onnx
        import onnxscript  # noqa: F401 - the exporter needs it, and says so less plainly
    except ImportError as error:
        raise UserError(
            f"--format onnx needs the package {error.name}, which is not installed. Run: pip install onnx onnxscript"
        ) from error
    backbone = find_backbone(module)
    images = noise(2, backbone.img_size)
    with torch.no_grad():
        given = module(images).tensors()
    fields = {names[field]: field for field in names if field in given}
    open_sizes, fixed_because = _sizes_of_pytorch(module, fields)
    if open_sizes:
        try:
            with at_any_size(backbone):
                proto = _trace(module, images, fields, open_size=True)
                fixed_because = _why_not_open(module, fields, proto.SerializeToString(), open_sizes)
        except Exception as error:  # whatever a model's code raises when it is run without numbers
            if _is_about_batch(error):
                raise _refusal(backbone, error) from error
            fixed_because = f"with open sizes, {first_cause(error)}"
    if fixed_because:
        open_sizes = ()
    try:
        if not open_sizes:
            proto = _trace(module, images, fields, open_size=False)
        onnx.checker.check_model(proto)
        content = proto.SerializeToString()
    except Exception as error:
        raise _refusal(backbone, error) from error
    shapes = {value.name: _shape_of(value) for value in [*proto.graph.input, *proto.graph.output]}
    input_shape = shapes.pop(INPUT_NAME)
    opset = next(entry.version for entry in proto.opset_import if not entry.domain)
    return OnnxModel(content, input_shape, shapes, fields, open_sizes, fixed_because, opset)


def find_backbone(module: nn.Module) -> Backbone:
    """The student's backbone inside a module that gives Features."""
    from distillery.models.backbone import Backbone

    return next(part for part in module.modules() if isinstance(part, Backbone))


def noise(batch: int, size: tuple[int, int]) -> Tensor:
    """The same random images [batch, 3, H, W] at every call, in place of normalised ones."""
    import torch

    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def at_any_size(backbone: Backbone) -> Iterator[None]:
    """Meanwhile the raw model is given images as they are."""
    backbone.resizes = False
    try:
        yield
    finally:
        backbone.resizes = True


def _sizes_of_pytorch(module: nn.Module, fields: Mapping[str, str]) -> tuple[tuple[tuple[int, int], ...], str]:
    """(other sizes that the PyTorch model takes, "") or ((), why the graph must have the student's own)."""
    import torch

    backbone = find_backbone(module)
    # of such a padding the exporter makes formulas that grow with every layer: six minutes for an EfficientNet-B0
    if same := next((type(part).__name__ for part in module.modules() if type(part).__name__.endswith("Same")), None):
        return (), f"the padding of {same} depends on the size"
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return (), "onnxruntime, which is not installed, has to check other sizes"
    height, width = backbone.img_size
    taken, error = [], None
    with at_any_size(backbone), torch.no_grad():
        # another shape each: not square, and one that no stride divides
        for size in ((height + 32, width + 64), (height + 45, width + 19)):
            try:
                given = module(noise(1, size)).tensors()
                assert "tokens" not in fields.values() or given["tokens"].ndim == 3
                taken.append(size)
            except Exception as problem:  # of a size that was a guess
                error = error or problem
    if not taken:
        return (), f"the model takes no other size: {first_cause(error)}"
    return tuple(taken), ""


def _why_not_open(
    module: nn.Module, fields: Mapping[str, str], content: bytes, sizes: tuple[tuple[int, int], ...]
) -> str:
    """For people, why a graph with open sizes is of no use; "" where it gives PyTorch's values at each (height, width).

    What onnxruntime says of a graph that fails goes to standard error: it names nodes and lines of its own code.
    """
    import torch

    session = None
    for size in sizes:
        images, at = noise(1, size), f"at {size[0]} x {size[1]} px"
        with torch.no_grad():
            ours = module(images).tensors()
        try:
            session = session or open_session(content, quiet=True)
            theirs = run_session(session, images)
        except GraphError as error:
            print(f"onnxruntime, {at}: {first_cause(error)}", file=sys.stderr)
            return f"the graph traced with open sizes fails {at}"
        for name, values in theirs.items():
            if not (difference := relative_difference(values, ours[fields[name]])) <= EXACT:
                return f"the graph traced with open sizes gives other {name} {at} (they differ by {difference:.1e})"
    return ""


def _trace(module: nn.Module, images: Tensor, fields: Mapping[str, str], *, open_size: bool) -> Any:
    """The ModelProto, its batch size open."""
    import torch

    from distillery.export.plain_attention import PlainAttention

    class Outputs(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            with PlainAttention():
                given = self.module(images).tensors()
            return tuple(given[field] for field in fields.values())

    names = {0: "batch", 2: "height", 3: "width"} if open_size else {0: "batch"}
    dims = {place: torch.export.Dim(name, min=1 if place == 0 else None) for place, name in names.items()}
    traced = torch.onnx.export(
        Outputs().eval(),
        (images,),
        input_names=[INPUT_NAME],
        output_names=list(fields),
        dynamic_shapes=(dims,),
        dynamo=True,
        verbose=False,
    )
    proto = traced.model_proto
    for place, name in names.items():
        _name_dimension(proto.graph.input[0], place, name)
    for value in proto.graph.output:
        _name_dimension(value, 0, "batch")
        if len(shape := _shape_of(value)) == 3 and not isinstance(shape[1], int):
            _name_dimension(value, 1, "patches")  # else a formula of the height, the width and every stride
    return proto


def _name_dimension(value: Any, place: int, name: str) -> None:
    dimension = value.type.tensor_type.shape.dim[place]
    if not dimension.dim_param:
        raise ValueError(f"the {name} of {value.name} is the constant {dimension.dim_value}")
    dimension.dim_param = name


def _shape_of(value: Any) -> tuple[int | str, ...]:
    return tuple(dimension.dim_param or dimension.dim_value for dimension in value.type.tensor_type.shape.dim)


def _refusal(backbone: Backbone, error: Exception) -> UserError:
    import torch

    what = f"{type(backbone.model).__name__} cannot be written as ONNX"
    if _is_about_batch(error):
        return UserError(
            f"{what} for any batch size: its code makes a constant of the one it is traced with, e.g. by len(images). "
            f"{OTHER_FORMATS}"
        )
    return UserError(f"{what} by torch {torch.__version__}: {first_cause(error)}. {OTHER_FORMATS}")


def _is_about_batch(error: Exception) -> bool:
    """Whether the exporter, or _name_dimension, says that the batch size became a constant."""
    return bool(re.search(r"\bbatch\b", first_cause(error)))


def first_cause(error: BaseException) -> str:
    """The first line of what went wrong first: around it the exporter wraps a hundred lines of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = re.sub(r"\x1b\[\d+m", "", lines[0] if lines else "").strip().rstrip(".")
    return f"{type(error).__name__}: {text}"[:300]


def open_session(content: bytes, *, quiet: bool = False) -> Any:
    """An onnxruntime session on the CPU.

    Args:
        content: the model.
        quiet: no messages of onnxruntime's own about a run that may fail.
    Raises:
        GraphError: onnxruntime does not take it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4 if quiet else 3
    with _runtime_errors():
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, images: Tensor) -> dict[str, Tensor]:
    """Output -> what the graph gives for images [B, 3, H, W].

    Raises:
        GraphError: onnxruntime fails.
    """
    import torch

    names = [output.name for output in session.get_outputs()]
    with _runtime_errors():
        given = session.run(names, {INPUT_NAME: images.contiguous().numpy()})
    return {name: torch.from_numpy(values) for name, values in zip(names, given, strict=True)}


@contextlib.contextmanager
def _runtime_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise GraphError(f"onnxruntime cannot run the ONNX model: {first_cause(error)}. {OTHER_FORMATS}") from error


def relative_difference(theirs: Tensor, ours: Tensor) -> float:
    """The largest difference, as a share of the largest value of `ours`; infinite where the shapes differ."""
    if theirs.shape != ours.shape:
        return float("inf")
    return ((theirs - ours).abs().max() / ours.abs().max().clamp(min=1e-12)).item()
