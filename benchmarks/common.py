"""What the benchmarks share: their flags and results, images and caches to work on, a chart of who reached what."""

import argparse
import io
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def build_parser(doc: str, *, tiny: str, parquet: bool = False) -> argparse.ArgumentParser:
    """The flags that the benchmarks share.

    Args:
        doc: the module's docstring.
        tiny: what --tiny measures.
        parquet: whether the images may come from a file.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if parquet:
        parser.add_argument("--parquet", type=Path, help="images to use; default: 256 synthetic JPEGs")
        parser.add_argument("--image_column")
    parser.add_argument("--tiny", action="store_true", help=tiny)
    parser.add_argument("--dir", type=Path, default=None, help="where the data is written meanwhile")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser


def run_benchmark(
    name: str,
    arguments: argparse.Namespace,
    measure: Callable[[argparse.Namespace, Path], dict],
    draw: Callable[[dict, Path], None],
) -> int:
    """Measure in a folder that is removed afterwards; write name.json and name.png into --out.

    Args:
        name: of the benchmark.
        arguments: with dir and out.
        measure: (arguments, folder) -> what name.json holds.
        draw: (that, path of the picture).
    """
    arguments.out.mkdir(parents=True, exist_ok=True)
    prefix = f"{name}-benchmark-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=arguments.dir, ignore_cleanup_errors=True) as work:
        result = measure(arguments, Path(work))
    table, picture = arguments.out / f"{name}.json", arguments.out / f"{name}.png"
    table.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, picture)
    print(f"written: {table}, {picture}")
    return 0


def source_images(arguments: argparse.Namespace, size_px: int) -> list[bytes]:
    """The encoded images of --parquet, at most --images; without it synthetic ones, size_px high."""
    if arguments.parquet is None:
        return synthetic_jpegs(16 if arguments.tiny else 256, size_px)
    return read_images(arguments.parquet, arguments.image_column)[: arguments.images]


def synthetic_jpegs(count: int, size_px: int, *, seed: int = 0) -> list[bytes]:
    """`count` different JPEGs of soft shapes with noise, size_px high and a third wider."""
    from PIL import Image

    rng, images = np.random.default_rng(seed), []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(coarse.resize((size_px * 4 // 3, size_px), Image.Resampling.BICUBIC), np.int16)
        noise = rng.integers(-24, 25, (*pixels.shape[:2], 1), dtype=np.int16)
        buffer = io.BytesIO()
        Image.fromarray(np.clip(pixels + noise, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return images


def read_images(parquet: Path, image_column: str | None) -> list[bytes]:
    """All encoded images of a parquet file."""
    from distillery.sources.registry import open_source

    source = open_source(dataset_name="parquet", data_files=str(parquet), image_column=image_column)
    return source.read(0, len(source))


def write_parquet(images: Sequence[bytes], count: int, path: Path) -> None:
    """A parquet file of `count` rows: the images again and again, a thousand in a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    # no dictionary: it would hold a repeated image once, and reading would cost less than of different images
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for start in range(0, count, 1000):
            rows = [{"bytes": images[i % len(images)], "path": None} for i in range(start, min(count, start + 1000))]
            writer.write_table(pa.table({"image": rows}, schema=schema))


class RepeatedJpegs:
    """A source of `count` images: 64 different JPEGs again and again."""

    identity = {"kind": "benchmark"}

    def __init__(self, count: int, size_px: int) -> None:
        self.count, self.images = count, synthetic_jpegs(64, size_px)

    def __len__(self) -> int:
        return self.count

    def read(self, start: int, stop: int) -> list[bytes]:
        """Encoded images start..stop-1."""
        return [self.images[i % len(self.images)] for i in range(start, stop)]

    def read_views(self, start: int, stop: int) -> list[bytes]:
        """The same: nothing is copied."""
        return self.read(start, stop)

    def labels(self, start: int, stop: int) -> None:
        """There are none."""


def write_cache(directory: Path, arguments: argparse.Namespace, max_shard_rows: int = 512) -> None:
    """A cache by the project's own stage 1; arguments: images, size (px), dtype, tiny."""
    from distillery.cache.plan import CachePlan, survey_cache
    from distillery.precompute.pipeline import make_cache
    from distillery.sources.pixels import PreprocessSpec
    from distillery.system.machine import usable_cpus
    from distillery.system.signals import StopFlag

    source = RepeatedJpegs(arguments.images, arguments.size)
    spec = PreprocessSpec(arguments.size, "squash", "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    shard_rows = min(max_shard_rows, max(1, arguments.images // 4))
    plan = CachePlan(
        directory, spec, arguments.dtype, shard_rows, arguments.images, arguments.images, source.identity, False
    )
    shards = range(plan.num_shards)
    with StopFlag() as stop:
        make_cache(
            plan, source, survey=survey_cache(plan, shards), batch_size=64,
            num_workers=1 if arguments.tiny else usable_cpus(), stop=stop,
        )  # fmt: skip


def draw_bars(
    panels: Sequence[tuple[str, dict[str, float]]], path: Path, *, unit: str, limits: dict[str, float], title: str
) -> None:
    """One panel (heading, name -> value) of bars under another; `limits` (name -> value) are dashed lines in each."""
    from matplotlib.figure import Figure

    rows = sum(len(values) for _, values in panels)
    figure = Figure(figsize=(8, 0.4 * rows + 0.9 * len(panels) + 0.6), layout="constrained")
    heights = [len(values) + 1 for _, values in panels]
    for axes, (heading, values) in zip(
        np.atleast_1d(figure.subplots(len(panels), 1, height_ratios=heights, sharex=True)), panels, strict=True
    ):
        names = sorted(values, key=values.get)
        colors = ["tab:orange" if name.startswith("ours") else "tab:blue" for name in names]
        axes.bar_label(axes.barh(names, [values[name] for name in names], color=colors), fmt="{:,.0f}", padding=3)
        for name, value in limits.items():
            axes.axvline(value, color="black", linestyle="--", label=name)
        axes.set_title(heading, fontsize=10)
        axes.margins(x=0.15)
    if limits:
        axes.legend(loc="lower right", fontsize=8)
    axes.set_xlabel(unit)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
