"""What to type next, for messages: the commands with the configuration files and overrides of the present one."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_USUAL = {
    "data_config": "data_config.yaml",
    "train_config": "train_config_kd.yaml",
    "model_config": "model_config_kd.yaml",
}
_given: dict[str, str | Path] = {}
_overrides: list[str] = []


def remember_command(arguments: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Let the commands of later messages have this one's configuration files and --set flags.

    Args:
        arguments: data_config, train_config and model_config, where they were given; others are passed over.
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
