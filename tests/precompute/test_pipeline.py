import errno
import json
import os
import signal
import stat
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan, wait_for_the_clock

from distillery.cache.images import IMAGE_SHARDS
from distillery.cache.plan import survey_cache
from distillery.cache.verify import verify_cache
from distillery.precompute import loop, pipeline, pool
from distillery.precompute.pipeline import make_cache
from distillery.sources.pixels import library_versions, normalisation_table, preprocess_image
from distillery.system.errors import RunError, UserError
from distillery.system.files import create_temporary, temporary_name
from distillery.system.signals import StopFlag

SOURCE = SmallSource()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "cache"
    run_stage1(small_plan(folder, SOURCE), SOURCE)
    return folder_bytes(folder)


def changes(folder):
    """What tells of every file that it was written to or replaced; the time of its last reading is not among it."""
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats.items()}


def inodes(folder):
    return {path.name: path.stat().st_ino for path in folder.glob("*.pt")}


@pytest.mark.parametrize("batch_size, num_workers", [(1, 1), (3, 1), (8, 1), (100, 1), (3, 2), (100, 2)])
def test_neither_batch_size_nor_workers_change_a_byte(tmp_path, reference, batch_size, num_workers):
    folder = tmp_path / "another" / "place"
    report, _ = run_stage1(small_plan(folder, SOURCE), SOURCE, batch_size=batch_size, num_workers=num_workers)
    assert folder_bytes(folder) == reference
    assert (report.shards_made, report.shards_accepted, report.shards_left, report.messages) == (3, 0, 0, [])


@pytest.mark.parametrize(
    "batch_size, rows, workers", [(256, 200, 7), (1000, 200, 7), (1000, 900, 8), (4, 22, 6), (256, 22, 1)]
)
def test_there_are_as_many_workers_as_the_images_keep_busy_whatever_the_batch_size(
    tmp_path, monkeypatch, batch_size, rows, workers
):
    asked, inline = [], pool.decode_pool

    def build(num_workers, *arguments):
        asked.append(num_workers)
        return inline(1, *arguments)

    monkeypatch.setattr(pipeline, "decode_pool", build)
    source = SmallSource(rows)
    run_stage1(small_plan(tmp_path, source), source, batch_size=batch_size, num_workers=8)
    assert asked == [workers]


def test_the_last_shard_is_counted_as_made(tmp_path):
    plan, seen = small_plan(tmp_path, SOURCE), []
    with StopFlag() as stop:
        make_cache(
            plan, SOURCE, survey=survey_cache(plan, range(3)), batch_size=8, num_workers=1, stop=stop,
            on_rows=lambda rows, shards, limit: seen.append((rows, shards)),
        )  # fmt: skip
    assert sum(rows for rows, _ in seen) == 22
    assert seen[-1] == (0, 3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8"])
def test_the_shards_hold_the_images_of_the_source(tmp_path, dtype):
    plan = small_plan(tmp_path, SOURCE, dtype=dtype)
    run_stage1(plan, SOURCE)
    table = None if dtype == "uint8" else normalisation_table(plan.spec.mean, plan.spec.std, dtype)
    for shard_idx in range(3):
        shard = torch.load(plan.shard_path(shard_idx), weights_only=True)
        start, stop = plan.rows_of(shard_idx)
        assert shard["labels"].tolist() == [i % 7 for i in range(start, stop)]
        for row, i in enumerate(range(start, stop)):
            image = shard["images"][row]
            assert bool(shard["valid"][row]) == (i not in (3, 17))
            if i in (3, 17):
                assert not image.any()  # its index is kept, nothing shifts
                continue
            pixels = preprocess_image(SOURCE.images[i], plan.spec)
            expected = pixels if table is None else np.stack([table[c][pixels[c]] for c in range(3)])
            assert image.view(torch.uint8).numpy().tobytes() == expected.tobytes()


def test_a_record_says_with_which_libraries_a_shard_was_made(tmp_path):
    run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    assert IMAGE_SHARDS.read_record(tmp_path / "images_shard_00000.json")["libraries"] == library_versions()


def test_running_again_does_nothing(tmp_path, reference):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    before = changes(tmp_path)
    report, survey = run_stage1(plan, SOURCE)
    assert (report.shards_made, survey.done) == (0, [0, 1, 2])
    assert changes(tmp_path) == before
    assert folder_bytes(tmp_path) == reference


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 1, 0, 2, 0]])
def test_array_jobs_in_any_order_equal_the_single_run(tmp_path, reference, order):
    plan = small_plan(tmp_path, SOURCE)
    for job in order:
        run_stage1(plan, SOURCE, range(job, job + 1))
        index = json.loads((tmp_path / "index.json").read_text())
        assert index["complete"] == (len(list(tmp_path.glob("*.pt"))) == 3)
    assert folder_bytes(tmp_path) == reference


