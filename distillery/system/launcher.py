"""Read a launcher's environment variables: this process's rank, the number of processes, the address to meet.

torchrun and the user's own scripts set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. A blank one counts as
unset; a wrong one is an error. A wrong variable of Slurm counts as unset, because no user wrote it. This file does not
import torch, so a wrong variable raises its error within a second.
"""

import os
from dataclasses import dataclass

from distillery.system.errors import UserError
from distillery.system.machine import environment_number, environment_text

_TORCHRUN = ("RANK", "WORLD_SIZE")
_MEANINGS = {"MASTER_ADDR": "the host of process 0", "MASTER_PORT": "a free port on the host of process 0"}
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class World:
    """The processes of a run, as one of them sees it.

    rank: its number, from 0; size: how many there are; local_rank: its number on this node; variables: where rank and
    size were read.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    variables: tuple[str, ...] = _TORCHRUN

    @property
    def alone(self) -> str:
        """What to type to run without the others."""
        return f"To run alone: unset {' '.join(self.variables)}"

    def __str__(self) -> str:
        return f"process {self.rank} of {self.size}"


def world_from_environment() -> World:
    """What torchrun says, else what srun says, else one process alone.

    Raises:
        UserError: RANK, WORLD_SIZE or LOCAL_RANK is wrong, or one of the first two is missing.
    """
    given = [name for name in _TORCHRUN if environment_text(name)]
    step = _world_of_step()
    if len(given) == 2:
        return _world_of_torchrun()
    # batch scripts export WORLD_SIZE for programs that take their rank from Slurm
    if step is not None:
        return step
    if given and not (given == ["WORLD_SIZE"] and environment_number("WORLD_SIZE") == 1):
        (missing,) = set(_TORCHRUN) - set(given)
        raise UserError(f"{_shown(given[0])} is set, {missing} is not. Set both, or, to run alone: unset {given[0]}")
    return World()


def _world_of_torchrun() -> World:
    rank, size = _checked("RANK", 0), _checked("WORLD_SIZE", 1)
    if rank >= size:
        raise UserError(
            f"RANK={rank} with WORLD_SIZE={size}: the processes have the numbers 0 to {size - 1}. Set both anew. "
            f"{World().alone}"
        )
    return World(rank, size, _checked("LOCAL_RANK", 0) if environment_text("LOCAL_RANK") else 0)


def _world_of_step() -> World | None:
    """The tasks of a step of srun; None outside of one, and of a single task.

    A batch script's own shell has SLURM_NTASKS and a rank too, but a number as SLURM_STEP_ID only what srun starts.
    """
    rank, size = map(environment_number, _SRUN)
    if None in (rank, size, environment_number("SLURM_STEP_ID")) or size < 2 or rank >= size:
        return None
    return World(rank, size, environment_number("SLURM_LOCALID") or 0, _SRUN)


def meeting_point(world: World) -> tuple[str, int]:
    """(address, port) at which the processes of a world of several meet.

    Tasks of srun need no variables: they meet on the first node, at a port made from the number of the job.

    Raises:
        UserError: MASTER_ADDR or MASTER_PORT is missing or wrong.
    """
    address = environment_text("MASTER_ADDR")
    port = _checked("MASTER_PORT", 1, 65535, world) if environment_text("MASTER_PORT") else None
    if _world_of_step() is not None:
        # below those that the system hands out
        port = port or 15000 + (environment_number("SLURM_JOB_ID") or 0) % 15000
        address = address or _first_slurm_node()
    missing = [name for name, value in (("MASTER_ADDR", address), ("MASTER_PORT", port)) if value is None]
    if missing:
        what = " and ".join(f"{name} ({_MEANINGS[name]})" for name in missing)
        raise UserError(
            f"{_shown(*world.variables)} are set without {what}. Set that too, the same for every process, or start "
            f"with torchrun. {world.alone}"
        )
    return address, port


def check_environment() -> None:
    """Raise UserError where the launcher's variables are wrong."""
    world = world_from_environment()
    if world.size > 1:
        meeting_point(world)


def is_restarted() -> bool:
    """Whether torchrun started this process again after a failure (--max-restarts)."""
    return bool(environment_number("TORCHELASTIC_RESTART_COUNT"))


def _checked(name: str, least: int, most: int | None = None, world: World | None = None) -> int:
    value = environment_number(name)
    if value is None or value < least or (most is not None and value > most):
        expected = f"a whole number from {least} {'on' if most is None else f'to {most}'}"
        raise UserError(f"{_shown(name)}: expected {expected}. Set it anew. {(world or World()).alone}")
    return value


def _shown(*names: str) -> str:
    """'RANK=0 and WORLD_SIZE=2', long values cut."""
    return " and ".join(f"{name}={ascii(os.environ.get(name, ''))[1:-1][:40]}" for name in names)


def _first_slurm_node() -> str:
    """The first host of SLURM_STEP_NODELIST: 'node[03-07,9],x1' -> 'node03'."""
    nodes = environment_text("SLURM_STEP_NODELIST") or environment_text("SLURM_JOB_NODELIST") or "127.0.0.1"
    head, bracket, rest = nodes.partition("[")
    if bracket and "," not in head:
        return head + rest.split("]")[0].split(",")[0].split("-")[0]
    return nodes.split(",")[0]
