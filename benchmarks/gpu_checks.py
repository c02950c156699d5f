"""The parts of benchmarks.gpu that look for what is wrong: env, safety, eval, numbers and ddp.

Each is a generator of (name, value): what it has found so far is kept when it is ended in the middle.
"""

import contextlib
import itertools
import math
import os
import socket
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.gpu_setup import (
    Bench,
    Command,
    Trainer,
    free_memory,
    images_and_rows,
    last_step,
    milliseconds,
    rows_of,
    seconds_of,
    synchronize,
)
from benchmarks.gpu_speed import EAGER, VARIANTS, Found
from distillery.evaluate.classification import evaluate_on_folders
from distillery.evaluate.sets import eval_sets
from distillery.reading.loader import DeviceCopies

# name of a step in which the host may not wait -> changes of the default train configuration
RESNET = "ResNet student"
WATCHED: dict[str, dict] = {
    "live": EAGER,
    "cached": EAGER | VARIANTS["cached"],
    "hybrid": EAGER | VARIANTS["hybrid"],
    "fp16": EAGER | {"precision": "fp16"},
    RESNET: EAGER,
    "compiled": {"compile": True},
}
# name of a run whose losses are compared with those of the first -> changes as well
EXACT = {"precision": "fp32", "teacher_precision": "fp32"}
CURVES: dict[str, dict] = {"float32": EAGER | EXACT, "bf16": EAGER | {"precision": "bf16"}} | VARIANTS
# for the other process to notice
PATIENCE_S = 120.0


def env(bench: Bench) -> Found:
    """What everything below was measured with."""
    device = bench.device()
    yield "torch", torch.__version__
    yield "cuda", torch.version.cuda
    yield "cudnn", torch.backends.cudnn.version()
    backends = torch.backends.cuda
    enabled = {"flash": backends.flash_sdp_enabled(), "efficient": backends.mem_efficient_sdp_enabled(),
               "cudnn": backends.cudnn_sdp_enabled(), "math": backends.math_sdp_enabled()}  # fmt: skip
    yield "attention", [name for name, is_on in enabled.items() if is_on]
    yield "cpus", len(os.sched_getaffinity(0))
    if bench.on_cuda:
        card = torch.cuda.get_device_properties(device)
        yield "memory_gb", card.total_memory / 1e9
        yield "capability", f"{card.major}.{card.minor}"
        yield "bf16", torch.cuda.is_bf16_supported(including_emulation=False)
        yield "nvidia_smi", nvidia_smi()
    else:
        yield "note", ["no CUDA: driver, clocks and memory of the card are left out"]
    value = torch.zeros(1, device=device)

    def thousand() -> None:
        for _ in range(1000):
            value.add_(1)

    # what a launch costs the host: a step has some thousand of them
    yield "thousand_launches_ms", milliseconds(thousand, device, 5)


def nvidia_smi() -> dict[str, str] | str:
    """Driver, clocks, power limit and temperature of the first card, as nvidia-smi says them."""
    names = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu", "pstate"]
    command = ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"not to be had: {error}"
    return dict(zip(names, done.stdout.strip().split(", "), strict=False))


# ---- safety ------------------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts where the host asks for a number, which on a GPU it would have to wait for."""

    NAMES = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select"}

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.NAMES
        return func(*args, **(kwargs or {}))


def safety(bench: Bench) -> Found:
    """No step makes the host wait, no byte is wrong, and a killed run goes on as if nothing had happened."""
    yield "resume", resume(bench)
    device = bench.device()
    for name, train in WATCHED.items():
        model = {"student_name": bench.sizes.convolutional} if name == RESNET else {}
        yield name, host_waits(Trainer(bench.configs(train=train, model=model), device), device, bench.sizes.steps)
        free_memory()
    yield "known values", known_values(bench, device)
    if not bench.on_cuda:
        yield (
            "note",
            ["on a CPU the numbers that the host reads in a step are counted, and no stream is held up"],
        )


def host_waits(trainer: Trainer, device: torch.device, steps: int) -> dict[str, Any]:
    """Steps in which waiting for the GPU is an error; on the CPU the numbers that the host reads are counted.

    torch does not call it waiting where a copy that need not be waited for comes from pageable memory, and CUDA then
    waits: such tensors are counted among those handed to the copies.
    """
    groups = trainer.groups_without_end()
    waits, reads = None, HostReads()

    def run() -> None:
        for _ in range(steps):
            trainer.step(next(groups))

    with contextlib.ExitStack() as stack:
        copied = stack.enter_context(watched_copies())
        # what happens once: constants, the optimiser's state, compilation, for both kinds of a hybrid run's batches
        for _ in range(5):
            trainer.step(next(groups))
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            stack.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            stack.enter_context(reads)
        try:
            took_s = seconds_of(run)
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            return {"waits": str(error).splitlines()[0], **copied}
    synchronize(device)
    found = {"waits": waits, "host_ms": 1000 * took_s / steps, **copied}
    return found if device.type == "cuda" else found | {"host_reads_per_step": reads.count / steps}


