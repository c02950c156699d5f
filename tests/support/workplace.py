"""A folder in which the two commands work as a user would have them, on small images and models.

Workplace runs them as programs, the trainer in a fork of one that has imported torch. ForkedRun runs the trainer in a
fork of this process, so that faults can be put in its way and many runs interrupted.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from forks import MODULES, run_forked

ROOT = Path(__file__).resolve().parents[2]
HUBCONF = '''
"""A small frozen network as a teacher of 24 channels on an 8 x 8 grid."""
import torch
from torch import nn


class Tiny(nn.Module):
    num_features = 24

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 4, 4), nn.BatchNorm2d(24), nn.ReLU())

    def forward_features(self, x):
        return self.stem(x)

    def forward(self, x):
        return self.forward_features(x).mean((2, 3))


def tiny(pretrained=False):
    generator = torch.random.get_rng_state()
    torch.manual_seed(1)
    model = Tiny()
    torch.random.set_rng_state(generator)
    return model
'''


def run(script: str, *arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(["-m", script] if script.startswith("distillery.") else [str(ROOT / script)])]
    return subprocess.run(
        [*command, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, **options
    )


class Workplace:
    """A folder with a data set, the three YAML files and a teacher, and the commands over them."""

    def __init__(self, folder: Path, images: list[bytes]) -> None:
        self.folder = folder
        (folder / "hub").mkdir(parents=True)
        (folder / "hub" / "hubconf.py").write_text(HUBCONF)
        labels = [number % 8 for number in range(len(images))]
        table = pa.table({"img": [{"bytes": data, "path": None} for data in images], "label": labels})
        pq.write_table(table, folder / "train.parquet", row_group_size=20)
        pq.write_table(table.slice(0, 32), folder / "test.parquet")
        files = {"train": str(folder / "train.parquet"), "test": str(folder / "test.parquet")}
        self.write("data", {
            "dataset_name": "parquet", "data_files": files["train"], "image_size": 32, "cache_shard_size": 24,
            "cache_dir": str(folder / "cache"), "num_workers": 1,
            "eval_datasets": {"small": {"dataset_name": "parquet", "data_files": files, "label_column": "label"}},
        })  # fmt: skip
        self.write("train", {
            "batch_size": 8, "num_epochs": 3, "checkpoint_dir": str(folder / "run"), "eval_every_epochs": 1,
            "log_every": 2, "save_every": 5, "knn_k": 5, "tensorboard": False,
        })  # fmt: skip
        self.write("model", {
            "teacher_name": "tiny", "teacher_source": "torch_hub", "teacher_repo": str(folder / "hub"),
            "student_name": "test_vit", "student_kwargs": {"img_size": 32},
        })  # fmt: skip

    def write(self, name: str, content: dict) -> None:
        (self.folder / f"{name}.yaml").write_text(yaml.safe_dump(content))

    def flags(self, *names: str) -> list[str]:
        return [part for name in names for part in (f"--{name}_config", str(self.folder / f"{name}.yaml"))]

    def precompute(self, *arguments: str) -> subprocess.CompletedProcess:
        return run("precompute_cache.py", *self.flags("data"), *arguments)

    def distill(self, *arguments: str, fresh: bool = False) -> subprocess.CompletedProcess:
        """fresh: in an interpreter of its own, as a user starts it."""
        start = run if fresh else run_forked
        return start("distill_trainer.py", *self.flags("data", "train", "model"), "--device", "cpu", *arguments)

    def rows(self, kind: str, run_dir: str = "run") -> list[dict]:
        lines = (self.folder / run_dir / "metrics.jsonl").read_text().splitlines()
        return [row for row in map(json.loads, lines) if row["kind"] == kind]

    def last_checkpoint(self, run_dir: str = "run") -> dict:
        path = sorted((self.folder / run_dir / "checkpoints").glob("*.pt"))[-1]
        return torch.load(path, weights_only=True)


class ForkedRun:
    """The trainer in a forked process.

    Args:
        arguments: the command line, without the program.
        before: called in the child before it starts, to put faults in its way.
        environment: variables for the child.
        output: file for what it prints.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        *,
        before: Callable[[], None] | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.output = output
        self._status: int | None = None
        # whatever a run imports is there before the fork: most of its seconds would go into that
        for module in MODULES:
            importlib.import_module(module)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.environ.update(environment or {})
                fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(fd, 1)
                os.dup2(fd, 2)
                sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
                status = _train(list(arguments), before)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(status)

    def wait(self, timeout_s: float = 120.0) -> int:
        """The exit status; minus the signal's number for one that a signal ended."""
        deadline = time.monotonic() + timeout_s
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"the run did not end within {timeout_s} s:\n{self.text}")
            time.sleep(0.01)
        return status

    def poll(self) -> int | None:
        """As wait, but None while it runs."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    @property
    def text(self) -> str:
        """What it has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def _train(arguments: list[str], before: Callable[[], None] | None) -> int:
    import distill_trainer
    from distillery.system.errors import run_command

    sys.argv = ["distill_trainer.py", *arguments]
    if before is not None:
        before()
    try:
        run_command(distill_trainer.main)
    except SystemExit as end:
        return end.code
    return 0


def at_call(module: object, name: str, number: int, action: Callable[[], None], *, after: bool = False) -> None:
    """Do something in the number-th call (from 1) of module.name, before it or after it."""
    function, calls = getattr(module, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == number and not after:
            action()
        result = function(*args, **kwargs)
        if calls == number and after:
            action()
        return result

    setattr(module, name, counted)


def send(number: signal.Signals) -> Callable[[], None]:
    """An action: this process sends itself a signal."""
    return lambda: os.kill(os.getpid(), number)


def comparable(row: dict) -> dict:
    """A metrics row without what a clock put in."""
    return {
        k: v
        for k, v in row.items()
        if k not in {"time", "images_per_second", "step_seconds"} and not k.endswith("_fraction")
    }


def assert_same_tensors(a: object, b: object) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_tensors(a[key], b[key])
    elif isinstance(a, list | tuple):
        for one, other in zip(a, b, strict=True):
            assert_same_tensors(one, other)
    else:
        assert a == b
