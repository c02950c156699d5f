"""Stage 2: train the student to produce the teacher's features, from the shards that stage 1 made.

    python distill_trainer.py --data_config data_config.yaml --train_config train_config_kd.yaml \\
                              --model_config model_config_kd.yaml         # run again after any interruption: it goes on
    torchrun --nproc_per_node=4 distill_trainer.py ...                     # the same flags on four GPUs
    python distill_trainer.py ... --dry_run                                # schedule, hours, advice; nothing written

Exit status: 0 done; 2 wrong usage or configuration; 75 interrupted after saving, run the same command again; 1 anything
else.

This file puts the parts together: distill() builds them in six steps, run_epochs() trains with them. An epoch stands in
distillery/training/run.py, a step in engine.py beside it. A new loss is a function in distillery/losses/terms.py and a
line in registry.py beside it; a new kind of model goes into distillery/models/builders.py.

torch takes seconds to import. The functions below import what needs it when they are called, after the command line is
parsed: --help and mistakes in flags or YAML files are answered at once.
"""

import argparse
import contextlib
import math
from pathlib import Path
from typing import Any

from distillery.config.load import Configs, load_configs
from distillery.losses.registry import check_losses, fields_needed
from distillery.system.errors import (
    EXIT_DONE,
    EXIT_INTERRUPTED,
    Interrupted,
    UserError,
    remember_invocation,
    run_command,
)
from distillery.system.launcher import check_environment
from distillery.system.signals import StopFlag
from distillery.training.log import import_wandb, read_rows


def parse_command_line() -> tuple[argparse.Namespace, Configs]:
    """The flags, and the configuration of the files that they name, --set applied.

    Raises:
        UserError: a file or a launcher's variable is missing or wrong; wrong flags exit with status 2 by themselves.
    """
    description, commands, statuses, _ = __doc__.split("\n\n", 3)
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f"{commands}\n\n{statuses}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--data_config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--train_config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--model_config", required=True, type=Path, metavar="YAML")
    parser.add_argument(
        "--device", choices=["auto", "cuda", "cpu"], default="auto", help="auto: CUDA where there is one"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume_from", type=Path, metavar="PATH", help="go on from this checkpoint file")
    start.add_argument("--no_resume", action="store_true", help="start afresh; what the run folder holds is set aside")
    parser.add_argument("--max_steps_per_epoch", type=int, metavar="N", help="overrides the key of the same name")
    parser.add_argument(
        "--max_minutes", type=_minutes, metavar="M", help="save and leave with status 75 after M minutes"
    )
    parser.add_argument("--dry_run", action="store_true", help="print schedule, hours, advice and stop; writes nothing")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="override one key of a YAML file (dots for nesting); may be repeated")  # fmt: skip
    arguments = parser.parse_args()
    if arguments.max_steps_per_epoch is not None:
        arguments.overrides.append(f"max_steps_per_epoch={arguments.max_steps_per_epoch}")
    remember_invocation(vars(arguments), arguments.overrides)
    configs = load_configs(arguments.data_config, arguments.train_config, arguments.model_config, arguments.overrides)
    weights = configs.train.distill_loss_weights
    check_losses(weights, configs.train.loss_options, configs.train.batch_size)
    if configs.model.teacher_out_indices and "layers" not in fields_needed(weights):
        raise UserError(
            "teacher_out_indices and student_out_indices are set, but no loss compares layers: add layers to "
            "distill_loss_weights, or set both to null"
        )
    check_environment()
    if configs.train.wandb_project is not None:
        import_wandb(configs.train.wandb_project)
    return arguments, configs


def _minutes(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r}: expected a number of minutes above 0")


def main() -> int:
    """Parse the command line, join the other processes if there are any, then train."""
    arguments, configs = parse_command_line()
    from distillery.models.configured import choose_device
    from distillery.system.distributed import process_group

    with StopFlag(arguments.max_minutes) as stop:
        device = choose_device(arguments.device)
        with process_group(device, lambda: stop.requested), contextlib.ExitStack() as at_end:
            return distill(arguments, configs, device, stop, at_end)


