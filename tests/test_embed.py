import json
import os
import re
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from workplace import ForkedRun, Workplace, at_call, run, send

from data_loader import CachedTensorDataset
from distillery import embed
from distillery.config.load import load_dumped_configs
from distillery.evaluate import features
from distillery.export import embeddings
from distillery.models.configured import build_teacher_backbone
from distillery.system.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_TOO_MANY_FAILED, EXIT_USAGE, run_command
from distillery.training.build import build_models
from distillery.training.trained import load_trained

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "search.md"
BAD = 30  # the image that cannot be decoded, of 96 in shards of 24
OTHERS = [number for number in range(96) if number != BAD]


@pytest.fixture(scope="module")
def place(tmp_path_factory, png_images) -> Workplace:
    """A cache with labels, one of whose images cannot be decoded, and a run of six steps with averaged weights."""
    place = Workplace(tmp_path_factory.mktemp("place"), [*png_images[:BAD], b"no image", *png_images[BAD + 1 :]])
    data = yaml.safe_load((place.folder / "data.yaml").read_text())
    place.write("data", data | {"label_column": "label", "eval_datasets": {}, "max_failed_fraction": 0.1})
    done = place.precompute()
    assert done.returncode == 0, done.stderr
    flags = [*place.flags("data", "train", "model"), "--device", "cpu", "--max_steps_per_epoch", "2"]
    flags += ["--set", "ema_decay=0.5", "--set", "eval_every_epochs=0"]
    straight = ForkedRun(flags, place.folder / "output")
    assert straight.wait() == EXIT_DONE, straight.text
    return place


def run_embed(place: Workplace, out: Path, *flags: str) -> int:
    """The command in this process: its exit status."""
    whose = () if "--model_config" in flags else ("--run", str(place.folder / "run"))
    before = sys.argv
    sys.argv = ["embed", *whose, *place.flags("data"), "--out", str(out), "--device", "cpu", *flags]
    try:
        run_command(embed.main)
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before
    raise AssertionError("the command has no exit status")


def fork_embed(place: Workplace, out: Path, output: Path, before) -> int:
    """The same in a fork of this process, with faults put in its way: minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(fd, 1)
            os.dup2(fd, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            before()
            status = run_embed(place, out)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def embedded(out: Path) -> tuple[np.ndarray, list[int], list[int]]:
    """(embeddings, global_idx, labels) as docs/search.md reads them."""
    code = re.search(r"These lines make an array.*?```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[1]
    found: dict = {}
    exec(code.replace("out/*.parquet", f"{out}/*.parquet"), found)
    return found["x"], found["table"]["global_idx"].to_pylist(), found["table"]["label"].to_pylist()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def pooled(module, place: Workplace) -> np.ndarray:
    """What a module makes of the images of the cache, in batches as the command has them."""
    images = CachedTensorDataset(place.folder / "cache")
    shards = [range(0, 24), range(24, 47), range(47, 71), range(71, 95)]
    return torch.cat([module.eval()(torch.stack(images.__getitems__(shard))).pooled for shard in shards]).numpy()


@pytest.fixture(scope="module")
def made(place, tmp_path_factory) -> Path:
    """The embeddings of the run's student."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert run_embed(place, out) == EXIT_DONE
    return out


# ---- what is in the folder


def test_every_image_that_can_be_decoded_has_its_embedding_and_label_in_order(place, made):
    x, global_idx, labels = embedded(made)
    assert x.dtype == np.float32 and x.shape == (95, 64)
    assert global_idx == OTHERS and labels == [number % 8 for number in OTHERS]
    assert [pq.read_metadata(path).num_rows for path in sorted(made.glob("*.parquet"))] == [24, 23, 24, 24]
    failure = {"global_idx": BAD, "reason": "not an image file of a known format"}
    assert [json.loads(line) for line in (made / "failures.jsonl").read_text().splitlines()] == [failure]
    summary = json.loads((made / "embeddings.json").read_text())
    assert summary["complete"] and (summary["rows"], summary["failed"], summary["width"]) == (95, 1, 64)
    assert (summary["model"]["name"], summary["model"]["space"], summary["model"]["step"]) == (
        "test_vit",
        "backbone",
        6,
    )


@pytest.mark.parametrize("weights", ["auto", "student", "ema"])
def test_the_student_is_that_of_the_checkpoint_with_averaged_weights_where_there_are_any(place, tmp_path, weights):
    assert run_embed(place, tmp_path, "--weights", weights) == EXIT_DONE
    trained = load_trained(place.folder / "run", weights="student" if weights == "student" else "ema")
    configs = load_dumped_configs(place.folder / "run" / "config.yaml")
    trained.backbone.set_data_normalisation(configs.data.mean, configs.data.std)
    np.testing.assert_allclose(embedded(tmp_path)[0], pooled(trained.backbone, place), atol=1e-6)


