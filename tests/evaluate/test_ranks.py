"""Work of rank 0 alone that a request to stop on any rank ends on all: two threads stand for two processes."""

import threading
from collections.abc import Callable

import pytest

from distillery.evaluate import ranks
from distillery.system.errors import Interrupted, UserError


class TwoRanks:
    """Two threads with a rank each, and what they exchange; a wait that nobody answers ends the test."""

    def __init__(self, monkeypatch) -> None:
        self.local, self.meeting = threading.local(), threading.Barrier(2, timeout=20)
        self.flags: dict[int, tuple[bool, ...]] = {}
        self.answer = None
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(ranks, "is_main", lambda: self.local.rank == 0)
        monkeypatch.setattr(ranks, "any_rank", self.any_rank)
        monkeypatch.setattr(ranks, "on_main", self.on_main)

    def any_rank(self, *flags: bool) -> list[bool]:
        self.flags[self.local.rank] = flags
        self.meeting.wait()
        found = [any(of) for of in zip(*self.flags.values(), strict=True)]
        self.meeting.wait()
        return found

    def on_main(self, function: Callable):
        try:
            if self.local.rank == 0:
                self.answer = function()
        except Exception as error:
            self.answer = error
        self.meeting.wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def run(self, work: Callable, stopped: Callable[[int], bool] = lambda _rank: False) -> list:
        outcome: list = [None, None]

        def one(rank: int) -> None:
            self.local.rank = rank
            try:
                outcome[rank] = ranks.on_main_unless_stopped(work, lambda: stopped(rank))
            except Exception as error:
                outcome[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcome


def test_the_answer_of_rank_0_is_that_of_all(monkeypatch):
    asked = []
    two = TwoRanks(monkeypatch)
    assert two.run(lambda ask: [asked.append(ask()) for _ in range(3)] and 7) == [7, 7]
    assert len(asked) == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_to_stop_on_either_ends_both_at_the_next_question(monkeypatch, rank):
    asked = []

    def work(ask):
        while True:
            ask()
            asked.append(1)

    outcome = TwoRanks(monkeypatch).run(work, stopped=lambda r: r == rank and len(asked) >= 2)
    # rank 1 may have answered the third question before rank 0 had counted the second
    assert all(isinstance(error, Interrupted) for error in outcome) and len(asked) in (2, 2 + rank)


def test_an_error_of_rank_0_lets_the_others_go(monkeypatch):
    def work(ask):
        ask()
        raise UserError("no masks")

    assert [str(error) for error in TwoRanks(monkeypatch).run(work)] == ["no masks", "no masks"]


def test_one_process_asks_for_itself(monkeypatch):
    with pytest.raises(Interrupted):
        ranks.on_main_unless_stopped(lambda ask: ask(), lambda: True)
    assert ranks.on_main_unless_stopped(lambda ask: ask() or 5, lambda: False) == 5
