import gc
import threading
import time

import numpy as np
import pytest
import torch

from distillery.reading.stream import BatchMemory, BatchStream
from distillery.system.errors import RunError

ROW_BYTES = 16


class NumberedRows:
    """Row (shard, nth) is its nth number in every byte. Rows of a shard in `bad` raise, in `stuck` they wait."""

    def __init__(self, bad=(), stuck=(), delays=None):
        self.bad, self.stuck, self.delays = bad, stuck, delays
        self.reading, self.prepared = {}, []
        self.release = threading.Event()

    def fill(self, shards, nth, out, global_idx):
        if set(shards.tolist()) & set(self.bad):
            raise OSError(5, f"shard {shards[0]}")
        if self.delays is not None:
            time.sleep(self.delays.random() / 500)
        if set(shards.tolist()) & set(self.stuck):
            self.reading[threading.get_ident()] = (f"shard {shards[0]}", time.monotonic())
            self.release.wait(20)
        out[:] = (nth % 251)[:, None]
        global_idx[:] = 1000 * shards + nth

    def prepare(self, shards, nth, go_on):
        self.prepared.append((shards.tolist(), nth.tolist()))

    def close(self):
        self.is_closed = True


def plan_of(num_batches, batch_size=6, windows=lambda number: []):
    for number in range(num_batches):
        rows = np.arange(number * batch_size, (number + 1) * batch_size)
        yield (np.full(batch_size, number), rows), windows(number)


def stream_of(rows, num_batches=20, *, batch_size=6, num_threads=2, ahead=3, **options):
    memory = BatchMemory(batch_size * ROW_BYTES)
    plan = plan_of(num_batches, batch_size)
    return BatchStream(plan, rows, memory, row_bytes=ROW_BYTES, num_threads=num_threads, ahead=ahead, **options), memory


@pytest.mark.parametrize("num_threads, ahead", [(1, 1), (2, 4), (5, 2), (9, 30)])
def test_batches_come_whole_and_in_order_however_threads_are_delayed(num_threads, ahead):
    rows = NumberedRows(delays=np.random.default_rng(0))
    stream, _ = stream_of(rows, num_threads=num_threads, ahead=ahead)
    for number, batch in enumerate(stream):
        expected = np.arange(6 * number, 6 * number + 6)
        assert batch.global_idx.tolist() == (1000 * number + expected).tolist()
        assert (batch.memory.view(6, ROW_BYTES) == torch.from_numpy(expected)[:, None]).all()
    assert number == 19


def test_no_more_batches_are_filled_ahead_than_asked_for():
    filled = []
    rows = NumberedRows()
    fill = rows.fill
    rows.fill = lambda shards, *rest: filled.append(int(shards[0])) or fill(shards, *rest)
    stream, _ = stream_of(rows, ahead=3)
    next(stream)
    time.sleep(0.2)
    assert max(filled) == 3
    stream.close()


def test_memory_is_lent_again_only_when_the_last_view_is_gone():
    memory = BatchMemory(64)
    batch = memory.take()
    batch.fill_(1)
    view, array = batch.view(torch.float32)[4:], batch.numpy()[3:5]
    del batch
    gc.collect()
    assert memory.take().data_ptr() != view.data_ptr() - 16
    del view
    memory.take().fill_(9)
    assert array.tolist() == [1, 1]
    assert memory.num_allocated == 2
    del array
    held = [memory.take(), memory.take()]
    assert memory.num_allocated == 2
    assert len({piece.data_ptr() for piece in held}) == 2


def test_memory_keeps_no_more_spare_pieces_than_it_should():
    memory = BatchMemory(64, keep=2)
    held = [memory.take() for _ in range(5)]
    del held
    gc.collect()
    held = [memory.take() for _ in range(5)]
    assert memory.num_allocated == 5 + 3
    del held


def test_an_error_comes_with_its_batch_and_ends_the_threads():
    before = threading.active_count()
    stream, _ = stream_of(NumberedRows(bad=[7]))
    taken = []
    with pytest.raises(OSError, match="shard 7"):
        for batch in stream:
            taken.append(int(batch.shards[0]))
    assert taken == list(range(7))
    assert threading.active_count() == before
    assert list(stream) == []


def test_a_stuck_read_is_an_error_that_names_it():
    rows = NumberedRows(stuck=[4])
    stream, _ = stream_of(rows, stall_s=0.2)
    with pytest.raises(RunError, match="shard 4: a read has not come back for 0 s. The disk or network file system"):
        list(stream)
    rows.release.set()


def test_a_thread_that_dies_is_an_error_not_a_hang(monkeypatch):
    stream, _ = stream_of(NumberedRows())
    next(stream)
    for _ in range(2):
        stream._tasks.put(None)
    with pytest.raises(RunError, match="a reading thread died"):
        list(stream)


def test_windows_are_prepared_in_the_order_of_the_plan():
    rows = NumberedRows()
    window = (np.array([1]), np.array([2]))
    plan = plan_of(4, windows=lambda number: [window] if number in (0, 2) else [])
    stream = BatchStream(plan, rows, BatchMemory(6 * ROW_BYTES), row_bytes=ROW_BYTES, num_threads=1, ahead=1)
    list(stream)
    assert rows.prepared == [([1], [2])] * 2
    assert rows.is_closed


def test_dropping_a_stream_ends_its_threads():
    before = threading.active_count()
    stream, _ = stream_of(NumberedRows())
    next(stream)
    del stream
    gc.collect()
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_torchs_own_number_of_threads_is_left_as_it_was():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        list(stream_of(NumberedRows())[0])
        seen = []
        thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert seen == [torch.get_num_threads()] == [3]
    finally:
        torch.set_num_threads(before)
