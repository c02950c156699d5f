import errno
import json
import os
from pathlib import Path

import pytest

from distillery.config.keys_train import AugmentConfig
from distillery.system.errors import MissingFileError, UserError
from distillery.training import folder
from distillery.training.checkpoints import checkpoint_dir, save_checkpoint
from distillery.training.folder import (
    RunLock,
    Start,
    check_global_batch,
    check_place,
    check_shards,
    compare_configs,
    find_start,
    identity_of,
    prepare_folder,
    set_aside,
)
from tests.training.test_checkpoints import state_at

AUGMENT = AugmentConfig().model_dump(mode="json")
CONFIG = {
    "data": {"num_workers": 1, "image_size": 32},
    "train": {"num_epochs": 2, "weight_decay": 0.1, "augment": AUGMENT},
    "model": {"student_name": "a"},
}


def changed(section: str, **values) -> dict:
    return CONFIG | {section: CONFIG[section] | values}


def test_equal_configurations_have_no_differences():
    assert compare_configs("run", CONFIG, changed("train")) == []


def test_harmless_changes_are_listed_and_others_refused_down_to_the_key_that_differs(tmp_path):
    now = changed("data", num_workers=4) | {"train": changed("train", num_epochs=3)["train"]}
    assert compare_configs(tmp_path, CONFIG, now) == ["num_workers: 1 -> 4", "num_epochs: 2 -> 3"]
    now["train"]["augment"] = AUGMENT | {"hflip": False}
    with pytest.raises(UserError, match=r"another configuration:\n  augment.hflip: True -> False\nNothing was written"):
        compare_configs(tmp_path, CONFIG, now)


def test_a_run_goes_on_with_the_defaults_of_keys_that_it_did_not_know(tmp_path):
    before = changed("train", augment={"hflip": True})
    assert compare_configs(tmp_path, before, changed("model", teacher_mirror=False)) == []
    with pytest.raises(UserError, match=r"teacher_mirror: False -> True\nNothing was written"):
        compare_configs(tmp_path, before, changed("model", teacher_mirror=True))
    with pytest.raises(UserError, match=r"augment.blur: 0.0 -> 0.5\nNothing was written"):
        compare_configs(tmp_path, before, changed("train", augment=AUGMENT | {"blur": 0.5}))


def test_a_run_of_before_there_was_a_choice_of_optimizer_goes_on_with_adamw_alone(tmp_path):
    assert compare_configs(tmp_path, CONFIG, changed("train", optimizer="adamw")) == []
    with pytest.raises(UserError, match="optimizer: 'adamw' -> 'muon'"):
        compare_configs(tmp_path, CONFIG, changed("train", optimizer="muon"))


@pytest.mark.parametrize(
    "now, same",
    [
        (changed("data", num_workers=9), True),
        (changed("train", num_epochs=9), True),
        (changed("train", weight_decay=0.2), False),
        (changed("model", student_name="b"), False),
    ],
)
def test_the_identity_is_what_a_run_is_bound_to(now, same):
    assert (identity_of(now) == identity_of(CONFIG)) == same


def test_another_global_batch_is_refused_with_both_products():
    with pytest.raises(UserError, match=r"batch of 64 images \(8 x 8\); now it would be 32 images \(8 x 4\)"):
        check_global_batch({"global_batch_size": 64, "global_batch_text": "64 images (8 x 8)"}, 32, "32 images (8 x 4)")


def test_other_images_and_other_rows_are_refused(tmp_path):
    frozen = {"fingerprint": "a" * 20, "shards": ["x.pt"], "rows": [7]}
    check_shards(frozen, dict(frozen), tmp_path)
    with pytest.raises(UserError, match="other images than this run was started on .fingerprint b{16}"):
        check_shards(frozen, frozen | {"fingerprint": "b" * 20}, tmp_path)
    with pytest.raises(UserError, match="x.pt has 6 usable rows, this run was started with 7"):
        check_shards(frozen, frozen | {"rows": [6]}, tmp_path)


def test_a_damaged_shard_list_is_an_error_that_says_what_to_do(tmp_path):
    assert folder.frozen_shards(tmp_path) is None
    (tmp_path / "shards.json").write_text('{"fingerprint": "a", "sha')
    with pytest.raises(UserError, match="shards.json: damaged .* Delete it"):
        folder.frozen_shards(tmp_path)


