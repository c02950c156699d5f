import errno
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock
from teachers import images_plan, live_teacher, make_teacher_test_cache, run_pass, teacher_plan

import precompute_cache
from benchmarks.elastic import SCENARIOS, Elastic, draw_machines, ideal_s
from distillery.cache import lease_names
from distillery.cache.lease_names import LEASES_NAME, list_leases, parse_lease
from distillery.cache.plan import survey_cache
from distillery.cache.store import RecordScan
from distillery.cache.verify import verify_cache
from distillery.precompute import elastic, leases, loop, pipeline
from distillery.precompute.jobs import workers_lines
from distillery.precompute.leases import Leases, describe, is_left_to_others, look_again_s, mean_shard_s, run_length
from distillery.system.errors import RunError, UserError
from distillery.system.signals import StopFlag

SOURCE = SmallSource(40)


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class StopsAfter:
    """Asks to stop so many seconds after its beginning."""

    reason = "a test"

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def requested(self) -> bool:
        return time.monotonic() > self.end

    def __enter__(self) -> "StopsAfter":
        return self

    def __exit__(self, *_exc: object) -> None:
        pass


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "cache"
    run_stage1(small_plan(folder, SOURCE), SOURCE)
    return folder_bytes(folder)


@pytest.fixture
def plan(tmp_path):
    return small_plan(tmp_path / "cache", SOURCE)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def two(tmp_path, clock):
    """Two processes, as far as their leases go."""
    return Leases(tmp_path, clock), Leases(tmp_path, clock)


def held(directory: Path) -> list[tuple[int, int]]:
    return [(lease.first, lease.last) for lease in list_leases(directory)]


# how much is taken


@pytest.mark.parametrize("num_free", [1, 7, 400, 10_000])
@pytest.mark.parametrize("num_others", [0, 1, 199])
@pytest.mark.parametrize("shard_s", [None, 0.1, 60.0, 3600.0])
def test_a_run_is_a_minute_of_work_at_most_and_leaves_half_of_the_rest_to_others(num_free, num_others, shard_s):
    length = run_length(num_free, num_others, shard_s)
    assert 1 <= length <= num_free
    if length > 1:
        assert length * shard_s <= leases.RUN_S
        assert length * (1 + num_others) <= num_free / 2


def test_before_its_speed_is_known_a_process_takes_one_shard():
    assert run_length(10_000, 3, None) == 1


def test_a_slow_process_leaves_the_last_shards_to_faster_ones_and_never_waits_for_nobody():
    assert is_left_to_others(10, 20, 1.0, 10.0)
    assert not is_left_to_others(1000, 20, 1.0, 10.0)
    assert not is_left_to_others(1, 20, 1.0, 1.0)  # as fast as the others
    assert not is_left_to_others(10, 0, 1.0, 10.0)
    assert not is_left_to_others(10, 20, None, 10.0)


def test_the_speed_of_the_others_is_the_mean_of_what_their_leases_say(two):
    mine, others = two
    assert mean_shard_s(mine.living()) is None
    others.take([0])
    assert mean_shard_s(mine.living()) is None
    others.take([1], 2.0)
    others.take([2], 6.0)
    assert mean_shard_s(mine.living()) == pytest.approx(3.0)
    others.close()


def test_the_longer_a_process_waits_the_less_often_it_looks():
    assert [look_again_s(waited) for waited in (0, 4, 20, 1e6)] == [0.5, 1, 5, 10]


@pytest.mark.parametrize("scenario", ["equal", "unequal, 1 of 40 at a tenth", "all of these"])
def test_simulated_processes_of_any_speed_end_nearly_as_early_as_they_could(scenario):
    machines = draw_machines(40, 60.0, 3000.0, random.Random(0), SCENARIOS[scenario])
    folder = Elastic(machines, 2000)
    assert folder.run() <= 1.05 * ideal_s(machines, 2000)
    assert folder.calls / folder.now < 60


# who holds what


