import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from teachers import make_teacher_test_cache

from benchmarks import learning, learning_runs
from benchmarks.learning_docs import block_of, markers_of, write_docs
from benchmarks.learning_outputs import TeacherOutputs
from benchmarks.learning_peers import with_fixed_view
from benchmarks.learning_pictures import draw
from benchmarks.learning_results import Results, Setting, check_setting, expected_seconds, runs_of
from benchmarks.learning_runs import Bench, NotYet, configs_of, curve_of
from benchmarks.learning_suites import SUITES, Run, Suite, Variant
from benchmarks.learning_tables import comparable_curves, knn_at, knn_of, table_of
from distillery.config.load import dump_configs, load_configs
from distillery.system.errors import Interrupted, UserError
from distillery.training.advice import ROSE_UNTIL

ROOT = Path(__file__).resolve().parents[1]
SETTING = Setting("train.parquet", "test.parquet", "hub", "big", "small")
MACHINE = {"cpus": 2, "machine": "x86_64", "threads": 1}
FAST, SLOW = Run("ours-live", "ours", 0, 2, 640), Run("timm-feature", "timm-feature", 0, 2, 640)
SUITE = Suite("pair", [FAST, SLOW], equal_time=True, picture="curves")


def finished(run: Run, shares: list[float], seconds: list[float], **other: object) -> dict:
    points = [
        {"epoch": epoch, "images": 640 * epoch, "seconds": at, "knn": share}
        for epoch, (share, at) in enumerate(zip(shares, seconds, strict=True))
    ]
    rows = {
        model: {"knn_top1": share, "linear_top1": share + 0.05}
        for model, share in (("untrained", shares[0]), ("student", shares[-1]), ("teacher", 0.9))
    }
    return {
        "label": run.label, "seed": run.seed, "contender": run.contender, "views": run.views, "images": run.images,
        "epochs": run.epochs, "images_seen": run.images_seen, "student": "small", "recipe": {}, "revision": "abc",
        "setting": {"teacher": "big", "batch_size": 64}, "machine": MACHINE,
        "evaluation": {"bank": 100, "test_images": 50, "knn_k": 20},
        "prepare_seconds": 0.0, "wall_seconds": seconds[-1] + 10, "curve": points, "rows": rows,
    } | other  # fmt: skip


def cells_of(table: str, label: str) -> dict[str, str]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"]
    return dict(zip(lines[0], next(line for line in lines if line[0] == label), strict=True))


@pytest.mark.slow
def test_a_tiny_run_measures_ours_beside_timm_and_keeps_both(tmp_path):
    command = [sys.executable, "-m", "benchmarks.learning", "--tiny", "--suite", "budget4", "--jobs", "2"]
    labels = ["ours-cached-2", "timm-feature"]
    Results(tmp_path / "tiny", "budget4").add(FAST, {"label": "of the last time"})
    done = subprocess.run(
        [*command, "--only", *labels, "--out", str(tmp_path), "--dir", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kept = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("tiny/learning/budget4/*.json"))]
    assert [run["label"] for run in kept] == labels
    for run in kept:
        assert [(point["epoch"], point["images"]) for point in run["curve"]] == [(0, 0), (1, 128)]
        first, last = (point["seconds"] for point in run["curve"])
        assert run["prepare_seconds"] < first < last < run["prepare_seconds"] + run["wall_seconds"]
        assert run["machine"]["threads"] == 1 and run["recipe"]["precision"] == "fp32"
        assert run["curve"][0]["knn"] == kept[0]["curve"][0]["knn"]
        assert (run["prepare_seconds"] > 0) == (run["label"] == "ours-cached-2")
    assert (tmp_path / "tiny" / "learning_budget4.png").read_bytes()[:4] == b"\x89PNG"
    assert "| timm-feature" in done.stdout and "k-NN after" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


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


# ---- tables --------------------------------------------------------------------------------------------------------


def test_equal_time_is_read_between_the_evaluations_when_the_fastest_is_done(tmp_path):
    runs = [finished(FAST, [0.3, 0.6, 0.7], [0.0, 10.0, 20.0]), finished(SLOW, [0.3, 0.5, 0.6], [0.0, 20.0, 40.0])]
    table = table_of(SUITE, runs, {})
    assert cells_of(table, "ours-live")["k-NN after 20 s, %"] == "70.0"
    assert cells_of(table, "timm-feature")["k-NN after 20 s, %"] == "50.0"
    assert knn_at(runs[1]["curve"], 30.0) == pytest.approx(0.55)
    assert "k-NN after" not in table_of(SUITE, runs[:1], {}), "there is nothing to compare with"
    for machine in (MACHINE | {"threads": 2}, MACHINE | {"machine": "arm64"}):
        runs[1]["machine"] = machine
        table = table_of(SUITE, runs, {})
        assert "k-NN after" not in table and "Not compared at equal time" in table


