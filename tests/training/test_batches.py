"""What a step needs besides images, made by a thread ahead of it."""

import itertools
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from torch import nn

from distillery.losses.registry import LOSSES
from distillery.models.drop_path import StochasticDepth
from distillery.models.views import Augmentation
from distillery.reading.loader import DevicePrefetcher
from distillery.training.batches import SECOND_VIEW, StepLoader, live_batch
from tests.training.test_engine import MEAN, STD

AUGMENT = Augmentation(random_resized_crop=(0.4, 1.0), mean=MEAN, std=STD)
GPU = torch.device("cuda", 3)


def task_of(weights=None, *, rate: float = 0.3, device=GPU, accumulation_steps: int = 1):
    from timm.layers import DropPath

    depth = StochasticDepth(nn.Sequential(nn.Linear(1, 1), DropPath(rate), DropPath(rate)))
    return SimpleNamespace(
        augment=AUGMENT, depth=depth, stored=None, seed=5, loss_weights=weights or {"cls": 1.0}, device=device,
        accumulation_steps=accumulation_steps,
    )  # fmt: skip


class Loader:
    """Five batches of 4; dies before batch number `fails_at`."""

    def __init__(self, fails_at: int | None = None, pin_memory: bool = True) -> None:
        self.fails_at, self.pin_memory = fails_at, pin_memory

    def __iter__(self):
        for number in range(5):
            if number == self.fails_at:
                raise OSError("the disk is gone")
            rows = torch.arange(4 * number, 4 * number + 4)
            yield rows[:, None, None, None].expand(4, 3, 8, 8).float(), rows


def test_a_live_batch_has_its_view_and_its_depth_and_nothing_that_no_loss_asks_for():
    task, rows = task_of(), torch.arange(4)
    batch = live_batch(task, torch.zeros(4, 3, 8, 8), rows, 2)
    assert torch.equal(batch.view, AUGMENT.draw(rows, seed=5, epoch=2))
    assert torch.equal(batch.depth, task.depth.draw(rows, seed=5, epoch=2))
    assert batch.second_view is batch.stored is None
    assert live_batch(task_of(rate=0.0), torch.zeros(4, 3, 8, 8), rows, 2).depth is None


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_second_view_is_drawn_for_the_losses_that_compare_with_one(name):
    rows = torch.arange(4)
    second = live_batch(task_of({name: 1.0}), torch.zeros(4, 3, 8, 8), rows, 2).second_view
    assert (second is not None) == LOSSES[name].second_view
    if second is not None:
        assert torch.equal(second, AUGMENT.draw(rows, seed=5, epoch=2 + SECOND_VIEW))


def test_batches_come_in_order():
    batches = StepLoader(task_of(), Loader(), epoch=1, step=0)
    for number, batch in enumerate(batches):
        assert batch.global_idx.tolist() == list(range(4 * number, 4 * number + 4))
        assert torch.equal(batch.view, AUGMENT.draw(batch.global_idx, seed=5, epoch=1))
    assert number == 4


def threads_of_loaders() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "make-batches"]


def test_an_error_of_the_loader_and_one_of_the_thread_reach_the_training_and_the_thread_ends():
    with pytest.raises(OSError, match="the disk is gone"):
        list(StepLoader(task_of(), Loader(fails_at=3), epoch=0, step=0))
    task = task_of()
    task.augment = SimpleNamespace(draw=lambda *_args, **_options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(StepLoader(task, Loader(), epoch=0, step=0))
    deadline = time.monotonic() + 5
    while threads_of_loaders() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not threads_of_loaders()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(monkeypatch)
    yield fake
    fake.forget()


def test_for_a_gpu_all_but_the_images_lies_in_one_locked_piece_used_in_every_epoch(cuda):
    task = task_of({"cls": 1.0, "barlow": 1.0})
    for epoch in range(3):
        plain = StepLoader(task, Loader(), epoch=epoch, step=0)
        pinned = StepLoader(task, Loader(), epoch=epoch, step=0)
        for batch, expected in zip(pinned.held_batches(), plain, strict=True):
            tensors = {name: getattr(batch, name) for name in ("global_idx", "view", "second_view", "depth")}
            for name, tensor in tensors.items():
                assert torch.equal(tensor, getattr(expected, name)) and tensor.dtype == getattr(expected, name).dtype
                assert tensor.data_ptr() % 64 == 0
            assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
            assert tensors["view"].untyped_storage().data_ptr() in cuda.registered
            assert torch.equal(batch.images, expected.images)
    assert len(cuda.registered) <= 4
    assert set(cuda.devices) == {3}


def test_what_is_copied_to_the_gpu_is_what_was_made_though_pieces_are_used_again(cuda):
    task, given = task_of(), itertools.count()
    for batch in DevicePrefetcher(StepLoader(task, Loader(), epoch=0, step=0), GPU):
        first = 4 * next(given)
        assert batch.global_idx.tolist() == list(range(first, first + 4))
        assert torch.equal(batch.depth, task.depth.draw(batch.global_idx, seed=5, epoch=0))
    assert cuda.registered and next(given) == 5


def test_without_pin_memory_nothing_is_locked(cuda):
    list(DevicePrefetcher(StepLoader(task_of(), Loader(pin_memory=False), epoch=0, step=0), GPU))
    assert not cuda.registered
