"""What students learn: named suites of runs from the same images, teacher and evaluation.

    python -m benchmarks.learning --suite budget4 --train train.parquet --test test.parquet --teacher_repo FOLDER
    python -m benchmarks.learning --suite budget20 data --minutes 120 --jobs 2 --dir DIR --train ... (the same)
    python -m benchmarks.learning --suite budget4 --tables                # of what is there; runs nothing
    python -m benchmarks.learning --tables --write_docs                   # tables and pictures of all into docs/
    python -m benchmarks.learning --tiny                                  # minutes: does everything still run?

benchmarks/learning_suites.py says what each suite asks and lists its runs; docs/results.md shows what came out. The
data: CIFAR-10 as parquet, https://huggingface.co/datasets/uoft-cs/cifar10, folder plain_text; other labelled parquet
files do as well. FOLDER is a torch.hub folder: a hubconf.py with a function for each model that takes `pretrained`,
where the teacher's weights are loaded. Training sees no labels; they serve the evaluation.

ours: stage 1 and distill_trainer.py with the shipped YAML files; the data set, models, seed, length, batch_size 64 and
precision fp32 are put in. ours-cached-2: with the teacher's outputs for two views made once by stage 1; making them is
part of its seconds, in each run anew. timm-feature: the mean squared difference of pooled features. timm-logits: KL
between softened classes; only there the student learns from the teacher's classifier. Both on the very views that ours
sees; AdamW, one-cycle to 2e-3. lightly-train: distillationv3 of LightlyTrain at its defaults; lightly-train-2e-3: with
its learning rate set to 2e-3. All are evaluated by the same code, k-NN and linear probe on the student's features. What
cannot run is left out, with the reason (requirements-bench.txt).

Seconds are wall time, the start of the process included, evaluations left out. With --jobs 2 each run has one thread,
and its seconds are those of one core; the results say so.

Every finished run is a file, OUT/learning/SUITE/LABEL_SEED.json. It is never run again: repeat the command after an
interruption, or in another checkout. The finished runs that come with the repository count too: to measure afresh,
name an empty folder, --out DIR. Two commands with one --dir share caches and divide the runs between them. With
--minutes no run begins that would not end in time, by the rate of earlier ones; a run in progress is never cut.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks.learning_docs import write_docs
from benchmarks.learning_pictures import draw
from benchmarks.learning_results import ROOT, Results, Setting, check_setting, expected_seconds, revision, runs_of
from benchmarks.learning_runs import Bench, NotYet, configs_of, has_outputs, locked, measure, recipe_of, student_of
from benchmarks.learning_suites import SUITES, Run, Suite
from benchmarks.learning_tables import table_of
from distillery.config.load import load_dumped_configs
from distillery.system.errors import run_command
from distillery.system.machine import usable_cpus

OUT = Path("benchmarks/results")
DATA_HINT = "CIFAR-10 as parquet: https://huggingface.co/datasets/uoft-cs/cifar10, folder plain_text"
TINY_HUBCONF = """
import timm
import torch

def student(pretrained=False):
    return timm.create_model("test_resnet", num_classes=10)

def teacher(pretrained=False):
    with torch.random.fork_rng():
        torch.manual_seed(1)  # the same weights in each process
        return student()
