"""What a training step costs with the teacher's outputs stored, beside the student alone and the teacher in every step.

    python -m benchmarks.teacher --parquet data/train.parquet --teacher_repo teachers --teacher cifar_resnet56 \\
                                 --student cifar_resnet20
    python -m benchmarks.teacher --tiny --out /tmp/bench            # seconds: does everything still run?

"student alone" is a bare loop over one batch in memory: forward, backward, AdamW as it is by default; no head, no
loader, no augmentation, no clipping. The others are the trainer's own epoch, loader and logging included, on a cache
that stage 1 has just made. All take turns in one process, `--rounds` times `--steps` steps each, the first round not
counted. Figures are medians: of the seconds a step takes, of each round's ratio to the student alone of the same round,
and of the CPU time, which other work on the machine disturbs less.

Writes teacher.json and teacher.png into --out.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from benchmarks.common import build_parser, draw_bars, run_benchmark, source_images, write_parquet
from data_loader import DevicePrefetcher, build_pretraining_dataloader
from distillery.config.load import Configs, load_configs
from distillery.models import configured
from distillery.system.machine import usable_cpus
from distillery.system.signals import StopFlag
from distillery.teacher_cache.opening import open_teacher_cache
from distillery.training import build
from distillery.training.batches import StepLoader
from distillery.training.engine import train_one_epoch
from distillery.training.task import Position

ROOT = Path(__file__).resolve().parents[1]
ALONE, CACHED, LIVE = "student alone", "ours, stored outputs", "ours, live teacher"


def main() -> int:
    return run_benchmark("teacher", parse_arguments(), measure, draw)


def draw(result: dict, path: Path) -> None:
    """A bar for each contender."""
    setting = result["setting"]
    panel = {row["name"]: setting["batch_size"] / row["seconds"] for row in result["results"]}
    title = f"{setting['teacher']} to {setting['student']}, batches of {setting['batch_size']}, {setting['device']}"
    draw_bars([("training", panel)], path, unit="images/s", limits={}, title=title)


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="96 images, two rounds of two steps, tiny models", parquet=True)
    parser.add_argument("--images", type=int, default=2048, help="how many to store, by repeating what there is")
    parser.add_argument("--size", type=int, default=32, help="px")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--teacher", default="resnet18", help="name in timm, or in --teacher_repo")
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--teacher_repo", type=Path, help="folder with hubconf.py that has both models; default: timm")
    parser.add_argument("--losses", default="{cls: 1.0}", help="distill_loss_weights (default %(default)s)")
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30, help="of a round")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.images, arguments.batch_size, arguments.rounds, arguments.steps = 96, 8, 2, 2
        arguments.teacher, arguments.student = "test_resnet", "test_resnet"
    return arguments


def measure(arguments: argparse.Namespace, work: Path) -> dict:
    """Let everyone take turns; returns what teacher.json holds."""
    configs = prepare(arguments, work)
    device = torch.device(arguments.device)
    contenders = {
        ALONE: student_alone(configs, device, arguments.steps),
        CACHED: trainer(configs, device, arguments.steps, stored=True),
        LIVE: trainer(configs, device, arguments.steps, stored=False),
    }
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for round_number in range(arguments.rounds + 1):
        for name, run in contenders.items():
            taken = timed(run, device, arguments.steps)
            if round_number:
                turns[name].append(taken)
        if round_number:
            print(", ".join(f"{name} {1000 * turns[name][-1][0]:.1f} ms" for name in contenders), flush=True)
    rows = [summary(name, turns) for name in contenders]
    for row in rows:
        print(
            f"{row['name']:24}{1000 * row['seconds']:9.2f} ms a step{row['ratio']:8.3f} of the student alone; CPU time "
            f"{1000 * row['cpu_seconds']:.2f} ms, {row['cpu_ratio']:.3f}"
        )
    setting = {key: str(value) for key, value in vars(arguments).items()} | {"batch_size": arguments.batch_size}
    return {
        "setting": setting | {"cpus": usable_cpus(), "threads": torch.get_num_threads(), "machine": platform.machine()},
        "results": rows,
    }


def prepare(arguments: argparse.Namespace, work: Path) -> Configs:
    """Images, the cache and the teacher's outputs, made by the commands; returns the configuration."""
    write_parquet(source_images(arguments, 48), arguments.images, work / "images.parquet")
    repo = {"source": "timm", "repo": None}
    if arguments.teacher_repo is not None:
        repo = {"source": "torch_hub", "repo": str(arguments.teacher_repo.resolve())}
    model = {f"{side}_{key}": value for side in ("teacher", "student") for key, value in repo.items()}
    model |= {"teacher_name": arguments.teacher, "student_name": arguments.student}
    model["teacher_pretrained"] = arguments.teacher_repo is not None
    contents = {
        "data": {"dataset_name": "parquet", "data_files": str(work / "images.parquet"), "image_size": arguments.size,
                 "cache_dir": str(work / "cache"), "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]},
        "train": {"batch_size": arguments.batch_size, "checkpoint_dir": str(work / "run"), "num_epochs": 10**6,
                  "max_steps_per_epoch": arguments.steps, "teacher_cache": {"enabled": True, "views": arguments.views},
                  "distill_loss_weights": yaml.safe_load(arguments.losses)},
        "model": model,
    }  # fmt: skip
    flags = []
    for name, content in contents.items():
        (work / f"{name}.yaml").write_text(yaml.safe_dump(content))
        flags += [f"--{name}_config", str(work / f"{name}.yaml")]
    done = subprocess.run(
        [sys.executable, str(ROOT / "precompute_cache.py"), *flags, "--teacher"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-500:])
    return load_configs(*(work / f"{name}.yaml" for name in contents))


def student_alone(configs: Configs, device: torch.device, steps: int) -> Callable[[], None]:
    """The bare loop."""
    model = configured.build_student_backbone(configs.model, configs.data).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters())
    size = configs.data.image_size
    images = torch.randn((configs.train.batch_size, 3, size, size), device=device)

    def run() -> None:
        for _ in range(steps):
            model(images).pooled.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    return run


