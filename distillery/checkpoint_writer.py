"""Checkpoints written while the training goes on: a GPU waits for a copy of the state in memory, not for the disk."""

import copy
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from distillery.checkpoint import save_checkpoint


def copy_to_host(state: Any) -> Any:
    """A copy of nested dicts, lists and tuples, their tensors on the CPU: what a step changes later is not in it."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)  # of its own type: a state_dict carries the versions of its modules
        copied.update({key: copy_to_host(value) for key, value in state.items()})
        return copied
    if isinstance(state, list | tuple):
        return type(state)(map(copy_to_host, state))
    return state


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time.

    Args:
        run_dir: the run's folder.
        last: the checkpoint that the run goes on from.
        in_background: by a thread, while the training goes on. A kill then loses the checkpoint that is being written;
            where steps take long beside a write, as on the CPU, that is not worth it.
    """

    def __init__(self, run_dir: Path, last: Path | None, *, in_background: bool) -> None:
        self.run_dir, self.last, self.in_background = run_dir, last, in_background
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._writing: Future[Path] | None = None

    def save(self, state: dict[str, Any], step: int, *, keep: int, protect: tuple[int, ...] = ()) -> None:
        """Write a checkpoint, or begin to; arguments as of save_checkpoint. The one before is on the disk then.

        Raises:
            RunError: it or the one before could not be written.
        """
        self.wait()
        if self.in_background:
            state = copy_to_host(state)
        self._writing = self._thread.submit(save_checkpoint, self.run_dir, state, step, keep=keep, protect=protect)
        if not self.in_background:
            self.wait()

    def wait(self) -> Path | None:
        """Come back when all is on the disk, with the newest checkpoint; errors as of save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.last = writing.result()
        return self.last

    def close(self) -> None:
        """Let what is being written come to its end; after an error, whose message this one must not hide."""
        try:
            self.wait()
        except Exception as error:
            print(f"error: {error}", file=sys.stderr)
        self._thread.shutdown()
