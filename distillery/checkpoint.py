"""Checkpoints that are complete or not there: one `.pt` file each, and a record beside it that is written last.

checkpoints/step_00000500.pt      torch.load(weights_only=True): student, heads, optimizer, ema, rng, progress, config
checkpoints/step_00000500.json    {"step", "bytes", "hash"}; a checkpoint without a matching record does not count
"""

import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

from distillery.system.errors import MissingFileError, RunError, UserError
from distillery.system.files import fsync_dir, hash_file, make_directory, temporary_name, write_atomic

_NAME = re.compile(r"step_(\d{8,})\.pt")


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
    """The newest complete checkpoint of a run; damaged newer ones are passed over, and that is said.

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
