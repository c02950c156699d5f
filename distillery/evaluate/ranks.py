"""Run work on rank 0 alone; a request to stop on any rank ends it on all ranks."""

from collections.abc import Callable
from typing import Any

from distillery.system.distributed import any_rank, is_main, on_main, world_size
from distillery.system.errors import Interrupted


def end_at_a_stop(is_stopped: Callable[[], bool]) -> None:
    """Raise Interrupted on all ranks once one has a request to stop; all of them call it together."""
    if any_rank(is_stopped())[0]:
        raise Interrupted


def on_main_unless_stopped(work: Callable[[Callable[[], None]], Any], is_stopped: Callable[[], bool]) -> Any:
    """Run work(ask) on rank 0 and return its answer on every rank.

    Args:
        work: calls ask() now and then; the other ranks, which wait, answer it.
        is_stopped: whether this rank has a request to stop.
    Raises:
        Interrupted: on all ranks, where one had a request to stop when rank 0 asked.
    """
    if world_size() == 1:
        return work(lambda: end_at_a_stop(is_stopped))
    answer, error = None, None

    def ask() -> None:
        if any_rank(is_stopped(), False)[0]:
            raise Interrupted

    if is_main():
        try:
            answer = work(ask)
        except Interrupted:  # the others have heard the same
            raise
        except Exception as raised:
            error = raised
        any_rank(False, True)
    else:
        while True:
            has_stop, is_done = any_rank(is_stopped(), False)
            if is_done:
                break
            if has_stop:
                raise Interrupted

    def give() -> Any:
        if error is not None:
            raise error
        return answer

    return on_main(give)
