"""Where a start begins: the same command goes on whatever its flags, another configuration is refused, and what a run
trains on stays what it was."""

import json
import shutil
import signal

import pyarrow.parquet as pq
import pytest
from training import STUDENTS, assert_same_run, of_folder, start, straight_run
from workplace import at_call, send

from distillery.training import engine, lock
from distillery.training.checkpoints import checkpoint_dir

SETTINGS = STUDENTS["vit"]
KILL = signal.SIGKILL


def stopped_at(step: int, number: signal.Signals = signal.SIGTERM):
    """Puts a signal into the step-th step of a start."""
    return lambda: at_call(engine, "train_step", step, send(number))


def steps_of(run_dir) -> list[int]:
    return sorted(int(path.stem.removeprefix("step_")) for path in checkpoint_dir(run_dir).glob("*.pt"))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 75), (KILL, -KILL)])
def test_no_resume_in_a_job_that_slurm_requeues_acts_once(place, folder, number, status):
    run_dir = folder / "run"
    assert start(place, run_dir, SETTINGS | {"seed": 1}).wait() == 0
    job = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}
    first = start(place, run_dir, SETTINGS, "--no_resume", before=stopped_at(4, number), environment=job)
    assert first.wait() == status, first.text
    (run_dir / "PREEMPTED").unlink(missing_ok=True)
    again = start(
        place,
        run_dir,
        SETTINGS,
        "--no_resume",
        before=stopped_at(3, number),
        environment=job | {"SLURM_RESTART_COUNT": "1"},
    )
    assert again.wait() == status, again.text
    job["SLURM_RESTART_COUNT"] = "2"
    last = start(place, run_dir, SETTINGS, "--no_resume", environment=job)
    assert last.wait() == 0, last.text
    assert "--no_resume was acted on when this run began" in last.text
    assert [row["step"] for row in of_folder(run_dir).rows("resume")] == ([4, 7] if status == 75 else [2, 4])
    assert_same_run(straight_run(place, "vit"), run_dir)
    assert [path.name for path in run_dir.glob("previous_*")] == ["previous_1"]


def test_no_resume_run_again_after_status_75_goes_on_and_after_the_end_begins_afresh(place, folder):
    run_dir = folder / "run"
    assert start(place, run_dir, SETTINGS, "--no_resume", before=stopped_at(4)).wait() == 75
    assert start(place, run_dir, SETTINGS, "--no_resume").wait() == 0
    assert_same_run(straight_run(place, "vit"), run_dir)
    assert [row["step"] for row in of_folder(run_dir).rows("resume")] == [4]
    assert start(place, run_dir, SETTINGS, "--no_resume").wait() == 0
    assert_same_run(run_dir, run_dir / "previous_1")
    assert of_folder(run_dir).rows("resume") == []


def test_no_resume_with_another_configuration_begins_afresh_even_after_status_75(place, folder):
    run_dir = folder / "run"
    assert start(place, run_dir, SETTINGS, "--no_resume", before=stopped_at(4)).wait() == 75
    other = start(place, run_dir, SETTINGS | {"weight_decay": 0.1}, "--no_resume")
    assert other.wait() == 0, other.text
    assert of_folder(run_dir).last_checkpoint()["config"]["train"]["weight_decay"] == 0.1
    assert steps_of(run_dir / "previous_1") == [2, 4]


def test_resume_from_another_folder_goes_on_there_once(place, folder):
    source, run_dir = folder / "source", folder / "run"
    assert start(place, source, SETTINGS, before=stopped_at(6)).wait() == 75
    flag = ("--resume_from", str(checkpoint_dir(source) / "step_00000004.pt"))
    first = start(place, run_dir, SETTINGS, *flag, before=stopped_at(3))
    assert first.wait() == 75, first.text
    shutil.rmtree(source)  # what it began from is needed no more
    last = start(place, run_dir, SETTINGS, *flag)
    assert last.wait() == 0, last.text
    assert [row["step"] for row in of_folder(run_dir).rows("resume")] == [4, 7]
    straight = of_folder(straight_run(place, "vit")).last_checkpoint()
    assert (straight["student"].keys(), straight["progress"]) == (
        of_folder(run_dir).last_checkpoint()["student"].keys(),
        {"step": 10, "epoch": 2, "samples": 0},
    )


def test_resume_from_an_older_checkpoint_of_the_folder_goes_back_once_and_keeps_what_it_gives_up(place, folder):
    run_dir = folder / "run"
    assert start(place, run_dir, SETTINGS | {"keep_checkpoints": 9}).wait() == 0
    flag = ("--resume_from", str(checkpoint_dir(run_dir) / "step_00000004.pt"))
    first = start(place, run_dir, SETTINGS, *flag, before=stopped_at(4))
    assert first.wait() == 75, first.text
    assert steps_of(run_dir / "previous_1") == [5, 6, 8, 10]
    assert (run_dir / "previous_1" / "metrics.jsonl").exists()
    assert steps_of(run_dir)[-1] == 8
    again = start(place, run_dir, SETTINGS, *flag, before=stopped_at(1))
    assert again.wait() == 75, again.text
    assert steps_of(run_dir)[-1] == 9
    assert start(place, run_dir, SETTINGS, *flag).wait() == 0
    assert_same_run(straight_run(place, "vit"), run_dir)


