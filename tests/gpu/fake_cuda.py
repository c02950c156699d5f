"""Fake CUDA tensors, and a watch on what is done with them: launches, waits of the host, mixed devices.

README.md says how it works and what it cannot show. preload.restart_with_library must have run before.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode

from tests.gpu.preload import ROOT

CUDA = torch.device("cuda", 0)
# one for the whole process: constants that the code keeps from one step for the next stay usable
FAKE = FakeTensorMode()

aten = torch.ops.aten
_COPIES = {"_to_copy", "copy_", "_foreach_copy_"}
# their results have a shape that only the device knows
_DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
# solvers whose wrappers read an error code back
_CHECKED = {"_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex", "linalg_inv_ex", "_linalg_solve_ex"}
_MASKED = {"index", "index_put", "index_put_", "_unsafe_index_put", "_index_put_impl_"}
_NO_LAUNCH = {"_unsafe_view", "_reshape_alias", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty",
              "new_empty_strided", "_local_scalar_dense", "record_stream", "is_pinned", "is_same_size", "set_",
              "_pin_memory", "_has_compatible_shallow_copy_type"}  # fmt: skip
_MATMULS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward", "_addmm_activation"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "max", "min", "all", "any", "var", "var_mean", "linalg_vector_norm",
               "_log_softmax", "_softmax", "_log_softmax_backward_data", "_softmax_backward_data"}  # fmt: skip
_MOVES = {"clone", "copy_", "cat", "stack", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "full",
          "full_like", "fill_", "zero_", "arange", "eye", "index", "index_select", "index_copy_", "gather", "scatter",
          "flip", "select_backward", "slice_backward", "unfold_backward", "diagonal_backward", "repeat", "_to_copy",
          "constant_pad_nd", "scalar_tensor"}  # fmt: skip


def kind_of(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> str:
    """What sort of kernel an operator launches, in one word."""
    name = func.overloadpacket.__name__
    if name.startswith(("_foreach", "_fused", "_amp")):
        return "fused"
    if name in ("_to_copy", "copy_") and len({tensor.dtype for tensor in (*inputs, *outputs)}) > 1:
        return "cast"
    if name in _MATMULS:
        return "matmul"
    if "scaled_dot_product" in name:
        return "attention"
    if "_norm" in name and name not in _REDUCTIONS:
        return "normalisation"
    if name in _REDUCTIONS:
        return "reduction"
    return "move" if name in _MOVES else "elementwise"


class Watch(TorchDispatchMode):
    """Sees every operator inside `with watch:`; enter it inside FAKE.

    waits, mixes: what would make the host wait for the device, and operators on tensors of both, each with the place
        in the code. launches: (part, kind of kernel) -> how many. Set `part` as the program goes on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.mixes: list[str] = []
        self.launches: Counter[tuple[str, str]] = Counter()
        self.part = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return _device_of(args[0])
        name = func.overloadpacket.__name__
        inputs = list(_tensors(args)) + list(_tensors(kwargs.values()))
        on_cuda = any(_device_of(tensor).type == "cuda" for tensor in inputs)
        if name == "is_pinned":
            return _is_pinned(inputs[0])
        if name == "_pin_memory":
            return _pin(torch.empty_like(inputs[0]))
        if on_cuda and name in ("_local_scalar_dense", "equal"):
            self._note(self.waits, "the host reads a number", func)
            # any number: the code goes on, and what comes after is seen too
            return True if name == "equal" else _one(inputs[0].dtype)
        if on_cuda:
            self._see_waits(func, name, args, inputs)
        if name not in _COPIES:
            self._see_mix(func, name, inputs)
        is_pinned = kwargs.pop("pin_memory", None) if not on_cuda else None
        out = func(*args, **kwargs)
        outputs = list(_tensors([out]))
        if name in _COPIES:
            self._see_copies(func, name, args, kwargs, outputs)
        if is_pinned or (func.is_view and inputs and _is_pinned(inputs[0])):
            for tensor in outputs:
                _pin(tensor)
        if (
            not func.is_view
            and name not in _NO_LAUNCH
            and (on_cuda or any(_device_of(o).type == "cuda" for o in outputs))
        ):
            self.launches[self.part, kind_of(func, inputs, outputs)] += 1
        return out

    def _see_waits(self, func: Any, name: str, args: tuple, inputs: list[Tensor]) -> None:
        if name in _DATA_DEPENDENT or (name == "repeat_interleave" and func is aten.repeat_interleave.Tensor):
            self._note(self.waits, "the result's shape depends on numbers of the device", func)
        elif name in _MASKED and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            self._note(self.waits, "indexing by a mask", func)
        elif name in _CHECKED:
            self._note(self.waits, "a solver's error code is read", func)

    def _see_mix(self, func: Any, name: str, inputs: list[Tensor]) -> None:
        # a kernel takes a scalar of the host as an argument, but no fused one
        host = [t for t in inputs if _device_of(t).type == "cpu" and (t.ndim or name.startswith("_fused"))]
        if host and any(_device_of(tensor).type == "cuda" for tensor in inputs):
            self._note(self.mixes, f"CUDA tensors and one of the host {list(host[0].shape)}", func)

    def _see_copies(self, func: Any, name: str, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
        if name == "_foreach_copy_":
            pairs, non_blocking = zip(args[1], args[0], strict=True), len(args) > 2 and args[2]
        elif name == "copy_":
            pairs, non_blocking = [(args[1], args[0])], len(args) > 2 and args[2]
        else:
            pairs, non_blocking = [(args[0], outputs[0])], False
        non_blocking = non_blocking or kwargs.get("non_blocking", False)
        for source, target in pairs:
            there = f"{_device_of(source).type} -> {_device_of(target).type} {list(source.shape)}"
            if (_device_of(source).type, _device_of(target).type) == ("cpu", "cuda"):
                if not (non_blocking and _is_pinned(source)):
                    memory = "page-locked" if _is_pinned(source) else "ordinary"
                    how = "without" if non_blocking else "with"
                    self._note(self.waits, f"copy {there} of {memory} memory {how} blocking", func)
            elif (_device_of(source).type, _device_of(target).type) == ("cuda", "cpu"):
                # torch gives the result of .to("cpu", non_blocking=True) page-locked memory
                if name == "_to_copy" and non_blocking:
                    _pin(target)
                elif not (non_blocking and _is_pinned(target)):
                    self._note(self.waits, f"copy {there}", func)

    def _note(self, where: list[str], what: str, func: Any) -> None:
        where.append(f"{place_of(sys._getframe(2))}: {what} ({func})")

    def forget(self) -> None:
        """Begin anew."""
        self.waits, self.mixes = [], []
        self.launches.clear()

    def wait(self, what: str) -> None:
        """Note a wait that no operator makes, such as that for an event."""
        self.waits.append(f"{place_of(sys._getframe(2))}: {what}")


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _device_of(tensor: Tensor) -> torch.device:
    # asking a fake tensor itself is an operator like any other, and the most frequent of all
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def _is_pinned(tensor: Tensor) -> bool:
    return getattr(tensor, "is_page_locked", False)


def _pin(tensor: Tensor) -> Tensor:
    # fake tensors know no page-locked memory
    tensor.is_page_locked = True
    return tensor


def _one(dtype: torch.dtype) -> bool | int | float:
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def place_of(frame: FrameType | None) -> str:
    """file:line of the innermost frame in distillery/ (else in tests/), and of the library's frame it went through."""
    frames = [] if frame is None else [(f.f_code.co_filename, line) for f, line in traceback.walk_stack(frame)]
    return _place(frames)


def place_of_error(error: BaseException) -> str:
    """The same for the place where an error was raised."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return _place(frames[::-1])


def _place(frames: list[tuple[str, int]]) -> str:
    frames = [(file, line) for file, line in frames if file != __file__]
    for folder in (ROOT / "distillery", ROOT / "tests"):
        for number, (file, line) in enumerate(frames):
            if Path(file).is_relative_to(folder):
                text = f"{Path(file).relative_to(ROOT)}:{line}"
                through = [
                    each for each in frames[:number] if "site-packages/" in each[0] and not _is_dispatch(each[0])
                ]
                if through:
                    text += f" (through {through[-1][0].rpartition('site-packages/')[2]}:{through[-1][1]})"
                return text
    return "unknown place"


def _is_dispatch(file: str) -> bool:
    """Whether a file of torch's is but the way of every operator to the watch."""
    return any(f"/torch/{part}" in file for part in ("_compile", "_dynamo", "_subclasses", "_ops", "utils/_"))


def move_to_fake(model: nn.Module) -> None:
    """Replace a model's tensors, wherever they are, by fake CUDA ones of the same strides; inside FAKE."""
    moved: dict[int, Tensor] = {}

    def fake(value: Tensor) -> Tensor:
        if id(value) not in moved:
            moved[id(value)] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=CUDA)
        return moved[id(value)]

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(fake(value), requires_grad=value.requires_grad)
        for tensors in (module._buffers, vars(module)):
            tensors |= {name: fake(value) for name, value in tensors.items() if isinstance(value, Tensor)}


