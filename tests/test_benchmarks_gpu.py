import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_checks
from benchmarks.gpu_checks import CURVES, WATCHED, host_waits, largest_difference, watched_copies, worst
from benchmarks.gpu_setup import covered_share, host_milliseconds, milliseconds
from benchmarks.gpu_speed import CheckpointCost, cost_of_checkpoint
from distillery.reading.loader import DeviceCopies

ROOT = Path(__file__).resolve().parents[1]
CUDA = torch.device("cuda", 0)


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def figures(value: object, name: str = "") -> list[float]:
    """All numbers of milliseconds below a part."""
    if isinstance(value, dict):
        return [number for key, inner in value.items() for number in figures(inner, key)]
    return [value] if name.endswith("_ms") else []


def test_the_arithmetic_that_the_documents_compute_with_is_that_of_the_default_pair():
    table = gpu.flops_table()
    numbers = dict(re.findall(r"teacher at (\d+) px: forward ([\d.]+)", table))
    assert numbers.keys() == {"224", "196"}
    for name in ("gpu", "planning"):
        text = (ROOT / "docs" / f"{name}.md").read_text()
        assert all(number in text for number in numbers.values()), name
    assert f"{numbers['196']} GFLOP a forward pass" in (ROOT / "docs" / "scale.md").read_text()


