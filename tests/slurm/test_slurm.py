"""The batch scripts on a real Slurm: requeued, preempted, cancelled, and the result is the one of a run left in peace.

make test-slurm
"""

import json
import re
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from workplace import ROOT, Workplace, assert_same_tensors, comparable, run

from distillery.cache.lease_names import list_leases

TRAIN = str(ROOT / "slurm" / "train.sbatch")
PRECOMPUTE = str(ROOT / "slurm" / "precompute.sbatch")
NUM_EPOCHS = 25
# some seconds, long enough to be interrupted twice; on this Slurm there is no GPU to ask for
FLAGS = [
    "--device",
    "cpu",
    "--set",
    f"num_epochs={NUM_EPOCHS}",
    "--set",
    "eval_every_epochs=0",
    "--set",
    "save_every=0",
]
OPTIONS = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=100", "--time=10"]


def last_row(run_dir: Path) -> int:
    """The last step that stands in the metrics; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def view(run_dir: Path) -> Workplace:
    place = Workplace.__new__(Workplace)
    place.folder = run_dir.parent
    return place


def assert_same_run(one: Path, other: Path) -> None:
    a, b = (view(path).last_checkpoint(path.name) for path in (one, other))
    for key in ("student", "heads", "optimizer", "progress", "rng", "target_statistics"):
        assert_same_tensors(a[key], b[key])
    rows = [[comparable(row) for row in view(path).rows("train", path.name)] for path in (one, other)]
    assert rows[0] == rows[1]


class Training:
    """slurm/train.sbatch over a workplace."""

    def __init__(self, slurm, place: Workplace, folder: Path, straight: Path) -> None:
        self.slurm, self.place, self.straight = slurm, place, straight
        self.run_dir, self.log = folder / "run", folder / "log"

    def submit(self, *options: str, batch_size: int = 8, **variables: str) -> str:
        folder = self.place.folder
        configs = {f"{name.upper()}_CONFIG": str(folder / f"{name}.yaml") for name in ("data", "train", "model")}
        variables = configs | {"RUN_DIR": str(self.run_dir)} | variables
        flags = [*FLAGS, "--set", f"batch_size={batch_size}"]
        return self.slurm.submit(self.log, *OPTIONS, *options, TRAIN, *flags, **variables)

    def until_step(self, step: int) -> None:
        self.slurm.until(lambda: last_row(self.run_dir) >= step, self.log.read_text)

    def until_restart(self, job: str, number: int) -> None:
        self.slurm.until(lambda: self.slurm.show(job)["Restarts"] == str(number), self.log.read_text)

    def starts(self) -> list[str]:
        """What the log says of every start of the job: "job 7 restart 0"."""
        return re.findall(r"^== \S+ \S+ (job \d+ restart \d+) on ", self.log.read_text(), re.MULTILINE)


@pytest.fixture(scope="session")
def straight(slurm, place, tmp_path_factory) -> Path:
    """The run folder of the same training without Slurm and without an interruption."""
    run_dir = tmp_path_factory.mktemp("straight") / "run"
    done = place.distill(*FLAGS, "--set", f"checkpoint_dir={run_dir}")
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture
def training(slurm, place, tmp_path, straight) -> Training:
    return Training(slurm, place, tmp_path, straight)


def test_training_requeued_by_a_signal_and_preempted_goes_on_until_it_equals_the_straight_run(training, tmp_path):
    slurm, job = training.slurm, training.submit("--partition=low")
    training.until_step(20)
    slurm.call("scancel", "--signal=USR1", job)  # as --signal=USR1@120 does before the time is up
    training.until_restart(job, 1)
    training.until_step(80)
    urgent = slurm.submit(tmp_path / "urgent", "--partition=high", "--exclusive", "--wrap=sleep 1")
    slurm.wait(urgent, "COMPLETED", tmp_path / "urgent")
    training.until_restart(job, 2)
    slurm.wait(job, "COMPLETED", training.log)
    print(training.log.read_text())
    assert training.starts() == [f"job {job} restart {number}" for number in range(3)]
    assert_same_run(training.straight, training.run_dir)
    first, second = (row["step"] for row in view(training.run_dir).rows("resume", "run"))
    assert first >= 20 and second >= 80  # saved when told to go, by the signal and by the preemption
    print(f"job {job}: interrupted at steps {first} and {second}, final checkpoint and metrics equal the straight run")


def test_cancelled_training_of_two_tasks_has_saved_and_does_not_come_back(training):
    slurm, job = training.slurm, training.submit("--ntasks-per-node=2", batch_size=4)
    training.until_step(20)
    slurm.call("scancel", job)
    slurm.wait(job, "CANCELLED", training.log)
    slurm.until(lambda: "status 75" in training.log.read_text(), training.log.read_text)
    assert (training.run_dir / "PREEMPTED").read_text().startswith("SIGTERM at step ")
    assert view(training.run_dir).last_checkpoint("run")["progress"]["step"] >= 20
    time.sleep(1)
    assert (slurm.show(job)["JobState"], slurm.show(job)["Restarts"]) == ("CANCELLED", "0")
    assert "requeueing" not in training.log.read_text()
    assert "batch_size 4 x 2 processes" in training.log.read_text()


def test_training_under_torchrun_is_requeued_by_its_marker(training):
    slurm, job = (
        training.slurm,
        training.submit("--cpus-per-task=2", batch_size=4, LAUNCHER="torchrun", PROCESSES_PER_NODE="2"),
    )
    training.until_step(20)
    slurm.call("scancel", "--signal=USR1", job)
    training.until_restart(job, 1)
    slurm.wait(job, "COMPLETED", training.log)
    print(training.log.read_text())
    assert training.starts() == [f"job {job} restart 0", f"job {job} restart 1"]
    assert view(training.run_dir).last_checkpoint("run")["progress"]["epoch"] == NUM_EPOCHS
    steps = [row["step"] for row in view(training.run_dir).rows("train", "run")]
    assert steps == list(range(2, steps[-1] + 1, 2))


class Precompute:
    """slurm/precompute.sbatch over 9,000 images in 180 shards, which take two tasks some seconds."""

    def __init__(self, slurm, folder: Path, images: list[bytes]) -> None:
        self.slurm, self.folder, self.log = slurm, folder, folder / "log-%a"
        rows = [{"bytes": images[number % len(images)], "path": None} for number in range(9000)]
        pq.write_table(pa.table({"img": rows}), folder / "images.parquet", row_group_size=100)
        config = {"dataset_name": "parquet", "data_files": str(folder / "images.parquet"), "image_size": 64,
                  "cache_shard_size": 50, "cache_dir": str(folder / "cache")}  # fmt: skip
        (folder / "data.yaml").write_text(yaml.safe_dump(config))

    def run(self, cache: Path) -> None:
        """The same without Slurm, in one go."""
        done = run(
            "precompute_cache.py", "--data_config", str(self.folder / "data.yaml"), "--set", f"cache_dir={cache}"
        )
        assert done.returncode == 0, done.stderr

    def submit(self, cache: Path, array: str = "0-1") -> str:
        options = [f"--array={array}", "--cpus-per-task=1", "--mem-per-cpu=100M", "--time=10"]
        arguments = ["--data_config", str(self.folder / "data.yaml"), "--set", f"cache_dir={cache}"]
        return self.slurm.submit(self.log, *options, PRECOMPUTE, *arguments)

    def text(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*")))

    def until_at_work(self, cache: Path, num_tasks: int) -> None:
        """Wait until so many tasks hold shards and one is published."""
        has_begun = lambda: len({lease.holder for lease in list_leases(cache)}) >= num_tasks  # noqa: E731
        self.slurm.until(lambda: has_begun() and any(cache.glob("*.pt")), self.text)

    def until_state(self, job: str, state: str) -> None:
        self.slurm.until(
            lambda: self.slurm.show(job)["JobState"] == state, lambda: f"{self.slurm.show(job)}\n{self.text()}"
        )


@pytest.fixture(scope="session")
def precompute(slurm, tmp_path_factory, png_images) -> Precompute:
    precompute = Precompute(slurm, tmp_path_factory.mktemp("precompute"), png_images)
    precompute.run(precompute.folder / "reference")
    return precompute


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_array_of_which_one_task_is_requeued_makes_the_cache_of_a_single_run(precompute, tmp_path):
    slurm, cache = precompute.slurm, tmp_path / "cache"
    job = precompute.submit(cache)
    precompute.until_at_work(cache, 2)
    slurm.call("scancel", "--signal=USR1", "--batch", f"{job}_1")  # as --signal=B:USR1@120 does
    slurm.until(lambda: slurm.show(f"{job}_1")["Restarts"] == "1", precompute.text)
    for task in (0, 1):
        precompute.until_state(f"{job}_{task}", "COMPLETED")
    print(precompute.text())
    assert slurm.show(f"{job}_0")["Restarts"] == "0"
    assert bytes_of(cache) == bytes_of(precompute.folder / "reference")


def test_a_cancelled_precompute_leaves_whole_shards_and_the_next_one_finishes_the_cache(precompute, tmp_path):
    slurm, cache = precompute.slurm, tmp_path / "cache"
    job = precompute.submit(cache)
    precompute.until_at_work(cache, 2)
    slurm.call("scancel", job)
    for task in (0, 1):
        precompute.until_state(f"{job}_{task}", "CANCELLED")
    slurm.until(lambda: slurm.call("squeue", "--noheader") == "", precompute.text)
    checked = run("distillery.cache", "verify", str(cache))
    assert checked.returncode == 0, checked.stdout
    reference = bytes_of(precompute.folder / "reference")
    shards = {name: data for name, data in bytes_of(cache).items() if name.startswith("images_shard")}
    assert 0 < len(shards) < 360
    assert shards.items() <= reference.items()
    again = precompute.submit(cache, "0-3")  # an array of another size goes on; the last tasks find little or nothing
    for task in range(4):
        precompute.until_state(f"{again}_{task}", "COMPLETED")
    assert bytes_of(cache) == reference