def test_a_lease_is_seen_by_others_until_its_shards_are_made(tmp_path, two):
    mine, others = two
    assert mine.take([3, 4, 6])
    assert mine.shards == {3, 4, 6} and others.shards == set()
    assert [(lease.first, lease.last) for lease in others.living()] == [(3, 6)]
    assert mine.living() == []
    for shard_idx in (6, 3, 4):
        assert held(tmp_path) == [(3, 6)]
        mine.done(shard_idx)
    assert others.living() == []
    mine.close()
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_take_a_run_from_the_same_shard_on_one_gets_it(tmp_path, two):
    mine, others = two
    assert mine.take([3, 4, 5])
    assert not others.take([3, 4])
    assert others.shards == set()
    assert held(tmp_path) == [(3, 5)]


def test_of_two_runs_that_overlap_no_shard_is_held_twice(tmp_path, two):
    mine, others = two
    assert others.take([4, 5])
    assert mine.take([3, 4, 5, 6]) == [3, 6]  # it had looked before the other one took them
    assert mine.shards == {3, 6}
    third = Leases(tmp_path, mine.clock)
    assert third.take([5]) == []
    assert held(tmp_path) == [(3, 6), (4, 5)]


def test_closing_gives_back_what_is_held_and_leaves_the_leases_of_others(tmp_path, two):
    mine, others = two
    assert mine.take([0, 1]) and mine.take([2]) and others.take([5])
    mine.close()
    assert held(tmp_path) == [(5, 5)]
    assert others.shards == {5}


def test_a_lease_without_heartbeat_is_taken_over_after_a_minute_and_not_before(tmp_path, two, clock):
    mine, others = two
    mine.take([0])
    for _ in range(12):
        clock.now += 20
        mine.beat()
        assert len(others.living()) == 1
    clock.now += 59
    assert len(others.living()) == 1
    clock.now += 1
    assert others.living() == []
    assert list((tmp_path / LEASES_NAME).iterdir()) == []
    assert others.take([0])
    mine.beat()  # it was only stopped, and sees that it has lost its shard
    assert mine.shards == set()
    mine.close()
    assert held(tmp_path) == [(0, 0)]


def test_a_process_that_lives_but_hangs_loses_its_lease(two, clock):
    mine, others = two
    mine.take([0])
    for _ in range(100):
        clock.now += 20
        mine.beat()
        if not others.living():
            break
    assert leases.STUCK_S < clock.now - 1000 < leases.STUCK_S + 2 * leases.STALE_S
    mine.take([5])  # it goes on
    for _ in range(10):
        clock.now += 20
        mine.beat()
        assert [lease.first for lease in others.living()] == [5]


@pytest.mark.parametrize("offset_s", [-1e6, 1e6])
def test_clocks_of_other_machines_decide_nothing(tmp_path, two, clock, offset_s):
    mine, others = two
    mine.take([0])
    (path,) = (tmp_path / LEASES_NAME).glob("held_*")
    for beat in range(10):
        clock.now += 30
        os.utime(path, (time.time() + offset_s + beat, time.time() + offset_s + beat))
        assert len(others.living()) == 1


@pytest.mark.parametrize("name", ["first_00000", "held_00000-00003@x@1@0123456789ab@0@0@abcdef"])
def test_a_lease_that_a_killed_process_left_half_made_is_taken_over_after_a_minute(tmp_path, clock, name):
    (tmp_path / LEASES_NAME).mkdir()
    (tmp_path / LEASES_NAME / name).touch()
    (tmp_path / LEASES_NAME / "of a later version").touch()
    mine = Leases(tmp_path, clock)
    for _ in range(3):
        assert len(mine.living()) == 1
        clock.now += 40
    assert mine.living() == []
    assert [path.name for path in (tmp_path / LEASES_NAME).iterdir()] == ["of a later version"]


def test_names_that_are_no_leases_mean_nothing():
    for name in (
        "",
        "held_",
        "first_x",
        "held_00001-00002@x@1@0@0@0@0",
        "held_00001-00002@a/b@1@0123456789ab@0@0@abcdef",
    ):
        assert parse_lease(name) is None


@pytest.mark.parametrize("blocked", ["a file", "a link to nothing"])
def test_where_no_lease_can_be_written_the_work_goes_on_without(tmp_path, two, blocked):
    place = tmp_path / LEASES_NAME
    place.touch() if blocked == "a file" else place.symlink_to(tmp_path / "nowhere" / "else")
    mine, others = two
    assert mine.take([0, 1])
    mine.beat()
    assert mine.shards == {0, 1}
    assert others.living() == []
    mine.done(0)
    mine.close()