@pytest.mark.parametrize("first", [1, 8, 12, 16, 21])
def test_raising_max_samples_extends_the_cache_and_touches_no_full_shard(tmp_path, reference, first):
    run_stage1(small_plan(tmp_path, SOURCE, max_samples=first), SOURCE)
    full = {name: inode for name, inode in inodes(tmp_path).items() if int(name[13:18]) < first // 8}
    assert json.loads((tmp_path / "index.json").read_text())["complete"]
    run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    assert folder_bytes(tmp_path) == reference
    assert full.items() <= inodes(tmp_path).items()


def test_lowering_max_samples_keeps_what_is_there(tmp_path, reference):
    run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    run_stage1(small_plan(tmp_path, SOURCE, max_samples=5), SOURCE)
    assert folder_bytes(tmp_path) == reference


@pytest.mark.parametrize(
    "lost", [["images_shard_00001.pt"], ["images_shard_00000.pt", "images_shard_00000.json"], ["*"]]
)
def test_vanished_files_are_made_again_and_the_others_stay(tmp_path, reference, lost):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    for pattern in lost:
        for path in tmp_path.glob(pattern):
            path.unlink()
    kept = inodes(tmp_path)
    run_stage1(plan, SOURCE)
    assert folder_bytes(tmp_path) == reference
    assert kept.items() <= inodes(tmp_path).items()


@pytest.mark.parametrize("name", ["index.json", "failures.jsonl", "images_shard_00001.json"])
@pytest.mark.parametrize("damage", [None, b"", b"{}", b"[1, 2", b'{"format_version": 3}'])
def test_a_damaged_index_or_record_is_rebuilt_without_making_a_shard(tmp_path, reference, name, damage):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    kept = inodes(tmp_path)
    (tmp_path / name).unlink() if damage is None else (tmp_path / name).write_bytes(damage)
    report, _ = run_stage1(plan, SOURCE)
    assert report.shards_made == 0
    assert folder_bytes(tmp_path) == reference
    assert inodes(tmp_path) == kept


def test_a_damaged_shard_is_found_made_again_and_told(tmp_path, reference):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    path = tmp_path / "images_shard_00001.pt"
    wait_for_the_clock(tmp_path)
    data = bytearray(path.read_bytes())
    data[1000] ^= 1
    path.write_bytes(data)
    kept = inodes(tmp_path)
    report, survey = run_stage1(plan, SOURCE)
    assert survey.to_check == [1]
    assert (report.shards_made, report.shards_accepted) == (1, 0)
    assert report.messages == [
        f"{path}: damaged: 1 rows of images differ from their checksums, the first is row 1. It is made again."
    ]
    assert folder_bytes(tmp_path) == reference
    assert inodes(tmp_path).items() >= {name: inode for name, inode in kept.items() if name != path.name}.items()


def test_a_shard_that_was_only_touched_is_hashed_and_kept(tmp_path, reference):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    kept = inodes(tmp_path)
    wait_for_the_clock(tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.chmod(0o600)
    counted = []
    survey = survey_cache(plan, range(3))
    with StopFlag() as stop:
        report = make_cache(
            plan, SOURCE, survey=survey, batch_size=4, num_workers=2, stop=stop,
            on_rows=lambda rows, shards, limit: counted.append((rows, limit)),
        )  # fmt: skip
    assert (report.shards_made, report.shards_accepted) == (0, 3)
    assert sorted(counted) == [(6, "disk"), (8, "disk"), (8, "disk")]
    assert folder_bytes(tmp_path) == reference
    assert inodes(tmp_path) == kept
    assert survey_cache(plan, range(3)).done == [0, 1, 2]


def test_shared_caches_get_the_permissions_the_umask_leaves(tmp_path):
    previous = os.umask(0o002)
    try:
        run_stage1(small_plan(tmp_path / "a" / "cache", SOURCE), SOURCE, num_workers=2)
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a" / "cache").iterdir()}
    assert modes == {0o664}
    assert stat.S_IMODE((tmp_path / "a" / "cache").stat().st_mode) == 0o775


def test_a_cache_dir_that_is_a_symbolic_link_works(tmp_path, reference):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "cache").symlink_to(tmp_path / "scratch")
    run_stage1(small_plan(tmp_path / "cache", SOURCE), SOURCE)
    assert folder_bytes(tmp_path / "scratch") == reference
    assert (tmp_path / "cache").is_symlink()


def as_an_ordinary_user(function) -> str:
    """Run `function` in a forked process that is not root; what it returned or raised, as text."""
    read_end, write_end = os.pipe()
    if (child := os.fork()) == 0:
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            answer = repr(function())
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(write_end, answer.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


@pytest.fixture
def open_folder(tmp_path):
    """tmp_path with the folders above it open to other users."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.getuid() and folder != folder.parent and "pytest" in str(folder):
            folder.chmod(0o755)
    return tmp_path


def test_a_read_only_folder_is_one_clear_message_and_a_finished_cache_in_it_is_no_error(open_folder):
    plan = small_plan(open_folder / "cache", SOURCE)
    run_stage1(plan, SOURCE, range(2))
    plan.directory.chmod(0o555)
    try:
        answer = as_an_ordinary_user(lambda: run_stage1(plan, SOURCE))
        assert answer.startswith(f"UserError: the cache folder {plan.directory} cannot be written to")
        assert "Permission denied" in answer
        assert as_an_ordinary_user(lambda: run_stage1(plan, SOURCE, range(2))[0].shards_left) == "0"
    finally:
        plan.directory.chmod(0o755)


def test_a_cache_of_another_user_that_may_not_be_read_is_said_and_not_made_again(open_folder):
    plan = small_plan(open_folder / "cache", SOURCE)
    run_stage1(plan, SOURCE)
    plan.directory.chmod(0o777)
    before = folder_bytes(plan.directory)
    (plan.directory / "images_shard_00001.json").chmod(0o600)
    if os.getuid() != 0:
        (plan.directory / "images_shard_00001.json").chmod(0)
    answer = as_an_ordinary_user(lambda: run_stage1(plan, SOURCE))
    assert "images_shard_00001.json: may not be read by this user" in answer
    (plan.directory / "images_shard_00001.json").chmod(0o644)
    wait_for_the_clock(plan.directory)
    (plan.directory / "images_shard_00002.pt").chmod(0o000)  # its record is older now: to be hashed
    answer = as_an_ordinary_user(lambda: run_stage1(plan, SOURCE))
    assert "images_shard_00002.pt: Permission denied" in answer
    (plan.directory / "images_shard_00002.pt").chmod(0o644)
    assert folder_bytes(plan.directory) == before


# -- other writers


def test_a_name_taken_by_the_same_shard_is_left_to_the_one_who_was_first(tmp_path, reference, monkeypatch):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    kept = inodes(tmp_path)
    survey = replace(survey_cache(plan, range(3)), done=[], missing=[0, 1, 2])
    monkeypatch.setattr(loop.ShardLoop, "is_published", lambda *_: False)  # it was not there yet when we looked
    with StopFlag() as stop:
        make_cache(plan, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop)
    assert inodes(tmp_path) == kept
    assert folder_bytes(tmp_path) == reference


@pytest.mark.parametrize("content", [b"", b"half", "shorter"])
def test_a_name_taken_by_something_bad_is_taken_over(tmp_path, reference, monkeypatch, content):
    plan = small_plan(tmp_path / "cache", SOURCE)
    plan.directory.mkdir()
    if content == "shorter":  # the same shard of a smaller max_samples
        run_stage1(small_plan(tmp_path / "short", SOURCE, max_samples=5), SOURCE)
        content = (tmp_path / "short" / "images_shard_00000.pt").read_bytes()
    survey = survey_cache(plan, range(3))
    (plan.directory / "images_shard_00000.pt").write_bytes(content)
    with StopFlag() as stop:
        make_cache(plan, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop)
    assert folder_bytes(plan.directory) == reference


def test_a_longer_last_shard_of_another_job_is_kept(tmp_path):
    long = small_plan(tmp_path, SOURCE, max_samples=14)
    short = small_plan(tmp_path, SOURCE, max_samples=10)
    survey = survey_cache(short, range(2))
    run_stage1(long, SOURCE)
    kept = inodes(tmp_path)
    with StopFlag() as stop:
        make_cache(short, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop)
    assert inodes(tmp_path) == kept
    assert verify_cache(tmp_path) == []


def test_a_job_of_another_configuration_started_at_the_same_time_is_stopped_not_mixed_in(tmp_path):
    plan, other = small_plan(tmp_path, SOURCE), small_plan(tmp_path, SOURCE, labels=False)
    survey = survey_cache(other, range(3))
    run_stage1(plan, SOURCE, range(1))
    before = folder_bytes(tmp_path)
    with StopFlag() as stop, pytest.raises(UserError, match="another job with another configuration"):
        make_cache(other, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop)
    assert folder_bytes(tmp_path) == before


def test_a_shard_another_process_is_at_work_on_is_left_for_the_end(tmp_path, reference, monkeypatch):
    plan = small_plan(tmp_path, SOURCE)
    fd = create_temporary(temporary_name(plan.shard_path(0)))
    fed = []
    feed = pipeline._Pipeline._feed
    monkeypatch.setattr(pipeline._Pipeline, "_feed", lambda self, idx: fed.append(idx) or feed(self, idx))
    run_stage1(plan, SOURCE)
    os.close(fd)
    assert fed == [1, 2, 0]  # made all the same: its maker may be stopped for ever
    assert folder_bytes(tmp_path) == reference


@pytest.mark.parametrize("victim", ["images_shard", "index.json"])
def test_temporary_files_taken_away_by_another_job_cost_only_time(tmp_path, reference, monkeypatch, victim):
    fsync, stolen = os.fsync, []

    def steal(fd):
        path = os.readlink(f"/proc/self/fd/{fd}")
        if f".{victim}" in path and ".tmp-" in path and len(stolen) < 3:
            stolen.append(path)
            os.unlink(path)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", steal)
    run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    assert len(stolen) == 3
    assert folder_bytes(tmp_path) == reference


# -- leftovers


def leftovers(folder):
    return sorted(path.name for path in folder.glob(".*"))


def test_temporary_files_of_dead_writers_are_removed_those_of_living_ones_stay_until_all_is_done(tmp_path):
    plan = small_plan(tmp_path, SOURCE)
    dead, alive = temporary_name(plan.shard_path(1)), temporary_name(plan.shard_path(2))
    os.close(create_temporary(dead))
    fd = create_temporary(alive)
    for name in (".keep.tmp-0123456789ab", ".images_shard_00000.pt.swp", ".nfs000001"):
        (tmp_path / name).write_bytes(b"not ours")
    run_stage1(plan, SOURCE, range(1))
    others = {".images_shard_00000.pt.swp", ".keep.tmp-0123456789ab", ".nfs000001"}
    assert set(leftovers(tmp_path)) == {alive.name, *others}
    run_stage1(plan, SOURCE)
    assert set(leftovers(tmp_path)) == others
    os.close(fd)


def test_on_a_network_file_system_only_old_temporary_files_count_as_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "is_network_file_system", lambda _path: True)
    plan = small_plan(tmp_path, SOURCE)
    young, old = temporary_name(plan.shard_path(1)), temporary_name(plan.shard_path(2))
    for path in (young, old):
        os.close(create_temporary(path))
    os.utime(old, (time.time() - 7200,) * 2)
    run_stage1(plan, SOURCE, range(1))
    assert leftovers(tmp_path) == [young.name]


# -- the source


class Broken(SmallSource):
    def __init__(self, error=None, short=False):
        super().__init__(slow_s=0.03)
        self.error, self.short = error, short

    def read(self, start, stop):
        if start >= 16 and self.error:
            raise self.error
        return super().read(start, stop)[: 1 if self.short else None]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOENT])
def test_an_io_error_of_the_source_is_not_blamed_on_the_cache_and_what_is_published_is_listed(tmp_path, number):
    source = Broken(OSError(number, "the file server is away"))
    with pytest.raises(RunError, match="test images: cannot be read: .*the file server is away"):
        run_stage1(small_plan(tmp_path, source), source, batch_size=2)
    assert verify_cache(tmp_path) == []
    assert json.loads((tmp_path / "index.json").read_text())["num_samples"] == 8
    assert leftovers(tmp_path) == []


def test_a_source_that_gives_too_few_images_or_no_labels_is_an_error(tmp_path):
    source = Broken(short=True)
    with pytest.raises(RunError, match=r"test images: gave 1 images for the rows 0\.\.3"):
        run_stage1(small_plan(tmp_path, source), source)
    source = SmallSource()
    source.labels = lambda start, stop: None
    with pytest.raises(UserError, match=r"test images: has no labels for the rows 0\.\.7"):
        run_stage1(small_plan(tmp_path, source), source)


def test_a_disk_error_that_comes_back_after_shards_were_made_is_another_one(tmp_path, monkeypatch, reference):
    publish, failures = pipeline.OpenImageShard.publish, [0, 2]

    def failing(shard):
        if shard.shard_idx in failures:
            failures.remove(shard.shard_idx)
            raise OSError(errno.EIO, "lost")
        publish(shard)

    monkeypatch.setattr(pipeline.OpenImageShard, "publish", failing)
    run_stage1(small_plan(tmp_path, SOURCE), SOURCE)
    assert folder_bytes(tmp_path) == reference
    assert not failures


def test_the_rows_of_a_shard_that_another_process_published_meanwhile_are_done_too(tmp_path):
    plan, counted = small_plan(tmp_path, SOURCE), []
    survey = survey_cache(plan, range(3))
    run_stage1(plan, SOURCE, range(1, 2))
    with StopFlag() as stop:
        make_cache(
            plan, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop,
            on_rows=lambda rows, **_state: counted.append(rows),
        )  # fmt: skip
    assert sum(counted) == len(SOURCE)


# -- stopping


class Stopping(SmallSource):
    """Asks for a stop while its n-th read is under way."""

    def __init__(self, nth):
        super().__init__()
        self.left = nth

    def read(self, start, stop):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        return super().read(start, stop)


@pytest.mark.parametrize("grace_s", [15, 0])
@pytest.mark.parametrize("nth", range(1, 7))
def test_a_stop_finishes_or_drops_the_shard_in_hand_and_the_next_run_goes_on(
    tmp_path, reference, monkeypatch, nth, grace_s
):
    monkeypatch.setattr(loop, "_GRACE_S", grace_s)
    plan = small_plan(tmp_path, SOURCE)
    report, _ = run_stage1(plan, Stopping(nth))
    assert report.shards_left == 3 - report.shards_made
    assert report.shards_made == ((nth + 1) // 2 if grace_s else (nth - 1) // 2) or grace_s == 0
    assert len(list(tmp_path.glob("*.pt"))) == report.shards_made
    assert leftovers(tmp_path) == []
    if report.shards_made:
        assert verify_cache(tmp_path) == []
    run_stage1(plan, SOURCE)
    assert folder_bytes(tmp_path) == reference


def test_a_stop_is_heeded_while_shards_are_checked(tmp_path, reference):
    plan = small_plan(tmp_path, SOURCE)
    run_stage1(plan, SOURCE)
    wait_for_the_clock(tmp_path)
    for path in tmp_path.glob("*.pt"):
        path.chmod(0o600)
    survey = survey_cache(plan, range(3))
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        report = make_cache(plan, SOURCE, survey=survey, batch_size=4, num_workers=1, stop=stop)
    assert (report.shards_made, report.shards_accepted, report.shards_left) == (0, 0, 3)
    assert folder_bytes(tmp_path) == reference


def test_the_memory_in_flight_does_not_grow_with_the_shard(tmp_path):
    source = SmallSource(400)
    peaks = []
    for shard_size in (50, 400):
        tracemalloc.start()
        run_stage1(small_plan(tmp_path / str(shard_size), source, shard_size=shard_size), source, batch_size=10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # a row is 768 bytes; what grows is its checksum, its label and their places in the record
    assert peaks[1] < peaks[0] + 350 * 400
