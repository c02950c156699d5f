"""The parts of benchmarks.gpu that measure speed: ceiling, steps, feed, save and pass.

Each is a generator of (name, value): what it has found so far is kept when it is ended in the middle.
"""

import functools
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_setup import (
    Bench,
    Trainer,
    busy_share,
    free_memory,
    held_bytes,
    host_milliseconds,
    milliseconds,
    peak_bytes,
    synchronize,
)
from distillery.config.keys_train import TrainConfig
from distillery.models.precision import autocast_for
from distillery.precompute.jobs import open_jobs
from distillery.precompute.teacher_job import build_teacher_job
from distillery.precompute.teacher_shards import make_teacher_cache
from distillery.system.signals import StopFlag
from distillery.teacher_cache.outputs import forward_batch
from distillery.training.checkpoints import CheckpointWriter

Found = Iterator[tuple[str, Any]]

# name of a variant -> changes of the default train configuration; the first is the default itself
EAGER = {"compile": False}
VARIANTS: dict[str, dict] = {
    "default": {},
    "eager": EAGER,
    "teacher compiled": EAGER | {"compile_teacher": True},
    "student and losses compiled": EAGER | {"compile_student": True},
    "both and losses compiled": {"compile": True},
    "teacher weights fp32": EAGER | {"teacher_precision": "fp32"},
    "cached": {"teacher_cache": {"views": 2, "enabled": True}},
    "hybrid": {"teacher_cache": {"views": 2, "enabled": True, "mode": "hybrid", "live_fraction": 0.5}},
}
# the peers' steps
TIMM, LIGHTLY = "timm FeatureDistillationTask", "LightlyTrain distillationv3, with its loader"
# batches that a timing goes round in
KEPT_STEPS = 4


# ---- ceiling -----------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts the matrix products of what runs inside: (rows, inner, columns, batch, layouts, dtype) -> how often."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in {"mm", "bmm", "addmm", "baddbmm"}:
            a, b = args[-2:]
            batch = a.shape[0] if a.ndim == 3 else 0
            layouts = tuple(value.stride(-1) != 1 for value in (a, b))
            self.shapes[(a.shape[-2], a.shape[-1], b.shape[-1], batch, layouts, a.dtype)] += 1
        return func(*args, **(kwargs or {}))


