"""The two commands as a user types them, on a small labelled parquet data set and models that train in seconds."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from forks import run_forked
from stage1 import wait_for_the_clock
from workplace import ROOT, Workplace, assert_same_tensors, comparable, run


@pytest.fixture(scope="module")
def cached(tmp_path_factory, png_images) -> Workplace:
    """A workplace whose cache is made and whose straight run of three epochs is done."""
    place = Workplace(tmp_path_factory.mktemp("place"), png_images)
    done = place.precompute()
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def trained(cached) -> Workplace:
    done = cached.distill(fresh=True)
    assert done.returncode == 0, done.stderr
    cached.straight_output, cached.straight_log = done.stdout, done.stderr
    return cached


def test_stage_1_makes_the_training_cache_and_both_parts_of_the_evaluation_set(cached):
    index = json.loads((cached.folder / "cache" / "index.json").read_text())
    assert (index["num_samples"], index["complete"], len(index["shards"])) == (96, True, 4)
    test = torch.load(cached.folder / "cache/eval/small/test/images_shard_00000.pt", weights_only=True)
    assert test["labels"].tolist() == [number % 8 for number in range(24)]
    assert not list((cached.folder / "cache").rglob("*.tmp*"))


def test_stage_1_run_again_changes_nothing(cached):
    before = {path: path.stat().st_mtime_ns for path in (cached.folder / "cache").rglob("*")}
    done = cached.precompute()
    assert done.returncode == 0
    assert "4 done, 0 to go" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in (cached.folder / "cache").rglob("*")} == before


def test_dry_run_prints_the_plan_and_writes_nothing(cached, tmp_path):
    done = cached.precompute("--dry_run", "--set", f"cache_dir={tmp_path / 'none'}")
    assert done.returncode == 0
    assert "96 of 96 images" in done.stdout
    assert "free space" in done.stdout
    assert not (tmp_path / "none").exists()


def test_the_plan_of_a_copied_cache_has_shards_to_check_and_no_image_to_decode(cached, tmp_path):
    shutil.copytree(cached.folder / "cache", tmp_path / "cache")
    wait_for_the_clock(tmp_path / "cache")
    for path in (tmp_path / "cache").glob("*.pt"):  # a copy may be younger than its record
        path.touch()
    done = cached.precompute("--dry_run", "--set", f"cache_dir={tmp_path / 'cache'}")
    assert "4 to go, 4 of them to check; 0 bytes to write" in done.stdout
    assert "images of this job" not in done.stdout


def test_array_jobs_together_make_the_same_cache_as_one(cached, tmp_path):
    for job in ("1", "0"):
        done = cached.precompute(
            "--num_jobs", "2", "--job_id", job, "--batch_size", "7", "--set", f"cache_dir={tmp_path}"
        )
        assert done.returncode == 0, done.stderr
    single, array = cached.folder / "cache", tmp_path
    names = sorted(str(path.relative_to(single)) for path in single.rglob("*") if path.is_file())
    assert names == sorted(str(path.relative_to(array)) for path in array.rglob("*") if path.is_file())
    assert all((single / name).read_bytes() == (array / name).read_bytes() for name in names)


def test_another_configuration_is_refused_field_by_field_and_nothing_is_written(cached):
    before = {path: path.stat().st_mtime_ns for path in (cached.folder / "cache").rglob("*")}
    done = cached.precompute("--set", "interpolation=bilinear")
    assert done.returncode == 2
    assert "preprocess.interpolation: the cache has 'bicubic', now it would be 'bilinear'" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (cached.folder / "cache").rglob("*")} == before


def test_verify_passes_and_names_a_damaged_file(cached, tmp_path):
    assert cached.precompute("--verify").returncode == 0
    done = cached.precompute("--set", f"cache_dir={tmp_path}")
    assert done.returncode == 0
    shard = tmp_path / "images_shard_00002.pt"
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    bad = run("distillery.cache", "verify", str(tmp_path))
    assert bad.returncode == 1
    assert "images_shard_00002.pt" in bad.stdout
    assert cached.precompute("--set", f"cache_dir={tmp_path}").returncode == 0
    assert run("distillery.cache", "verify", str(tmp_path)).returncode == 0


def test_the_repair_that_verify_prints_is_of_this_very_cache(cached, tmp_path):
    settings = ["--set", f"cache_dir={tmp_path}/a b", "--set", "cache_shard_size=30", "--set", "eval_datasets={}"]
    assert cached.precompute(*settings).returncode == 0
    shard = tmp_path / "a b" / "images_shard_00001.pt"
    before, data = shard.read_bytes(), bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    verified = cached.precompute(*settings, "--verify")
    assert verified.returncode == 1
    command = verified.stdout.splitlines()[-1].split("exactly what is bad): ")[1]
    command = command.replace("python precompute_cache.py", shlex.join([sys.executable, "precompute_cache.py"]))
    subprocess.run(command, shell=True, check=True, cwd=ROOT, capture_output=True)
    assert shard.read_bytes() == before
    assert cached.precompute(*settings, "--verify").returncode == 0


@pytest.mark.parametrize("minutes", ["-5", "nan", "soon"])
def test_a_time_limit_that_is_none_is_refused_and_nothing_is_written(cached, tmp_path, minutes):
    done = cached.distill("--set", f"checkpoint_dir={tmp_path / 'run'}", f"--max_minutes={minutes}")
    assert done.returncode == 2
    assert f"'{minutes}': expected a number of minutes above 0" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--no_resume", "--set", "wandb_project=x"], "wandb_project is 'x', and the package wandb is not installed"),
        (
            ["--no_resume", "--set", "batch_size=2", "--set", "distill_loss_weights={similarity: 1.0}"],
            "batch_size is 2, and distill_loss_weights.similarity compares the images of a batch with each other",
        ),
        (
            ["--set", "use_cached=false", "--set", "num_epochs=4"],
            "use_cached is false, and this run was started on a cache. Set it to null or true",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_finished_run_is_touched(trained, tmp_path, arguments, message):
    folder = shutil.copytree(trained.folder / "run", tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    done = trained.distill("--set", f"checkpoint_dir={folder}", *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize("name, message", [("other.pt", "its student_name is 'another'"), ("no.pt", "not found")])
def test_a_checkpoint_of_other_models_is_refused_before_anything_is_evaluated(trained, tmp_path, name, message):
    state = trained.last_checkpoint()
    state["config"]["model"]["student_name"] = "another"
    torch.save(state, tmp_path / "other.pt")
    arguments = ["--run", str(trained.folder / "run"), "--checkpoint", str(tmp_path / name)]
    done = run_forked("distillery.evaluate", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "untrained" not in done.stderr


def test_too_many_bad_images_end_with_status_3_and_are_listed(tmp_path, png_images):
    place = Workplace(tmp_path, [*png_images[:40], b"no image", b""])
    done = place.precompute("--set", "eval_datasets={}")
    assert done.returncode == 3, done.stderr
    failures = [json.loads(line) for line in (tmp_path / "cache" / "failures.jsonl").read_text().splitlines()]
    assert [entry["global_idx"] for entry in failures] == [40, 41]
    assert place.precompute("--set", "eval_datasets={}", "--set", "max_failed_fraction=0.5").returncode == 0


def test_a_run_leaves_everything_the_contract_names(trained):
    run_dir = trained.folder / "run"
    for name in ("config.yaml", "shards.json", "metrics.jsonl", "report.html", "plots", "checkpoints"):
        assert (run_dir / name).exists(), name
    assert list((run_dir / "plots").glob("*.png"))
    checkpoint = trained.last_checkpoint()
    assert {"student", "heads", "optimizer", "ema", "rng", "progress", "config"} <= checkpoint.keys()
    assert checkpoint["progress"] == {"step": 36, "epoch": 3, "samples": 0}


def test_the_first_evaluation_rows_are_the_untrained_student_and_the_teacher(trained):
    rows = trained.rows("eval")
    assert [(row["model"], row["step"]) for row in rows[:2]] == [("untrained", 0), ("teacher", 0)]
    assert [row["step"] for row in rows if row["model"] == "student"] == [12, 24, 36]
    assert all(0 <= row["knn_top1"] <= 1 and row["dataset"] == "small" for row in rows)


def test_training_rows_have_the_fields_of_the_contract_and_the_loss_falls(trained):
    rows = trained.rows("train")
    assert [row["step"] for row in rows] == list(range(2, 37, 2))
    assert {"kind", "step", "epoch", "loss", "loss/cls", "loss/patch", "explained/cls", "explained/patch", "lr",
            "grad_norm", "images_per_second", "step_seconds", "data_wait_fraction",
            "time"} <= rows[0].keys()  # fmt: skip
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_shards_of_every_epoch_and_the_end_are_on_record(trained):
    assert [(row["epoch"], row["step"], row["images"]) for row in trained.rows("epoch")] == [
        (0, 0, 96), (1, 12, 96), (2, 24, 96)
    ]  # fmt: skip
    assert all(row["shards"] == [[0, 3]] for row in trained.rows("epoch"))
    assert [(row["step"], row["reason"]) for row in trained.rows("end")] == [(36, "done")]


def test_the_report_of_a_finished_run_shows_what_the_models_see(trained):
    plots = trained.folder / "run" / "plots"
    assert {"pca.png", "neighbours.png", "shards.png", "time_shares.png"} <= {path.name for path in plots.iterdir()}
    text = (trained.folder / "run" / "report.html").read_text()
    assert "32 images of small (test); student at step 36" in text
    assert "Shards trained on: 4 of 4" in text


def test_the_report_is_made_again_with_its_pictures_and_without_a_cache_says_why_there_are_none(trained, tmp_path):
    for name in ("config.yaml", "metrics.jsonl", "checkpoints"):
        (tmp_path / name).symlink_to(trained.folder / "run" / name)
    done = run("distillery.report", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert {"pca.png", "neighbours.png"} <= {path.name for path in (tmp_path / "plots").iterdir()}
    assert "32 images of small (test); student at step 36" in (tmp_path / "report.html").read_text()
    shutil.rmtree(tmp_path / "plots")
    (trained.folder / "cache").rename(trained.folder / "elsewhere")
    try:
        done = run_forked("distillery.report", str(tmp_path))
    finally:
        (trained.folder / "elsewhere").rename(trained.folder / "cache")
    assert done.returncode == 0, done.stderr
    assert "No pictures of the features: eval_datasets.small: " in (tmp_path / "report.html").read_text()


def test_the_log_of_a_run_has_a_line_for_each_epoch_and_no_carriage_return(trained):
    lines = trained.straight_log.splitlines()
    assert "\r" not in trained.straight_log
    for epoch in (1, 2, 3):
        (line,) = (line for line in lines if line.startswith(f"epoch {epoch} of 3: step {12 * epoch} | loss "))
        assert "| lr " in line and "| images/s " in line and "data/teacher/student/optimizer" in line


def learning_lines(log: str) -> list[str]:
    return list(dict.fromkeys(line for line in log.splitlines() if line.startswith("learning: ")))


def test_each_evaluation_is_followed_by_a_line_on_what_the_student_has_learnt(trained):
    found = [line for line in learning_lines(trained.straight_log) if line.startswith("learning: epoch ")]
    assert [line.split(": ")[1] for line in found] == ["epoch 1", "epoch 2", "epoch 3"]
    for line in found:
        assert "k-NN " in line and "explained: cls " in line and "patch " in line and "effective rank " in line


def test_the_schedule_is_printed_before_the_first_step(trained):
    assert "3 epochs x 12 steps = 36 steps of 8 images" in trained.straight_output
    assert "an epoch sees 96 of 96 images (100 %)" in trained.straight_output
    assert "learning rate" in trained.straight_output


def test_a_finished_run_run_again_does_nothing(trained):
    before = (trained.folder / "run" / "metrics.jsonl").read_bytes()
    done = trained.distill()
    assert done.returncode == 0, done.stderr
    assert (trained.folder / "run" / "metrics.jsonl").read_bytes() == before
    # a kill between an evaluation and its line does not lose the line
    assert learning_lines(done.stderr) == learning_lines(trained.straight_log)[-1:] != []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_interrupted_and_run_again_equals_the_straight_run_bit_for_bit(trained, tmp_path, number):
    flags = trained.flags("data", "train", "model")
    command = [sys.executable, str(ROOT / "distill_trainer.py"), *flags, "--device", "cpu",
               "--set", f"checkpoint_dir={tmp_path / 'run'}"]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert "Run the same command again" in errors
    again = trained.distill(
        "--set", f"checkpoint_dir={tmp_path / 'run'}", "--set", "num_workers=3", "--set", "prefetch_batches=2"
    )
    assert again.returncode == 0, again.stderr
    assert learning_lines(errors + again.stderr) == learning_lines(trained.straight_log)
    other = Workplace.__new__(Workplace)
    other.folder = tmp_path
    straight, resumed = trained.last_checkpoint(), other.last_checkpoint()
    for key in ("student", "heads", "optimizer", "progress", "target_statistics"):
        assert_same_tensors(straight[key], resumed[key])
    for kind in ("train", "eval"):
        assert [comparable(row) for row in trained.rows(kind)] == [comparable(row) for row in other.rows(kind)]


def test_a_run_folder_of_another_configuration_is_refused_with_the_difference(trained):
    done = trained.distill("--set", "weight_decay=0.5", "--set", "log_every=3")
    assert done.returncode == 2
    assert "weight_decay: 0.04 -> 0.5" in done.stderr
    assert "log_every" not in done.stderr


def test_another_global_batch_is_refused_with_the_arithmetic(trained):
    done = trained.distill("--set", "batch_size=4", "--set", "num_epochs=4")
    assert done.returncode == 2
    assert "global batch of 8 images" in done.stderr
    assert "now it would be 4 images" in done.stderr


def test_evaluate_prints_student_teacher_and_untrained(trained):
    done = run("distillery.evaluate", "--run", str(trained.folder / "run"), "--json", str(trained.folder / "out.json"))
    assert done.returncode == 0, done.stderr
    models = {row["model"] for row in json.loads((trained.folder / "out.json").read_text())["rows"]}
    assert {"untrained", "student", "teacher"} <= models


def test_the_exported_student_loads_in_timm_with_exactly_its_keys(trained, tmp_path):
    import timm

    done = run("distillery.export", "--run", str(trained.folder / "run"), "--out", str(tmp_path), "--format", "timm")
    assert done.returncode == 0, done.stderr
    model = timm.create_model(
        "test_vit", num_classes=0, img_size=32, checkpoint_path=str(tmp_path / "model.safetensors")
    )
    weights = trained.last_checkpoint()["student"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_raw_images_train_as_those_of_the_cache_do(cached, tmp_path):
    losses = {}
    for use_cached in ("false", "true"):
        settings = [f"use_cached={use_cached}", "shards_per_epoch=2", "num_epochs=2", "log_every=1",
                    "eval_every_epochs=0", f"checkpoint_dir={tmp_path / use_cached}"]  # fmt: skip
        done = cached.distill(*(part for setting in settings for part in ("--set", setting)))
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / use_cached / "metrics.jsonl").read_text().splitlines()]
        losses[use_cached] = [row["loss"] for row in rows if row["kind"] == "train"]
    assert len(losses["true"]) == 12
    assert losses["false"] == pytest.approx(losses["true"], rel=1e-4)


def test_random_shards_per_epoch_train_and_a_run_without_labelled_images_says_what_it_learns(cached, tmp_path):
    done = cached.distill("--set", "shards_per_epoch=2", "--set", "num_epochs=2", "--set", "eval_datasets={}",
                          "--set", f"checkpoint_dir={tmp_path / 'subset'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 epochs x 6 steps = 12 steps" in done.stdout
    lines = learning_lines(done.stderr)
    assert [line.split(": ")[1] for line in lines if "explained: cls " in line] == ["epoch 1", "epoch 2"]


def test_a_batch_of_one_image_that_batch_norm_cannot_take_is_an_error_with_the_key(cached, tmp_path):
    done = cached.distill("--set", "batch_size=1", "--set", "student_name=test_resnet", "--set", "student_kwargs={}",
                          "--set", "eval_datasets={}", "--set", f"checkpoint_dir={tmp_path / 'one'}")  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "batch_size 1: the student's batch norm needs two images or more. Raise batch_size" in done.stderr


def test_an_evaluation_cache_larger_than_asked_for_is_said(cached, tmp_path):
    done = cached.distill("--set", "eval_datasets.small.max_train=50", "--set", f"checkpoint_dir={tmp_path / 'run'}",
                          "--set", "num_epochs=1", "--set", "max_steps_per_epoch=1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "train holds 96 images, more than max_train (50): all are used" in done.stdout


def test_the_command_in_a_message_is_for_this_very_configuration(cached):
    done = cached.distill("--set", "cache_dir=/not there", "--set", "use_cached=true")
    assert done.returncode == 2
    flags = shlex.join([str(flag) for flag in cached.flags("data", "train", "model")])
    command = f"python precompute_cache.py {flags} --set 'cache_dir=/not there' --set use_cached=true"
    assert command in done.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--set", "shard_per_epoch=3"], "did you mean 'shards_per_epoch'"),
        (["--set", "batch_size=big"], "batch_size"),
        (["--set", "batch_size=1000"], "an epoch holds at most 96"),
        (["--set", "use_cached=true", "--set", "cache_dir=/nowhere/at/all"], "precompute_cache.py"),
        (["--set", "image_size=64"], "image_size"),
        (["--set", "teacher_name=huge"], "tiny"),
        (["--set", "distill_loss_weights={clss: 1.0}"], "did you mean 'cls'"),
    ],
)
def test_bad_input_is_one_clear_message_status_2_and_nothing_written(cached, tmp_path, flags, message):
    done = cached.distill("--set", f"checkpoint_dir={tmp_path / 'run'}", *flags)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_without_a_gpu_is_an_error_not_a_cpu_run(cached):
    done = run_forked("distill_trainer.py", *cached.flags("data", "train", "model"), "--device", "cuda")
    assert done.returncode == 2
    assert "finds no usable GPU" in done.stderr


def answer_without_torch(script, *arguments):
    code = (
        f"import runpy, sys; sys.argv = [{script!r}, *{arguments!r}]\n"
        f"try: runpy.run_path({script!r}, run_name='__main__')\n"
        "finally: assert 'torch' not in sys.modules"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


SCRIPTS = ["precompute_cache.py", "distill_trainer.py"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_importing_torch(script):
    done = answer_without_torch(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "--data_config" in done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    "setting, message",
    [
        ("cache_shard_sise=9", "did you mean 'cache_shard_size'"),
        ("distill_loss_weights.patsh=1", "unknown loss 'patsh'; did you mean 'patch'?"),
        ("loss_options.mse.beta=1", "loss_options.mse: distill_loss_weights has no 'mse' (it has cls, patch)"),
    ],
)
def test_mistakes_answer_without_importing_torch_or_looking_at_the_data(cached, script, setting, message):
    missing = ["--set", "data_files=/not/there.parquet", "--set", setting]
    done = answer_without_torch(script, *cached.flags("data", "train", "model"), *missing)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


def test_layers_that_no_loss_compares_are_refused_at_once(cached):
    layers = ["--set", "teacher_out_indices=[0]", "--set", "student_out_indices=[0]"]
    done = answer_without_torch("distill_trainer.py", *cached.flags("data", "train", "model"), *layers)
    assert done.returncode == 2, done.stderr
    assert "are set, but no loss compares layers: add layers to distill_loss_weights" in done.stderr
