import itertools
import math
import shutil

import pytest
import torch
from workplace import Workplace

from distillery.config.load import load_configs
from distillery.sources import registry
from distillery.sources.hub import HubSplit, NotDownloadedError
from distillery.system.errors import UserError
from distillery.training.estimate import (
    SyntheticLoader,
    checkpoint_bytes,
    measure_loader,
    measure_steps,
    plan_run,
    synthetic_loader,
)
from tests.training.test_engine import build_task


class Batches:
    """A loader of so many batches that is no SyntheticLoader."""

    batch_size, prefetch_batches, is_encoded = 8, 2, False

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return itertools.islice(SyntheticLoader(100, 50, 8, 32), self.count)


def configs_of(tmp_path, **data):
    return load_configs(
        {"dataset_name": "me/images", "cache_dir": str(tmp_path / "cache"), "image_size": 32} | data,
        {"checkpoint_dir": str(tmp_path / "run"), "batch_size": 8, "num_epochs": 3, "max_steps_per_epoch": None},
        {"teacher_name": "test_resnet", "teacher_pretrained": False, "student_name": "test_vit"},
    )


def not_here(num_rows):
    def open_source(**arguments):
        assert arguments["download"] is False
        raise NotDownloadedError(HubSplit("me/images", "parquet", "train", 1, None, num_rows))

    return open_source


def test_the_stand_in_for_a_cache_has_its_counts_and_shapes():
    loader = SyntheticLoader(1000, 300, 8, 32)
    assert loader.valid_rows_per_shard == [300, 300, 300, 100]
    assert len(loader.shard_names) == 4
    images, global_idx = next(iter(loader))
    assert (images.shape, images.dtype, global_idx.tolist()) == ((8, 3, 32, 32), torch.float32, list(range(8)))


def test_a_cache_that_is_there_is_planned_with(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "index.json").write_text("{}")
    assert synthetic_loader(configs_of(tmp_path)) is None
    assert synthetic_loader(configs_of(tmp_path / "none", use_cached=False, shards_per_epoch=None)) is None


@pytest.mark.parametrize("changes, expected", [({}, 5000), ({"max_samples": 700}, 700), ({"max_shards": 2}, 4096)])
def test_before_stage_1_the_plan_counts_images_without_downloading_them(tmp_path, monkeypatch, changes, expected):
    monkeypatch.setattr(registry, "open_source", not_here(5000))
    loader = synthetic_loader(configs_of(tmp_path, **changes))
    assert sum(loader.valid_rows_per_shard) == expected


def test_a_number_of_images_that_nobody_knows_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "open_source", not_here(None))
    with pytest.raises(UserError, match="--set max_samples=N"):
        synthetic_loader(configs_of(tmp_path))


def test_steps_are_timed_and_the_share_of_both_models_is_told():
    task = build_task()
    speed = measure_steps(task, SyntheticLoader(100, 50, 8, 32), epoch=0)
    assert (speed.num_steps, speed.images_per_step) == (5, 8)
    assert 0 < speed.step_seconds < 10
    assert 0 < speed.teacher_fraction + speed.student_fraction <= 1
    assert speed.loader_images is None
    assert speed.memory_bytes > 10**7


def test_a_real_loader_is_timed_by_itself_too():
    speed = measure_steps(build_task(), Batches(6), epoch=0)
    assert 0 < speed.loader_images < math.inf
    assert measure_loader(Batches(1)) > 0


def test_a_loader_that_ends_early_is_enough():
    assert measure_steps(build_task(), Batches(2), epoch=0).num_steps == 1


def test_of_an_epoch_of_one_step_that_step_is_timed():
    speed = measure_steps(build_task(), Batches(1), epoch=0)
    assert speed.num_steps == 1 and speed.teacher_fraction + speed.student_fraction > 0.1


def test_a_plan_counts_whole_shards_and_the_steps_left(tmp_path):
    configs, task = configs_of(tmp_path, shards_per_epoch=1, cache_dtype="uint8"), build_task()
    text = "\n".join(plan_run(configs, task, SyntheticLoader(1000, 300, 8, 32), 37, steps_done=7, epoch=0))
    assert "an epoch is 30 % of the data: shards_per_epoch: 1 ends it after 296 of 1,000 images" in text
    assert "125 steps each" in text and f"for {task.schedule.total_steps - 7} steps" in text
    assert "\nadvice: " in text


def test_a_checkpoint_holds_weights_and_the_moments_of_those_that_are_trained(tmp_path):
    student, train = build_task().student, configs_of(tmp_path).train.model_copy(update={"optimizer": "adamw"})
    weights = sum(value.nbytes for value in student.state_dict().values())
    trained = sum(value.nbytes for value in student.parameters() if value.requires_grad)
    assert checkpoint_bytes(student, train) == weights + 2 * trained > 0
    assert checkpoint_bytes(student, train.model_copy(update={"ema_decay": 0.99})) == 2 * (weights + trained)


def test_the_dry_run_of_stage_2_plans_and_writes_nothing(place, tmp_path):
    mine = Workplace.__new__(Workplace)
    mine.folder = tmp_path / "place"
    shutil.copytree(place.folder, mine.folder)
    before = sorted(mine.folder.rglob("*"))
    new = ["--set", f"checkpoint_dir={tmp_path / 'new'}"]
    done = mine.distill("--dry_run", "--set", f"cache_dir={mine.folder / 'cache'}", *new, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "steps on images of the run took" in done.stdout
    assert "batch_size up to" in done.stdout
    assert "time: about" in done.stdout and "memory:" in done.stdout and "advice:" in done.stdout
    done = mine.distill("--dry_run", "--set", f"cache_dir={tmp_path / 'none'}", *new)
    assert done.returncode == 0, done.stderr
    assert "the plan is for 96 images, on random ones" in done.stdout
    assert "steps on random images took" in done.stdout
    assert sorted(mine.folder.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["place"]
