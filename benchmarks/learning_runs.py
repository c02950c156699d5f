"""How each contender of benchmarks.learning is run, each in processes of its own, and what is kept of it.

A contender returns curve (a point before the first step and after each evaluation: epoch, images, seconds, knn),
prepare_seconds (making the teacher's outputs beforehand, counted in the curve), wall_seconds (of the run itself with
its evaluations) and rows (untrained, student and, where it was measured, teacher: knn_top1, linear_top1, ...). The
curve's seconds are wall time from the start of the process on, evaluations left out. Making the image cache and
exporting images to a folder are not counted: each is done once for all runs.
"""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.learning_outputs import TeacherOutputs
from benchmarks.learning_results import ROOT, Results, Setting, revision
from benchmarks.learning_suites import LIVE, Run
from distillery.system.errors import EXIT_INTERRUPTED, Interrupted, MissingFileError
from distillery.system.files import sha256_of
from distillery.system.machine import usable_cpus

DATASET = "benchmark"
# the learning rate that the plain recipe uses at a batch of 64
PEER_LEARNING_RATE = 2e-3
INTERRUPTED = (EXIT_INTERRUPTED, -signal.SIGINT, -signal.SIGTERM)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# the keys that decide what is learnt: kept with every result
RECIPE_KEYS = {
    "data": ("resize_mode", "interpolation", "mean", "std", "cache_dtype"),
    "train": (
        "batch_size", "optimizer", "learning_rate", "min_lr", "warmup_epochs", "weight_decay", "max_grad_norm",
        "ema_decay", "precision", "distill_loss_weights", "loss_options", "standardise_targets", "augment",
        "teacher_cache",
    ),
    "model": ("projector", "drop_path_rate", "use_cls_token", "teacher_mirror"),
}  # fmt: skip
# of these the timm peers use
SHARED_TRAIN_KEYS = ("weight_decay", "augment", "precision")


class NotYet(Exception):
    """Another run has to come first."""


@dataclass(frozen=True)
class Bench:
    """Where runs happen.

    work: folder of caches, logs and runs; out: of the results; suite: its name; threads: of a run; revision: when the
    command started; lightly_python: with LightlyTrain; run_dir: the run folder that the suite transfer measures, None:
    those of the kept runs of budget4.
    """

    setting: Setting
    work: Path
    out: Path
    suite: str
    threads: int
    revision: str
    lightly_python: str = sys.executable
    run_dir: Path | None = None

    @property
    def machine(self) -> dict[str, Any]:
        """What seconds depend on."""
        return {"cpus": usable_cpus(), "machine": platform.machine(), "threads": self.threads}

    def folder(self, run: Run) -> Path:
        """Of a run's YAML files, log and run folder."""
        return self.work / "runs" / self.suite / run.name

    def call(self, arguments: list[str], log: Path, **options: Any) -> float:
        """`call` with this bench's number of threads."""
        is_limited = self.threads < usable_cpus()
        environment = dict.fromkeys(THREAD_VARIABLES, str(self.threads)) if is_limited else {}
        return call(arguments, log, **(environment | options))


def measure(bench: Bench, run: Run) -> dict[str, Any]:
    """Do a run; returns its result, with all that says where it comes from.

    Raises:
        RuntimeError: it failed, or cannot be done here.
        NotYet: it needs what another run leaves.
    """
    found = CONTENDERS[run.contender](bench, run)
    configs = configs_of(bench.setting, bench.work, bench.folder(run), run)
    # the run may have read code of both, or of any between
    revisions = dict.fromkeys([bench.revision, revision()])
    return {
        "suite": bench.suite, "label": run.label, "seed": run.seed, "contender": run.contender, "views": run.views,
        "images": run.images, "epochs": run.epochs, "images_seen": run.images_seen, "variant": asdict(run.variant),
        "student": configs["model"]["student_name"], "setting": bench.setting.facts(),
        "recipe": recipe_of(run, configs), "revision": "..".join(revisions), "machine": bench.machine,
        "evaluation": {key: getattr(bench.setting, key) for key in ("bank", "test_images", "knn_k")},
    } | found  # fmt: skip


