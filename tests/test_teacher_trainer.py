"""Training on stored teacher outputs as a user has it: stage 1 with --teacher, then the trainer, interrupted or not.

Stage 1 runs as a program; the trainer in forks of this process (workplace.ForkedRun).
"""

import signal
import socket
from pathlib import Path

import pytest
import torch
from workplace import ForkedRun, Workplace, assert_same_tensors, at_call, comparable, send

import distill_trainer
from distillery.config.load import load_dumped_configs
from distillery.evaluate.candidates import evaluate_run
from distillery.models import configured
from distillery.report import page, pictures
from distillery.system.errors import UserError
from distillery.teacher_cache.reader import TeacherCache
from distillery.training import bindings, engine

# 2 epochs of 5 steps of 2 batches; stochastic depth, averaged weights, checkpoints in the middle of an epoch
CACHED = {"teacher_cache.enabled": True, "teacher_cache.views": 2, "num_epochs": 2, "max_steps_per_epoch": 5,
          "save_every": 2, "log_every": 1, "grad_accumulation_steps": 2, "batch_size": 4, "ema_decay": 0.9,
          "drop_path_rate": 0.3, "augment.random_resized_crop": "[0.4, 1.0]"}  # fmt: skip
HYBRID = CACHED | {"teacher_cache.mode": "hybrid", "teacher_cache.live_fraction": 0.5}
COMPARED = ("student", "heads", "optimizer", "ema", "rng", "progress", "target_statistics", "teacher_cache")
MODES = {"cached": CACHED, "hybrid": HYBRID}


def sets_of(settings: dict) -> list[str]:
    return [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]


def start(
    place: Workplace, run_dir: Path, settings: dict, *flags: str, before=None, environment=None, log: str = ""
) -> ForkedRun:
    """The trainer in a fork, without plots and report, which take longer than the run."""

    def prepare() -> None:
        page.write_report = page.summary_table = lambda *_, **__: ""
        pictures.draw_features = lambda *_, **__: None
        if before is not None:
            before()

    arguments = [*place.flags("data", "train", "model"), "--device", "cpu", *sets_of(settings),
                 "--set", f"checkpoint_dir={run_dir}", *flags]  # fmt: skip
    return ForkedRun(arguments, run_dir.parent / f"{run_dir.name}{log}.log", before=prepare, environment=environment)


def rows_of(run_dir: Path, kind: str) -> list[dict]:
    view = Workplace.__new__(Workplace)
    view.folder = run_dir.parent
    return Workplace.rows(view, kind, run_dir.name)


def checkpoint_of(run_dir: Path) -> dict:
    return torch.load(sorted((run_dir / "checkpoints").glob("*.pt"))[-1], weights_only=True)


def assert_same_run(one: Path, other: Path) -> None:
    a, b = checkpoint_of(one), checkpoint_of(other)
    for key in COMPARED:
        assert_same_tensors(a[key], b[key])
    for kind in ("train", "eval"):
        assert [comparable(row) for row in rows_of(one, kind)] == [comparable(row) for row in rows_of(other, kind)]


@pytest.fixture(scope="module")
def place(tmp_path_factory, png_images) -> Workplace:
    """A workplace whose images, teacher outputs and two straight runs, cached and hybrid, are made."""
    place = Workplace(tmp_path_factory.mktemp("stored"), png_images)
    done = place.precompute(*place.flags("train", "model"), "--teacher", *sets_of(CACHED))
    assert done.returncode == 0, done.stderr
    for mode, settings in MODES.items():
        run = start(place, place.folder / mode, settings)
        assert run.wait() == 0, run.text
    return place


def no_teacher() -> None:
    """Building the teacher is an error from now on."""

    def fail(*_args, **_options):
        raise AssertionError("the teacher was built")

    configured.build_teacher_backbone = fail


def no_evaluation() -> None:
    """Nothing is evaluated, and so the teacher is not even needed at the start."""
    distill_trainer.evaluate_if_due = lambda *_args: True
    no_teacher()


def test_a_cached_run_logs_its_losses_and_evaluates_student_teacher_and_untrained(place):
    run_dir = place.folder / "cached"
    text = (place.folder / "cached.log").read_text()
    assert "targets: cached: 2 views of each of 96 images" in text
    assert "the teacher is not loaded for training" in text
    rows = rows_of(run_dir, "eval")
    assert [(row["model"], row["step"]) for row in rows] == [
        ("untrained", 0), ("teacher", 0), ("student", 5), ("student", 10)
    ]  # fmt: skip
    losses = [row["loss"] for row in rows_of(run_dir, "train")]
    assert len(losses) == 10 and losses[-1] < losses[0]
    (facts,) = rows_of(run_dir, "start")
    assert facts["teacher_parameters"] == rows_of(place.folder / "hybrid", "start")[0]["teacher_parameters"] > 0


