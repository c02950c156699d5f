"""What to type next, for messages: the commands with the configuration files and overrides of the present one."""

import argparse
import shlex
from pathlib import Path

_USUAL = {
    "data_config": Path("data_config.yaml"),
    "train_config": Path("train_config_kd.yaml"),
    "model_config": Path("model_config_kd.yaml"),
}
_given: dict[str, str | Path] = {}
_overrides: list[str] = []


def remember_command(arguments: argparse.Namespace) -> None:
    """Let the commands of later messages have this one's configuration files and --set flags."""
    _given.clear()
    _given.update({name: getattr(arguments, name) for name in _USUAL if getattr(arguments, name) is not None})
    _overrides[:] = arguments.overrides


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
