import json
import shutil
from pathlib import Path

import pytest
import yaml

from distillery.system.errors import MissingFileError, UserError
from distillery.training import folder
from distillery.training.checkpoints import checkpoint_dir, save_checkpoint
from distillery.training.folder import (
    Start,
    check_place,
    check_shards,
    find_start,
    prepare_folder,
    set_aside,
)
from tests.training.test_checkpoints import state_at

CONFIG = {"data": {"num_workers": 1}, "train": {"weight_decay": 0.1}, "model": {"student_name": "a"}}


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


def test_what_was_set_aside_is_never_overwritten_after_one_of_them_was_deleted(tmp_path):
    for number in (1, 2):
        (tmp_path / "metrics.jsonl").write_text(str(number))
        assert set_aside(tmp_path).name == f"previous_{number}"
    shutil.rmtree(tmp_path / "previous_1")
    (tmp_path / "metrics.jsonl").write_text("3")
    assert set_aside(tmp_path).name == "previous_1"
    assert (tmp_path / "previous_2" / "metrics.jsonl").read_text() == "2"


def test_a_kill_while_later_checkpoints_are_set_aside_loses_no_row(tmp_path, monkeypatch):
    checkpoints(tmp_path, 2, 4)
    (tmp_path / "metrics.jsonl").write_text("rows")
    monkeypatch.setattr(Path, "rename", lambda *_args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path, 2, resume_from=checkpoint_dir(tmp_path) / "step_00000002.pt")
    assert (tmp_path / "previous_1" / "metrics.jsonl").read_text() == "rows"


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


def test_no_resume_goes_on_after_an_update_whose_configuration_has_a_key_more(tmp_path):
    begin(tmp_path, no_resume=True, job="7", restarts=0)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    checkpoints(tmp_path, 3)
    newer = CONFIG | {"model": CONFIG["model"] | {"teacher_mirror": False}}
    assert find_start(tmp_path, newer, no_resume=True, job="7", restarts=1).checkpoint is not None
    other = CONFIG | {"model": CONFIG["model"] | {"teacher_mirror": True}}
    assert find_start(tmp_path, other, no_resume=True, job="7", restarts=1).checkpoint is None


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
