"""A run folder: the configuration it belongs to, the shards it trains on, and what may change between two starts."""

import json
from pathlib import Path

from distillery.files import write_atomic
from distillery.process import UserError

CONFIG_NAME = "config.yaml"
SHARDS_NAME = "shards.json"
# written on a signal under torchrun, whose own exit status is 1 whatever its workers say; slurm/train.sbatch reads it
PREEMPTED_NAME = "PREEMPTED"

# keys that change neither what is learnt nor its order: a resumed run may have other values
FREE_KEYS = {
    "data": {"num_workers", "prefetch_batches", "pin_memory", "eval_datasets", "cache_dir", "use_cached", "data_files",
             "data_dir", "max_failed_fraction"},
    "train": {"num_epochs", "log_every", "save_every", "keep_checkpoints", "eval_every_epochs", "knn_k", "tensorboard",
              "wandb_project", "compile_student", "max_bad_steps", "compile_teacher", "use_fused_adamw", "refresh_shards", "checkpoint_dir"},
    "model": {"teacher_repo", "teacher_checkpoint", "student_repo", "student_checkpoint"},
}  # fmt: skip
# these may change together, as long as their product with the number of processes stays the same
BATCH_KEYS = ("batch_size", "grad_accumulation_steps")


def compare_configs(run_dir: Path, before: dict, now: dict) -> list[str]:
    """The harmless differences between a run's configuration and the present one, a line each.

    Args:
        run_dir: for the message.
        before: {"data": {...}, "train": {...}, "model": {...}} of the run.
        now: the same of this start.

    Raises:
        UserError: other differences, listed field by field.
    """
    harmless, refused = [], []
    for section, free in FREE_KEYS.items():
        old, new = before.get(section, {}), now.get(section, {})
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                line = f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
                (harmless if key in free or key in BATCH_KEYS else refused).append(line)
    if refused:
        raise UserError(
            f"{run_dir} holds a run of another configuration:\n  " + "\n  ".join(refused) + "\n"
            "Nothing was written. Put the values back to go on with it, give another checkpoint_dir for a new run, "
            "or --no_resume to start afresh in this one."
        )
    return harmless


def check_global_batch(before: dict, now_global: int, now_text: str) -> None:
    """Raise UserError when the global batch of a checkpoint is not the present one, with the arithmetic."""
    if before["global_batch_size"] != now_global:
        raise UserError(
            f"the run was trained with a global batch of {before['global_batch_text']}; now it would be {now_text}. "
            "A position in the data can only be taken up with the same product: change batch_size or "
            "grad_accumulation_steps."
        )


def freeze_shards(run_dir: Path, fingerprint: str, shard_names: list[str]) -> None:
    """Record the shards a run trains on."""
    content = {"fingerprint": fingerprint, "shards": shard_names}
    write_atomic(run_dir / SHARDS_NAME, json.dumps(content, indent=1).encode() + b"\n")


def frozen_shards(run_dir: Path) -> dict | None:
    """{"fingerprint", "shards"} of a run that was started before, else None."""
    path = run_dir / SHARDS_NAME
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
        return {"fingerprint": content["fingerprint"], "shards": list(content["shards"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error}). Delete it to train on the cache's present shards.") from error


def set_aside(run_dir: Path) -> Path | None:
    """Move what an earlier run left in the folder to previous_1, previous_2, ...; nothing is deleted."""
    content = [path for path in run_dir.glob("*") if not path.name.startswith("previous_")]
    if not content:
        return None
    number = 1 + sum(1 for _ in run_dir.glob("previous_*"))
    target = run_dir / f"previous_{number}"
    target.mkdir()
    for path in content:
        path.rename(target / path.name)
    return target
