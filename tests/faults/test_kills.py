"""Killed at any instant and run again, any number of times, the cache is byte for byte the uninterrupted one."""

import itertools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import FINISHED, fork, kill_group, members, use_forked_workers, wait, wait_until
from scale import scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan
from syscalls import killed_at, watched

from distillery.cache.encoded import RowEncoding
from distillery.cache.verify import verify_cache

STAGE1 = Path(__file__).resolve().parents[1] / "support" / "stage1.py"


def check_visible_shards(folder, reference) -> None:
    """A name without .tmp is always a complete file."""
    for name, data in folder_bytes(folder).items() if folder.exists() else ():
        if not name.startswith("."):
            assert data == reference[name] or name in {"index.json", "failures.jsonl"}, f"{name} is torn"


def run_until_call(plan, source, fatal: int, mode: str) -> None:
    """Stage 1 that is killed before or after its n-th change of the disk, or in the middle of its n-th write."""
    with killed_at(fatal, mode):
        run_stage1(plan, source)


@pytest.mark.parametrize("mode", ["before", "half", "after"])
def test_killed_at_every_single_write_fsync_link_and_rename_it_resumes_to_the_same_bytes(
    folder, source, reference, tally, mode, rng
):
    plan = small_plan(folder / "new" / "cache", source)
    for fatal in itertools.count(1):
        shutil.rmtree(folder / "new", ignore_errors=True)
        status = wait(fork(lambda fatal=fatal: run_until_call(plan, source, fatal, mode)))
        if status == FINISHED:
            break
        assert status == -signal.SIGKILL
        tally["kills at the n-th change of the disk"] += 1
        check_visible_shards(plan.directory, reference)
        while rng.random() < 0.3:  # the resumed run is killed as well
            again = rng.randrange(1, 60)
            tally["kills at the n-th change of the disk"] += (
                wait(fork(lambda again=again: run_until_call(plan, source, again, "after"))) != FINISHED
            )
            check_visible_shards(plan.directory, reference)
        run_stage1(plan, source)
        assert folder_bytes(plan.directory) == reference
    # three shards of two writes and their records; threads that finish together write index.json once for both
    assert fatal > (8 if mode == "half" else 40)


@pytest.mark.parametrize("stored", [{}, {"dtype": "jpeg", "encoding": RowEncoding(8, 90)}], ids=["pixels", "jpeg"])
def test_a_cache_that_grows_killed_at_every_change_of_the_disk_ends_like_one_made_at_once(
    folder, source, tally, stored
):
    run_stage1(small_plan(folder / "straight", source, **stored), source)
    reference = folder_bytes(folder / "straight")
    run_stage1(small_plan(folder / "short", source, max_samples=12, **stored), source)
    plan = small_plan(folder / "cache", source, **stored)
    for fatal in itertools.count(1):
        shutil.rmtree(plan.directory, ignore_errors=True)
        shutil.copytree(folder / "short", plan.directory)
        status = wait(fork(lambda fatal=fatal: run_until_call(plan, source, fatal, "after")))
        if status == FINISHED:
            break
        run_stage1(plan, source)
        assert folder_bytes(plan.directory) == reference
        tally["kills while a cache grows"] += 1
    assert fatal > 30


def test_kill_9_of_the_process_group_at_random_times(folder, tally, rng):
    source = SmallSource(60, slow_s=0.003)
    plan = small_plan(folder / "cache", source)
    began = time.monotonic()
    run_stage1(plan, source)
    whole_s = time.monotonic() - began
    reference = folder_bytes(plan.directory)
    shutil.rmtree(plan.directory)
    kills = finished = 0
    while kills < scaled(30):

        def work():
            use_forked_workers()
            run_stage1(plan, source)

        child = fork(work, own_group=True)
        time.sleep(rng.uniform(0, 1.5 * whole_s))
        kill_group(child)
        if wait(child) == FINISHED:
            finished += 1
            assert folder_bytes(plan.directory) == reference
            shutil.rmtree(plan.directory)
            continue
        kills += 1
        tally["kill -9 of the process group at a random time"] += 1
        check_visible_shards(plan.directory, reference)
        assert wait_until(lambda child=child: not members(child))
        if rng.random() < 0.3:
            run_stage1(plan, source)
            assert folder_bytes(plan.directory) == reference
            shutil.rmtree(plan.directory)
    run_stage1(plan, source)
    assert folder_bytes(plan.directory) == reference
    assert verify_cache(plan.directory) == []


def test_kill_9_of_freshly_started_programs_with_their_decode_workers(folder, tally, rng):
    command = [sys.executable, str(STAGE1), str(folder / "cache"), "--num_rows", "60"]
    subprocess.run([*command[:2], str(folder / "straight"), "--num_rows", "60"], check=True, capture_output=True)
    reference = folder_bytes(folder / "straight")
    for _ in range(scaled(4)):
        worker = subprocess.Popen(
            [*command, "--num_workers", "2", "--slow_s", "0.02"], stdout=subprocess.PIPE, start_new_session=True
        )
        worker.stdout.readline()
        time.sleep(rng.uniform(0, 1.2))
        kill_group(worker.pid)
        worker.wait()
        tally["kill -9 of the process group at a random time"] += 1
        check_visible_shards(folder / "cache", reference)
        assert wait_until(lambda worker=worker: not members(worker.pid))
    subprocess.run(command, check=True, capture_output=True)
    assert folder_bytes(folder / "cache") == reference


def test_kill_9_of_the_main_process_alone_leaves_no_worker_behind(folder, tally):
    command = [sys.executable, str(STAGE1), str(folder / "cache"), "--num_rows", "200", "--num_workers", "2"]
    worker = subprocess.Popen([*command, "--slow_s", "0.05"], stdout=subprocess.PIPE, start_new_session=True)
    worker.stdout.readline()
    # the main process, two decode workers and multiprocessing's resource tracker
    assert wait_until(lambda: len(members(worker.pid)) >= 4)
    assert wait_until(lambda: list((folder / "cache").glob("images_shard_*.pt")))
    worker.kill()
    worker.wait()
    assert wait_until(lambda: not members(worker.pid))
    tally["kill -9 of the main process alone"] += 1


def test_the_sweep_is_one_of_different_instants(folder, source):
    """Guards the programs above: a count that never advances would test one instant over and over."""
    seen = []
    with watched(lambda n, name, call, *args: (seen.append((n, name)), call(*args))[1]):
        run_stage1(small_plan(folder / "cache", source), source)
    assert [n for n, _ in seen] == list(range(1, len(seen) + 1))
    names = {name for _, name in seen}
    assert names >= {"open", "write", "pwrite", "ftruncate", "fsync", "link", "replace", "unlink", "mkdir"}
