"""What cache_dtype: jpeg costs and saves: bytes on disk, images/s of a core, and what students learn.

    python -m benchmarks.compressed --part bytes --parquet photographs.parquet
    python -m benchmarks.compressed --part speed --parquet photographs.parquet
    python -m benchmarks.compressed --part learning --train train.parquet --test test.parquet --teacher_repo FOLDER
    python -m benchmarks.compressed --part speed --tiny          # seconds: does it still run?

bytes: what an image takes as float32, uint8 and jpeg of --size px, with rows of --size and --larger px (the shorter
side) and the files as they are.

speed: images/s of one core, of batches of 64 uint8 images of --size px, page cache hot. The process keeps to one CPU
and every loader has one thread. Seconds are CPU time of the whole process: other work on the machine then changes
little. Contenders take turns, `--rounds` times, of at least `--seconds` each; medians, and medians of the ratios to
uint8 within a round. "crops" are random crops of 0.4 to 1 of the area, cut while decoding, as
the trainer has them. The caches of float32 and uint8 have no such row: their crops are made on the device. "raw
parquet" decodes the files while training (use_cached: false). FFCV keeps JPEGs of the same pixels at the same quality,
and crops by its RandomResizedCropRGBImageDecoder; where it is not installed it is left out with the reason
(requirements-bench.txt).

learning: two runs for each seed, alike but for the dtype: uint8, and jpeg at quality 90. Stage 1 and distill_trainer.py
run with the shipped YAML files, as benchmarks.learning has them, the teacher in every step. The data: CIFAR-10 as
parquet; FOLDER is a torch.hub folder (see benchmarks.learning). --crop takes random crops of this least share of the
area, which a jpeg cache cuts while decoding.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import build_parser, source_images, write_parquet
from benchmarks.learning_results import Setting
from benchmarks.learning_runs import DATASET, call, write_configs
from benchmarks.learning_suites import Run, Variant
from data_loader import build_pretraining_dataloader
from distillery.cache.archive import row_bytes_of
from distillery.cache.encoded import RowEncoding
from distillery.cache.folder import load_index
from distillery.cache.plan import CachePlan, survey_cache
from distillery.config.keys_data import DataConfig
from distillery.models.views import Augmentation
from distillery.precompute.pipeline import make_cache
from distillery.reading.row_files import EncodedFiles
from distillery.sources.pixels import PreprocessSpec, decode_image
from distillery.sources.registry import open_source
from distillery.system.console import format_bytes
from distillery.system.errors import run_command
from distillery.system.machine import usable_cpus
from distillery.system.signals import StopFlag

BATCH = 64
QUALITY = 90
CROP = (0.4, 1.0)
MEAN, STD = (DataConfig.model_fields[name].default for name in ("mean", "std"))
IMAGENET = 1_281_167

Epoch = Callable[[], Iterator[Any]]


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="compressed-benchmark-", dir=arguments.dir) as folder:
        {"bytes": print_bytes, "speed": print_speed, "learning": print_learning}[arguments.part](
            arguments, Path(folder)
        )
    return 0


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="64 images of 32 px, one short round; learning: not", parquet=True)
    parser.add_argument("--part", choices=["bytes", "speed", "learning"], required=True)
    parser.add_argument("--images", type=int, default=300, help="of --parquet, the first so many")
    parser.add_argument("--size", type=int, default=224, help="image_size, px")
    parser.add_argument("--larger", type=int, default=256, help="stored_size of the larger rows, px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a turn")
    parser.add_argument("--train", type=Path, metavar="PARQUET", help="learning: labelled images to train on")
    parser.add_argument("--test", type=Path, metavar="PARQUET", help="learning: labelled images to evaluate on")
    parser.add_argument("--teacher_repo", type=Path, metavar="FOLDER", help="learning: torch.hub folder of both models")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--max_samples", type=int, default=12_500, help="learning: the first so many images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22])
    parser.add_argument(
        "--crop", type=float, metavar="SHARE", help="learning: least area of random crops; default: none"
    )
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.images, arguments.size, arguments.larger = 64, 32, 40
        arguments.rounds, arguments.seconds = 1, 0.1
    if arguments.part == "learning":
        for flag in ("train", "test", "teacher_repo"):
            if getattr(arguments, flag) is None:
                parser.error(f"--part learning needs --{flag}")
    return arguments


# ---- the caches ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of cache: its dtype, and of jpeg the rows' stored_size."""

    name: str
    dtype: str
    stored_size: Any = None


def jpeg_kinds(arguments: argparse.Namespace) -> list[Kind]:
    sizes = (arguments.size, arguments.larger, "original")
    return [Kind(f"jpeg {size}", "jpeg", size) for size in sizes]