@pytest.mark.slow
def test_the_smoke_run_measures_every_part_and_writes_one_json_and_one_table(tmp_path):
    done = run("--smoke", "--out", str(tmp_path / "gpu.json"), "--dir", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result.keys() >= {"device", "parts"} and result["device"]
    assert set(result["parts"]) == set(gpu.PARTS)
    for name, part in result["parts"].items():
        assert "error" not in part and part["passed"] in (True, None), name
        measured = figures(part)
        assert measured and all(number > 0 for number in measured), name
        assert f"| {name} |" in done.stdout
    rows = {name: row for name, row in result["parts"]["steps"].items() if isinstance(row, dict)}
    assert rows.keys() >= {*gpu.gpu_speed.VARIANTS, gpu.gpu_speed.TIMM}
    assert all(row["step_ms"] > 0 for row in rows.values())
    assert {result["parts"][name]["passed"] for name in ("safety", "numbers", "eval", "ddp")} == {True}
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_without_cuda_it_says_so_in_one_line_and_ends_with_0(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "in_fork", lambda *_arguments: 0)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 0
    assert capsys.readouterr().out.count("\n") == 1


def measured(parts: dict[str, dict]) -> dict:
    return {"device": "a card", "torch": "2", "smoke": False, "parts": parts}


def test_a_part_that_fails_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    def break_off(bench):
        yield "first_ms", 1.0
        raise ValueError("broken on purpose")

    def die(bench):
        yield "first_ms", 2.0
        gpu.os.kill(gpu.os.getpid(), gpu.signal.SIGKILL)

    def hang(bench):
        yield "first_ms", 3.0
        gpu.time.sleep(60)

    parts = {name: gpu.Part(function, 1) for name, function in {"a": break_off, "b": die, "c": hang}.items()}
    parts["d"] = gpu.Part(lambda bench: iter([("x_ms", 4.0)]), 1)
    monkeypatch.setattr(gpu, "PARTS", parts)
    bench = gpu.Bench(tmp_path, True, 0, gpu.time.monotonic() + 8)
    result = gpu.measure(bench, list(parts), tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == result
    found = result["parts"]
    assert found["a"]["error"] == "ValueError: broken on purpose" and found["a"]["first_ms"] == 1.0
    assert found["b"]["error"] == "its process ended with status -9" and found["b"]["first_ms"] == 2.0
    assert found["c"]["error"] == "it took too long and was ended" and found["c"]["first_ms"] == 3.0
    assert found["d"]["x_ms"] == 4.0 and "error" not in found["d"] and found["d"]["passed"] is None
    assert "| a | failed (ValueError: broken on purpose) |" in gpu.markdown(result)


@pytest.mark.parametrize(
    "found, on_cuda, expected",
    [
        ({"default": {"step_ms": 16.0, "share_of_ceiling": 0.6}, "cached": {"step_ms": 9.0}}, True, [True, None, True]),
        ({"default": {"step_ms": 16.0, "share_of_ceiling": 0.4}, gpu.gpu_speed.TIMM: {"step_ms": 15.0}}, True,
         [False, False, None]),
        # a whole run's time says nothing of a step
        ({"default": {"step_ms": 16.0, "share_of_ceiling": 0.6}, gpu.gpu_speed.LIGHTLY: {"step_ms": 15.0}}, True,
         [True, None, None]),
        ({"default": {"step_ms": 16.0, "share_of_ceiling": 0.6}, "cached": {"step_ms": 9.0}}, False, [None] * 3),
        ({}, True, [None] * 3),
    ],
)  # fmt: skip
def test_speed_is_judged_on_cuda_alone_and_only_by_figures_that_are_there(found, on_cuda, expected):
    rows = gpu.check(gpu.PARTS["steps"], found, on_cuda=on_cuda, is_smoke=False)
    assert [row["holds"] for row in rows] == expected


def test_wrong_bytes_and_other_losses_fail_on_a_cpu_too():
    found = {"resume": {"went_on": True, "largest_difference": 1e-9, "tolerance": 0.0},
             "known values": {"wrong_bytes": 3, "copies_held_up": 0}}  # fmt: skip
    rows = gpu.check(gpu.PARTS["safety"], found, on_cuda=False, is_smoke=True)
    assert {row["check"].split(" ")[0]: row["holds"] for row in rows} == {
        "a": True, "its": False, "no": False, "the": None, "copies": None,
    }  # fmt: skip


def test_the_table_names_what_does_not_hold():
    part = {"share_of_time": 0.05, "passed": False, "checks": [{"check": "checkpoints are cheap", "holds": False}]}
    text = gpu.markdown(measured({"save": part}))
    assert "| save | NOT passed | **not so: checkpoints are cheap**; share_of_time 0.05 |" in text


def test_the_table_says_what_was_left_out_and_why():
    text = gpu.markdown(measured({"steps": {"passed": None, "left_out": ["LightlyTrain: not installed"]}}))
    assert text.endswith("steps: LightlyTrain: not installed.")


def test_a_part_for_which_no_time_is_left_is_recorded_so(tmp_path):
    bench = gpu.Bench(tmp_path, True, 0, gpu.time.monotonic())
    found = gpu.measure(bench, ["env"], None)["parts"]["env"]
    assert found["error"] == "no time was left for it" and found["passed"] is None


@pytest.fixture
def pretended_cuda(monkeypatch):
    """A GPU whose clock goes on by 2 ms with every call of what is timed; returns the log of what it was asked for."""
    log = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = 2.0 * log.count("run")

        def elapsed_time(self, later: "Event") -> float:
            assert log[-1] == "synchronize"
            return later.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_device: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", log.append)
    return log


def test_on_cuda_a_time_is_that_between_events_and_the_host_waits_before_and_after_alone(pretended_cuda):
    assert milliseconds(lambda: pretended_cuda.append("run"), CUDA, 3, warmup=2) == 2.0
    assert pretended_cuda == ["run", "run", "synchronize", "run", "run", "run", "synchronize"]


def test_the_hosts_time_is_taken_on_an_idle_device(pretended_cuda):
    assert host_milliseconds(lambda: pretended_cuda.append("run"), CUDA, 2) >= 0
    assert pretended_cuda == ["synchronize", "run", "synchronize", "run", "synchronize"]


@pytest.mark.parametrize("waits", [None, "called a synchronizing CUDA operation"])
def test_a_step_that_waits_for_the_gpu_is_found_and_the_mode_is_put_back(pretended_cuda, waits):
    def step(_group: object) -> None:
        if "error" in pretended_cuda and waits is not None:
            raise RuntimeError(waits)

    trainer = SimpleNamespace(step=step, groups_without_end=lambda: itertools.repeat([]))
    assert host_waits(trainer, CUDA, 2)["waits"] == waits
    modes = [entry for entry in pretended_cuda if entry != "synchronize"]
    assert modes == ["error", "default"]


def test_time_covered_by_kernels_counts_overlaps_once_and_gaps_not_at_all():
    assert covered_share([(0, 4), (2, 6), (8, 10)]) == 0.8
    assert covered_share([(3, 4), (0, 10)]) == 1.0


def test_loss_curves_are_compared_in_means_of_ten_steps():
    assert largest_difference([1.0] * 20, [1.0] * 20) == 0.0
    assert largest_difference([1.0] * 20, [0.0, 2.0] * 5 + [1.1] * 10) == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_is_a_difference_without_end():
    nan, inf = float("nan"), float("inf")
    assert largest_difference([1.0] * 20, [1.0] * 10 + [nan] * 10) == inf
    assert largest_difference([nan] * 10, [nan] * 10) == inf
    assert worst([0.1, nan, 0.2]) == worst([nan, 0.1]) == worst([inf]) == inf


def answer(part: str, text: str, found: dict) -> bool | None:
    """What a part's condition, of which text is the beginning, says of figures on CUDA."""
    rows = gpu.check(gpu.PARTS[part], found, on_cuda=True, is_smoke=False)
    (row,) = (row for row in rows if row["check"].startswith(text))
    return row["holds"]


def without_last(found: dict) -> dict:
    return dict(list(found.items())[:-1])


def test_that_no_step_waits_is_said_only_of_steps_that_were_all_measured():
    found = {name: {"waits": None} for name in WATCHED}
    assert answer("safety", "no step makes", found) is True
    assert answer("safety", "no step makes", without_last(found)) is None
    assert answer("safety", "no step makes", {}) is None
    assert answer("safety", "no step makes", without_last(found) | {"live": {"waits": "a line"}}) is False


def test_loss_curves_agree_only_where_all_of_them_are_there():
    found = {name: {"largest_difference": 0.01} for name in CURVES}
    found["cached"]["largest_difference"] = 0.1
    assert answer("numbers", "loss curves", found) is True
    assert answer("numbers", "loss curves", without_last(found)) is None
    assert answer("numbers", "loss curves", {}) is None
    assert answer("numbers", "loss curves", found | {"bf16": {"largest_difference": 0.1}}) is False
    assert answer("numbers", "loss curves", found | {"bf16": {"largest_difference": float("inf")}}) is False


@pytest.mark.parametrize(
    "cosines, expected",
    [
        ({"pooled": 0.999, "tokens": 0.995}, True),
        ({"pooled": 0.999}, None),
        ({}, None),
        ({"pooled": 0.999, "tokens": float("nan")}, False),
        ({"pooled": float("nan"), "tokens": 0.999}, False),
        ({"tokens": 0.9}, False),
    ],
)
def test_each_cosine_of_the_teacher_must_be_there_and_high(cosines, expected):
    assert answer("numbers", "cosine", {"teacher_cosine": cosines}) is expected


def test_a_pass_is_judged_by_its_share_of_the_bare_teacher_alone():
    assert answer("pass", "over 85 %", {"share_of_bare": 0.9}) is True
    assert answer("pass", "over 85 %", {"busy_share": 0.9}) is None


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("failing", ["", "-m gpu", "tests/gpu", "benchmarks.gpu"])
def test_make_gpu_runs_all_and_fails_in_the_end_where_one_fails(tmp_path, failing):
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "$*" >> {tmp_path}/log\ncase "$*" in *"{failing or "nothing"}"*) exit 3;; esac\n'
    )
    python.chmod(0o755)
    done = subprocess.run(["make", "-o", "install", "gpu", f"BIN={tmp_path}"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode != 0) == bool(failing), done.stdout + done.stderr
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split(" --")[0] for line in log] == [
        "-m pytest -m gpu -rs",
        "-m pytest tests/gpu",
        "-m benchmarks.gpu",
    ]


