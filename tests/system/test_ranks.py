"""What the ranks tell each other: forked processes that are a group over gloo and train nothing."""

import os
import signal
import socket
import time
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from processes import fork, wait

from distillery.system import distributed


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def start(function: Callable[[int], object], world: int = 2) -> list[int]:
    """Call function(rank) in forked processes of one group; returns their ids."""
    port = free_port()

    def begin(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
        with distributed.process_group(torch.device("cpu")):
            function(rank)

    return [fork(lambda rank=rank: begin(rank)) for rank in range(world)]


def together(function: Callable[[int], object], world: int = 2) -> None:
    """As start; every process must return."""
    assert [wait(child, 30) for child in start(function, world)] == [0] * world


def tree() -> dict:
    """A state with everything that occurs in one: the same at every call."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.BatchNorm2d(4).state_dict()
    values = torch.randn(2, 3, 4, 5, generator=generator)
    return {
        "model": model,
        "kinds": {dtype: values.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.uint8)},
        "numbers": [torch.arange(7), torch.tensor([True, False]), torch.tensor(3), torch.tensor(2.5)],
        "empty": (torch.zeros(0), torch.zeros(3, 0, dtype=torch.int64)),
        "layouts": [values.to(memory_format=torch.channels_last), values[:, 1:2], values.transpose(0, 3), values[::2]],
        "weight": torch.nn.Parameter(values[0]),
        "plain": {"none": None, "bool": True, "int": 3, "float": 0.1, "text": "x", "nested": [{"betas": (0.9, 0.999)}]},
    }


def assert_equal_trees(found, expected) -> None:
    assert type(found) is type(expected) or isinstance(expected, torch.nn.Parameter)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_equal_trees(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal_trees(one, other)
    else:
        assert found == expected


def test_what_rank_0_answers_is_the_same_everywhere_and_none_of_its_tensors_is_pickled():
    def check(rank: int) -> None:
        pickled, send = [], distributed.dist.broadcast_object_list
        distributed.dist.broadcast_object_list = lambda box, **how: (pickled.append(repr(box)), send(box, **how))
        found = distributed.on_main(lambda: ("start", tree(), None))
        assert_equal_trees(found, ("start", tree(), None))
        assert type(found[1]["model"]) is OrderedDict and found[1]["model"]._metadata == tree()["model"]._metadata
        assert found[1]["layouts"][0].is_contiguous(memory_format=torch.channels_last)
        assert pickled and not any("tensor(" in text for text in pickled)

    together(check)


def test_a_lone_tensor_an_error_and_an_empty_answer_are_answers_too():
    def check(rank: int) -> None:
        assert torch.equal(distributed.on_main(lambda: torch.arange(5)), torch.arange(5))
        assert distributed.on_main(lambda: None) is None
        with pytest.raises(ValueError, match="of rank 0"):
            distributed.on_main(lambda: int("x" if rank else "of rank 0"), raise_everywhere=True)

    together(check, world=3)


def test_a_vote_is_of_the_moment_it_was_begun_and_the_same_on_every_rank():
    def check(rank: int) -> None:
        mine = [False, rank == 2]
        for step in range(20):
            vote = distributed.Vote(*(lambda place=place: mine[place] for place in range(2)))
            mine[0] = step == 5 + rank  # after this rank's part of the vote: counts in the next one
            answer = vote.read()
            assert answer == [6 <= step <= 8, True], (step, answer)

    together(check, world=3)


def test_one_process_alone_looks_when_the_answer_is_read():
    flags = [False, False]
    vote = distributed.Vote(lambda: flags[0], lambda: flags[1])
    flags[1] = True
    assert vote.read() == [False, True]


def test_a_vote_may_be_under_way_while_the_ranks_talk_about_other_things():
    def check(rank: int) -> None:
        for step in range(20):
            vote = distributed.Vote(lambda step=step: step % 3 == rank)
            distributed.wait_for_all()
            assert distributed.any_rank(rank == 1, False) == [True, False]
            assert distributed.on_main(lambda step=step: step) == step
            assert vote.read() == [step % 3 < 2]

    together(check)


@pytest.mark.parametrize("asked", ["vote", "barrier"])
def test_a_dead_process_is_noticed_by_a_vote_and_by_a_barrier_within_seconds(asked):
    def check(rank: int) -> None:
        distributed.wait_for_all()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.Vote(lambda: False).read() if asked == "vote" else distributed.wait_for_all()

    survivor, dead = start(check)
    assert wait(dead) == -signal.SIGKILL
    gone = time.monotonic()
    assert wait(survivor, 20) == 1
    assert time.monotonic() - gone < 10


def test_a_flag_on_the_device_is_set_on_all_ranks_when_it_is_on_one():
    def check(rank: int) -> None:
        for chosen in (-1, 0, 1):
            found = distributed.any_rank_on_device(torch.tensor(rank == chosen))
            assert found.dtype == torch.bool and found.item() == (chosen >= 0)

    together(check)
