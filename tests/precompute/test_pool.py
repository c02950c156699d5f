import io
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stage1 import MEAN, STD, SmallSource, folder_bytes, run_stage1, small_plan

from distillery.precompute import pool as pool_module
from distillery.precompute.pool import SLOT_BYTES, InlinePool, Slots, memory_bytes, needs_resampler, split_into_units
from distillery.precompute.worker import Unit
from distillery.sources.pixels import PreprocessSpec
from distillery.system.errors import RunError, UserError

ROOT = Path(__file__).resolve().parents[2]


def encode(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_images_are_all_images_in_order_and_none_is_larger_than_allowed(seed):
    rng = np.random.default_rng(seed)
    images = [bytes(int(size)) for size in rng.integers(0, 30, rng.integers(0, 40))]
    most_rows = 1 + seed % 4
    runs = list(split_into_units(images, pool_module.STORED_BYTES // most_rows, 25))
    assert [image for run in runs for image in run] == images
    assert all(run and (len(run) == 1 or sum(map(len, run)) <= 25) and len(run) <= most_rows for run in runs)


def test_a_row_larger_than_the_memory_of_a_unit_is_a_unit_of_its_own(monkeypatch):
    assert list(split_into_units([b"a", b"b"], pool_module.STORED_BYTES + 1)) == [[b"a"], [b"b"]]
    assert pool_module.stored_bytes_of(pool_module.STORED_BYTES + 1) > pool_module.STORED_BYTES + 4096


def test_a_slot_gives_back_what_was_put_into_it_and_touches_no_other():
    slots = Slots(3, SLOT_BYTES, 8192, pool_module.create_shared_memory(3 * (SLOT_BYTES + 8192)))
    images = [os.urandom(size) for size in (SLOT_BYTES - 10, 0, 9, 1)]
    slots.fill(1, images)
    assert slots.read(1, [len(image) for image in images]) == images
    slots.stored(1)[:] = b"x" * 8192
    assert slots.read(1, [len(image) for image in images]) == images
    assert not any(slots.read(0, [SLOT_BYTES])[0]) and not any(slots.read(2, [SLOT_BYTES])[0])
    assert not any(slots.stored(0)) and not any(slots.stored(2)) and slots.stored(1) == b"x" * 8192
    slots.close()


def test_rows_of_units_stay_until_they_are_released_and_the_memory_is_as_planned():
    pool, spec = InlinePool(192), PreprocessSpec(8, "squash", "lanczos", MEAN, STD)
    images, gaps = SmallSource().images[:3], (0, 8, 99)
    works = [pool.submit(Unit(0, [data] * 2, spec, "uint8"), gap) for data, gap in zip(images, gaps, strict=True)]
    for data, work, gap in zip(images, works, gaps, strict=True):
        pixels = np.asarray(Image.open(io.BytesIO(data))).transpose(2, 0, 1)
        assert work.memory[gap:] == np.stack([pixels, pixels]).tobytes()
        assert len(work.future.result().checksums) == 2
    pool.release(works[0])
    assert pool.submit(Unit(0, [b""], spec, "uint8"), 0).slot == works[0].slot
    assert {pool.submit(Unit(0, [b""], spec, "uint8"), 0).slot for _ in range(2)} == {0, 1}
    assert memory_bytes(1, 192) == 8 * (SLOT_BYTES + (16 << 20) + 4096)
    pool.close()


def test_a_limit_on_file_sizes_below_the_shared_memory_is_a_message_and_leaves_no_descriptor():
    before, limits = len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(UserError, match=r"share 2.1 MB of memory.*ulimit -f.*num_workers: 1"):
            pool_module.create_shared_memory(2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "images, interpolation, expected",
    [
        ([(8, 8), (8, 8)], "bicubic", False),
        ([(8, 8), (8, 9)], "bicubic", True),
        ([(9, 8)], "bilinear", True),
        ([(9, 8)], "lanczos", False),
        ([], "bicubic", False),
    ],
)
def test_torch_is_asked_for_only_where_something_must_be_resized_by_it(images, interpolation, expected):
    spec = PreprocessSpec(8, "squash", interpolation, MEAN, STD)
    assert needs_resampler(spec, [b"no image", *(encode(*shape) for shape in images)]) == expected


def test_images_larger_than_a_slot_become_the_same_rows(tmp_path, monkeypatch):
    source = SmallSource()
    run_stage1(small_plan(tmp_path / "a", source), source)
    monkeypatch.setattr(pool_module, "SLOT_BYTES", 4096)
    monkeypatch.setattr(
        source, "images", [data + bytes(5000) if i % 2 else data for i, data in enumerate(source.images)]
    )
    run_stage1(small_plan(tmp_path / "b", source), source, num_workers=2)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def stage1_process(folder: Path) -> subprocess.Popen:
    """Two decode workers at work on many small units."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests/support/stage1.py"), str(folder), "--num_workers", "2", "--num_rows", "4000",
         "--slow_s", "0.02"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == b"ready\n"
    wait_until(lambda: len(session_of(process.pid)) >= 4 and any(folder.glob("images_shard_00001.json")))
    return process


def session_of(leader: int) -> list[int]:
    """The living processes of a session: the program, the fork server, the workers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, rest = status.read_text().rpartition(")")
        except OSError:
            continue
        fields = rest.split()
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(name.split()[0]))
    return found


def wait_until(condition, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nobody_outlives_a_killed_main_process(tmp_path):
    process = stage1_process(tmp_path / "cache")
    process.kill()
    process.wait()
    wait_until(lambda: not session_of(process.pid), 10)
    process.stdout.close()


def test_signals_to_the_whole_group_end_the_run_as_one_to_the_main_process_does(tmp_path):
    process = stage1_process(tmp_path / "cache")
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 75
    wait_until(lambda: not session_of(process.pid), 10)
    assert not list((tmp_path / "cache").glob(".*tmp*"))
    process.stdout.close()


def test_a_killed_worker_ends_the_run_with_a_message_and_no_hang(tmp_path, monkeypatch):
    class KillsAWorker(SmallSource):
        reads = 0

        def read(self, start, stop):
            self.reads += 1
            if self.reads == 3:
                os.kill(next(iter(pools[0]._executor._processes)), signal.SIGKILL)
                time.sleep(0.2)
            return super().read(start, stop)

    pools, original = [], pool_module.ProcessPool.__init__

    def note(self, *args, **options):
        pools.append(self)
        original(self, *args, **options)

    monkeypatch.setattr(pool_module.ProcessPool, "__init__", note)
    source = KillsAWorker(200)
    with pytest.raises(RunError, match="a decode worker was killed"):
        run_stage1(small_plan(tmp_path, source), source, num_workers=2)
    run_stage1(small_plan(tmp_path, source), source, num_workers=2)
    assert not list(tmp_path.glob(".*tmp*"))