def distill(
    arguments: argparse.Namespace, configs: Configs, device: Any, stop: StopFlag, at_end: contextlib.ExitStack
) -> int:
    """Build the run in six steps, then train its epochs; --dry_run ends before the first. Returns the exit status.

    at_end: closes what must be closed however the run ends.
    """
    from distillery.evaluate.during import RunEvaluation
    from distillery.evaluate.sets import eval_sets
    from distillery.system.console import ProgressLine
    from distillery.system.distributed import is_main, on_main
    from distillery.teacher_cache.opening import open_teacher_cache
    from distillery.training import bindings, build, describe, estimate, folder
    from distillery.training.checkpoints import CheckpointWriter, restore
    from distillery.training.lock import RunLock
    from distillery.training.run import Run, open_log
    from distillery.training.task import Position

    data, train, run_dir = configs.data, configs.train, configs.train.checkpoint_path

    # 1. Look at the run folder: rank 0 alone decides where to begin, as two nodes may not see the same files yet.
    lock = RunLock(run_dir)
    flags = {"resume_from": arguments.resume_from, "no_resume": arguments.no_resume, "is_plan": arguments.dry_run}
    start, state, frozen = on_main(lambda: folder.look_at_folder(lock, configs, **flags))
    notes = [*start.notes]

    # 2. The images: a run that goes on has those of its start.
    loader = at_end.enter_context(contextlib.closing(build_loader(configs, frozen, is_plan=arguments.dry_run)))
    shards = bindings.shards_of(loader)
    if frozen is not None:
        folder.check_shards(frozen, shards, data.cache_dir)
    elif state is not None:  # refresh_shards: more shards, of the same images
        folder.check_images(state["shards"], shards, data.cache_dir)
    if state is not None:
        notes += bindings.begin_epoch_again(state, shards)
    steps_in_epoch = build.steps_per_epoch(train, loader.valid_rows_per_shard, data.shards_per_epoch)

    # 3. The teacher's stored outputs (None: every step runs the teacher), teacher and student.
    cache, fingerprint = None, state and state.get("teacher_cache")
    try:
        cache = open_teacher_cache(configs, loader, device, fingerprint=fingerprint, is_plan=arguments.dry_run)
    except UserError as error:
        if not arguments.dry_run:  # the plan says what it costs to make them
            raise
        notes.append(str(error))
    teacher, student = build.build_models(configs, device, cache)
    teacher_hash = bindings.teacher_hash(teacher, cache)

    # 4. The task, which is all that a step touches, and what measures the models.
    schedule = build.build_schedule(train, student, steps_in_epoch, *build.finished_epochs(state, train))
    compiled = state and state.get("compiled")
    task = build.build_task(configs, teacher, student, schedule, loader.normalized, device, cache, compiled=compiled)
    notes += build.crop_while_decoding(loader, task)
    has_evaluation = train.eval_every_epochs and not isinstance(loader, estimate.SyntheticLoader)
    evaluation = RunEvaluation(
        run_dir,
        eval_sets(data, train.knn_k) if has_evaluation else [],
        student,
        teacher,
        lambda: build.loaded_teacher(configs, teacher, cache, device),
        teacher_hash=teacher_hash,
        ema=task.ema,
        k=train.knn_k,
        device=device,
        is_stopped=lambda: stop.requested,
        precision=task.precision,
    )

    position, first_step = Position(), state["progress"]["step"] if state else 0
    checkpoints = CheckpointWriter(run_dir, start.checkpoint, in_background=device.type == "cuda")
    with describe.advice_on_errors(configs, device, position, first_step, checkpoints):
        # 5. Weights, optimiser and position of the checkpoint; a new run measures the teacher's features first.
        if state is not None:
            bindings.check_same_teacher(run_dir, state, teacher_hash, cache)
            restore(task, position, state, build.global_batch_size(train))
            notes += describe.describe_changes(state, train, task)
        elif train.standardise_targets and not arguments.dry_run:
            # rank 0 gathers, so that all ranks have the same numbers to the last bit
            teacher.load_statistics(on_main(lambda: build.gather_statistics(loader, task)))
        del state  # weights and moments on the CPU, of no more use

        # 6. Print what will be done; the folder becomes this run's.
        lines = describe.describe_run(
            configs, task, steps_in_epoch, shards["rows"], is_new=start.checkpoint is None, is_plan=arguments.dry_run
        )
        if is_main():
            print("\n".join([*notes, *lines]), flush=True)
        if arguments.dry_run:
            lines = estimate.plan_run(configs, task, loader, steps_in_epoch, position.step, position.epoch)
            if is_main():
                print("\n".join(lines), flush=True)
            return EXIT_DONE
        on_main(lambda: folder.claim_folder(lock, configs, start, position.step, shards))
        log = open_log(configs, task, position, sum(shards["rows"]), evaluation.baselines)
        console = ProgressLine(schedule.total_steps, "steps", "training", initial=position.step, enabled=is_main())
        run = Run(
            configs=configs, loader=loader, task=task, position=position, steps_in_epoch=steps_in_epoch,
            shards=shards, teacher_hash=teacher_hash, checkpoints=checkpoints, log=log, console=console, stop=stop,
        )  # fmt: skip
        return run_epochs(run, evaluation)


