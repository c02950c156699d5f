"""Several writers over one folder, stopped and killed as it comes: the result is that of one writer, without a lock."""

import contextlib
import os
import shutil
import signal
import time

import pytest
from processes import FINISHED, fork, use_forked_workers, wait
from scale import scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache.folder import load_index, load_shard_layout
from distillery.cache.verify import verify_cache


@pytest.fixture(scope="module")
def slow_source() -> SmallSource:
    return SmallSource(60, slow_s=0.002)


@pytest.fixture(scope="module")
def slow_reference(slow_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow") / "cache"
    run_stage1(small_plan(folder, slow_source), slow_source)
    return folder_bytes(folder)


def is_running(child: int) -> bool:
    """Whether a child has not ended yet; it stays to be waited for."""
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None


def shares_of(plan, writers: int, kind: str) -> list[range]:
    """What each writer is to make: everything, disjoint parts, or parts that overlap by mistake."""
    n = plan.num_shards
    if kind == "same":
        return [range(n)] * writers
    if kind == "disjoint":
        return [range(n * k // writers, n * (k + 1) // writers) for k in range(writers)]
    return [range(max(0, n * k // writers - 2), min(n, n * (k + 1) // writers + 2)) for k in range(writers)]


@pytest.mark.parametrize("kind", ["same", "disjoint", "overlapping"])
@pytest.mark.parametrize("killing", [False, True])
def test_writers_at_the_same_time_make_what_one_would(folder, slow_source, slow_reference, tally, rng, kind, killing):
    plan = small_plan(folder / "cache", slow_source)
    for _ in range(scaled(5)):
        shutil.rmtree(plan.directory, ignore_errors=True)
        shares = shares_of(plan, rng.choice([2, 3, 4]), kind)
        start = lambda share: fork(lambda: run_stage1(plan, slow_source, share))  # noqa: E731
        running = {start(share): share for share in shares}
        history: dict[str, int] = {}
        restarts = 0
        while running:
            time.sleep(rng.uniform(0, 0.02))
            if plan.directory.exists():
                # each shard is published exactly once: a name never gets another file
                for path in plan.directory.glob("images_*.pt"):
                    assert history.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino
            child = rng.choice(list(running))
            if is_running(child) and killing and restarts < 12:
                action = rng.random()
                with contextlib.suppress(ProcessLookupError):
                    if action < 0.4:
                        os.kill(child, signal.SIGKILL)
                        tally["writers killed beside others"] += 1
                    elif action < 0.8:
                        os.kill(child, signal.SIGSTOP)
                        time.sleep(rng.uniform(0, 0.05))
                        # a stopped writer either goes on late, or dies holding its temporary file and lock
                        os.kill(child, signal.SIGCONT if action < 0.7 else signal.SIGKILL)
                        tally["writers stopped beside others"] += 1
            for child in [child for child in running if not is_running(child)]:
                share, status = running.pop(child), wait(child)
                assert status in (FINISHED, -signal.SIGKILL)
                if status != FINISHED:
                    restarts += 1
                    running[start(share)] = share
        assert {name: data for name, data in folder_bytes(plan.directory).items() if not name.startswith(".")} == (
            slow_reference
        )
        run_stage1(plan, slow_source)  # takes away what a killed writer may have left
        assert folder_bytes(plan.directory) == slow_reference
        tally[f"rounds of 2 to 4 writers, {kind} shares"] += 1
    assert verify_cache(plan.directory) == []


def test_overlapping_jobs_share_the_work(folder, slow_source, slow_reference, tally):
    """Two jobs over the same range make few shards twice, those in flight when the other ends; nobody waits."""
    source = SmallSource(160, slow_s=0.01)
    plan = small_plan(folder / "cache", source)
    made = []
    children = []
    for _ in range(2):
        read_end, write_end = os.pipe()
        made.append(read_end)

        def work(write_end=write_end):
            use_forked_workers()
            report, _ = run_stage1(plan, source)
            os.write(write_end, bytes([report.shards_made]))

        children.append(fork(work))
        os.close(write_end)
    assert [wait(child) for child in children] == [FINISHED, FINISHED]
    counts = [os.read(read_end, 1)[0] for read_end in made]
    for read_end in made:
        os.close(read_end)
    # of these small shards five are in flight at once: three of two units each being decoded, two being published
    assert 20 <= sum(counts) <= 30
    assert min(counts) >= 5
    assert verify_cache(plan.directory) == []
    tally["rounds of 2 to 4 writers, same shares"] += 1


def test_a_stopped_writer_blocks_nobody_and_goes_on_to_no_harm(folder, slow_source, slow_reference, tally):
    plan = small_plan(folder / "cache", slow_source)
    child = fork(lambda: run_stage1(plan, slow_source))
    while not list(plan.directory.glob("*.pt")):
        time.sleep(0.002)
    os.kill(child, signal.SIGSTOP)
    began = time.monotonic()
    run_stage1(plan, slow_source)
    assert time.monotonic() - began < 20
    assert folder_bytes(plan.directory) == slow_reference  # its temporary files went, too
    os.kill(child, signal.SIGCONT)
    assert wait(child) == FINISHED
    assert folder_bytes(plan.directory) == slow_reference
    tally["writers stopped beside others"] += 1


def test_a_reader_of_a_growing_cache_never_sees_half_a_thing(folder, tally):
    source = SmallSource(60, slow_s=0.02)
    plan = small_plan(folder / "cache", source)
    child = fork(lambda: run_stage1(plan, source))
    seen = set()
    while is_running(child):
        if (plan.directory / "index.json").exists():
            index = load_index(plan.directory)
            for s in range(len(index.shard_names)):
                load_shard_layout(index, s)
            seen.add(index.num_samples)
            tally["looks at a cache that is being made"] += 1
    assert wait(child) == FINISHED
    assert len(seen) > 1