def on_cuda(tensor: Tensor) -> Tensor:
    """A fake CUDA tensor like a real one of the host; inside FAKE."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)


@contextlib.contextmanager
def pretended_cuda(watch: Watch) -> Iterator[None]:
    """Inside, torch's Python code takes this machine for one with a recent GPU; waits for events go to the watch."""
    event = SimpleNamespace(record=lambda *_: None, wait=lambda *_: None)
    event.synchronize = lambda: watch.wait("the host waits for an event")
    event.query = lambda: True
    event.elapsed_time = lambda _end: 1.0
    stream = SimpleNamespace(wait_event=lambda _: None, wait_stream=lambda _: None, device=CUDA)
    stream.record_event = lambda *_: event
    stream.synchronize = lambda: watch.wait("the host waits for a stream")
    cuda = {
        "is_bf16_supported": lambda *_, **__: True,
        "get_device_capability": lambda *_: (9, 0),
        "Event": lambda *_, **__: event,
        "Stream": lambda *_, **__: stream,
        "current_stream": lambda *_: stream,
        "stream": lambda _: contextlib.nullcontext(),
        "synchronize": lambda *_: watch.wait("the host waits for the device"),
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False))
        stack.enter_context(mock.patch.object(F, "scaled_dot_product_attention", _attention))
        # clipping would take one kernel a tensor instead of one for all
        for module in (_foreach_utils, optimizer):
            types = [*module._foreach_supported_types, FakeTensor]
            stack.enter_context(mock.patch.object(module, "_foreach_supported_types", types))
        # the engine's own threads for devices would be as many as there are real ones
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


_plain_attention = F.scaled_dot_product_attention


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    """The kernels that torch takes on a recent GPU: on fake tensors it would write the formula out."""
    if attn_mask is not None or options:
        return _plain_attention(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, **options)
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (value.to(torch.get_autocast_dtype("cuda")) for value in (q, k, v))
    if q.dtype == torch.float32:
        sums = torch.is_grad_enabled() and q.requires_grad
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, sums, dropout_p, is_causal, scale=scale)[0]
    return aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
