"""The folder of a run: what it trains on, how it begins, what is set aside."""

import itertools
import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from distillery.config.load import Configs, dump_configs
from distillery.system.errors import MissingFileError, UserError
from distillery.system.files import expand_path, make_directory, write_atomic
from distillery.system.launcher import is_restarted
from distillery.system.machine import environment_number, environment_text
from distillery.training.build import global_batch_size
from distillery.training.checkpoints import (
    checkpoint_dir,
    hash_of,
    is_complete,
    latest_checkpoint,
    load_checkpoint,
    newer_checkpoints,
)
from distillery.training.describe import describe_batch
from distillery.training.identity import check_global_batch, compare_configs, identity_of
from distillery.training.lock import LOCK_NAME, RunLock
from distillery.training.log import METRICS_NAME

CONFIG_NAME = "config.yaml"
SHARDS_NAME = "shards.json"
# written when a run stops early with everything saved; slurm/train.sbatch reads it under torchrun, whose own exit
# status is 1 whatever its workers say
PREEMPTED_NAME = "PREEMPTED"
# by which flag the run in a folder began; absent when by none
START_NAME = "start.json"


def freeze_shards(run_dir: Path, content: dict[str, Any]) -> None:
    """Record what a run trains on: {"fingerprint", "shards": names, "rows": usable rows of each}.

    A run on raw images has no shards, and one entry in rows.
    """
    write_atomic(run_dir / SHARDS_NAME, json.dumps(content, indent=1).encode() + b"\n")