def test_a_checkpoint_says_which_teacher_outputs_it_was_trained_on(place):
    (folder,) = (place.folder / "cache" / "teacher").iterdir()
    cache, state = TeacherCache(folder), checkpoint_of(place.folder / "cached")
    assert state["teacher_cache"] == cache.fingerprint
    assert state["teacher_hash"] == cache.weights_hash
    torch.testing.assert_close(state["target_statistics"]["pooled_mean"], cache.statistics["pooled_mean"].float())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_interrupted_and_run_again_equals_the_straight_run_bit_for_bit(place, tmp_path, mode, number):
    run_dir = tmp_path / "run"
    first = start(place, run_dir, MODES[mode], before=lambda: at_call(engine, "train_step", 4, send(number)))
    assert first.wait() == (75 if number == signal.SIGTERM else -number), first.text
    again = start(place, run_dir, MODES[mode])
    assert again.wait() == 0, again.text
    assert_same_run(place.folder / mode, run_dir)


def test_a_cached_run_that_goes_on_never_builds_the_teacher(place, tmp_path):
    run_dir = tmp_path / "run"
    first = start(place, run_dir, CACHED, before=lambda: at_call(engine, "train_step", 4, send(signal.SIGTERM)))
    assert first.wait() == 75, first.text
    again = start(place, run_dir, CACHED, before=no_teacher)
    assert again.wait() == 0, again.text
    assert_same_run(place.folder / "cached", run_dir)