@pytest.mark.parametrize("can_create", [True, False])
def test_a_lease_of_a_killed_process_in_a_folder_of_another_user_holds_nothing_back(
    tmp_path, clock, monkeypatch, can_create
):
    folder = tmp_path / LEASES_NAME
    folder.mkdir()
    for name in ("first_00001", "held_00001-00002@x@1@0123456789ab@7@0@abcdef"):
        (folder / name).touch()
    mine, theirs = Leases(tmp_path, clock), set(folder.iterdir())
    unlink = Path.unlink

    def unlink_own(path, **options):
        if path in theirs:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink_own)
    if not can_create:
        monkeypatch.setattr(mine, "_create", lambda _name: os.open(folder, os.O_WRONLY))
    for _ in range(3):
        assert len(mine.living()) == 1
        clock.now += 40
    assert mine.living() == []
    assert mine.take([1, 2, 3]) == [1, 2, 3]
    assert mine.take([0, 4]) == [0, 4]  # between its shards are those of the lease
    mine.close()
    assert set(folder.iterdir()) == theirs


def fork_holder(directory: Path) -> int:
    """A process that takes the shards 0 and 1 and then does nothing."""
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            Leases(directory).take([0, 1])
            os.write(write_end, b".")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(read_end, 1)
    os.close(read_end)
    os.close(write_end)
    return child


def test_a_dead_process_of_this_machine_is_noticed_at_once_and_a_stopped_one_is_not_dead(tmp_path, clock):
    child, mine = fork_holder(tmp_path), Leases(tmp_path, clock)
    os.kill(child, signal.SIGSTOP)
    (lease,) = mine.living()
    assert lease.holder.pid == child
    assert describe([lease]) == f"{lease.holder.host} (process {child}): shards 0..1"
    os.utime(tmp_path / LEASES_NAME / lease.name, (0, time.mktime((2026, 3, 1, 12, 30, 5, 0, 0, -1))))
    assert workers_lines("images", tmp_path) == [
        f"images: {lease.holder} has taken shards 0..1; last heartbeat 2026-03-01 12:30:05"
    ]
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, but its number not free yet
    assert workers_lines("images", tmp_path) == [
        f"images: {lease.holder} was killed; the next process takes over shards 0..1"
    ]
    assert mine.living() == []
    os.waitpid(child, 0)


@pytest.mark.parametrize("reason", [PermissionError, FileNotFoundError])
def test_a_living_process_that_this_user_may_not_see_is_not_dead(tmp_path, clock, monkeypatch, reason):
    child, mine = fork_holder(tmp_path), Leases(tmp_path, clock)

    def hidden(_pid):
        raise reason("/proc")

    monkeypatch.setattr(lease_names, "_start_time", hidden)
    assert len(mine.living()) == 1
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert mine.living() == []


# stage 1 with leases


def test_alone_an_elastic_run_makes_the_folder_of_a_plain_one(plan, reference):
    report, _ = run_stage1(plan, SOURCE, on_wait=pytest.fail)
    assert (report.shards_made, report.shards_left) == (5, 0)
    assert folder_bytes(plan.directory) == reference
    assert not (plan.directory / LEASES_NAME).exists()


def test_after_an_error_of_the_disk_all_that_was_taken_is_made(plan, reference, monkeypatch):
    opened, create = [], loop.create_temporary

    def fail_once(path):
        opened.append(path)
        if len(opened) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return create(path)

    monkeypatch.setattr(elastic, "run_length", lambda num_free, *_: num_free)
    monkeypatch.setattr(loop, "create_temporary", fail_once)
    run_stage1(plan, SOURCE, on_wait=pytest.fail, stop=StopsAfter(20))
    assert folder_bytes(plan.directory) == reference


def test_the_next_run_is_taken_while_the_one_before_is_still_being_made(plan, monkeypatch):
    pipelines, in_flight = [], []
    start, take = pipeline._Pipeline.run, Leases.take
    monkeypatch.setattr(pipeline._Pipeline, "run", lambda self, shards: (pipelines.append(self), start(self, shards)))
    monkeypatch.setattr(
        Leases, "take", lambda self, *run: (in_flight.append(len(pipelines[-1].open_shards)), take(self, *run))[1]
    )
    run_stage1(plan, SOURCE, on_wait=pytest.fail)
    assert len(in_flight) > 2
    assert min(in_flight[1:]) > 0


