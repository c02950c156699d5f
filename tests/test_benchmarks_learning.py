import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.learning import Results
from benchmarks.learning_peers import with_fixed_view
from benchmarks.learning_runs import VARIANTS, Setting, curve_of, write_configs
from benchmarks.learning_tables import ablation_rows, knn_at, main_rows
from distillery.config.load import load_configs

ROOT = Path(__file__).resolve().parents[1]
SETTING = Setting("train.parquet", "test.parquet", "hub", "big", "small", epochs=2, ablation_epochs=1)


def finished_run(name: str, seed: int, shares: list[float], seconds: list[float], kind: str = "contender") -> dict:
    points = [
        {"epoch": epoch, "images": 640 * epoch, "seconds": at, "knn": share}
        for epoch, (share, at) in enumerate(zip(shares, seconds, strict=True))
    ]
    rows = {
        model: {"knn_top1": share, "linear_top1": share + 0.05}
        for model, share in (("untrained", shares[0]), ("student", shares[-1]), ("teacher", 0.9))
    }
    return {"kind": kind, "name": name, "seed": seed, "prepare_seconds": 0.0, "curve": points, "rows": rows}


def tiny(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.learning", "--tiny", "--out", str(folder), *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


@pytest.mark.slow
def test_a_tiny_run_measures_ours_beside_timm_draws_curves_and_is_not_repeated(tmp_path):
    done = tiny(tmp_path, "--dir", str(tmp_path), "--equal_time")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "learning.json").read_text())
    assert [row["name"] for row in result["results"]] == ["untrained student", "ours", "timm-mse", "teacher"]
    for run in result["runs"]:
        assert [(point["epoch"], point["images"]) for point in run["curve"]] == [(0, 0), (1, 128), (2, 256)]
        seconds = [point["seconds"] for point in run["curve"]]
        assert 0 < seconds[0] < seconds[1] < seconds[2]
    assert result["runs"][0]["curve"][0]["knn"] == result["runs"][1]["curve"][0]["knn"]
    assert (tmp_path / "learning.png").read_bytes()[:4] == b"\x89PNG"
    assert "| timm-mse" in done.stdout and "k-NN after" in done.stdout
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    again = tiny(tmp_path)
    assert again.returncode == 0, again.stderr
    assert json.loads((tmp_path / "learning.json").read_text())["runs"] == result["runs"]


def test_with_a_fixed_view_the_teacher_sees_the_images_and_the_student_the_views_of_them():
    seen = []
    apply = lambda images, epoch: [image + 100 * epoch for image in images]  # noqa: E731
    augment = SimpleNamespace(draw=None, apply=apply)
    task = with_fixed_view(SimpleNamespace(augment=augment, teacher_call=seen.append))
    for epoch in (1, 2):
        view = task.augment.apply([epoch, epoch + 1], epoch)
        assert view == [101 * epoch, 101 * epoch + 1]
        task.teacher_call(view)
    assert seen == [[1, 2], [2, 3]]


def test_a_curve_leaves_evaluations_out_of_its_seconds():
    rows = [
        {"kind": "start", "step": 0, "time": 110.0},
        {"kind": "eval", "model": "untrained", "step": 0, "epoch": 0, "time": 115.0, "knn_top1": 0.3},
        {"kind": "eval", "model": "teacher", "step": 0, "epoch": 0, "time": 130.0, "knn_top1": 0.9},
        {"kind": "train", "step": 10, "epoch": 0, "time": 150.0},
        {"kind": "eval", "model": "student", "step": 10, "epoch": 1, "time": 157.0, "knn_top1": 0.6},
        {"kind": "train", "step": 20, "epoch": 1, "time": 177.0},
        {"kind": "eval", "model": "student", "step": 20, "epoch": 2, "time": 184.0, "knn_top1": 0.7},
    ]
    assert curve_of(rows, started=100.0, batch_size=64) == [
        {"epoch": 0, "images": 0, "seconds": 10.0, "knn": 0.3},
        {"epoch": 1, "images": 640, "seconds": 30.0, "knn": 0.6},
        {"epoch": 2, "images": 1280, "seconds": 50.0, "knn": 0.7},
    ]


def test_equal_time_is_read_between_the_evaluations_when_the_fastest_is_done():
    fast = finished_run("ours", 0, [0.3, 0.6, 0.7], [0.0, 10.0, 20.0])
    slow = finished_run("timm-mse", 0, [0.3, 0.5, 0.6], [0.0, 20.0, 40.0])
    rows = {row["name"]: row for row in main_rows({"runs": [fast, slow]})}
    assert rows["ours"]["knn_at_equal_time"][1] == pytest.approx(0.7)
    assert rows["timm-mse"]["knn_at_equal_time"][1] == pytest.approx(0.5)
    assert knn_at(slow["curve"], 30.0) == pytest.approx(0.55)


def test_seeds_are_told_as_least_mean_and_most_and_the_ablation_stands_apart():
    runs = [finished_run("ours", seed, [0.3, 0.7 + seed / 10], [0.0, 10.0]) for seed in range(3)]
    content = {"runs": [*runs, finished_run("no patch loss", 0, [0.3, 0.5], [0.0, 5.0], kind="ablation")]}
    untrained, ours, teacher = main_rows(content)
    assert ours["knn"] == pytest.approx([0.7, 0.8, 0.9])
    assert (untrained["seeds"], ours["seeds"], teacher["seeds"]) == (3, 3, 1)
    assert [row["name"] for row in ablation_rows(content)] == ["no patch loss"]


def test_results_of_another_setting_are_refused(tmp_path):
    for name in ("train", "test"):
        (tmp_path / f"{name}.parquet").write_bytes(b"rows")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("train", "test")}
    setting = replace(SETTING, **files)
    results = Results(tmp_path / "learning.json", setting)
    results.add("contender", {k: v for k, v in finished_run("ours", 0, [0.3, 0.7], [0.0, 9.0]).items() if k != "kind"})
    assert Results(tmp_path / "learning.json", setting).has("contender", "ours", 0)
    (tmp_path / "test.parquet").write_bytes(b"more rows")
    with pytest.raises(SystemExit, match="runs of another test, epochs: choose another --out"):
        Results(tmp_path / "learning.json", replace(setting, epochs=4))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_valid_configuration(tmp_path, name):
    flags = write_configs(SETTING, tmp_path, tmp_path / "a", seed=1, epochs=2, variant=VARIANTS[name])
    configs = load_configs(*(Path(path) for path in flags[1::2]))
    assert (configs.train.seed, configs.train.num_epochs, configs.data.shards_per_epoch) == (1, 2, None)
