"""The ways of making a cache that benchmarks.precompute compares; each turn is a process of its own.

    python -m benchmarks.precompute_contenders NAME SETTING.json

A contender is a function of a Setting that makes the whole cache in setting.folder; "whole" is its images/s from the
call until everything is written, with what it imports and the start of its workers; it returns what else it can tell:
"steady", without those. All store the same tensors. Ours reads the parquet file; the others are given the encoded
images in memory, which favours them, and decode by distillery.sources.pixels, except the seed style, whose
transforms are PIL's.
"""

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.common import read_images
from distillery.precompute.pool import keep_freed_memory
from distillery.sources.pixels import PreprocessSpec, normalisation_table, normalise_into, preprocess_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHARD_ROWS = 2048
SEED_BATCH = 256


@dataclass
class Setting:
    """What is to be made.

    parquet: `count` images; unique: a file of the different ones among them; size: px; workers: processes.
    """

    parquet: str
    unique: str
    folder: str
    count: int
    size: int
    dtype: str
    workers: int
    shard_rows: int = SHARD_ROWS

    @property
    def spec(self) -> PreprocessSpec:
        """Squashed to a square, bicubic."""
        return PreprocessSpec(self.size, "squash", "bicubic", MEAN, STD)

    @cached_property
    def images(self) -> list[bytes]:
        """The different encoded images."""
        return read_images(Path(self.unique), None)


class Rows:
    """Index -> the array to be stored, [3, H, W]."""

    def __init__(self, setting: Setting) -> None:
        self.count, self.images, self.spec = setting.count, setting.images, setting.spec
        self.table = None
        if setting.dtype != "uint8":
            self.table = normalisation_table(MEAN, STD, setting.dtype)

    def __len__(self) -> int:
        return self.count

    def array(self, i: int) -> np.ndarray:
        """One image as it is stored."""
        pixels = preprocess_image(self.images[i % len(self.images)], self.spec)
        if self.table is None:
            return pixels
        out = np.empty(pixels.shape, self.table.dtype)
        normalise_into(pixels, self.table, out)
        return out


# ---- the limit, and ours -----------------------------------------------------------------------------------------

_rows: Rows | None = None


def _warm_up(rows: Rows) -> None:
    global _rows
    _rows = rows
    keep_freed_memory()
    for i in range(8):
        preprocess_image(rows.images[i % len(rows.images)], rows.spec)


def _decode(start: int, stop: int) -> None:
    for i in range(start, stop):
        preprocess_image(_rows.images[i % len(_rows.images)], _rows.spec)


