"""Stage 1 on a small in-memory source, for tests that break it: as functions, and as a program with decode workers.

python tests/support/stage1.py DIR --num_workers 2 --slow_s 0.01
"""

import argparse
import io
import sys
import time
from dataclasses import replace
from pathlib import Path

if __name__ in {"__main__", "__mp_main__"}:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from distillery.cache.plan import CachePlan, Survey, survey_cache
from distillery.precompute.loop import MakingReport
from distillery.precompute.pipeline import make_cache
from distillery.sources.pixels import PreprocessSpec
from distillery.system.errors import EXIT_DONE, Interrupted, run_command
from distillery.system.signals import StopFlag

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class SmallSource:
    """Labelled noise of which rows 3 and 17 cannot be decoded; slow_s: what every read takes, time to be killed in."""

    def __init__(self, num_rows: int = 22, *, size: int = 8, slow_s: float = 0.0) -> None:
        self.size, self.slow_s = size, slow_s
        self.identity = {"kind": "test", "num_rows": num_rows}
        self.images = [self._encode(i) for i in range(num_rows)]

    def _encode(self, i: int) -> bytes:
        if i in (3, 17):
            return b"no image"
        pixels = np.random.default_rng(i).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        return buffer.getvalue()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, start: int, stop: int) -> list[bytes]:
        if self.slow_s:
            time.sleep(self.slow_s)
        return self.images[start:stop]

    def read_views(self, start: int, stop: int) -> list[bytes]:
        return self.read(start, stop)

    class_names = None

    def labels(self, start: int, stop: int) -> np.ndarray:
        return np.arange(start, stop) % 7

    def describe(self) -> str:
        return "test images"


def small_plan(
    directory: Path, source: SmallSource, *, shard_size: int = 8, max_samples: int | None = None, **changes
) -> CachePlan:
    """A plan for all images of a source, or the first max_samples; changes: other fields of CachePlan."""
    # lanczos needs no torch, so that a process starts in a third of a second
    spec = PreprocessSpec(source.size, "squash", "lanczos", MEAN, STD)
    num_rows = len(source) if max_samples is None else max_samples
    plan = CachePlan(directory, spec, "float32", shard_size, num_rows, len(source), source.identity, True)
    return replace(plan, **changes)


def run_stage1(
    plan: CachePlan,
    source: SmallSource,
    shards: range | None = None,
    *,
    batch_size: int = 4,
    num_workers: int = 1,
    stop=None,
    on_wait=None,
) -> tuple[MakingReport, Survey]:
    """Survey and make, as precompute_cache.py does; on_wait: as of make_cache."""
    shards = range(plan.num_shards) if shards is None else shards
    survey = survey_cache(plan, shards)
    options = {"batch_size": batch_size, "num_workers": num_workers, "on_wait": on_wait}
    with StopFlag() if stop is None else stop as flag:
        report = make_cache(plan, source, survey=survey, stop=flag, **options)
    return report, survey


def folder_bytes(directory: Path) -> dict[str, bytes]:
    """name -> bytes of every file below a folder."""
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def wait_for_the_clock(folder: Path) -> None:
    """Return when a file changed now is seen to be younger than all of the folder's.

    Kernels give times in steps of up to 10 ms; stage 1 notices what was changed in a later step than its record.
    """
    newest = max(path.lstat().st_ctime_ns for path in folder.iterdir())
    probe = folder.parent / f".{folder.name}-clock"
    while True:
        probe.write_bytes(b"")
        if probe.stat().st_ctime_ns > newest:
            break
        time.sleep(0.001)
    probe.unlink()


def main() -> int:
    """The program: prints one line when the work begins."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--num_workers", type=int, default=1)
    parser.add_argument("--num_rows", type=int, default=22)
    parser.add_argument("--slow_s", type=float, default=0.0)
    arguments = parser.parse_args()
    source = SmallSource(arguments.num_rows, slow_s=arguments.slow_s)
    plan = small_plan(arguments.directory, source)
    with StopFlag() as stop:
        print("ready", flush=True)
        survey = survey_cache(plan, range(plan.num_shards))
        report = make_cache(
            plan, source, survey=survey,
            batch_size=4, num_workers=arguments.num_workers, stop=stop,
        )  # fmt: skip
        if stop.requested:
            raise Interrupted(f"{stop.reason}: {report.shards_left} shards left")
    return EXIT_DONE


if __name__ == "__main__":
    run_command(main)