def run_epochs(run: Any, evaluation: Any) -> int:
    """Train, save and evaluate epoch after epoch until the end or a request to stop; returns the exit status.

    run: a training.run.Run; evaluation: a RunEvaluation of its models.
    """
    from distillery.system.distributed import any_rank
    from distillery.training.build import first_images
    from distillery.training.engine import check_first_step
    from distillery.training.run import compile_step, save, train_epoch

    loader, position, num_epochs = run.loader, run.position, run.configs.train.num_epochs
    # set_epoch keeps this position where it lies in the epoch that is set
    loader.load_state_dict({"epoch": position.epoch, "samples": position.samples})
    if position.step == 0:  # before the baselines, which may take long
        batch = first_images(loader, run.task, epoch=0)
        check_first_step(run.task, batch)
        show_models(run, batch)
    is_evaluated, first_epoch = evaluate_if_due(run, evaluation), position.epoch
    for epoch in range(first_epoch, num_epochs):
        if not is_evaluated or any_rank(run.stop.requested)[0]:
            break
        loader.set_epoch(epoch)
        if epoch == first_epoch:
            compile_step(run)
        train_epoch(run)
        save(run)
        is_evaluated = evaluate_if_due(run, evaluation)
    run.console.close()
    return finish(run, evaluation, is_done=is_evaluated and position.epoch >= num_epochs)


def build_loader(configs: Configs, frozen: dict | None, *, is_plan: bool) -> Any:
    """Batches of the run's images; a plan before stage 1 has random ones. frozen: what the run was started on."""
    from data_loader import build_pretraining_dataloader
    from distillery.training.bindings import data_of_frozen
    from distillery.training.estimate import synthetic_loader

    if is_plan and frozen is None and (loader := synthetic_loader(configs)) is not None:
        return loader
    data, shards = data_of_frozen(configs.data, frozen), (frozen or {}).get("shards") or None
    loader = build_pretraining_dataloader(data, configs.train, with_indices=True, raw=True, shards=shards)
    if is_plan:
        loader.staging = None  # a plan writes nothing
    return loader


def evaluate_if_due(run: Any, evaluation: Any) -> bool:
    """Measure what is due at this point and not yet in the log, then say how far the student is: the baselines before
    the first step, the student every eval_every_epochs and at the end. All ranks work on it together.

    Returns:
        False where a request to stop came before everything was measured.
    """
    from distillery.evaluate.progress import progress_lines
    from distillery.system.distributed import on_main
    from distillery.training.build import first_images
    from distillery.training.run import say_learning

    train, step, epoch = run.configs.train, run.position.step, run.position.epoch
    # num_epochs may have been lowered to less than the run has done
    every, is_last = train.eval_every_epochs, epoch >= train.num_epochs
    if not (is_last or (run.position.samples == 0 and every and epoch % every == 0)):
        return True
    rows = on_main(lambda: [row for row in read_rows(run.log.path) if row.get("kind") == "eval"])
    # linear probes take seconds to minutes: for the baselines and the outcome
    is_linear, is_whole = step == 0 or is_last, True
    if every:
        with run.console.paused():
            is_whole = evaluation.record(run.log, run.console, rows, step=step, epoch=epoch, linear=is_linear)
    # a run that starts again at this point prints them again: the new job's log begins with where the run stands
    if is_whole and step > 0:
        say_learning(run, progress_lines, epoch=epoch)
    is_new = all(row.get("step") != step for row in rows)
    if every and is_whole and is_new and step > 0 and train.tensorboard:
        on_main(lambda: show_models(run, first_images(run.loader, run.task, epoch)))
    return is_whole


def show_models(run: Any, batch: Any) -> None:
    """Show in TensorBoard what the models are given for a few images, and the student's weights."""
    from distillery.report.pictures import log_models
    from distillery.system.distributed import is_main

    train = run.configs.train
    if is_main() and train.tensorboard:
        log_models(run.log, run.task, batch, run.position, with_weights=train.tensorboard_histograms)


def finish(run: Any, evaluation: Any, *, is_done: bool) -> int:
    """Close the log, then write plots and report, or raise Interrupted: the same command goes on."""
    from distillery.report.page import summary_table, write_report
    from distillery.report.pictures import draw_features
    from distillery.system.distributed import is_main, wait_for_all
    from distillery.training.folder import mark_preempted

    run_dir, step, reason = run.log.run_dir, run.position.step, run.stop.reason
    run.checkpoints.wait()
    run.log.write_end(step, "done" if is_done else reason or "a request to stop")
    run.log.close()
    if is_done and is_main():
        why_no_pictures = draw_features(run_dir, evaluation, run.configs.data, step=step)
        report = write_report(run_dir, no_pictures=why_no_pictures)
        print(summary_table(run_dir) or "no eval_datasets: nothing was evaluated")
        print(f"report: {report}")
    elif is_main():
        mark_preempted(run_dir, reason or "asked to stop", step)
    # torchrun and srun end the others as soon as the first has left
    wait_for_all()
    if is_done:
        return EXIT_DONE
    if not is_main():
        return EXIT_INTERRUPTED
    saved = "saved at step" if run.checkpoints.last else "nothing to save yet at step"
    total = run.task.schedule.total_steps
    raise Interrupted(f"{reason or 'asked to stop'}: {saved} {step} of {total}. Run the same command again.")


if __name__ == "__main__":
    run_command(main)
