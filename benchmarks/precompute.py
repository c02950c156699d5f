"""How fast stage 1 makes the cache, beside the limit and the writers one would use instead.

    python -m benchmarks.precompute --parquet data/train.parquet    # its images, repeated to 3,000
    python -m benchmarks.precompute --images 50000 --size 32 --rounds 3 --dtypes uint8
    python -m benchmarks.precompute --tiny --out /tmp/bench         # seconds: does everything still run?

The ceiling is bare decoding and resizing of images in memory on all cores by warm processes, nothing written. Every
contender makes the same tensors in a fresh folder; they take turns, `--rounds` times, each turn a process of its own.
The figure is the median of the turns, and of each round's ratio to the ceiling of the same round. "whole" is the whole
call, imports and start of the workers included; "steady" begins when the first rows are done and ends when the last
shard is on the disk: what long runs reach.

Writes precompute.json and precompute.png into --out. Peers that are not installed are left out, with the reason
(requirements-bench.txt has them all).
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.common import build_parser, draw_bars, run_benchmark, source_images, write_parquet
from benchmarks.precompute_contenders import CONTENDERS, Setting
from distillery.cache.archive import DTYPES
from distillery.system.machine import file_system_of, usable_cpus

PEERS = [name for name in CONTENDERS if name not in {"ceiling", "ours"}]
ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    return run_benchmark("precompute", parse_arguments(), measure, draw)


def parse_arguments() -> argparse.Namespace:
    parser = build_parser(__doc__, tiny="96 images, 32 px, one round, no peers but the seed style", parquet=True)
    parser.add_argument("--images", type=int, default=3000, help="how many to make, by repeating what there is")
    parser.add_argument("--size", type=int, default=224, help="px")
    parser.add_argument("--dtypes", type=lambda text: text.split(","), default=["uint8", "float32"], metavar="A,B")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", default=PEERS, metavar="NAME", help=", ".join(PEERS))
    arguments = parser.parse_args()
    for given, known in ((arguments.peers, PEERS), (arguments.dtypes, DTYPES)):
        if unknown := set(given) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    if arguments.tiny:
        arguments.images, arguments.size, arguments.rounds, arguments.dtypes = 96, 32, 1, ["uint8"]
        arguments.peers = [name for name in arguments.peers if name == "seed-style"]
    return arguments


def measure(arguments: argparse.Namespace, work: Path) -> dict:
    """Let everyone take turns; returns what precompute.json holds."""
    images = source_images(arguments, 96 if arguments.tiny else 375)
    write_parquet(images, arguments.images, work / "images.parquet")
    write_parquet(images, len(images), work / "unique.parquet")
    print(
        f"{arguments.images} images ({len(images)} different, {sum(map(len, images)) / len(images) / 1000:.0f} kB "
        f"each) to {arguments.size} px on {file_system_of(work)}, {usable_cpus()} CPUs"
    )
    contenders = [("ours", dtype) for dtype in arguments.dtypes]
    contenders += [(peer, dtype) for peer in arguments.peers for dtype in arguments.dtypes]
    ceilings, turns, left_out = [], {each: [] for each in contenders}, {}
    for round_number in range(1, arguments.rounds + 1):
        ceilings.append(take_turn("ceiling", arguments, "uint8", work)["whole"])
        print(f"round {round_number}: ceiling {ceilings[-1]:.0f}", end="", flush=True)
        for each in contenders:
            name = " ".join(each)
            if name in left_out:
                continue
            try:
                turns[each].append(take_turn(each[0], arguments, each[1], work))
                print(f", {name} {turns[each][-1]['whole']:.0f}", end="", flush=True)
            except RuntimeError as error:
                if each[0] == "ours":
                    raise
                left_out[name] = str(error)
        print(flush=True)
    rows = [summary(each, taken, ceilings) for each, taken in turns.items() if " ".join(each) not in left_out]
    show(rows, statistics.median(ceilings), left_out)
    setting = {key: getattr(arguments, key) for key in ("images", "size", "rounds")}
    setting |= {"cpus": usable_cpus(), "machine": platform.machine(), "parquet": str(arguments.parquet or "synthetic")}
    limit = {"images_per_second": statistics.median(ceilings), "rounds": ceilings}
    return {"setting": setting, "ceiling": limit, "results": rows, "left_out": left_out}


def take_turn(name: str, arguments: argparse.Namespace, dtype: str, work: Path) -> dict:
    """One contender, once, in a process of its own.

    Raises:
        RuntimeError: it failed; the last line it wrote.
    """
    folder, path = work / "made", work / "setting.json"
    shard_rows = min(Setting.shard_rows, max(1, arguments.images // 2))
    setting = Setting(
        str(work / "images.parquet"), str(work / "unique.parquet"), str(folder), arguments.images, arguments.size,
        dtype, usable_cpus(), shard_rows,
    )  # fmt: skip
    path.write_text(json.dumps(asdict(setting)))
    # one thread for each process: there are as many processes as cores
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    if not arguments.tiny:
        os.sync()  # what the one before has left to write is not the next one's cost
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.precompute_contenders", name, str(path)],
            cwd=work, env=environment, capture_output=True, text=True, timeout=3600,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answers = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not answers:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise RuntimeError(lines[-1][:200])
    return json.loads(answers[-1].removeprefix("RESULT "))


def summary(each: tuple[str, str], turns: list[dict], ceilings: list[float]) -> dict:
    """Medians of a contender's turns and of their ratios to the ceiling of the same round."""
    row = {"name": each[0], "dtype": each[1]}
    for key in ("whole", "steady"):
        if key in turns[0]:
            rates = [turn[key] for turn in turns]
            row[key] = statistics.median(rates)
            row[f"{key}_of_ceiling"] = statistics.median(
                rate / limit for rate, limit in zip(rates, ceilings, strict=True)
            )
            row[f"{key}_rounds"] = rates
    if "limit" in turns[0]:
        row["limit"] = turns[-1]["limit"]
    return row


def show(rows: list[dict], limit: float, left_out: dict[str, str]) -> None:
    print(f"{'':30}{'images/s':>10}{'of ceiling':>12}{'ours is':>10}")
    print(f"{'ceiling':30}{limit:10.0f}")
    mine = {row["dtype"]: row["whole"] for row in rows if row["name"] == "ours"}
    for row in rows:
        for key in ("steady", "whole"):
            if key not in row:
                continue
            ratio = f"{mine[row['dtype']] / row['whole']:9.1f}x" if row["name"] != "ours" else f"{'':10}"
            title = f"{row['name']} {row['dtype']}" + (f", {key}" if "steady" in row else "")
            print(f"{title:30}{row[key]:10.0f}{row[f'{key}_of_ceiling']:12.2f}{ratio}  {row.get('limit', '')}")
    for name, reason in left_out.items():
        print(f"{name:30}    left out: {reason}")


def draw(result: dict, path: Path) -> None:
    """A panel for each dtype, the ceiling as a line."""
    panels: dict[str, dict[str, float]] = {}
    for row in result["results"]:
        bars = panels.setdefault(row["dtype"], {})
        if row["name"] == "ours":
            bars |= {"ours, steady": row.get("steady", row["whole"]), "ours, whole call": row["whole"]}
        else:
            bars[row["name"]] = row["whole"]
    setting, limits = result["setting"], {"bare decode + resize": result["ceiling"]["images_per_second"]}
    title = f"{setting['images']:,} images to {setting['size']} px, {setting['cpus']} CPUs"
    draw_bars(list(panels.items()), path, unit="images/s", limits=limits, title=title)


if __name__ == "__main__":
    sys.exit(main())
