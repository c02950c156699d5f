"""How each contender of benchmarks.learning is run, each in processes of its own, and what is kept of it.

A run is a dict: name, seed, curve (a point before the first step and after each epoch: epoch, images, seconds, knn),
prepare_seconds (making the teacher's outputs beforehand, counted in the curve), rows (untrained, student and, where it
was measured, teacher: knn_top1, linear_top1, ...). Seconds are wall time from the start of the process on, evaluations
left out. Making the image cache and exporting images to a folder are not counted: each is done once for all runs.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
DATASET = "benchmark"
# the learning rate that the plain recipe uses at a batch of 64
PEER_LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Setting:
    """What every contender is given; results of different settings are never mixed."""

    train: str
    test: str
    teacher_repo: str
    teacher: str
    student: str
    epochs: int
    ablation_epochs: int
    image_size: int = 32
    batch_size: int = 64
    max_images: int | None = None
    bank: int = 20_000
    test_images: int = 5_000
    knn_k: int = 20


@dataclass(frozen=True)
class Variant:
    """A change of the shipped recipe. fixed_view: the teacher sees the image itself, the student a view of it."""

    train: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    fixed_view: bool = False


CROPS = {"augment": {"hflip": True, "random_resized_crop": [0.4, 1.0]}}
VARIANTS = {
    "as shipped": Variant(),
    "fixed view": Variant(fixed_view=True),
    "targets not standardised": Variant(train={"standardise_targets": False}),
    "linear projector": Variant(model={"projector": {"type": "linear"}}),
    "no patch loss": Variant(train={"distill_loss_weights": {"cls": 1.0}}),
    "random crops": Variant(train=CROPS),
    "random crops, fixed view": Variant(train=CROPS, fixed_view=True),
}


def shipped(name: str) -> dict:
    """One of the three YAML files of the repository's root."""
    return yaml.safe_load((ROOT / name).read_text())


def write_configs(setting: Setting, work: Path, folder: Path, seed: int, epochs: int, variant: Variant) -> list[str]:
    """The three YAML files of a run in `folder`, and the flags that name them.

    The shipped files, with the data set, the two models and the length of the run put in, a `variant` on top.
    """
    files = {"train": setting.train, "test": setting.test}
    data = shipped("data_config.yaml") | {
        "dataset_name": "parquet", "data_files": setting.train, "image_column": None, "image_size": setting.image_size,
        "cache_dir": str(work / "cache"), "max_samples": setting.max_images, "shards_per_epoch": None,
        "eval_datasets": {DATASET: {
            "dataset_name": "parquet", "data_files": files, "image_column": None, "label_column": None,
            "max_train": setting.bank, "max_test": setting.test_images,
        }},
    }  # fmt: skip
    # a row for every step: the times in metrics.jsonl are the curve's
    train = shipped("train_config_kd.yaml") | {
        "batch_size": setting.batch_size, "num_epochs": epochs, "max_steps_per_epoch": None, "seed": seed,
        "checkpoint_dir": str(folder / "run"), "eval_every_epochs": 1, "knn_k": setting.knn_k, "log_every": 1,
    }  # fmt: skip
    model = shipped("model_config_kd.yaml") | {
        "teacher_name": setting.teacher, "teacher_source": "torch_hub", "teacher_repo": setting.teacher_repo,
        "teacher_img_size": None,  # the shipped size is for the shipped pair
        "student_name": setting.student, "student_source": "torch_hub", "student_repo": setting.teacher_repo,
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left would make its seconds wrong
    folder.mkdir(parents=True)
    flags = []
    for name, content in (("data", data), ("train", train | variant.train), ("model", model | variant.model)):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        flags += [f"--{name}_config", str(path)]
    return flags


def call(arguments: list[str], log: Path, *, python: str = sys.executable, **environment: str) -> float:
    """Run python with these arguments, what it prints goes to `log`; returns when it was started (Unix, s).

    Raises:
        RuntimeError: it failed; the last line about an error that it wrote, and in a note the end of all it wrote.
    """
    started = time.time()
    with log.open("a") as file:
        done = subprocess.run(
            [python, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "STARTED": str(started)} | environment,
        )  # fmt: skip
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no reason given"]
        told = [line for line in lines if "error" in line.lower()] or lines
        error = RuntimeError(told[-1].strip()[:300])
        error.add_note("\n".join([f"{' '.join(arguments)} printed:", *lines[-20:]]))
        raise error
    return started


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(
    setting: Setting, work: Path, name: str, seed: int, *, variant: Variant | None = None, epochs: int | None = None
) -> dict:
    """Stage 1 and distill_trainer.py as a user runs them, which evaluates as it goes, with probes at both ends."""
    folder, variant = work / "runs" / f"{name.replace(' ', '_')}_{seed}", variant or Variant()
    flags = write_configs(setting, work, folder, seed, epochs or setting.epochs, variant)
    log = folder / "log.txt"
    call(["precompute_cache.py", *flags[:2]], log)
    prepare_seconds = 0.0
    if variant.train.get("teacher_cache", {}).get("enabled"):
        prepare_seconds = make_teacher_cache(work, flags, log, variant.train["teacher_cache"]["views"])
    trainer = ["-m", "benchmarks.learning_peers", "fixed-view"] if variant.fixed_view else ["distill_trainer.py"]
    started = call([*trainer, *flags], log)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        "name": name,
        "seed": seed,
        "prepare_seconds": prepare_seconds,
        "curve": curve_of(rows, started - prepare_seconds, setting.batch_size),
        "rows": {row["model"]: row for row in rows if row["kind"] == "eval"},
    }


