"""Checkpoints that are either complete or ignored: one `.pt` file each, and a record that is written last.

checkpoints/step_00000500.pt      torch.load(weights_only=True): student, heads, optimizer, ema, rng, position, config
checkpoints/step_00000500.json    {"step", "bytes", "hash"}; a checkpoint without a matching record does not count
"""

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distillery.system.errors import MissingFileError, RunError, UserError
from distillery.system.files import fsync_dir, hash_file, make_directory, temporary_name, write_atomic
from distillery.system.trees import map_leaves
from distillery.training.task import Position, Task
from distillery.training.watch import check_finite

_NAME = re.compile(r"step_(\d{8,})\.pt")
# keys of a state whose numbers a step computes on the device
_NUMBERS = ("scaler", "num_bad_steps")
# the growth interval of a scaler whose scale is never to grow: all but fp16's
_NEVER = 2**31 - 1


def checkpoint_dir(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """The file of the checkpoint of a step."""
    return checkpoint_dir(run_dir) / f"step_{step:08d}.pt"


def save_checkpoint(
    run_dir: Path, state: dict[str, Any], step: int, *, keep: int, protect: tuple[int, ...] = ()
) -> Path:
    """Write a checkpoint, then its record, then remove all but the newest `keep` and the protected steps.

    A complete checkpoint of this step is left as it is: a run's state is a function of the step, and writing it again
    would leave moments in which its file and its record do not belong together.

    Raises:
        RunError: the disk is full or fails; the checkpoints before this one are untouched.
    """
    folder, path = checkpoint_dir(run_dir), checkpoint_path(run_dir, step)
    if not is_complete(path):
        _write(folder, path, state, step)
    _prune(folder, keep, {step, *protect})
    return path


def _write(folder: Path, path: Path, state: dict[str, Any], step: int) -> None:
    temporary = temporary_name(path)
    try:
        make_directory(folder)
        _remove_leftovers(folder)
        # torch reports a full disk without errno when it opens the file itself; through ours there is an OSError
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        record = {"step": step, "bytes": temporary.stat().st_size, "hash": hash_of(temporary)}
        path.with_suffix(".json").unlink(missing_ok=True)  # of a damaged file of this name, if any
        os.replace(temporary, path)
        fsync_dir(folder)
        write_atomic(path.with_suffix(".json"), json.dumps(record).encode() + b"\n")
    except (OSError, RuntimeError) as error:
        problem = _os_error_behind(error)
        if problem is None:
            raise
        raise RunError(
            f"{path}: could not be written ({problem.strerror}); the checkpoints before it are intact. "
            "Make room and run the same command again."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The OSError that led to an error: torch's writer, closed after a failed write, raises one of its own over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _prune(folder: Path, keep: int, protect: set[int]) -> None:
    for step, path in _numbered(folder)[: -max(1, keep)]:
        if step not in protect:
            path.with_suffix(".json").unlink(missing_ok=True)  # first: a record must never stand for a missing file
            path.unlink(missing_ok=True)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(".step_*.tmp-*"):
        path.unlink(missing_ok=True)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint file, ascending."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.glob("step_*.pt")]
    return sorted((int(match.group(1)), path) for match, path in found if match)


def hash_of(path: Path) -> str:
    """XXH3-128 of a file's bytes, as records have it."""
    with open(path, "rb") as file:
        return hash_file(file)


def is_complete(path: Path) -> bool:
    """Whether a checkpoint's record is there and agrees with every byte of the file."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        return record["bytes"] == path.stat().st_size and record["hash"] == hash_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Find the newest complete checkpoint of a run; skip damaged newer ones and print that.

    Where none is complete, the newest file that has no record but can be read stands in: records may have been left
    behind when a folder was copied.

    Raises:
        UserError: there are checkpoints, and none can be used; beginning anew without a word would lose the run.
    """
    found = [path for _, path in reversed(_numbered(checkpoint_dir(run_dir)))]
    for number, path in enumerate(found):
        if is_complete(path):
            if number:
                print(f"going back to {path}: the newer ones are incomplete or damaged: "
                      f"{', '.join(map(str, found[:number]))}", file=sys.stderr)  # fmt: skip
            return path
    for path in found:
        if not path.with_suffix(".json").exists() and _is_readable(path):
            print(f"{path} has no record, but can be read: taking it", file=sys.stderr)
            return path
    if any(path.with_suffix(".json").exists() for path in found):
        raise UserError(
            f"{checkpoint_dir(run_dir)}: none of the {len(found)} checkpoints is complete and undamaged. "
            "Restore one from a backup, or start afresh with --no_resume (the folder's content is set aside)."
        )
    return None


def _is_readable(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def newer_checkpoints(run_dir: Path, step: int) -> list[Path]:
    """The files of the checkpoints after `step` in the order to take them away: newest first, records before files."""
    later = [path for number, path in reversed(_numbered(checkpoint_dir(run_dir))) if number > step]
    return [file for path in later for file in (path.with_suffix(".json"), path) if file.exists()]


def load_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; nothing in it can execute code.

    Raises:
        MissingFileError, UserError: not there, or not a readable checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"Checkpoint not found: {path}.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime errors
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}).") from error
    missing = {"student", "heads", "optimizer", "progress", "config"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise UserError(f"{path}: not a checkpoint of this project; it lacks {', '.join(sorted(missing))}.")
    return state


class HostCopies:
    """Copies of a state in memory of the host that is made at the first copy and used again for every other.

    From a GPU they run on the current stream while the host goes on: into pinned memory (torch takes up to twice what a
    checkpoint has), without a wait for each tensor. Fresh memory would be pageable, and the GPU would stand still.
    """

    def __init__(self) -> None:
        self._memory: list[Tensor] = []

    def take(self, state: Any) -> tuple[Any, Callable[[], None]]:
        """Copy a state of dicts, lists and tuples: what a step changes later is not in it.

        Returns:
            (the copy, whose tensors the next one overwrites; a function that comes back when they hold their values).
        """
        used, self._memory = self._memory[::-1], []
        on_gpu = []

        def copied(value: Tensor) -> Tensor:
            memory = used.pop() if used else None
            if memory is None or (memory.shape, memory.dtype) != (value.shape, value.dtype):
                memory = _host_memory(value)
            self._memory.append(memory)
            if value.is_cuda:
                on_gpu.append(value)
            return memory.copy_(value.detach(), non_blocking=True)

        copy_of_state = map_leaves(state, Tensor, copied)
        if not on_gpu:
            return copy_of_state, lambda: None
        event = torch.cuda.Event(blocking=True)  # the thread that waits for it sleeps: the CPU is for readers of images
        event.record()
        return copy_of_state, event.synchronize


def _host_memory(like: Tensor) -> Tensor:
    return torch.empty_like(like, device="cpu", pin_memory=like.is_cuda, requires_grad=False)


@dataclass(frozen=True)
class Proof:
    """Whether a state may be saved, in tensors that a GPU may still be computing.

    names, is_finite: of the student's weights, bool [n]; is_lost: bool scalar, there were more bad steps than allowed.
    """

    names: list[str]
    is_finite: Tensor
    is_lost: Tensor


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
        self._copies, self._began = HostCopies(), time.monotonic()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-checkpoint")
        self._writing: Future[Path | None] | None = None

    def minutes_since_last(self) -> float:
        """Minutes since the last call of save; before the first, since this process began."""
        return (time.monotonic() - self._began) / 60

    def steps(self) -> set[int]:
        """The steps of the checkpoints that are on the disk; waits for the one that is being written."""
        self.wait()
        return {step for step, _ in _numbered(checkpoint_dir(self.run_dir))}

    def save(
        self,
        state: dict[str, Any],
        step: int,
        *,
        keep: int,
        protect: tuple[int, ...] = (),
        proof: Proof | None = None,
    ) -> None:
        """Write a checkpoint, or begin to; arguments as of save_checkpoint. The one before is on the disk then.

        state: what state_on_device gave, and more. proof: a weight that is not finite is an error and is not written. A
        run that is lost writes nothing either, and check_numbers says why.

        Raises:
            RunError: it or the one before could not be written.
            FloatingPointError: a weight is not finite, of this one or the one before.
        """
        self.wait()
        self._began, is_copied = time.monotonic(), lambda: None
        if self.in_background:
            (state, facts), is_copied = self._copies.take((state, vars(proof) if proof else None))
            proof = facts and Proof(**facts)
        self._writing = self._thread.submit(self._write, is_copied, state, proof, step, keep=keep, protect=protect)
        if not self.in_background:
            self.wait()

    def _write(
        self, is_copied: Callable[[], None], state: dict[str, Any], proof: Proof | None, step: int, **options: Any
    ) -> Path | None:
        is_copied()
        if proof is not None:
            if proof.is_lost:
                return None
            check_finite(proof.names, proof.is_finite)
        return save_checkpoint(self.run_dir, read_numbers(state), step, **options)

    def wait(self) -> Path | None:
        """Come back when all is on the disk, with the newest checkpoint; errors as of save."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self.last = writing.result() or self.last
        return self.last

    def raise_if_failed(self) -> None:
        """Raise the error of a checkpoint that could not be written, as soon as that is known; waits for nothing."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def close(self) -> None:
        """Let what is being written come to its end; after an error, whose message this one must not hide."""
        try:
            self.wait()
        except Exception as error:
            print(f"error: {error}", file=sys.stderr)
        self._thread.shutdown()


def state_of(task: Task, position: Position) -> dict[str, Any]:
    """Weights, optimiser, averages, random state and position, as plain values and tensors; waits for the device."""
    return read_numbers(state_on_device(task, position))


def state_on_device(task: Task, position: Position) -> dict[str, Any]:
    """As state_of, but nothing waits for the device: numbers that it has are tensors still, for read_numbers.

    The tensors are those of the task: the next step changes them.
    """
    return {
        "student": task.student.student.model.state_dict(),
        "heads": task.student.heads.state_dict(),
        "optimizer": task.optimizer.state_dict(),
        "ema": task.ema.state if task.ema else None,
        "ema_heads": task.ema.heads if task.ema else None,
        # what the next step draws is seeded by its number; this is here for those who look
        "rng": {"torch": torch.get_rng_state()},
        "progress": {"step": position.step, "epoch": position.epoch, "samples": position.samples},
        "precision": task.precision,
        "scaler": _scaler_state(task.scaler),
        "target_statistics": task.teacher.statistics_state(),
        "queue": task.queue.state() if task.queue else None,
        "num_bad_steps": task.bad_steps.count,
        "compiled": task.compiled.as_dict(),
        "learning_rate": task.schedule.at(max(0, position.step - 1)),
    }


def _scaler_state(scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """scaler.state_dict(), which would wait for the device, with the two numbers that are there as tensors."""
    if not scaler.is_enabled() or scaler._scale is None:  # before the first step
        return scaler.state_dict()
    return {
        "scale": scaler._scale,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": scaler._growth_tracker,
    }


def read_numbers(state: dict[str, Any]) -> dict[str, Any]:
    """What state_on_device gave, or a copy of it on the host, with plain numbers as a checkpoint has them."""
    return state | {key: map_leaves(state[key], Tensor, Tensor.item) for key in _NUMBERS if key in state}


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Lay out the moments as their parameters are: fused kernels want it, and a CPU's layout may differ from CUDA's."""
    for parameter, moments in optimizer.state.items():
        for name, value in moments.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                moments[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def restore(task: Task, position: Position, state: dict[str, Any], global_batch: int) -> None:
    """Put a task and its position where `state` was taken; global_batch: images per optimiser step."""
    task.student.student.model.load_state_dict(state["student"])
    task.student.heads.load_state_dict(state["heads"])
    # how a step is computed is not part of a run: a saved choice would outlive a move from CPU to CUDA
    own, saved = task.optimizer.state_dict()["param_groups"], state["optimizer"]["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in saved]:
        raise UserError(
            "the checkpoint is of an earlier version, whose optimiser grouped the weights in another way. Finish the "
            "run with that version, or start afresh: --no_resume"
        )
    for group, present in zip(saved, own, strict=True):
        group.update({key: present[key] for key in ("fused", "foreach", "capturable")})
    task.optimizer.load_state_dict(state["optimizer"])
    _match_strides(task.optimizer)
    # fp16 alone has a scale; checkpoints of other precisions have none, or (of earlier versions) one that never grows
    if task.scaler.is_enabled() and state["scaler"].get("growth_interval", _NEVER) != _NEVER:
        task.scaler.load_state_dict(state["scaler"])
    task.bad_steps.count.fill_(state["num_bad_steps"])
    if state["target_statistics"]:
        task.teacher.load_statistics(state["target_statistics"])
    if task.queue is not None and state.get("queue") is not None:
        task.queue.load_state(state["queue"])
    if task.ema is not None and state["ema"] is not None:
        task.ema.load_state(state["ema"], state.get("ema_heads"))
    place = state["progress"]
    position.step, position.epoch, position.samples = place["step"], place["epoch"], place["samples"]
    position.epoch_start = position.step - position.samples // global_batch