def recipe_of(run: Run, configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What a run learns by: of ours the keys of the YAML files, of others what is set by hand."""
    if run.contender == "ours":
        found = [(key, configs[name]) for name, keys in RECIPE_KEYS.items() for key in keys]
        recipe = {key: section[key] for key, section in found if key in section}
        # YAML takes 1e-6, without a dot, for text
        return recipe | {"min_lr": float(recipe["min_lr"])} | base_learning_rate(recipe)
    if run.contender.startswith("timm"):
        return {"learning_rate": PEER_LEARNING_RATE} | {key: configs["train"][key] for key in SHARED_TRAIN_KEYS}
    return {"learning_rate": PEER_LEARNING_RATE} if run.contender == "lightly-train-2e-3" else {}


def base_learning_rate(recipe: dict[str, Any]) -> dict[str, float]:
    """What the rule behind learning_rate: null starts from; empty where a rate is given."""
    from distillery.training.optimizer import RATES

    return {"base_learning_rate": RATES[recipe["optimizer"]]} if recipe["learning_rate"] is None else {}


# ---- files and processes -----------------------------------------------------------------------------------------


def shipped(name: str) -> dict[str, Any]:
    """One of the three YAML files of the repository's root."""
    return yaml.safe_load((ROOT / name).read_text())


def configs_of(setting: Setting, work: Path, folder: Path, run: Run) -> dict[str, dict[str, Any]]:
    """The content of a run's YAML files: data, train, model.

    The shipped files, with the data set, the two models and the length of the run put in, the run's variant on top.
    """
    files = {"train": setting.train, "test": setting.test}
    data = shipped("data_config.yaml") | {
        "dataset_name": "parquet", "data_files": setting.train, "image_column": None, "image_size": setting.image_size,
        # a cache for each number of images: a run reads all of its cache
        "cache_dir": str(work / f"cache_{run.images}"), "max_samples": run.images, "shards_per_epoch": None,
        "eval_datasets": {DATASET: {
            "dataset_name": "parquet", "data_files": files, "image_column": None, "label_column": None,
            "max_train": setting.bank, "max_test": setting.test_images,
        }},
    }  # fmt: skip
    # a row for every step: the times in metrics.jsonl are the curve's
    train = shipped("train_config_kd.yaml") | {
        "batch_size": setting.batch_size, "num_epochs": run.epochs, "max_steps_per_epoch": None, "seed": run.seed,
        "checkpoint_dir": str(folder / "run"), "eval_every_epochs": run.eval_every, "knn_k": setting.knn_k,
        "log_every": 1, "precision": "fp32",
    }  # fmt: skip
    model = shipped("model_config_kd.yaml") | {
        "teacher_name": setting.teacher, "teacher_source": "torch_hub", "teacher_repo": setting.teacher_repo,
        "student_name": setting.student, "student_source": "torch_hub", "student_repo": setting.teacher_repo,
    }  # fmt: skip
    train |= run.variant.train
    if run.views is not None:
        train["teacher_cache"] = train["teacher_cache"] | {"enabled": True, "views": run.views}
    return {"data": data, "train": train, "model": model | run.variant.model}


def student_of(setting: Setting, run: Run) -> str:
    """Name of the student that a run trains."""
    return run.variant.model.get("student_name", setting.student)


def write_configs(setting: Setting, work: Path, folder: Path, run: Run) -> list[str]:
    """The three YAML files of a run in `folder`, which is emptied first, and the flags that name them."""
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left would make its seconds wrong
    folder.mkdir(parents=True)
    flags = []
    for name, content in configs_of(setting, work, folder, run).items():
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        flags += [f"--{name}_config", str(path)]
    return flags


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock that threads and processes share; gives whether it is held: False only where it does not wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def call(arguments: list[str], log: Path, *, python: str = sys.executable, **environment: str) -> float:
    """Run python with these arguments, what it prints goes to `log`; returns when it was started (Unix, s).

    Raises:
        Interrupted: a signal ended it.
        RuntimeError: it failed; the last line about an error that it wrote, and in a note the end of all it wrote.
    """
    started = time.time()
    with log.open("a") as file:
        done = subprocess.run(
            [python, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "STARTED": str(started)} | environment,
        )  # fmt: skip
    if done.returncode in INTERRUPTED:
        raise Interrupted(f"{' '.join(arguments[:2])} was interrupted. The same command goes on with the other runs.")
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no reason given"]
        told = [line for line in lines if "error" in line.lower()] or lines
        error = RuntimeError(told[-1].strip()[:300])
        error.add_note("\n".join([f"{' '.join(arguments)} printed:", *lines[-20:]]))
        raise error
    return started


# ---- ours --------------------------------------------------------------------------------------------------------


def ours(bench: Bench, run: Run) -> dict[str, Any]:
    """Stage 1 and distill_trainer.py as a user runs them, which evaluates as it goes, with probes at both ends."""
    folder = bench.folder(run)
    flags, log = write_configs(bench.setting, bench.work, folder, run), folder / "log.txt"
    make_image_cache(bench, run, flags, log)
    prepared = make_teacher_cache(bench, run, flags, log) if run.views is not None else {"seconds": 0.0}
    fixed_view = ["-m", "benchmarks.learning_peers", "fixed-view"]
    trainer = fixed_view if run.variant.fixed_view else ["distill_trainer.py"]
    started = bench.call([*trainer, *flags], log)
    wall_seconds = time.time() - started
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    batch_size = configs_of(bench.setting, bench.work, folder, run)["train"]["batch_size"]
    return {
        "prepare_seconds": prepared["seconds"],
        "prepare_threads": prepared.get("threads"),
        "wall_seconds": wall_seconds,
        "curve": curve_of(rows, started - prepared["seconds"], batch_size),
        "rows": {row["model"]: row for row in rows if row["kind"] == "eval"},
    }


def make_image_cache(bench: Bench, run: Run, flags: list[str], log: Path) -> None:
    """Stage 1 over the images, unless an earlier run has done it; a run beside this one waits for it."""
    data = configs_of(bench.setting, bench.work, bench.folder(run), run)["data"]
    done = bench.work / f"cache_{run.images}_{sha256_of(data)[:12]}.done"
    with locked(bench.work / "locks" / f"cache_{run.images}"):
        if not (done.exists() and (Path(data["cache_dir"]) / "index.json").exists()):
            bench.call(["precompute_cache.py", *flags[:2]], log)
            done.touch()


def make_teacher_cache(bench: Bench, run: Run, flags: list[str], log: Path) -> dict[str, Any]:
    """Stage 1 over the teacher; returns the note: the seconds it took when it was made, and its threads."""
    with locked(bench.work / "locks" / f"teacher_cache_{run.images}"):
        outputs = outputs_of(bench, run)
        note = outputs.note()
        if not note["is_done"]:
            note |= {"began": time.time(), "threads": bench.threads}
            outputs.write(note)
            try:
                bench.call(["precompute_cache.py", *flags, "--teacher"], log)
                note["is_done"] = True
            finally:
                note |= {"seconds": note["seconds"] + time.time() - note["began"], "began": None}
                outputs.write(note)
    return note


def outputs_of(bench: Bench, run: Run) -> TeacherOutputs:
    """Those that a run reads; raises MissingFileError where the images are not there yet."""
    from distillery.cache.folder import load_index
    from distillery.config.load import load_configs
    from distillery.teacher_cache.targets import wanted_outputs

    configs = load_configs(*configs_of(bench.setting, bench.work, bench.folder(run), run).values())
    cache_dir = Path(configs.data.cache_dir)
    identity = wanted_outputs(configs, load_index(cache_dir).fingerprint)
    return TeacherOutputs(cache_dir, identity, bench.work / f"teacher_outputs_{sha256_of(identity)[:12]}.json")


def has_outputs(bench: Bench, run: Run) -> bool:
    """Whether a run finds the outputs of the teacher that it reads."""
    try:
        return outputs_of(bench, run).is_done()
    except MissingFileError:
        return False


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


def timm(bench: Bench, run: Run, *, task: str) -> dict[str, Any]:
    """One of timm's tasks, on the views that ours sees."""
    folder = bench.folder(run)
    flags, log = write_configs(bench.setting, bench.work, folder, run), folder / "log.txt"
    make_image_cache(bench, run, flags, log)
    arguments = ["timm", str(folder), task, str(PEER_LEARNING_RATE)]
    started = bench.call(["-m", "benchmarks.learning_peers", *arguments], log)
    return peer_result(folder, time.time() - started)


def lightly_train(bench: Bench, run: Run, *, by_hand: bool) -> dict[str, Any]:
    """LightlyTrain's distillationv3 from a folder of files; by_hand: with the learning rate set, else at its own."""
    folder, python = bench.folder(run), bench.lightly_python
    flags, log = write_configs(bench.setting, bench.work, folder, run), folder / "log.txt"
    peers = ["-m", "benchmarks.learning_peers"]
    bench.call(["-c", "import lightly_train"], log, python=python)
    make_image_cache(bench, run, flags, log)
    with locked(bench.work / "locks" / f"images_{run.images}"):
        images = export_images(bench.setting, run.images, bench.work / f"images_{run.images}")
    given = asdict(bench.setting) | {"seed": run.seed, "epochs": run.epochs, "images": str(images)}
    given["learning_rate"] = PEER_LEARNING_RATE if by_hand else None
    (folder / "setting.json").write_text(json.dumps(given))
    environment = {"LIGHTLY_TRAIN_EVENTS_DISABLED": "1"}
    started = bench.call([*peers, "lightly-train", str(folder)], log, python=python, **environment)
    bench.call([*peers, "evaluate-states", str(folder)], log)
    return peer_result(folder, time.time() - started)


def peer_result(folder: Path, wall_seconds: float) -> dict[str, Any]:
    """What a process of learning_peers has written."""
    measured = json.loads((folder / "result.json").read_text())
    return {"prepare_seconds": 0.0, "wall_seconds": wall_seconds} | measured


def export_images(setting: Setting, count: int, folder: Path) -> Path:
    """The training images as files, for those that read nothing else; made once."""
    from benchmarks.common import read_images

    if not (folder / "complete").exists():
        (folder / "files").mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(read_images(Path(setting.train), None)[:count]):
            suffix = "png" if data.startswith(b"\x89PNG") else "jpg"
            (folder / "files" / f"{number:07d}.{suffix}").write_bytes(data)
        (folder / "complete").touch()
    return folder / "files"


# ---- the features elsewhere --------------------------------------------------------------------------------------


def transfer(bench: Bench, run: Run) -> dict[str, Any]:
    """A finished run's models on scikit-learn's digits, by the code that evaluates everyone.

    Raises:
        NotYet: there is no such run.
    """
    source = bench.run_dir or finished_run(bench, run.seed)
    folder = bench.folder(run)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with locked(bench.work / "locks" / "transfer"):
        arguments = ["transfer", str(folder), str(source.resolve()), str(bench.work / "digits")]
        started = bench.call(["-m", "benchmarks.learning_peers", *arguments], folder / "log.txt")
    return {"curve": []} | peer_result(folder, time.time() - started)


def finished_run(bench: Bench, seed: int) -> Path:
    """The run folder of budget4's live run of a seed, whose result is kept: one without may still be training."""
    other, source = replace(bench, suite="budget4"), Run(LIVE, "ours", seed, 0)
    found = other.folder(source) / "run"
    if Results(bench.out, other.suite).find(source) is None:
        missing, remedy = f"{bench.out} has no result of budget4's {LIVE}, seed {seed}", "run --suite budget4 first"
    elif not (found / "config.yaml").exists():
        missing = f"budget4's {LIVE}, seed {seed}, was measured with another --dir: there is no {found}"
        remedy = "repeat the command with that --dir, run --suite budget4 and this one with another --out"
    else:
        return found
    raise NotYet(f"{missing}; {remedy}, or name a finished run: --run DIR")


CONTENDERS: dict[str, Callable[[Bench, Run], dict[str, Any]]] = {
    "ours": ours,
    "timm-feature": partial(timm, task="feature"),
    "timm-logits": partial(timm, task="logits"),
    "lightly-train": partial(lightly_train, by_hand=False),
    "lightly-train-2e-3": partial(lightly_train, by_hand=True),
    "transfer": transfer,
}