def write_images(arguments: argparse.Namespace, work: Path) -> Path:
    """The images as a parquet file, which all caches are made of."""
    images = source_images(arguments, 96 if arguments.tiny else 375)
    write_parquet(images, arguments.images, work / "images.parquet")
    return work / "images.parquet"


def make_cache_of(parquet: Path, kind: Kind, size: int, folder: Path) -> Path:
    """Stage 1 of a parquet file."""
    source = open_source(dataset_name="parquet", data_files=str(parquet))
    spec = PreprocessSpec(size, "crop", "bicubic", MEAN, STD)
    encoding = RowEncoding(kind.stored_size, QUALITY) if kind.dtype == "jpeg" else None
    plan = CachePlan(folder, spec, kind.dtype, 128, len(source), len(source), source.identity, False, encoding=encoding)
    with StopFlag() as stop, contextlib.redirect_stdout(io.StringIO()):
        survey = survey_cache(plan, range(plan.num_shards))
        make_cache(plan, source, survey=survey, batch_size=64, num_workers=usable_cpus(), stop=stop)
    return folder


# ---- bytes -----------------------------------------------------------------------------------------------------------


def print_bytes(arguments: argparse.Namespace, work: Path) -> None:
    """A row for each kind of cache."""
    parquet = write_images(arguments, work)
    shape = (3, arguments.size, arguments.size)
    found = {name: float(row_bytes_of(shape, name)) for name in ("float32", "uint8")}
    for kind in jpeg_kinds(arguments):
        index = load_index(make_cache_of(parquet, kind, arguments.size, work / kind.name))
        found[kind.name] = index.shard_bytes.sum() / index.num_samples
    print(f"{arguments.images} images, {arguments.size} px, quality {QUALITY}")
    print(f"{'':16}{'bytes/image':>12}{'of uint8':>10}{'1.28 million':>14}")
    for name, size in found.items():
        print(f"{name:16}{size:12,.0f}{size / found['uint8']:10.2f}{format_bytes(IMAGENET * size):>14}")


# ---- speed -----------------------------------------------------------------------------------------------------------


def print_speed(arguments: argparse.Namespace, work: Path) -> None:
    """Let the contenders take turns on one CPU; a row for each."""
    parquet = write_images(arguments, work)
    caches = {
        kind.name: make_cache_of(parquet, kind, arguments.size, work / kind.name)
        for kind in (Kind("uint8", "uint8"), *jpeg_kinds(arguments))
    }
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    epochs = {name: ours({"cache_dir": str(folder)}) for name, folder in caches.items()}
    for kind in jpeg_kinds(arguments):
        epochs[f"{kind.name}, crops"] = ours({"cache_dir": str(caches[kind.name])}, is_cropped=True)
    raw = {"dataset_name": "parquet", "data_files": str(parquet), "use_cached": False, "resize_mode": "crop"}
    epochs["raw parquet"] = ours(raw | {"image_size": arguments.size, "cache_dtype": "uint8"})
    skipped = add_ffcv(epochs, arguments, caches, work)
    rates = take_turns(epochs, arguments.rounds, arguments.seconds)
    print(f"{arguments.images} images of {arguments.size} px, one CPU, {arguments.rounds} rounds")
    print(f"{'':28}{'images/s':>10}{'lowest':>9}{'highest':>9}{'of uint8':>10}")
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, rates["uint8"], strict=True))
        print(f"{name:28}{statistics.median(found):10,.0f}{min(found):9,.0f}{max(found):9,.0f}{ratio:10.3f}")
    for line in skipped:
        print(line)


def take_turns(epochs: Mapping[str, Epoch], rounds: int, seconds: float) -> dict[str, list[float]]:
    """Images per second of CPU time of each contender in each round; an epoch before pays for what happens once."""
    rates: dict[str, list[float]] = {name: [] for name in epochs}
    for epoch in epochs.values():
        for _ in epoch():
            pass
    for _ in range(rounds):
        for name, epoch in epochs.items():
            count, began = 0, time.process_time()
            while count == 0 or time.process_time() - began < seconds:
                count += sum(len(batch) for batch in epoch())
            rates[name].append(count / (time.process_time() - began))
    return rates


def ours(data: dict, *, is_cropped: bool = False) -> Epoch:
    """The training loader with one thread, uint8 images; is_cropped: with the boxes of the trainer's augmentation."""
    with contextlib.redirect_stdout(io.StringIO()):
        loader = build_pretraining_dataloader(
            data | {"num_workers": 1}, {"batch_size": BATCH, "max_steps_per_epoch": None}, raw=True
        )
    if is_cropped:
        augment = Augmentation(random_resized_crop=CROP, mean=MEAN, std=STD)
        loader.crop_boxes = lambda global_idx, epoch: augment.boxes(global_idx, seed=0, epoch=epoch)

    def epoch() -> Iterator[Any]:
        loader.set_epoch(loader.epoch + 1)
        return iter(loader)

    return epoch


