"""Stage 2: train the student to produce the teacher's features, from the shards that stage 1 made.

    python distill_trainer.py --data_config data_config.yaml --train_config train_config_kd.yaml \\
                              --model_config model_config_kd.yaml         # run again after any interruption: it goes on
    torchrun --nproc_per_node=4 distill_trainer.py ...                     # the same flags on four GPUs
    python distill_trainer.py ... --dry_run                                # the schedule, nothing written

Exit status: 0 done; 2 wrong usage or configuration; 75 interrupted after saving, run the same command again; 1 anything
else. A new loss goes into distillery/losses.py (a function and a line in LOSSES), a new kind of model into
distillery/models.py; this file only puts the parts together.
"""

import sys
from pathlib import Path

from distillery.command_line import TrainingCommand, parse_training_command
from distillery.process import EXIT_DONE, Interrupted, StopFlag, run_command

# before torch is imported, which takes seconds: --help and mistakes in flags or YAML files answer at once
COMMAND = run_command(lambda: parse_training_command(__doc__)) if __name__ == "__main__" else None

import torch
from data_loader import DevicePrefetcher, build_pretraining_dataloader
from distillery.evaluate import evaluate_on_folders
from distillery.metrics import RunLog
from distillery.report import summary_table, write_plots, write_report

from distillery import build, distributed, run_folder
from distillery.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from distillery.config import dump_configs
from distillery.engine import Progress, check_first_step, check_weights, train_one_epoch
from distillery.files import write_atomic
from distillery.progress import Progress as ConsoleProgress


def main(command: TrainingCommand) -> int:
    """Join the other processes if there are any, then train."""
    with StopFlag(command.arguments.max_minutes) as stop:
        device = build.choose_device(command.arguments.device)
        distributed.start(device.type)
        try:
            return Run(command, device, stop).train()
        finally:
            distributed.stop()