def ours_cached(setting: Setting, work: Path, name: str, seed: int, views: int) -> dict:
    """The same with the teacher's outputs made once by stage 1, `views` views of every image."""
    teacher_cache = shipped("train_config_kd.yaml")["teacher_cache"] | {"enabled": True, "views": views}
    return ours(setting, work, name, seed, variant=Variant(train={"teacher_cache": teacher_cache}))


def make_teacher_cache(work: Path, flags: list[str], log: Path, views: int) -> float:
    """Stage 1 over the teacher; returns the seconds it took when it was made, now or for an earlier run."""
    noted = work / f"teacher_cache_{views}.json"
    entry = json.loads(noted.read_text()) if noted.exists() else {"seconds": 0.0, "done": False}
    if not entry["done"]:
        began = time.time()
        try:
            call(["precompute_cache.py", *flags, "--teacher"], log)
            entry["done"] = True
        finally:
            entry["seconds"] += time.time() - began
            noted.write_text(json.dumps(entry))
    return entry["seconds"]


def curve_of(rows: list[dict], started: float, batch_size: int) -> list[dict]:
    """The curve of a metrics.jsonl: what passed between a row and the eval row after it was evaluation."""
    curve, evaluating, working_time = [], 0.0, started
    for before, row in zip([{"time": started}, *rows], rows, strict=False):
        if row["kind"] != "eval":
            working_time = row["time"] - evaluating
            continue
        evaluating += row["time"] - before["time"]
        if row["model"] in ("untrained", "student") and row.get("knn_top1") is not None:
            images, seconds = row["step"] * batch_size, working_time - started
            curve.append({"epoch": row["epoch"], "images": images, "seconds": seconds, "knn": row["knn_top1"]})
    return curve


# ---- peers -------------------------------------------------------------------------------------------------------


def timm_mse(setting: Setting, work: Path, name: str, seed: int) -> dict:
    """Pooled MSE by timm's FeatureDistillationTask, on the views that ours sees."""
    folder = work / "runs" / f"{name}_{seed}"
    flags = write_configs(setting, work, folder, seed, setting.epochs, Variant())
    call(["precompute_cache.py", *flags[:2]], folder / "log.txt")
    call(["-m", "benchmarks.learning_peers", "timm-mse", str(folder), str(PEER_LEARNING_RATE)], folder / "log.txt")
    return {"name": name, "seed": seed, "prepare_seconds": 0.0} | json.loads((folder / "result.json").read_text())


def lightly_train(setting: Setting, work: Path, name: str, seed: int, *, python: str, by_hand: bool) -> dict:
    """LightlyTrain's distillationv3 from a folder of files; by_hand: with the learning rate set, else at its own."""
    folder = work / "runs" / f"{name}_{seed}"
    flags = write_configs(setting, work, folder, seed, setting.epochs, Variant())
    log, peers = folder / "log.txt", ["-m", "benchmarks.learning_peers"]
    call(["-c", "import lightly_train"], log, python=python)
    call(["precompute_cache.py", *flags[:2]], log)
    images = export_images(setting, work / "images")
    given = asdict(setting) | {"seed": seed, "images": str(images)}
    given["learning_rate"] = PEER_LEARNING_RATE if by_hand else None
    (folder / "setting.json").write_text(json.dumps(given))
    environment = {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    call([*peers, "lightly-train", str(folder)], log, python=python, **environment)
    call([*peers, "evaluate-states", str(folder)], log)
    return {"name": name, "seed": seed, "prepare_seconds": 0.0} | json.loads((folder / "result.json").read_text())


def export_images(setting: Setting, folder: Path) -> Path:
    """The training images as files, for those that read nothing else; made once."""
    from benchmarks.common import read_images

    if not (folder / "complete").exists():
        (folder / "files").mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(read_images(Path(setting.train), None)[: setting.max_images]):
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            (folder / "files" / f"{number:07d}.{suffix}").write_bytes(data)
        (folder / "complete").touch()
    return folder / "files"
