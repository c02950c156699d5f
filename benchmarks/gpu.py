"""What this machine's GPU makes of the training: `make gpu`, or one part of it alone.

    python -m benchmarks.gpu --minutes 9 --out gpu.json      # all parts, most telling figures first
    python -m benchmarks.gpu --part steps                    # one part; without --part they share the minutes
    python -m benchmarks.gpu --smoke                         # every part in a tiny form, on a CPU too
    python -m benchmarks.gpu --flops                         # arithmetic of the default pair, counted without a GPU

    part     measures                                                          holds when
    env      card, driver, clocks, memory, torch, cuDNN, attention             -
    safety   a killed run; waits in a step; known values through the loader    same losses, no wait, no wrong byte
    ceiling  the step's own matrix products, copies, the patch embedding       -
    steps    a step: variants x batches, by events and on the host; peers      half of the ceiling, ahead of timm
    feed     waiting for data, memory over many short epochs                   under 1 %, flat within 1 %
    save     steps with and without a checkpoint, in turns                     under 2 % of the time
    eval     features/s in float32 and bf16, k-NN of both                      the same within 1 %
    numbers  the teacher in bf16 beside float32; loss curves of all variants   cosine over 0.99, curves within 5 %
    pass     stage 1's --teacher beside the teacher alone                      over 85 % of its images/s
    ddp      gradients of two processes and of one; one killed                 the same; the other ends in 30 s

Each part is a process of its own: an error, too little memory or a part that hangs leaves the others alone. --out is
written after each part: {"device": name, "parts": {name: {..., "passed": true, false or null, "seconds": ...}}}; null
means that nothing could be decided here, as with speed on a CPU. The exit status is 1 where a part failed or something
does not hold that should. The models are untrained; the images are made for the purpose.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, gpu_speed
from benchmarks.gpu_setup import FLOATS, FORK, IMAGES, LABELLED, OUTPUTS, Bench
from distillery.system.files import write_atomic

# the default pair with the size at which both models have one grid
EXAMPLE = Path(__file__).resolve().parents[1] / "configs/imagenet_500k_1gpu/model_config_kd.yaml"
# loss curves: of runs that see the same views, and of those on stored outputs, which see others
BAND, STORED_BAND = 0.05, 0.15


@dataclass(frozen=True)
class Condition:
    """What a part's figures must fulfil.

    holds: from them to whether they do; a KeyError or None says that they cannot tell. on_cpu: whether it is asked of a
    CPU too: correctness is, speed is not.
    """

    text: str
    holds: Callable[[dict], bool | None]
    on_cpu: bool = False


@dataclass(frozen=True)
class Part:
    """A part: what it measures, the data sets it needs, its share of the minutes, what must hold."""

    measure: Callable[[Bench], Iterator[tuple[str, Any]]]
    share: float
    needs: tuple[str, ...] = ()
    conditions: tuple[Condition, ...] = ()


def _all_hold(names: Iterable[str], holds: Callable[[str], bool | None]) -> bool | None:
    """False where one does not hold; None where all do but those not measured, which a KeyError or None says."""
    answers = []
    for name in names:
        try:
            answers.append(holds(name))
        except KeyError:
            answers.append(None)
    if False in answers:
        return False
    return None if None in answers else True


def _no_step_waits(found: dict) -> bool | None:
    return _all_hold(gpu_checks.WATCHED, lambda name: found[name]["waits"] is None)


def _all_is_pinned(found: dict) -> bool | None:
    def is_pinned(name: str) -> bool | None:
        return not found[name]["pageable"] if found[name]["copied"] else None

    return _all_hold((*gpu_checks.WATCHED, "known values"), is_pinned)


def _curves_agree(found: dict) -> bool | None:
    stored = {"cached", "hybrid"}
    return _all_hold(
        gpu_checks.CURVES, lambda name: found[name]["largest_difference"] < (STORED_BAND if name in stored else BAND)
    )


PARTS = {
    "env": Part(gpu_checks.env, 0.03),
    "ceiling": Part(gpu_speed.ceiling, 0.06, (IMAGES,)),
    "steps": Part(
        gpu_speed.steps, 0.37, (IMAGES, OUTPUTS),
        (
            Condition(
                "the default step at the default batch takes over 50 % of the GEMM ceiling",
                lambda found: found["default"]["share_of_ceiling"] > 0.5,
            ),
            # LightlyTrain's time is that of a whole run, whose loader works on the CPU
            Condition(
                "the default step is faster than timm's",
                lambda found: found["default"]["step_ms"] < found[gpu_speed.TIMM]["step_ms"],
            ),
            Condition(
                "a step on stored outputs is at least 1.6 times as fast as a live one, both as configured by default",
                lambda found: found["default"]["step_ms"] > 1.6 * found["cached"]["step_ms"],
            ),
        ),
    ),
    "safety": Part(
        gpu_checks.safety, 0.15, (IMAGES, OUTPUTS),
        (
            Condition("a killed run goes on from a checkpoint", lambda found: found["resume"]["went_on"], True),
            Condition(
                "its losses are those of a straight run: within 2 % on CUDA, exactly on a CPU",
                lambda found: found["resume"]["largest_difference"] <= found["resume"]["tolerance"], True,
            ),
            Condition("no step makes the host wait for the GPU", _no_step_waits),
            Condition("the host's memory that is copied from is pinned", _all_is_pinned),
            Condition("copies were held up on their stream", lambda found: found["known values"]["copies_held_up"] > 0),
            Condition("no wrong byte", lambda found: found["known values"]["wrong_bytes"] == 0, True),
        ),
    ),
    "feed": Part(
        gpu_speed.feed, 0.12, (IMAGES, FLOATS),
        (
            Condition(
                "less than 1 % of the time waits for data",
                lambda found: all(found[dtype]["data_wait_fraction"] < 0.01 for dtype in ("uint8", "float32")),
            ),
            Condition(
                "memory stays within 1 % over the short epochs",
                lambda found: all(abs(found[dtype]["memory_growth"]) < 0.01 for dtype in ("uint8", "float32")),
            ),
        ),
    ),
    "save": Part(
        gpu_speed.save, 0.05, (IMAGES,),
        (Condition("checkpoints take less than 2 % of the time", lambda found: found["share_of_time"] < 0.02),),
    ),
    "pass": Part(
        gpu_speed.teacher_pass, 0.05, (IMAGES,),
        (Condition("over 85 % of the bare teacher's images/s", lambda found: found["share_of_bare"] > 0.85),),
    ),
    "numbers": Part(
        gpu_checks.numbers, 0.09, (IMAGES, OUTPUTS),
        (
            Condition(
                "cosine of the teacher in bf16 and float32 over 0.99",
                lambda found: _all_hold(("pooled", "tokens"), lambda name: found["teacher_cosine"][name] > 0.99), True,
            ),
            Condition(f"loss curves agree within {BAND:.0%}, on stored views {STORED_BAND:.0%}", _curves_agree, True),
        ),
    ),
    "eval": Part(
        gpu_checks.evaluation, 0.04, (LABELLED,),
        (Condition("k-NN in bf16 and float32 within 1 %", lambda found: found["knn_difference"] < 0.01, True),),
    ),
    "ddp": Part(
        gpu_checks.ddp, 0.06, (IMAGES,),
        (
            Condition("two processes have one's gradient", lambda found: found["gradient_difference"] < 1e-3, True),
            Condition(
                "when one is killed the other ends within 30 s, with an error",
                lambda found: found["seconds_to_notice"] < 30 and found["status_of_the_other"] not in (0, None), True,
            ),
        ),
    ),
}  # fmt: skip


def main() -> int:
    """Measure what was asked for, write --out, print a table; returns the exit status."""
    arguments = parse_arguments()
    if arguments.flops:
        print(flops_table())
        return 0
    num_gpus = in_fork(torch.cuda.device_count)
    if not num_gpus and not arguments.smoke:
        print("no CUDA on this machine: nothing is measured. --smoke runs every part in a tiny form on the CPU.")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-", dir=arguments.dir, ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), arguments.smoke, num_gpus, began + 60 * arguments.minutes)
        result = measure(bench, arguments.part or list(PARTS), arguments.out)
    print(f"\n{markdown(result)}")
    if arguments.out is not None:
        print(f"\nwritten: {arguments.out}")
    return int(any(part["passed"] is False or "error" in part for part in result["parts"].values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="every part in seconds, where there is no GPU too")
    parser.add_argument("--part", action="append", choices=list(PARTS), help="this one alone; may be repeated")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="written after each part")
    parser.add_argument("--dir", type=Path, help="where data and runs are written meanwhile")
    parser.add_argument("--flops", action="store_true", help="count the default pair's arithmetic, and stop")
    return parser.parse_args()


def measure(bench: Bench, names: Sequence[str], out: Path | None) -> dict:
    """Run parts one after the other, each in a process of its own; returns what --out holds."""
    end, made = bench.deadline, set()
    names = [name for name in PARTS if name in names]
    result: dict[str, Any] = {"device": in_fork(device_name, bench.num_gpus), "torch": torch.__version__,
                              "smoke": bench.is_smoke, "parts": {}}  # fmt: skip
    for number, name in enumerate(names):
        part, began = PARTS[name], time.monotonic()
        # what earlier parts have left over is everybody's
        shares = sum(PARTS[other].share for other in names[number:])
        seconds = (end - began) * part.share / shares
        bench.deadline, bench.earlier = began + seconds, result["parts"]
        found: dict[str, Any] = {}
        for what in part.needs:
            if what not in made and "error" not in found:
                found |= run_part(lambda bench, what=what: iter([(what, bench.make(what))]), bench, end)
                made |= {what} if "error" not in found else set()
                found.pop(what, None)
        if "error" not in found:
            found = run_part(part.measure, bench, min(end, bench.deadline + 0.5 * seconds))
        found["checks"] = checks = check(part, found, on_cuda=bench.on_cuda, is_smoke=bench.is_smoke)
        answers = [row["holds"] for row in checks if row["holds"] is not None]
        found |= {"passed": all(answers) if answers else None, "seconds": round(time.monotonic() - began, 2)}
        result["parts"][name] = found
        if out is not None:
            write_atomic(out.absolute(), json.dumps(result, indent=1).encode() + b"\n")
        print(f"{name}: {outcome(found)}, {found['seconds']:.1f} s", flush=True)
    return result


def run_part(measure_part: Callable, bench: Bench, until: float) -> dict[str, Any]:
    """What a part finds in a process of its own, ended at time.monotonic() `until`; with "error" where it fails."""
    if time.monotonic() >= until:
        return {"error": "no time was left for it"}
    path = bench.folder / "found.json"
    path.unlink(missing_ok=True)
    process = FORK.Process(target=_keep_found, args=(measure_part, bench, path))
    process.start()
    process.join(max(0.0, until - time.monotonic()))
    is_late = process.is_alive()
    if is_late:
        with contextlib.suppress(ProcessLookupError):  # its group, which it makes as soon as it runs
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()
    found = json.loads(path.read_text()) if path.exists() else {}
    if is_late:
        found["error"] = "it took too long and was ended"
    elif process.exitcode and "error" not in found:
        found["error"] = f"its process ended with status {process.exitcode}"
    return found


def _keep_found(measure_part: Callable, bench: Bench, path: Path) -> None:
    os.setsid()  # one group with what it starts
    found: dict[str, Any] = {}
    try:
        for name, value in measure_part(bench):
            found[name] = value
            write_atomic(path, json.dumps(found).encode())
    except Exception as error:
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
        write_atomic(path, json.dumps(found).encode())


def in_fork(function: Callable, *arguments: Any) -> Any:
    """The answer of a function that may touch CUDA: a process that has done so cannot be forked any more."""
    reader, writer = FORK.Pipe(duplex=False)
    process = FORK.Process(target=lambda: writer.send(function(*arguments)))
    process.start()
    writer.close()
    try:
        return reader.recv()
    finally:
        process.join()


def device_name(num_gpus: int) -> str:
    """The card's, or the CPU's architecture."""
    return torch.cuda.get_device_name(0) if num_gpus else f"cpu ({os.uname().machine})"


def check(part: Part, found: dict, *, on_cuda: bool, is_smoke: bool) -> list[dict]:
    """Each condition with whether it holds; null where it cannot be told, or says nothing about this machine."""
    rows = []
    for condition in part.conditions:
        holds = None
        if condition.on_cpu or (on_cuda and not is_smoke):
            try:
                holds = condition.holds(found)
            except (KeyError, TypeError, ValueError):
                holds = None
        rows.append({"check": condition.text, "holds": holds})
    return rows


def outcome(found: dict) -> str:
    """In a word: failed (with the error), passed, NOT passed, or measured."""
    if "error" in found:
        return f"failed ({found['error'].splitlines()[0]})"
    return {True: "passed", False: "NOT passed", None: "measured"}[found["passed"]]


# ---- the table ---------------------------------------------------------------------------------------------------

# figures that a reader looks for first: key of a row -> heading, how it is written
COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_ms": ("step, ms", "{:.2f}".format),
    "host_ms": ("host, ms", "{:.2f}".format),
    "images_per_second": ("images/s", "{:,.0f}".format),
    "share_of_ceiling": ("of the GEMM ceiling", "{:.0%}".format),
    "busy_share": ("busy", "{:.0%}".format),
    "peak_memory_gb": ("memory, GB", "{:.1f}".format),
    "compile_s": ("compiling, s", "{:.0f}".format),
}


def markdown(result: dict) -> str:
    """The outcome of every part, and the steps, as tables that could stand in a document as they are."""
    machine = f"{result['device']}, torch {result['torch']}"
    if result["smoke"]:
        machine += "; --smoke: tiny models, figures that mean nothing but that everything ran"
    lines = [
        f"Measured on {machine} (`python -m benchmarks.gpu`).",
        "",
        "| part | outcome | figures |",
        "|---|---|---|",
    ]
    for name, found in result["parts"].items():
        broken = [row["check"] for row in found.get("checks", []) if row["holds"] is False]
        figures = "; ".join([*(f"**not so: {text}**" for text in broken), *headline(found, is_steps=name == "steps")])
        lines.append(f"| {name} | {outcome(found)} | {figures} |".replace("\n", " "))
    steps = {name: row for name, row in result["parts"].get("steps", {}).items() if isinstance(row, dict)}
    if steps:
        lines += ["", "| step | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |"]
        lines.append("|---" * (1 + len(COLUMNS)) + "|")
        for name, row in steps.items():
            cells = ["" if row.get(key) is None else show(row[key]) for key, (_, show) in COLUMNS.items()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, found in result["parts"].items():
        lines += [f"\n{name}: {text}." for text in (*found.get("note", []), *found.get("left_out", []))]
    return "\n".join(lines)


def headline(found: dict, *, is_steps: bool) -> list[str]:
    """A part's figures in words, those of a row after its name; the rows of steps have a table of their own."""
    said = []
    for name, value in found.items():
        if isinstance(value, dict) and not is_steps:
            said.append(f"{name}: {', '.join(headline(value, is_steps=True))}")
        elif isinstance(value, float) and name != "seconds":
            said.append(f"{name} {value:.4g}")
        elif isinstance(value, int | str) and name not in {"passed", "error"}:
            said.append(f"{name} {value}")
    return said