def test_baselines_of_a_start_that_left_no_checkpoint_stay_where_they_are_the_same(place, folder):
    def baselines_after(settings) -> list[tuple]:
        killed = start(place, run_dir, settings, before=stopped_at(1, KILL))
        assert killed.wait() == -KILL, killed.text
        return [(row["model"], row["time"]) for row in of_folder(run_dir).rows("eval")]

    run_dir, settings = folder / "run", SETTINGS | {"eval_every_epochs": 1}
    first = baselines_after(settings)
    assert [model for model, _ in first] == ["untrained", "teacher"]
    assert baselines_after(settings) == first
    other = baselines_after(settings | {"knn_k": 3})
    assert [model for model, _ in other] == ["untrained", "teacher"] and not set(first) & set(other)


def test_resume_from_into_a_folder_with_another_run_is_refused(place, folder):
    run_dir = folder / "run"
    assert start(place, run_dir, SETTINGS, before=stopped_at(4)).wait() == 75
    source = checkpoint_dir(straight_run(place, "vit")) / "step_00000010.pt"
    refused = start(place, run_dir, SETTINGS, "--resume_from", str(source))
    assert refused.wait() == 2
    assert "holds checkpoints of another run" in refused.text


def test_a_start_that_left_no_checkpoint_binds_nobody(place, folder):
    run_dir = folder / "run"
    failing = SETTINGS | {"learning_rate": 1e-3}
    assert start(place, run_dir, failing, before=stopped_at(1, KILL)).wait() == -KILL
    mended = start(place, run_dir, SETTINGS)
    assert mended.wait() == 0, mended.text
    assert "an earlier start with another configuration left here is set aside" in mended.text
    assert_same_run(straight_run(place, "vit"), run_dir)


