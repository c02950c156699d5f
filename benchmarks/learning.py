"""What students learn: this project's recipe beside others, from the same images, teacher, steps and evaluation.

    python -m benchmarks.learning --train train.parquet --test test.parquet --teacher_repo FOLDER
    python -m benchmarks.learning ... --contenders ours ours-cached --views 1 2 4 8 --equal_time --ablation
    python -m benchmarks.learning --tiny --out /tmp/bench      # a minute: does everything still run?

The data: CIFAR-10 as parquet, https://huggingface.co/datasets/uoft-cs/cifar10, folder plain_text; other labelled
parquet files do as well. FOLDER is a torch.hub folder: a hubconf.py with a function for each model that takes
`pretrained`, where the teacher's weights are loaded. Training sees no labels; they serve the evaluation.

ours: stage 1 and distill_trainer.py with the shipped YAML files, the data set, models and length put in. ours-cached:
the same with the teacher's outputs made once by stage 1; making them is part of its seconds, in each run anew.
timm-mse: the mean squared difference of pooled features, timm's FeatureDistillationTask, on the very views that ours
sees; AdamW, one-cycle to 2e-3. lightly-train: distillationv3 of LightlyTrain at its defaults; lightly-train-2e-3: with
its learning rate set to 2e-3. All are evaluated by the same code, k-NN and linear probe on the student's features.

Seconds are wall time, the start of the process included, evaluations left out. --equal_time adds a column: everyone's
k-NN at the time the fastest was done, interpolated between evaluations; the schedules of the slower ones have not yet
come to their end then. --ablation changes one thing of the recipe at a time, one seed.

Writes learning.json and learning.png into --out. A run that is in learning.json is not run again: add seeds or
contenders to the same --out, or repeat the command after an interruption. What is not installed is left out, with the
reason (requirements-bench.txt).
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks.learning_runs import ROOT, VARIANTS, Setting, lightly_train, ours, ours_cached, timm_mse
from benchmarks.learning_tables import ablation_rows, draw, main_rows, print_tables
from distillery.system.files import write_atomic
from distillery.system.machine import usable_cpus

CONTENDERS = ["ours", "ours-cached", "timm-mse", "lightly-train", "lightly-train-2e-3"]
DATA_HINT = "CIFAR-10 as parquet: https://huggingface.co/datasets/uoft-cs/cifar10, folder plain_text"


def main() -> int:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.dir is not None:
        work, is_kept = arguments.dir / "learning", not arguments.tiny
        work.mkdir(parents=True, exist_ok=True)
    else:
        work, is_kept = Path(tempfile.mkdtemp(prefix="learning-benchmark-")), False
    try:
        if arguments.tiny:
            use_tiny_data(arguments, work)
        setting = setting_of(arguments)
        results = Results(arguments.out / "learning.json", setting)
        run_all(arguments, setting, work.resolve(), results)
    finally:
        if not is_kept:
            shutil.rmtree(work, ignore_errors=True)
    draw(results.content, arguments.out / "learning.png")
    print_tables(results.content, equal_time=arguments.equal_time)
    print(f"written: {results.path}, {arguments.out / 'learning.png'}")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, metavar="PARQUET", help="images to train on; labelled, the k-NN's bank")
    parser.add_argument("--test", type=Path, metavar="PARQUET", help="labelled images to evaluate on")
    parser.add_argument("--teacher_repo", type=Path, metavar="FOLDER", help="torch.hub folder of both models")
    parser.add_argument("--teacher", default="cifar_resnet56")
    parser.add_argument("--student", default="cifar_resnet20")
    parser.add_argument("--image_size", type=int, default=32, help="px")
    parser.add_argument("--max_images", type=int, help="of --train, the first so many to train on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--contenders", nargs="*", default=CONTENDERS, metavar="NAME", help=", ".join(CONTENDERS))
    parser.add_argument("--views", type=int, nargs="+", default=[4], metavar="K", help="of ours-cached, a run for each")
    parser.add_argument("--equal_time", action="store_true", help="compare at the fastest one's seconds as well")
    parser.add_argument("--ablation", nargs="*", metavar="NAME", help=f"all of them, or of: {'; '.join(VARIANTS)}")
    parser.add_argument("--ablation_epochs", type=int, default=2)
    parser.add_argument("--lightly_python", default=sys.executable, metavar="PATH", help="python with LightlyTrain")
    parser.add_argument("--tiny", action="store_true", help="256 digits, 2 epochs, ours and timm-mse, one seed")
    parser.add_argument("--dir", type=Path, help="keep caches, logs and runs here; default: nowhere")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    arguments.ablation = list(VARIANTS) if arguments.ablation == [] else arguments.ablation or []
    for given, known in ((arguments.contenders, CONTENDERS), (arguments.ablation, VARIANTS)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    if not arguments.tiny:
        check_paths(parser, arguments)
    return arguments


def check_paths(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for flag, hint in (("train", DATA_HINT), ("test", DATA_HINT), ("teacher_repo", "a folder with a hubconf.py")):
        path = getattr(arguments, flag)
        if path is None or not path.exists():
            parser.error(f"--{flag} {path or 'is missing'}{': no such path' if path else ''}. {hint}")


def use_tiny_data(arguments: argparse.Namespace, work: Path) -> None:
    """scikit-learn's digits and the demo's teacher, which come with the installed packages."""
    sys.path.insert(0, str(ROOT / "examples" / "demo"))
    from make_data import main as make_digits

    make_digits(work / "data")
    arguments.train, arguments.test = work / "data" / "train.parquet", work / "data" / "test.parquet"
    arguments.teacher_repo = ROOT / "examples" / "demo"
    arguments.teacher = arguments.student = "efficientnet_lite0"
    arguments.epochs, arguments.ablation_epochs, arguments.seeds = 2, 1, [0]
    arguments.image_size, arguments.max_images = 32, 128
    arguments.contenders = [name for name in arguments.contenders if name in ("ours", "timm-mse")]


def setting_of(arguments: argparse.Namespace) -> Setting:
    paths = [str(getattr(arguments, name).resolve()) for name in ("train", "test", "teacher_repo")]
    return Setting(
        *paths, arguments.teacher, arguments.student, arguments.epochs, arguments.ablation_epochs,
        image_size=arguments.image_size, max_images=arguments.max_images,
        **({"bank": 128, "test_images": 64} if arguments.tiny else {}),
    )  # fmt: skip


def facts_of(setting: Setting) -> dict:
    """What makes results comparable: of files the name and size, as they may lie elsewhere the next time."""
    files = {key: Path(getattr(setting, key)) for key in ("train", "test")}
    named = {key: f"{path.name}, {path.stat().st_size} bytes" for key, path in files.items()}
    return asdict(setting) | named | {"teacher_repo": Path(setting.teacher_repo).name}


class Results:
    """learning.json: the setting, every finished run, and the tables made of them; written after each run."""

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path = path
        machine = {"cpus": usable_cpus(), "machine": platform.machine()}
        facts = facts_of(setting)
        self.content = {"setting": facts, "machine": machine, "runs": [], "left_out": {}}
        if path.exists():
            old = json.loads(path.read_text())
            differing = [key for key, value in facts.items() if old["setting"].get(key) != value]
            if differing:
                sys.exit(f"{path} holds runs of another {', '.join(differing)}: choose another --out, or move it away")
            self.content["runs"] = old["runs"]

    def has(self, kind: str, name: str, seed: int) -> bool:
        """Whether this run is there."""
        return any((run["kind"], run["name"], run["seed"]) == (kind, name, seed) for run in self.content["runs"])

    def add(self, kind: str, run: dict) -> None:
        """Keep a finished run."""
        self.content["runs"].append({"kind": kind} | run)
        self.write()

    def write(self) -> None:
        """The file, whole or not at all."""
        self.content["results"], self.content["ablation"] = main_rows(self.content), ablation_rows(self.content)
        write_atomic(self.path, json.dumps(self.content, indent=1).encode() + b"\n")


def run_all(arguments: argparse.Namespace, setting: Setting, work: Path, results: Results) -> None:
    """Everything that was asked for and is not there yet; contenders take turns, seed by seed."""
    for seed in arguments.seeds:
        for name, run in contenders_of(arguments, setting, work).items():
            run_once(results, "contender", name, seed, run)
    for name in arguments.ablation:
        variant = VARIANTS[name]

        def run(label: str, seed: int, variant=variant) -> dict:
            return ours(setting, work, label, seed, variant=variant, epochs=setting.ablation_epochs)

        run_once(results, "ablation", name, arguments.seeds[0], run)
    results.write()


def contenders_of(arguments: argparse.Namespace, setting: Setting, work: Path) -> dict[str, Callable[..., dict]]:
    """Label -> what runs it, given the label and a seed."""
    found: dict[str, Callable[..., dict]] = {}
    for name in arguments.contenders:
        if name == "ours":
            found[name] = lambda label, seed: ours(setting, work, label, seed)
        elif name == "ours-cached":
            for views in arguments.views:
                label = f"ours-cached, {views} view{'s' * (views > 1)}"
                found[label] = lambda label, seed, views=views: ours_cached(setting, work, label, seed, views)
        elif name == "timm-mse":
            found[name] = lambda label, seed: timm_mse(setting, work, label, seed)
        else:
            options = {"python": arguments.lightly_python, "by_hand": name != "lightly-train"}
            found[name] = lambda label, seed, options=options: lightly_train(setting, work, label, seed, **options)
    return found


def run_once(results: Results, kind: str, name: str, seed: int, run: Callable[..., dict]) -> None:
    if results.has(kind, name, seed) or name in results.content["left_out"]:
        return
    began = time.time()
    try:
        done = run(name, seed)
    except RuntimeError as error:
        if name.startswith("ours") or kind == "ablation":
            raise
        results.content["left_out"][name] = str(error)
        print(f"{name}: left out ({error})", flush=True)
        return
    results.add(kind, done)
    shares = " / ".join(f"{point['knn']:.1%}" for point in done["curve"])
    seconds, everything = done["curve"][-1]["seconds"], time.time() - began
    print(f"{name}, seed {seed}: k-NN {shares}, {seconds:.0f} s ({everything:.0f} s with everything)", flush=True)


if __name__ == "__main__":
    sys.exit(main())
