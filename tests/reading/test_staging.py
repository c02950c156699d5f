import contextlib
import errno
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from caches import make_test_cache
from workplace import at_call, send

import data_loader
from data_loader import build_pretraining_dataloader
from distillery.reading import open_shard, shard_files, staging
from distillery.reading.staging import next_copy, plan_lines
from distillery.system.errors import MissingFileError, RunError, UserError
from distillery.training import engine
from tests.reading.test_shard_files import flip_bit

NUM_ROWS, SHARD_ROWS = 80, 8
SHARDS = NUM_ROWS // SHARD_ROWS


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Look for work and for copies as often as there is time."""
    monkeypatch.setattr(staging, "_LOOK_S", 0.005)
    monkeypatch.setattr(shard_files, "_PRESENCE_CHECK_S", 0.0)


@pytest.fixture
def cache(request, tmp_path) -> Path:
    dtype = getattr(request, "param", "float32")
    make_test_cache(tmp_path / "cache", NUM_ROWS, shard_size=SHARD_ROWS, dtype=dtype, size=8)
    return tmp_path / "cache"


of_both_kinds = pytest.mark.parametrize("cache", ["float32", "jpeg"], indirect=True)


@pytest.fixture
def stage(cache) -> Path:
    """What every loader of this file stages to."""
    return cache.parent / "stage"


def build(cache: Path, stage: Path | None = None, **data):
    places = {"cache_dir": str(cache), "use_cached": True} | ({"stage_dir": str(stage)} if stage else {})
    return build_pretraining_dataloader(
        places | data, {"batch_size": 8, "max_steps_per_epoch": None}, with_indices=True
    )


def read(loader, epoch: int = 0) -> list[tuple[torch.Tensor, list[int]]]:
    loader.set_epoch(epoch)
    return [(images.clone(), global_idx.tolist()) for images, global_idx in loader]


def assert_same(batches, others) -> None:
    assert [global_idx for _, global_idx in batches] == [global_idx for _, global_idx in others]
    assert all(torch.equal(images, other) for (images, _), (other, _) in zip(batches, others, strict=True))


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.002)


def copies(stage: Path) -> set[str]:
    return {path.name for path in stage.glob("distillery-*/*.pt")}


def names_of(loader, epoch: int) -> set[str]:
    return {loader.shard_names[shard] for shard in loader.sampling.shards(epoch).tolist()}


def staged(loader, stage: Path, count: int = SHARDS):
    """The loader once so many copies are there."""
    loader.set_epoch(loader.epoch)
    wait_until(lambda: len(copies(stage)) == count)
    return loader


def open_copies(loader) -> int:
    return sum(opened.unchecked is not None for opened in loader._rows.files._open.values())


def killed_with_copies(cache: Path, stage: Path) -> Path:
    """The folder that a killed process leaves with all its copies."""
    if (pid := os.fork()) == 0:
        loader = staged(build(cache, stage), stage)  # held: dropped, it would remove its copies
        assert loader.staging
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (folder,) = stage.iterdir()
    assert len(copies(stage)) == SHARDS
    return folder


# ---- what is read ------------------------------------------------------------------------------------------------


@of_both_kinds
@pytest.mark.parametrize("read_mode", ["pread", "mmap"])
def test_batches_are_the_same_with_copies_and_come_from_them(cache, stage, read_mode):
    plain, loader = build(cache), staged(build(cache, stage, read_mode=read_mode), stage)
    for epoch in (0, 1):
        assert_same(read(loader, epoch), read(plain, epoch))
    assert open_copies(loader) == SHARDS
    loader.close()
    assert not any(stage.iterdir())
    assert_same(read(loader, 2), read(plain, 2))


def test_a_position_is_resumed_with_copies_as_without(cache, stage):
    whole, loader = read(build(cache), 3), build(cache, stage)
    loader.load_state_dict({"epoch": 3, "samples": 40})
    assert_same(read(staged(loader, stage), 3), whole[5:])
    loader.close()


def test_a_slow_cache_is_waited_for_without_copies_and_hardly_with_them(cache, stage, monkeypatch):
    preadv, requests = os.preadv, []

    def slow(fd, buffers, offset, *flags):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(cache)) and not flags:
            requests.append(fd)
            time.sleep(0.03)
        return preadv(fd, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", slow)
    shares, counts = [], []
    for loader in (build(cache, shards_per_epoch=4), build(cache, stage, shards_per_epoch=4)):
        if loader.staging:
            loader.set_epoch(0)
            wait_until(lambda: copies(stage) >= names_of(loader, 1))  # noqa: B023
        requests.clear()
        loader.set_epoch(1)
        began, waited = time.monotonic(), loader.wait_seconds
        for _ in loader:
            time.sleep(0.04)  # a step
        shares.append((loader.wait_seconds - waited) / (time.monotonic() - began))
        counts.append(len(requests))
        loader.close()
    assert shares[0] > 0.4 and shares[1] < shares[0] / 2
    # rows read one by one, against the shards of the epoch after this one, each read whole
    assert counts[0] >= 20 and counts[1] <= 4


# ---- which shards are copied -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "now, later, held, room, expected",
    [
        ([3, 1], [2], {}, 100, (3, [])),  # by first need
        ([3, 1], [2], {3: 10, 1: 10}, 100, (2, [])),  # then the next epoch's
        ([3, 1], [2], {3: 10, 1: 10}, 29, None),  # no room; those of this epoch stay
        ([3, 1], [2], {3: 10, 0: 10}, 20, (1, [0])),  # one that nobody needs goes
        ([3, 1], [2, 5], {3: 10, 2: 10, 5: 10}, 30, (1, [5])),  # of the next epoch's the last one goes
        ([3], [2, 5], {3: 10, 5: 10}, 20, None),  # the next epoch's do not take room from each other
        ([4, 1], [], {}, 15, (1, [])),  # one that is larger than the room is passed over
        ([3], [2], {0: 10, 7: 10, 9: 10}, 30, (3, [0])),  # no more go than have to
        ([], [], {3: 10}, 100, None),
    ],
)
def test_what_is_copied_next_and_what_gives_way(now, later, held, room, expected):
    assert next_copy(now, later, held, [10, 10, 10, 10, 20, 10, 10, 10, 10, 10], room) == expected


def test_copies_stay_within_the_room_and_follow_the_epochs(cache, stage):
    size = max(path.stat().st_size for path in cache.glob("*.pt"))
    loader = build(cache, stage, shards_per_epoch=2, shuffle="none", stage_gb=4.5 * size / 1e9)
    for epoch in range(6):
        wanted = names_of(loader, epoch) | names_of(loader, epoch + 1)
        loader.set_epoch(epoch)
        wait_until(lambda wanted=wanted: copies(stage) >= wanted)
        assert len(copies(stage)) <= 4
        read(loader, epoch)
    loader.close()


def test_what_an_epoch_has_used_up_makes_room_for_the_rest_of_it(cache, stage):
    size = max(path.stat().st_size for path in cache.glob("*.pt"))
    loader = build(cache, stage, shuffle="none", stage_gb=3.5 * size / 1e9)
    order = [loader.shard_names[shard] for shard in loader.sampling.order(0).spans()[0].tolist()]
    staged(loader, stage, 3)
    assert copies(stage) == set(order[:3])
    batches = iter(loader)
    for _ in range(5):  # 40 rows: five shards
        next(batches)
    wait_until(lambda: copies(stage) == set(order[5:8]))
    loader.close()


def test_a_shard_that_an_epoch_has_more_than_half_read_is_copied_for_the_next_one_alone(cache, stage):
    # mixed in one window, every shard of an epoch is in use from its first batch to its last
    loader = build(cache, stage, shards_per_epoch=5)
    loader.load_state_dict({"epoch": 0, "samples": 24})
    wait_until(lambda: copies(stage) == names_of(loader, 1))
    assert len(read(loader)) == 2
    loader.close()
    half = build(cache, stage)
    half.load_state_dict({"epoch": 0, "samples": 56})
    wait_until(lambda: len(copies(stage)) == SHARDS)  # the next epoch has the same ones
    half.close()


def test_an_epoch_keeps_its_copies_to_its_end_where_there_is_room_for_one_epoch(cache, stage):
    room = sum(path.stat().st_size for path in cache.glob("*.pt")) * 0.55
    loader = staged(build(cache, stage, shards_per_epoch=5, stage_gb=room / 1e9), stage, 5)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    time.sleep(0.1)  # many looks at what there is to do
    assert copies(stage) == names_of(loader, 0)
    next(batches)
    wait_until(lambda: copies(stage) == names_of(loader, 1))
    loader.close()


def test_a_removed_copy_takes_room_until_every_process_has_let_go_of_it(cache, stage, monkeypatch):
    monkeypatch.setattr(staging, "_LOOK_S", 0.3)
    size, link, sizes = max(path.stat().st_size for path in cache.glob("*.pt")), os.link, []
    loader = build(cache, stage, shards_per_epoch=3, shuffle="none", stage_gb=3.5 * size / 1e9)
    other = build(cache, stage, shards_per_epoch=3, shuffle="none")
    other.staging.may_copy = False

    def measured(*arguments, **options):
        open_files = {}
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                status, name = os.stat(f"/proc/self/fd/{fd}"), os.readlink(f"/proc/self/fd/{fd}")
                if name.startswith(str(stage)):
                    open_files[status.st_ino] = status.st_size
        named = {path.stat().st_ino: path.stat().st_size for path in stage.glob("distillery-*/*.pt")}
        sizes.append(sum((open_files | named).values()))
        return link(*arguments, **options)

    staged(loader, stage, 3)
    monkeypatch.setattr(os, "link", measured)
    other.set_epoch(0)
    wait_until(lambda: other.staging.files.copies)
    read(other)
    assert open_copies(other) == 3
    loader.set_epoch(1)
    wait_until(lambda: copies(stage) == names_of(loader, 1))
    assert sizes and max(sizes) <= 3.5 * size
    loader.close()
    other.close()


def test_a_look_at_the_first_images_moves_nothing(cache, stage):
    loader = build(cache, stage, shards_per_epoch=5)
    read(loader)
    place = loader.state_dict(), loader.staging._position
    images, global_idx = loader.peek(3)
    assert (loader.state_dict(), loader.staging._position) == place
    first, first_idx = next(iter(loader))
    assert torch.equal(images, first[:3]) and torch.equal(global_idx, first_idx[:3])
    loader.close()


# ---- several processes -------------------------------------------------------------------------------------------


def test_loaders_share_the_copies_and_the_last_one_removes_them(cache, stage):
    first = staged(build(cache, stage), stage)
    second = staged(build(cache, stage), stage)
    assert_same(read(second), read(first))
    assert len(first.staging.folder.held) == SHARDS and not second.staging.folder.held
    first.close()
    assert len(copies(stage)) == SHARDS
    wait_until(lambda: len(second.staging.folder.held) == SHARDS)  # it takes the copier's place
    second.close()
    assert not any(stage.iterdir())


def test_a_process_that_may_not_copy_reads_the_copies_of_one_that_does(cache, stage, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    other = build(cache, stage)
    monkeypatch.undo()
    monkeypatch.setattr(shard_files, "_PRESENCE_CHECK_S", 0.0)
    read(other)
    assert open_copies(other) == 0 and not copies(stage)
    first = staged(build(cache, stage), stage)
    read(other)
    assert open_copies(other) == SHARDS
    first.close()
    other.close()
    assert not any(stage.iterdir())


def test_a_forked_child_that_ends_leaves_the_copies(cache, stage):
    loader = staged(build(cache, stage), stage)
    if (pid := os.fork()) == 0:
        loader.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert len(copies(stage)) == SHARDS
    loader.close()


def test_a_loader_that_is_dropped_removes_its_copies(cache, stage):
    loader = staged(build(cache, stage), stage)
    del loader
    assert not any(stage.iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name == "stage-shards"]


def test_a_loader_that_is_closed_before_it_has_entered_the_folder_leaves_it_too(cache, stage, monkeypatch):
    enter, is_closed = staging.CopyFolder.enter, threading.Event()

    def late(folder):
        is_closed.wait()
        enter(folder)

    monkeypatch.setattr(staging.CopyFolder, "enter", late)
    monkeypatch.setattr(staging, "_LAST_BLOCK_S", 0.01)
    loader = build(cache, stage)
    loader.set_epoch(0)
    loader.close()
    is_closed.set()
    loader.staging._thread.join()
    assert not any(stage.iterdir())


def test_what_a_killed_run_left_is_hashed_before_it_counts(cache, stage, monkeypatch):
    folder = killed_with_copies(cache, stage)
    damaged, sound = folder / "images_shard_00003.pt", folder / "images_shard_00004.pt"
    flip_bit(damaged, 1000)
    (folder / "images_shard_00007.pt").write_bytes(b"short")
    (folder / "images_shard_99999.pt").write_bytes(b"of no list")
    (folder / ".images_shard_00009.pt.tmp-000000000000").write_bytes(b"half a copy")
    inode = sound.stat().st_ino
    loader = staged(build(cache, stage), stage)
    wait_until(lambda: len(loader.staging.folder.held) == SHARDS)
    assert sound.stat().st_ino == inode
    assert {path.name for path in folder.iterdir()} == copies(stage) | {"users", "copier"}
    assert damaged.read_bytes() == (cache / damaged.name).read_bytes()
    loader.close()


def test_what_a_killed_run_left_stays_within_the_room_of_the_next_one(cache, stage):
    size = max(path.stat().st_size for path in cache.glob("*.pt"))
    killed_with_copies(cache, stage)
    loader = build(cache, stage, stage_gb=3.5 * size / 1e9)
    loader.set_epoch(0)
    wait_until(lambda: len(copies(stage)) == 3)
    assert len(read(loader)) == SHARDS
    loader.close()


def test_what_killed_runs_left_of_other_caches_is_removed_and_what_others_use_stays(cache, stage, tmp_path):
    for name, num_rows in (("other", 40), ("third", 32)):
        make_test_cache(tmp_path / name, num_rows, shard_size=SHARD_ROWS)
    killed_with_copies(cache, stage)
    used = build(tmp_path / "other", stage)
    used.set_epoch(0)
    wait_until(lambda: list(stage.iterdir()) == [used.staging.folder.path] and len(copies(stage)) == 5)
    third = build(tmp_path / "third", stage)
    third.set_epoch(0)
    wait_until(lambda: len(list(stage.glob("distillery-*/*.pt"))) == 5 + 4)
    used.close()
    third.close()
    assert not any(stage.iterdir())


# ---- trouble -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["write", "fsync", "link", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EACCES])
def test_a_stage_disk_that_fails_is_one_line_and_the_cache_is_read(cache, stage, monkeypatch, capfd, name, number):
    expected, call = read(build(cache)), getattr(os, name)

    def failing(*arguments, **options):
        thread = threading.current_thread().name
        is_writing = name != "open" or arguments[1] & os.O_CREAT and ".tmp-" in str(arguments[0])
        if thread == "stage-shards" and is_writing and len(copies(stage)) >= 3:
            raise OSError(number, os.strerror(number), str(stage))
        return call(*arguments, **options)

    monkeypatch.setattr(os, name, failing)
    loader = build(cache, stage)
    assert_same(read(staged(loader, stage, 3)), expected)
    wait_until(lambda: loader.staging.folder._has_said)
    assert_same(read(loader), expected)
    loader.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("stage_dir: ") and os.strerror(number) in line
    assert not any(stage.iterdir())


def test_a_disk_that_is_full_for_a_while_is_tried_again_and_costs_no_needed_copy(cache, stage, monkeypatch, capfd):
    monkeypatch.setattr(staging, "_FULL_DISK_S", 0.05)
    write, attempts, is_full = os.write, [], False

    def failing(fd, *rest):
        if is_full and threading.current_thread().name == "stage-shards":
            attempts.append(fd)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, *rest)

    monkeypatch.setattr(os, "write", failing)
    room = sum(path.stat().st_size for path in cache.glob("*.pt")) * 0.85
    loader = staged(build(cache, stage, shards_per_epoch=4, stage_gb=room / 1e9), stage, 8)
    needed = copies(stage) & (names_of(loader, 1) | names_of(loader, 2))
    is_full = True
    loader.set_epoch(1)
    wait_until(lambda: attempts)
    left = copies(stage)
    wait_until(lambda: len(attempts) >= 4)
    assert copies(stage) == left >= needed
    is_full = False
    loader.set_epoch(2)
    wait_until(lambda: copies(stage) >= names_of(loader, 2) | names_of(loader, 3))
    loader.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "No space left on device" in line and "copying is tried again every" in line


def test_a_stage_disk_that_fails_from_the_start_is_one_line_and_the_cache_is_read(cache, stage, monkeypatch, capsys):
    stat = os.stat

    def failing(path, *rest, **options):
        if str(path).startswith(str(stage)):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, *rest, **options)

    monkeypatch.setattr(os, "stat", failing)
    loader = build(cache, stage)
    assert f"  stage_dir: {stage}: Input/output error: nothing is staged\n" in capsys.readouterr().out
    assert loader.staging is None and len(read(loader)) == SHARDS


@pytest.mark.parametrize("shards_per_epoch", [3, SHARDS])  # with all of them held there is nothing left to copy
def test_a_stage_folder_that_vanishes_or_is_not_ours_is_no_error(cache, stage, capfd, tmp_path, shards_per_epoch):
    expected = read(build(cache))
    loader = build(cache, stage, shards_per_epoch=shards_per_epoch)
    staged(loader, stage, min(2 * shards_per_epoch, SHARDS))
    shutil.rmtree(stage)
    read(loader, 1)
    loader.set_epoch(2)
    wait_until(lambda: loader.staging.folder._has_said)
    loader.close()
    (tmp_path / "elsewhere").mkdir()
    stage.mkdir()
    (stage / loader.staging.folder.path.name).symlink_to(tmp_path / "elsewhere")
    other = build(cache, stage)
    assert_same(read(other), expected)
    wait_until(lambda: other.staging.folder._has_said)
    other.close()
    assert len(capfd.readouterr().err.splitlines()) == 2 and not any((tmp_path / "elsewhere").iterdir())


@of_both_kinds
@pytest.mark.parametrize("read_mode", ["pread", "mmap"])
def test_a_copy_that_is_damaged_later_is_left_for_the_cache_which_decides(cache, stage, capfd, read_mode):
    expected, loader = read(build(cache)), build(cache, stage, read_mode=read_mode)
    read(loader)  # from the cache or from copies: each file's rows count as checked for that file alone
    staged(loader, stage)
    files = loader._rows.files
    offset = files._offset(files.layout(2), 3)
    (folder,) = stage.iterdir()
    files._open.clear()
    flip_bit(folder / "images_shard_00002.pt", offset)
    os.truncate(folder / "images_shard_00006.pt", loader.index.shard_bytes[6] // 2)
    assert_same(read(loader), expected)
    (line,) = capfd.readouterr().err.splitlines()
    assert "images_shard_00002.pt" in line and "The cache itself is read instead" in line
    # the damage is in the cache too
    flip_bit(cache / "images_shard_00002.pt", offset)
    other = build(cache, stage)
    with pytest.raises(UserError, match=r"images_shard_00002\.pt: row 3 .* is damaged"):
        read(other)
    other.close()
    loader.close()


def test_a_copy_that_cannot_be_mapped_is_left_for_the_cache(cache, stage, monkeypatch, capfd):
    expected, mmap = read(build(cache)), open_shard.mmap.mmap

    def failing(fd, *rest, **options):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(stage)):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        return mmap(fd, *rest, **options)

    loader = staged(build(cache, stage, read_mode="mmap"), stage)
    monkeypatch.setattr(open_shard.mmap, "mmap", failing)
    assert_same(read(loader), expected)
    loader.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "No such device" in line


def test_a_shard_that_cannot_be_copied_is_reported_by_whoever_reads_it(cache, stage, capfd):
    flip_bit(cache / "images_shard_00001.pt", 3000)
    loader = staged(build(cache, stage, shuffle="none"), stage, SHARDS - 1)
    with pytest.raises(UserError, match=r"images_shard_00001\.pt: row "):
        read(loader)
    (cache / "images_shard_00001.pt").unlink()
    with pytest.raises(MissingFileError, match="images_shard_00001"):
        read(loader)
    loader.close()
    assert "stage_dir" not in capfd.readouterr().err


def test_a_shard_whose_record_is_lost_is_not_copied_and_a_line_says_so(cache, stage, capfd):
    expected = read(build(cache))
    (cache / "images_shard_00001.json").unlink()
    loader = staged(build(cache, stage), stage, SHARDS - 1)
    wait_until(lambda: loader.staging.folder._has_said)
    assert_same(read(loader), expected)
    loader.close()
    (line,) = capfd.readouterr().err.splitlines()
    assert "images_shard_00001.json cannot be read" in line and f"verify {cache}" in line


def test_a_cache_that_fails_with_eio_is_the_readers_error(cache, stage, monkeypatch, capfd):
    preadv = os.preadv

    def failing(fd, *rest):
        if os.readlink(f"/proc/self/fd/{fd}") == str(cache / "images_shard_00001.pt"):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(fd, *rest)

    monkeypatch.setattr(os, "preadv", failing)
    loader = staged(build(cache, stage), stage, SHARDS - 1)
    with pytest.raises(RunError, match="images_shard_00001"):
        read(loader)
    loader.close()
    assert "stage_dir" not in capfd.readouterr().err


# ---- what the user sees ------------------------------------------------------------------------------------------


def test_the_console_says_what_is_staged_and_what_is_not(cache, stage, tmp_path, capsys, monkeypatch):
    build(cache, stage, shards_per_epoch=3, stage_gb=1e-5)
    line = f"staging to {stage}: the 3 shards of an epoch are 25.6 kB, room for 10.0 kB; those that do not fit are read"
    assert line in capsys.readouterr().out
    images = torch.randn(16, 3, 8, 8)
    (tmp_path / "old").mkdir()
    torch.save({"images": images}, tmp_path / "old" / "images_shard_00000.pt")
    shard = '{"shards": [{"shard_path": "images_shard_00000.pt", "num_samples": 16, "global_start": 0}]}'
    (tmp_path / "old" / "index.json").write_text(shard)
    assert build(tmp_path / "old", stage).staging is None
    assert "nothing is staged, as the predecessor's caches have no hashes" in capsys.readouterr().out
    monkeypatch.setattr(data_loader, "is_network_file_system", lambda path: True)
    for place, is_advised in ((cache, True), (tmp_path / "old", False)):
        build(place)
        assert ("--set stage_dir=FOLDER" in capsys.readouterr().out) is is_advised


def test_a_plan_says_what_staging_costs_and_when_it_does_not_pay(cache, stage):
    loader = build(cache, shards_per_epoch=4)
    first, second = plan_lines(loader.index, loader.sampling, stage, 10**9)
    assert f"staging: 34.2 kB copied to {stage} an epoch until all 85.4 kB are there: 4 files" in first
    assert "It takes 68.3 kB of disk to have the next epoch's ready too, and there is room for 1.0 GB" in first
    assert "the cache gives" in second
    assert f"{stage} once: 10 files" in plan_lines(loader.index, build(cache).sampling, stage, 10**9)[0]
    capped = build_pretraining_dataloader({"cache_dir": str(cache)}, {"batch_size": 8, "max_steps_per_epoch": 3})
    assert "advice: an epoch reads 30%" in plan_lines(capped.index, capped.sampling, stage, 10**9)[-1]
    assert not stage.exists()


def test_a_stage_dir_that_cannot_be_one_is_an_error_of_one_line(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(cache)
    for place, message in [
        (cache, "which lies in cache_dir"),
        (cache / "stage", "which lies in cache_dir"),
        (tmp_path / "link" / "stage", "which lies in cache_dir"),
        (tmp_path / "file", "which is no folder"),
        ("$NO_SUCH_DIR/stage", r"environment variable \$NO_SUCH_DIR is not set"),
    ]:
        with pytest.raises(UserError, match=message):
            build(cache, place)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_run_with_copies_is_the_run_without_also_when_it_is_killed(place, tmp_path):
    from tests.faults.training import SHORT, assert_same_run, start

    stage, note = tmp_path / "stage", tmp_path / "note"

    def copies_then_kill():
        read_copy = shard_files.ShardFiles._read_copy

        def noted(*arguments):
            is_read = read_copy(*arguments)
            note.write_text(str(is_read))
            return is_read

        shard_files.ShardFiles._read_copy = noted
        at_call(engine, "forward_losses", 1, lambda: wait_until(lambda: len(copies(stage)) == 4))
        at_call(engine, "forward_losses", 7, send(signal.SIGKILL))

    plain, run_dir = tmp_path / "plain", tmp_path / "run"
    settings = SHORT | {"eval_every_epochs": 0}
    straight = start(place, plain, settings)
    assert straight.wait() == 0, straight.text
    settings |= {"stage_dir": stage}
    killed = start(place, run_dir, settings, before=copies_then_kill)
    assert killed.wait() == -signal.SIGKILL, killed.text
    assert note.read_text() == "True"  # its rows came from copies
    stopped = start(place, run_dir, settings, before=lambda: at_call(engine, "forward_losses", 2, send(signal.SIGTERM)))
    assert stopped.wait() == 75, stopped.text
    assert "staging to" in stopped.text and not any(stage.iterdir())
    again = start(place, run_dir, settings)
    assert again.wait() == 0, again.text
    assert not any(stage.iterdir())
    assert_same_run(plain, run_dir)