def ceiling(setting: Setting) -> dict:
    """Bare decoding and resizing of images in memory on all cores, by warm processes; nothing is kept."""
    rows, context = Rows(setting), multiprocessing.get_context("spawn")
    step = max(1, min(50, setting.count // (4 * setting.workers)))
    with ProcessPoolExecutor(setting.workers, context, initializer=_warm_up, initargs=(rows,)) as pool:
        # several each, so that none is still starting when the clock does
        list(pool.map(_decode, [0] * 8 * setting.workers, [4] * 8 * setting.workers))
        began = time.perf_counter()
        starts = range(0, setting.count, step)
        list(pool.map(_decode, starts, [min(setting.count, start + step) for start in starts]))
        return {"whole": setting.count / (time.perf_counter() - began)}


def ours(setting: Setting) -> dict:
    """Stage 1, through make_cache. steady: from the first rows that are done to the last shard published."""
    from distillery.cache.plan import CachePlan, survey_cache
    from distillery.precompute.pipeline import make_cache
    from distillery.sources.registry import open_source
    from distillery.system.signals import StopFlag

    marks, limits = [], []

    def on_rows(count: int, limit: str, shards: int) -> None:
        marks.append((time.perf_counter(), count))
        limits.append(limit)

    source = open_source(dataset_name="parquet", data_files=setting.parquet)
    plan = CachePlan(
        Path(setting.folder), setting.spec, setting.dtype, setting.shard_rows, setting.count, len(source),
        source.identity, False,
    )  # fmt: skip
    shards = range(plan.num_shards)
    with StopFlag() as stop:
        make_cache(
            plan, source, survey=survey_cache(plan, shards), batch_size=256,
            num_workers=setting.workers, stop=stop, on_rows=on_rows,
        )  # fmt: skip
    ended = time.perf_counter()
    rows_left = setting.count - marks[0][1]
    return {"steady": rows_left / (ended - marks[0][0]), "limit": limits[-1]} if rows_left else {"limit": limits[-1]}


# ---- what one would use instead ----------------------------------------------------------------------------------


def seed_style(setting: Setting) -> dict:
    """DataLoader of PIL transforms, batches of 256, torch.save per shard straight to its name."""
    import io

    import torch
    from PIL import Image
    from torchvision import transforms
    from torchvision.transforms import InterpolationMode

    size = (setting.size, setting.size)
    steps = [transforms.Resize(size, interpolation=InterpolationMode.BICUBIC)]
    if setting.dtype == "uint8":
        steps += [transforms.PILToTensor()]
    else:
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    transform, images = transforms.Compose(steps), setting.images

    class Images(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return setting.count

        def __getitem__(self, i: int) -> torch.Tensor:
            return transform(Image.open(io.BytesIO(images[i % len(images)])).convert("RGB"))

    def save(parts: list, number: int) -> None:
        torch.save({"images": torch.cat(parts)}, Path(setting.folder) / f"images_shard_{number:05d}.pt")

    Path(setting.folder).mkdir()
    loader = torch.utils.data.DataLoader(Images(), SEED_BATCH, num_workers=setting.workers)
    parts, number = [], 0
    for batch in loader:
        parts.append(batch)
        if sum(map(len, parts)) >= setting.shard_rows:
            save(parts, number)
            parts, number = [], number + 1
    if parts:
        save(parts, number)
    return {}


def ffcv(setting: Setting) -> dict:
    """FFCV's DatasetWriter with an NDArrayField."""
    from ffcv.fields import NDArrayField
    from ffcv.writer import DatasetWriter

    class Tuples(Rows):
        def __getitem__(self, i: int) -> tuple[np.ndarray]:
            return (self.array(i),)

    rows = Tuples(setting)
    preprocess_image(setting.images[0], setting.spec)  # torch is imported before it forks
    field = NDArrayField(dtype=np.dtype(setting.dtype), shape=(3, setting.size, setting.size))
    Path(setting.folder).mkdir()
    path = str(Path(setting.folder) / "data.beton")
    DatasetWriter(path, {"x": field}, num_workers=setting.workers).from_indexed_dataset(rows)
    return {}


def _tensor(i: int, rows: Rows):
    import torch

    return torch.from_numpy(rows.array(i))


def litdata(setting: Setting) -> dict:
    """litdata.optimize, chunks of 64 MB."""
    from functools import partial

    import litdata as ld

    function = partial(_tensor, rows=Rows(setting))
    ld.optimize(
        fn=function, inputs=list(range(setting.count)), output_dir=setting.folder, chunk_bytes="64MB",
        num_workers=setting.workers, verbose=False,
    )  # fmt: skip
    return {}


def _write_mds(folder: str, columns: dict, start: int, stop: int) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=folder, columns=columns, size_limit=64 << 20) as writer:
        for i in range(start, stop):
            writer.write({"x": _rows.array(i)})


def mosaicml(setting: Setting) -> dict:
    """MosaicML's MDSWriter, one in each process and the indexes merged, as its documentation has it."""
    from streaming.base.util import merge_index

    columns = {"x": f"ndarray:{setting.dtype}:3,{setting.size},{setting.size}"}
    parts = [f"{setting.folder}/{i}" for i in range(setting.workers)]
    edges = [setting.count * i // setting.workers for i in range(setting.workers + 1)]
    rows = Rows(setting)
    preprocess_image(setting.images[0], setting.spec)
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(setting.workers, context, initializer=_warm_up, initargs=(rows,)) as pool:
        list(pool.map(_write_mds, parts, [columns] * setting.workers, edges[:-1], edges[1:]))
    merge_index(setting.folder, keep_local=True)
    return {}


CONTENDERS: dict[str, Callable[[Setting], dict]] = {
    "ceiling": ceiling,
    "ours": ours,
    "seed-style": seed_style,
    "ffcv": ffcv,
    "litdata": litdata,
    "mosaicml-streaming": mosaicml,
}


def main() -> None:
    name, path = sys.argv[1:]
    setting = Setting(**json.loads(Path(path).read_text()))
    # ours reads its own file, the others have the images in memory
    print(f"{len(setting.images)} different images", flush=True)
    began = time.perf_counter()
    result = CONTENDERS[name](setting)
    result.setdefault("whole", setting.count / (time.perf_counter() - began))
    print("\nRESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
