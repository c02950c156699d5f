"""How the ranks of a run communicate. Without a launcher there is one process, rank 0 of 1.

NCCL averages tensors on CUDA, gloo on the CPU. Messages between the processes (who stops, what is on disk, that rank 0
has finished an evaluation) use a gloo group of their own, for three reasons: it does not wait for the GPU, it notices
within moments that a process has died, and rank 0 may take hours for an evaluation.
"""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distillery.system.errors import Interrupted, RunError, UserError, exit_status_of, report_error
from distillery.system.launcher import meeting_point, world_from_environment
from distillery.system.machine import environment_text
from distillery.system.meeting import meet
from distillery.system.trees import map_leaves

# how long the others wait for rank 0: an evaluation of a large set at 224 px outlasts torch's 10 and 30 minutes
_PATIENCE = timedelta(hours=24)
# what gloo and NCCL say when the process at the other end is gone
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
_hosts: dist.ProcessGroup | None = None


@contextlib.contextmanager
def process_group(device: torch.device, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Inside, the processes of a launcher are one group: NCCL on CUDA, gloo on the CPU.

    is_stopped: whether to give up waiting for the others at the start.

    An error ends this process at once with its exit status: leaving a group in order would wait for the others, who
    wait for this one. They notice, and torchrun or `srun --kill-on-bad-exit` ends those that cannot.
    """
    try:
        _start(device, is_stopped)
    except (UserError, RunError, Interrupted) as error:
        # a thread may be waiting inside torch still; the interpreter cannot end in order beside it
        os._exit(report_error(error))
    try:
        yield
    except Exception as error:
        if world_size() == 1 or isinstance(error, Interrupted):
            raise
        if _is_lost_peer(error):
            error = RunError("another process of this run has ended; its own message says why.")
        os._exit(report_error(error, prefix=f"[process {rank()} of {world_size()}] "))
    finally:
        _stop()


def _start(device: torch.device, is_stopped: Callable[[], bool]) -> None:
    global _hosts
    world = world_from_environment()
    if environment_text("TORCHELASTIC_RUN_ID"):
        # torchrun's workers have sessions of their own: when it dies of a signal it does not pass on (USR1, KILL), they
        # would train on unseen. The kernel sends them a SIGTERM then, and they save
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if world.size == 1 or dist.is_initialized():
        return
    store = meet(world, *meeting_point(world), is_stopped)
    backend, options = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
    dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, **options)
    _hosts = dist.new_group(backend="gloo", timeout=_PATIENCE)


def _stop() -> None:
    global _hosts
    if dist.is_initialized():
        dist.destroy_process_group()
    _hosts = None


def _is_lost_peer(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST_PEER)


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def on_main(function: Callable[[], Any], *, raise_everywhere: bool = False) -> Any:
    """Run a function on rank 0 and return its answer on every rank; the other ranks wait as long as it takes.

    What exists on disk is looked up this way: two nodes may not see the same files yet.

    Args:
        function: called on rank 0 alone. Tensors in dicts, lists and tuples of its answer are sent as they are and
            arrive on the CPU; the rest is pickled.
        raise_everywhere: every rank raises the error of rank 0, for a caller that goes on after it. Otherwise rank 0
            raises; the other ranks exit with its status and print nothing.
    """
    if world_size() == 1:
        return function()
    answer: Any = None
    error: Exception | None = None
    if is_main():
        try:
            answer = function()
        except Exception as raised:
            error = raised
    status = None if error is None else exit_status_of(error)
    status, shared_error = _broadcast_object([status, error if raise_everywhere else None])
    if error is not None or shared_error is not None:
        raise error or shared_error
    if status is not None:
        raise SystemExit(status)
    return _broadcast_tree(answer)


def _broadcast_object(value: Any) -> Any:
    """What rank 0 has, pickled."""
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_hosts)
    return box[0]


@dataclass(frozen=True)
class _Sent:
    """Stands for a tensor while the rest of a tree is pickled."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self) -> Tensor:
        """Memory for it, on the CPU."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


def _broadcast_tree(tree: Any) -> Any:
    """What rank 0 has; its tensors, which may be a checkpoint's, without a second copy in a pickle."""
    tensors: list[Tensor] = []

    def take_out(value: Tensor) -> _Sent:
        # the strides that a copy has: dense, in the order of the tensor's own where it can be
        sent = _Sent(value.shape, torch.empty_like(value, device="meta").stride(), value.dtype)
        is_ready = value.device.type == "cpu" and value.stride() == sent.stride
        tensors.append(value.detach() if is_ready else sent.empty().copy_(value.detach()))
        return sent

    skeleton = _broadcast_object(map_leaves(tree, Tensor, take_out) if is_main() else None)
    if not is_main():
        return map_leaves(skeleton, _Sent, lambda sent: _broadcast_memory(sent.empty()))
    for value in tensors:
        _broadcast_memory(value)
    return tree


def _broadcast_memory(value: Tensor) -> Tensor:
    """Fill a dense tensor on the CPU with the bytes that rank 0's has; gloo does not know every type."""
    if value.numel():
        dist.broadcast(value.as_strided((value.numel(),), (1,)).view(torch.uint8), src=0, group=_hosts)
    return value


def any_rank(*flags: bool) -> list[bool]:
    """Which of the flags are set on any rank; no device is waited for."""
    if world_size() == 1:
        return list(flags)
    values = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=_hosts)
    return values.bool().tolist()


class Vote:
    """Which flags are set on any rank: begun before a step and read after it, so that no step waits for the messages.

    All ranks have the same answer, of the moment at which each began. One process alone looks when the answer is read.
    Every vote is to be read before the next is begun.
    """

    def __init__(self, *flags: Callable[[], bool]) -> None:
        self._flags, self._work = flags, None
        if world_size() > 1:
            self._values = torch.tensor([flag() for flag in flags], dtype=torch.uint8)
            self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=_hosts, async_op=True)

    def read(self) -> list[bool]:
        """The answer, one value for each flag."""
        if self._work is None:
            return [flag() for flag in self._flags]
        self._work.wait()
        return self._values.bool().tolist()


def any_rank_on_device(flag: Tensor) -> Tensor:
    """Whether a bool scalar is set on any rank, on its device; the host does not wait."""
    if world_size() == 1:
        return flag
    value = flag.to(torch.uint8)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.bool()


def wait_for_all() -> None:
    """Come back when every rank is here."""
    if world_size() > 1:
        dist.barrier(group=_hosts)


def gather_rows(rows: Tensor) -> Tensor:
    """Rows [n, ...] of every rank one after the other, in the order of the ranks; n is the same on all of them."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def mean_over_ranks(values: Tensor) -> Tensor:
    """Element-wise mean of a tensor that every rank has, on its device."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors that every rank has, on its device, with those of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dense = tensor.contiguous()
            dist.broadcast(dense, 0)
            tensor.copy_(dense)


def gather_on_main(rows: Tensor) -> Tensor | None:
    """Rows [n, ...] of every rank one after the other on rank 0, in the order of the ranks; None on the others.

    rows: on the CPU. n may differ from rank to rank; where it is 0, the other sides do not matter, but on rank 0.
    """
    if world_size() == 1:
        return rows
    counts = [torch.empty(1, dtype=torch.int64) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)]), group=_hosts)
    if not is_main():
        if len(rows):
            dist.send(rows.contiguous(), 0, group=_hosts)
        return None
    parts = [rows]
    for source, count in enumerate(counts[1:], start=1):
        if count:
            parts.append(rows.new_empty((int(count), *rows.shape[1:])))
            dist.recv(parts[-1], source, group=_hosts)
    return torch.cat(parts)
