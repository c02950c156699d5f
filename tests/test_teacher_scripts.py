"""precompute_cache.py --teacher as a user types it, on small images and the workplace's teacher of 24 channels."""

import json
import os
import re
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from stage1 import folder_bytes, wait_for_the_clock
from workplace import Workplace, run

import precompute_cache
from distillery.precompute import teacher_job
from distillery.system.errors import run_command
from distillery.teacher_cache.outputs import LiveTeacher
from distillery.verify import verify_folder

SETTINGS = ["--set", "eval_datasets={}", "--set", "teacher_cache.views=2"]


def arguments_of(place: Workplace, *arguments: str, cache: Path | None = None) -> list[str]:
    settings = [*SETTINGS, *(["--set", f"cache_dir={cache}"] if cache else [])]
    return [*place.flags("data", "train", "model"), "--teacher", *settings, *arguments]


@pytest.fixture
def run_teacher(place, monkeypatch, capsys):
    """The command in this process, which has torch already: (exit status, standard output, standard error)."""

    def run(*arguments: str, cache: Path | None = None) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["precompute_cache.py", *arguments_of(place, *arguments, cache=cache)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            run_command(precompute_cache.main)
        return end.value.code, *capsys.readouterr()

    return run


def teacher_folder(cache: Path) -> Path:
    (folder,) = (cache / "teacher").iterdir()
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory, png_images) -> Workplace:
    """A workplace whose images and teacher outputs are made by one command: 96 images in 4 shards, 2 views."""
    place = Workplace(tmp_path_factory.mktemp("teacher"), png_images)
    done = run("precompute_cache.py", *arguments_of(place))
    assert done.returncode == 0, done.stderr
    return place


def test_a_pass_that_training_would_refuse_is_refused_before_it_is_made(run_teacher, tmp_path):
    status, _, said = run_teacher("--set", "distill_loss_weights={cls: 1, layers: 1}", cache=tmp_path / "cache")
    assert status == 2
    assert "compares inner layers, which no teacher cache holds: set teacher_cache.mode: hybrid" in said
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def copy(place, tmp_path) -> Path:
    """A copy of the cache, to be damaged."""
    shutil.copytree(place.folder / "cache", tmp_path / "cache")
    wait_for_the_clock(tmp_path / "cache")
    return tmp_path / "cache"


def test_a_disk_too_small_for_the_outputs_is_told_before_the_pass(run_teacher, monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_job, "free_bytes", lambda _folder: 1000)
    status, output, _ = run_teacher("--dry_run", cache=tmp_path / "cache")
    assert status == 0
    assert re.search(r"WARNING: \S+ MB are to be written with the images, 1.0 kB are free", output), output


def test_one_command_makes_the_images_and_the_teachers_outputs(place):
    folder = teacher_folder(place.folder / "cache")
    index = json.loads((folder / "index.json").read_text())
    assert (index["num_samples"], index["num_views"], index["complete"], len(index["shards"])) == (96, 2, True, 4)
    assert index["fingerprint"].startswith(folder.name)
    names = {path.name for path in folder.iterdir()}
    assert names >= {"statistics.json", "teacher_shard_00003.pt", "teacher_shard_00003.json"}
    assert not [name for name in names if "tmp" in name]
    shard = torch.load(folder / "teacher_shard_00003.pt", weights_only=True)
    # the losses of the default configuration compare patch tokens
    assert shard["pooled"].shape == (24, 2, 24)
    assert shard["tokens"].shape == (24, 2, 64, 24)


def test_the_repair_that_verify_prints_is_of_these_very_outputs(run_teacher, copy):
    shard = teacher_folder(copy) / "teacher_shard_00001.pt"
    before, data = shard.read_bytes(), bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    status, output, _ = run_teacher("--verify", cache=copy)
    assert status == 1
    remove, _, command = output.splitlines()[-1].split("Repair: ")[1].partition(" && ")
    assert remove == f"rm -f -- {shard}"
    shard.unlink()
    arguments = shlex.split(command)
    assert arguments[:3] == ["python", "precompute_cache.py", "--teacher"]
    assert f"cache_dir={copy}" in arguments
    assert run_teacher(*arguments[3:], cache=copy)[0] == 0
    assert shard.read_bytes() == before