@contextlib.contextmanager
def watched_copies() -> Iterator[Counter]:
    """Inside, counts tensors of the host that are handed to the copies to the device: "copied"; of them, "pageable"."""
    begin, counts = DeviceCopies.begin, Counter(copied=0, pageable=0)

    def watched(copies: DeviceCopies, batch: Any) -> Any:
        tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_cuda]
        counts.update(copied=len(tensors), pageable=sum(not tensor.is_pinned() for tensor in tensors))
        return begin(copies, batch)

    with mock.patch.object(DeviceCopies, "begin", watched):
        yield counts


def known_values(bench: Bench, device: torch.device) -> dict[str, Any]:
    """The loader's batches against the shards as torch.load reads them, while either stream is held up at random."""
    trainer, wrong = Trainer(bench.configs(train=EAGER), device), torch.zeros((), dtype=torch.int64, device=device)
    paths = sorted((bench.folder / "cache_uint8").glob("images_shard_*.pt"))
    expected = torch.cat([torch.load(path, weights_only=True)["images"] for path in paths]).to(device)
    draws, done, began = torch.Generator().manual_seed(0), 0, time.perf_counter()

    def hold_up() -> None:
        if device.type == "cuda" and torch.rand((), generator=draws) < 0.5:
            torch.cuda._sleep(int(2e6 * torch.rand((), generator=draws)))  # up to a millisecond

    with held_up_copies(hold_up) as copies, watched_copies() as copied:
        while done < bench.sizes.loader_batches:
            for (batch,) in trainer.groups():
                hold_up()
                images, rows = images_and_rows(batch)
                wrong += (images != expected[rows]).sum()
                done += 1
            trainer.position.next_epoch()
    count = int(wrong)
    batch_ms = 1000 * (time.perf_counter() - began) / done
    return {"batches": done, "wrong_bytes": count, "batch_ms": batch_ms, "copies_held_up": next(copies), **copied}


@contextlib.contextmanager
def held_up_copies(hold_up: Any) -> Iterator[Iterator[int]]:
    """Inside, every stream that is entered does first what hold_up gives it to do; yields how often, as an iterator."""
    enter, entered = torch.cuda.stream, itertools.count()

    @contextlib.contextmanager
    def slowed(stream: Any) -> Iterator[None]:
        with enter(stream):
            next(entered)
            hold_up()
            yield

    with mock.patch.object(torch.cuda, "stream", slowed):
        yield entered


def resume(bench: Bench) -> dict[str, Any]:
    """A run that is killed in mid-epoch and started again, beside one that nothing happens to: their logged losses."""
    save_every = bench.sizes.save_every
    train = EAGER | {"save_every": save_every, "log_every": 1, "eval_every_epochs": 0}
    runs = {name: bench.folder / f"run_{name}" for name in ("straight", "killed")}

    def run_until(name: str, steps: int) -> Command:
        """Start a run, and kill it when it has logged so many steps and written a checkpoint."""
        command = bench.start("distill_trainer", name, train=train | {"checkpoint_dir": str(runs[name])})
        command.kill_when(lambda: last_step(runs[name]) >= steps and list(runs[name].glob("checkpoints/step_*.json")))
        return command

    run_until("straight", 3 * save_every)
    run_until("killed", save_every + 1)
    killed_at = last_step(runs["killed"])
    again = run_until("killed", 3 * save_every)
    straight, killed = (rows_of(path) for path in runs.values())
    pairs = list(zip(straight, killed, strict=False))
    differences = [abs(one["loss"] - other["loss"]) / abs(one["loss"]) for one, other in pairs]
    return {
        "killed_after_step": killed_at,
        "rows": len(pairs),
        "largest_difference": worst(differences),
        # on CUDA some kernels add in no fixed order, and what that changes grows with every step
        "tolerance": 0.02 if bench.on_cuda else 0.0,
        "went_on": "starting a new run" not in again.path.read_text(),
        "step_ms": 1000 * statistics.median(row["step_seconds"] for row in killed),
    }


# ---- eval, numbers -----------------------------------------------------------------------------------------------


def evaluation(bench: Bench) -> Found:
    """Features of labelled images in float32 and in bf16, and what k-NN says of both."""
    files = {split: str(bench.folder / f"{split}.parquet") for split in ("train", "test")}
    data = {"eval_datasets": {"made": {"dataset_name": "parquet", "data_files": files}}}
    device, accuracies = bench.device(), {}
    for name, precision in (("float32", "fp32"), ("bf16", "bf16")):
        configs = bench.configs(train=EAGER | {"precision": precision}, data=data)
        trainer = Trainer(configs, device)
        (labelled,) = eval_sets(configs.data)
        model = trainer.task.teacher.backbone
        for _ in range(2):  # the first time pays for what happens once
            began = time.perf_counter()
            row = evaluate_on_folders(model, labelled.train, labelled.test, k=5, device=device, precision=precision)
            took_s, accuracies[name] = time.perf_counter() - began, row["knn_top1"]
        images = 2 * bench.sizes.labelled
        yield name, {"images_per_second": images / took_s, "image_ms": 1000 * took_s / images,
                     "knn_top1": accuracies[name]}  # fmt: skip
        del trainer, model
        free_memory()
    yield "knn_difference", abs(accuracies["bf16"] - accuracies["float32"])


