"""Faults that the watch must see, each in a tiny step of its own.

PLANTED: name -> (the step, what must stand in the report; None: there is nothing to report).
"""

from collections.abc import Callable

import torch
from torch import nn

from distillery.training.watch import BadSteps
from tests.gpu.fake_cuda import CUDA


def _step(fault: Callable[[torch.Tensor], object]) -> Callable[[], None]:
    """A step of one layer, forward, backward and optimiser, with a fault between forward and backward."""

    def run() -> None:
        weight = nn.Parameter(torch.zeros(4, 4, device=CUDA))
        optimizer = torch.optim.AdamW([weight], fused=True)
        loss = (torch.zeros(2, 4, device=CUDA) @ weight).square().mean()
        fault(loss)
        loss.backward()
        optimizer.step()

    return run


def _pinned_copy(_loss: torch.Tensor) -> None:
    torch.zeros(8).pin_memory().to(CUDA, non_blocking=True)
    torch.zeros(8, pin_memory=True).view(2, 4).to(CUDA, non_blocking=True)
    torch.zeros(8, pin_memory=True).copy_(torch.zeros(8, device=CUDA), non_blocking=True)


PLANTED: dict[str, tuple[Callable[[], None], str | None]] = {
    "nothing": (_step(lambda loss: None), None),
    "pinned copies": (_step(_pinned_copy), None),
    "a scalar of the host": (_step(lambda loss: loss * torch.tensor(2.0)), None),
    "item": (_step(lambda loss: loss.item()), "the host reads a number"),
    "truth": (_step(lambda loss: bool(loss > 0)), "the host reads a number"),
    "tolist": (_step(lambda loss: loss.expand(2).tolist()), "the host reads a number"),
    "to the host": (_step(lambda loss: loss.cpu()), "copy cuda -> cpu"),
    "into the host": (_step(lambda loss: torch.zeros(()).copy_(loss.detach())), "copy cuda -> cpu"),
    "a constant": (_step(lambda loss: torch.tensor([1.0, 2.0], device=CUDA)), "copy cpu -> cuda"),
    "ordinary memory": (_step(lambda loss: torch.zeros(8).to(CUDA, non_blocking=True)), "of ordinary memory"),
    "blocking": (_step(lambda loss: torch.zeros(8).pin_memory().to(CUDA)), "of page-locked memory with blocking"),
    "nonzero": (_step(lambda loss: torch.zeros(4, device=CUDA).nonzero()), "shape depends on numbers"),
    "masked_select": (_step(lambda loss: torch.zeros(4, device=CUDA).masked_select(loss > 0)), "shape depends"),
    "a mask": (_step(lambda loss: torch.zeros(4, device=CUDA)[torch.ones(4, device=CUDA) > 0]), "indexing by a mask"),
    "an event": (_step(lambda loss: torch.cuda.Event().synchronize()), "the host waits for an event"),
    "the device": (_step(lambda loss: torch.cuda.synchronize()), "the host waits for the device"),
    "mixed": (_step(lambda loss: loss + torch.zeros(2)), "CUDA tensors and one of the host [2]"),
    "an index of the host": (_step(lambda loss: torch.zeros(4, device=CUDA)[torch.tensor([0, 1])]), "one of the host"),
    "a mixed list": (_step(lambda loss: torch._foreach_add_([loss.detach()], [torch.zeros(1)])), "one of the host [1]"),
    "in the project": (_step(lambda loss: BadSteps(CUDA, 0).exceeded()), "distillery/training/watch.py:"),
}
