"""What the ranks tell each other: forked processes that are a group over gloo and train nothing."""

import os
import socket
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