"""
# these take every path
TINY_SUITES = ["budget4", "screening", "vit", "transfer"]


def main() -> int:
    arguments = parse_arguments()
    suites = [SUITES[name].tiny() if arguments.tiny else SUITES[name] for name in arguments.suite]
    if arguments.run is not None:
        suites = [suite_of_run(arguments.run)]
    if not arguments.tables:
        if arguments.tiny:  # kept ones would be found, and nothing would run
            shutil.rmtree(arguments.out / "learning", ignore_errors=True)
        run_suites(arguments, suites)
    for suite in suites:
        results, runs = Results(arguments.out, suite.name), runs_of(suite, arguments.out)
        print(f"\n{suite.name}\n\n{table_of(suite, runs, results.left_out())}\n")
        if picture := draw(suite, runs, arguments.out / f"learning_{suite.name}.png"):
            print(f"written: {picture}")
        if arguments.write_docs:
            write_docs(suite, results, ROOT / "docs")
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", metavar="NAME", help=", ".join(SUITES))
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="of the suite's runs, those with these labels")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin nothing that would not end in time")
    parser.add_argument("--jobs", type=int, choices=(1, 2), default=1, help="2: two runs side by side, one thread each")
    parser.add_argument("--train", type=Path, metavar="PARQUET", help="images to train on; labelled, the k-NN's bank")
    parser.add_argument("--test", type=Path, metavar="PARQUET", help="labelled images to evaluate on")
    parser.add_argument("--teacher_repo", type=Path, metavar="FOLDER", help="torch.hub folder of both models")
    parser.add_argument("--teacher", default="cifar_resnet56")
    parser.add_argument("--student", default="cifar_resnet20")
    parser.add_argument("--image_size", type=int, default=32, help="px")
    parser.add_argument("--run", type=Path, metavar="DIR", help="transfer: one run folder instead of budget4's")
    parser.add_argument("--lightly_python", default=sys.executable, metavar="PATH", help="python with LightlyTrain")
    parser.add_argument("--tables", action="store_true", help="run nothing: tables and pictures of what is there")
    parser.add_argument("--write_docs", action="store_true", help="put tables and pictures into docs/")
    parser.add_argument("--tiny", action="store_true", help="one epoch of 128 digits each, kept in OUT/tiny")
    parser.add_argument("--dir", type=Path, help="keep caches, logs and runs here; default: nowhere")
    parser.add_argument("--out", type=Path, default=OUT, help="results and pictures (default %(default)s)")
    arguments = parser.parse_args()
    if arguments.tiny:  # a folder of its own, as its results are removed each time
        arguments.out /= "tiny"
    if arguments.suite is None and not (arguments.tables or arguments.tiny):
        parser.error(f"--suite is missing: some of {', '.join(SUITES)}")
    if arguments.tiny and arguments.write_docs:
        parser.error("--write_docs is for real results, --tiny gives none")
    arguments.suite = arguments.suite or (TINY_SUITES if arguments.tiny else list(SUITES))
    if unknown := set(arguments.suite) - set(SUITES):
        parser.error(f"--suite {', '.join(sorted(unknown))}: expected some of {', '.join(SUITES)}")
    labels = [label for name in arguments.suite for label in SUITES[name].labels]
    if unknown := set(arguments.only or ()) - set(labels):
        parser.error(f"--only {', '.join(sorted(unknown))}: expected some of {'; '.join(labels)}")
    others = arguments.only or arguments.tiny or arguments.write_docs
    if arguments.run is not None and (arguments.suite != ["transfer"] or others):
        parser.error("--run DIR is for --suite transfer alone, without --only, --tiny and --write_docs")
    if not (arguments.tiny or arguments.tables):
        check_paths(parser, arguments)
    return arguments


def check_paths(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    for flag, hint in (("train", DATA_HINT), ("test", DATA_HINT), ("teacher_repo", "a folder with a hubconf.py")):
        path = getattr(arguments, flag)
        if path is None or not path.exists():
            parser.error(f"--{flag} {path or 'is missing'}{': no such path' if path else ''}. {hint}")


def run_suites(arguments: argparse.Namespace, suites: list[Suite]) -> None:
    """All runs that were asked for and are not there yet, as far as the time allows."""
    deadline = time.time() + 60 * arguments.minutes if arguments.minutes is not None else None
    threads, started_at = usable_cpus() if arguments.jobs == 1 else 1, revision()
    with work_folder(arguments) as work:
        setting = tiny_setting(work) if arguments.tiny else setting_of(arguments)
        for suite in suites:
            results = Results(arguments.out, suite.name)
            check_setting(suite, arguments.out, setting.facts())
            bench = Bench(
                setting, work, arguments.out, suite.name, threads, started_at, arguments.lightly_python, arguments.run
            )
            runs = [run for run in suite.runs if run.label in (arguments.only or suite.labels)]
            Queue(bench, results, runs, deadline).work_off(arguments.jobs)


@contextlib.contextmanager
def work_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """The folder of caches, logs and runs; removed afterwards unless --dir keeps it."""
    if arguments.dir is not None and not arguments.tiny:
        work = arguments.dir / "learning"
        work.mkdir(parents=True, exist_ok=True)
        yield work.resolve()
        return
    work = Path(tempfile.mkdtemp(prefix="learning-benchmark-", dir=arguments.dir))
    try:
        yield work.resolve()
    finally:
        shutil.rmtree(work, ignore_errors=True)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """What the flags say; with --run DIR, what that run was given."""
    paths = [str(getattr(arguments, name).resolve()) for name in ("train", "test", "teacher_repo")]
    if arguments.run is None:
        return Setting(*paths, arguments.teacher, arguments.student, image_size=arguments.image_size)
    its = load_dumped_configs(arguments.run / "config.yaml")
    model, train = its.model, its.train
    options = {"image_size": its.data.image_size, "batch_size": train.batch_size, "knn_k": train.knn_k}
    return Setting(*paths, model.teacher_name, model.student_name, **options)


def suite_of_run(run_dir: Path) -> Suite:
    """The suite transfer with one run in it: the models of this run folder."""
    seed = load_dumped_configs(run_dir / "config.yaml").train.seed
    label = f"{'/'.join(run_dir.resolve().parts[-2:])} on digits"
    return replace(SUITES["transfer"], runs=[Run(label, "transfer", seed, 0, 0)])


def tiny_setting(work: Path) -> Setting:
    """scikit-learn's digits, and timm's smallest network as student and as a teacher that knows nothing."""
    from benchmarks.learning_peers import make_digits

    files, repo = make_digits(work / "data"), work / "hub"
    repo.mkdir()
    (repo / "hubconf.py").write_text(TINY_HUBCONF)
    return Setting(files["train"], files["test"], str(repo), "teacher", "student", bank=128, test_images=64)


class Queue:
    """The runs of a suite that are still to do, for one or two threads."""

    def __init__(self, bench: Bench, results: Results, runs: list[Run], deadline: float | None) -> None:
        """deadline: Unix time, s; None: there is none."""
        self.bench, self.results, self.deadline = bench, results, deadline
        self.waiting = [run for run in runs if not self._is_done(run)]
        self.left_over: list[str] = []
        self.failed: set[str] = set()  # labels that cannot run here
        self.is_stopped = False
        self.lock = threading.Lock()

    def work_off(self, jobs: int) -> None:
        """Do all of them, `jobs` side by side, and say what is left."""
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(self._work) for _ in range(jobs)]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # Ctrl-C too, which ends the runs in progress
                self._stop()
                raise
        for line in self.left_over:
            print(f"left: {line}", flush=True)

    def _stop(self) -> None:
        """Begin no more runs; a run that fails from now on is not kept as left out."""
        with self.lock:
            self.is_stopped = True
            self.waiting.clear()

    def _is_done(self, run: Run) -> bool:
        kept = self.results.find(run)
        if kept is None:
            return False
        setting, folder = self.bench.setting, self.bench.folder(run)
        now = recipe_of(run, configs_of(setting, self.bench.work, folder, run))
        changed = [key for key, value in now.items() if key in kept["recipe"] and kept["recipe"][key] != value]
        if changed:
            print(f"{run.label}, seed {run.seed}: the kept result is of another {', '.join(changed)}; remove "
                  f"{self.results.path(run)} to measure it again", flush=True)  # fmt: skip
        return True

    def _work(self) -> None:
        while (run := self._next()) is not None:
            with locked(self.bench.work / "locks" / f"{self.bench.suite}_{run.name}", wait=False) as is_ours:
                if not is_ours:
                    self.left_over.append(f"{run.label}, seed {run.seed}: another process is at it")
                elif self.results.find(run) is None:  # it may have been, just now
                    self._do(run)

    def _next(self) -> Run | None:
        """The first waiting run that ends in time; those before it are left over."""
        with self.lock:
            while self.waiting:
                run = self.waiting.pop(0)
                if run.label in self.failed:
                    continue
                if reason := self._reason_to_wait(run):
                    self.left_over.append(f"{run.label}, seed {run.seed}: {reason}")
                    continue
                return run
            return None

    def _reason_to_wait(self, run: Run) -> str | None:
        if self.deadline is None:
            return None
        remaining = self.deadline - time.time()
        expected = expected_seconds(
            run, self.results.runs_of_all_suites(), self.bench.machine, student_of(self.bench.setting, run),
            prepares=run.views is not None and not has_outputs(self.bench, run),
        )  # fmt: skip
        if remaining > (expected or 0):
            return None
        known = "" if expected is None else f", it takes about {expected / 60:.0f}"
        return f"{max(0.0, remaining) / 60:.0f} minutes are left{known}"

    def _do(self, run: Run) -> None:
        began = time.time()
        try:
            done = measure(self.bench, run)
        except NotYet as error:
            self.left_over.append(f"{run.label}, seed {run.seed}: {error}")
            return
        except Exception as error:
            if self.is_stopped:
                return
            if run.contender == "ours" or not isinstance(error, RuntimeError):
                self._stop()
                raise
            self.failed.add(run.label)
            self.results.leave_out(run, str(error))
            print(f"{run.label}: left out ({error})", flush=True)
            return
        self.results.add(run, done)
        points = done["curve"] or [{"knn": done["rows"]["student"]["knn_top1"], "seconds": done["wall_seconds"]}]
        shares = " / ".join(f"{point['knn']:.1%}" for point in points)
        print(f"{run.label}, seed {run.seed}: k-NN {shares}, {points[-1]['seconds']:.0f} s "
              f"({time.time() - began:.0f} s with everything)", flush=True)  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
