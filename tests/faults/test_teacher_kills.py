"""The teacher's pass, killed at any instant and run again, ends byte for byte like the uninterrupted one."""

import itertools
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from caches import make_test_cache
from processes import FINISHED, fork, kill_group, wait
from scale import SCALE, scaled
from stage1 import folder_bytes
from syscalls import killed_at
from teachers import images_plan, live_teacher, make_images, run_pass, teacher_plan

from distillery.teacher_cache.outputs import LiveTeacher
from distillery.teacher_cache.problems import find_teacher_problems
from tests.faults.test_power_loss import Disk, rebuild, record

VIEWS_OF_RECORDS = {"index.json", "statistics.json"}


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    """Built once: what is killed is a fork of this process."""
    return live_teacher()


@pytest.fixture
def plan(folder, teacher):
    """The pass over 20 images in 3 shards, with tokens in a basis: every kind of file is written."""
    make_test_cache(folder / "cache", 20, bad=(3,))
    return teacher_plan(images_plan(folder / "cache", 20), teacher, tokens="pca")


@pytest.fixture
def reference(plan, teacher) -> dict[str, bytes]:
    """What an undisturbed pass makes; removed from the folder again."""
    run_pass(plan, teacher)
    found = folder_bytes(plan.directory)
    shutil.rmtree(plan.directory.parent)
    return found


def check_visible_files(directory: Path, reference: dict[str, bytes]) -> None:
    """A name without .tmp is always a complete file."""
    for name, data in folder_bytes(directory).items() if directory.exists() else ():
        if not name.startswith("."):
            assert data == reference[name] or name in VIEWS_OF_RECORDS, f"{name} is torn"


def run_until_call(plan, teacher, fatal: int, mode: str) -> None:
    """A pass that is killed before or after its n-th change of the disk, or in the middle of its n-th write."""
    with killed_at(fatal, mode):
        run_pass(plan, teacher)


@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_killed_at_the_nth_change_of_the_disk_it_resumes_to_the_same_bytes(plan, teacher, reference, tally, mode, rng):
    # every change of the disk in the soak, every few of them in the short lane
    step = max(1, round(4 / scaled(1)))
    for fatal in itertools.count(rng.randrange(1, step + 1), step):
        shutil.rmtree(plan.directory.parent, ignore_errors=True)
        status = wait(fork(lambda fatal=fatal: run_until_call(plan, teacher, fatal, mode)))
        if status == FINISHED:
            break
        assert status == -signal.SIGKILL
        tally["kills of the teacher's pass at the n-th change of the disk"] += 1
        check_visible_files(plan.directory, reference)
        run_pass(plan, teacher)
        assert folder_bytes(plan.directory) == reference
    assert fatal > (10 if mode == "half" else 50)


def test_kill_9_at_random_times_again_and_again(plan, teacher, reference, tally, rng):
    began = time.monotonic()
    run_pass(plan, teacher)
    whole_s = time.monotonic() - began
    shutil.rmtree(plan.directory.parent)
    for _ in range(scaled(8)):
        child = fork(lambda: run_pass(plan, teacher), own_group=True)
        time.sleep(rng.uniform(0, whole_s))
        kill_group(child)
        tally["kill -9 of the teacher's pass at a random time"] += wait(child) != FINISHED
        check_visible_files(plan.directory, reference)
        if rng.random() < 0.3:
            run_pass(plan, teacher)
            assert folder_bytes(plan.directory) == reference
            shutil.rmtree(plan.directory.parent)
    run_pass(plan, teacher)
    assert folder_bytes(plan.directory) == reference
    assert list(find_teacher_problems(plan.directory)) == []


def test_killed_while_it_follows_a_cache_that_has_grown(folder, teacher, tally):
    short = replace(images_plan(folder / "cache", 20), num_rows=12)
    make_images(short)
    run_pass(teacher_plan(short, teacher), teacher)
    grown = replace(short, num_rows=20)
    make_images(grown)
    plan = teacher_plan(grown, teacher)
    shutil.copytree(plan.directory, folder / "before")
    run_pass(plan, teacher)
    expected = folder_bytes(plan.directory)
    for fatal in itertools.count(1, max(1, round(3 / scaled(1)))):
        shutil.rmtree(plan.directory)
        shutil.copytree(folder / "before", plan.directory)
        if wait(fork(lambda fatal=fatal: run_until_call(plan, teacher, fatal, "after"))) == FINISHED:
            break
        tally["kills while the teacher's outputs follow a grown cache"] += 1
        run_pass(plan, teacher)
        assert folder_bytes(plan.directory) == expected
    assert fatal > 20


def test_power_loss_at_any_moment_loses_and_tears_nothing_published(folder, teacher, tally, rng):
    make_test_cache(folder / "cache", 12)
    plan = teacher_plan(images_plan(folder / "cache", 12), teacher)
    changes = record(plan.directory, lambda: run_pass(plan, teacher))
    # the folders above are not what is looked at here
    changes = [("fsync elsewhere",) if change[-1] == "../../.." else change for change in changes]
    reference = folder_bytes(plan.directory)
    disk, seen = Disk({}), set()
    for change in [("mkdir",), *changes]:
        disk.apply(change)
        for state in disk.crash_states():
            for name in disk.published:
                assert state is not None, f"the folder is lost after {name} was published"
                assert name in state, f"{name} is lost after {change}"
                assert name.startswith("teacher_") <= (name.replace(".json", ".pt") in state), f"{name} has no shard"
            for name, data in (state or {}).items():
                torn = name.startswith("teacher_") and data != reference[name]
                assert not torn, f"{name} is torn after {change}"
            key = None if state is None else frozenset(state.items())
            if key in seen or rng.random() > 0.2 * SCALE:
                continue
            seen.add(key)
            rebuild(plan.directory, state)
            run_pass(plan, teacher)
            assert folder_bytes(plan.directory) == reference, f"after {change}"
            tally["crash states of the teacher's pass, each resumed to the same bytes"] += 1
    assert len(seen) > 10