def flops_table() -> str:
    """Arithmetic of an image through the default pair, counted on tensors without data.

    Both at 224 px as everywhere in this benchmark; and the teacher at the size in configs/imagenet_500k_1gpu, where
    both have the same grid.
    """
    from distillery.config.load import load_configs, load_model_config
    from distillery.teacher_cache.estimate import forward_flops
    from distillery.training import build

    advised = load_model_config(EXAMPLE).teacher_img_size
    of_teacher = []
    for size in (None, advised):
        configs = load_configs({"dataset_name": "parquet", "cache_dir": "none"},
                               {"checkpoint_dir": "none", "precision": "fp32"},
                               {"teacher_pretrained": False, "teacher_img_size": size})  # fmt: skip
        with torch.device("meta"):
            teacher, student = build.build_models(configs, torch.device("meta"))
            teacher.backbone.precision = None  # tensors without data know no autocast
            of_teacher.append(forward_flops(teacher.backbone, 224) / 1e9)
            of_student = 3 * forward_flops(student, 224) / 1e9
    lines = [
        f"{configs.model.teacher_name} -> {configs.model.student_name}, 224 px, GFLOP an image",
        f"student forward {of_student / 3:.1f}, with backward {of_student:.1f}",
    ]
    for size, forward in zip((224, advised), of_teacher, strict=True):
        whole = forward + of_student
        lines.append(
            f"teacher at {size} px: forward {forward:.1f}, live step {whole:.1f}; a step on stored outputs is "
            f"{of_student / whole:.0%} of it"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
