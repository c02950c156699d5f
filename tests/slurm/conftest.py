import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workplace import ROOT

UP = Path(__file__).with_name("up.sh")


class Slurm:
    """A one-node Slurm of 2 CPUs: partition low can be preempted by partition high."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # no threads that would wait for each other; the job's Python is this one
        self.environment = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1",
        }  # fmt: skip

    def call(self, *command: str) -> str:
        """Run a command of Slurm's; returns what it prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, log: Path, *arguments: str, **variables: str) -> str:
        """sbatch; the job's number. What it prints goes to `log`."""
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        command = ["sbatch", "--parsable", f"--output={log}", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def show(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job (or one task of an array)."""
        line = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[0]
        return dict(part.split("=", 1) for part in line.split() if "=" in part)

    def wait(self, job: str, state: str, log: Path, timeout_s: float = 120) -> dict[str, str]:
        """Wait until a job is in a state; returns what `show` says then."""
        self.until(
            lambda: self.show(job)["JobState"] == state, lambda: f"{self.show(job)}\n{log.read_text()}", timeout_s
        )
        return self.show(job)

    def until(
        self, condition: Callable[[], bool], explain: Callable[[], str] = lambda: "", timeout_s: float = 120
    ) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, explain()
            time.sleep(0.1)


@pytest.fixture(scope="session")
def slurm(tmp_path_factory) -> Slurm:
    if not os.environ.get("TEST_SLURM"):
        pytest.skip("starts (and where it is missing installs) a Slurm of one node: run make test-slurm")
    if os.geteuid() != 0:
        pytest.skip("slurmctld, slurmd and munged are started as root here")
    if shutil.which("slurmctld") is None and shutil.which("apt-get") is None:
        pytest.skip("Slurm is not installed, and there is no apt-get to install it with")
    folder = tmp_path_factory.mktemp("slurm")
    up = subprocess.run([UP, folder], capture_output=True, text=True, timeout=240)
    if up.returncode:
        pytest.skip(f"Slurm could not be installed or started: {(up.stderr.strip().splitlines() or ['?'])[-1]}")
    print(up.stdout)
    slurm = Slurm(folder)
    yield slurm
    slurm.call("scancel", "--full", "--user=root")
    for name in ("slurmd", "slurmctld"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGTERM)