def test_processes_at_the_same_time_make_every_shard_once(tmp_path):
    source = SmallSource(320, slow_s=0.002)
    plan = small_plan(tmp_path / "cache", source)
    children, made = [], []
    for _ in range(3):
        read_end, write_end = os.pipe()
        made.append(read_end)
        if (child := os.fork()) == 0:
            status = 1
            try:
                report, _ = run_stage1(plan, source, on_wait=lambda _line: None)
                os.write(write_end, bytes([report.shards_made]))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
        os.close(write_end)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    counts = [os.read(read_end, 1)[0] for read_end in made]
    for read_end in made:
        os.close(read_end)
    assert sum(counts) == plan.num_shards == 40
    run_stage1(small_plan(tmp_path / "single", source), source)
    assert folder_bytes(plan.directory) == folder_bytes(tmp_path / "single")
    assert not (plan.directory / LEASES_NAME).exists()


def test_a_process_waits_for_the_living_says_so_and_takes_over_from_the_silent(plan, reference, monkeypatch):
    monkeypatch.setattr(leases, "STALE_S", 1.0)
    monkeypatch.setattr(elastic, "_QUIET_S", 0.0)
    plan.directory.mkdir()
    other, said = Leases(plan.directory), []
    other.take([1, 2])
    other._closed.set()  # no heartbeat from now on
    began = time.monotonic()
    report, _ = run_stage1(plan, SOURCE, on_wait=said.append)
    assert time.monotonic() - began > 1
    assert said == [f"waiting for {other.process}: shards 1..2; shards left: 2"]
    assert report.shards_made == 5
    assert folder_bytes(plan.directory) == reference
    assert not (plan.directory / LEASES_NAME).exists()


def test_a_request_to_stop_ends_the_waiting_and_gives_the_leases_back(plan, monkeypatch):
    monkeypatch.setattr(elastic, "_QUIET_S", 0.0)
    plan.directory.mkdir()
    other, stop = Leases(plan.directory), StopsAfter(60)
    other.take([1, 2])

    def stop_now(_line: str) -> None:
        stop.end = 0.0

    report, _ = run_stage1(plan, SOURCE, on_wait=stop_now, stop=stop)
    assert (report.shards_made, report.shards_left) == (3, 2)
    assert held(plan.directory) == [(1, 2)]
    other.close()


def test_after_a_request_to_stop_leases_are_given_back_before_the_views_are_written(plan, monkeypatch):
    held_then, stop, write_views = [], StopsAfter(60), RecordScan.write_views

    def write(scan, num_target):
        held_then.append(held(plan.directory))
        stop.end = 0.0
        return write_views(scan, num_target)

    monkeypatch.setattr(elastic, "run_length", lambda num_free, *_: num_free)
    monkeypatch.setattr(RecordScan, "write_views", write)
    report, _ = run_stage1(plan, SmallSource(40, slow_s=0.02), on_wait=pytest.fail, stop=stop)
    assert report.shards_left
    assert held_then[0] == [(0, 4)] and held_then[-1] == []


def test_what_a_killed_elastic_run_left_is_removed_by_a_plain_one(plan, reference):
    run_stage1(plan, SOURCE, range(2))
    os.kill(child := fork_holder(plan.directory), signal.SIGKILL)
    os.waitpid(child, 0)
    assert "left by a killed run; stage 1 removes it" in verify_cache(plan.directory)[0]
    run_stage1(plan, SOURCE)
    assert folder_bytes(plan.directory) == reference
    assert not (plan.directory / LEASES_NAME).exists()


def test_verify_says_who_holds_a_lease_and_what_does_not_belong_there(plan):
    run_stage1(plan, SOURCE)
    other = Leases(plan.directory)
    other.take([3, 4])
    (plan.directory / LEASES_NAME / "notes.txt").touch()
    foreign, holding = sorted(problem.split(": ", 1)[1] for problem in verify_cache(plan.directory))
    assert foreign == "not part of a cache; move it elsewhere"
    assert holding.startswith(f"shards 3..4 held by {other.process}, last heartbeat 2")
    other.close()


