"""torch.compile for a step: decided once for a run, tried before its first step, undone where it fails."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from distillery.config.keys_train import TrainConfig

# Computed, not measured (docs/gpu.md): compiling takes a minute or two, and a compiled step of the default pair saves
# some 6 ms on a large GPU
PAYS_FROM_STEPS = 20_000


@dataclass(frozen=True)
class Compiled:
    """Which parts of a step are compiled. student: the student with its losses, and the augmentation."""

    student: bool
    teacher: bool

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
        saved: as_dict() of the run that goes on: what `auto` once came to stays, so that its numbers do not change.
    """
    is_long = device.type == "cuda" and total_steps >= PAYS_FROM_STEPS
    chosen = {}
    for part, own in (("student", train.compile_student), ("teacher", train.compile_teacher)):
        wanted = train.compile if own is None else own
        chosen[part] = (saved or {}).get(part, is_long) if wanted == "auto" else wanted
    return Compiled(**chosen)


def num_graphs() -> int:
    """Graphs that torch.compile has made in this process so far."""
    from torch._dynamo.utils import counters  # takes a second to import, which runs without it need not wait

    return counters["stats"]["unique_graphs"]


def eager() -> Any:
    """Inside, compiled functions run as they are written: for batches of another size, which would compile again."""
    return torch.compiler.set_stance("force_eager")
