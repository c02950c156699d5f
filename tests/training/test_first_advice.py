from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from distillery.config.load import load_configs
from distillery.config.sections import FILE_NAMES
from distillery.training import build
from distillery.training.advice import (
    ROSE_UNTIL,
    grid_advice,
    images_of_run,
    passes_advice,
)
from distillery.training.describe import advise
from distillery.training.task import Schedule

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DATA = {"dataset_name": "parquet", "cache_dir": "cache", "image_size": 112}
MODEL = {"teacher_name": "test_vit", "teacher_pretrained": False, "student_name": "test_vit"}
LEAST, MOST = min(ROSE_UNTIL), max(ROSE_UNTIL)


def model(size, grid):
    height, width = (size, size) if isinstance(size, int) else size
    rows, columns = (grid, grid) if isinstance(grid, int) else grid
    return SimpleNamespace(img_size=(height, width), grid=(rows, columns))


def configs_of(*, train=None, model=None, **data):
    train = {"checkpoint_dir": "run", "batch_size": 8, "num_epochs": 2, "max_steps_per_epoch": None} | (train or {})
    return load_configs(DATA | data, train, MODEL | (model or {}))


def first_lines(configs, *, is_new=True):
    teacher, student = build.build_models(configs, CPU)
    task = build.build_task(configs, teacher, student, Schedule(1e-3, 1e-6, 1, 20), True, CPU)
    return teacher.backbone.grid, "\n".join(advise(configs, task, 10, [80], is_new=is_new))


def test_a_student_that_its_source_gives_in_eval_mode_trains(monkeypatch):
    build_usual = build.build_student_backbone
    monkeypatch.setattr(build, "build_student_backbone", lambda *args, **options: build_usual(*args, **options).eval())
    _, student = build.build_models(configs_of(), CPU)
    assert all(module.training for module in student.modules())


# ---- grids ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "teacher, student, expected",
    [
        # a patch of 14 px and one of 16
        (model(224, 16), model(224, 14), "teacher_img_size: 196 gives both models 14x14 ... the teacher 77% of"),
        (model(448, 32), model(448, 28), "teacher_img_size: 392 gives both models 28x28 ... the teacher 77% of"),
        (model(196, 14), model(256, 16), "teacher_img_size: 224 gives both models 16x16 ... the teacher 131% of"),
        # strides of 32
        (model(224, 7), model(256, 8), "teacher_img_size: 256 gives both models 8x8 ... the teacher 131% of"),
        # 225 px end in a cell that is cut off: only the student's grid follows its size
        (model(225, 8), model(224, 7), "student_img_size: 256 gives both models 8x8 ... the student 131% of"),
    ],
)
def test_the_size_at_which_two_unlike_grids_agree_is_named_with_what_it_costs(teacher, student, expected):
    (line,) = grid_advice(teacher, student)
    size, cost = expected.split(" ... ")
    assert line.startswith(f"advice: {size} patch tokens") and cost in line


@pytest.mark.parametrize(
    "teacher, student",
    [
        (model(196, 14), model(224, 14)),  # equal
        (model(224, 16), model(224, 7)),  # not meant to be equal
        (model(225, 8), model(97, 7)),  # neither grid follows from a size
        (model(224, (16, 14)), model(224, (14, 16))),  # no square gives the other's grid
    ],
)
def test_where_no_other_size_would_help_nothing_is_said_of_grids(teacher, student):
    assert grid_advice(teacher, student) == []


def test_a_size_among_the_constructors_arguments_is_named_as_such():
    (line,) = grid_advice(model(224, 16), model(224, 14), {"teacher": {"img_size": 224}})
    assert "advice: teacher_kwargs.img_size: 196 gives" in line


def test_following_the_advice_gives_equal_grids_and_ends_it():
    patches = {"teacher_kwargs": {"patch_size": 14}}
    grid, text = first_lines(configs_of(model=patches))
    assert grid == (8, 8) and "advice: teacher_img_size: 98 gives both models 7x7" in text
    grid, text = first_lines(configs_of(model=patches | {"teacher_img_size": 98}))
    assert grid == (7, 7) and "img_size" not in text and "advice: each of the run's 80 images" in text


@pytest.mark.parametrize(
    "train, is_new",
    [
        ({}, False),  # the run's teacher may not change any more
        ({"distill_loss_weights": {"cls": 1.0}}, True),
    ],
)
def test_a_size_is_advised_only_where_patches_are_compared_and_the_teacher_may_still_change(train, is_new):
    _, text = first_lines(configs_of(train=train, model={"teacher_kwargs": {"patch_size": 14}}), is_new=is_new)
    assert "img_size" not in text


def test_the_default_pair_has_one_grid_with_the_size_that_the_trainer_advises_and_the_examples_have():
    folder = ROOT / "configs" / "imagenet_500k_1gpu"
    shipped = load_configs(*(folder / name for name in FILE_NAMES.values()))
    with torch.device("meta"):
        configs = load_configs(shipped.data.model_dump(), shipped.train.model_dump(),
                               shipped.model.model_dump() | {"teacher_pretrained": False})  # fmt: skip
        teacher, student = build.build_models(configs, torch.device("meta"))
    assert teacher.backbone.img_size == (196, 196)
    assert teacher.backbone.grid == student.student.grid == (14, 14)


# ---- passes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "images, passes, seen, measured",
    [
        (LEAST, 1, "once", LEAST),
        (MOST, 1.4, "1.4 times", MOST),
        (500_000, 6.4, "6.4 times", MOST),
        (80, 2, "2 times", LEAST),
        (round(1.1 * LEAST), ROSE_UNTIL[LEAST] - 1, f"{ROSE_UNTIL[LEAST] - 1} times", LEAST),
    ],
)
def test_a_run_says_how_often_it_sees_each_image_where_more_was_measured_to_pay(images, passes, seen, measured):
    (line,) = passes_advice(images, round(images * passes))
    assert line.startswith(f"advice: each of the run's {images:,} images is seen {seen}. In our measurements of ")
    assert f"of {measured:,} images" in line and f"still rose at {ROSE_UNTIL[measured]} passes" in line


def test_a_run_of_more_passes_than_were_measured_is_told_nothing_of_them():
    for images in (LEAST, MOST, 500_000):
        assert passes_advice(images, 100 * images) == []


@pytest.mark.parametrize(
    "data, epochs, epoch_rows, expected",
    [
        ({"shards_per_epoch": None}, 3, 1000, 1000),
        ({"shards_per_epoch": None}, 3, 64, 192),  # a cap: each epoch goes on where the one before stopped
        ({"shards_per_epoch": 2, "shard_subset_mode": "fixed"}, 50, 192, 200),
        ({"shards_per_epoch": 2, "shard_subset_mode": "cycle"}, 3, 200, 600),
        ({"shards_per_epoch": 2, "shard_subset_mode": "cycle"}, 50, 200, 1000),
        ({"shards_per_epoch": 2, "shard_subset_mode": "independent"}, 50, 200, 1000),
    ],
)
def test_only_images_that_the_run_will_see_count(data, epochs, epoch_rows, expected):
    assert images_of_run(configs_of(**data).data, [100] * 10, epoch_rows, epochs) == expected


def test_shards_that_are_drawn_again_before_all_had_their_turn_count_once():
    data = configs_of(shards_per_epoch=2, shard_subset_mode="independent").data
    assert images_of_run(data, [100] * 10, 200, 5) in range(200, 1000, 100)