def test_in_the_teachers_space_it_is_the_student_behind_its_folded_head(place, tmp_path):
    assert run_embed(place, tmp_path, "--space", "teacher") == EXIT_DONE
    configs = load_dumped_configs(place.folder / "run" / "config.yaml")
    trained = load_trained(place.folder / "run", data_mean=configs.data.mean, data_std=configs.data.std)
    x = embedded(tmp_path)[0]
    assert x.shape == (95, 24)
    np.testing.assert_allclose(x, pooled(trained.in_teacher_space(), place), atol=1e-6)


def test_teacher_and_untrained_student_are_those_of_the_run(place, tmp_path):
    configs = load_dumped_configs(place.folder / "run" / "config.yaml")
    teacher, student = build_models(configs, torch.device("cpu"))
    for role, module in (("teacher", teacher.backbone), ("untrained", student.student)):
        torch.manual_seed(99)  # whatever was drawn before
        assert run_embed(place, tmp_path / role, "--role", role) == EXIT_DONE
        np.testing.assert_allclose(embedded(tmp_path / role)[0], pooled(module, place), atol=1e-6)


def test_a_model_config_gives_either_of_its_models_without_a_run(place, tmp_path, capsys):
    for role, width in (("teacher", 24), ("student", 64)):
        flags = [*place.flags("model"), "--role", role]
        assert run_embed(place, tmp_path / role, *flags) == EXIT_DONE
        assert embedded(tmp_path / role)[0].shape == (95, width)
    configs = load_dumped_configs(place.folder / "run" / "config.yaml")
    teacher = build_teacher_backbone(configs.model, configs.data)
    np.testing.assert_allclose(embedded(tmp_path / "teacher")[0], pooled(teacher, place), atol=1e-6)
    mirrored = [*place.flags("model"), "--role", "teacher", "--set", "teacher_mirror=true"]
    assert run_embed(place, tmp_path / "teacher", *mirrored) == EXIT_USAGE
    assert "model.mirror is False there, True now" in capsys.readouterr().err


def test_images_normalised_otherwise_give_the_same_embeddings(place, made, tmp_path):
    other = ["--set", "mean=[0.5, 0.4, 0.3]", "--set", "std=[0.2, 0.2, 0.3]", "--set", "use_cached=false"]
    assert run_embed(place, tmp_path, *other) == EXIT_DONE
    np.testing.assert_allclose(embedded(tmp_path)[0], embedded(made)[0], atol=1e-4)


def test_raw_images_give_what_their_cache_gives(place, made, tmp_path, capsys):
    assert run_embed(place, tmp_path, "--set", "use_cached=false") == EXIT_DONE
    assert "decoding raw images (use_cached is false)" in capsys.readouterr().out
    (x, *rest), (cached, *of_cache) = embedded(tmp_path), embedded(made)
    assert rest == of_cache
    np.testing.assert_allclose(x, cached, atol=1e-6)
    assert (tmp_path / "failures.jsonl").read_bytes() == (made / "failures.jsonl").read_bytes()


def test_a_file_without_an_image_is_there_all_the_same_and_too_many_failures_are_status_3(place, tmp_path, capsys):
    flags = ["use_cached=false", "cache_shard_size=1", "max_samples=32", "max_failed_fraction=0.01"]
    flags = [part for flag in flags for part in ("--set", flag)]
    assert run_embed(place, tmp_path, *flags) == EXIT_TOO_MANY_FAILED
    assert "more than max_failed_fraction 0.01 allows" in capsys.readouterr().out
    assert pq.read_metadata(tmp_path / f"embeddings_{BAD:05d}.parquet").num_rows == 0
    assert embedded(tmp_path)[1] == OTHERS[:31]


# ---- interruptions


KILLS = {
    "before the first file": lambda: at_call(embeddings.EmbeddingFolder, "write", 1, send(signal.SIGKILL)),
    "while a file is made durable": lambda: at_call(os, "fsync", 9, send(signal.SIGKILL)),
    "before a file has its name": lambda: at_call(os, "replace", 4, send(signal.SIGKILL)),
    "before failures.jsonl": lambda: at_call(
        embeddings.EmbeddingFolder, "_write_failures", 2, send(signal.SIGKILL)
    ),
    "before embeddings.json": lambda: at_call(
        embeddings.EmbeddingFolder, "_write_summary", 4, send(signal.SIGKILL)
    ),
}  # fmt: skip


