"""Training on stored teacher outputs, with a cache in memory in the place of the one on disk."""

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from teachers import MODEL, images_plan, live_teacher, make_images, run_pass, teacher_plan
from torch.nn.utils import parameters_to_vector

from distillery.config.keys_train import TrainConfig
from distillery.config.load import load_configs
from distillery.losses.objective import Objective
from distillery.losses.targets import FrozenTeacher, Targets
from distillery.models import configured
from distillery.models.draws import view_of_epoch
from distillery.models.pair import align, resample_tokens
from distillery.models.views import Augmentation
from distillery.precompute import teacher_job
from distillery.reading.datasets import CachedTensorDataset
from distillery.reading.loader import DevicePrefetcher
from distillery.system.errors import RunError, UserError
from distillery.teacher_cache import opening
from distillery.teacher_cache.opening import open_teacher_cache
from distillery.teacher_cache.survey import images_for_training
from distillery.teacher_cache.targets import StoredTargets, check_fields
from distillery.training import build
from distillery.training.batches import StepLoader, live_batch, stored_batch
from distillery.training.engine import check_first_step, forward_losses, train_step
from distillery.training.optimizer import build_optimizer
from distillery.training.task import Position
from tests.training.test_engine import MEAN, STD, build_task, images_of, run_epoch

AUGMENTATION = Augmentation(hflip=True, random_resized_crop=(0.5, 1.0), mean=MEAN, std=STD)
NUM_VIEWS, NUM_IMAGES, VIEW_SEED = 4, 32, 9


class MemoryCache:
    """What TeacherCache gives, of a teacher that is run for every view at the start; stored as float32."""

    directory = Path("teacher/0123456789ab")
    num_views, weights_hash, fingerprint = NUM_VIEWS, "hash", "0123456789ab"

    def __init__(self, teacher: FrozenTeacher, token_grid: tuple[int, int] | None = None, with_tokens: bool = True):
        images, rows = images_of(range(NUM_IMAGES)), torch.arange(NUM_IMAGES)
        self.values = {"pooled": [], "tokens": []} if with_tokens else {"pooled": []}
        with torch.no_grad():
            for view in range(NUM_VIEWS):
                given = teacher.backbone(AUGMENTATION.views(images, rows, view, seed=VIEW_SEED))
                self.values["pooled"].append(given.pooled)
                if with_tokens:
                    tokens = resample_tokens(given.tokens, given.grid, token_grid or given.grid)
                    self.values["tokens"].append(tokens)
        self.grid = (token_grid or given.grid) if with_tokens else None
        self.widths = {field: values[0].shape[-1] for field, values in self.values.items()}
        self.statistics = teacher.statistics_state()
        self.asked: list[tuple[np.ndarray, np.ndarray]] = []

    def read_stored(self, global_idx, view, fields):
        self.asked.append((global_idx, view))
        stacked = {field: torch.stack(self.values[field]) for field in fields}
        return {
            field: values[torch.from_numpy(view), torch.from_numpy(global_idx)] for field, values in stacked.items()
        }

    def decode(self, stored):
        return stored.float()


def train_config(mode: str = "cached", *, live_fraction: float = 0.5, weights=None, **changes) -> TrainConfig:
    block = {"enabled": True, "views": NUM_VIEWS, "mode": mode, "live_fraction": live_fraction, "seed": VIEW_SEED}
    weights = weights or {"cls": 1.0, "patch": 0.5}
    return TrainConfig(teacher_cache=block, distill_loss_weights=weights, seed=3, **changes)


def stored_task(mode: str = "cached", *, token_grid=None, with_tokens=True, config=None, **changes):
    """A task on stored outputs; its cache is task.stored.cache."""
    task = build_task(**changes)
    cache = MemoryCache(task.teacher, token_grid, with_tokens)
    targets = task.teacher
    if mode == "cached":
        targets = Targets(cache.widths, True)
        targets.load_statistics(cache.statistics)
        task.teacher_call, task.teacher = None, targets
    config = config or train_config(mode)
    task.stored = stored = StoredTargets(cache, targets, AUGMENTATION, config)
    task.objective = task.objective_call = Objective(
        task.student, task.loss_weights, stored_losses=stored.loss_weights, grid_at_most=stored.grid
    )
    task.augment, task.accumulation_steps = AUGMENTATION, config.grad_accumulation_steps
    return task


