"""Checkpoints that are complete or not there: one `.pt` file each, and a record beside it that is written last.

checkpoints/step_00000500.pt      torch.load(weights_only=True): student, heads, optimizer, ema, rng, progress, config
checkpoints/step_00000500.json    {"step", "bytes", "hash"}; a checkpoint without a matching record does not count
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
import xxhash

from distillery.files import fsync_dir, temporary_name, write_atomic
from distillery.process import MissingFileError, RunError, UserError

_NAME = re.compile(r"step_(\d{8,})\.pt")


def checkpoint_dir(run_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return run_dir / "checkpoints"


def save_checkpoint(
    run_dir: Path, state: dict[str, Any], step: int, *, keep: int, protect: tuple[int, ...] = ()
) -> Path:
    """Write a checkpoint, then its record, then remove all but the newest `keep` and the protected steps.

    Raises:
        RunError: the disk is full or fails; the checkpoints before this one are untouched.
    """
    folder = checkpoint_dir(run_dir)
    path = folder / f"step_{step:08d}.pt"
    temporary = temporary_name(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        # torch reports a full disk without errno when it opens the file itself; through ours the OSError is kept
        with open(temporary, "xb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        record = {"step": step, "bytes": temporary.stat().st_size, "hash": _hash_of(temporary)}
        path.with_suffix(".json").unlink(missing_ok=True)  # of an older file of this name, if any
        os.replace(temporary, path)
        fsync_dir(folder)
        write_atomic(path.with_suffix(".json"), json.dumps(record).encode() + b"\n")
    except OSError as error:
        raise RunError(
            f"{path}: could not be written ({error.strerror}); the checkpoints before it are intact. "
            "Make room and run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    _prune(folder, keep, {step, *protect})
    return path


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


def _hash_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(8 << 20):
            digest.update(chunk)
    return f"xxh3_128:{digest.hexdigest()}"


def is_complete(path: Path) -> bool:
    """Whether a checkpoint's record is there and agrees with every byte of the file."""
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        return record["bytes"] == path.stat().st_size and record["hash"] == _hash_of(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run; a damaged newer one is passed over, and that is said."""
    for _, path in reversed(_numbered(checkpoint_dir(run_dir))):
        if is_complete(path):
            return path
        print(f"{path}: incomplete or damaged; going back to the checkpoint before it", file=sys.stderr)
    return None


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