def ceiling(bench: Bench) -> Found:
    """What this card gives at the very shapes of a training step: products, copies, the patch embedding."""
    device, sizes = bench.device(), bench.sizes
    trainer = Trainer(bench.configs(train=EAGER), device)
    group = next(trainer.groups())
    trainer.step(group)
    with FlopCounterMode(display=False) as counter:
        trainer.step(group)
    with Products() as products:
        trainer.step(group)
    yield "step_flop", counter.get_total_flops()
    del trainer, group
    free_memory()
    yield "gemm", gemm_rates(products.shapes, device, repeats=3 if bench.is_smoke else 20)

    num_bytes = 2**20 if bench.is_smoke else 2**30
    source, target = (torch.empty(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    copy_ms = milliseconds(lambda: target.copy_(source), device, 5)
    # read once and written once
    yield "copy", {"copy_ms": copy_ms, "gb_per_s": 2 * num_bytes / copy_ms / 1e6}
    for name, is_pinned in (("to_device_pinned", True), ("to_device_unpinned", False)):
        batch = torch.zeros((64 if bench.on_cuda else 8, 3, 224, 224), pin_memory=is_pinned and bench.on_cuda)
        target = torch.empty_like(batch, device=device)
        copy_ms = milliseconds(lambda: target.copy_(batch, non_blocking=True), device, 5)  # noqa: B023
        yield name, {"copy_ms": copy_ms, "gb_per_s": batch.nbytes / copy_ms / 1e6}
    dtype = torch.bfloat16 if bench.on_cuda else torch.float32
    layer = nn.Conv2d(3, 768 if bench.on_cuda else 16, 14, 14).to(device, dtype)
    images = torch.zeros((sizes.batch, 3, 224, 224), device=device, dtype=dtype)
    found = {}
    for name in ("contiguous", "channels_last"):
        layout = {"memory_format": getattr(torch, f"{name}_format" if name == "contiguous" else name)}
        layer, images = layer.to(**layout), images.contiguous(**layout)
        with torch.no_grad():
            found[f"{name}_ms"] = milliseconds(lambda: layer(images), device, 5)  # noqa: B023
    yield "patch_embed", found
    if not bench.on_cuda:
        yield "note", ["on a CPU nothing is page-locked, and a copy to the device is one within memory"]


def gemm_rates(shapes: Counter, device: torch.device, repeats: int) -> dict[str, Any]:
    """Time every product of a step: milliseconds of all of them, TFLOP/s together and of each shape."""
    rows = []
    for (m, k, n, batch, layouts, dtype), count in shapes.items():
        sides = []
        for shape, is_transposed in zip(((m, k), (k, n)), layouts, strict=True):
            shape = (*[batch] * bool(batch), *(shape[::-1] if is_transposed else shape))
            value = torch.randn(shape, device=device, dtype=dtype)
            sides.append(value.mT if is_transposed else value)
        took_ms = milliseconds(lambda: torch.matmul(*sides), device, repeats, warmup=2)  # noqa: B023
        flop = 2 * m * k * n * max(1, batch)
        rows.append({"shape": [batch, m, k, n], "count": count, "ms": took_ms, "tflops": flop / took_ms / 1e9})
    step_ms = sum(row["count"] * row["ms"] for row in rows)
    flop = sum(row["count"] * row["ms"] * row["tflops"] for row in rows)
    rows.sort(key=lambda row: -row["count"] * row["ms"])
    return {"step_ms": step_ms, "tflops": flop / step_ms, "shapes": rows[:12]}


# ---- steps -------------------------------------------------------------------------------------------------------


def steps(bench: Bench) -> Found:
    """A training step in every variant and batch, and those of the peers, on batches that are on the device."""
    device, sizes = bench.device(), bench.sizes
    roof = bench.earlier.get("ceiling", {})
    if "gemm" not in roof:
        roof = dict(ceiling(bench))
        free_memory()
    contenders: list[tuple[str, int, Callable[[], dict]]] = []
    for batch in (sizes.batch, *sizes.other_batches):
        where = "" if batch == sizes.batch else f", batch {batch}"
        for name, changes in VARIANTS.items():
            measure = functools.partial(variant_step, bench, device, changes | {"batch_size": batch})
            contenders.append((name + where, batch, measure))
        if batch == sizes.batch:
            contenders.append((TIMM, batch, lambda: timm_step(bench, device)))
            contenders.append((LIGHTLY, batch, lambda: lightly_step(bench, device)))
    # seconds that a variant took, which it will take again with another batch
    left_out, took_s = [], {}
    for name, batch, measure in contenders:
        variant = name.partition(",")[0]
        if bench.seconds_left() < took_s.get(variant, max(took_s.values(), default=0.0)):
            left_out.append(f"{name}: no time left")
            continue
        began = time.monotonic()
        try:
            row = measure()
        except Exception as error:
            # a peer may fail as it likes, or not be installed; a step of ours may ask for more memory than there is
            if variant in VARIANTS and not isinstance(error, torch.OutOfMemoryError):
                raise
            left_out.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        finally:
            free_memory()
        took_s[variant] = time.monotonic() - began
        # a step on stored outputs does other arithmetic, and so do the peers
        if variant in VARIANTS and variant not in ("cached", "hybrid"):
            row["tflops"] = roof["step_flop"] * batch / sizes.batch / row["step_ms"] / 1e9
            row["share_of_ceiling"] = row["tflops"] / roof["gemm"]["tflops"]
        yield name, row
    yield "left_out", left_out
    if not bench.on_cuda:
        yield "note", ["on a CPU: clock times; the busy share is CPU time over time; nothing is compiled"]


def variant_step(bench: Bench, device: torch.device, changes: dict) -> dict[str, Any]:
    """The trainer's step. The batches of a few steps are kept, since those of hybrid are of two kinds."""
    trainer = Trainer(bench.configs(train=changes), device)
    groups = itertools.cycle(list(itertools.islice(trainer.groups(), KEPT_STEPS)))
    row = time_step(lambda: trainer.step(next(groups)), device, changes["batch_size"], bench)
    found = {"compile_s": trainer.compile_s, "precision": trainer.task.precision}
    return row | found | {"compiled": trainer.messages[-1] if trainer.messages else "no"}


def time_step(run: Callable[[], Any], device: torch.device, batch: int, bench: Bench) -> dict[str, float]:
    """A step by events and on the host, images/s, the share of busy time, the most memory."""
    sizes = bench.sizes

    # each of the kept batches once: those of a hybrid run are of two kinds
    step_ms = milliseconds(run, device, sizes.steps, warmup=KEPT_STEPS)
    return {
        "step_ms": step_ms,
        "host_ms": host_milliseconds(run, device, max(2, sizes.steps // 2)),
        "images_per_second": 1000 * batch / step_ms,
        "busy_share": busy_share(run, device, 3),
        "peak_memory_gb": peak_bytes(device) / 1e9,
    }


def timm_step(bench: Bench, device: torch.device) -> dict[str, float]:
    """timm's feature distillation of the same pair, on the same shapes, with AdamW in one kernel."""
    from benchmarks.learning_peers import timm_task

    configs = bench.configs()
    task, student = timm_task(configs, device)
    task.train()
    trained = [p for p in task.trainable_module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    size = bench.sizes.image_px
    view = torch.randn((bench.sizes.batch, 3, size, size), device=device)
    labels = torch.zeros(len(view), dtype=torch.int64, device=device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = task(student.prepare(view), labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return time_step(run, device, bench.sizes.batch, bench)


def lightly_step(bench: Bench, device: torch.device) -> dict[str, float]:
    """LightlyTrain's own training of the same pair: the median time between two steps, loader and all."""
    import lightly_train

    from benchmarks.learning_peers import wrapped
    from distillery.models import configured

    configs, sizes, marks = bench.configs(), bench.sizes, []
    folder = bench.folder / "lightly"
    export_images(bench, folder / "images")
    student, teacher = (
        wrapped(GridOfTokens(build(configs.model, configs.data)), after)
        for build, after in (
            (configured.build_student_backbone, lambda _done: marks.append(time.perf_counter())),
            (configured.build_teacher_backbone, None),
        )
    )
    lightly_train.pretrain(
        out=str(folder / "out"), data=str(folder / "images"), model=student, method="distillationv3",
        method_args={"teacher": teacher}, transform_args={"image_size": (sizes.image_px, sizes.image_px)}, epochs=1,
        batch_size=sizes.batch, callbacks={"model_checkpoint": None}, precision="bf16-mixed" if bench.on_cuda else 32,
    )  # fmt: skip
    times = [1000 * (after - before) for before, after in itertools.pairwise(marks)]
    step_ms = statistics.median(times[len(times) // 4 :])
    return {"step_ms": step_ms, "images_per_second": 1000 * sizes.batch / step_ms}


class GridOfTokens(nn.Module):
    """A backbone whose forward_features gives its tokens as a map [B, D, h, w], as LightlyTrain wants one."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.num_features = backbone, backbone.widths["tokens"]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, D, h, w]."""
        found = self.backbone(images)
        return found.tokens.mT.unflatten(2, found.grid)


def export_images(bench: Bench, folder: Any) -> None:
    """The images of the data set as files."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    for number, row in enumerate(pq.read_table(bench.folder / "images.parquet").column("image").to_pylist()):
        (folder / f"{number:06d}.jpg").write_bytes(row["bytes"])


# ---- feed, save --------------------------------------------------------------------------------------------------


def feed(bench: Bench) -> Found:
    """Whether the loader keeps up with training, and whether memory stays the same over many short epochs."""
    device, sizes = bench.device(), bench.sizes
    for dtype in ("uint8", "float32"):
        trainer = Trainer(bench.configs(dtype=dtype), device)
        steps_in_epoch, log_every = trainer.steps_in_epoch, max(2, sizes.warmup * 2)
        trainer.train_epoch(steps_in_epoch, log_every)
        # the first row of an epoch holds the wait for its first batch, which a real epoch of 500 steps has once as well
        rows = [row for _ in range(2) for row in trainer.train_epoch(steps_in_epoch, log_every)[1:]]
        found = {
            "step_ms": 1000 * statistics.median(row["step_seconds"] for row in rows),
            "data_wait_fraction": statistics.mean(row["data_wait_fraction"] for row in rows),
            "images_per_second": statistics.median(row["images_per_second"] for row in rows),
        }
        held = []
        for _ in range(sizes.short_epochs):
            trainer.train_epoch(min(4, steps_in_epoch), 2)
            held.append(held_bytes(device))
        settled = held[min(4, len(held) - 1)]
        found |= {"memory_gb": [round(value / 1e9, 4) for value in held], "memory_growth": held[-1] / settled - 1}
        yield dtype, found
        del trainer
        free_memory()
    if not bench.on_cuda:
        yield "note", ["on a CPU the memory is the process's resident pages, and nothing is compiled"]


def save(bench: Bench) -> Found:
    """What a checkpoint costs: steps from its beginning until it is on the disk, and as many without one, in turns."""
    device, sizes = bench.device(), bench.sizes
    trainer = Trainer(bench.configs(train=EAGER), device)
    groups = trainer.groups_without_end()
    checkpoints = CheckpointWriter(bench.folder / "run_save", None, in_background=bench.on_cuda)

    def step() -> None:
        trainer.step(next(groups))

    def wait() -> None:
        synchronize(device)

    pairs = []
    # the first checkpoint allocates what the others use again
    for number in range(1 + (3 if bench.is_smoke else 12)):
        if number > 1 and bench.seconds_left() < 0:
            break
        pair = cost_of_checkpoint(step, lambda: trainer.save(checkpoints), checkpoints, wait, sizes.save_every)
        pairs += [pair] * bool(number)
    checkpoints.close()
    without_ms = 1000 * statistics.median(pair.without_s / pair.steps for pair in pairs)
    extra_ms = 1000 * statistics.median(pair.with_s - pair.without_s for pair in pairs)
    write_ms = 1000 * statistics.median(pair.write_s for pair in pairs)
    known = bench.earlier.get("steps", {}).get("default", {}).get("step_ms", without_ms)
    default = TrainConfig()
    intervals = [default.save_every * known, 60_000 * (default.save_every_minutes or 0)]
    interval_ms = min(interval for interval in intervals if interval)
    yield "step_ms", without_ms
    # of the training, and until the file and its record are there
    yield "checkpoint_ms", extra_ms
    yield "write_ms", write_ms
    yield "pairs", len(pairs)
    yield "default_interval_ms", interval_ms
    yield "share_of_time", extra_ms / interval_ms
    if write_ms > interval_ms:
        yield "note", ["a write takes longer than the default interval: there each save waits for the write before it"]


@dataclass(frozen=True)
class CheckpointCost:
    """Seconds of so many steps with a checkpoint and without, and until it was on the disk."""

    steps: int
    with_s: float
    without_s: float
    write_s: float


def cost_of_checkpoint(
    step: Callable[[], Any], save: Callable[[], Any], checkpoints: CheckpointWriter, wait: Callable[[], Any], least: int
) -> CheckpointCost:
    """Save, then take `least` steps or more, until the write has ended; then as many without; wait: for the device.

    A save waits where the last write has not ended, as a run's does only where its checkpoints are too close.
    """
    wait()
    before, steps, write_s, began = checkpoints.last, 0, None, time.perf_counter()
    save()
    while write_s is None or steps < least:
        step()
        steps += 1
        checkpoints.raise_if_failed()
        if write_s is None and checkpoints.last != before:
            write_s = time.perf_counter() - began
    wait()
    with_s, began = time.perf_counter() - began, time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return CheckpointCost(steps, with_s, time.perf_counter() - began, write_s)


# ---- pass --------------------------------------------------------------------------------------------------------


def teacher_pass(bench: Bench) -> Found:
    """Stage 1's --teacher from its first batch to its last, and the teacher alone on a random batch of its size."""
    sizes = bench.sizes
    # views of another seed: none of them has been made
    configs = bench.configs(train={"teacher_cache": {"enabled": True, "views": 2, "seed": 1}})
    device = bench.device()
    images = open_jobs(configs.data, 1, 0)[0]
    job, marks = build_teacher_job(configs, images.plan, images.shards), []
    stop = StopFlag()
    make_teacher_cache(
        job.plan, job.teacher, shards=job.shards, stop=stop,
        on_rows=lambda count, **_: marks.append((time.perf_counter(), count)),
    )  # fmt: skip
    passes = sum(count for _, count in marks[1:]) * job.plan.spec.num_views
    rate = passes / (marks[-1][0] - marks[0][0])
    # a shard may have fewer images than a batch
    view = torch.randn((min(forward_batch(device), sizes.shard), 3, sizes.image_px, sizes.image_px), device=device)
    with torch.inference_mode(), autocast_for(job.teacher.precision, device.type):
        batch_ms = milliseconds(lambda: job.teacher.backbone(view), device, sizes.steps, warmup=sizes.warmup)
    yield "batch", len(view)
    yield "images_per_second", rate
    yield "bare_images_per_second", 1000 * len(view) / batch_ms
    yield "bare_batch_ms", batch_ms
    yield "share_of_bare", rate * batch_ms / 1000 / len(view)
