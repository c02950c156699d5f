"""The linear probe's fits on a GPU, by their arithmetic on the CPU: those of scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn import linear_model

from distillery.evaluate import linear
from distillery.evaluate.probe import LogisticRegression

STRENGTHS = (1e-4, 1e-2, 1.0)


def noisy_classes(num_classes, *, rows=600, dims=16, seed=0):
    rng = np.random.default_rng(seed)
    centres, labels = rng.normal(size=(num_classes, dims)), rng.integers(0, num_classes, rows)
    return (centres[labels] + 2.5 * rng.normal(size=(rows, dims))).astype(np.float32), labels + 3


@pytest.mark.parametrize("num_classes", [2, 3, 7])
def test_fits_from_one_another_on_are_those_of_scikit_learn(num_classes):
    x, y = noisy_classes(num_classes)
    theirs = linear_model.LogisticRegression(max_iter=200, warm_start=True)
    ours = LogisticRegression("cpu", max_iter=200, warm_start=True)
    for strength in STRENGTHS:
        theirs.set_params(C=strength).fit(x[:400], y[:400])
        ours.set_params(C=strength).fit(x[:400], y[:400])
        np.testing.assert_allclose(ours.weight.detach().numpy(), theirs.coef_, atol=5e-3)
        assert np.mean(ours.predict(x[400:]) == theirs.predict(x[400:])) > 0.99
        assert ours.score(x[400:], y[400:]) == pytest.approx(theirs.score(x[400:], y[400:]), abs=0.01)


def test_without_a_warm_start_the_last_fit_leaves_no_trace():
    (x, y), (other_x, other_y) = noisy_classes(3), noisy_classes(3, seed=1)
    ours = LogisticRegression("cpu", max_iter=200)
    first = ours.fit(x, y).weight.detach().clone()
    ours.fit(other_x, other_y)
    assert torch.equal(ours.fit(x, y).weight, first)


def test_a_fit_ends_after_max_iter_iterations():
    x, y = noisy_classes(3)
    short, long = (LogisticRegression("cpu", max_iter=n).set_params(C=1.0).fit(x, y).weight for n in (1, 200))
    assert not torch.allclose(short, long, atol=1e-2)


def test_on_a_gpu_the_probe_has_the_protocol_of_the_cpu(monkeypatch):
    (x, y), used = noisy_classes(5, rows=900), []

    def on_cpu(device, **options):
        used.append(device)
        return LogisticRegression("cpu", **options)

    monkeypatch.setattr(linear, "LogisticRegression", on_cpu)
    x, y = torch.from_numpy(x), torch.from_numpy(y)
    given = x[:600], y[:600], x[600:], y[600:]
    on_gpu = linear.fit_probe(*given[:2], device="cuda").top1(*given[2:])
    assert on_gpu == pytest.approx(linear.linear_top1(*given), abs=0.01)
    assert used == ["cuda", "cuda"]  # the grid, and the fit with what it chose
