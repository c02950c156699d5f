"""Training runs for the tests that break them: short, started in a fork, compared bit by bit."""

from collections.abc import Callable
from pathlib import Path

from workplace import ForkedRun, Workplace, assert_same_tensors, comparable

from distillery.report import page, pictures

# 2 epochs of 5 steps: a checkpoint within the epoch, one at its end, evaluations before, between and after
SHORT = {"num_epochs": 2, "max_steps_per_epoch": 5, "save_every": 2, "log_every": 1, "eval_every_epochs": 1}
STUDENTS = {
    # stochastic depth, several batches a step, averaged weights
    "vit": SHORT | {"grad_accumulation_steps": 2, "batch_size": 4, "ema_decay": 0.9, "drop_path_rate": 0.3},
    # batch norm's running statistics, random crops
    "resnet": SHORT
    | {
        "student_name": "test_resnet",
        "student_kwargs": "{}",
        "ema_decay": 0.9,
        "augment.random_resized_crop": "[0.3, 1.0]",
    },
}
COMPARED = ("student", "heads", "optimizer", "ema", "rng", "progress", "scaler", "target_statistics", "learning_rate")


def flags_of(place: Workplace, run_dir: Path, settings: dict) -> list[str]:
    """The trainer's command line for a run in run_dir."""
    overrides = {"checkpoint_dir": run_dir} | settings
    sets = [part for key, value in overrides.items() for part in ("--set", f"{key}={value}")]
    return [*place.flags("data", "train", "model"), "--device", "cpu", *sets]


def without_report() -> None:
    """Leave out plots and report, which take longer than these runs."""
    page.write_report = page.summary_table = lambda *_, **__: ""
    pictures.draw_features = lambda *_, **__: None


def start(
    place: Workplace,
    run_dir: Path,
    settings: dict,
    *flags: str,
    before: Callable[[], None] | None = None,
    environment: dict[str, str] | None = None,
    name: str = "log",
) -> ForkedRun:
    """Start the trainer in a fork; `before` puts faults in its way."""

    def prepare() -> None:
        without_report()
        if before is not None:
            before()

    run_dir.parent.mkdir(parents=True, exist_ok=True)
    arguments = [*flags_of(place, run_dir, settings), *flags]
    output = run_dir.parent / f"{run_dir.name}.{name}"
    return ForkedRun(arguments, output, before=prepare, environment=environment)


def straight_run(place: Workplace, student: str) -> Path:
    """The folder of an uninterrupted run, made once."""
    run_dir = place.folder / f"straight_{student}"
    if not run_dir.exists():
        run = start(place, run_dir, STUDENTS[student])
        assert run.wait() == 0, run.text
    return run_dir


def assert_same_run(one: Path, other: Path) -> None:
    """The last checkpoints and the metrics of two run folders are equal, but for what a clock put in."""
    first, second = (of_folder(path) for path in (one, other))
    a, b = first.last_checkpoint(), second.last_checkpoint()
    for key in COMPARED:
        assert_same_tensors(a[key], b[key])
    for kind in ("train", "eval", "epoch", "start"):
        assert [comparable(row) for row in first.rows(kind)] == [comparable(row) for row in second.rows(kind)]


def of_folder(run_dir: Path) -> Workplace:
    """rows() and last_checkpoint() of a run folder."""
    view = Workplace.__new__(Workplace)
    view.folder = run_dir.parent
    view.rows = lambda kind: Workplace.rows(view, kind, run_dir.name)
    view.last_checkpoint = lambda: Workplace.last_checkpoint(view, run_dir.name)
    return view
