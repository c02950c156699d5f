import json
import subprocess
import sys
from pathlib import Path

import pytest
from forks import run_forked

ROOT = Path(__file__).resolve().parents[1]
# most of their seconds would be the imports of torch and timm; those that measure a process have one of their own
RUNS_MODELS = ("onnx", "teacher")


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, contenders",
    [
        ("precompute", {"ours", "seed-style"}),
        ("loader", {"ours", "ours, read_mode: mmap", "ceiling: bare preadv", "torch.load"}),
        ("dtypes", {"float32", "float16", "bfloat16", "uint8"}),
        ("onnx", {"ResNet of timm's tests"}),
        ("scaled_decoding", {"0.02 megapixels", "0.1 megapixels"}),
        ("teacher", {"student alone", "ours, stored outputs", "ours, live teacher"}),
    ],
)
def test_a_tiny_benchmark_measures_everyone_and_draws_a_chart(tmp_path, name, contenders):
    peers = {"precompute": ["--peers", "seed-style"], "loader": ["--peers", "torch.load"]}.get(name, [])
    start = run_forked if name in RUNS_MODELS else run
    done = start(f"benchmarks.{name}", "--tiny", "--dir", str(tmp_path), "--out", str(tmp_path), *peers)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert {row["name"] for row in result["results"]} == contenders
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.slow
def test_a_tiny_footprint_is_measured(tmp_path):
    done = run("benchmarks.footprint", "--tiny", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for said in ("the index: ", "the order of an epoch", "comparing its checksum", "record of 2048 rows"):
        assert said in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_tiny_segmentation_benchmark_prints_a_row_and_a_protocol_for_each_model():
    done = run_forked("benchmarks.segmentation", "--tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    for name in ("teacher test_vit", "untrained test_vit"):
        row, protocol = (line for line in done.stdout.splitlines() if line.startswith(name))
        assert row.count("%") == 3 and "8x8 patches" in protocol


@pytest.mark.slow
def test_a_tiny_benchmark_of_compressed_caches_prints_a_row_for_each_kind(tmp_path):
    done = run("benchmarks.compressed", "--part", "speed", "--tiny", "--dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for name in ("uint8", "jpeg 40, crops"):
        assert any(line.startswith(f"{name} ") for line in done.stdout.splitlines())
    assert not list(tmp_path.iterdir())