def test_shards_that_lost_their_record_are_hashed_by_who_takes_them_and_made_only_if_bad(plan, reference):
    run_stage1(plan, SOURCE)
    wait_for_the_clock(plan.directory)
    for shard_idx in (1, 2, 3):
        (plan.directory / f"images_shard_{shard_idx:05d}.json").unlink()
    bad = plan.directory / "images_shard_00002.pt"
    data = bytearray(bad.read_bytes())
    data[1000] ^= 1
    bad.write_bytes(data)
    report, survey = run_stage1(plan, SOURCE, on_wait=pytest.fail)
    assert survey.to_check == [1, 2, 3]
    assert (report.shards_made, report.shards_accepted, len(report.messages)) == (1, 2, 1)
    assert folder_bytes(plan.directory) == reference


def test_shards_to_hash_are_taken_for_all_threads_at_once(plan, monkeypatch):
    run_stage1(plan, SOURCE)
    wait_for_the_clock(plan.directory)
    for path in plan.directory.glob("*.pt"):
        os.utime(path)
    runs, take = [], Leases.take
    monkeypatch.setattr(Leases, "take", lambda self, run, shard_s: (runs.append(run), take(self, run, shard_s))[1])
    report, _ = run_stage1(plan, SOURCE, on_wait=pytest.fail, num_workers=2)
    assert report.shards_accepted == 5
    assert runs == [[0, 1, 2, 3, 4]]


def test_a_listing_that_misses_a_shard_just_published_costs_no_record(plan, reference, monkeypatch):
    survey = survey_cache(plan, range(plan.num_shards))
    run_stage1(plan, SOURCE)
    path, listdir = plan.directory / "images_shard_00003.json", os.listdir
    inode = path.stat().st_ino
    monkeypatch.setattr(os, "listdir", lambda folder: set(listdir(folder)) - {"images_shard_00003.pt"})
    with StopFlag() as stop:
        pipeline.make_cache(plan, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop, on_wait=pytest.fail)
    assert path.stat().st_ino == inode
    assert folder_bytes(plan.directory) == reference


@pytest.fixture
def publish_meanwhile(plan, monkeypatch):
    """Called with a folder's bytes: publishes its last shard between two looks for work, as another process would."""

    def prepare(files: dict[str, bytes]) -> None:
        see, looks = elastic.ElasticClaim._see_published, []

        def see_with_another(self):
            if len(looks) == 1:
                for name in ("images_shard_00004.pt", "images_shard_00004.json"):
                    (plan.directory / name).write_bytes(files[name])
            looks.append(1)
            see(self)

        monkeypatch.setattr(elastic.ElasticClaim, "_see_published", see_with_another)

    return prepare


@pytest.mark.parametrize("content", ["unreadable", "of fewer rows"])
def test_a_shard_that_others_published_and_that_is_not_the_one_wanted_is_made_again(
    plan, reference, tmp_path, publish_meanwhile, content
):
    if content == "unreadable":
        publish_meanwhile({"images_shard_00004.pt": b"", "images_shard_00004.json": b"{}"})
    else:
        run_stage1(small_plan(tmp_path / "small", SOURCE, max_samples=36), SOURCE)
        publish_meanwhile(folder_bytes(tmp_path / "small"))
    run_stage1(plan, SOURCE, on_wait=pytest.fail, stop=StopsAfter(20))
    assert folder_bytes(plan.directory) == reference


def test_a_shard_of_another_configuration_that_others_published_ends_the_call(plan, tmp_path, publish_meanwhile):
    run_stage1(small_plan(tmp_path / "other", SOURCE, dtype="float16"), SOURCE)
    publish_meanwhile(folder_bytes(tmp_path / "other"))
    with pytest.raises(UserError, match="images_shard_00004.pt were made with different configurations"):
        run_stage1(plan, SOURCE, on_wait=pytest.fail, stop=StopsAfter(20))


