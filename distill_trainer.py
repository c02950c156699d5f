"""Stage 2: train the student to produce the teacher's features, from the shards that stage 1 made.

    python distill_trainer.py --data_config data_config.yaml --train_config train_config_kd.yaml \\
                              --model_config model_config_kd.yaml         # run again after any interruption: it goes on
    torchrun --nproc_per_node=4 distill_trainer.py ...                     # the same flags on four GPUs
    python distill_trainer.py ... --dry_run                                # schedule, hours, advice; nothing written

Exit status: 0 done; 2 wrong usage or configuration; 75 interrupted after saving, run the same command again; 1 anything
else. A new loss is a function in distillery/losses/terms.py and a line in losses_table.py, a new kind of model goes
into distillery/models/builders.py; this file only puts the parts together.
"""

import functools
from typing import Any

from distillery.command_line import TrainingCommand, parse_training_command
from distillery.system.errors import EXIT_DONE, EXIT_INTERRUPTED, Interrupted, RunError, UserError, run_command
from distillery.system.machine import environment_number, environment_text
from distillery.system.signals import StopFlag

# before torch is imported, which takes seconds: --help and mistakes in flags or YAML files answer at once
COMMAND = run_command(lambda: parse_training_command(__doc__)) if __name__ == "__main__" else None

import torch

from data_loader import DevicePrefetcher, build_pretraining_dataloader
from distillery.config.load import dump_configs
from distillery.evaluate.during import RunEvaluation
from distillery.models import configured
from distillery.report import pictures
from distillery.report.page import summary_table, write_plots, write_report
from distillery.system import distributed
from distillery.system.console import Progress as ConsoleProgress
from distillery.system.files import expand_path, make_directory, write_atomic
from distillery.system.launcher import is_restarted
from distillery.teacher_cache.opening import open_teacher_cache
from distillery.teacher_cache.reader import TeacherCache
from distillery.training import bindings, build, describe, folder
from distillery.training.checkpoints import CheckpointWriter, load_checkpoint, restore, state_of
from distillery.training.engine import Progress, check_first_step, check_numbers, train_one_epoch
from distillery.training.estimate import SyntheticLoader, plan_loader, plan_run
from distillery.training.folder import find_start, prepare_folder
from distillery.training.log import RunLog, epoch_line, read_rows, training_fields
from distillery.training.watch import check_weights


def main(command: TrainingCommand) -> int:
    """Join the other processes if there are any, then train."""
    with StopFlag(command.arguments.max_minutes) as stop:
        device = configured.choose_device(command.arguments.device)
        with distributed.process_group(device, lambda: stop.requested):
            return Run(command, device, stop).train()


