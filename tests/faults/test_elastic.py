"""Elastic stage 1: workers join, are killed, stopped and woken as it comes; the folder is that of one quiet run."""

import contextlib
import os
import shutil
import signal
import time

import pytest
from processes import FINISHED, fork, kill_group, use_forked_workers, wait
from scale import scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan

from distillery.cache.lease_names import LEASES_NAME, list_leases
from distillery.precompute import elastic, leases

NUM_WORKERS = 10
# kills in a round, each followed by a new worker
MOST_KILLS = 20


@pytest.fixture(scope="module")
def slow_source() -> SmallSource:
    return SmallSource(240, slow_s=0.004)


@pytest.fixture(scope="module")
def slow_reference(slow_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow") / "cache"
    run_stage1(small_plan(folder, slow_source, shard_size=4), slow_source)
    return folder_bytes(folder)


@pytest.fixture
def impatient(monkeypatch):
    """Leases that are taken over after a second, in this process and those forked from it."""
    monkeypatch.setattr(leases, "STALE_S", 1.0)
    monkeypatch.setattr(elastic, "look_again_s", lambda _waited: 0.05)


class Crowd:
    """Workers over one folder. stopped: pid -> when it goes on."""

    def __init__(self, plan, source, rng, tally) -> None:
        self.plan, self.source, self.rng, self.tally = plan, source, rng, tally
        self.running: list[int] = []
        self.stopped: dict[int, float] = {}
        self.num_kills = 0

    def join(self) -> None:
        """Another worker; one in five has a fixed share, as of `--num_jobs 4 --job_id K`, and decode workers."""
        share = range(self.plan.num_shards)
        on_wait = lambda _line: None  # noqa: E731
        if self.rng.random() < 0.2:
            part = self.rng.randrange(4)
            share, on_wait = range(len(share) * part // 4, len(share) * (part + 1) // 4), None

        def work() -> None:
            if on_wait is None:
                use_forked_workers()
            report, _ = run_stage1(self.plan, self.source, share, on_wait=on_wait)
            assert not report.shards_left
            if on_wait is not None:
                assert all(self.plan.shard_path(shard_idx).exists() for shard_idx in share)

        self.running.append(fork(work, own_group=True))

    def send(self, child: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    def disturb(self) -> None:
        """Kill or stop somebody, or nobody; wake those whose time has come."""
        for child in [child for child, until in self.stopped.items() if time.monotonic() > until]:
            self.send(child, signal.SIGCONT)
            del self.stopped[child]
        child, action = self.rng.choice(self.running), self.rng.random()
        if action < 0.25 and self.num_kills < MOST_KILLS:
            self.num_kills += 1
            kill_group(child)
            self.tally["elastic workers killed"] += 1
        elif action < 0.45 and child not in self.stopped:
            # some for longer than a lease lives: others take over what they hold, and then they go on
            self.stopped[child] = time.monotonic() + self.rng.choice([0.05, 0.3, 1.5])
            self.send(child, signal.SIGSTOP)
            self.tally["elastic workers stopped"] += 1

    def reap(self) -> None:
        """Take in who has ended; a killed worker is followed by a new one."""
        for child in list(self.running):
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                self.running.remove(child)
                self.stopped.pop(child, None)
                status = wait(child)
                assert status in (FINISHED, -signal.SIGKILL)
                if status != FINISHED:
                    self.join()


def test_ten_workers_that_come_and_go_make_what_one_would(folder, slow_source, slow_reference, tally, rng, impatient):
    plan = small_plan(folder / "cache", slow_source, shard_size=4)
    for _ in range(scaled(1)):
        shutil.rmtree(plan.directory, ignore_errors=True)
        crowd, history = Crowd(plan, slow_source, rng, tally), {}
        for _ in range(NUM_WORKERS // 2):
            crowd.join()
        deadline = time.monotonic() + 120
        late = NUM_WORKERS - NUM_WORKERS // 2
        while crowd.running:
            assert time.monotonic() < deadline, list_leases(plan.directory)
            time.sleep(rng.uniform(0, 0.04))
            if late and rng.random() < 0.2:
                crowd.join()
                late -= 1
            for path in plan.directory.glob("images_*.pt"):  # each is published once
                assert history.setdefault(path.name, path.stat().st_ino) == path.stat().st_ino
            crowd.disturb()
            crowd.reap()
        assert {name: data for name, data in folder_bytes(plan.directory).items() if not name.startswith(".")} == (
            slow_reference
        )
        run_stage1(plan, slow_source)  # takes away what one that was killed at the very end may have left
        assert folder_bytes(plan.directory) == slow_reference
        assert not (plan.directory / LEASES_NAME).exists()
        tally["rounds of ten elastic workers"] += 1


def test_workers_whose_leases_are_lost_or_cannot_be_written_make_what_one_would(
    folder, slow_source, slow_reference, tally, rng, impatient
):
    plan = small_plan(folder / "cache", slow_source, shard_size=4)
    plan.directory.mkdir()
    is_blocked = rng.random() < 0.5
    if is_blocked:
        (plan.directory / LEASES_NAME).touch()
    crowd = Crowd(plan, slow_source, rng, tally)
    for _ in range(4):
        crowd.join()
    deadline = time.monotonic() + 120
    while crowd.running:
        assert time.monotonic() < deadline, list_leases(plan.directory)
        time.sleep(0.02)
        for path in [] if is_blocked else (plan.directory / LEASES_NAME).glob("*"):
            if rng.random() < 0.3:
                path.unlink(missing_ok=True)
                tally["leases lost"] += 1
        crowd.reap()
    if is_blocked:
        (plan.directory / LEASES_NAME).unlink()
    assert folder_bytes(plan.directory) == slow_reference
