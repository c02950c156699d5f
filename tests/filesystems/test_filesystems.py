"""Stage 1, verify, training and staging on file systems that the other tests do not meet: XFS, btrfs, sshfs.

make test-filesystems
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import wait_until
from stage1 import folder_bytes
from training import assert_same_run
from workplace import ROOT, Workplace, run

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("TEST_FILESYSTEMS"),
        reason="mounts file systems (and installs their programs where they are missing): run make test-filesystems",
    ),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount"),
]
KILLS = 6
NUM_SHARDS = 20
# some seconds of training
TRAINING = {"num_epochs": 6, "eval_every_epochs": 3, "save_every": 7, "log_every": 1}


def sets(values: dict) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def start(script: str, *arguments: str) -> subprocess.Popen:
    """One of the two commands, in a process group of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / script), *arguments],
        env=environment, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_when(process: subprocess.Popen, condition: Callable[[], bool], delay_s: float = 0.0) -> None:
    """SIGKILL to a command and its workers, delay_s after the condition holds; an error where it ends before that."""
    try:
        deadline = time.monotonic() + 120
        while not condition():
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(delay_s)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="session")
def source(tmp_path_factory, png_images) -> Workplace:
    """480 images on the ordinary disk, and a cache of them there: 20 shards of 1.2 MB."""
    place = Workplace(tmp_path_factory.mktemp("source"), png_images * 5)
    done = place.precompute(*sets({"image_size": 64, "eval_datasets": "{}", "num_workers": 2}))
    assert done.returncode == 0, done.stderr
    return place


def stage1_flags(source: Workplace, cache: Path) -> list[str]:
    values = {"image_size": 64, "eval_datasets": "{}", "num_workers": 2, "cache_dir": cache}
    return [*source.flags("data"), *sets(values)]


def num_shards(cache: Path) -> int:
    """Shards that are published."""
    return len(list(cache.glob("images_shard_*.pt"))) if cache.exists() else 0


def test_stage_1_killed_at_random_moments_ends_byte_for_byte_like_on_the_ordinary_disk(folder, source):
    cache, rng, kills = folder / "cache", random.Random(0), 0
    while kills < KILLS and num_shards(cache) < NUM_SHARDS - 4:
        until, delay_s = num_shards(cache) + rng.randint(0, 3), rng.random() * 0.03
        process = start("precompute_cache.py", *stage1_flags(source, cache))
        kill_when(process, lambda until=until: cache.exists() and num_shards(cache) >= until, delay_s)
        kills += 1
    done = run("precompute_cache.py", *stage1_flags(source, cache))
    assert done.returncode == 0, done.stderr
    assert kills >= 4 and folder_bytes(cache) == folder_bytes(source.folder / "cache")


def holds_the_same(cache: Path, other: Path) -> bool:
    try:
        return folder_bytes(cache) == folder_bytes(other)
    except FileNotFoundError:  # a file is listed that is gone
        return False


def run_at_once(nodes: list[Path], source: Workplace, shares: list[list[str]]) -> None:
    """A stage 1 on each node at the same time, with its flags of shares; then the cache is as it shall be."""
    jobs = [
        start("precompute_cache.py", *stage1_flags(source, node / "cache"), *share)
        for node, share in zip(nodes, shares, strict=True)
    ]
    for job in jobs:
        output, _ = job.communicate(timeout=120)
        assert job.returncode == 0, output
    # for 20 s, sshfs may show a node what it knows from before
    assert wait_until(lambda: holds_the_same(nodes[0] / "cache", source.folder / "cache"), timeout_s=40)


def test_array_jobs_at_once_on_several_nodes_make_the_cache_of_one_on_the_ordinary_disk(nodes, source):
    count = str(len(nodes))
    run_at_once(nodes, source, [["--num_jobs", count, "--job_id", str(number)] for number in range(len(nodes))])


def test_elastic_array_jobs_at_once_on_several_nodes_make_the_same_cache(nodes, source):
    run_at_once(nodes, source, [["--num_jobs", "auto"] for _ in nodes])


def test_verify_finds_a_flipped_bit_and_stage_1_repairs_it(folder, source):
    cache = folder / "cache"
    assert run("precompute_cache.py", *stage1_flags(source, cache)).returncode == 0
    sound = run("distillery.verify", str(cache))
    assert sound.returncode == 0, sound.stdout + sound.stderr
    shard = cache / "images_shard_00007.pt"
    with open(shard, "r+b") as file:
        file.seek(300_000)
        byte = file.read(1)[0]
        file.seek(300_000)
        file.write(bytes([byte ^ 1]))
    damaged = run("distillery.verify", str(cache))
    assert damaged.returncode == 1 and shard.name in damaged.stdout
    assert run("precompute_cache.py", *stage1_flags(source, cache)).returncode == 0
    assert folder_bytes(cache) == folder_bytes(source.folder / "cache")


def training_flags(place: Workplace, cache: Path, run_dir: Path, **values: object) -> list[str]:
    overrides = TRAINING | {"cache_dir": cache, "checkpoint_dir": run_dir} | values
    return [*place.flags("data", "train", "model"), "--device", "cpu", *sets(overrides)]


@pytest.fixture(scope="session")
def straight(place, tmp_path_factory) -> Path:
    """The folder of an uninterrupted run on the ordinary disk."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = run("distill_trainer.py", *training_flags(place, place.folder / "cache", run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """(step, loss) of the rows that are written."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row["loss"]) for row in rows if row["kind"] == "train"]


def test_training_killed_and_resumed_equals_the_straight_run_on_the_ordinary_disk(folder, place, straight):
    cache, run_dir = folder / "cache", folder / "run"
    assert place.precompute(*sets({"cache_dir": cache})).returncode == 0
    flags = training_flags(place, cache, run_dir)
    kill_when(start("distill_trainer.py", *flags), lambda: len(losses(run_dir)) >= 20)
    done = run("distill_trainer.py", *flags)
    assert done.returncode == 0, done.stderr
    assert_same_run(straight, run_dir)


def test_training_with_stage_dir_on_the_ordinary_disk_has_the_losses_of_one_without(folder, place, straight, tmp_path):
    cache, run_dir = folder / "cache", folder / "run"
    assert place.precompute(*sets({"cache_dir": cache})).returncode == 0
    done = run("distill_trainer.py", *training_flags(place, cache, run_dir, stage_dir=tmp_path / "stage"))
    assert done.returncode == 0, done.stderr
    assert losses(run_dir) == losses(straight)
