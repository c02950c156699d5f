"""Make an ONNX graph smaller: float16 weights, or int8 weights and activations calibrated on images."""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distillery.export.onnx import INPUT_NAME, OTHER_FORMATS, first_cause
from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = ("fp32", "fp16", "int8")
# where the weights are. Norms, softmax and activation functions (but those below) lose much and save nothing
WEIGHTED = ("Conv", "Gemm", "MatMul")
# these two only cut the range of the convolution before them: its scale is that of what is left
CUTTING = ("Relu", "Clip")


@contextlib.contextmanager
def _own_path() -> Iterator[None]:
    """onnxruntime's folder on sys.path for a while: it adds it for good, and its `models` would hide a student's."""
    import onnxruntime

    path = list(sys.path)
    sys.path.append(str(Path(onnxruntime.__file__).parent / "transformers"))
    try:
        yield
    finally:
        sys.path[:] = path


@_own_path()
def to_float16(content: bytes) -> bytes:
    """The same graph computed in float16; inputs and outputs stay float32.

    A linear layer that gives an output stays in float32: in the teacher's space its bias holds the teacher's mean,
    which may be far above the deviation, and in float16 the sum would keep little else. On a CPU, onnxruntime has few
    float16 kernels: it computes most of the graph in float32, with casts between.

    Raises:
        UserError: it cannot be converted.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with _as_user_error("float16"), _silent("onnxruntime.transformers.float16"):
        model = onnx.load_model_from_string(content)
        kept = _layers_of_outputs(model.graph)
        converted = OnnxModel(convert_float_to_float16(model, keep_io_types=True, node_block_list=kept))
        _keep_float32(converted)
        converted.topological_sort()  # the casts of inputs and outputs stand at the end
        onnx.checker.check_model(converted.model)
        return converted.model.SerializeToString()


def _layers_of_outputs(graph: Any) -> list[str]:
    """Names of the nodes of each linear layer that gives an output: Gemm, or MatMul and the Add of its bias."""
    weights = {tensor.name for tensor in graph.initializer}
    givers = {name: node for node in graph.node for name in node.output}
    names = []
    for output in graph.output:
        node = givers[output.name]
        parts = [node, *(givers[name] for name in node.input if name in givers)] if node.op_type == "Add" else [node]
        # an Add of two activations is no bias
        if node.op_type == "Gemm" or (parts[-1].op_type == "MatMul" and not weights.isdisjoint(node.input)):
            names += [part.name for part in parts]
    return names


def _keep_float32(model: Any) -> None:
    """Let what stays in float32 reach a node in float32, or an output, without a cast to float16 on the way."""
    from onnx import TensorProto, helper

    givers = model.output_name_to_node()
    for node in model.nodes():
        before = model.get_parent(node, 0, givers) if node.op_type == "Cast" else None
        if before and before.op_type == "Cast" and helper.get_node_attr_value(before, "to") == TensorProto.FLOAT16:
            node.input[0] = before.input[0]
    model.prune_graph()


@_own_path()
def to_int8(content: bytes, calibration: Iterable[Tensor]) -> bytes:
    """The same graph with int8 weights, one scale for each output channel, and uint8 activations.

    Convolutions and products with weights are quantised. Products of two activations (attention) stay in float32.

    Args:
        content: float32.
        calibration: batches of images [B, 3, H, W], all of one size; the range of each activation is taken from them.
    Raises:
        UserError: it cannot be quantised, or the images cannot be read.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quant_pre_process, quantize_static

    with _as_user_error("int8"), _silent(None), tempfile.TemporaryDirectory(prefix="onnx-int8-") as folder:
        given, prepared, quantised = (Path(folder, name) for name in ("given.onnx", "prepared.onnx", "int8.onnx"))
        given.write_bytes(content)
        quant_pre_process(given, prepared, skip_symbolic_shape=True)
        graph = onnx.load(prepared).graph
        quantize_static(
            prepared,
            quantised,
            _Reader(calibration),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=[*WEIGHTED, *CUTTING],
            nodes_to_exclude=_products_of_activations(graph),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            # a product's result goes to a norm, a GELU or a sum in float32, and its large values would cost the others
            extra_options={"OpTypesToExcludeOutputQuantization": ["Gemm", "MatMul"]},
        )
        return quantised.read_bytes()


def _products_of_activations(graph: Any) -> list[str]:
    """Names of the nodes without a weight."""
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type in WEIGHTED and weights.isdisjoint(node.input)]


class _Reader:
    """What onnxruntime calls a CalibrationDataReader: one batch a call, then None."""

    def __init__(self, batches: Iterable[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        images = next(self._batches, None)
        return None if images is None else {INPUT_NAME: images.numpy()}


@contextlib.contextmanager
def _as_user_error(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:  # of the images
        raise
    except Exception as error:  # onnxruntime's errors have no base class of their own
        raise UserError(f"the ONNX model cannot be made {what}: {first_cause(error)}. {OTHER_FORMATS}") from error


@contextlib.contextmanager
def _silent(name: str | None) -> Iterator[None]:
    """No advice of a package's own through logging meanwhile; None: of all packages."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
