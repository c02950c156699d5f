"""Two processes train as one would: the same batches, the same losses; they stop together and fail together.

gloo on the CPU, processes forked from this one; launchers' variables are set by hand, and torchrun itself runs once.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from workplace import ROOT, ForkedRun, Workplace, at_call, send

from distillery.evaluate import features, measuring, teacher_features
from distillery.report import page, pictures
from distillery.system import distributed, meeting
from distillery.training import checkpoints, engine, watch
from distillery.training import run as run_module

# one process with batches of 8; stochastic depth, averaged weights and two batches a step
SETTINGS = {"num_epochs": 2, "max_steps_per_epoch": 4, "save_every": 0, "log_every": 1, "eval_every_epochs": 1,
            "batch_size": 8, "grad_accumulation_steps": 1, "ema_decay": 0.9, "drop_path_rate": 0.3}  # fmt: skip


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def torchrun_environment(rank: int, world: int, port: str) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip


def srun_environment(rank: int, world: int, port: str) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_LOCALID": str(rank),
            "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_JOB_ID": str(int(port) - 15000 if int(port) < 30000 else int(port) % 15000)}  # fmt: skip


class Runs:
    """Starts the trainer as one or several processes over a workplace, each run in a folder of its own."""

    def __init__(self, place: Workplace, folder: Path) -> None:
        self.place, self.folder = place, folder

    def start(self, name, processes=1, *flags, ranks=None, before=None, launcher=torchrun_environment, **settings):
        """ranks: those that are started, None for all; before: called in each child with its rank."""
        settings = SETTINGS | {"checkpoint_dir": self.folder / name} | settings
        sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        arguments = [*self.place.flags("data", "train", "model"), "--device", "cpu", *sets, *flags]
        port, started = free_port(), []
        for rank in range(processes) if ranks is None else ranks:

            def prepare(rank: int = rank) -> None:
                page.write_report = page.summary_table = lambda *_, **__: ""
                pictures.draw_features = lambda *_, **__: None
                if before is not None:
                    before(rank)

            environment = launcher(rank, processes, port) if processes > 1 else {}
            output = self.folder / f"{name}.{rank}.log"
            started.append(ForkedRun(arguments, output, before=prepare, environment=environment))
        return started

    def run(self, name: str, processes: int = 1, **options) -> None:
        started = self.start(name, processes, **options)
        for run in started:
            assert run.wait() == 0, run.text

    def rows(self, name: str, kind: str) -> list[dict]:
        return Workplace.rows(self, kind, name)

    def checkpoint(self, name: str) -> dict:
        return Workplace.last_checkpoint(self, name)


@pytest.fixture
def runs(place, tmp_path) -> Runs:
    return Runs(place, tmp_path)


@pytest.fixture(scope="module")
def alone(place, tmp_path_factory) -> Runs:
    """One process with batches of 8, uninterrupted: the run "one"."""
    runs = Runs(place, tmp_path_factory.mktemp("alone"))
    runs.run("one", before=lambda rank: note_rows(runs.folder / "rows", rank))
    return runs


def note_rows(folder: Path, rank: int) -> None:
    """Append the global_idx of every batch that this process trains on to a file of its own."""
    folder.mkdir(exist_ok=True)
    step = engine.train_step

    def noting(task, batches, number, epoch):
        with open(folder / f"{rank}.jsonl", "a") as file:
            file.write(json.dumps([number, torch.cat([batch.global_idx for batch in batches]).tolist()]) + "\n")
        return step(task, batches, number, epoch)

    engine.train_step = noting


def rows_of_steps(folder: Path) -> dict[int, list[int]]:
    """step -> global_idx of its images over all processes, in order of the files."""
    found: dict[int, list[int]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for step, rows in map(json.loads, path.read_text().splitlines()):
            found.setdefault(step, []).extend(rows)
    return found


def largest_difference(one: Runs, first: str, other: Runs, second: str) -> float:
    """The largest relative difference of the losses of two runs, step by step."""
    a, b = one.rows(first, "train"), other.rows(second, "train")
    assert [row["step"] for row in a] == [row["step"] for row in b]
    names = [name for name in a[0] if name.startswith("loss")] + ["grad_norm"]
    return max(abs(x[n] - y[n]) / abs(x[n]) for x, y in zip(a, b, strict=True) for n in names)


def test_two_processes_have_the_same_batches_and_the_same_loss_curve_as_one(alone, runs):
    runs.run("two", 2, batch_size=4, before=lambda rank: note_rows(runs.folder / "rows", rank))
    assert rows_of_steps(runs.folder / "rows") == rows_of_steps(alone.folder / "rows")
    difference = largest_difference(alone, "one", runs, "two")
    print(f"largest relative difference of the losses of 1 and 2 processes: {difference:.1e}")
    assert difference < 1e-5
    for name, value in alone.checkpoint("one")["ema"].items():
        torch.testing.assert_close(runs.checkpoint("two")["ema"][name], value, rtol=1e-4, atol=1e-5)


def test_accumulated_batches_are_averaged_over_processes_once_a_step(alone, runs):
    def count_syncs(rank: int) -> None:
        held_back = torch.nn.parallel.DistributedDataParallel.no_sync

        def counted(self):
            os.write(1, b"held back\n")
            return held_back(self)

        torch.nn.parallel.DistributedDataParallel.no_sync = counted

    runs.run("four", 2, batch_size=2, grad_accumulation_steps=2, before=count_syncs)
    assert largest_difference(alone, "one", runs, "four") < 1e-5
    assert (runs.folder / "four.1.log").read_text().count("held back") == 8  # of 8 steps, one of the two batches each


@pytest.mark.parametrize("signalled", [0, 1])
@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_signal_to_one_stops_all_at_the_same_step_and_another_number_of_processes_goes_on(
    alone, runs, before, after, signalled
):
    def hit(rank: int) -> None:
        if rank == signalled % before:
            # one process stops after the step in hand; several have asked each other before it, and stop a step later
            at_call(engine, "train_step", 3 if before == 1 else 2, send(signal.SIGUSR1))

    first = runs.start("run", before, batch_size=8 // before, before=hit)
    assert [run.wait() for run in first] == [75] * before, first[-1].text
    assert runs.checkpoint("run")["progress"] == {"step": 3, "epoch": 0, "samples": 24}
    runs.run("run", after, batch_size=8 // after)
    assert largest_difference(alone, "one", runs, "run") < 1e-5


def test_another_product_of_batch_and_processes_is_refused_with_the_arithmetic_once(runs):
    runs.run("run", num_epochs=1)
    refused = runs.start("run", 2, batch_size=8)
    assert [run.wait() for run in refused] == [2, 2]
    texts = [run.text for run in refused]
    assert (
        "a global batch of 8 images (batch_size x processes x grad_accumulation_steps = 8 x 1 processes x 1)"
        in texts[0]
    )
    assert "now it would be 16 images" in texts[0]
    assert "global batch" not in texts[1]
    assert not any("Traceback" in text for text in texts)


def in_batches_of(size: int):
    """Evaluation in batches of so few rows that each process has some."""

    def prepare(_rank: int) -> None:
        features.BATCH_SIZE = size

    return prepare


def fail() -> None:
    raise ZeroDivisionError("this rank is broken")


@pytest.mark.parametrize(
    "rank, module, name, call",
    [
        (1, engine, "train_step", 3),
        (0, engine, "train_step", 1),
        (1, engine, "check_first_step", 1),
        (0, measuring, "evaluate_features", 3),
        (1, measuring, "extract_features", 2),
        (0, checkpoints, "save_checkpoint", 1),
    ],
)
def test_one_process_that_fails_ends_all_within_seconds_and_its_traceback_is_shown(runs, rank, module, name, call):
    def hit(r: int) -> None:
        in_batches_of(12)(r)
        if r == rank:
            at_call(module, name, call, fail)

    both = runs.start("run", 2, batch_size=4, before=hit)
    statuses = [run.wait(timeout_s=30) for run in both]
    assert statuses == [1, 1]
    assert "ZeroDivisionError: this rank is broken" in both[rank].text
    assert f"[process {rank} of 2]" in both[rank].text
    assert "Traceback" not in both[1 - rank].text


def test_one_process_that_is_killed_ends_the_other_within_seconds(runs):
    both = runs.start(
        "run", 2, batch_size=4, before=lambda r: at_call(engine, "train_step", 3, send(signal.SIGKILL)) if r else None
    )
    assert both[1].wait() == -signal.SIGKILL
    gone = time.monotonic()
    assert both[0].wait(timeout_s=30) == 1
    assert time.monotonic() - gone < 10
    assert "another process of this run has ended" in both[0].text


def note_calls(folder: Path, rank: int, owner: object, name: str) -> None:
    """Append a function's name to a file of this process's own at every call."""
    function = getattr(owner, name)

    def noting(*args, **kwargs):
        with open(folder / f"calls.{rank}", "a") as file:
            file.write(f"{name}\n")
        return function(*args, **kwargs)

    setattr(owner, name, noting)


def test_before_any_number_is_read_from_a_device_all_are_asked_whether_they_live(runs):
    def note(rank: int) -> None:
        note_calls(runs.folder, rank, distributed, "wait_for_all")
        note_calls(runs.folder, rank, watch.BadSteps, "exceeded")
        note_calls(runs.folder, rank, engine, "read_losses")
        note_calls(runs.folder, rank, engine, "train_step")

    runs.run("run", 2, batch_size=4, num_epochs=1, eval_every_epochs=0, before=note)
    for rank in range(2):
        calls = (runs.folder / f"calls.{rank}").read_text().split()
        step = ["train_step", "wait_for_all", "exceeded", "read_losses"]
        assert calls[:16] == 4 * step


def test_a_process_that_dies_ends_the_other_before_it_waits_for_a_device_that_waits_for_the_dead(runs):
    def hit(rank: int) -> None:
        step = engine.train_step
        # a GPU's step gives control back at once, whatever becomes of its collectives; reading a number then hangs
        at_step_3 = {True: send(signal.SIGKILL), False: lambda: setattr(watch.BadSteps, "exceeded", hang)}[rank == 1]

        def ahead(task, batches, number, epoch):
            if number == 2:
                at_step_3()
                return {"loss": torch.tensor(1.0)}
            return step(task, batches, number, epoch)

        engine.train_step = ahead

    def hang(_bad_steps) -> bool:
        os.write(1, b"reads a number\n")
        time.sleep(600)
        return False

    both = runs.start("run", 2, batch_size=4, before=hit)
    assert both[1].wait() == -signal.SIGKILL
    gone = time.monotonic()
    assert both[0].wait(timeout_s=30) == 1
    assert time.monotonic() - gone < 10
    assert "another process of this run has ended" in both[0].text
    assert "reads a number" not in both[0].text


def note_saves(folder: Path, rank: int) -> None:
    """Append the step at which this process is asked to save to a file of its own."""
    save = run_module.save

    def noting(run):
        with open(folder / f"saves.{rank}", "a") as file:
            file.write(f"{run.position.step}\n")
        return save(run)

    run_module.save = noting


def slow_steps(seconds: float) -> None:
    step = engine.train_step
    engine.train_step = lambda *arguments: (time.sleep(seconds), step(*arguments))[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_save_every_minutes_saves_in_mid_epoch_and_all_processes_go_by_the_clock_of_the_first(alone, runs, processes):
    def hit(rank: int) -> None:
        slow_steps(0.2)
        note_saves(runs.folder, rank)
        if rank:  # a clock that always calls for a checkpoint
            checkpoints.CheckpointWriter.minutes_since_last = lambda _writer: 1e9

    settings = {"batch_size": 8 // processes, "max_steps_per_epoch": 12, "num_epochs": 1, "eval_every_epochs": 0}
    runs.run("run", processes, save_every_minutes=0.01, keep_checkpoints=20, before=hit, **settings)
    steps = [[int(line) for line in (runs.folder / f"saves.{rank}").read_text().split()] for rank in range(processes)]
    assert steps[0] == steps[-1]
    *by_clock, at_the_end = steps[0]
    assert at_the_end == 12 and by_clock
    names = sorted(path.stem for path in (runs.folder / "run" / "checkpoints").glob("*.pt"))
    assert names == [f"step_{step:08d}" for step in steps[0]]


def test_a_plan_on_two_processes_goes_on_without_outputs_that_rank_0_does_not_find(runs):
    first, second = runs.start("plan", 2, "--dry_run", **{"batch_size": 4, "teacher_cache.enabled": True})
    assert first.wait() == 0, first.text
    assert second.wait() == 0, second.text
    assert "targets: cached, but they have not been made" in first.text
    assert second.text == ""


def test_an_evaluation_may_outlast_the_time_limit_of_collectives(runs):
    def hit(rank: int) -> None:
        begin = distributed.dist.init_process_group
        distributed.dist.init_process_group = lambda *args, **options: begin(
            *args, **options, timeout=timedelta(seconds=2)
        )
        at_call(measuring, "evaluate_features", 1, lambda: time.sleep(4))

    runs.run("run", 2, batch_size=4, num_epochs=1, before=hit)


def test_an_evaluation_split_over_two_processes_has_the_figures_of_one(runs):
    # 32 test rows: two batches on the first process, one on the second
    for name, processes in (("one", 1), ("two", 2)):
        runs.run(name, processes, batch_size=8 // processes, num_epochs=1, before=in_batches_of(12))
    one, two = (
        [{key: value for key, value in row.items() if key != "time"} for row in runs.rows(name, "eval")]
        for name in ("one", "two")
    )
    # before the first step the weights are the same: so is everything to the last bit
    assert [row["model"] for row in one] == ["untrained", "teacher", "student"]
    assert two[:2] == one[:2]
    assert two[2].keys() == one[2].keys() and two[2]["knn_top1"] == one[2]["knn_top1"]
    assert two[2]["weights"] == "averaged"
    kept = [
        (runs.folder / name / teacher_features.FEATURES_DIR / "small.safetensors").read_bytes()
        for name in ("one", "two")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_in_an_evaluation_ends_it_on_both(runs, rank):
    def hit(r: int) -> None:
        in_batches_of(12)(r)
        if r == rank:
            at_call(measuring, "extract_features", 2, send(signal.SIGTERM))

    both = runs.start("run", 2, batch_size=4, before=hit)
    assert [run.wait(timeout_s=60) for run in both] == [75, 75], both[0].text
    assert runs.rows("run", "eval") == []


def test_nan_on_one_process_stops_both_and_names_the_images(runs):
    def hit(rank: int) -> None:
        if rank == 1:
            losses = engine.forward_losses

            def broken(task, batch):
                found = losses(task, batch)
                return {name: value * float("nan") for name, value in found.items()} if step["number"] == 2 else found

            step = {"number": 0}
            at_call(engine, "train_step", 3, lambda: step.update(number=2))
            engine.forward_losses = broken

    both = runs.start("run", 2, batch_size=4, before=hit)
    assert [run.wait() for run in both] == [1, 1]
    assert "not finite at step 2 (epoch 0): loss=nan" in both[1].text
    assert "images (global_idx): [" in both[1].text


def test_srun_without_torchrun_makes_one_run_of_its_tasks(alone, runs):
    runs.run("srun", 2, batch_size=4, launcher=srun_environment)
    assert largest_difference(alone, "one", runs, "srun") < 1e-5


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_whose_others_never_come_says_whom_it_waits_for_and_obeys_a_signal(runs, rank):
    (run,) = runs.start("run", 2, ranks=[rank])
    wait_until(lambda: "waiting for" in run.text, timeout_s=20)
    assert f"[process {rank} of 2] waiting for 1 other process of 2 at 127.0.0.1:" in run.text
    assert run.text.endswith("To run alone: unset RANK WORLD_SIZE\n")
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(timeout_s=5) == 75
    assert "Run the same command again." in run.text
    assert not (runs.folder / "run").exists()


def test_a_process_whose_others_never_come_ends_with_status_1_and_one_message(runs):
    def hurry(_rank: int) -> None:
        meeting.LIMIT_MINUTES = 0.5 / 60

    (run,) = runs.start("run", 2, ranks=[0], before=hurry, launcher=srun_environment)
    assert run.wait(timeout_s=20) == 1
    (line,) = run.text.splitlines()
    assert line.startswith("error: [process 0 of 2] gave up after ")
    assert "minutes of waiting for 1 other process of 2 at 127.0.0.1:" in line
    assert line.endswith("To run alone: unset SLURM_PROCID SLURM_STEP_NUM_TASKS")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_under_torchrun_a_signal_to_the_launcher_leaves_the_marker_and_a_checkpoint(alone, runs, number):
    settings = SETTINGS | {"checkpoint_dir": runs.folder / "run", "batch_size": 4, "num_epochs": 200}
    sets = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launcher, str(ROOT / "distill_trainer.py"), *runs.place.flags("data", "train", "model"), *sets]
    torchrun = subprocess.Popen(
        [*command, "--device", "cpu"], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True
    )
    metrics, marker = runs.folder / "run" / "metrics.jsonl", runs.folder / "run" / "PREEMPTED"
    wait_until(lambda: metrics.exists() and '"train"' in metrics.read_text())
    torchrun.send_signal(number)
    assert torchrun.wait(timeout=60) != 0
    wait_until(marker.exists)  # USR1 ends the launcher at once; its workers are told by the kernel, and save
    # the launcher's own signal, or the SIGTERM that follows its death
    assert marker.read_text().startswith("SIGTERM at step ")
    step = int(marker.read_text().split()[3])
    assert runs.checkpoint("run")["progress"]["step"] == step


def wait_until(condition, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