def test_a_shard_that_is_removed_at_the_very_end_is_an_error(plan, monkeypatch):
    def recorded(_loop):
        (plan.directory / "images_shard_00002.pt").unlink()
        return set(range(plan.num_shards))

    monkeypatch.setattr(loop.ShardLoop, "recorded", recorded)
    with pytest.raises(RunError, match="some were removed or replaced meanwhile"):
        run_stage1(plan, SOURCE, on_wait=pytest.fail, stop=StopsAfter(20))


@pytest.mark.parametrize("tokens", ["full", "pca"])
def test_the_teachers_outputs_are_shared_like_the_images(tmp_path, tokens):
    single = make_teacher_test_cache(tmp_path / "single", 80, tokens=tokens)
    shutil.copytree(tmp_path / "single", tmp_path / "shared", ignore=lambda *_: ["teacher"])
    teacher = live_teacher()
    plan = teacher_plan(images_plan(tmp_path / "shared", 80), teacher, tokens=tokens)
    if (child := os.fork()) == 0:
        status = 1
        try:
            run_pass(plan, teacher, on_wait=lambda _line: None)
            status = 0
        finally:
            os._exit(status)
    run_pass(plan, teacher, on_wait=lambda _line: None)
    assert folder_bytes(plan.directory) == folder_bytes(single.directory)
    assert os.waitpid(child, 0)[1] == 0
    assert folder_bytes(plan.directory) == folder_bytes(single.directory)
    assert not (plan.directory / LEASES_NAME).exists()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """precompute_cache.py over 40 images in 5 shards, in this process: (exit status, what it printed)."""
    table = pa.table({"image": [{"bytes": data, "path": None} for data in SOURCE.images]})
    pq.write_table(table, tmp_path / "images.parquet")
    (tmp_path / "data.yaml").write_text(
        f"dataset_name: parquet\ndata_files: {tmp_path}/images.parquet\nimage_size: 8\ninterpolation: lanczos\n"
        "cache_shard_size: 8\nnum_workers: 1\nmax_failed_fraction: 0.1\n"
    )

    def run(*flags: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["precompute_cache.py", "--data_config", str(tmp_path / "data.yaml"), *flags])
        capsys.readouterr()
        status = precompute_cache.main()
        return status, capsys.readouterr().out

    return run


def test_the_command_makes_the_folder_of_a_plain_run_and_says_who_is_at_work(command, tmp_path):
    (tmp_path / "auto").mkdir()
    other = Leases(tmp_path / "auto")
    other.take([3, 4])
    flags = ["--num_jobs", "auto", "--set", f"cache_dir={tmp_path}/auto"]
    status, printed = command("--dry_run", *flags)
    assert status == 0
    assert "0 done, 5 to go" in printed
    assert f"the training images: {other.process} has taken shards 3..4; last heartbeat 2" in printed
    other.close()
    for _ in range(2):  # who comes when all is done has nothing to do
        status, printed = command(*flags)
        assert status == 0
        assert f"{tmp_path}/auto: 40 images in 5 shards, 2 could not be decoded; complete" in printed
    command("--set", f"cache_dir={tmp_path}/single")
    assert folder_bytes(tmp_path / "auto") == folder_bytes(tmp_path / "single")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_jobs", "auto", "--job_id", "3"], "--num_jobs auto takes no --job_id"),
        (["--num_jobs", "some"], "'some': expected a number of jobs, or auto"),
        (["--num_jobs", "4"], "--num_jobs and --job_id go together"),
        (["--job_id", "4"], "--num_jobs and --job_id go together"),
        (["--num_jobs", "0", "--job_id", "0"], "--num_jobs 0: expected 1 or more"),
    ],
)
def test_wrong_flags_are_refused(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(sys, "argv", ["precompute_cache.py", "--data_config", "x.yaml", *flags])
    with pytest.raises(SystemExit) as end:
        precompute_cache.parse_arguments()
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_process_of_a_launcher_takes_no_fixed_share_where_the_shards_are_shared_as_it_comes(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    configs = ["--data_config", "d.yaml", "--train_config", "t.yaml", "--model_config", "m.yaml", "--teacher"]
    monkeypatch.setattr(sys, "argv", ["precompute_cache.py", *configs, "--num_jobs", "auto"])
    assert precompute_cache.share_of(precompute_cache.parse_arguments()) == (1, 0)