def test_another_configuration_is_refused_field_by_field_and_harmless_changes_are_listed(place, folder):
    run_dir = folder / "run"
    assert start(place, run_dir, SETTINGS, before=stopped_at(4)).wait() == 75
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*") if path.is_file()}
    changes = {"weight_decay": 0.5, "augment.hflip": False, "log_every": 3}
    refused = start(place, run_dir, SETTINGS | changes)
    assert refused.wait() == 2
    assert "weight_decay: 0.04 -> 0.5" in refused.text
    assert "augment.hflip: True -> False" in refused.text
    assert "log_every" not in refused.text
    assert {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"}.items() <= before.items()
    allowed = start(place, run_dir, SETTINGS | {"num_workers": 3, "log_every": 2})
    assert allowed.wait() == 0, allowed.text
    assert "changed since then: log_every: 1 -> 2" in allowed.text
    assert "changed since then: num_workers: 1 -> 3" in allowed.text


def test_more_epochs_are_a_new_schedule_and_the_jump_of_the_learning_rate_is_printed(place, folder):
    run_dir, settings = folder / "run", SETTINGS | {"keep_checkpoints": 9}
    assert start(place, run_dir, settings).wait() == 0
    more = start(place, run_dir, settings | {"num_epochs": 3})
    assert more.wait() == 0, more.text
    rows = of_folder(run_dir).rows("train")
    assert [row["step"] for row in rows] == list(range(1, 16))
    assert rows[9]["lr"] == rows[14]["lr"] == 1e-6
    assert rows[10]["lr"] > 50e-6
    jump = f"the learning rate goes from 1e-06 to {rows[10]['lr']:.3g}"
    assert f"num_epochs changed: a new schedule; {jump}" in more.text
    # and fewer: what came after the checkpoint is given up, though nothing is left to train
    flag = ("--resume_from", str(checkpoint_dir(run_dir) / "step_00000005.pt"))
    assert start(place, run_dir, settings | {"num_epochs": 1}, *flag).wait() == 0
    assert [row["step"] for row in of_folder(run_dir).rows("train")] == list(range(1, 6))


def test_other_weights_of_the_teacher_are_refused(place, folder):
    run_dir, hub = folder / "run", folder / "hub"
    shutil.copytree(place.folder / "hub", hub)
    settings = SETTINGS | {"teacher_repo": hub}
    assert start(place, run_dir, settings, before=stopped_at(4)).wait() == 75
    code = (hub / "hubconf.py").read_text()
    (hub / "hubconf.py").write_text(code.replace("manual_seed(1)", "manual_seed(2)"))
    refused = start(place, run_dir, settings)
    assert refused.wait() == 2
    assert "the teacher has other weights (" in refused.text and ") than when the run in" in refused.text


@pytest.fixture(scope="module")
def half_cache(place, tmp_path_factory):
    """A cache of the first 58 images, in 3 shards of which the last is short; copy it before it grows."""
    folder = tmp_path_factory.mktemp("half") / "cache"
    done = place.precompute("--set", f"cache_dir={folder}", "--set", "max_samples=58", "--set", "eval_datasets={}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("shards_per_epoch", ["null", 2])
def test_a_cache_that_grows_between_kill_and_resume_changes_nothing(place, folder, half_cache, shards_per_epoch):
    cache, settings = folder / "cache", SETTINGS | {"eval_every_epochs": 0, "shards_per_epoch": shards_per_epoch}
    shutil.copytree(half_cache, cache)
    settings["cache_dir"] = cache
    straight, run_dir = folder / "straight", folder / "run"
    assert start(place, straight, settings | {"max_samples": 58}).wait() == 0
    assert start(place, run_dir, settings | {"max_samples": 58}, before=stopped_at(3)).wait() == 75
    done = place.precompute("--set", f"cache_dir={cache}", "--set", "eval_datasets={}")
    assert done.returncode == 0, done.stderr
    assert json.loads((cache / "index.json").read_text())["num_samples"] == 96
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert_same_run(straight, run_dir)
    joined = start(place, run_dir, settings | {"refresh_shards": True, "num_epochs": 4})
    assert joined.wait() == 0, joined.text
    assert len(json.loads((run_dir / "shards.json").read_text())["shards"]) == 4


def test_shards_that_join_in_the_middle_of_an_epoch_begin_it_again_and_the_schedule_holds(place, folder, half_cache):
    cache, run_dir = folder / "cache", folder / "run"
    shutil.copytree(half_cache, cache)
    settings = SETTINGS | {"eval_every_epochs": 0, "cache_dir": cache, "max_steps_per_epoch": "null"}
    assert start(place, run_dir, settings | {"max_samples": 58}, before=stopped_at(10)).wait() == 75
    assert place.precompute("--set", f"cache_dir={cache}", "--set", "eval_datasets={}").returncode == 0
    joined = start(place, run_dir, settings | {"refresh_shards": True}, before=stopped_at(2))
    assert joined.wait() == 75, joined.text
    assert "the present epoch begins again" in joined.text
    last = start(place, run_dir, settings | {"refresh_shards": True})
    assert last.wait() == 0, last.text
    assert "begins again" not in last.text
    # 7 steps of 8 images in the first epoch, 3 in the second before 12 on the larger cache
    assert of_folder(run_dir).last_checkpoint()["progress"] == {"step": 22, "epoch": 2, "samples": 0}


def test_other_images_under_the_same_shard_names_are_refused(place, folder, half_cache):
    cache, run_dir = folder / "cache", folder / "run"
    shutil.copytree(half_cache, cache)
    settings = SETTINGS | {"eval_every_epochs": 0, "cache_dir": cache, "max_samples": 58}
    assert start(place, run_dir, settings, before=stopped_at(3)).wait() == 75
    shutil.rmtree(cache)
    table = pq.read_table(place.folder / "train.parquet")
    pq.write_table(table.take(list(range(95, 37, -1))), folder / "other.parquet")
    other = [f"cache_dir={cache}", "eval_datasets={}", f"data_files={folder / 'other.parquet'}"]
    done = place.precompute(*[part for setting in other for part in ("--set", setting)])
    assert done.returncode == 0, done.stderr
    refused = start(place, run_dir, settings)
    assert refused.wait() == 2
    assert "holds other images than this run was started on" in refused.text


def test_a_run_on_raw_images_stays_on_them_when_a_cache_appears(place, folder):
    run_dir, straight = folder / "run", folder / "straight"
    settings = SETTINGS | {"eval_datasets": "{}", "cache_dir": folder / "cache"}
    assert start(place, straight, settings).wait() == 0
    assert start(place, run_dir, settings, before=stopped_at(3)).wait() == 75
    assert place.precompute("--set", f"cache_dir={folder / 'cache'}", "--set", "eval_datasets={}").returncode == 0
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert "decoding raw images" in again.text
    assert_same_run(straight, run_dir)


def test_a_second_process_in_the_same_run_folder_is_refused(place, folder, monkeypatch):
    run_dir = folder / "run"
    monkeypatch.setattr(lock, "_PATIENCE_S", 0.2)
    held = lock.RunLock(run_dir)
    run_dir.mkdir()
    held.take(create=True)
    refused = start(place, run_dir, SETTINGS)
    assert refused.wait() == 2
    assert "another process is training in this folder" in refused.text