def test_setting_aside_moves_everything_and_keeps_what_was_set_aside_before(tmp_path):
    assert set_aside(tmp_path) is None
    for number in (1, 2):
        (tmp_path / "plots").mkdir()
        (tmp_path / "plots" / "a.png").write_text(str(number))
        assert set_aside(tmp_path) == tmp_path / f"previous_{number}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["previous_1", "previous_2"]
    assert (tmp_path / "previous_1" / "plots" / "a.png").read_text() == "1"


@pytest.mark.parametrize("odd", ["", " ", "x"])
def test_the_marker_of_a_job_with_an_odd_restart_count_is_what_the_batch_script_looks_for(tmp_path, monkeypatch, odd):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", odd)
    folder.mark_preempted(tmp_path, "SIGTERM", 500)
    assert "\njob 12 restart 0\n" in (tmp_path / "PREEMPTED").read_text()


def test_the_marker_says_which_start_of_which_job_stopped(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert not folder.is_preempted(tmp_path)
    folder.mark_preempted(tmp_path, "SIGTERM", 500)
    assert (tmp_path / "PREEMPTED").read_text() == "SIGTERM at step 500\njob 12 restart 3\n"
    assert folder.is_preempted(tmp_path)


def test_a_lock_is_held_until_the_process_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "_LOCK_PATIENCE_S", 0.0)
    RunLock(tmp_path).take(create=False)  # nobody has ever trained here
    assert not list(tmp_path.iterdir())
    child = os.fork()
    if child == 0:
        RunLock(tmp_path).take(create=True)
        os._exit(0)
    os.waitpid(child, 0)
    mine = RunLock(tmp_path)
    mine.take(create=False)
    mine.take(create=True)
    with pytest.raises(UserError, match=f"another process is training in this folder .*process {os.getpid()}"):
        RunLock(tmp_path).take(create=False)


def checkpoints(run_dir, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run_dir, state_at(step), step, keep=9)


def begin(run_dir, step: int = 0, **options) -> Start:
    """find_start and prepare_folder, as a start of the trainer does it."""
    start = find_start(run_dir, CONFIG, **options)
    run_dir.mkdir(exist_ok=True)
    prepare_folder(run_dir, start, step)
    return start


def test_a_plain_start_is_new_or_goes_on(tmp_path):
    assert begin(tmp_path / "run").checkpoint is None
    checkpoints(tmp_path / "run", 5, 9)
    assert begin(tmp_path / "run").checkpoint.name == "step_00000009.pt"


@pytest.mark.parametrize(
    "again, goes_on",
    [
        ({"job": "7", "restarts": 1}, True),  # requeued
        ({"job": "7", "restarts": 0}, False),  # typed again in the same allocation
        ({"job": "8", "restarts": 1}, False),  # another job
        ({}, False),
        ({"again": True}, True),  # torchrun --max-restarts
    ],
)
def test_no_resume_acts_once_a_job(tmp_path, again, goes_on):
    run_dir = tmp_path / "run"
    checkpoints(run_dir, 3)
    assert begin(run_dir, no_resume=True, job="7", restarts=0).checkpoint is None
    assert [path.name for path in checkpoint_dir(run_dir / "previous_1").glob("*.pt")] == ["step_00000003.pt"]
    checkpoints(run_dir, 1, 2)
    start = begin(run_dir, no_resume=True, **again)
    assert (start.checkpoint is not None) == goes_on
    assert (run_dir / "previous_2").exists() == (not goes_on)


def test_resume_from_acts_once_a_file_even_when_the_file_is_gone(tmp_path):
    run_dir, source = tmp_path / "run", tmp_path / "source"
    checkpoints(source, 4)
    path = checkpoint_dir(source) / "step_00000004.pt"
    assert begin(run_dir, resume_from=path).checkpoint == path
    assert begin(run_dir, resume_from=path).checkpoint == path  # stopped before it could save anything
    checkpoints(run_dir, 6)
    path.unlink()
    again = begin(run_dir, resume_from=path)
    assert again.checkpoint.name == "step_00000006.pt"
    assert "--resume_from was acted on" in again.notes[1]


