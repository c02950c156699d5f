"""No room, no quota, failing storage: a clean stop, everything published intact, and on it goes once that is over."""

import errno
import itertools
import os
import re
import resource
import shutil
import subprocess

import numpy as np
import pytest
from processes import FINISHED, fork, wait
from scale import SCALE, scaled
from stage1 import SmallSource, folder_bytes, run_stage1, small_plan
from syscalls import watched

from distillery.cache.folder import load_index
from distillery.cache.verify import verify_cache
from distillery.reading.shard_files import ShardFiles
from distillery.system.errors import RunError, UserError

KB = 1 << 10


@pytest.fixture(scope="module")
def big_source() -> SmallSource:
    """40 images of 64 px: shards of 400 kB, 2 MB in all."""
    return SmallSource(40, size=64)


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a tmpfs of so many KiB, always the same one."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount_point)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")

    def resize(kib: int):
        subprocess.run(["mount", "-o", f"remount,size={kib}k", str(mount_point)], check=True)
        return mount_point

    yield resize
    subprocess.run(["umount", str(mount_point)], check=True)


@pytest.mark.parametrize("shards", [3, 2])
def test_a_read_only_file_system_serves_a_finished_cache_and_refuses_to_go_on_with_another(
    small_disk, source, tally, shards
):
    disk = small_disk(1024)
    plan = small_plan(disk / "cache", source)
    run_stage1(plan, source, range(shards))
    (disk / "cache" / ".index.json.tmp-0123456789ab").write_bytes(b"left by a killed run")
    before = folder_bytes(plan.directory)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    try:
        if shards == 3:
            assert run_stage1(plan, source)[0].shards_left == 0
        else:
            with pytest.raises(UserError, match="cannot be written to .*Read-only file system.*Training reads it"):
                run_stage1(plan, source)
        index = load_index(plan.directory)
        out = np.zeros((4, index.row_bytes), np.uint8)
        ShardFiles(index).read(np.zeros(4, np.int64), np.arange(4), out)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert folder_bytes(plan.directory) == before
    tally["read-only file systems"] += 1


def check_all_published_is_intact(directory, reference) -> None:
    for name, data in folder_bytes(directory).items() if directory.exists() else ():
        assert not name.startswith("."), f"{name} is left over"
        if name.startswith("images_"):
            assert data == reference[name], f"{name} is torn"


def test_a_full_disk_stops_stage_1_cleanly_wherever_it_strikes(small_disk, folder, big_source, tally):
    reference_plan = small_plan(folder / "reference", big_source)
    run_stage1(reference_plan, big_source)
    reference = folder_bytes(folder / "reference")
    needed = sum(len(data) for data in reference.values())
    stopped_after = set()
    step = max(4, round(128 / SCALE))
    plan = small_plan(small_disk(64) / "cache", big_source)
    for kib in range(64, needed // KB + 512, step):
        shutil.rmtree(plan.directory, ignore_errors=True)
        small_disk(kib)
        try:
            run_stage1(plan, big_source)
        except RunError as error:
            said = re.search(
                r"the disk is full .* (\d) shards are left to make: (\d+) bytes .* needed, (\d+) bytes", str(error)
            )
            assert said, error
            left = int(said[1])
            assert int(said[2]) == left * 8 * plan.row_bytes
            stopped_after.add(5 - left)
            tally["disk full"] += 1
        check_all_published_is_intact(plan.directory, reference)
        small_disk(8 * needed // KB)
        run_stage1(plan, big_source)
        assert folder_bytes(plan.directory) == reference
    assert len(stopped_after) >= 3


def test_a_full_disk_fills_up_shard_by_shard_and_every_shard_is_kept(small_disk, big_source, tally):
    plan = small_plan(small_disk(64) / "cache", big_source)
    kib, published = 64, 0
    while True:
        small_disk(kib)
        try:
            run_stage1(plan, big_source)
            break
        except RunError:
            tally["disk full"] += 1
        shards = len(list(plan.directory.glob("*.pt")))
        assert shards >= published
        published, kib = shards, kib + 200
    assert verify_cache(plan.directory) == []


def test_a_file_size_limit_is_a_message_and_on_it_goes_when_it_is_lifted(folder, big_source, tally):
    plan = small_plan(folder / "cache", big_source)
    run_stage1(small_plan(folder / "reference", big_source), big_source)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 * KB, resource.RLIM_INFINITY))
        with pytest.raises(RunError, match=r"a file-size limit \(ulimit -f\) was reached .* 5 shards are left"):
            run_stage1(plan, big_source)

    assert wait(fork(limited)) == FINISHED
    assert folder_bytes(plan.directory) == {}
    run_stage1(plan, big_source)
    assert folder_bytes(plan.directory) == folder_bytes(folder / "reference")
    tally["file-size limit"] += 1


