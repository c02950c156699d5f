"""What the four cache dtypes cost and what they change: bytes, writing, reading, the numbers a student sees.

    python -m benchmarks.dtypes --parquet data/train.parquet        # its images, repeated to 1,000
    python -m benchmarks.dtypes --tiny --out /tmp/bench

Writing is stage 1 from encoded images to shards on the disk, steady rate (see benchmarks.precompute); reading is the
training loader in shuffled batches of 64 as stored, page cache hot. They take turns, `--rounds` times; medians. The
difference is the largest, over all pixel values and channels, between the input a student gets from this cache (as
float32, normalised) and from a float32 one; one step of an 8-bit pixel is 0.017 in the same unit. The second figure is
what remains when the student computes in bfloat16, as it does on a GPU: its input is rounded to bfloat16 anyway.

Writes dtypes.json and dtypes.png into --out.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common import build_parser, draw_bars, run_benchmark, source_images, write_parquet
from benchmarks.precompute_contenders import MEAN, STD, Setting, ours
from distillery.sources.pixels import normalisation_table
from distillery.system.console import format_bytes
from distillery.system.machine import usable_cpus

DTYPES = ["uint8", "float16", "bfloat16", "float32"]
BATCH = 64


def main() -> int:
    return run_benchmark("dtypes", parse_arguments(), measure, draw)


def draw(result: dict, path: Path) -> None:
    """A panel for writing and one for reading."""
    panels = [(key, {row["name"]: row[key] for row in result["results"]}) for key in ("written", "read")]
    setting = result["setting"]
    title = f"{setting['images']:,} images of {setting['size']} px, {setting['cpus']} CPUs"
    draw_bars(panels, path, unit="images/s", limits={}, title=title)


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="192 images of 32 px, one round", parquet=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0, help="of reading, in a turn")
    arguments = parser.parse_args()
    if arguments.tiny:
        arguments.images, arguments.size, arguments.rounds, arguments.seconds = 192, 32, 1, 0.0
    return arguments


def measure(arguments: argparse.Namespace, work: Path) -> dict:
    """Let the dtypes take turns; returns what dtypes.json holds."""
    images = source_images(arguments, 96 if arguments.tiny else 375)
    parquet = work / "images.parquet"
    write_parquet(images, arguments.images, parquet)
    written: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    read: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
    setting = Setting(str(parquet), "", "", arguments.images, arguments.size, "", usable_cpus())
    for _ in range(arguments.rounds):
        for dtype in DTYPES:
            folder = work / dtype
            written[dtype].append(ours(replace(setting, folder=str(folder), dtype=dtype))["steady"])
            read[dtype].append(read_rate(folder, arguments.seconds))
            shutil.rmtree(folder)
    print(f"{'':10}{'bytes/image':>12}{'500,000':>10}{'written/s':>11}{'read/s':>9}{'difference':>12}{'in bf16':>10}")
    rows = []
    for dtype in DTYPES:
        num_bytes = 3 * arguments.size**2 * (1 if dtype == "uint8" else 4 if dtype == "float32" else 2)
        exact, rounded = largest_difference(dtype)
        row = {
            "name": dtype, "bytes_per_image": num_bytes, "written": statistics.median(written[dtype]),
            "read": statistics.median(read[dtype]), "difference": exact, "difference_in_bfloat16": rounded,
        }  # fmt: skip
        rows.append(row)
        print(
            f"{dtype:10}{num_bytes:12,}{format_bytes(500_000 * num_bytes):>10}{row['written']:11.0f}{row['read']:9.0f}"
            f"{exact:12.2g}{rounded:10.2g}"
        )
    kept = {key: getattr(arguments, key) for key in ("images", "size", "rounds")}
    return {"setting": kept | {"cpus": usable_cpus()}, "results": rows}


def read_rate(folder: Path, seconds: float) -> float:
    """Images/s of the training loader, of whole epochs after the first, which checks every row."""
    from data_loader import build_pretraining_dataloader

    data = {"cache_dir": str(folder), "use_cached": True, "num_workers": 2}
    with contextlib.redirect_stdout(io.StringIO()):
        loader = build_pretraining_dataloader(data, {"batch_size": BATCH, "max_steps_per_epoch": None}, raw=True)
    count, began, epoch = 0, 0.0, 0
    while epoch == 0 or count == 0 or time.perf_counter() - began < seconds:
        if epoch == 1:
            began = time.perf_counter()
        loader.set_epoch(epoch)
        rows = sum(len(batch) for batch in loader)
        count += rows if epoch else 0
        epoch += 1
    return count / (time.perf_counter() - began)


def largest_difference(dtype: str) -> tuple[float, float]:
    """(of a student's float32 input, of its bfloat16 input) to that from a float32 cache, over all pixel values."""
    import torch

    exact = torch.from_numpy(normalisation_table(MEAN, STD, "float32"))
    if dtype == "uint8":
        mean, std = (torch.tensor(values)[:, None] for values in (MEAN, STD))
        # as the trainer does it, on the device
        seen = (torch.arange(256, dtype=torch.uint8).float()[None] / 255 - mean) / std
    else:
        stored = torch.from_numpy(normalisation_table(MEAN, STD, dtype))
        seen = (stored.view(torch.bfloat16) if dtype == "bfloat16" else stored).float()
    in_bfloat16 = seen.bfloat16().float() - exact.bfloat16().float()
    return (seen - exact).abs().max().item(), in_bfloat16.abs().max().item()


if __name__ == "__main__":
    sys.exit(main())