def numbers(bench: Bench) -> Found:
    """What lower precision and compilation change: the teacher's features, and the loss of every variant."""
    device, sizes = bench.device(), bench.sizes
    features: dict[str, dict[str, Tensor]] = {}
    for name, changes in {"float32": EXACT, "bf16": {"precision": "bf16"}}.items():
        trainer = Trainer(bench.configs(train=EAGER | changes), device)
        with torch.no_grad(), trainer.task.autocast():
            found = trainer.task.teacher.backbone(trainer.views(sizes.batch)).tensors()
        features[name] = {field: value.float() for field, value in found.items()}
        del trainer
        free_memory()
    yield (
        "teacher_cosine",
        {
            field: F.cosine_similarity(features["bf16"][field], value, dim=-1).min().item()
            for field, value in features["float32"].items()
        },
    )
    learning = {"learning_rate": 1e-3, "warmup_epochs": 0}  # a long run's warm-up would hardly move the student
    reference: list[float] = []
    for name, changes in CURVES.items():
        if bench.seconds_left() < 0.1 * PATIENCE_S and not bench.is_smoke:
            yield "note", [f"{name} and those after it: no time left"]
            return
        began = time.perf_counter()
        trainer = Trainer(bench.configs(train=changes | learning), device)
        losses = [trainer.step(group)["loss"] for group in itertools.islice(trainer.groups_without_end(), sizes.curve)]
        curve = torch.stack(losses).tolist()
        reference = reference or curve
        yield (
            name,
            {
                "curve": [round(value, 5) for value in curve[:: max(1, sizes.curve // 10)]],
                "largest_difference": largest_difference(reference, curve),
                "step_ms": 1000 * (time.perf_counter() - began) / sizes.curve,
            },
        )
        del trainer
        free_memory()


def largest_difference(reference: list[float], curve: list[float]) -> float:
    """The largest relative difference of two loss curves, each averaged over ten steps at a time."""
    means = [[statistics.mean(values[i : i + 10]) for i in range(0, len(values), 10)] for values in (reference, curve)]
    return worst([abs(one - other) / abs(one) for one, other in zip(*means, strict=True)])


def worst(differences: list[float]) -> float:
    """The largest of them, infinite where one is not finite: max() may pass over a NaN."""
    return max(value if math.isfinite(value) else math.inf for value in differences)


# ---- ddp ---------------------------------------------------------------------------------------------------------


def ddp(bench: Bench) -> Found:
    """Two processes are one: the gradients of a step, and what becomes of the other when one is killed."""
    has_two = bench.num_gpus > 1
    yield "backend", "nccl" if has_two else "gloo"
    if not has_two:
        yield "note", ["fewer than two GPUs: two processes on the CPU, for correctness alone"]
    half = max(1, bench.sizes.batch // 2)
    train = EAGER | {"precision": "fp32", "eval_every_epochs": 0, "log_every": 1, "save_every": 1}
    train |= {"keep_checkpoints": 1000}
    model = {} if has_two else {"teacher_name": "test_vit", "student_name": "test_vit"}
    flags = [] if has_two or not bench.on_cuda else ["--device", "cpu"]
    moments = {}
    for processes in (1, 2):
        run_dir = bench.folder / f"run_of_{processes}"
        changes = train | {"checkpoint_dir": str(run_dir), "batch_size": 2 * half // processes}
        ranks = start_ranks(bench, f"of_{processes}", processes, flags, changes, model)
        ranks[-1].kill_when(lambda: last_step(run_dir) >= 4)  # noqa: B023
        began = time.perf_counter()
        state = torch.load(run_dir / "checkpoints" / "step_00000001.pt", weights_only=True)["optimizer"]["state"]
        # after one step the first moment is a tenth of the gradient, a twentieth under Muon
        moments[processes] = torch.cat([entry["exp_avg"].flatten() for entry in state.values()])
    status = ranks[0].wait(PATIENCE_S)
    yield "seconds_to_notice", time.perf_counter() - began
    yield "status_of_the_other", status
    yield "gradient_difference", ((moments[2] - moments[1]).norm() / moments[1].norm()).item()
    yield "step_ms", 1000 * statistics.median(row["step_seconds"] for row in rows_of(run_dir)[1:])


def start_ranks(bench: Bench, name: str, processes: int, flags: list[str], train: dict, model: dict) -> list[Command]:
    """The trainer in so many processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        bench.start(
            "distill_trainer", f"{name}_{rank}", *flags, train=train, model=model,
            environment=where | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]  # fmt: skip
