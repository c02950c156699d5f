"""Errors that users see, the exit status of each, and the commands that their messages recommend."""

import errno
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
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
_TEMPORARY = re.compile(r"(^|.*/)\.([^/]+)\.tmp-[0-9a-f]{12}$")
_USUAL = {
    "data_config": "data_config.yaml",
    "train_config": "train_config_kd.yaml",
    "model_config": "model_config_kd.yaml",
}
_given: dict[str, str | Path] = {}
_overrides: list[str] = []


class UserError(ValueError):
    """Wrong usage, configuration or data folder: shown as one message without a traceback, exit status 2."""


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the configuration names is not there."""


class RunError(RuntimeError):
    """The work cannot go on for a reason outside the program (a full disk, a dead worker): exit status 1."""


class Interrupted(Exception):
    """A signal or time limit stopped the command; everything is saved, and the same command goes on."""


def run_command(main: Callable[[], Any]) -> Any:
    """Run a command, or a part of one, with the project's exit status; user errors are one message, no traceback.

    Returns:
        What main returned, where that is no exit status (an int); an int ends the process with it.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log file too has each line at once, whatever ends the process
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
        # of a file on its way to its name (files.temporary_name), that name
        name = _TEMPORARY.sub(r"\1\2", str(error.filename or ""))
        where = f"{name}: " if name else ""
        reason = os.strerror(error.errno)
        message = f"error: {where}{reason}. What was saved before stays; mend it, then run the same command again."
    elif isinstance(error, Interrupted | KeyboardInterrupt):
        message = str(error) or "interrupted"
    else:
        message = "".join(traceback.format_exception(error)).rstrip()
    sys.stdout.flush()
    print(prefix + message, file=sys.stderr, flush=True)
    return exit_status_of(error)


def remember_invocation(arguments: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Keep this command's configuration files and --set flags for the commands that messages tell users to type.

    Args:
        arguments: data_config, train_config and model_config, where given; other names are ignored.
        overrides: KEY=VALUE texts.
    """
    _given.clear()
    _given.update({name: arguments[name] for name in _USUAL if arguments.get(name) is not None})
    _overrides[:] = overrides


def stage1_command(*flags: str) -> str:
    """The command that makes and repairs a cache."""
    files = _given or {"data_config": _USUAL["data_config"]}
    if "--teacher" in flags:
        files = _USUAL | files
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    words += [word for override in _overrides for word in ("--set", override)]
    return shlex.join(["python", "precompute_cache.py", *flags, *words])


def teacher_command() -> str:
    """The command that makes and repairs a teacher's outputs."""
    return stage1_command("--teacher")
