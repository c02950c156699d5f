"""Signals and time limits that stop a command: sent by Slurm or a terminal, or set by --max_minutes."""

import math
import os
import signal
import stat
import time

from distillery.system.errors import EXIT_INTERRUPTED
from distillery.system.machine import environment_number

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_ECHO_S = 1.0
_BEFORE_SLURM_END_S = 120.0


def slurm_seconds_left() -> float:
    """Seconds until Slurm ends this job by its time limit; infinite where that is not known.

    SLURM_JOB_END_TIME is set by Slurm from 23.02 on, and by the scripts under slurm/ where it is older.
    """
    end = environment_number("SLURM_JOB_END_TIME")
    left = math.inf if end is None else end - time.time()
    return left if left > 0 else math.inf  # a time gone by is left over from another job


class StopFlag:
    """Set by SIGTERM, SIGINT, SIGUSR1, SIGUSR2 or SIGHUP and by a time limit; the work looks at it between two steps.

    SIGHUP is left alone where nohup has it ignored.

    The same signal again, or Ctrl-C, leaves at once with status 75: everything published stays, the work in hand is
    dropped. SIGTERM after SIGUSR1 does not: Slurm warns with the one and ends with the other. Nor does an echo within a
    second: torchrun passes on to its workers what Slurm has sent them already.

    Args:
        max_minutes: time limit, counted from now; Slurm's own end of the job is one as well, two minutes (for short
            jobs a tenth of the time) early.
    """

    def __init__(self, max_minutes: float | None = None) -> None:
        self.reason: str | None = None
        now, left = time.monotonic(), slurm_seconds_left()
        limits = {
            "the time limit": math.inf if max_minutes is None else 60 * max_minutes,
            "the end of the Slurm job": left - min(_BEFORE_SLURM_END_S, left / 10) if left < math.inf else left,
        }
        self._limit, seconds = min(limits.items(), key=lambda limit: limit[1])
        self._deadline = now + seconds
        self._received: dict[int, float] = {}
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        """Whether the work should save and stop now."""
        if self.reason is None and time.monotonic() >= self._deadline:
            self.reason = self._limit
        return self.reason is not None

    def __enter__(self) -> "StopFlag":
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        is_again = number in self._received and now - self._received[number] >= _ECHO_S
        if is_again or (self._received and number == signal.SIGINT):
            os._exit(EXIT_INTERRUPTED)
        if not self._received:
            self.reason = signal.Signals(number).name
            # os.write: print is not reentrant, and the signal may have come in the middle of one
            try:
                os.write(2, f"\n{self.reason}: finishing the work in hand; a second one leaves at once\n".encode())
            except OSError:
                _leave_terminal()
        self._received.setdefault(number, now)


def _leave_terminal() -> None:
    """The terminal is gone: what would be written to it must not be an error of the work that is to be saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in (1, 2):
        if stat.S_ISCHR(os.fstat(fd).st_mode):
            os.dup2(nowhere, fd)


def ignore_stop_signals() -> None:
    """For worker processes: Slurm signals the whole group, and the parent decides when its workers end."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
