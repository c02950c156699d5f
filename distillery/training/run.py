"""Put the parts of a run together: one epoch, its checkpoints and its log."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distillery.config.load import Configs
from distillery.reading.loader import DevicePrefetcher, PretrainingLoader
from distillery.system import distributed
from distillery.system.console import ProgressLine
from distillery.system.signals import StopFlag
from distillery.training import bindings
from distillery.training.batches import StepLoader
from distillery.training.build import first_batches, global_batch_size
from distillery.training.checkpoints import CheckpointWriter, Proof, state_on_device
from distillery.training.compilation import compile_now, num_graphs
from distillery.training.describe import describe_batch
from distillery.training.engine import check_numbers, rehearse_step, train_one_epoch
from distillery.training.learning import Course, first_lines, is_first_look
from distillery.training.log import CURVE_KINDS, RunLog, epoch_line, read_rows, training_fields
from distillery.training.optimizer import default_learning_rate
from distillery.training.task import Position, Task
from distillery.training.watch import finite_weights


@dataclass(frozen=True)
class Run:
    """What an epoch, a checkpoint and an evaluation of a run need.

    position: moved along by every step; shards, teacher_hash: what the run is bound to, for its checkpoints.
    """

    configs: Configs
    loader: PretrainingLoader
    task: Task
    position: Position
    steps_in_epoch: int
    shards: dict[str, Any]
    teacher_hash: str
    checkpoints: CheckpointWriter
    log: RunLog
    console: ProgressLine
    stop: StopFlag


def compile_step(run: Run) -> None:
    """Compile what the run compiles, before its first step: a batch of every kind of step goes through it once."""
    task, position = run.task, run.position
    if not task.compiled:
        return
    run.console.message("torch.compile: compiling, which takes a minute or more")
    batches = first_batches(run.loader, task, position.epoch)
    run.loader.load_state_dict({"epoch": position.epoch, "samples": position.samples})
    run.console.message(compile_now(lambda: [rehearse_step(task, batch) for batch in batches]))


def train_epoch(run: Run) -> None:
    """Train the rest of the current epoch, or stop early at a request to stop."""
    train, task, position, rows = run.configs.train, run.task, run.position, []
    if distributed.is_main():
        row = bindings.epoch_row(run.loader, position.epoch)
        run.log.write_epoch(position.epoch, position.epoch_start, **row)
    epoch_end, graphs = position.epoch_start + run.steps_in_epoch, num_graphs() if task.compiled else 0
    save_every_minutes = train.save_every_minutes or math.inf
    batches = StepLoader(task, run.loader, epoch=position.epoch, step=position.step)

    def is_due_by_steps() -> bool:
        return bool(train.save_every) and position.step % train.save_every == 0 and position.step != epoch_end

    def is_due_by_clock() -> bool:
        # rank 0's clock decides: the others write nothing, and do not know when it did
        return distributed.is_main() and run.checkpoints.minutes_since_last() >= save_every_minutes

    def save_by_clock() -> None:
        if not is_due_by_steps():  # after_step has just saved: several processes ask for the clock before the step
            save(run)

    def after_step(position: Position, row: dict[str, float] | None) -> None:
        if row is not None:
            run.log.write("train", step=position.step, epoch=position.epoch, **row)
            rows.append(row)
            run.checkpoints.raise_if_failed()
            if is_first_look(position.step, train.log_every):
                say_learning(run, first_lines)
        run.console.advance(1, epoch=position.epoch + 1, **(training_fields(row) if row else {}))
        if is_due_by_steps():
            save(run)

    train_one_epoch(
        task,
        DevicePrefetcher(batches, task.device),
        position,
        run.stop,
        steps_in_epoch=run.steps_in_epoch,
        log_every=train.log_every,
        after_step=after_step,
        is_save_due=is_due_by_clock,
        save=save_by_clock,
    )
    check_numbers(task)  # of the steps since the last logged one
    if task.compiled and num_graphs() > graphs:
        run.console.message(f"torch.compile: {num_graphs() - graphs} graphs more, made during the epoch: please report")
    if position.step == epoch_end:
        position.next_epoch()
        run.console.message(epoch_line(position.epoch, train.num_epochs, position.step, rows))


def say_learning(run: Run, lines_of: Callable[..., list[str]], **place: int) -> None:
    """Print what the run's log says of the student's learning; lines_of: of (rows, course, step=..., **place)."""
    if not distributed.is_main():
        return
    train, schedule = run.configs.train, run.task.schedule
    rule = default_learning_rate(global_batch_size(train), run.task.student, train.optimizer)
    course = Course(schedule, rule if train.learning_rate else None, train.eval_every_epochs)
    for line in lines_of(read_rows(run.log.path), course, step=run.position.step, **place):
        run.console.message(line)


def save(run: Run) -> None:
    """Write a checkpoint of this moment, or begin to. All ranks call it; rank 0 writes.

    Nothing here waits for a GPU. The writer finds numbers that are not finite, and writes nothing then.
    """
    # gloo raises here when a rank has died; a write begun before that would wait for a GPU that waits for this rank
    distributed.wait_for_all()
    bad_steps = run.task.bad_steps
    is_lost = distributed.any_rank_on_device(bad_steps.count > bad_steps.allowed)
    if not distributed.is_main():
        return
    train, cache = run.configs.train, run.task.stored and run.task.stored.cache
    state = state_on_device(run.task, run.position) | {
        "config": run.configs.as_dict(),
        "shards": run.shards,
        "teacher_hash": run.teacher_hash,
        "teacher_cache": cache and cache.fingerprint,
        "global_batch_size": global_batch_size(train),
        "global_batch_text": describe_batch(train),
    }
    best = run.log.best_step(run.checkpoints.steps())
    protect = () if best is None else (best,)
    proof = Proof(*finite_weights(run.task.student), is_lost)
    run.checkpoints.save(state, run.position.step, keep=train.keep_checkpoints, protect=protect, proof=proof)


def open_log(configs: Configs, task: Task, position: Position, num_images: int, baselines: Callable[[], str]) -> RunLog:
    """The run's log, cut back to where the run stands; its "start" row says what the run will do.

    num_images: that the run trains on; baselines: a hash of what decides the evaluation before the first step. Where an
    earlier start without a checkpoint had another, its evaluation goes.
    """
    train, is_main = configs.train, distributed.is_main()
    log = RunLog(
        train.checkpoint_path, tensorboard=train.tensorboard, wandb_project=train.wandb_project, is_main=is_main
    )
    plan = bindings.plan_of(task, num_images) | {"global_batch_size": global_batch_size(train)}
    rows = read_rows(log.path) if is_main else []
    starts = [row for row in rows if row.get("kind") == "start"]
    is_ahead = any(row.get("kind") in CURVE_KINDS and row.get("step", 0) > position.step for row in rows)
    is_other = False
    if is_main and position.step == 0:
        plan["baselines"] = baselines()
        is_other = bool(starts) and starts[-1].get("baselines") != plan["baselines"]
    if position.epoch < train.num_epochs or is_ahead:
        log.truncate_after(-1 if is_other else position.step)
    if not starts or any(starts[-1].get(key) != value for key, value in plan.items()):
        log.write("start", step=position.step, **plan)
    return log