def test_run_again_it_changes_nothing(place, run_teacher):
    before = {path: path.stat().st_mtime_ns for path in (place.folder / "cache").rglob("*")}
    status, output, _ = run_teacher()
    assert status == 0
    assert "4 done, 0 to go" in output
    assert {path: path.stat().st_mtime_ns for path in (place.folder / "cache").rglob("*")} == before


def test_dry_run_prints_what_it_costs_and_writes_nothing(run_teacher, tmp_path):
    status, output, _ = run_teacher("--dry_run", cache=tmp_path / "none")
    assert status == 0
    assert "2 views of every image" in output
    assert "299.5 kB for each view, 599.0 kB in all; 4 shards" in output
    assert "0 done, 4 to go; 599.0 kB to write, 192 forward passes" in output
    assert "as much as 2 epochs with the live teacher" in output
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "settings, cost, is_advised",
    [
        ([], "2 epochs", True),
        (["teacher_mirror=true"], "1 epoch", False),
        (["teacher_mirror=true", "augment.color_jitter=0.5"], "2 epochs", False),
        (["augment.color_jitter=0.5"], "2 epochs", False),
    ],
)
def test_a_mirrored_teacher_is_advised_where_it_costs_nothing(run_teacher, tmp_path, settings, cost, is_advised):
    sets = ["--set", "augment.hflip=true", *(word for setting in settings for word in ("--set", setting))]
    status, output, _ = run_teacher("--dry_run", *sets, cache=tmp_path / "none")
    assert status == 0 and f"as much as {cost} with the live teacher" in output
    assert ("advice: teacher_mirror: true" in output) is is_advised


def test_no_other_teacher_is_advised_once_outputs_are_there(run_teacher, tmp_path):
    advised = []
    for _ in range(2):
        status, output, errors = run_teacher("--set", "augment.hflip=true", "--set", "max_samples=24",
                                             "--set", "max_shards=1", cache=tmp_path / "cache")  # fmt: skip
        assert status == 0, errors
        advised.append("advice: teacher_mirror: true" in output)
    assert advised == [True, False]


def test_array_jobs_together_make_the_same_folder_whatever_the_batch_size(place, run_teacher, tmp_path):
    for job in ("1", "0"):
        status, _, errors = run_teacher(
            "--num_jobs", "2", "--job_id", job, "--batch_size", "7", cache=tmp_path / "cache"
        )
        assert status == 0, errors
    assert folder_bytes(tmp_path / "cache") == folder_bytes(place.folder / "cache")