def test_the_picture_shows_the_curves_of_the_suites_length(tmp_path):
    runs = [
        finished(replace(FAST, seed=seed), shares, [10.0 * number for number in range(len(shares))])
        for seed, shares in enumerate([[0.3, 0.6, 0.7], [0.3, 0.6], [0.3, 0.5, 0.6]])
    ]
    assert comparable_curves(SUITE, "ours-live", runs) == [runs[0]["curve"], runs[2]["curve"]]
    assert comparable_curves(SUITE, "a label it had once", runs[:2]) == [runs[1]["curve"]]
    assert draw(SUITE, runs, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert "The picture leaves out 1 of 3 curves of ours-live" in table_of(SUITE, runs, {})


def test_seeds_are_told_as_the_median_with_least_and_most_and_compared_seed_by_seed():
    runs = [replace(FAST, label=label, seed=seed) for label in ("as shipped", "other") for seed in (0, 1, 2)]
    suite = Suite("changes", [*runs, replace(FAST, label="third")], baseline="as shipped")
    shares = [0.70, 0.80, 0.75, 0.71, 0.82, 0.74]
    done = [finished(run, [0.3, share], [0.0, 10.0]) for run, share in zip(runs, shares, strict=True)]
    table = table_of(suite, done, {"fourth": "ImportError: no such package"})
    other = cells_of(table, "other")
    assert (other["seeds"], other["k-NN, %"]) == ("3", "74.0 (71.0 to 82.0)")
    assert other["k-NN against as shipped, same seed"] == "+1.0 (-1.0 to +2.0)"
    assert (cells_of(table, "untrained student")["seeds"], cells_of(table, "teacher")["k-NN, %"]) == ("3", "90.0")
    assert "fourth: left out: ImportError" in table and "Not measured yet, 1 of 7 runs: third." in table


def test_a_table_says_where_runs_of_one_label_have_different_recipes():
    runs = [
        finished(replace(FAST, seed=seed), [0.3, 0.7], [0.0, 9.0], recipe={"min_lr": seed / 10, "augment": {}})
        for seed in (0, 1)
    ]
    assert "The runs of ours-live differ in min_lr." in table_of(SUITE, runs, {})


def test_the_data_suite_has_a_row_and_a_point_for_each_run(tmp_path):
    suite = SUITES["data"]
    runs = [finished(run, [0.3, 0.7], [0.0, 9.0]) for run in suite.runs]
    table = table_of(suite, runs, {})
    assert "Not measured yet, 2 of 12 runs: ours-cached-2 50000 x 4; ours-cached-2 50000 x 20." in table
    row = cells_of(table, "ours-cached-2 12500 x 20")
    assert [row[key] for key in ("images", "passes", "images seen")] == ["12,500", "20", "250,000"]
    assert draw(suite, runs, tmp_path / "a.png") is not None


def test_docs_take_the_table_between_the_markers_and_nothing_else_changes(tmp_path):
    (tmp_path / "results.md").write_text("a\n<!-- learning:pair -->\nold\n<!-- /learning -->\nb\n")
    results = Results(tmp_path, "pair")
    write_docs(SUITE, results, tmp_path)
    assert "-->\nnot measured yet\n<!--" in (tmp_path / "results.md").read_text()
    results.add(FAST, finished(FAST, [0.3, 0.7], [0.0, 9.0]))
    write_docs(SUITE, results, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("a\n") and text.endswith("b\n") and "| ours-live " in text
    assert "(learning_pair.png)" in text and (tmp_path / "learning_pair.png").exists()
    with pytest.raises(UserError, match="has no line <!-- learning:budget4 -->"):
        write_docs(SUITES["budget4"], results, tmp_path)


@pytest.mark.parametrize("name", SUITES)
def test_the_page_of_results_shows_what_is_kept(name):
    page = (ROOT / "docs" / "results.md").read_text()
    shown = markers_of(name).search(page).group()
    assert shown == block_of(SUITES[name], Results(ROOT / "benchmarks" / "results", name)), (
        "run: python -m benchmarks.learning --tables --write_docs"
    )


def test_the_advice_on_passes_is_what_the_kept_results_show():
    stored = [run for run in runs_of(SUITES["data"], ROOT / "benchmarks" / "results") if run["views"] is not None]
    rose = {}
    for images in {run["images"] for run in stored}:
        ends = sorted((run["epochs"], knn_of(run)) for run in stored if run["images"] == images)
        higher = [passes for (_, before), (passes, share) in itertools.pairwise(ends) if share > before]
        rose |= {images: max(higher)} if higher else {}
    assert rose == ROSE_UNTIL


# ---- what is kept, and what is run ---------------------------------------------------------------------------------


def test_processes_that_share_a_folder_keep_each_others_runs(tmp_path):
    first, second = Results(tmp_path, "pair"), Results(tmp_path, "pair")
    first.add(FAST, finished(FAST, [0.3, 0.7], [0.0, 9.0]))
    second.leave_out(SLOW, "no such package")
    assert second.left_out() == {"timm-feature": "no such package"}
    second.add(SLOW, finished(SLOW, [0.3, 0.6], [0.0, 9.0]))
    for results in (first, second):
        assert [run["label"] for run in results.runs()] == ["ours-live", "timm-feature"] and not results.left_out()


def test_a_run_during_which_the_code_changed_keeps_both_revisions(tmp_path, monkeypatch):
    for name in ("train", "test"):
        (tmp_path / name).write_bytes(b"rows")
    setting = replace(SETTING, train=str(tmp_path / "train"), test=str(tmp_path / "test"))
    bench = Bench(setting, tmp_path, tmp_path, "pair", threads=1, revision="abc")
    monkeypatch.setitem(learning_runs.CONTENDERS, "ours", lambda bench, run: {"curve": []})
    for at_the_end, kept in (("abc", "abc"), ("def", "abc..def")):
        monkeypatch.setattr(learning_runs, "revision", lambda at_the_end=at_the_end: at_the_end)
        assert learning_runs.measure(bench, FAST)["revision"] == kept


def test_results_of_another_setting_are_refused_borrowed_ones_too_and_names_do_not_count(tmp_path):
    def setting_in(name: str, *, test: bytes = b"rows", **changes) -> Setting:
        folder = tmp_path / name
        folder.mkdir()
        files = {split: folder / f"{name}_{split}.parquet" for split in ("train", "test")}
        files["train"].write_bytes(b"rows")
        files["test"].write_bytes(test)
        return replace(SETTING, teacher_repo=name, **changes, **{split: str(path) for split, path in files.items()})

    kept = finished(FAST, [0.3, 0.7], [0.0, 9.0], setting=setting_in("here").facts(), suite="pair")
    Results(tmp_path, "pair").add(FAST, kept)
    borrower = Suite("other", [], borrowed={"ours 640 x 2": ("pair", "ours-live", 0)})
    other = setting_in("changed", test=b"more rows", image_size=64).facts()
    for suite in (SUITE, borrower):
        check_setting(suite, tmp_path, setting_in(f"for_{suite.name}").facts())
        with pytest.raises(UserError, match="seed 0.* of another test, image_size. Choose another --out.*pair away"):
            check_setting(suite, tmp_path, other)


def test_a_runs_length_is_expected_by_the_rate_of_its_own_kind_on_such_a_machine():
    kept = [finished(FAST, [0.3, 0.7], [0.0, 118.0]), finished(SLOW, [0.3, 0.7], [0.0, 630.0])]
    assert expected_seconds(replace(FAST, seed=1, epochs=4), kept, MACHINE, "small") == pytest.approx(256.0)
    assert expected_seconds(replace(FAST, label="other", epochs=1), kept, MACHINE, "small") == pytest.approx(64.0)
    assert expected_seconds(FAST, kept, MACHINE, "a ViT") is None
    assert expected_seconds(FAST, kept, MACHINE | {"threads": 2}, "small") is None
    cached = replace(FAST, views=2)
    assert expected_seconds(cached, kept, MACHINE, "small") is None
    kept.append(finished(cached, [0.3, 0.7], [0.0, 54.0], prepare_seconds=12.0))
    assert expected_seconds(cached, kept, MACHINE, "small") == pytest.approx(64.0)
    assert expected_seconds(replace(cached, images=1280), kept, MACHINE, "small", prepares=True) == pytest.approx(152.0)


def test_the_seconds_of_the_teachers_outputs_survive_a_kill_and_end_with_the_outputs(tmp_path):
    plan = make_teacher_test_cache(tmp_path / "cache")
    outputs = TeacherOutputs(tmp_path / "cache", plan.spec.configured, tmp_path / "note.json")
    with pytest.raises(UserError, match="no note says how many seconds they took. Remove that folder"):
        outputs.note()
    last_written = max(path.stat().st_mtime for path in plan.directory.iterdir())
    outputs.write({"seconds": 30.0, "is_done": False, "threads": 1, "began": last_written - 12.0})
    assert outputs.note() == {"seconds": pytest.approx(42.0), "is_done": False, "threads": 1, "began": None}
    assert not outputs.is_done()
    outputs.write(outputs.note() | {"is_done": True})
    assert outputs.is_done()
    other = replace(outputs, identity=outputs.identity | {"images": "others"})
    assert other.folder() is None and outputs.folder() == plan.directory
    shutil.rmtree(plan.directory)
    assert outputs.note()["seconds"] == 0.0 and not outputs.is_done()


def work_off(tmp_path, monkeypatch, runs, *, jobs=1, deadline=None, failing=()) -> tuple[list[str], learning.Queue]:
    """The runs that were done, and the queue afterwards; failing: label -> what it raises."""
    done = []

    def measure(bench, run):
        if run.label in failing:
            raise failing[run.label]
        done.append(run.name)
        return finished(run, [0.3, 0.7], [0.0, 100.0], machine=bench.machine)

    monkeypatch.setattr(learning, "measure", measure)
    bench = Bench(SETTING, tmp_path, tmp_path, "pair", threads=1, revision="abc")
    queue = learning.Queue(bench, Results(tmp_path, "pair"), runs, deadline)
    queue.work_off(jobs)
    return sorted(done), queue


@pytest.mark.parametrize("jobs", [1, 2])
def test_finished_runs_are_never_run_again(tmp_path, monkeypatch, jobs):
    runs = [replace(FAST, seed=seed) for seed in range(6)]
    assert work_off(tmp_path, monkeypatch, runs[:2], jobs=jobs)[0] == ["ours-live_0", "ours-live_1"]
    assert work_off(tmp_path, monkeypatch, runs, jobs=jobs)[0] == [run.name for run in runs[2:]]


def test_no_run_begins_that_would_not_end_in_time_and_what_is_left_is_said(tmp_path, monkeypatch, capsys):
    work_off(tmp_path, monkeypatch, [FAST])
    long, short, unknown = replace(FAST, seed=1, epochs=8), replace(FAST, seed=2), SLOW
    done, _ = work_off(tmp_path, monkeypatch, [long, short, unknown], deadline=time.time() + 180)
    assert done == ["ours-live_2", "timm-feature_0"]
    assert "left: ours-live, seed 1: 3 minutes are left, it takes about 7" in capsys.readouterr().out
    assert work_off(tmp_path, monkeypatch, [long], deadline=time.time() - 1)[0] == []


def test_a_peer_that_cannot_run_is_left_out_and_a_run_of_ours_that_fails_ends_the_command(tmp_path, monkeypatch):
    failing = {"timm-feature": RuntimeError("no such package"), "digits": NotYet("run budget4 first")}
    runs = [SLOW, replace(SLOW, seed=1), Run("digits", "transfer", 0, 0, 0), FAST]
    done, queue = work_off(tmp_path, monkeypatch, runs, failing=failing)
    assert done == ["ours-live_0"] and queue.left_over == ["digits, seed 0: run budget4 first"]
    assert Results(tmp_path, "pair").left_out() == {"timm-feature": "no such package"}
    with pytest.raises(RuntimeError, match="out of memory"):
        work_off(tmp_path, monkeypatch, [replace(FAST, seed=1)], failing={"ours-live": RuntimeError("out of memory")})


def test_an_interrupted_peer_is_no_failed_one_and_nothing_begins_after_it(tmp_path, monkeypatch):
    failing = {"timm-feature": Interrupted("interrupted")}
    with pytest.raises(Interrupted):
        work_off(tmp_path, monkeypatch, [SLOW, FAST], failing=failing)
    results = Results(tmp_path, "pair")
    assert not results.left_out() and not results.runs()


def test_transfer_waits_for_a_result_of_budget4_and_its_run_folder(tmp_path):
    bench = Bench(SETTING, tmp_path / "work", tmp_path / "out", "transfer", threads=1, revision="abc")
    run_dir = tmp_path / "work" / "runs" / "budget4" / "ours-live_1" / "run"
    with pytest.raises(NotYet, match="no result of budget4's ours-live, seed 1; run --suite budget4 first, or name"):
        learning_runs.finished_run(bench, 1)
    run = replace(FAST, seed=1)
    Results(tmp_path / "out", "budget4").add(run, finished(run, [0.3, 0.7], [0.0, 9.0]))
    with pytest.raises(NotYet, match="with another --dir: .*, or name a finished run: --run DIR"):
        learning_runs.finished_run(bench, 1)
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    assert learning_runs.finished_run(bench, 1) == run_dir


def test_a_named_run_is_measured_once_under_its_own_name_teacher_and_seed(tmp_path):
    run_dir = tmp_path / "mine" / "run"
    run_dir.mkdir(parents=True)
    run = replace(FAST, seed=7)
    configs = load_configs(*configs_of(replace(SETTING, teacher="huge"), tmp_path, tmp_path, run).values())
    (run_dir / "config.yaml").write_text(dump_configs(configs))
    (found,) = learning.suite_of_run(run_dir).runs
    assert (found.label, found.contender, found.seed) == ("mine/run on digits", "transfer", 7)
    paths = {name: tmp_path for name in ("train", "test", "teacher_repo")}
    setting = learning.setting_of(SimpleNamespace(run=run_dir, **paths))
    assert (setting.teacher, setting.student) == ("huge", "small")


def test_a_result_keeps_the_learning_rate_that_the_shipped_files_leave_to_the_rule(tmp_path):
    recipe = learning_runs.recipe_of(FAST, configs_of(SETTING, tmp_path, tmp_path, FAST))
    assert recipe["learning_rate"] is None and recipe["base_learning_rate"] > recipe["min_lr"] > 0
    given = replace(FAST, variant=Variant(train={"learning_rate": 4e-3}))
    assert "base_learning_rate" not in learning_runs.recipe_of(given, configs_of(SETTING, tmp_path, tmp_path, given))


def test_a_kept_reason_has_no_folders_of_the_machine(tmp_path):
    reason = "/home/me/venv/bin/python: no lightly_train in '/home/me/venv' (see https://docs.example/install, a/b/c)"
    Results(tmp_path, "pair").leave_out(SLOW, reason)
    assert Results(tmp_path, "pair").left_out() == {
        "timm-feature": "python: no lightly_train in 'venv' (see https://docs.example/install, a/b/c)"
    }


def test_a_kept_result_of_another_recipe_is_named(tmp_path, monkeypatch, capsys):
    Results(tmp_path, "pair").add(FAST, finished(FAST, [0.3, 0.7], [0.0, 9.0], recipe={"weight_decay": 0.5}))
    assert work_off(tmp_path, monkeypatch, [FAST])[0] == []
    assert "ours-live, seed 0: the kept result is of another weight_decay; remove " in capsys.readouterr().out


# ---- the suites ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_every_run_of_a_suite_is_a_valid_configuration_with_a_name_of_its_own(tmp_path, name):
    runs = SUITES[name].runs
    assert len({run.name for run in runs}) == len(runs)
    for run in {run.label: run for run in runs if run.contender == "ours"}.values():
        configs = load_configs(*configs_of(SETTING, tmp_path, tmp_path / "a", run).values())
        assert (configs.train.seed, configs.train.num_epochs, configs.data.shards_per_epoch) == (
            run.seed,
            run.epochs,
            None,
        )
        assert configs.train.teacher_cache.enabled == (run.views is not None)
        assert configs.train.num_epochs % configs.train.eval_every_epochs == 0


def test_the_data_suite_shows_runs_that_another_suite_keeps(tmp_path):
    suite = SUITES["data"]
    assert len(suite.runs) + len(suite.borrowed) <= 12
    for label, (other, its_label, seed) in suite.borrowed.items():
        (run,) = (run for run in SUITES[other].runs if (run.label, run.seed) == (its_label, seed))
        assert label == f"{its_label} {run.images} x {run.epochs}"
        Results(tmp_path, other).add(run, {"label": its_label, "seed": seed, "epochs": run.epochs})
        Results(tmp_path, other).add(replace(run, seed=seed + 1), {"label": its_label, "seed": seed + 1})
    assert {run["label"]: run["epochs"] for run in runs_of(suite, tmp_path)} == {
        "ours-cached-2 50000 x 4": 4,
        "ours-cached-2 50000 x 20": 20,
    }
