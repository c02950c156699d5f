import json
import sys
import types

import numpy as np
import pytest
import torch

from distillery.system.errors import UserError
from distillery.training.log import RunLog, pack_numbers, plain_value, read_rows, unpack_numbers


def open_log(run_dir, *, tensorboard=False, wandb_project=None, is_main=True):
    return RunLog(run_dir, tensorboard=tensorboard, wandb_project=wandb_project, is_main=is_main)


def write_run(log, steps):
    for step in steps:
        log.write("train", step=step, epoch=step // 10, loss=1.0 / step)
        if step % 10 == 0:
            log.write("eval", step=step, epoch=step // 10, dataset="digits", model="student", knn_top1=step / 100)


def without_time(rows):
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_row_is_readable_as_soon_as_it_is_written(tmp_path):
    log = open_log(tmp_path)
    log.write("train", step=1, epoch=0, loss=0.5)
    (row,) = read_rows(log.path)
    assert list(row) == ["kind", "step", "epoch", "loss", "time"]
    assert without_time([row]) == [{"kind": "train", "step": 1, "epoch": 0, "loss": 0.5}]


def test_what_is_not_a_number_is_valid_json_all_the_same(tmp_path):
    log = open_log(tmp_path)
    log.write("train", step=1, loss=float("nan"), grad_norm=torch.tensor(float("inf")), lr=np.float32(0.5))
    text = log.path.read_text()
    assert "NaN" not in text and "Infinity" not in text
    row = json.loads(text)
    assert row["loss"] is None and row["grad_norm"] is None and row["lr"] == 0.5


@pytest.mark.parametrize(
    "value, plain",
    [
        (torch.tensor(2), 2),
        (torch.tensor([1.0, float("nan")]), [1.0, None]),
        (np.int64(3), 3),
        ({"a": (1, float("-inf"))}, {"a": [1, None]}),
        ("text", "text"),
        (None, None),
        (True, True),
    ],
)
def test_values_become_plain(value, plain):
    assert plain_value(value) == plain


def test_a_time_that_is_given_is_kept(tmp_path):
    log = open_log(tmp_path)
    log.write("train", step=1, time=12.5)
    assert read_rows(log.path)[0]["time"] == 12.5


@pytest.mark.parametrize("checkpoint", [1, 9, 10, 15, 20])
def test_an_interrupted_and_resumed_log_holds_every_row_once(tmp_path, checkpoint):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    for folder in (straight, resumed):
        folder.mkdir()
    write_run(open_log(straight), range(1, 31))
    write_run(open_log(resumed), range(1, 24))  # killed at step 23, long after the checkpoint
    log = open_log(resumed)
    log.truncate_after(checkpoint)
    write_run(log, range(checkpoint + 1, 31))
    rows = read_rows(resumed / "metrics.jsonl")
    (resume,) = (r for r in rows if r["kind"] == "resume")
    assert (resume["step"], resume["lost_steps"]) == (checkpoint, 23 - checkpoint)
    assert resume["stopped"] <= resume["time"]
    assert without_time([r for r in rows if r["kind"] != "resume"]) == without_time(
        read_rows(straight / "metrics.jsonl")
    )


def test_what_happened_to_the_run_is_not_dropped_with_the_rows(tmp_path):
    log = open_log(tmp_path)
    write_run(log, range(1, 8))
    log.truncate_after(6)
    log.truncate_after(4)  # the checkpoint of step 6 turned out to be damaged
    assert [(r["kind"], r["step"]) for r in read_rows(log.path)][-2:] == [("resume", 6), ("resume", 4)]


def test_kept_rows_stay_byte_for_byte_and_nothing_else_is_left_in_the_folder(tmp_path):
    path = tmp_path / "metrics.jsonl"
    odd_but_valid = b'{"step":1,  "kind":"train", "loss":1e-3}\n'
    path.write_bytes(odd_but_valid + b'{"kind": "train", "step": 5}\n')
    open_log(tmp_path).truncate_after(1)
    assert path.read_bytes().startswith(odd_but_valid)
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("checkpoint", [0, 4, 5, 6, 9, 10])
def test_an_epoch_has_one_row_however_often_the_run_was_interrupted(tmp_path, checkpoint):
    def train(log, start, stop):
        for step in range(start, stop):  # epochs of 5 steps
            log.write_epoch(step // 5, step // 5 * 5, shards=[step // 5])
            log.write("train", step=step + 1, epoch=step // 5)

    train(open_log(tmp_path), 0, 11)
    for _ in range(2):
        log = open_log(tmp_path)
        log.truncate_after(checkpoint)
        train(log, checkpoint, 15)
    rows = [row for row in read_rows(log.path) if row["kind"] == "epoch"]
    assert without_time(rows) == [
        {"kind": "epoch", "epoch": epoch, "step": 5 * epoch, "shards": [epoch]} for epoch in range(3)
    ]


def test_an_epoch_that_begins_again_on_other_shards_replaces_its_row(tmp_path):
    log = open_log(tmp_path)
    log.write_epoch(1, 5, shards=[0])
    log.truncate_after(5)
    log.write_epoch(1, 5, shards=[3])
    assert [row["shards"] for row in read_rows(log.path) if row["kind"] == "epoch"] == [[3]]


def test_the_same_end_is_said_once(tmp_path):
    log = open_log(tmp_path)
    log.write("train", step=5)
    log.write_end(5, "SIGTERM")
    before = log.path.read_bytes()
    open_log(tmp_path).write_end(5, "SIGTERM")
    assert log.path.read_bytes() == before
    open_log(tmp_path).write_end(5, "done")
    assert [row.get("reason") for row in read_rows(log.path)] == [None, "SIGTERM", "done"]


@pytest.mark.parametrize(
    "numbers, packed",
    [([], []), ([3], [3]), ([1, 2], [1, 2]), ([0, 1, 2, 5, 7, 8, 9, 10], [[0, 2], 5, [7, 10]]), ([4, 6, 8], [4, 6, 8])],
)
def test_packed_numbers_are_short_and_come_back(numbers, packed):
    assert pack_numbers(numbers) == packed
    assert unpack_numbers(packed) == numbers


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped_at_the_resume(tmp_path, cut):
    log = open_log(tmp_path)
    write_run(log, range(1, 6))
    whole = log.path.read_bytes()
    log.path.write_bytes(whole[:-cut])
    assert [r["step"] for r in read_rows(log.path)] == [1, 2, 3, 4]
    again = open_log(tmp_path)
    again.truncate_after(4)
    again.write("train", step=5)
    assert [r["step"] for r in read_rows(log.path)] == [1, 2, 3, 4, 4, 5]
    assert b"\n\n" not in log.path.read_bytes()


def test_a_row_after_a_torn_line_is_not_glued_to_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "tra')
    open_log(tmp_path).write("train", step=2)
    assert [r["step"] for r in read_rows(path)] == [1, 2]


def test_a_new_run_has_no_resume(tmp_path):
    log = open_log(tmp_path)
    log.truncate_after(0)
    assert read_rows(log.path) == []


def test_a_run_without_rows_reads_as_empty(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []


def test_other_ranks_write_nothing(tmp_path):
    log = open_log(tmp_path, tensorboard=True, wandb_project="p", is_main=False)
    log.truncate_after(5)
    log.write("train", step=6, loss=1.0)
    log.write_epoch(0, 0, shards=[1])
    log.write_end(6, "done")
    log.write_image("view", np.zeros((2, 2, 3), np.uint8), 6)
    log.write_histograms({"weight": torch.ones(3)}, 6)
    assert log.best_step({6}) is None
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_the_best_step_is_the_one_with_the_highest_mean_over_data_sets(tmp_path):
    log = open_log(tmp_path)
    steps = {10, 20, 30, 40, 50}
    assert log.best_step(steps) is None
    for step, a, b in ((10, 0.9, 0.1), (20, 0.6, 0.6), (30, 0.5, None)):
        log.write("eval", step=step, dataset="a", model="student", knn_top1=a)
        log.write("eval", step=step, dataset="b", model="student", knn_top1=b)
    log.write("eval", step=0, dataset="a", model="teacher", knn_top1=0.99)
    assert log.best_step(steps) == 20
    # one of the sets is not evaluated any more
    log.write("eval", step=40, dataset="a", model="student", knn_top1=0.7)
    assert log.best_step(steps) == 10
    assert log.best_step({20, 40}) == 40  # the checkpoint of the other is gone
    log.write("eval", step=50, dataset="a", model="student", knn_top1=0.95)
    assert log.best_step(steps) == 50


# TensorBoard


def read_scalars(run_dir):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_dir / "tensorboard"))
    accumulator.Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def test_tensorboard_has_the_numbers_of_the_rows(tmp_path):
    log = open_log(tmp_path, tensorboard=True)
    log.write("train", step=3, epoch=0, loss=0.25, note="text", missing=float("nan"))
    log.write("eval", step=3, epoch=0, dataset="digits", model="teacher", knn_top1=0.5, linear_top1=None)
    log.close()
    scalars = read_scalars(tmp_path)
    assert scalars["train/loss"] == [(3, 0.25)]
    assert scalars["eval/digits/teacher/knn_top1"] == [(3, 0.5)]
    assert set(scalars) == {"train/loss", "train/epoch", "eval/digits/teacher/knn_top1", "eval/digits/teacher/epoch"}


def test_a_resumed_run_has_no_double_steps_in_tensorboard(tmp_path):
    log = open_log(tmp_path, tensorboard=True)
    for step in range(1, 8):
        log.write("train", step=step, loss=1.0)
    log.close()
    log = open_log(tmp_path, tensorboard=True)
    log.truncate_after(4)
    for step in range(5, 10):
        log.write("train", step=step, loss=2.0)
    log.close()
    assert read_scalars(tmp_path)["train/loss"] == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 10)]


def test_without_tensorboard_no_event_file_is_written(tmp_path):
    log = open_log(tmp_path)
    log.write("train", step=1, loss=1.0)
    log.close()
    assert not (tmp_path / "tensorboard").exists()


def test_facts_about_the_run_make_no_curves(tmp_path):
    log = open_log(tmp_path, tensorboard=True)
    log.write("start", step=0, total_steps=40, num_images=640)
    log.write_epoch(0, 0, shards=[1, 2], images=64)
    log.write("train", step=1, loss=1.0)
    log.close()
    assert set(read_scalars(tmp_path)) == {"train/loss"}


def test_tensorboard_shows_images_and_histograms(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = open_log(tmp_path, tensorboard=True)
    log.write_image("input pair", np.full((4, 6, 3), 200, np.uint8), 2)
    log.write_histograms({"weights/stem": torch.arange(10.0)}, 2)
    log.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    (image,) = accumulator.Images("input pair")
    assert (image.step, image.width, image.height) == (2, 6, 4)
    assert accumulator.Histograms("weights/stem")[0].histogram_value.max == 9.0


# Weights & Biases


@pytest.fixture
def fake_wandb(monkeypatch):
    calls = []

    class Run:
        def log(self, values):
            calls.append(("log", values))

        def define_metric(self, name, step_metric):
            calls.append(("define_metric", name, step_metric))

        def finish(self):
            calls.append(("finish",))

    def init(**arguments):
        calls.append(("init", arguments))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return calls


def test_the_wandb_run_keeps_its_id_across_restarts(tmp_path, fake_wandb):
    for _ in range(2):
        log = open_log(tmp_path, wandb_project="distil")
        log.write("train", step=1, loss=0.5)
        log.close()
    first, second = (call[1] for call in fake_wandb if call[0] == "init")
    assert first["id"] == second["id"] and len(first["id"]) == 12
    assert first["project"] == "distil" and first["resume"] == "allow"
    assert ("log", {"train/loss": 0.5, "step": 1}) in fake_wandb
    assert fake_wandb[-1] == ("finish",)


def test_a_missing_wandb_package_is_said_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb is not installed. Run: pip install wandb, or set wandb_project: null"):
        open_log(tmp_path, wandb_project="distil")
