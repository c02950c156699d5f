"""One process or many: rank and world size, and how ranks agree. Without a launcher: rank 0 of 1."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_launched() -> bool:
    """Whether torchrun or `srun` started this process as one of several."""
    return world_from_environment()[1] > 1


def world_from_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun says it, else as Slurm says it, else (0, 1, 0)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # a batch script's own shell has SLURM_NTASKS too; only a task started by srun has SLURM_STEP_ID and a rank
    if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "").isdigit() and int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env.get("SLURM_LOCALID", 0))
    return 0, 1, 0


def start(device_type: str) -> tuple[int, int, int]:
    """Join the process group when launched as several processes: NCCL on CUDA, gloo on the CPU.

    Returns:
        (rank, world size, local rank).
    """
    rank, world_size, local_rank = world_from_environment()
    if world_size > 1 and not dist.is_initialized():
        if "MASTER_ADDR" not in os.environ:
            os.environ["MASTER_ADDR"] = _first_slurm_node()
            # one port per job, the same for all its tasks
            os.environ["MASTER_PORT"] = str(20000 + int(os.environ.get("SLURM_JOB_ID", 0)) % 20000)
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", rank=rank, world_size=world_size)
    return rank, world_size, local_rank


def _first_slurm_node() -> str:
    """The first host of SLURM_STEP_NODELIST: 'node[03-07,9],x1' -> 'node03'."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "127.0.0.1")
    head, bracket, rest = nodes.partition("[")
    if bracket and "," not in head:
        return head + rest.split("]")[0].split(",")[0].split("-")[0]
    return nodes.split(",")[0]


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and talks."""
    return rank() == 0


def decided_by_main(decide: Callable[[], Any]) -> Any:
    """Rank 0's answer, on every rank: what exists on disk must not be looked up by each for itself.

    An exception of rank 0 is raised on every rank, so that none waits for the others.
    """
    if world_size() == 1:
        return decide()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = decide()
        except Exception as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank."""
    if world_size() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def mean_over_ranks(values: Tensor) -> Tensor:
    """Element-wise mean of a tensor that every rank has."""
    if world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
        values /= world_size()
    return values
