import multiprocessing

import pytest
import torch

from distillery.losses.queue import EmbeddingQueue
from distillery.system import distributed
from distillery.system.errors import UserError

CPU = torch.device("cpu")


def numbered(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)[:, None].expand(-1, 3)


def content(queue: EmbeddingQueue) -> list[float]:
    return sorted(queue.rows[:, 0].tolist())


def test_the_last_rows_are_kept_and_the_oldest_go_first():
    queue = EmbeddingQueue(5, 3, CPU)
    assert queue.rows.shape == (0, 3)
    queue.push(numbered(1, 2))
    assert content(queue) == [1, 2]
    queue.push(numbered(3, 4))
    queue.push(numbered(5, 6))
    assert content(queue) == [2, 3, 4, 5, 6]
    queue.push(numbered(7, 8))
    assert content(queue) == [4, 5, 6, 7, 8]


def test_of_a_batch_larger_than_the_queue_the_last_rows_stay():
    queue = EmbeddingQueue(3, 3, CPU)
    queue.push(numbered(1, 2, 3, 4, 5))
    queue.push(numbered(6))
    assert content(queue) == [4, 5, 6]


def test_rows_that_are_not_finite_go_in_as_zeros_and_low_precision_as_float32():
    queue = EmbeddingQueue(4, 3, CPU)
    queue.push(numbered(float("nan"), float("inf")).bfloat16())
    assert torch.equal(queue.rows, torch.zeros(2, 3)) and queue.rows.dtype == torch.float32


def test_the_state_is_loadable_as_weights_only_and_goes_on_where_it_was(tmp_path):
    first, second = EmbeddingQueue(5, 3, CPU), EmbeddingQueue(5, 3, CPU)
    first.push(numbered(1, 2, 3))
    torch.save(first.state(), tmp_path / "queue.pt")
    second.load_state(torch.load(tmp_path / "queue.pt", weights_only=True))
    for queue in (first, second):
        queue.push(numbered(4, 5, 6))
    assert torch.equal(first.rows, second.rows) and content(second) == [2, 3, 4, 5, 6]


def test_the_state_of_another_size_is_refused():
    with pytest.raises(UserError, match=r"queue is \[5, 3\], this run's \[6, 3\]: put .*queue_size back"):
        EmbeddingQueue(6, 3, CPU).load_state(EmbeddingQueue(5, 3, CPU).state())


def _push_as_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    queue = EmbeddingQueue(5, 3, CPU)
    for step in range(2):
        queue.push(numbered(10 * rank + 2 * step, 10 * rank + 2 * step + 1))
    torch.save(queue.rows, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_every_process_has_the_rows_of_all(tmp_path):
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_push_as_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    assert sorted(first[:, 0].tolist()) == [2, 3, 11, 12, 13] or sorted(first[:, 0].tolist()) == [1, 2, 3, 12, 13]


def test_alone_a_process_has_its_own_rows():
    rows = numbered(1, 2)
    assert distributed.gather_rows(rows) is rows