def start_two(place: Workplace, run_dir: Path, settings: dict, *flags: str) -> list[ForkedRun]:
    """Two processes of one run, process 0 first."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        start(place, run_dir, settings, *flags, environment=world | {"RANK": rank, "LOCAL_RANK": rank}, log=f"-{rank}")
        for rank in ("0", "1")
    ]


def test_two_processes_have_the_losses_of_one(place, tmp_path):
    for mode, settings in MODES.items():
        for run in start_two(place, tmp_path / mode, settings | {"grad_accumulation_steps": 1}):
            assert run.wait() == 0, run.text
        found, expected = rows_of(tmp_path / mode, "train"), rows_of(place.folder / mode, "train")
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for a, b in zip(found, expected, strict=True):
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_process_0_alone_compares_the_teacher_where_nothing_is_remembered(place, tmp_path):
    (folder,) = (place.folder / "cache" / "teacher").iterdir()
    settings = CACHED | {"grad_accumulation_steps": 1, "eval_every_epochs": 0, "num_epochs": 1}
    (folder / "teacher_files.json").unlink()
    for remembered in (False, True):
        first, second = start_two(place, tmp_path / f"run_{remembered}", settings)
        assert (first.wait(), second.wait()) == (0, 0), first.text + second.text
        assert ("It is built once" in first.text) is not remembered
        assert "It is built once" not in second.text
    assert_same_run(tmp_path / "run_False", tmp_path / "run_True")


def test_pooled_outputs_stored_and_patches_live_interrupted_or_by_two_processes(tmp_path, png_images):
    place, settings = Workplace(tmp_path, png_images), HYBRID | {"teacher_cache.tokens": "none", "seed": 1}
    done = place.precompute(*place.flags("train", "model"), "--teacher", *sets_of(settings))
    assert done.returncode == 0, done.stderr
    straight = start(place, tmp_path / "straight", settings)
    assert straight.wait() == 0, straight.text
    assert "0.5 of the steps run the teacher on new views instead, and these alone compare tokens" in straight.text
    assert {"loss/patch" in row for row in rows_of(tmp_path / "straight", "train")} == {True, False}
    assert all("loss/cls" in row for row in rows_of(tmp_path / "straight", "train"))
    statistics = checkpoint_of(tmp_path / "straight")["target_statistics"]
    assert not torch.equal(statistics["tokens_std"], torch.ones_like(statistics["tokens_std"]))

    stopped = start(place, tmp_path / "run", settings, before=lambda: at_call(engine, "train_step", 4, send(15)))
    assert stopped.wait() == 75, stopped.text
    again = start(place, tmp_path / "run", settings)
    assert again.wait() == 0, again.text
    assert_same_run(tmp_path / "straight", tmp_path / "run")

    for run in start_two(place, tmp_path / "two", settings | {"grad_accumulation_steps": 1}):
        assert run.wait() == 0, run.text
    for a, b in zip(rows_of(tmp_path / "two", "train"), rows_of(tmp_path / "straight", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_without_teacher_outputs_the_command_that_makes_them_is_named_and_nothing_is_written(place, tmp_path):
    others = CACHED | {"teacher_cache.views": 3}
    for flags, status in (((), 2), (("--dry_run",), 0)):
        run = start(place, tmp_path / "run", others, *flags)
        assert run.wait() == status, run.text
        assert "views.num_views: the cache has 2, now it would be 3" in run.text
        assert "precompute_cache.py --teacher" in run.text
        assert not (tmp_path / "run").exists()
    assert "3 views x 3.1 kB x 96 images" in run.text


def test_a_dry_run_of_two_processes_without_teacher_outputs_says_what_it_costs_to_make_them(place, tmp_path):
    first, second = start_two(place, tmp_path / "run", CACHED | {"teacher_cache.views": 3}, "--dry_run")
    assert (first.wait(), second.wait()) == (0, 0), first.text + second.text
    assert "targets: cached, but they have not been made" in first.text


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher_cache.tokens": "none"}, "tokens"),
        ({"use_cached": False}, "teacher_cache.enabled is true, and this run decodes raw images"),
    ],
)
def test_what_stored_outputs_cannot_give_is_refused_before_anything_is_written(place, tmp_path, settings, message):
    run = start(place, tmp_path / "run", CACHED | {"eval_every_epochs": 0} | settings)
    assert run.wait() == 2, run.text
    assert message in run.text
    assert not (tmp_path / "run").exists()


def test_a_cached_run_is_evaluated_beside_its_teacher(place):
    configs = load_dumped_configs(place.folder / "cached" / "config.yaml")
    newest = sorted((place.folder / "cached" / "checkpoints").glob("*.pt"))[-1]
    rows = evaluate_run(configs, [newest], torch.device("cpu"), linear=False)
    assert [row["model"] for row in rows] == ["untrained", "student", "student_ema", "teacher"]
    assert all(-1 <= row["teacher_cosine"] <= 1 for row in rows[1:3])


def test_phi_s_takes_its_covariances_from_the_stored_outputs(place, tmp_path):
    run_dir = tmp_path / "run"
    run = start(place, run_dir, CACHED | {"standardise_targets": "phi_s", "num_epochs": 1}, before=no_evaluation)
    assert run.wait() == 0, run.text
    rotation = checkpoint_of(run_dir)["target_statistics"]["pooled_rotation"]
    assert rotation.shape == (24, 24) and not torch.equal(rotation, torch.eye(24))


def test_other_teacher_outputs_than_the_runs_own_are_refused(place):
    state = checkpoint_of(place.folder / "cached")
    (folder,) = (place.folder / "cache" / "teacher").iterdir()
    cache = TeacherCache(folder)
    bindings.check_same_teacher(Path("run"), state, cache.weights_hash, cache)
    cache.fingerprint = "f" * 64
    with pytest.raises(UserError, match="other teacher outputs.*now ffffffffffff"):
        bindings.check_same_teacher(Path("run"), state, cache.weights_hash, cache)
    with pytest.raises(UserError, match="other weights"):
        bindings.check_same_teacher(Path("run"), state, "another", cache)


def test_a_dry_run_says_what_stored_outputs_cost_and_save(place, tmp_path):
    texts = {}
    modes = {"off": {"teacher_cache.enabled": False}, "live": {"teacher_cache.mode": "live"}, "cached": {}}
    for name, changes in modes.items():
        run = start(place, tmp_path / "run", CACHED | changes, "--dry_run")
        assert run.wait() == 0, run.text
        texts[name] = run.text
    for name in ("off", "live"):
        assert "targets: live: teacher" in texts[name]
        assert "stored (teacher_cache: {enabled: true, mode: cached}), 2 views x" in texts[name]
    assert "times faster" in texts["live"] and "times faster" in texts["cached"]
    # pooled: 24 float16; tokens: 8 x 8 cells of 24
    assert "2 views x 3.1 kB x 96 images" in texts["cached"], texts["cached"]
    assert not (tmp_path / "run").exists()


def test_a_dry_run_before_the_teachers_pass_says_what_it_will_cost_and_the_command(place, tmp_path, png_images):
    other = Workplace(tmp_path, png_images)
    assert other.precompute("--set", "eval_datasets={}").returncode == 0
    run = start(other, tmp_path / "run", CACHED | {"eval_every_epochs": 0}, "--dry_run")
    assert run.wait() == 0, run.text
    assert "targets: cached, but they have not been made: run python precompute_cache.py --teacher" in run.text
    assert "2 views x 3.1 kB x 96 images" in run.text
    assert start(other, tmp_path / "run", CACHED | {"eval_every_epochs": 0}).wait() == 2