class StoredViews:
    """Draws, for an epoch, the view of each image whose outputs stored steps of that epoch take."""

    apply = AUGMENTATION.apply

    @staticmethod
    def draw(rows, *, seed, epoch):
        return AUGMENTATION.draw_views(
            rows, view_of_epoch(rows, seed=3, epoch=epoch, num_views=NUM_VIEWS), seed=VIEW_SEED
        )


class Loader:
    """Batches of 8 of the 32 images, in order, from number `start` on."""

    def __init__(self, start: int = 0):
        self.start = start

    def __iter__(self):
        for number in range(self.start, 4):
            rows = range(8 * number, 8 * number + 8)
            yield images_of(rows), torch.tensor(rows)


def epoch_of(task, epoch: int, start: int = 0, step: int | None = None):
    first = 4 * epoch + start if step is None else step
    return StepLoader(task, Loader(start), epoch=epoch, step=first)


def test_a_batch_comes_with_the_outputs_of_the_view_that_the_student_sees():
    task = stored_task()
    teacher = build_task().teacher
    for epoch in range(2):
        for batch in epoch_of(task, epoch):
            with torch.no_grad():
                live = teacher(AUGMENTATION.apply(batch.images, batch.view))
            found = task.stored.targets(batch.stored)
            torch.testing.assert_close(found.pooled, live.pooled, atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(found.tokens, live.tokens, atol=1e-4, rtol=1e-3)
            assert found.grid == live.grid


def test_as_many_epochs_as_views_ask_for_each_view_of_each_image_once():
    task = stored_task()
    asked = set()
    for epoch in range(NUM_VIEWS):
        for _ in epoch_of(task, epoch):
            pass
    for global_idx, view in task.stored.cache.asked:
        asked |= set(zip(global_idx.tolist(), view.tolist(), strict=True))
    assert len(asked) == NUM_IMAGES * NUM_VIEWS == sum(len(view) for _, view in task.stored.cache.asked)


def test_the_losses_on_stored_outputs_are_those_of_the_live_teacher_on_the_same_views():
    # the teacher's grid is that of this student: where it is coarser, live steps enlarge it, stored tokens never are
    stored, live = stored_task(student_name="test_resnet"), build_task(student_name="test_resnet")
    live.augment = StoredViews
    for epoch in range(2):
        for batch in epoch_of(stored, epoch):
            found = forward_losses(stored, batch)
            same = live_batch(live, batch.images, batch.global_idx, epoch)
            for name, value in forward_losses(live, same).items():
                torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4)