def add_ffcv(
    epochs: dict[str, Epoch], arguments: argparse.Namespace, caches: Mapping[str, Path], work: Path
) -> list[str]:
    """FFCV on the images of the compressed caches; returns why it is left out, where it is."""
    # with TBB, which numba takes where it finds it, the process does not end: its threads wait for each other
    os.environ.setdefault("NUMBA_THREADING_LAYER", "workqueue")
    try:
        for kind in jpeg_kinds(arguments)[1:]:
            path = work / f"{kind.stored_size}.beton"
            write_beton(caches[kind.name], path)
            epochs[f"FFCV, {kind.name}, crops"] = ffcv_crops(path, arguments.size)
    except Exception as error:  # an optional peer, compiled on installation, may fail in any way
        return [f"FFCV is left out: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    return []


class DecodedRows:
    """The images of a compressed cache as FFCV's writer takes them: item i is (uint8 [H, W, 3],)."""

    def __init__(self, cache: Path) -> None:
        index = load_index(cache)
        shards = np.repeat(np.arange(len(index.shard_rows)), index.shard_rows)
        local = np.concatenate([np.arange(count) for count in index.shard_rows])
        self.rows = [row for row in EncodedFiles(index).read_encoded(shards, local) if len(row)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[np.ndarray]:
        return (decode_image(self.rows[i]),)


def write_beton(cache: Path, path: Path) -> None:
    """FFCV's file of a compressed cache's images, as JPEGs of the same quality."""
    from ffcv.fields import RGBImageField
    from ffcv.writer import DatasetWriter

    fields = {"image": RGBImageField(write_mode="jpg", jpeg_quality=QUALITY)}
    with contextlib.redirect_stderr(io.StringIO()):
        DatasetWriter(str(path), fields, num_workers=1).from_indexed_dataset(DecodedRows(cache))


def ffcv_crops(path: Path, size: int) -> Epoch:
    """Random crops by FFCV, in random order, from the page cache, by one worker."""
    from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import ToTensor, ToTorchImage

    loader = Loader(
        str(path), batch_size=BATCH, num_workers=1, order=OrderOption.RANDOM, os_cache=True, drop_last=True,
        pipelines={"image": [RandomResizedCropRGBImageDecoder((size, size), scale=CROP), ToTensor(), ToTorchImage()]},
    )  # fmt: skip
    return lambda: (batch[0] for batch in loader)


# ---- learning --------------------------------------------------------------------------------------------------------


def print_learning(arguments: argparse.Namespace, work: Path) -> None:
    """k-NN accuracy of students from both caches, a row for each seed."""
    setting = Setting(
        str(arguments.train.resolve()), str(arguments.test.resolve()), str(arguments.teacher_repo.resolve()),
        "cifar_resnet56", "cifar_resnet20",
    )  # fmt: skip
    crop = None if arguments.crop is None else [arguments.crop, 1.0]
    print(
        f"{arguments.epochs} epochs of {arguments.max_samples:,} images, random_resized_crop {crop}, quality "
        f"{QUALITY}; k-NN, {setting.test_images:,} test images"
    )
    print(f"{'seed':>6}{'untrained':>11}{'uint8':>9}{'jpeg':>9}{'difference':>12}", flush=True)
    differences, epochs = [], arguments.epochs
    variant = Variant(train={"augment": {"hflip": True, "random_resized_crop": crop}})
    for seed in arguments.seeds:
        runs = [Run(dtype, "ours", seed, epochs, arguments.max_samples, variant=variant, eval_every=epochs)
                for dtype in ("uint8", "jpeg")]  # fmt: skip
        rows = {run.label: train_on(run, setting, work) for run in runs}
        uint8, jpeg = (rows[dtype]["student"]["knn_top1"] for dtype in ("uint8", "jpeg"))
        differences.append(jpeg - uint8)
        untrained = rows["uint8"]["untrained"]["knn_top1"]
        print(f"{seed:6}{untrained:11.2%}{uint8:9.2%}{jpeg:9.2%}{jpeg - uint8:+12.2%}", flush=True)
    print(f"{'mean difference':35}{statistics.mean(differences):+12.2%}")


def train_on(run: Run, setting: Setting, work: Path) -> dict[str, dict]:
    """The last evaluation row of each model of a run on a cache of the dtype that its label is."""
    folder = work / "runs" / run.name
    flags = write_configs(setting, work, folder, run)
    data = ["--set", f"cache_dtype={run.label}", "--set", f"cache_dir={work / run.label}"]
    call(["precompute_cache.py", *flags[:2], *data], folder / "log.txt")
    call(["distill_trainer.py", *flags, *data], folder / "log.txt")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return {row["model"]: row for row in rows if row["kind"] == "eval" and row["dataset"] == DATASET}


if __name__ == "__main__":
    sys.exit(run_command(main))