class Run:
    """One training run: its folder, its objects, where it stands."""

    def __init__(self, command: TrainingCommand, device: torch.device, stop: StopFlag) -> None:
        self.arguments, self.configs, self.device, self.stop = command.arguments, command.configs, device, stop
        self.data, self.training = self.configs.data, self.configs.train
        self.dir = self.training.checkpoint_path
        self.is_main = distributed.is_main()
        self.progress = Progress()
        # rank 0 alone looks at the disk: two nodes may not see the same files yet
        self.checkpoint_path, self.notes = distributed.decided_by_main(self._find_checkpoint)
        frozen = distributed.decided_by_main(self._frozen_shards)
        self.loader = build_pretraining_dataloader(self.data, self.training, with_indices=True, raw=True, shards=frozen)
        self.eval_folders = build.eval_folders(self.data) if self.training.eval_every_epochs else {}
        self.steps_in_epoch = build.steps_per_epoch(
            self.training, self.loader.valid_rows_per_shard, self.data.shards_per_epoch
        )
        self.schedule = build.build_schedule(self.training, self.steps_in_epoch)
        self.teacher, self.student = build.build_models(self.configs, device)
        self.task = build.build_task(
            self.configs, self.teacher, self.student, self.schedule, self.loader.normalized, device
        )

    # ---- where to start ------------------------------------------------------------------------------------------

    def _find_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The checkpoint to go on from, and what to tell the user about it."""
        if self.arguments.resume_from is not None:
            return self.arguments.resume_from, [f"going on from {self.arguments.resume_from}"]
        if self.arguments.no_resume:
            return None, ["starting afresh (--no_resume)"]
        path = latest_checkpoint(self.dir)
        return path, [f"going on from {path}"] if path else ["starting a new run"]

    def _frozen_shards(self) -> list[str] | None:
        if self.arguments.no_resume or self.training.refresh_shards:
            return None
        frozen = run_folder.frozen_shards(self.dir)
        return frozen and frozen["shards"]

    def start(self) -> None:
        """Put weights, optimiser and position where the checkpoint says, or prepare a new run."""
        if self.checkpoint_path is None:
            if self.training.standardise_targets:
                self.teacher.gather_statistics(self._statistics_batches())
            return
        state = load_checkpoint(self.checkpoint_path)
        self.notes += run_folder.compare_configs(self.dir, state["config"], self.config_dict())
        run_folder.check_global_batch(state, self._global_batch(), self._global_batch_text())
        self.student.student.model.load_state_dict(state["student"])
        self.student.heads.load_state_dict(state["heads"])
        self.task.optimizer.load_state_dict(state["optimizer"])
        self.task.scaler.load_state_dict(state["scaler"])
        self.task.num_bad_steps.fill_(state["num_bad_steps"])
        if self.training.standardise_targets:
            self.teacher.load_statistics(state["target_statistics"])
        if self.task.ema is not None and state["ema"] is not None:
            self.task.ema.state = {name: value.to(self.device) for name, value in state["ema"].items()}
        self.progress.step, self.progress.epoch = state["progress"]["step"], state["progress"]["epoch"]
        self.progress.samples = state["progress"]["samples"]
        if state["config"]["train"]["num_epochs"] != self.training.num_epochs:
            self.notes.append(
                f"num_epochs changed: a new schedule; the learning rate goes from {state['learning_rate']:.3g} to "
                f"{self.schedule.at(self.progress.step):.3g}"
            )

    def _statistics_batches(self, num_images: int = 2048, batch_size: int = 64):
        """Images spread evenly over the data, whatever the number of processes, for the targets' statistics."""
        dataset = self.loader.dataset
        count = min(num_images, len(dataset))
        rows = [i * len(dataset) // count for i in range(count)]
        for start in range(0, count, batch_size):
            images = torch.stack(dataset.__getitems__(rows[start : start + batch_size]))
            yield images.to(self.device)

    # ---- the run ---------------------------------------------------------------------------------------------------

    def train(self) -> int:
        """The epoch loop."""
        self.start()
        self.announce()
        if self.arguments.dry_run:
            return EXIT_DONE
        log = self.open_log()
        num_steps = self.schedule.total_steps
        console = ConsoleProgress(num_steps, "steps", "training", initial=self.progress.step, enabled=self.is_main)

        def after_step(progress, row) -> None:
            if row is not None:
                log.write("train", step=progress.step, epoch=progress.epoch, **row)
            shown = {"loss": row["loss"], "lr": row["lr"], "images/s": row["images_per_second"],
                     "wait": f"{row['data_wait_fraction']:.1%}"} if row else {}  # fmt: skip
            console.advance(1, epoch=progress.epoch, **shown)
            is_epoch_end = progress.step % self.steps_in_epoch == 0
            if self.training.save_every and progress.step % self.training.save_every == 0 and not is_epoch_end:
                self.save(log)

        while True:
            if self.is_evaluation_due(log) and not self.stop.requested:
                self.evaluate(log, console)
            if self.progress.epoch >= self.training.num_epochs or self.stop.requested:
                break
            self.loader.load_state_dict({"epoch": self.progress.epoch, "samples": self.progress.samples})
            batches = DevicePrefetcher(self.loader, self.device)
            if self.progress.step == 0:
                check_first_step(self.task, *self._first_batch())
            train_one_epoch(
                self.task,
                batches,
                self.progress,
                self.stop,
                steps_in_epoch=self.steps_in_epoch,
                log_every=self.training.log_every,
                after_step=after_step,
            )
            if self.progress.step == self.steps_in_epoch * (self.progress.epoch + 1):
                self.progress.epoch, self.progress.samples = self.progress.epoch + 1, 0
            self.save(log)
        console.close()
        return self.finish(log)

    def _first_batch(self):
        """A few images for the check before the first step."""
        images = next(iter(self._statistics_batches(num_images=8, batch_size=8)))
        return images, torch.arange(len(images), device=self.device)

    def announce(self) -> None:
        """Say what will be done."""
        if not self.is_main:
            return

        for note in self.notes:
            print(note)
        model = self.configs.model
        parameters = sum(value.numel() for value in self.student.student.model.parameters())
        print(f"teacher {model.teacher_name} -> student {model.student_name} ({parameters / 1e6:.2f} M parameters) "
              f"on {self.device}, {self.task.precision}")  # fmt: skip
        num_images = sum(self.loader.valid_rows_per_shard)
        print("\n".join(build.describe_schedule(self.configs, self.schedule, self.steps_in_epoch, num_images)))
        sys.stdout.flush()

    def open_log(self):
        """The run folder made ready: configuration and shard list written, metrics cut back to where the run stands."""
        if self.is_main:
            if self.arguments.no_resume:
                run_folder.set_aside(self.dir)
            self.dir.mkdir(parents=True, exist_ok=True)
            (self.dir / run_folder.PREEMPTED_NAME).unlink(missing_ok=True)
            write_atomic(self.dir / run_folder.CONFIG_NAME, dump_configs(self.configs).encode())
            if self.loader.shard_names is not None:
                run_folder.freeze_shards(self.dir, self.loader.fingerprint, self.loader.shard_names)
        log = RunLog(
            self.dir,
            tensorboard=self.training.tensorboard,
            wandb_project=self.training.wandb_project,
            is_main=self.is_main,
        )
        log.truncate_after(self.progress.step)
        return log

    def config_dict(self) -> dict:
        """The resolved configuration as plain values."""
        return {
            "data": self.data.model_dump(mode="json"),
            "train": self.training.model_dump(mode="json"),
            "model": self.configs.model.model_dump(mode="json"),
        }

    def _global_batch(self) -> int:
        return build.global_batch_size(self.training)

    def _global_batch_text(self) -> str:
        processes, steps = distributed.world_size(), self.training.grad_accumulation_steps
        factors = f"{self.training.batch_size} x {processes} processes x {steps}"
        return f"{self._global_batch()} images (batch_size x processes x grad_accumulation_steps = {factors})"

    def save(self, log) -> None:
        """Write a checkpoint of this moment; weights that are not finite are an error instead."""
        check_weights(self.student)
        if not self.is_main:
            return
        state = {
            "student": self.student.student.model.state_dict(),
            "heads": self.student.heads.state_dict(),
            "optimizer": self.task.optimizer.state_dict(),
            "ema": self.task.ema.state if self.task.ema else None,
            "rng": {"torch": torch.get_rng_state()},
            "progress": {"step": self.progress.step, "epoch": self.progress.epoch, "samples": self.progress.samples},
            "config": self.config_dict(),
            "scaler": self.task.scaler.state_dict(),
            "target_statistics": self.teacher.statistics_state(),
            "num_bad_steps": self.task.num_bad_steps.item(),
            "learning_rate": self.schedule.at(max(0, self.progress.step - 1)),
            "global_batch_size": self._global_batch(),
            "global_batch_text": self._global_batch_text(),
        }
        best = log.best_step("knn_top1")
        save_checkpoint(
            self.dir,
            state,
            self.progress.step,
            keep=self.training.keep_checkpoints,
            protect=() if best is None else (best,),
        )

    # ---- evaluation ------------------------------------------------------------------------------------------------

    def is_evaluation_due(self, log) -> bool:
        """At the start (baselines), every eval_every_epochs, and at the end; once each, also after a resume."""
        at_boundary = self.progress.samples == 0
        epoch, every = self.progress.epoch, self.training.eval_every_epochs
        due = every and at_boundary and (epoch % every == 0 or epoch == self.training.num_epochs)
        return bool(due and self.eval_folders and not log.has_evaluation(self.progress.step))

    def evaluate(self, log, console) -> None:
        """k-NN and label-free measures on every evaluation set; before the first step also the teacher's."""
        if not self.is_main:
            return

        models = {"student": self.student.student}
        if self.progress.step == 0:
            models = {"untrained": self.student.student, "teacher": self.teacher.backbone}
        for dataset, (train, test) in self.eval_folders.items():
            for name, model in models.items():
                row = evaluate_on_folders(model, train, test, k=self.training.knn_k, device=self.device)
                log.write(
                    "eval", step=self.progress.step, epoch=self.progress.epoch, dataset=dataset, model=name, **row
                )
                console.message(f"epoch {self.progress.epoch}: {name} on {dataset}: k-NN {row['knn_top1']:.1%}")

    def finish(self, log) -> int:
        """Close the log; write plots and report; say how it went, or that the same command goes on."""
        log.close()
        done = self.progress.epoch >= self.training.num_epochs
        if not done:
            if self.is_main and distributed.is_launched():
                (self.dir / run_folder.PREEMPTED_NAME).touch()
            raise Interrupted(
                f"{self.stop.reason}: saved at step {self.progress.step} of {self.schedule.total_steps}. "
                "Run the same command again."
            )
        if self.is_main:
            write_plots(self.dir)
            print(summary_table(self.dir))
            print(f"report: {write_report(self.dir)}")
        return EXIT_DONE


if __name__ == "__main__":
    run_command(lambda: main(COMMAND))
