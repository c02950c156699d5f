"""SIGTERM, SIGINT, SIGUSR1, SIGUSR2 to the whole process group, as Slurm sends them: status 75, and on it goes."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from processes import kill_group, members, wait_until
from scale import scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache.verify import verify_cache
from distillery.system.errors import EXIT_DONE, EXIT_ERROR, EXIT_INTERRUPTED
from distillery.system.signals import STOP_SIGNALS

TESTS = Path(__file__).resolve().parents[1]
SIGNALS = sorted(STOP_SIGNALS)


class Program:
    """A program in a process group of its own; whatever is left of it is killed in the end."""

    def __init__(self, command: list[str], output: Path) -> None:
        self.output = output
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_exc: object) -> None:
        kill_group(self.process.pid)
        self.process.wait()

    def says(self, text: str) -> bool:
        return wait_until(lambda: text in self.output.read_text() or self.process.poll() is not None)

    def signal_group(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def status(self) -> int:
        return self.process.wait(timeout=60)

    def is_alone(self) -> bool:
        """Whether no process of the group is left."""
        return wait_until(lambda: not members(self.process.pid))


def stage1(folder: Path, *, slow_s: float, num_rows: int = 60) -> Program:
    command = [sys.executable, str(TESTS / "support" / "stage1.py"), str(folder / "cache"), "--num_workers", "2"]
    return Program([*command, "--slow_s", str(slow_s), "--num_rows", str(num_rows)], folder / "output")


def check_resumes(folder: Path, num_rows: int = 60) -> None:
    source = SmallSource(num_rows)
    run_stage1(small_plan(folder / "straight", source), source)
    reference = folder_bytes(folder / "straight")
    for name, data in folder_bytes(folder / "cache").items() if (folder / "cache").exists() else ():
        if name.startswith("images_"):
            assert data == reference[name]
    run_stage1(small_plan(folder / "cache", source), source)
    assert folder_bytes(folder / "cache") == reference


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_to_the_group_ends_with_75_and_the_same_command_goes_on(folder, tally, number):
    with stage1(folder, slow_s=0.1) as program:
        assert wait_until(lambda: list((folder / "cache").glob("images_*.pt")))
        program.signal_group(number)
        assert program.status() == EXIT_INTERRUPTED
        said = program.output.read_text()
        assert f"{number.name}: finishing the work in hand" in said
        assert re.search(rf"{number.name}: \d shards left", said)
        assert "Traceback" not in said
        assert program.is_alone()
    assert not list((folder / "cache").glob(".*"))
    assert verify_cache(folder / "cache") == []
    check_resumes(folder)
    tally["signals to the process group"] += 1


def test_signals_at_random_times_from_the_first_moment_on(folder, tally, rng):
    source = SmallSource(60)
    run_stage1(small_plan(folder / "straight", source), source)
    for _ in range(scaled(6)):
        number = rng.choice(SIGNALS)
        with stage1(folder, slow_s=0.05) as program:
            assert program.says("ready")
            time.sleep(rng.uniform(0, 0.8))  # while the workers are being started as well
            program.signal_group(number)
            status = program.status()
            assert program.is_alone()
            if folder_bytes(folder / "cache") == folder_bytes(folder / "straight"):
                shutil.rmtree(folder / "cache")  # done: what the signal met was Python on its way out
                continue
            assert status == EXIT_INTERRUPTED, program.output.read_text()
            assert "Traceback" not in program.output.read_text()
        tally["signals to the process group"] += 1
        assert not list((folder / "cache").glob(".*"))
    run_stage1(small_plan(folder / "cache", source), source)
    assert folder_bytes(folder / "cache") == folder_bytes(folder / "straight")


def test_a_second_signal_leaves_at_once(folder, tally):
    with stage1(folder, slow_s=3) as program:
        assert program.says("ready")
        time.sleep(0.5)
        program.signal_group(signal.SIGTERM)
        assert program.says("finishing the work in hand")
        time.sleep(1.1)  # sooner, it may be an echo of the first
        program.signal_group(signal.SIGTERM)
        began = time.monotonic()
        assert program.status() == EXIT_INTERRUPTED
        assert time.monotonic() - began < 1.5
        assert program.is_alone()
    check_resumes(folder)
    tally["second signals"] += 1


def decode_workers(group: int) -> list[int]:
    """Members of the group whose parent is not its leader: children of the server that forks them."""
    found = []
    for pid in members(group):
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        if pid != group and parent != group:
            found.append(pid)
    return found


def test_a_killed_decode_worker_is_told_and_the_same_command_goes_on(folder, tally):
    with stage1(folder, slow_s=0.1) as program:
        assert wait_until(lambda: list((folder / "cache").glob("images_*.pt")))
        workers = decode_workers(program.process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        assert program.status() == EXIT_ERROR
        said = program.output.read_text()
        assert "error: a decode worker was killed" in said
        assert "fewer workers" in said
        assert "Traceback" not in said
        assert program.is_alone()
    assert verify_cache(folder / "cache") == []
    check_resumes(folder)
    tally["decode workers killed"] += 1


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> Path:
    """1,500 labelled images of 64 px: two seconds of work."""
    folder = tmp_path_factory.mktemp("parquet")
    source = SmallSource(60, size=64)
    images = [{"bytes": source.images[i % 60], "path": None} for i in np.random.default_rng(0).permutation(1500)]
    pq.write_table(pa.table({"image": images, "label": [i % 5 for i in range(1500)]}), folder / "train.parquet")
    return folder / "train.parquet"


def precompute(folder: Path, parquet: Path, name: str) -> Program:
    config = {
        "dataset_name": "parquet", "data_files": str(parquet), "label_column": "label", "image_size": 32,
        "cache_dir": str(folder / name), "cache_shard_size": 100, "num_workers": 2, "max_failed_fraction": 0.1,
    }  # fmt: skip
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    script = TESTS.parent / "precompute_cache.py"
    command = [sys.executable, str(script), "--data_config", str(folder / f"{name}.yaml"), "--batch_size", "20"]
    return Program(command, folder / f"{name}.txt")


def test_the_real_command_is_signalled_twice_and_killed_once_and_ends_with_the_same_bytes(
    folder, parquet, tally, rng: random.Random
):
    with precompute(folder, parquet, "straight") as program:
        assert program.status() == EXIT_DONE, program.output.read_text()
    reference = folder_bytes(folder / "straight")
    assert len(reference) == 32
    shards = 0
    for number in (*rng.sample(SIGNALS, 2), signal.SIGKILL):
        with precompute(folder, parquet, "cache") as program:
            assert wait_until(lambda before=shards: len(list((folder / "cache").glob("*.pt"))) > before)
            program.signal_group(number)
            status = program.status()
            said = program.output.read_text()
            assert "Traceback" not in said
            if number != signal.SIGKILL:
                assert status == EXIT_INTERRUPTED, said
                assert re.search(rf"{number.name}: \d+ shards .*left.*; everything finished is saved", said)
                assert not list((folder / "cache").glob(".*"))
            assert program.is_alone()
        shards = len(list((folder / "cache").glob("*.pt")))
        tally["signals to the process group"] += 1
    with precompute(folder, parquet, "cache") as program:
        assert program.status() == EXIT_DONE
    assert folder_bytes(folder / "cache") == reference
    assert verify_cache(folder / "cache") == []
