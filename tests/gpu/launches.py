"""Count the kernels that a step of a configuration launches: python -m tests.gpu.launches [--set KEY=VALUE ...].

By part of the step and by kind of kernel; a fused or foreach operator counts as one. Without --set: the configuration
as it ships, uncompiled (DINOv2 ViT-B/14 to ViT-S/16, 224 px, batch 64, bf16, the teacher in every step).
"""

if __name__ == "__main__":
    from tests.gpu.preload import restart_with_library

    restart_with_library()

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch

from distillery.training.engine import train_step
from distillery.training.task import Task
from tests.gpu.fake_cuda import FAKE, Watch, pretended_cuda
from tests.gpu.interface import batches_of, make_task, steps_of

# fake tensors have no numbers to compile for: what a compiled step launches is not to be seen here
UNCOMPILED = {"compile": False}
PARTS = ("views", "teacher", "student", "losses", "backward", "optimizer")


def watch_step(overrides: Sequence[str] = ()) -> Watch:
    """What the second step of a run does: its launches by part, its waits; overrides: KEY=VALUE as for --set."""
    watch = Watch()
    with pretended_cuda(watch):
        made = make_task({}, UNCOMPILED, {}, overrides)
        step = steps_of(made.task)[0]
        batches = batches_of(made, step)
        with FAKE, watch, parts_marked(made.task, watch):
            train_step(made.task, batches, step, 0)  # constants go to the device once
            watch.forget()
            watch.part = "views"
            train_step(made.task, batches, step, 0)
    return watch


@contextlib.contextmanager
def parts_marked(task: Task, watch: Watch) -> Iterator[None]:
    """Tell the watch which of PARTS runs, by the calls that a step makes."""
    backward = _between(torch.Tensor.backward, watch, "backward", "optimizer")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.Tensor, "backward", lambda *args, **kw: backward(*args, **kw)))
        calls = [
            (task, "teacher_call", "teacher", "views"),
            (task, "objective_call", "losses", "losses"),
            (task.objective.student, "forward", "student", "losses"),
        ]
        for owner, name, part, after in calls:
            stack.enter_context(mock.patch.object(owner, name, _between(getattr(owner, name), watch, part, after)))
        yield


def _between(call: Callable, watch: Watch, part: str, after: str) -> Callable:
    def marked(*args: Any, **kwargs: Any) -> Any:
        watch.part = part
        try:
            return call(*args, **kwargs)
        finally:
            watch.part = after

    return marked


def table(launches: Counter[tuple[str, str]]) -> str:
    """A line for each kind of kernel, a column for each part of the step, the most frequent kind first."""
    kinds = Counter()
    for (_, kind), count in launches.items():
        kinds[kind] += count
    rows = [["", *PARTS, "all"]]
    for kind, total in kinds.most_common():
        rows.append([kind, *(launches[part, kind] for part in PARTS), total])
    rows.append(["all", *(sum(launches[part, kind] for kind in kinds) for part in PARTS), kinds.total()])
    return "\n".join(f"{row[0]:<14}" + "".join(f"{cell:>11}" for cell in row[1:]) for row in rows)


def main() -> None:
    """Print the table, and where the step makes the host wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    watch = watch_step(parser.parse_args().overrides)
    print(table(watch.launches))
    for problem in (*watch.waits, *watch.mixes):
        print(problem)


if __name__ == "__main__":
    main()
