"""torch.compile for a step: decided once for a run, tried before its first step, left out where it fails."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from distillery.config.keys_train import TrainConfig
from distillery.system.distributed import any_rank

# Computed, not measured (docs/gpu.md): compiling takes a minute or two, and a compiled step of the default pair saves
# some 6 ms on a large GPU
PAYS_FROM_STEPS = 20_000


@dataclass(frozen=True)
class Compiled:
    """Which parts of a step are compiled. student: the student with its losses, and the augmentation."""

    student: bool = False
    teacher: bool = False

    def __bool__(self) -> bool:
        return self.student or self.teacher

    def as_dict(self) -> dict[str, bool]:
        """Plain values, for the checkpoint."""
        return asdict(self)


def decide_compiled(
    train: TrainConfig, device: torch.device, total_steps: int, saved: dict[str, bool] | None = None
) -> Compiled:
    """What `compile`, `compile_student` and `compile_teacher` come to.

    Args:
        train: the keys.
        device: `auto` compiles on CUDA alone.
        total_steps: of the whole run: `auto` compiles where these win back what compiling takes.
        saved: as_dict() of the run that goes on: on CUDA what `auto` once came to stays, so that its numbers do not
            change.
    """
    is_long = device.type == "cuda" and total_steps >= PAYS_FROM_STEPS
    saved = saved if device.type == "cuda" else None
    chosen = {}
    for part, own in (("student", train.compile_student), ("teacher", train.compile_teacher)):
        wanted = train.compile if own is None else own
        chosen[part] = (saved or {}).get(part, is_long) if wanted == "auto" else wanted
    return Compiled(**chosen)


def eager() -> Any:
    """Inside, compiled functions run as they are written: for batches of another size, which would compile again."""
    return torch.compiler.set_stance("force_eager")


def compile_now(rehearse: Callable[[], None]) -> str:
    """Let torch.compile do its work before the first step; where it fails, this process runs uncompiled from then on.

    Args:
        rehearse: runs every kind of step once, without a word to the other ranks. All ranks compile, or none.
    Returns:
        A line for the console.
    """
    began, error = time.monotonic(), None
    try:
        rehearse()
    except Exception as raised:  # each compiler behind torch.compile has errors of its own
        error = raised
    if any_rank(error is not None)[0]:
        torch.compiler.set_stance("force_eager")
        why = "on another rank" if error is None else " ".join(str(error).split("\n\n")[0].split())[:300]
        return f"torch.compile failed ({why}): the run goes on uncompiled. compile: false leaves the attempt out"
    breaks = graph_breaks()
    text = f"torch.compile: {num_graphs()} graphs in {time.monotonic() - began:.0f} s, {breaks} graph breaks"
    return text if num_graphs() else f"{text}; nothing was compiled: set compile: false"


def num_graphs() -> int:
    """Graphs that torch.compile has made in this process so far; in a run they stay as many after the first step."""
    return _counters()["stats"]["unique_graphs"]


def graph_breaks() -> int:
    """Places where what is compiled was cut, because torch.compile could not follow the code."""
    return sum(_counters()["graph_break"].values())


def _counters() -> Any:
    from torch._dynamo.utils import counters  # takes a second to import, which a run without it need not wait

    return counters