class Run:
    """One training run: its folder, its objects, where it stands."""

    def __init__(self, command: TrainingCommand, device: torch.device, stop: StopFlag) -> None:
        self.arguments, self.configs, self.device, self.stop = command.arguments, command.configs, device, stop
        self.data, self.training = self.configs.data, self.configs.train
        self.dir = self.training.checkpoint_path
        self.is_main = distributed.is_main()
        self.lock = folder.RunLock(self.dir)
        # process 0 alone looks at the disk: two nodes may not see the same files yet
        self.begin, self.state, frozen, self.notes = distributed.on_main(self._look_at_folder)
        self.loader = self._build_loader(frozen)
        self.shards = bindings.shards_of(self.loader)
        if frozen is not None:
            folder.check_shards(frozen, self.shards, self.data.cache_dir)
        self.steps_in_epoch = build.steps_per_epoch(
            self.training, self.loader.valid_rows_per_shard, self.data.shards_per_epoch
        )
        self.cache = self._open_teacher_cache()  # None: every step runs the teacher
        self.teacher, self.student = build.build_models(self.configs, device, self.cache)
        self.schedule = build.build_schedule(self.training, self.student, self.steps_in_epoch, *self._finished_epochs())
        self.task = build.build_task(
            self.configs, self.teacher, self.student, self.schedule, self.loader.normalized, device, self.cache
        )
        self.evaluation = self._build_evaluation()
        self.progress, self.first_step = Progress(), 0
        on_gpu = device.type == "cuda"
        self.checkpoints = CheckpointWriter(self.dir, self.begin.checkpoint, in_background=on_gpu)
        self.tells_compilation = self.training.compile_student or self.training.compile_teacher

    def _look_at_folder(self) -> tuple:
        """(where to begin, the checkpoint's content, the frozen shards, what to tell the user)."""
        folder.check_place(self.dir)
        if not self.arguments.dry_run:
            self.lock.take(create=False)
        config = self.configs.as_dict()
        given = self.arguments.resume_from
        begin = find_start(
            self.dir,
            config,
            resume_from=given and expand_path(given),
            no_resume=self.arguments.no_resume,
            job=environment_text("SLURM_JOB_ID"),
            restarts=environment_number("SLURM_RESTART_COUNT") or 0,
            again=is_restarted(),
        )
        state, notes, frozen = None, list(begin.notes), None
        if begin.checkpoint is not None:
            state = load_checkpoint(begin.checkpoint)
            where = begin.checkpoint if given else self.dir
            harmless = folder.compare_configs(where, state["config"], config)
            notes += [f"changed since then: {line}" for line in harmless]
            folder.check_global_batch(
                state, build.global_batch_size(self.training), describe.describe_batch(self.training)
            )
        if not begin.fresh and not self.training.refresh_shards:
            frozen = folder.frozen_shards(self.dir) or (state or {}).get("shards")
        return begin, state, frozen, notes

    def _build_loader(self, frozen: dict | None) -> Any:
        build_loader = functools.partial(
            build_pretraining_dataloader,
            bindings.data_of_frozen(self.data, frozen),
            self.training,
            with_indices=True,
            raw=True,
            shards=(frozen or {}).get("shards") or None,
        )
        is_plan_only = self.arguments.dry_run and frozen is None
        return plan_loader(self.configs, build_loader) if is_plan_only else build_loader()

    def _open_teacher_cache(self) -> TeacherCache | None:
        is_plan, fingerprint = self.arguments.dry_run, self.state and self.state.get("teacher_cache")
        try:
            return open_teacher_cache(self.configs, self.loader, self.device, fingerprint=fingerprint, is_plan=is_plan)
        except UserError as error:
            if not is_plan:  # which says what it costs to make it
                raise
            self.notes.append(str(error))
            return None

    def _build_evaluation(self) -> RunEvaluation:
        is_evaluated = self.training.eval_every_epochs and not isinstance(self.loader, SyntheticLoader)
        return RunEvaluation(
            self.dir,
            build.eval_folders(self.data) if is_evaluated else {},
            self.student,
            self.teacher,
            lambda: build.loaded_teacher(self.configs, self.teacher, self.cache, self.device),
            k=self.training.knn_k,
            device=self.device,
            is_stopped=lambda: self.stop.requested,
        )

    def _finished_epochs(self) -> tuple[int, int]:
        """(steps, epochs) before the present epoch; on other shards, epochs may have been of another length."""
        if self.state is None:
            return 0, 0
        place = self.state["progress"]
        if self.state["shards"] != self.shards and place["samples"]:
            self.notes.append("the shards are others than before: the present epoch begins again")
            place["samples"] = 0
        return place["step"] - place["samples"] // build.global_batch_size(self.training), place["epoch"]

    def restore_or_prepare(self) -> None:
        """Put weights, optimiser and position where the checkpoint says, or get ready for a first step."""
        self.teacher_hash = bindings.teacher_hash(self.teacher, self.cache)
        if self.state is not None:
            bindings.check_same_teacher(self.dir, self.state, self.teacher_hash, self.cache)
            restore(self.task, self.progress, self.state, build.global_batch_size(self.training))
            if self.state["config"]["train"]["num_epochs"] != self.training.num_epochs:
                before, now = self.state["learning_rate"], self.schedule.at(self.progress.step)
                self.notes.append(
                    f"num_epochs changed: a new schedule; the learning rate goes from {before:.3g} to {now:.3g}"
                )
        elif self.training.standardise_targets and not self.arguments.dry_run:
            # one process gathers, so that all have the same to the last bit
            gather = functools.partial(build.gather_statistics, self.loader, self.task)
            self.teacher.load_statistics(distributed.on_main(gather))
        self.first_step = self.progress.step
        self.state = None  # weights and moments on the CPU, of no more use

    def train(self) -> int:
        """Everything, with the advice that an error deserves."""
        try:
            return self._train()
        except FloatingPointError as error:
            last = f". Last good checkpoint: {self.checkpoints.wait() or 'none yet'}" if self.is_main else ""
            raise RunError(f"{error}{last}") from error
        except UserError as error:
            if self.progress.step == self.first_step:
                raise
            raise RunError(str(error)) from error  # found wrong after training began: status 2 says nothing is written
        except Exception as error:
            if not describe.is_out_of_memory(error):
                raise
            step, size = self.progress.step, self.data.image_size
            raise RunError(describe.memory_advice(self.training, size, self.device, step)) from error
        finally:
            self.checkpoints.close()

    def _train(self) -> int:
        """The epoch loop."""
        self.restore_or_prepare()
        self.announce()
        if self.arguments.dry_run:
            self.announce_plan()
            return EXIT_DONE
        log = self.open_log()
        console = ConsoleProgress(
            self.schedule.total_steps, "steps", "training", initial=self.progress.step, enabled=self.is_main
        )
        while True:
            evaluated = distributed.on_main(lambda: self.evaluate_if_due(log, console))
            is_done = self.progress.epoch >= self.training.num_epochs
            if is_done or not evaluated or distributed.any_rank(self.stop.requested)[0]:
                break
            self.train_epoch(log, console)
            self.save(log)
        console.close()
        return self.finish(log, is_done=is_done and evaluated)

    def train_epoch(self, log: RunLog, console: ConsoleProgress) -> None:
        """What is left of the present epoch, or as much of it as a request to stop allows."""
        if self.progress.step == 0:
            first = build.first_images(self.loader, self.task)
            check_first_step(self.task, *first)
            self.show_models(log, first)
        if self.is_main:
            facts = bindings.epoch_facts(self.loader, self.progress.epoch)
            log.write_epoch(self.progress.epoch, self.progress.epoch_start, **facts)
        self.loader.load_state_dict({"epoch": self.progress.epoch, "samples": self.progress.samples})
        batches = self.loader
        if self.task.stored is not None:
            batches = self.task.stored.batches(self.loader, epoch=self.progress.epoch, step=self.progress.step)
        epoch_end = self.progress.epoch_start + self.steps_in_epoch
        rows: list[dict[str, float]] = []

        def after_step(progress: Progress, row: dict[str, float] | None) -> None:
            if row is not None:
                log.write("train", step=progress.step, epoch=progress.epoch, **row)
                rows.append(row)
            console.advance(1, epoch=progress.epoch + 1, **(training_fields(row) if row else {}))
            if self.tells_compilation:
                console.message(describe.compiled_graphs())
                self.tells_compilation = False
            save_every = self.training.save_every
            if save_every and progress.step % save_every == 0 and progress.step != epoch_end:
                self.save(log)

        train_one_epoch(
            self.task,
            DevicePrefetcher(batches, self.device),
            self.progress,
            self.stop,
            steps_in_epoch=self.steps_in_epoch,
            log_every=self.training.log_every,
            after_step=after_step,
        )
        if self.progress.step == epoch_end:
            self.progress.next_epoch()
            console.message(epoch_line(self.progress.epoch, self.training.num_epochs, self.progress.step, rows))

    def announce(self) -> None:
        """Say what will be done."""
        if not self.is_main:
            return
        num_images, is_plan = sum(self.shards["rows"]), self.arguments.dry_run
        lines = describe.describe_run(self.configs, self.task, self.steps_in_epoch, num_images, is_plan=is_plan)
        print("\n".join([*self.notes, *lines]), flush=True)

    def announce_plan(self) -> None:
        """How long it will take and what it needs, from a few steps that every process makes; advice."""
        place = self.progress
        lines = plan_run(self.configs, self.task, self.loader, self.steps_in_epoch, place.step, place.epoch)
        if self.is_main:
            print("\n".join(lines), flush=True)

    def open_log(self) -> RunLog:
        """The run folder made ready, and its metrics cut back to where the run stands."""
        distributed.on_main(self._prepare_folder)
        log = RunLog(
            self.dir,
            tensorboard=self.training.tensorboard,
            wandb_project=self.training.wandb_project,
            is_main=self.is_main,
        )
        if self.progress.epoch < self.training.num_epochs:
            log.truncate_after(self.progress.step)
        plan = bindings.plan_of(self.task, sum(self.shards["rows"]))
        plan["global_batch_size"] = build.global_batch_size(self.training)
        told = [row for row in read_rows(log.path) if row.get("kind") == "start"] if self.is_main else []
        if not told or any(told[-1].get(key) != value for key, value in plan.items()):
            log.write("start", step=self.progress.step, **plan)
        return log

    def _prepare_folder(self) -> None:
        make_directory(self.dir)
        self.lock.take(create=True)
        for note in prepare_folder(self.dir, self.begin, self.progress.step):
            print(note, flush=True)
        (self.dir / folder.PREEMPTED_NAME).unlink(missing_ok=True)
        write_atomic(self.dir / folder.CONFIG_NAME, dump_configs(self.configs).encode())
        folder.freeze_shards(self.dir, self.shards)

    def save(self, log: RunLog) -> None:
        """Write a checkpoint of this moment, or begin to; numbers that are not finite are an error instead."""
        check_numbers(self.task)
        if self.is_main:
            check_weights(self.student)
            state = state_of(self.task, self.progress) | {
                "config": self.configs.as_dict(),
                "shards": self.shards,
                "teacher_hash": self.teacher_hash,
                "teacher_cache": self.cache and self.cache.fingerprint,
                "global_batch_size": build.global_batch_size(self.training),
                "global_batch_text": describe.describe_batch(self.training),
            }
            best = log.best_step("knn_top1")
            keep, protect = self.training.keep_checkpoints, () if best is None else (best,)
            self.checkpoints.save(state, self.progress.step, keep=keep, protect=protect)

    def evaluate_if_due(self, log: RunLog, console: ConsoleProgress) -> bool:
        """Measure what is due at this point and not yet in the log: the baselines before the first step, the student
        every eval_every_epochs and at the end.

        Returns:
            False where a request to stop came before everything was measured.
        """
        epoch, step, every = self.progress.epoch, self.progress.step, self.training.eval_every_epochs
        is_last = epoch == self.training.num_epochs
        if not every or self.progress.samples or not (epoch % every == 0 or is_last):
            return True
        rows = [row for row in read_rows(log.path) if row.get("kind") == "eval" and row.get("step") == step]
        # the linear probe takes seconds to minutes: for the baselines and the outcome
        with console.paused():
            is_whole = self.evaluation.record(log, console, rows, step=step, epoch=epoch, linear=step == 0 or is_last)
        if is_whole and not rows and step > 0 and self.training.tensorboard:
            self.show_models(log, build.first_images(self.loader, self.task))
        return is_whole

    def show_models(self, log: RunLog, batch: tuple[torch.Tensor, ...]) -> None:
        """What the models are given for a few images, and the student's weights, in TensorBoard."""
        if self.is_main and self.training.tensorboard:
            with_weights = self.training.tensorboard_histograms
            pictures.log_models(log, self.task, batch, self.progress, with_weights=with_weights)

    def draw_features(self) -> str | None:
        """Pictures of what both models make of images; why there are none, where it has not worked."""

        def draw() -> None:
            pool = pictures.choose_pool(self.evaluation.folders, self.data)
            teacher = build.loaded_teacher(self.configs, self.teacher, self.cache, self.device)
            student, step = self.student.student, self.progress.step
            pictures.write_pictures(self.dir, teacher, student, pool, step=step, device=self.device)

        return pictures.why_not(draw)

    def finish(self, log: RunLog, *, is_done: bool) -> int:
        """Close the log; write plots and report; say how it went, or that the same command goes on."""
        self.checkpoints.wait()
        log.write_end(self.progress.step, "done" if is_done else self.stop.reason or "a request to stop")
        log.close()
        if is_done:
            if self.is_main:
                write_plots(self.dir)
                print(summary_table(self.dir) or "no eval_datasets: nothing was evaluated")
                why_no_pictures = self.draw_features()
                print(f"report: {write_report(self.dir, no_pictures=why_no_pictures)}")
            distributed.wait_for_all()  # srun --wait counts from the first that leaves
            return EXIT_DONE
        reason, step = self.stop.reason or "asked to stop", self.progress.step
        if self.is_main:
            folder.mark_preempted(self.dir, reason, step)
        # torchrun and srun end the others as soon as the first has left with a status that is not 0
        distributed.wait_for_all()
        if not self.is_main:
            return EXIT_INTERRUPTED
        saved = "saved at step" if self.checkpoints.last else "nothing to save yet at step"
        raise Interrupted(f"{reason}: {saved} {step} of {self.schedule.total_steps}. Run the same command again.")


if __name__ == "__main__":
    run_command(lambda: main(COMMAND))
