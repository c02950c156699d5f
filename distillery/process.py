"""What this process and the operating system have to say to each other: CPUs, signals, errors, exit status."""

import errno
import math
import os
import re
import signal
import stat
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

# what a disk or folder answers, and no program's fault
_DISK_ERRNOS = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EIO, errno.ESTALE,
}  # fmt: skip
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
_ECHO_S = 1.0
_BEFORE_SLURM_END_S = 120.0


class UserError(ValueError):
    """Wrong usage, configuration or data folder: shown as one message without a traceback, exit status 2."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the configuration names is not there."""


class RunError(RuntimeError):
    """The work cannot go on for a reason outside the program (a full disk, a dead worker): exit status 1."""


class Interrupted(Exception):
    """A signal or time limit asked to stop; everything is saved, the same command goes on."""


def environment_text(name: str) -> str | None:
    """An environment variable without blanks around it; None if it is unset or blank."""
    return os.environ.get(name, "").strip() or None


def environment_number(name: str) -> int | None:
    """An environment variable as a whole number >= 0; None if it is unset, blank or something else ("Unknown", "-3").

    Schedulers leave variables empty or put words into them; no caller may stumble over that.
    """
    text = environment_text(name) or ""
    # not isdigit: it takes characters that int() does not. 18 digits: what fits into 64 bits
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def usable_cpus() -> int:
    """CPUs this process may use: its affinity, SLURM_CPUS_PER_TASK and the cgroup's quota, whichever is least; of
    that its share where torchrun runs several processes on it.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if granted := environment_number("SLURM_CPUS_PER_TASK"):
        cpus = min(cpus, granted)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cpus = min(cpus, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no cgroup v2 here: affinity and Slurm have said what there is
    return max(1, cpus // (environment_number("LOCAL_WORLD_SIZE") or 1))


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


def run_command(main: Callable[[], Any]) -> Any:
    """Run a command, or a part of one, with the project's exit status; user errors are one message, no traceback.

    Returns:
        What main returned, where that is no exit status (an int); an int ends the process with it.
    """
    try:
        result = main()
    except (Exception, KeyboardInterrupt) as error:
        result = report_error(error)
    if isinstance(result, int):
        sys.stdout.flush()
        sys.exit(result)
    return result


def exit_status_of(error: BaseException) -> int:
    """The exit status that an error ends a command with."""
    if isinstance(error, UserError):
        return EXIT_USAGE
    return EXIT_INTERRUPTED if isinstance(error, Interrupted | KeyboardInterrupt) else EXIT_ERROR


def report_error(error: BaseException, prefix: str = "") -> int:
    """Say what ended a command, on standard error; returns its exit status."""
    if isinstance(error, UserError | RunError):
        message = f"error: {error}"
    elif isinstance(error, OSError) and error.errno in _DISK_ERRNOS:
        where = f"{error.filename}: " if error.filename else ""
        reason = os.strerror(error.errno)
        message = f"error: {where}{reason}. What was saved before stays; mend it, then run the same command again."
    elif isinstance(error, Interrupted | KeyboardInterrupt):
        message = str(error) or "interrupted"
    else:
        message = "".join(traceback.format_exception(error)).rstrip()
    sys.stdout.flush()
    print(prefix + message, file=sys.stderr, flush=True)
    return exit_status_of(error)
