"""Copies of batches to a GPU: their order, their one stream, and the page-locked memory they come from."""

import gc
from typing import NamedTuple

import pytest
import torch
from fake_cuda import FakeCuda

from distillery.reading.loader import DevicePrefetcher
from distillery.reading.stream import BatchMemory

GPU = torch.device("cuda", 3)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda(monkeypatch)
    yield fake
    fake.forget()
    gc.collect()


class Loader:
    """`num` batches of 64 bytes, each full of its number, from page-locked pieces."""

    def __init__(self, num: int) -> None:
        self.num, self.memory, self.filled = num, BatchMemory(64, pinned=True, held=True), []

    def __iter__(self):
        raise AssertionError("the memory of these batches would be used again while it is copied")

    def held_batches(self):
        for number in range(self.num):
            batch = self.memory.take().fill_(number)
            self.filled.append(batch.data_ptr())
            yield (batch,)
            del batch


def test_a_batch_is_copied_ahead_waited_for_and_kept_from_the_copy_stream(cuda):
    batches = iter(DevicePrefetcher(Loader(2), GPU))
    (first,) = next(batches)
    # the event is recorded on the copy stream, the second copy begins before the first batch is handed out
    copied = ["stream", "copy", "record", "stream"]
    assert cuda.names() == [*copied, *copied, "wait", "keep"]
    assert ("wait", 0) in cuda.calls
    assert first.tolist() == [0] * 64
    (second,) = next(batches)
    assert cuda.calls[-2:] == [("wait", 1), ("keep",)] and second.tolist() == [1] * 64


def test_all_epochs_of_a_process_share_one_copy_stream_for_each_gpu(cuda):
    for _ in range(3):
        list(DevicePrefetcher(Loader(2), GPU))
    list(DevicePrefetcher(Loader(1), "cuda"))  # the current one, number 3
    assert cuda.num_streams == 1
    list(DevicePrefetcher(Loader(1), "cuda:1"))
    assert cuda.num_streams == 2


def test_memory_is_not_filled_again_before_the_copy_from_it_is_done(cuda):
    loader, cuda.is_done = Loader(5), False
    assert [batch[0].item() for (batch,) in DevicePrefetcher(loader, GPU)] == [0, 1, 2, 3, 4]
    assert len(set(loader.filled)) == 5
    cuda.is_done = True
    again = Loader(5)
    again.memory = loader.memory
    list(DevicePrefetcher(again, GPU))
    # the last ones of an epoch are given back when the next copy begins
    assert loader.memory.num_allocated <= 6 and set(again.filled) & set(loader.filled)


def test_an_epoch_that_is_left_early_leaves_its_running_copies_their_memory(cuda):
    loader, cuda.is_done = Loader(5), False
    batches = iter(DevicePrefetcher(loader, GPU))
    next(batches)
    batches.close()
    gc.collect()
    fresh = loader.memory.take()
    assert fresh.data_ptr() not in loader.filled


def test_a_few_pieces_serve_a_long_epoch(cuda):
    loader = Loader(200)
    for number, (batch,) in enumerate(DevicePrefetcher(loader, GPU)):
        assert batch.tolist() == [number] * 64
    assert loader.memory.num_allocated == len(set(loader.filled)) <= 4


def test_pieces_are_locked_once_in_their_own_size_and_unlocked_once_when_they_are_gone(cuda):
    memory = BatchMemory(38_535_168, pinned=True, held=True, keep=1)
    pieces = [memory.take(), memory.take()]
    addresses = [piece.data_ptr() for piece in pieces]
    assert cuda.registered == dict.fromkeys(addresses, 38_535_168)
    assert all(address % 4096 == 0 for address in addresses)
    view = pieces[0][:10].numpy()
    del pieces
    gc.collect()
    assert not cuda.unlocked  # one is kept, of the other there is a view
    del view
    gc.collect()
    assert cuda.unlocked == addresses[:1]  # one more than is kept
    assert memory.take().data_ptr() == addresses[1] and memory.num_allocated == 2
    del memory
    gc.collect()
    assert sorted(cuda.unlocked) == sorted(addresses) and not cuda.registered
    assert set(cuda.devices) == {3}  # a thread of its own would lock for GPU 0


def test_memory_that_cannot_be_locked_is_ordinary_memory_and_is_said_once(cuda, capfd, monkeypatch):
    cuda.refuses = True

    def no_memory(*_args, **_options):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", no_memory)
    memory = BatchMemory(64, pinned=True, held=True)
    pieces = [memory.take().fill_(number) for number in range(2)]
    assert [piece[0].item() for piece in pieces] == [0, 1]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "could not be page-locked (CUDA error 2; see ulimit -l): ordinary memory" in lines[0]
    assert not cuda.registered and not cuda.unlocked


def test_where_locking_fails_torchs_own_locked_memory_is_tried_and_used_again(cuda, capfd, monkeypatch):
    cuda.refuses, empty = True, torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, pin_memory, **options: empty(*args, **options))
    memory = BatchMemory(64, pinned=True, held=True)
    address = memory.take().data_ptr()
    assert memory.take().data_ptr() == address and memory.num_allocated == 1
    assert "torch's page-locked memory is used" in capfd.readouterr().err


def test_pinned_batches_for_anybody_come_from_torch_which_waits_for_copies_by_itself(cuda, monkeypatch):
    asked, empty = [], torch.empty

    def pinned_empty(*args, pin_memory, **options):
        asked.append(pin_memory)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", pinned_empty)
    memory = BatchMemory(64, pinned=True)
    for _ in range(2):
        memory.take()
    assert asked == [True, True] and not cuda.registered


class Nested(NamedTuple):
    images: torch.Tensor
    more: tuple[torch.Tensor, ...] | None
    nothing: torch.Tensor | None = None


@pytest.mark.parametrize("device", ["cpu", "cuda:3"])
def test_nested_batches_keep_their_form(cuda, device):
    given = [Nested(torch.ones(2), (torch.zeros(3), torch.ones(1))), Nested(torch.zeros(2), None)]
    found = list(DevicePrefetcher(given, device))
    assert [type(batch) for batch in found] == [Nested, Nested]
    assert torch.equal(found[0].images, given[0].images) and torch.equal(found[0].more[1], given[0].more[1])
    assert found[0].nothing is found[1].more is None