@pytest.mark.parametrize("write_steps, steps", [(0, 4), (3, 4), (9, 9)])
def test_a_checkpoint_is_timed_until_it_is_written_and_no_save_waits_for_another(monkeypatch, write_steps, steps):
    clock, log, step_s = [0.0], [], 2.0
    checkpoints = SimpleNamespace(last=None)

    def step() -> None:
        log.append("step")
        clock[0] += step_s + 0.5 * (checkpoints.last is None)

    def save() -> None:
        log.append("save")
        clock[0] += 1.0

    def raise_if_failed() -> None:
        if log.count("step") >= max(1, write_steps):
            checkpoints.last = "new"

    checkpoints.raise_if_failed = raise_if_failed
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    found = cost_of_checkpoint(step, save, checkpoints, lambda: log.append("wait"), 4)
    assert log == ["wait", "save", *["step"] * steps, "wait", *["step"] * steps, "wait"]
    slowed = max(1, write_steps)
    assert found == CheckpointCost(steps, 1.0 + 2.0 * steps + 0.5 * slowed, 2.0 * steps, 1.0 + 2.5 * slowed)


def test_pageable_memory_is_seen_where_it_is_handed_to_the_copies(monkeypatch):
    pinned, pageable, begun = torch.ones(2), torch.zeros(2), []
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: tensor is pinned)
    monkeypatch.setattr(DeviceCopies, "begin", lambda _copies, batch: begun.append(batch))
    copies = DeviceCopies.__new__(DeviceCopies)
    with watched_copies() as counts:
        copies.begin((pinned, (None, pinned)))
        assert counts == {"copied": 2, "pageable": 0}
        copies.begin((pinned, pageable))
        assert counts == {"copied": 4, "pageable": 1}
    copies.begin((pageable,))
    assert counts["pageable"] == 1 and len(begun) == 3