def test_resuming_another_runs_checkpoint_sets_aside_what_a_failed_start_left(tmp_path):
    run_dir, source = tmp_path / "run", tmp_path / "source"
    checkpoints(source, 4)
    run_dir.mkdir()
    for name in ("config.yaml", "shards.json", "metrics.jsonl"):
        (run_dir / name).write_text("of another run")
    path = checkpoint_dir(source) / "step_00000004.pt"
    begin(run_dir, 4, resume_from=path)
    assert not (run_dir / "metrics.jsonl").exists() and (run_dir / "previous_1" / "metrics.jsonl").exists()
    assert not begin(run_dir, 4, resume_from=path).sets_all_aside  # stopped before it could save anything
    # a checkpoint set aside in the folder itself stays where it is
    set_aside(run_dir)
    checkpoints(run_dir / "previous_2", 6)
    (run_dir / "metrics.jsonl").write_text("of another run")
    own = checkpoint_dir(run_dir / "previous_2") / "step_00000006.pt"
    assert begin(run_dir, 6, resume_from=own).sets_all_aside and own.is_file()


def test_the_configuration_is_set_aside_last(tmp_path, monkeypatch):
    names = ["checkpoints", "config.yaml", "metrics.jsonl", "shards.json"]
    for name in names:
        (tmp_path / name).touch()
    moved, rename = [], Path.rename
    monkeypatch.setattr(Path, "rename", lambda path, target: (moved.append(path.name), rename(path, target)))
    set_aside(tmp_path)
    assert sorted(moved) == names and moved[-1] == "config.yaml"


def test_going_back_sets_later_checkpoints_aside_newest_first_and_acts_once(tmp_path):
    run_dir = tmp_path / "run"
    checkpoints(run_dir, 2, 4, 6, 8)
    path = checkpoint_dir(run_dir) / "step_00000004.pt"
    assert begin(run_dir, 4, resume_from=path).sets_newer_aside
    names = sorted(path.name for path in checkpoint_dir(run_dir).glob("*.pt"))
    assert names == ["step_00000002.pt", "step_00000004.pt"]
    checkpoints(run_dir, 5)
    assert begin(run_dir, 5, resume_from=path).checkpoint.name == "step_00000005.pt"
    assert not (run_dir / "previous_2").exists()


def test_resume_from_names_what_is_wrong(tmp_path):
    run_dir, source = tmp_path / "run", tmp_path / "source"
    with pytest.raises(MissingFileError, match="--resume_from .*gone.pt: there is no such file"):
        find_start(run_dir, CONFIG, resume_from=tmp_path / "gone.pt")
    checkpoints(source, 4)
    checkpoints(run_dir, 2)
    path = checkpoint_dir(source) / "step_00000004.pt"
    with pytest.raises(UserError, match="holds checkpoints of another run"):
        find_start(run_dir, CONFIG, resume_from=path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        find_start(tmp_path / "new", CONFIG, resume_from=path)


@pytest.mark.parametrize("text", ["", "[]", "{", "null", json.dumps({"flag": 1})])
def test_a_damaged_record_of_the_start_is_no_record(tmp_path, text):
    checkpoints(tmp_path, 3)
    (tmp_path / "start.json").write_text(text)
    assert find_start(tmp_path, CONFIG).checkpoint is not None
    assert find_start(tmp_path, CONFIG, no_resume=True).sets_all_aside


@pytest.mark.parametrize("below", [".", "run", "a/run"])
def test_a_run_folder_that_is_or_lies_in_a_file_is_refused(tmp_path, below):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file\. Give the path of a folder"):
        check_place(tmp_path / "file" / below)
    check_place(tmp_path / "not" / "there")
    check_place(tmp_path)


def test_a_run_keeps_its_knn_k_as_its_figures_are_compared_with_each_other(tmp_path):
    with pytest.raises(UserError, match=r"knn_k: 20 -> 5\nNothing was written.*--set knn_k=20"):
        compare_configs(tmp_path, CONFIG, changed("train", knn_k=5))
    assert identity_of(changed("train", knn_k=20)) == identity_of(CONFIG)  # as of earlier versions
    assert identity_of(changed("train", knn_k=5)) != identity_of(CONFIG)  # so that --no_resume starts afresh


def test_a_folder_that_cannot_be_written_and_one_in_use_are_named_at_once(tmp_path, monkeypatch, capsys):
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take(create=True)
    monkeypatch.setattr(folder, "_LOCK_PATIENCE_S", 0.1)
    with pytest.raises(UserError, match="another process is training in this folder"):
        second.take(create=False)
    assert f"{tmp_path}: another process is training in this folder (" in capsys.readouterr().err
    monkeypatch.setattr(folder.os, "open", lambda *_args: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(UserError, match=f"checkpoint_dir {tmp_path}: Read-only file system: give another"):
        RunLock(tmp_path).take(create=True)