def frozen_shards(run_dir: Path) -> dict[str, Any] | None:
    """What freeze_shards recorded, or None."""
    path = run_dir / SHARDS_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return {"fingerprint": content["fingerprint"], "shards": [*content["shards"]], "rows": [*content["rows"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}). Delete it to go by what the newest checkpoint says.") from error


def check_images(frozen: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    """Raise UserError when a cache is of other images than a run was started on. Arguments as of check_shards."""
    was, is_now = (content["fingerprint"][:16] or "none" for content in (frozen, found))
    if frozen["fingerprint"] != found["fingerprint"]:
        raise UserError(
            f"{where} holds other images than this run was started on (fingerprint {is_now}, {SHARDS_NAME} has {was}). "
            "Give the cache it was started on as cache_dir, or another checkpoint_dir for a new run."
        )


def check_shards(frozen: dict[str, Any], found: dict[str, Any], where: Path) -> None:
    """Raise UserError when what a run was started on is no longer what is there.

    frozen, found: as freeze_shards takes them; where: the cache folder, for the message.
    """
    check_images(frozen, found, where)
    for name, before, now in zip(frozen["shards"] or ["all images"], frozen["rows"], found["rows"], strict=True):
        if before != now:
            raise UserError(f"{where}: {name} has {now} usable rows, this run was started with {before}.")


def is_preempted(run_dir: Path) -> bool:
    """Whether the run stopped early, with status 75, and has not been started again since."""
    return (run_dir / PREEMPTED_NAME).exists()


def mark_preempted(run_dir: Path, reason: str, step: int) -> None:
    """Leave word that the run stopped early; the second line says which start of which job it was."""
    job, restarts = environment_text("SLURM_JOB_ID") or "none", environment_number("SLURM_RESTART_COUNT") or 0
    write_atomic(run_dir / PREEMPTED_NAME, f"{reason} at step {step}\njob {job} restart {restarts}\n".encode())


def set_aside(run_dir: Path, paths: Iterable[Path] | None = None, *, copied: Iterable[Path] = ()) -> Path | None:
    """Move what an earlier run left to previous_1, previous_2, ...; nothing is deleted.

    paths: of files under run_dir, in the order in which they are to go; None: everything. copied: files that stay, and
    are copied before the first one goes.
    """
    if paths is None:
        paths = [path for path in run_dir.glob("*") if not path.name.startswith(("previous_", LOCK_NAME))]
        # by the configuration the next start sees whose the rest is, should this one be killed here
        paths.sort(key=lambda path: path.name == CONFIG_NAME)
    if not (paths := list(paths)):
        return None
    # one may have been deleted to make room: what the others hold is never overwritten
    free = (run_dir / f"previous_{number}" for number in itertools.count(1))
    target = next(path for path in free if not path.exists())
    target.mkdir()
    for path in copied:
        shutil.copy2(path, target)
    for path in paths:
        destination = target / path.relative_to(run_dir)
        destination.parent.mkdir(parents=True, exist_ok=True)
        path.rename(destination)
    return target


def check_place(run_dir: Path) -> None:
    """Raise UserError where a run folder cannot be: it, or what it shall be in, is a file."""
    found = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    if not found.is_dir():
        raise UserError(f"checkpoint_dir {run_dir}: {found} is a file. Give the path of a folder, there or to be made.")


@dataclass(frozen=True)
class Start:
    """How a run begins.

    checkpoint: to go on from, or None; notes: for the user; sets_all_aside: what the folder holds is moved away first;
    sets_newer_aside: only the checkpoints after `checkpoint`, which is one of this folder; record: for start.json.
    """

    checkpoint: Path | None
    notes: list[str]
    sets_all_aside: bool = False
    sets_newer_aside: bool = False
    record: dict = field(default_factory=dict)


def look_at_folder(
    lock: RunLock, configs: Configs, *, resume_from: Path | None, no_resume: bool, is_plan: bool
) -> tuple[Start, dict[str, Any] | None, dict[str, Any] | None]:
    """Decide where a run begins; nothing is written. A --dry_run (is_plan) takes no lock.

    Returns:
        (the start, the content of its checkpoint or None, the shards that the run was started on or None).
    Raises:
        UserError: the run cannot go on with this configuration, as the functions called here say.
    """
    run_dir, config, state, frozen = configs.train.checkpoint_path, configs.as_dict(), None, None
    check_place(run_dir)
    if not is_plan:
        lock.take(create=False)
    start = find_start(
        run_dir,
        config,
        resume_from=resume_from and expand_path(resume_from),
        no_resume=no_resume,
        job=environment_text("SLURM_JOB_ID"),
        restarts=environment_number("SLURM_RESTART_COUNT") or 0,
        again=is_restarted(),
    )
    if start.checkpoint is not None:
        state = load_checkpoint(start.checkpoint)
        changes = compare_configs(start.checkpoint if resume_from else run_dir, state["config"], config)
        start = replace(start, notes=[*start.notes, *(f"changed since then: {line}" for line in changes)])
        check_global_batch(state, global_batch_size(configs.train), describe_batch(configs.train))
    if not configs.train.refresh_shards:
        frozen = (None if start.sets_all_aside else frozen_shards(run_dir)) or (state or {}).get("shards")
    return start, state, frozen


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
        new = {"flag": "--no_resume"}
        is_requeued = job is not None and record.get("job") == job and restarts > record.get("restarts", restarts)
        is_same = _agrees(record, new) and not _is_of_another(run_dir, identity)
        if not (is_same and (is_requeued or is_preempted(run_dir) or again)):
            record = new | {"job": job, "restarts": restarts}
            return Start(None, ["starting afresh (--no_resume)"], sets_all_aside=True, record=record)
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
        return Start(None, [note], sets_all_aside=True)
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
    # what an earlier start left here without a checkpoint is another run's; the file itself stays where it is
    place, folder = path.resolve(), run_dir.resolve()
    stays = not place.is_relative_to(folder) or place.relative_to(folder).parts[0].startswith("previous_")
    return Start(
        path, [f"going on from {path}"], sets_all_aside=stays and not is_own, sets_newer_aside=is_own, record=record
    )


def _is_of_another(run_dir: Path, identity: str) -> bool:
    """Whether the folder's configuration is another one; False where it has none."""
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
    """Bring the folder into the state that a start needs; return the lines to print.

    step: that of the checkpoint to go on from. A kill in the middle is harmless: the same command does the rest.
    """
    moved = None
    if start.sets_all_aside:
        moved = set_aside(run_dir)
    elif start.sets_newer_aside:
        log = run_dir / METRICS_NAME  # it will be cut back
        moved = set_aside(run_dir, newer_checkpoints(run_dir, step), copied=[log] if log.exists() else [])
    if start.record:
        write_atomic(run_dir / START_NAME, json.dumps(start.record, indent=1).encode() + b"\n")
    return [f"what is given up by this is kept in {moved}"] if moved else []


def claim_folder(lock: RunLock, configs: Configs, start: Start, step: int, shards: dict[str, Any]) -> None:
    """Make the folder this run's: take the lock, prepare_folder, write down configuration and shards.

    step: of the checkpoint to go on from; shards: as freeze_shards takes them.
    """
    run_dir = configs.train.checkpoint_path
    make_directory(run_dir)
    lock.take(create=True)
    for note in prepare_folder(run_dir, start, step):
        print(note, flush=True)
    (run_dir / PREEMPTED_NAME).unlink(missing_ok=True)
    write_atomic(run_dir / CONFIG_NAME, dump_configs(configs).encode())
    freeze_shards(run_dir, shards)