def run_with_error(plan, source, number: int, first: int, last: int, names) -> tuple[str, int]:
    """Stage 1 whose first..last-th changes of the disk fail with an errno; (its message or "", how many failed)."""
    failed = [0]

    def around(n, name, call, *args):
        if first <= n <= last:
            failed[0] += 1
            if name in ("write", "pwrite"):
                call(args[0], args[1][: len(args[1]) // 2], *args[2:])  # what a real one leaves behind
            elif name == "close":
                call(*args)  # the descriptor is gone all the same
            raise OSError(number, os.strerror(number))
        return call(*args)

    try:
        with watched(around, names):
            run_stage1(plan, source)
    except RunError as error:
        return str(error), failed[0]
    return "", failed[0]


MESSAGES = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EIO: "Input/output error"}


@pytest.mark.parametrize("kind", ["once", "for ever"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_the_nth_write_fsync_or_close_that_fails_publishes_nothing_doubtful(
    folder, source, reference, tally, number, kind
):
    names = ("open", "write", "pwrite", "ftruncate", "fsync", "link", "replace", "close")
    plan = small_plan(folder / "cache", source)
    made_good = 0
    for first in itertools.count(1):
        shutil.rmtree(plan.directory, ignore_errors=True)
        message, failed = run_with_error(plan, source, number, first, first if kind == "once" else 10**9, names)
        if failed == 0:
            break
        check_all_published_is_intact(plan.directory, reference)
        if message == "":
            # made good in a new file, from the data; or only calls after the last byte was safe have failed
            assert folder_bytes(plan.directory) == reference
            made_good += 1
        else:
            assert MESSAGES[number] in message
            assert "everything published" in message.lower()
        run_stage1(plan, source)
        assert folder_bytes(plan.directory) == reference
        tally[f"the n-th change of the disk fails {kind} with {errno.errorcode[number]}"] += 1
    assert first > 40
    if number == errno.EIO and kind == "once":
        assert made_good >= first - 3  # all but the fsync of the folder above


def test_a_failed_fsync_is_never_tried_again_on_the_same_file(folder, source, reference):
    for failing in ("pt", "json"):
        synced = []

        def around(_n, _name, call, *args, failing=failing, synced=synced):
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            if f".{failing}.tmp-" in path:
                synced.append(path)
                if len(synced) == 1:
                    raise OSError(errno.EIO, "lost")
            return call(*args)

        plan = small_plan(folder / failing, source)
        with watched(around, ("fsync",)):
            run_stage1(plan, source)
        assert synced.count(synced[0]) == 1
        assert len(synced) >= 4
        assert folder_bytes(plan.directory) == reference


def test_purged_shards_are_made_again(folder, source, reference, tally, rng):
    """Scratch file systems delete what was not read for weeks, in no order."""
    plan = small_plan(folder / "cache", source)
    run_stage1(plan, source)
    for _ in range(scaled(15)):
        for path in list(plan.directory.iterdir()):
            if rng.random() < 0.4:
                path.unlink()
                tally["files purged"] += 1
        run_stage1(plan, source)
        assert folder_bytes(plan.directory) == reference