def test_that_all_memory_is_pinned_is_said_only_where_copies_were_seen():
    found = {name: {"copied": 9, "pageable": 0} for name in (*WATCHED, "known values")}
    assert answer("safety", "the host's memory", found) is True
    assert answer("safety", "the host's memory", without_last(found)) is None
    assert answer("safety", "the host's memory", found | {"live": {"copied": 0, "pageable": 0}}) is None
    assert answer("safety", "the host's memory", found | {"live": {"copied": 9, "pageable": 1}}) is False


def test_features_are_extracted_in_the_precision_that_is_measured(monkeypatch):
    backbone, asked = object(), []

    def evaluate(model, *folders, precision, **_options):
        asked.append((model, folders, precision))
        return {"knn_top1": 0.5 if precision == "bf16" else 0.75}

    task = SimpleNamespace(teacher=SimpleNamespace(backbone=backbone))
    monkeypatch.setattr(gpu_checks, "Trainer", lambda _configs, _device: SimpleNamespace(task=task))
    monkeypatch.setattr(gpu_checks, "eval_sets", lambda _data: [SimpleNamespace(train="train", test="test")])
    monkeypatch.setattr(gpu_checks, "evaluate_on_folders", evaluate)
    bench = SimpleNamespace(folder=Path("x"), device=lambda: CUDA)
    bench.sizes, bench.configs = SimpleNamespace(labelled=8), lambda **_changes: SimpleNamespace(data=None)
    found = dict(gpu_checks.evaluation(bench))
    assert asked == [(backbone, ("train", "test"), precision) for precision in ("fp32", "fp32", "bf16", "bf16")]
    assert found["knn_difference"] == 0.25