def trainer(configs: Configs, device: torch.device, steps: int, *, stored: bool) -> Callable[[], None]:
    """An epoch of the trainer, as distill_trainer.py runs it."""
    loader = build_pretraining_dataloader(configs.data, configs.train, with_indices=True, raw=True)
    cache = open_teacher_cache(configs, loader, device) if stored else None
    teacher, student = build.build_models(configs, device, cache)
    schedule = build.build_schedule(configs.train, student, steps)
    task = build.build_task(configs, teacher, student, schedule, loader.normalized, device, cache)
    if stored:
        teacher.load_statistics(build.stored_statistics(loader, task))
    else:
        teacher.gather_statistics(build.spread_batches(loader.dataset, 256, 64, device))
    position, stop = Position(), StopFlag()

    def run() -> None:
        loader.load_state_dict({"epoch": position.epoch, "samples": 0})
        batches = StepLoader(task, loader, epoch=position.epoch, step=position.step)
        train_one_epoch(
            task, DevicePrefetcher(batches, device), position, stop,
            steps_in_epoch=steps, log_every=configs.train.log_every, after_step=lambda *_: None,
        )  # fmt: skip
        position.next_epoch()

    return run


def timed(run: Callable[[], None], device: torch.device, steps: int) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of a step."""
    began, cpu_began = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / steps, (time.process_time() - cpu_began) / steps


def summary(name: str, turns: dict[str, list[tuple[float, float]]]) -> dict:
    """Medians of a contender's turns and of their ratios to the student alone of the same round."""
    row = {"name": name}
    for key, place in (("", 0), ("cpu_", 1)):
        seconds, alone = ([turn[place] for turn in turns[of]] for of in (name, ALONE))
        row[f"{key}seconds"] = statistics.median(seconds)
        row[f"{key}ratio"] = statistics.median(a / b for a, b in zip(seconds, alone, strict=True))
        row[f"{key}rounds"] = seconds
    return row


if __name__ == "__main__":
    sys.exit(main())
