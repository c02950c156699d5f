"""Where a command begins in a run folder: the same command, run again, goes on and never goes back."""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from distillery.checkpoint import checkpoint_dir, hash_of, is_complete, latest_checkpoint, newer_checkpoints
from distillery.metrics import METRICS_NAME
from distillery.run_folder import CONFIG_NAME, identity_of, is_preempted, set_aside
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import write_atomic

# by which flag the run in a folder began; absent when by none
START_NAME = "start.json"


@dataclass(frozen=True)
class Start:
    """How a run begins.

    checkpoint: to go on from, or None; notes: for the user; fresh: what the folder holds is set aside first; goes_back:
    so are the checkpoints after `checkpoint`, which is one of this folder; record: for start.json.
    """

    checkpoint: Path | None
    notes: list[str]
    fresh: bool = False
    goes_back: bool = False
    record: dict = field(default_factory=dict)


def find_start(
    run_dir: Path,
    config: dict[str, dict],
    *,
    resume_from: Path | None = None,
    no_resume: bool = False,
    job: str | None = None,
    restarts: int = 0,
    again: bool = False,
) -> Start:
    """Decide where to begin; nothing is written.

    A flag that leads back acts once: schedulers run the same command again. The run goes on from its newest checkpoint
    in spite of the flag when the folder says that it began with it and, for --resume_from, with that file; for
    --no_resume, with this configuration, and since then this very job has been requeued, or the run was cut short with
    status 75, or the launcher has started this process again.

    Args:
        run_dir: the run folder.
        config: {"data": {...}, "train": {...}, "model": {...}} of this start.
        resume_from: the flag's value.
        no_resume: the flag.
        job: names the job, the same after each requeue; None outside of one.
        restarts: how often the job has been requeued.
        again: whether the launcher has started this process again after a failure.

    Raises:
        UserError: --resume_from names a damaged or another run's checkpoint while this folder holds a run.
    """
    record, identity = _read_record(run_dir), identity_of(config)
    if no_resume:
        new = {"flag": "--no_resume", "identity": identity}
        is_requeued = job is not None and record.get("job") == job and restarts > record.get("restarts", restarts)
        if not (_agrees(record, new) and (is_requeued or is_preempted(run_dir) or again)):
            record = new | {"job": job, "restarts": restarts}
            return Start(None, ["starting afresh (--no_resume)"], fresh=True, record=record)
    elif resume_from is not None:
        new = {"flag": "--resume_from", "path": str(resume_from.resolve())}
        if resume_from.is_file():  # a run may have pruned the file that it began from
            new["hash"] = hash_of(resume_from)
        if not _agrees(record, new):
            return _start_from(run_dir, resume_from, new)
    newest = latest_checkpoint(run_dir)
    if newest is not None:
        flag = "--no_resume" if no_resume else "--resume_from" if resume_from else None
        notes = [f"going on from {newest}"]
        if flag:
            notes.append(f"{flag} was acted on when this run began; to do so again, delete {run_dir / START_NAME}")
        return Start(newest, notes, record=record)
    if resume_from is not None:
        return Start(resume_from, [f"going on from {resume_from}"], record=record)
    if _is_of_another(run_dir, identity):
        note = "starting a new run; what an earlier start with another configuration left here is set aside"
        return Start(None, [note], fresh=True)
    return Start(None, ["starting a new run"], record=record)


def _agrees(record: dict, new: dict) -> bool:
    return all(record.get(key) == value for key, value in new.items())


def _start_from(run_dir: Path, path: Path, record: dict) -> Start:
    if not path.is_file():
        raise MissingFileError(f"--resume_from {path}: there is no such file.")
    if path.with_suffix(".json").exists() and not is_complete(path):
        raise UserError(f"--resume_from {path}: damaged; it does not agree with the hash beside it.")
    is_own = path.resolve().parent == checkpoint_dir(run_dir).resolve()
    if not is_own and latest_checkpoint(run_dir) is not None:
        raise UserError(
            f"--resume_from {path}: {run_dir} holds checkpoints of another run. Give another checkpoint_dir, or leave "
            "the flag out to go on with the run that is there."
        )
    return Start(path, [f"going on from {path}"], goes_back=is_own, record=record)


def _is_of_another(run_dir: Path, identity: str) -> bool:
    """Whether a start that left no checkpoint had another configuration."""
    try:
        return identity_of(yaml.safe_load((run_dir / CONFIG_NAME).read_text())) != identity
    except FileNotFoundError:
        return False
    except (ValueError, AttributeError, yaml.YAMLError):
        return True


def _read_record(run_dir: Path) -> dict:
    try:
        record = json.loads((run_dir / START_NAME).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def prepare_folder(run_dir: Path, start: Start, step: int) -> list[str]:
    """Bring the folder into the state that a start asks for; returns what to tell the user.

    step: of the checkpoint to go on from. A kill in the middle is harmless: the same command does the rest.
    """
    moved = None
    if start.fresh:
        moved = set_aside(run_dir)
    elif start.goes_back:
        moved = set_aside(run_dir, newer_checkpoints(run_dir, step))
        if moved and (run_dir / METRICS_NAME).exists():
            shutil.copy2(run_dir / METRICS_NAME, moved)
    if start.record:
        write_atomic(run_dir / START_NAME, json.dumps(start.record, indent=1).encode() + b"\n")
    return [f"what is given up by this is kept in {moved}"] if moved else []
