"""How much of its targets the student explains, beside each loss that compares row by row."""

import numpy as np
import pytest
import torch

from distillery.losses import terms
from distillery.losses.explained import explained_variance
from distillery.losses.registry import LOSSES, LossTerm
from distillery.losses.total import check_gradients, total_loss
from distillery.models.backbone import Features

ROW_BY_ROW = {"cls", "patch", "cosine", "mse", "smooth_l1", "patch_cosine", "patch_mse", "patch_smooth_l1", "layers"}


def features(seed: int, scale: float = 1.0) -> Features:
    g = torch.Generator().manual_seed(seed)
    pooled, tokens = (scale * torch.randn(6, *shape, generator=g) + 2 for shape in ((16,), (9, 16)))
    inner = tuple(scale * torch.randn(6, n, 16, generator=g) for n in (9, 4))
    return Features(pooled, tokens, (3, 3), None, inner, ((3, 3), (2, 2)))


def ref_explained(s: np.ndarray, t: np.ndarray, *, by_direction: bool) -> float:
    s, t = (x.reshape(-1, x.shape[-1]).astype(np.float64) for x in (s, t))
    if by_direction:
        s = s * np.maximum(0, (s * t).sum(1, keepdims=True)) / (s * s).sum(1, keepdims=True)
    return 1 - np.mean((s - t) ** 2) / np.mean((t - t.mean(axis=0)) ** 2)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_losses_that_compare_row_by_row_give_the_share_of_the_variance_and_no_other_does(name):
    term, student, teacher = LOSSES[name], features(1, 0.3), features(2)
    if name == "kl_logits":
        assert not term.row_by_row
        return
    found = total_loss(student, teacher, {name: 2.0}, second_view=features(3))
    assert (f"explained/{name}" in found) == term.row_by_row == (name in ROW_BY_ROW)
    if term.row_by_row:
        s, t = (getattr(of, term.field) for of in (student, teacher))
        pairs = zip(s, t, strict=True) if term.field == "layers" else [(s, t)]
        by_direction = name in ("cosine", "patch_cosine")
        expected = np.mean([ref_explained(*(x.numpy() for x in pair), by_direction=by_direction) for pair in pairs])
        value = found[f"explained/{name}"]
        assert value.shape == () and value.dtype == torch.float32
        assert value.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_it_is_1_for_the_targets_0_for_their_mean_and_negative_for_worse():
    t = features(0).tokens
    assert explained_variance(t.clone(), t).item() == 1
    assert explained_variance(t.mean(dim=(0, 1)).expand_as(t), t).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(-t, t).item() < -1
    assert explained_variance(7 * t, t, by_direction=True).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.3, -4e4])
@pytest.mark.parametrize("by_direction", [False, True])
def test_targets_that_do_not_vary_and_students_beyond_all_bounds_give_a_finite_number(value, by_direction):
    constant = torch.full((6, 9, 16), value)
    for student in (torch.zeros(6, 9, 16), torch.randn(6, 9, 16), constant):
        assert explained_variance(student, constant, by_direction=by_direction).item() == 0
    one_image = torch.randn(1, 16)
    assert explained_variance(torch.randn(1, 16), one_image, by_direction=by_direction).item() == 0
    far = explained_variance(torch.full((6, 16), 1e30), torch.randn(6, 16), by_direction=by_direction)
    assert torch.isfinite(far) and far >= -1e6
    assert explained_variance(constant, constant * torch.nan, by_direction=by_direction).isnan()  # as the loss is


def test_it_is_computed_in_float32_without_a_gradient_and_is_no_loss_to_the_first_step_check():
    weight = torch.ones(16, requires_grad=True)
    own, teacher = features(1), features(2)
    student = Features((own.pooled * weight).bfloat16(), None, (3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = total_loss(student, teacher, {"cls": 1.0})
    value = found["explained/cls"]
    expected = ref_explained(student.pooled.detach().float().numpy(), teacher.pooled.numpy(), by_direction=False)
    assert value.item() == pytest.approx(expected, rel=1e-5) and not value.requires_grad
    assert set(check_gradients(found, [weight])) == {"loss", "loss/cls"}


def test_a_loss_of_ones_own_works_with_and_without_it(monkeypatch):
    monkeypatch.setattr(terms, "l1", lambda student, teacher: (student - teacher.detach()).abs().mean(), raising=False)
    for row_by_row in (False, True):
        monkeypatch.setitem(LOSSES, "l1", LossTerm("l1", "pooled", row_by_row=row_by_row))
        found = total_loss(features(1), features(2), {"l1": 1.0})
        assert found.keys() == {"loss", "loss/l1"} | ({"explained/l1"} if row_by_row else set())