def test_an_interrupted_epoch_resumed_equals_the_straight_one_bit_for_bit():
    for mode in ("cached", "hybrid"):
        straight, resumed = stored_task(mode), stored_task(mode)
        run_epoch(straight, Position(), epoch_of(straight, 0), steps=4)
        progress = Position()
        run_epoch(resumed, progress, epoch_of(resumed, 0), steps=2)
        run_epoch(resumed, progress, epoch_of(resumed, 0, start=2), steps=4)
        for a, b in zip(straight.student.state_dict().values(), resumed.student.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_steps_of_the_live_teacher_are_a_function_of_the_seed_and_the_step():
    task = stored_task("hybrid", config=train_config("hybrid", live_fraction=0.25))
    live = [task.stored.is_live(step) for step in range(400)]
    assert 66 < sum(live) < 134  # four standard deviations
    again = stored_task("hybrid", config=train_config("hybrid", live_fraction=0.25))
    assert live == [again.stored.is_live(step) for step in range(400)]
    cached = stored_task("cached", config=train_config("cached", live_fraction=0.25))
    assert not any(cached.stored.is_live(step) for step in range(100))


def test_a_live_step_reads_nothing_and_runs_the_teacher_on_a_view_of_its_own():
    task = stored_task("hybrid", config=train_config("hybrid", live_fraction=0.5))
    found = []
    for step, batch in enumerate(epoch_of(task, 0)):
        found.append(batch.stored is None)
        train_step(task, [batch], step, 0)
        if batch.stored is None:
            assert torch.equal(batch.view, AUGMENTATION.draw(batch.global_idx, seed=task.seed, epoch=0))
    live = [task.stored.is_live(step) for step in range(4)]
    assert 0 < sum(live) < 4  # else this seed shows nothing
    assert found == live
    assert len(task.stored.cache.asked) == 4 - sum(live)


def test_the_batches_of_an_accumulated_step_are_all_live_or_all_stored():
    config = train_config("hybrid", grad_accumulation_steps=2)
    task = stored_task("hybrid", config=config)
    found = [batch.stored is None for batch in epoch_of(task, 0, step=10)]
    assert found == [task.stored.is_live(step) for step in (10, 10, 11, 11)]


def test_tokens_on_a_coarser_grid_are_compared_there_and_the_student_is_pooled_by_area():
    task = stored_task(token_grid=(1, 1), student_name="test_vit")
    batch = next(iter(epoch_of(task, 0)))
    outputs = task.student(AUGMENTATION.apply(batch.images, batch.view))
    assert outputs.grid == (2, 2)
    student, teacher = align(outputs, task.stored.targets(batch.stored), task.stored.grid)
    assert student.grid == teacher.grid == (1, 1)
    torch.testing.assert_close(student.tokens, outputs.tokens.mean(1, keepdim=True))
    check_first_step(task, batch)


def test_live_steps_of_a_run_on_coarse_tokens_compare_on_the_coarse_grid_as_well():
    task = stored_task("hybrid", token_grid=(1, 1), config=train_config("hybrid", live_fraction=1.0))
    task.augment = StoredViews
    images, rows = images_of(range(8)), torch.arange(8)
    live = train_step(task, [live_batch(task, images, rows, 0)], 0, 0)
    other = stored_task("hybrid", token_grid=(1, 1))
    found = train_step(other, [stored_batch(other, images, rows, 0)], 0, 0)
    torch.testing.assert_close(found["loss/patch"], live["loss/patch"], atol=1e-4, rtol=1e-3)


def test_the_check_of_the_first_step_looks_at_stored_outputs():
    task = stored_task()
    batch = next(iter(epoch_of(task, 0)))
    check_first_step(task, batch)
    for parameter in task.student.heads["tokens"].parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(UserError, match="loss/patch"):
        check_first_step(task, batch)


def test_a_patch_loss_without_stored_tokens_is_refused_with_the_command():
    cache = MemoryCache(build_task().teacher, with_tokens=False)
    with pytest.raises(UserError, match=r"patch is 0.5 and compares tokens, but teacher.* pooled only.*--teacher"):
        check_fields(cache, train_config(weights={"cls": 1.0, "patch": 0.5}))
    check_fields(cache, train_config(weights={"cls": 1.0, "patch": 0.0}))


def pooled_only_task():
    config = train_config("hybrid", weights={"cls": 1.0, "patch": 0.5})
    return stored_task("hybrid", with_tokens=False, config=config, weights={"cls": 1.0, "patch": 0.5})


def test_in_hybrid_mode_what_is_not_stored_is_compared_in_the_steps_that_run_the_teacher():
    task = pooled_only_task()
    assert task.stored.live_fields == {"tokens"}
    for step, batch in enumerate(epoch_of(task, 0)):
        losses = train_step(task, [batch], step, 0)
        stored_terms = {"loss", "loss/cls", "explained/cls", "grad_norm"}
        live_terms = stored_terms | {"loss/patch", "explained/patch"}
        assert set(losses) == (live_terms if task.stored.is_live(step) else stored_terms)
    assert {task.stored.is_live(step) for step in range(4)} == {True, False}


def test_every_parameter_has_a_gradient_in_every_step_as_distributed_training_wants_it():
    task, seen = pooled_only_task(), set()
    for step, batch in enumerate(epoch_of(task, 0)):
        forward_losses(task, batch)["loss"].backward()
        gradients = [p.grad for p in task.student.parameters() if p.requires_grad]
        assert all(gradient is not None for gradient in gradients)
        patch_head = [p.grad.abs().sum().item() for p in task.student.heads["tokens"].parameters()]
        assert bool(sum(patch_head)) == task.stored.is_live(step)
        seen.add(task.stored.is_live(step))
        task.student.zero_grad(set_to_none=True)
    assert seen == {True, False}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_head_moves_in_those_steps_alone_that_have_a_loss_of_its_outputs(optimizer):
    task, moved = pooled_only_task(), []
    task.optimizer = build_optimizer(task.student, train_config("hybrid", optimizer=optimizer), torch.device("cpu"))
    for epoch in range(2):
        for number, batch in enumerate(epoch_of(task, epoch)):
            heads = {name: parameters_to_vector(head.parameters()) for name, head in task.student.heads.items()}
            train_step(task, [batch], step := 4 * epoch + number, epoch)
            for name, head in task.student.heads.items():
                has_moved = not torch.equal(parameters_to_vector(head.parameters()), heads[name])
                assert has_moved == (name == "pooled" or task.stored.is_live(step)), (step, name)
            moved.append(task.stored.is_live(step))
    # a step without its loss comes after one with it, whose momentum it must not follow
    assert (True, False) in zip(moved, moved[1:], strict=False)


def test_the_first_step_checks_the_losses_of_both_kinds_of_steps():
    task = pooled_only_task()
    batch = stored_batch(task, images_of(range(8)), torch.arange(8), 0)
    check_first_step(task, batch)
    for parameter in task.student.heads["tokens"].parameters():
        torch.nn.init.zeros_(parameter)
    with pytest.raises(UserError, match="loss/patch .* has no gradient into the student"):
        check_first_step(task, batch)


def test_a_run_whose_stored_steps_would_teach_nothing_is_refused():
    cache = MemoryCache(build_task().teacher, with_tokens=False)
    with pytest.raises(UserError, match=r"no loss of distill_loss_weights compares what .* holds \(pooled\)"):
        check_fields(cache, train_config("hybrid", weights={"patch": 0.5}))
    with pytest.raises(UserError, match="layers.*no teacher cache holds: set teacher_cache.mode: hybrid"):
        check_fields(cache, train_config(weights={"cls": 1.0, "layers": 0.5}))
    check_fields(cache, train_config("hybrid", weights={"cls": 1.0, "layers": 0.5}))


def test_a_run_on_the_first_images_of_a_larger_cache_needs_the_outputs_of_these_alone(tmp_path, monkeypatch):
    make_images(images_plan(tmp_path), bad=(17,))
    plan = teacher_plan(images_plan(tmp_path, 20, source_rows=40), live_teacher())
    run_pass(plan, live_teacher())
    monkeypatch.setattr(opening, "wanted_outputs", lambda _configs, _images: plan.spec.configured)
    configs = SimpleNamespace(
        data=SimpleNamespace(cache_path=tmp_path), train=train_config(), model=SimpleNamespace(model_dump=lambda: MODEL)
    )

    def opened(max_samples: int):
        dataset = CachedTensorDataset(tmp_path, max_samples=max_samples)
        loader = SimpleNamespace(shard_names=[], fingerprint="", dataset=dataset)
        return open_teacher_cache(configs, loader, torch.device("cpu"))

    # image 17 cannot be decoded: the first 19 that can are among the first 20
    assert opened(19).directory == plan.directory
    with pytest.raises(UserError, match="no teacher outputs for the images from 20 on"):
        opened(20)
    # so the pass for the first 20 takes one more
    more = images_for_training(plan.images, 20)
    assert more.num_rows == 21
    run_pass(teacher_plan(more, live_teacher()), live_teacher())
    assert opened(20).index["num_samples"] == 21
    assert images_for_training(images_plan(tmp_path), 40).num_rows == 40
    assert images_for_training(images_plan(tmp_path, 16, source_rows=40), None).num_rows == 16


@pytest.mark.parametrize(
    "max_samples, rows", [(6, 6), (7, 7), (8, 9), (14, 15), (15, 18), (17, 20), (30, 33), (37, 40), (39, 40)]
)
def test_the_pass_covers_what_training_takes_where_images_failed_and_the_cache_has_more(
    tmp_path, monkeypatch, max_samples, rows
):
    make_images(images_plan(tmp_path), bad=(7, 15, 16))  # the last of two shards of 8, the first of the third
    monkeypatch.setattr(teacher_job, "build_live_teacher", lambda *_: (live_teacher(), plan.spec))
    monkeypatch.setattr(teacher_job, "forward_flops", lambda _backbone, _size: 0)
    wanted = images_plan(tmp_path, max_samples, source_rows=40)
    plan = teacher_plan(wanted, live_teacher())
    configs = SimpleNamespace(
        data=SimpleNamespace(cache_path=tmp_path, max_samples=max_samples, image_size=8),
        train=train_config(),
        model=SimpleNamespace(teacher_name="tiny", teacher_source="torch_hub", model_dump=lambda: MODEL),
    )
    middle = wanted.num_shards // 2
    for share in (range(middle), range(middle, wanted.num_shards)):
        job = teacher_job.build_teacher_job(configs, wanted, share)
        assert job.plan.images.num_rows == rows
        run_pass(job.plan, live_teacher(), job.shards)
    monkeypatch.setattr(opening, "wanted_outputs", lambda _configs, _images: plan.spec.configured)
    dataset = CachedTensorDataset(tmp_path, max_samples=max_samples)
    loader = SimpleNamespace(shard_names=[], fingerprint="", dataset=dataset)
    cache = open_teacher_cache(configs, loader, torch.device("cpu"))
    assert (cache.index["num_samples"], cache.index["complete"]) == (rows, True)


def test_only_fields_that_a_loss_compares_are_read():
    task = stored_task(config=train_config(weights={"cls": 1.0}), weights={"cls": 1.0})
    assert task.stored.fields == ["pooled"]
    batch = next(iter(epoch_of(task, 0)))
    assert len(batch.stored) == 1
    train_step(task, [batch], 0, 0)


def test_targets_are_read_one_batch_ahead_while_the_batch_before_is_worked_on():
    task = stored_task()
    cache, is_reading = task.stored.cache, threading.Event()
    read = cache.read_stored
    cache.read_stored = lambda *args: is_reading.set() or read(*args)
    batches = iter(epoch_of(task, 0))
    next(batches)
    # nobody has asked for the second batch, and its targets are being read
    is_reading.clear()
    next(batches)
    assert is_reading.wait(timeout=5.0)
    batches.close()


def test_a_loss_on_a_second_view_gets_the_outputs_of_another_stored_view():
    weights = {"cls": 1.0, "barlow": 0.1}
    task = stored_task(config=train_config(weights=weights), weights=weights)
    teacher = build_task().teacher
    for batch in epoch_of(task, 0):
        first = view_of_epoch(batch.global_idx, seed=3, epoch=0, num_views=NUM_VIEWS)
        other = (first + NUM_VIEWS // 2) % NUM_VIEWS
        with torch.no_grad():
            live = teacher(AUGMENTATION.views(batch.images, batch.global_idx, other, seed=VIEW_SEED))
        found = task.stored.second_view(batch.stored)
        torch.testing.assert_close(found.pooled, live.pooled, atol=1e-4, rtol=1e-3)
    losses = train_step(task, [batch], 0, 0)
    assert torch.isfinite(losses["loss/barlow"])


def test_a_loss_on_a_second_view_is_refused_where_only_one_view_is_stored():
    cache = MemoryCache(build_task().teacher)
    cache.num_views = 1
    with pytest.raises(UserError, match="barlow compares two views.*holds 1.*teacher_cache.views"):
        check_fields(cache, train_config(weights={"cls": 1.0, "barlow": 0.1}))


def test_time_spent_reading_counts_as_waiting_for_data():
    task = stored_task()
    read = task.stored.cache.read_stored
    task.stored.cache.read_stored = lambda *args: time.sleep(0.1) or read(*args)
    rows = run_epoch(task, Position(), DevicePrefetcher(epoch_of(task, 0), "cpu"), steps=1)
    assert rows[0]["data_wait_fraction"] * rows[0]["step_seconds"] > 0.05


def test_an_error_while_reading_reaches_the_training():
    task = stored_task()

    def fail(*_args):
        raise UserError("teacher_shard_00003.pt: damaged")

    task.stored.cache.read_stored = fail
    with pytest.raises(UserError, match="teacher_shard_00003.pt"):
        list(epoch_of(task, 0))


def test_a_read_that_does_not_come_back_is_an_error_that_names_the_folder():
    task = stored_task()
    task.stored.cache.read_stored = lambda *_args: time.sleep(5)
    with pytest.raises(RunError, match=r"teacher/0123456789ab: a read has not come back"):
        list(StepLoader(task, Loader(), epoch=0, step=0, stall_s=0.05))


def test_the_reading_thread_ends_with_the_epoch_and_when_it_is_left_early():
    task = stored_task()
    before = threading.active_count()
    list(epoch_of(task, 0))
    batches = iter(epoch_of(task, 1))
    next(batches)
    batches.close()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_reading_targets_leaves_the_number_of_computing_threads_alone():
    task, before = stored_task(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        next(iter(epoch_of(task, 0)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_student_of_a_cached_run_starts_as_that_of_a_live_run_and_no_teacher_is_built(monkeypatch):
    train = {"checkpoint_dir": "none", "teacher_cache": {"enabled": True}}
    model = {"teacher_name": "test_resnet", "teacher_pretrained": False, "student_name": "test_vit",
             "student_kwargs": {"img_size": 32}}  # fmt: skip
    configs = load_configs({"dataset_name": "parquet", "cache_dir": "none", "image_size": 32}, train, model)
    teacher, live = build.build_models(configs, torch.device("cpu"))
    cache = MemoryCache(teacher)
    monkeypatch.setattr(configured, "build_teacher_backbone", None)
    targets, cached = build.build_models(configs, torch.device("cpu"), cache)
    assert targets.widths == teacher.widths
    for a, b in zip(live.state_dict().values(), cached.state_dict().values(), strict=True):
        assert torch.equal(a, b)
