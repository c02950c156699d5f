"""What this process and the operating system have to say to each other: CPUs, signals, errors, exit status."""

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_TOO_MANY_FAILED = 3
EXIT_INTERRUPTED = 75

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class UserError(ValueError):
    """Wrong usage, configuration or data folder: shown as one message without a traceback, exit status 2."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the configuration names is not there."""


class RunError(RuntimeError):
    """The work cannot go on for a reason outside the program (a full disk, a dead worker): exit status 1."""


class Interrupted(Exception):
    """A signal or time limit asked to stop; everything is saved, the same command goes on."""


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, SLURM_CPUS_PER_TASK and the cgroup's quota, whichever is least."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    granted = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if granted.isdigit() and int(granted) > 0:
        cpus = min(cpus, int(granted))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: affinity and Slurm have said what there is
    return max(1, cpus)


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1 or SIGUSR2 and by a time limit; the work looks at it between two steps.

    A second signal leaves at once with status 75: everything published stays, the work in hand is dropped.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.reason: str | None = None
        self._deadline = time.monotonic() + 60 * max_minutes if max_minutes is not None else math.inf
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the work should save and stop now."""
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = "the time limit"
        return self.reason is not None

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.reason is not None and self.reason != "the time limit":
            os._exit(EXIT_INTERRUPTED)
        self.reason = signal.Signals(number).name
        # os.write: print is not reentrant, and the signal may have come in the middle of one
        os.write(2, f"\n{self.reason}: finishing the work in hand; a second signal leaves at once\n".encode())


def ignore_stop_signals() -> None:
    """For worker processes: Slurm signals the whole group, and the parent decides when its workers end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def run_command(main: Callable[[], Any]) -> Any:
    """Run a command, or a part of one, with the project's exit status; user errors are one message, no traceback.

    Returns:
        What main returned, where that is no exit status (an int); an int ends the process with it.
    """
    try:
        result = main()
    except UserError as error:
        result = _complain(f"error: {error}", EXIT_USAGE)
    except Interrupted as stop:
        result = _complain(str(stop), EXIT_INTERRUPTED)
    except RunError as error:
        result = _complain(f"error: {error}", EXIT_ERROR)
    except KeyboardInterrupt:
        result = EXIT_INTERRUPTED
    except Exception:
        result = _complain(traceback.format_exc().rstrip(), EXIT_ERROR)
    if isinstance(result, int):
        sys.stdout.flush()
        sys.exit(result)
    return result


def _complain(message: str, status: int) -> int:
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    return status
