"""The real training step on fake CUDA tensors: no mixed devices, no wait of the host, no more kernels than before."""

import itertools
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from distillery.losses.registry import LOSSES
from tests.gpu.cases import CASES, FACTORS, LOSS_SETS, is_possible
from tests.gpu.planted import PLANTED
from tests.gpu.preload import ROOT, why_not

# of the step as shipped, uncompiled: python -m tests.gpu.launches; torch 2.14.1, timm 1.0.31
LAUNCHES = 1192
LAUNCHES_MAY_GROW = 1.05

needs_fakes = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.fixture(scope="module")
def results():
    """name -> what a child says of it; two share the work, with a library that must be there before torch."""
    names = [*CASES, *PLANTED, "launches"]
    with ThreadPoolExecutor(2) as pool:
        return dict(itertools.chain(*pool.map(run_child, (names[::2], names[1::2]))))


def run_child(names: list[str]) -> list[tuple[str, list | dict]]:
    command = [sys.executable, "-m", "tests.gpu.child", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-2000:]
    return [(line["name"], line["result"]) for line in map(json.loads, done.stdout.splitlines())]


@needs_fakes
@pytest.mark.parametrize("name", CASES)
def test_a_step_its_check_a_checkpoint_and_the_teachers_pass_stay_on_the_device_and_never_wait(name, results):
    assert results[name] == []


@needs_fakes
def test_the_step_as_shipped_launches_no_more_kernels_than_it_did(results):
    launches = results["launches"]
    assert launches["problems"] == []
    assert 0 < launches["total"] <= LAUNCHES * LAUNCHES_MAY_GROW, "\n" + launches["table"]


@needs_fakes
@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_reported_with_its_place(name, results):
    expected = PLANTED[name][1]
    if expected is None:
        assert results[name] == []
    else:
        assert any(expected in problem and ".py:" in problem for problem in results[name]), results[name]


def test_the_cases_hold_every_loss_and_every_two_values_of_two_factors():
    assert set().union(*LOSS_SETS.values()) == set(LOSSES)
    assert len(CASES) >= 32
    for a, b in itertools.combinations(FACTORS, 2):
        met = {(case[a], case[b]) for case in CASES.values()}
        possible = {(x, y) for x, y in itertools.product(FACTORS[a], FACTORS[b]) if is_possible({a: x, b: y})}
        assert met == possible, (a, b)