def test_processes_of_a_launcher_share_the_work(place, run_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        status, output, errors = run_teacher(cache=tmp_path / "cache")
        assert status == 0, errors
        assert "2 shards made" in output
        share = (
            f"process {rank} of 2: makes its share of the shards, one part of 2. To run alone: unset RANK WORLD_SIZE"
        )
        assert output.count(share) == 1
    assert folder_bytes(tmp_path / "cache") == folder_bytes(place.folder / "cache")


def test_a_rank_without_a_world_is_refused_before_anything_is_made(run_teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    status, _, errors = run_teacher(cache=tmp_path / "cache")
    assert (status, errors) == (2, "error: RANK=1 is set, WORLD_SIZE is not. Set both, or, to run alone: unset RANK\n")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_grows_extends_the_outputs_and_ends_like_one_made_at_once(place, run_teacher, tmp_path):
    for limit in ("40", "null"):
        status, output, errors = run_teacher("--set", f"max_samples={limit}", cache=tmp_path / "cache")
        assert status == 0, errors
    assert "3 shards made" in output
    assert folder_bytes(tmp_path / "cache") == folder_bytes(place.folder / "cache")


def test_outputs_of_several_settings_stand_side_by_side(run_teacher, copy):
    assert run_teacher("--set", "teacher_cache.tokens=none", cache=copy)[0] == 0
    assert len(list((copy / "teacher").iterdir())) == 2


def test_verify_replays_random_views_through_the_teacher(run_teacher):
    status, output, _ = run_teacher("--verify", "8")
    assert status == 0
    assert "of 8 random views, least cosine 1.0" in output
    assert "of 64 random views" in run_teacher("--verify")[1]


def test_verify_finds_a_flipped_byte_without_the_teacher_and_the_same_command_repairs_it(place, run_teacher, copy):
    shard = teacher_folder(copy) / "teacher_shard_00002.pt"
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    done = place.precompute("--verify", "--set", "eval_datasets={}", "--set", f"cache_dir={copy}")
    assert done.returncode == 1
    assert f"{shard}: damaged" in done.stdout
    assert "rm -f" in done.stdout
    status, output, _ = run_teacher(cache=copy)
    assert status == 0
    assert "repaired" in output
    assert folder_bytes(copy) == folder_bytes(place.folder / "cache")


@pytest.mark.parametrize("damage, status", [(None, 0), ("flipped", 1), ("lost", 1)])
def test_a_folder_of_teacher_outputs_is_verified_alone(copy, capsys, damage, status):
    folder = teacher_folder(copy)
    shard = folder / "teacher_shard_00001.pt"
    if damage == "flipped":
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 4
        shard.write_bytes(data)
    if damage == "lost":
        for path in folder.glob("teacher_shard_*"):
            path.unlink()
    assert verify_folder(folder) == status
    said = capsys.readouterr().out
    assert said.startswith(f"OK   {folder}: 4 shards" if status == 0 else "BAD  ")
    assert status == 0 or ("teacher_shard_00001.pt" in said and "precompute_cache.py --teacher" in said)


def test_verify_catches_a_shard_computed_with_other_weights(run_teacher, copy, monkeypatch):
    (teacher_folder(copy) / "teacher_shard_00001.pt").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(teacher_job, "build_live_teacher", with_other_weights)
        assert run_teacher(cache=copy)[0] == 0
    status, output, _ = run_teacher("--verify", "16", cache=copy)
    assert "every byte as its hash says" in output
    assert status == 1
    assert re.search(r"teacher_shard_00001.pt: row \d+, view [01]: pooled has cosine -?0\.\d+", output)
    assert not re.search(r"BAD .*teacher_shard_0000[023]", output)


def with_other_weights(*arguments, build=teacher_job.build_live_teacher):
    teacher, spec = build(*arguments)
    generator = torch.Generator().manual_seed(0)
    for parameter in teacher.backbone.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return teacher, spec


def test_a_teacher_with_other_weights_is_told_what_differs(place, run_teacher, tmp_path):
    shutil.copytree(place.folder / "hub", tmp_path / "hub")
    text = (place.folder / "hub" / "hubconf.py").read_text()
    (tmp_path / "hub" / "hubconf.py").write_text(text.replace("manual_seed(1)", "manual_seed(2)"))
    status, _, errors = run_teacher("--verify", "--set", f"teacher_repo={tmp_path / 'hub'}")
    assert status == 2
    assert "resolved.weights_hash: the cache has" in errors


def test_a_stop_signal_ends_with_status_75_and_the_same_command_goes_on(place, run_teacher, tmp_path, monkeypatch):
    forward = LiveTeacher.features
    calls = []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 3:  # in the second of four shards, which is still finished
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(LiveTeacher, "features", interrupted)
        status, _, errors = run_teacher(cache=tmp_path / "cache")
    assert status == 75, errors
    assert "2 shards are left to make" in errors
    assert run_teacher(cache=tmp_path / "cache")[0] == 0
    assert folder_bytes(tmp_path / "cache") == folder_bytes(place.folder / "cache")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--teacher"], "--teacher needs --train_config and --model_config"),
        (["--verify", "5"], "goes with --teacher"),
        (["--verify", "1"], "goes with --teacher"),
        (["--verify", "0"], "--verify 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_at_once(place, arguments, message):
    done = place.precompute(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
