"""Training on a compressed cache as a user has it: crops cut while decoding, interrupted, by two processes, or not."""

import signal
from types import SimpleNamespace

import pytest
import torch
from workplace import Workplace, at_call, send

from data_loader import build_pretraining_dataloader
from distillery.models.views import Augmentation
from distillery.training import build, engine
from distillery.training.decoding import DecodingSpeed, decoding_advice, decoding_line, measure_decoding
from distillery.training.estimate import StepSpeed, speed_advice
from tests.test_teacher_trainer import assert_same_run, rows_of, sets_of, start, start_two

JPEG = {"cache_dtype": "jpeg", "stored_size": 36}
# 2 epochs of 5 steps of 2 batches
SETTINGS = JPEG | {
    "num_epochs": 2, "max_steps_per_epoch": 5, "save_every": 2, "log_every": 1, "grad_accumulation_steps": 2,
    "batch_size": 4, "eval_every_epochs": 0, "eval_datasets": "{}", "augment.random_resized_crop": "[0.4, 1.0]",
    "augment.color_jitter": 0.5,
}  # fmt: skip
CUT = "crops: cut out of the stored images while they are decoded"


@pytest.fixture(scope="module")
def place(tmp_path_factory, png_images) -> Workplace:
    """A workplace whose compressed cache and one straight run are made."""
    place = Workplace(tmp_path_factory.mktemp("encoded"), png_images)
    done = place.precompute(*sets_of(JPEG | {"eval_datasets": "{}"}))
    assert done.returncode == 0, done.stderr
    run = start(place, place.folder / "straight", SETTINGS)
    assert run.wait() == 0, run.text
    return place


def test_crops_are_cut_while_decoding_and_the_loss_falls(place):
    text = (place.folder / "straight.log").read_text()
    assert CUT in text and "its rows are decoded when they are read, 1 at a time" in text
    losses = [row["loss"] for row in rows_of(place.folder / "straight", "train")]
    assert len(losses) == 10 and losses[-1] < losses[0]


def test_killed_and_run_again_equals_the_straight_run_bit_for_bit(place, tmp_path):
    run_dir = tmp_path / "run"
    first = start(place, run_dir, SETTINGS, before=lambda: at_call(engine, "train_step", 4, send(signal.SIGKILL)))
    assert first.wait() == -signal.SIGKILL, first.text
    again = start(place, run_dir, SETTINGS)
    assert again.wait() == 0, again.text
    assert_same_run(place.folder / "straight", run_dir)


def test_two_processes_have_the_losses_of_one(place, tmp_path):
    for run in start_two(place, tmp_path / "two", SETTINGS | {"grad_accumulation_steps": 1}):
        assert run.wait() == 0, run.text
    found, expected = rows_of(tmp_path / "two", "train"), rows_of(place.folder / "straight", "train")
    for a, b in zip(found, expected, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_a_dry_run_says_whether_decoding_keeps_up(place, tmp_path):
    run = start(place, tmp_path / "run", SETTINGS, "--dry_run")
    assert run.wait() == 0, run.text
    assert CUT in run.text and "decoding 32 px crops: " in run.text and "images/s a core, 1 threads" in run.text
    assert not (tmp_path / "run").exists()


# ---- the decision, and what is said of the rate --------------------------------------------------------------------


def task_of(**changes):
    augment = Augmentation(
        hflip=True, random_resized_crop=changes.pop("crop", (0.4, 1.0)), mean=(0.5,) * 3, std=(0.2,) * 3
    )
    return SimpleNamespace(**{"augment": augment, "seed": 7, "stored": None, "loss_weights": {"cls": 1.0}} | changes)


@pytest.fixture
def loader(place):
    data = {"cache_dir": str(place.folder / "cache"), "use_cached": True, "num_workers": 1}
    return build_pretraining_dataloader(data, {"batch_size": 8}, with_indices=True, raw=True)


def test_the_loader_is_given_the_boxes_of_the_views_and_the_first_images_are_views_too(loader, monkeypatch):
    task = task_of()
    whole = task.augment
    (line,) = build.crop_while_decoding(loader, task)
    assert line.startswith(CUT)
    idx = torch.arange(9)
    assert torch.equal(loader.crop_boxes(idx, 3), whole.boxes(idx, seed=7, epoch=3))
    assert not task.augment.crops and task.augment.identity() == whole.identity()
    task.device, task.depth, task.to_float = torch.device("cpu"), None, torch.Tensor.float
    batch = build.first_images(loader, task, epoch=1)
    images, global_idx = next(iter(loader))
    assert torch.equal(batch.images, images.float()) and torch.equal(batch.global_idx, global_idx)


@pytest.mark.parametrize("changes, reason", [
    ({"stored": object()}, "stored outputs"), ({"loss_weights": {"cls": 1.0, "relation": 1.0}}, "two views"),
])  # fmt: skip
def test_where_a_step_needs_more_of_an_image_the_loader_gives_whole_ones_and_the_console_says_why(
    loader, changes, reason, monkeypatch
):
    monkeypatch.setattr(build, "needs_second_view", lambda weights: len(weights) == 2)
    (line,) = build.crop_while_decoding(loader, task := task_of(**changes))
    assert reason in line and "whole images of 32 px" in line
    assert loader.crop_boxes is None and task.augment.crops


def test_without_a_crop_or_encoded_rows_nothing_is_said(loader):
    assert build.crop_while_decoding(loader, task_of(crop=None)) == []
    loader.is_encoded = False
    assert build.crop_while_decoding(loader, task_of()) == [] and loader.crop_boxes is None
    assert measure_decoding(loader) is None


def test_the_rate_is_compared_with_the_steps_and_the_advice_has_the_cores_that_would_do(loader):
    speed = DecodingSpeed(1050.0, 16, 224, is_cropped=True)
    text = "decoding 224 px crops: 1,050 images/s a core, 16 threads: at most 16,800; the steps take "
    assert decoding_line(speed, 3000.0) == text + "3,000: decoding keeps up"
    assert decoding_line(speed, 30000.0) == text + "30,000: decoding does not keep up"
    advice = decoding_advice(speed, 30000.0, 0.44, 6.0)
    assert "44% of the time" in advice and "29 cores a process would keep up" in advice
    assert "cache_dtype: uint8, which is not decoded and has 6.0 times the bytes" in advice
    # 8,000 images/s computed, 2,000 read: a slow disk, where 16 cores decode enough
    step = StepSpeed(5, 64, 0.008, 0.0, 0.4, 0.5, 2000.0, 10**9, None, "fp32", decoding=speed)
    (slow_disk,) = speed_advice(step, 1000, 25_000.0, 500, 100)
    assert "reading is slower than computing: some 75%" in slow_disk and "stage_dir" in slow_disk
    measured = measure_decoding(loader)
    assert measured.images_per_core > 0 and (measured.num_cores, measured.image_size) == (1, 32)