@pytest.mark.parametrize("moment", KILLS)
def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(place, made, tmp_path, moment):
    out = tmp_path / "out"
    assert fork_embed(place, out, tmp_path / "output", KILLS[moment]) == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in out.glob("embeddings_*.parquet")}
    assert len(finished) < 4
    assert run_embed(place, out) == EXIT_DONE
    assert contents(out) == contents(made)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


def stop_in_a_file() -> None:
    """A signal comes while the second file is computed, and the grace for it is over at once."""
    embed._GRACE_S = -1
    at_call(features, "extract_features", 2, send(signal.SIGTERM))


STOPS = {
    "finishes the file in hand": lambda: at_call(embeddings.EmbeddingFolder, "write", 2, send(signal.SIGTERM)),
    "drops a file that takes too long": stop_in_a_file,
}


@pytest.mark.parametrize("what", STOPS)
def test_a_signal_is_status_75_and_the_same_command_goes_on(place, made, tmp_path, what):
    out, output = tmp_path / "out", tmp_path / "output"
    assert fork_embed(place, out, output, STOPS[what]) == EXIT_INTERRUPTED
    left = 4 - len(list(out.glob("*.parquet")))
    assert left == 3 if "drops" in what else 0 < left < 3
    said = f"SIGTERM: {left} files are left to make; everything finished is saved. Run the same command again."
    assert said in output.read_text()
    assert not json.loads((out / "embeddings.json").read_text())["complete"]
    assert run_embed(place, out) == EXIT_DONE
    assert contents(out) == contents(made)


def test_a_finished_folder_is_left_as_it_is(place, made):
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert run_embed(place, made) == EXIT_DONE
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_a_file_cut_short_is_made_again(place, made, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    for name, data in contents(made).items():
        (out / name).write_bytes(data if name != "embeddings_00002.parquet" else data[:900])
    assert run_embed(place, out) == EXIT_DONE
    assert "embeddings_00002.parquet: cannot be read (ArrowInvalid); it is made again" in capsys.readouterr().out
    assert contents(out) == contents(made)


# ---- another model, another space, other data


@pytest.mark.parametrize(
    "flags, differs",
    [
        (["--role", "teacher"], "model.kwargs.img_size is 32 there, None now"),
        (["--space", "teacher"], "model.space is 'backbone' there, 'teacher' now; width is 64 there, 24 now"),
        (["--weights", "student"], "model.averaged is True there, False now; model.weights_hash is "),
        (["--set", "use_cached=false", "--set", "label_column=null"], "data.labels is True there, False now"),
        (["--set", "use_cached=false", "--set", "resize_mode=crop"], "data.preprocess.resize_mode is 'squash' there"),
        (["--set", "max_samples=50"], r"embeddings_00002.parquet holds images 48 to 71, which this data configuration"),
    ],
)
def test_something_else_in_the_same_folder_is_refused_with_what_differs(place, made, flags, differs, capsys):
    before = contents(made)
    assert run_embed(place, made, *flags) == EXIT_USAGE
    error = capsys.readouterr().err
    assert re.search(differs, error) and error.startswith("error: ") and error.count("\n") == 1
    assert "Give another --out" in error
    assert contents(made) == before


def test_more_images_replace_the_short_last_file_and_leave_the_others(place, made, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_embed(place, out, "--set", "max_samples=40") == EXIT_DONE
    assert embedded(out)[1] == [row for row in OTHERS if row < 40]
    summary = json.loads((out / "embeddings.json").read_text())
    assert summary["complete"] and summary["files"] == 2
    first = (out / "embeddings_00000.parquet").stat().st_mtime_ns
    assert run_embed(place, out) == EXIT_DONE
    assert "embeddings_00001.parquet: the data have 8 images more by now; it is made again" in capsys.readouterr().out
    assert (out / "embeddings_00000.parquet").stat().st_mtime_ns == first
    assert contents(out) == contents(made)


def test_of_an_incomplete_cache_there_is_what_is_there_and_the_rest_is_asked_for(place, made, tmp_path, capsys):
    cache, out = tmp_path / "cache", tmp_path / "out"
    half = ["--set", f"cache_dir={cache}"]
    done = place.precompute(*half, "--num_jobs", "2", "--job_id", "1")
    assert done.returncode == 0, done.stderr
    assert run_embed(place, out, *half) == EXIT_DONE
    assert "the cache is incomplete: complete it (python precompute_cache.py" in capsys.readouterr().out
    assert embedded(out)[1] == OTHERS[47:]
    assert not json.loads((out / "embeddings.json").read_text())["complete"]
    assert run_embed(place, out) == EXIT_DONE  # the whole cache of the same images
    assert contents(out) == contents(made)


def test_a_folder_that_holds_something_else_keeps_it(place, tmp_path, capsys):
    (tmp_path / "failures.jsonl").write_text("mine")
    assert run_embed(place, tmp_path) == EXIT_USAGE
    assert "holds something else (failures.jsonl). Give another --out" in capsys.readouterr().err
    assert (tmp_path / "failures.jsonl").read_text() == "mine"


def test_a_file_of_another_program_is_not_written_over(place, tmp_path, capsys):
    pq.write_table(pq.read_table(place.folder / "test.parquet"), tmp_path / "embeddings_00000.parquet")
    before = contents(tmp_path)
    assert run_embed(place, tmp_path) == EXIT_USAGE
    assert "embeddings_00000.parquet is not of this program" in capsys.readouterr().err
    assert contents(tmp_path) == before


# ---- wrong usage


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--role", "untrained", "--space", "teacher"], "--space teacher needs a head that was trained"),
        (["--role", "teacher", "--weights", "ema"], "choose among the weights of a run's student"),
        (["--model_config", "x.yaml"], "--model_config needs --role teacher or --role student"),
        (
            ["--model_config", "x.yaml", "--role", "student", "--checkpoint", "a.pt"],
            "--weights and --checkpoint choose",
        ),
        (["--batch_size", "0"], "--batch_size 0: expected 1 to 256"),
        (["--set", "teacher_name=x"], "'teacher_name' belongs in model_config_kd.yaml, which this command was not giv"),
        (["--set", "image_size=64"], "image_size: 32 in the cache, 64 in data_config"),
        (["--run", "nowhere"], "nowhere/config.yaml"),
    ],
)
def test_wrong_usage_is_said_and_nothing_is_written(place, tmp_path, flags, message, capsys):
    assert run_embed(place, tmp_path / "out", *flags) == EXIT_USAGE
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_without_a_head_for_pooled_features_has_no_place_in_the_teachers_space(
    place, tmp_path, capsys, monkeypatch
):
    trained = load_trained(place.folder / "run")
    for name in [name for name in trained.head_weights if name.startswith("pooled.")]:
        del trained.head_weights[name]
    monkeypatch.setattr("distillery.export.embedders.load_trained", lambda *_args, **_options: trained)
    assert run_embed(place, tmp_path / "out", "--space", "teacher") == EXIT_USAGE
    assert "this run has no head for pooled features" in capsys.readouterr().err


