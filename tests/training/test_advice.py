import dataclasses
import math

import pytest

from distillery.config.keys_data import DataConfig
from distillery.config.load import load_configs
from distillery.training import estimate
from distillery.training.estimate import (
    StepSpeed,
    SyntheticLoader,
    coverage_advice,
    schedule_advice,
    speed_advice,
    training_lines,
)
from distillery.training.task import Schedule

NUM_IMAGES = 500_000
CONFIG = {
    "dataset_name": "me/images", "cache_dir": "cache", "checkpoint_dir": "run", "batch_size": 64,
    "eval_datasets": {"pets": {"dataset_name": "me/pets"}}, "augment": {"random_resized_crop": [0.3, 1.0]},
}  # fmt: skip
# 64 x 500 of the images an epoch
SMALL = CONFIG | {"num_epochs": 100, "max_steps_per_epoch": 500, "eval_every_epochs": 10}
WHOLE = CONFIG | {"num_epochs": 10, "max_steps_per_epoch": None, "eval_every_epochs": 1}
SPEED = StepSpeed(
    num_steps=5, images_per_step=64, step_seconds=0.1, wait_fraction=0.0, teacher_fraction=0.6, student_fraction=0.3,
    loader_images=5000.0, memory_bytes=8 * 10**9, memory_total=80 * 10**9, precision="bf16",
)  # fmt: skip


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with much memory, in a job without a limit of time."""
    monkeypatch.setattr(estimate, "memory_left", lambda: 10**12)
    monkeypatch.setattr(estimate, "slurm_seconds_left", lambda: math.inf)


def advice(config=WHOLE, *, num_images=NUM_IMAGES, steps_in_epoch=7812, total_steps=78_120, warmup_steps=2500,
           save_every=100, save_every_minutes=None, speed=SPEED):  # fmt: skip
    sections = [
        {key: value for key, value in config.items() if (key in DataConfig.model_fields) == is_data}
        for is_data in (True, False)
    ]
    configs = load_configs(*sections, {})
    rows = SyntheticLoader(num_images, 2048, 64, 224).valid_rows_per_shard
    lines = [
        *coverage_advice(configs, rows, steps_in_epoch, total_steps),
        *schedule_advice(configs, Schedule(1e-3, 1e-6, warmup_steps, total_steps)),
        *speed_advice(speed, num_images, 150_528, total_steps, save_every, save_every_minutes),
    ]
    return "\n".join(lines)


def lines_of(speed=SPEED, steps_left=78_120):
    return "\n".join(training_lines(speed, steps_left, 7812, checkpoint_bytes=10**9, num_checkpoints=4))


def test_a_good_plan_needs_no_advice():
    assert advice() == ""


def test_a_small_share_of_the_data_is_said_with_the_key_that_makes_it_small():
    text = advice(SMALL, steps_in_epoch=500, total_steps=50_000)
    assert "an epoch is 6.4 % of the data: max_steps_per_epoch: 500 ends it after 32,000 of 500,000 images" in text
    assert "7,812 steps each" in text


def test_few_shards_are_named_when_they_end_the_epoch():
    text = advice(SMALL | {"shards_per_epoch": 15}, steps_in_epoch=480, total_steps=48_000)
    assert "shards_per_epoch: 15 ends it after 30,720 of 500,000" in text


def test_a_run_that_ends_before_it_has_seen_everything_is_told_how_many_epochs_would():
    changes = {"num_epochs": 10, "eval_every_epochs": 5}
    text = advice(SMALL | changes, steps_in_epoch=500, total_steps=5000)
    assert "the run ends when it has seen 64% of the images: num_epochs: 16 is the first that sees all" in text


@pytest.mark.parametrize(
    "keys, changes, expected",
    [
        ({"eval_every_epochs": 11}, {}, "eval_every_epochs: 11 is more than num_epochs: 10"),
        ({"eval_every_epochs": 0}, {}, "eval_every_epochs is 0: nothing but the loss"),
        ({"eval_datasets": {}}, {}, "eval_datasets is empty: nothing but the loss"),
        ({}, {"warmup_steps": 40_000}, "the warm-up takes 40,000 of 78,120 steps"),
        (
            {"augment": {}},
            {"num_images": 64_000},
            "78 times with no other change than a mirror image: set augment.r",
        ),
        ({"augment": {"hflip": False}}, {"num_images": 64_000}, "every image comes 78 times without a change: set"),
        ({}, {"total_steps": 900}, "900 steps are few"),
        ({}, {"speed": dataclasses.replace(SPEED, precision="fp32")}, "precision: fp32 leaves the tensor cores idle"),
        ({}, {"save_every": 30_000}, "save_every: 30000 steps are 50 minutes"),
    ],
)
def test_what_a_careful_colleague_would_say(keys, changes, expected):
    assert expected in advice(WHOLE | keys, **changes)


def test_images_that_come_often_in_other_colours_are_changed_enough():
    assert "every image comes" not in advice(WHOLE | {"augment": {"color_jitter": 0.5}}, num_images=64_000)


def test_checkpoints_by_the_clock_count_as_well():
    assert advice(save_every=30_000, save_every_minutes=10) == ""
    text = advice(save_every=30_000, save_every_minutes=45)
    assert "save_every_minutes: 45 minutes, which a kill -9 would cost" in text


def test_the_machines_memory_and_the_jobs_time_are_compared(monkeypatch):
    monkeypatch.setattr(estimate, "memory_left", lambda: 10**10)
    monkeypatch.setattr(estimate, "slurm_seconds_left", lambda: 3600.0)
    text = advice()
    assert "the images, 75.3 GB, are more than the memory that is free, 10.0 GB" in text
    assert "the disk must give 96.3 MB/s to each process" in text
    assert "this job has 1.0 h left, the run takes some 2.2 h: about 3 jobs" in text


def test_slow_reading_is_said_and_counted_in_the_hours():
    slow = dataclasses.replace(SPEED, loader_images=320.0)
    assert "some 50% of the time would be spent waiting for data" in advice(speed=slow)
    assert slow.lasting_step_seconds == pytest.approx(0.2)
    assert "time: about 4.3 h" in lines_of(slow)


def test_time_that_the_timed_steps_waited_is_not_counted_as_computing():
    assert dataclasses.replace(SPEED, wait_fraction=0.5).computed_images == pytest.approx(1280)


def test_training_lines_tell_speed_hours_memory_and_disk():
    text = lines_of()
    assert "5 steps on images of the run took 0.1 s each, 640 images/s a process; teacher 60%, student 30%" in text
    assert "reading alone gives 5,000 images/s" in text
    assert "time: about 2.2 h for 78,120 steps" in text
    assert "8.0 GB at the most in these steps of the GPU's 80.0 GB" in text
    assert "4 checkpoints of 1.0 GB at the most: 4.0 GB" in text


def test_only_the_steps_left_are_counted():
    text = lines_of(steps_left=120)
    assert "time: about 12 s for 120 steps" in text


def test_without_a_cache_there_is_no_word_on_reading():
    text = lines_of(dataclasses.replace(SPEED, loader_images=None))
    assert "random images" in text
    assert "reading" not in text
