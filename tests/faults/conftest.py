"""Fault injection: what every program here shares.

    python -m pytest tests/faults                                       # the short lane
    FAULTS_SCALE=10 FAULTS_SEED=$RANDOM python -m pytest tests/faults   # the soak (make soak); FAULTS_SEED repeats one

The table of counts at the end says how often each promise was tried.
"""

import os
import random
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from scale import COUNTS, SCALE, SEED
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan


@pytest.fixture
def rng(request) -> random.Random:
    """Random numbers of FAULTS_SEED and of the test's name."""
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="session")
def tally() -> Counter[str]:
    """Counts for the table at the end."""
    return COUNTS


@pytest.fixture
def folder(tmp_path):
    """An empty folder in memory, where fsync costs nothing; on disk where there is no /dev/shm."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    path = Path(tempfile.mkdtemp(prefix="faults-", dir="/dev/shm"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def source() -> SmallSource:
    """22 labelled images of 8 px, two of them broken."""
    return SmallSource()


@pytest.fixture(scope="session")
def reference(source, tmp_path_factory) -> dict[str, bytes]:
    """What stage 1 makes of the source when nothing disturbs it."""
    folder = tmp_path_factory.mktemp("reference") / "cache"
    run_stage1(small_plan(folder, source), source)
    return folder_bytes(folder)


def pytest_report_header() -> str:
    """Say what repeats this run."""
    return f"faults: FAULTS_SEED={SEED} FAULTS_SCALE={SCALE:g}"


def pytest_sessionfinish(session) -> None:
    """Under pytest-xdist: hand this worker's counts to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["faults"] = dict(COUNTS)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Under pytest-xdist: take in a worker's counts."""
    COUNTS.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter) -> None:
    """The table of counts."""
    if COUNTS:
        terminalreporter.section(f"faults injected (FAULTS_SEED={SEED} FAULTS_SCALE={SCALE:g})")
        for name, count in sorted(COUNTS.items()):
            terminalreporter.write_line(f"{count:8d}  {name}")
