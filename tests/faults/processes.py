"""Processes that are killed: forked from this one, where everything is imported already, or started afresh."""

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from distillery.precompute import pipeline, pool
from distillery.system.signals import ignore_stop_signals

FINISHED = 0


def fork(function: Callable[[], object], *, own_group: bool = False) -> int:
    """Run `function` in a forked process, which ends with status 0 when it returns and 1 when it raises."""
    if (child := os.fork()) == 0:
        status = 1
        try:
            if own_group:
                os.setpgid(0, 0)
            function()
            status = FINISHED
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    if own_group:
        with contextlib.suppress(OSError):  # the child did it already, and may be gone
            os.setpgid(child, child)
    return child


def wait(child: int, timeout_s: float = 60) -> int:
    """The exit status of a forked process, negative for the signal that ended it."""
    deadline = time.monotonic() + timeout_s
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            kill_group(child)
            raise TimeoutError(f"process {child} still runs after {timeout_s} s")
        time.sleep(0.001)


def kill_group(leader: int) -> None:
    """kill -9 of a process and its whole group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(leader, signal.SIGKILL)


class ForkedPool(pool.Pool):
    """Two decode workers forked from this process: they start in 0.01 s, not in 0.4 s like those of ProcessPool."""

    def __init__(self, row_bytes: int) -> None:
        super().__init__(6, row_bytes)
        self.row_bytes, context = row_bytes, multiprocessing.get_context("fork")
        self.executor = ProcessPoolExecutor(2, context, _start_forked_worker, (self._slots,))

    def _start(self, unit, slot, gap):
        return self.executor.submit(pool._decode_slot, slot, gap, unit, self.row_bytes, None)

    def close(self) -> None:
        """As ProcessPool's."""
        self.executor.shutdown(wait=True, cancel_futures=True)
        self._slots.close()


def _start_forked_worker(slots) -> None:
    pool._slots = slots
    ignore_stop_signals()


def use_forked_workers() -> None:
    """In a process that was forked itself: decode in a ForkedPool from now on."""
    pipeline.decode_pool = lambda _num_workers, plan, _images: ForkedPool(plan.image_bytes)


def members(group: int) -> list[int]:
    """The living processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == group and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def wait_until(condition: Callable[[], object], timeout_s: float = 20) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