def test_embeddings_that_are_not_finite_are_never_stored(place, tmp_path, capsys, monkeypatch):
    trained = load_trained(place.folder / "run")
    with torch.no_grad():
        trained.backbone.model.norm.weight.fill_(torch.inf)
    monkeypatch.setattr("distillery.export.embedders.load_trained", lambda *_args, **_options: trained)
    assert run_embed(place, tmp_path) == EXIT_USAGE
    assert "24 of the embeddings of images 0 to 23 are not finite" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.parquet"))


# ---- docs/search.md


def test_the_search_of_the_document_finds_an_image_beside_its_copy(place, tmp_path, monkeypatch, capsys):
    images = pq.read_table(place.folder / "train.parquet")
    columns = images.to_pylist()
    columns[2] = columns[70]  # the same image twice, with the same label
    pq.write_table(pa.Table.from_pylist(columns, schema=images.schema), tmp_path / "twice.parquet")
    flags = [f"data_files={tmp_path / 'twice.parquet'}", "use_cached=false"]
    flags = [part for flag in flags for part in ("--set", flag)]
    assert run_embed(place, tmp_path / "out", *flags) == EXIT_DONE
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[:2]
    exec("\n".join(blocks), {})
    assert f"image 2, class {70 % 8}: images [70 " in capsys.readouterr().out


def test_help_and_a_wrong_configuration_answer_without_torch(tmp_path):
    code = "import sys, distillery.embed as e; sys.exit('torch' in sys.modules or 'pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=DOCUMENT.parents[1], timeout=60).returncode == 0
    done = run("distillery.embed", "--run", "x", "--data_config", str(tmp_path / "none.yaml"), "--out", "y")
    assert done.returncode == EXIT_USAGE and "none.yaml" in done.stderr
