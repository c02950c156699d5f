"""A compiled step on two ranks: what it learns, and one rank on which compiling fails. Two programs over gloo."""

import functools
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_two_ranks_learn_the_same_compiled_and_go_on_together_where_one_cannot_compile():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    output = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(output)
    assert "torch.compile failed (no compiler on this rank)" in output[1]
    assert "torch.compile failed (on another rank)" in output[0]


def main() -> None:
    """The work of one rank."""
    import pytest
    import torch

    from distillery.system import distributed
    from distillery.training.compilation import compile_now
    from distillery.training.engine import rehearse_step, train_step
    from tests.training.test_compilation import compiled_task, raw_batch

    torch.set_num_threads(1)
    torch.compile = functools.partial(torch.compile, backend="aot_eager")

    def losses_of(task) -> list[float]:
        batches = [raw_batch(task, 2 * step + distributed.rank()) for step in range(3)]
        return [train_step(task, [batch], step, 0)["loss"].item() for step, batch in enumerate(batches)]

    with distributed.process_group(torch.device("cpu")):
        # batch norm: its buffers are shared in every forward pass
        make = functools.partial(compiled_task, student_name="test_resnet")
        expected = losses_of(make(compile=False))
        for settings in ({}, {"gradient_checkpointing": True}):
            task = make(**settings)
            print(line := compile_now(lambda task=task: rehearse_step(task, raw_batch(task, 0))))
            assert "failed" not in line
            assert losses_of(task) == pytest.approx(expected, rel=1e-4)

        task = make()

        def rehearse() -> None:
            if distributed.rank() == 1:
                task.objective_call.register_forward_pre_hook(fails_once)
            rehearse_step(task, raw_batch(task, 0))

        def fails_once(module, _inputs) -> None:
            module._forward_pre_hooks.clear()
            raise RuntimeError("no compiler on this rank")

        print(compile_now(rehearse))
        assert losses_of(task) == pytest.approx(expected, rel=1e-4)


if __name__ == "__main__":
    main()
