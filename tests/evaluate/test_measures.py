import math

import pytest
import torch
import torch.nn.functional as F

from distillery.evaluate import measures
from distillery.evaluate.measures import (
    effective_rank,
    feature_std,
    is_collapsed,
    knn_top1,
    linear_cka,
    mean_cosine,
    neighbour_overlap,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(rows, *, dims=8, classes=4, spread=0.3, seed=0):
    centres = torch.randn(classes, dims, generator=generator(99))
    labels = torch.arange(rows) % classes
    return centres[labels] + spread * torch.randn(rows, dims, generator=generator(seed)), labels


def collapsed_features(rows=400, dims=32, noise=1e-3, seed=0):
    constant = torch.randn(dims, generator=generator(seed))
    return constant + noise * torch.randn(rows, dims, generator=generator(seed + 1))


# k-NN


def test_labels_may_be_any_integers():
    (train_x, train_y), (test_x, _) = clusters(40), clusters(12, seed=1)
    (few,) = measures.knn_predictions(train_x, train_y, test_x, ks=[5]).values()
    (many,) = measures.knn_predictions(train_x, train_y + 8_000_000_000, test_x, ks=[5]).values()
    assert torch.equal(many, few + 8_000_000_000)


def slow_knn(train_x, train_y, test_x, test_y, k, temperature):
    train_x, test_x = F.normalize(train_x.double(), dim=1), F.normalize(test_x.double(), dim=1)
    correct = 0
    for row, label in zip(test_x, test_y, strict=True):
        similarity = train_x @ row
        votes = {}
        for i in similarity.argsort(descending=True)[:k].tolist():
            votes[train_y[i].item()] = votes.get(train_y[i].item(), 0) + math.exp(similarity[i].item() / temperature)
        correct += max(votes, key=votes.get) == label.item()
    return correct / len(test_y)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_equals_a_plain_float64_vote(seed, k):
    train_x, train_y = clusters(120, spread=1.5, seed=seed)
    test_x, test_y = clusters(60, spread=1.5, seed=seed + 10)
    expected = slow_knn(train_x, train_y, test_x, test_y, k, 0.07)
    assert 0.3 < expected < 1  # a task on which votes can go wrong
    assert knn_top1(train_x, train_y, test_x, test_y, k=k) == pytest.approx(expected)


def test_knn_does_not_depend_on_the_chunks(monkeypatch):
    train, test = clusters(100, spread=1.5), clusters(50, spread=1.5, seed=1)
    whole = knn_top1(*train, *test)
    monkeypatch.setattr(measures, "MAX_SIMILARITIES", 700)
    assert knn_top1(*train, *test) == whole


def test_knn_weighs_near_neighbours_more_than_many_far_ones():
    train_x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
    train_y = torch.tensor([0, 1, 1, 1])
    assert knn_top1(train_x, train_y, torch.tensor([[1.0, 0.1]]), torch.tensor([0]), k=4) == 1.0


def test_knn_ignores_the_length_of_the_features():
    train_x, train_y = clusters(100)
    test_x, test_y = clusters(50, spread=1.5, seed=1)
    scales = torch.rand(100, 1, generator=generator()) * 100 + 0.01
    scaled = train_x * scales
    assert knn_top1(scaled, train_y, test_x, test_y) == knn_top1(train_x, train_y, test_x, test_y)
    assert torch.equal(scaled, train_x * scales)  # the caller's own stay as they are


def test_knn_takes_a_bank_smaller_than_k_and_a_class_the_bank_has_not():
    train_x, train_y = clusters(6, classes=2)
    assert knn_top1(train_x, train_y, train_x[:1], torch.tensor([7]), k=20) == 0.0


def test_features_without_information_score_chance():
    train_y, test_y = torch.arange(2000) % 10, torch.arange(1000) % 10
    train_x, test_x = torch.randn(2000, 16, generator=generator()), torch.randn(1000, 16, generator=generator(1))
    assert knn_top1(train_x, train_y, test_x, test_y) == pytest.approx(0.1, abs=0.04)


# collapse


def test_feature_std_is_one_for_an_isotropic_cloud_and_zero_for_a_constant():
    assert feature_std(torch.randn(4000, 64, generator=generator())) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(100, 64)) == pytest.approx(0, abs=1e-6)


def test_feature_std_does_not_depend_on_scale():
    x = torch.randn(200, 16, generator=generator()) + 1
    assert feature_std(1e3 * x) == pytest.approx(feature_std(x), rel=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_effective_rank_counts_equal_directions(rank):
    basis = torch.linalg.qr(torch.randn(40, rank, generator=generator())).Q
    rows = torch.linalg.qr(torch.randn(300, rank, generator=generator(1))).Q
    assert effective_rank(rows @ basis.T) == pytest.approx(rank, rel=1e-3)
    assert effective_rank((rows @ basis.T).T) == pytest.approx(rank, rel=1e-3)  # more dimensions than rows


def test_effective_rank_is_that_of_the_papers_formula():
    x = torch.randn(100, 20, generator=generator()) * torch.logspace(0, -2, 20)
    p = torch.linalg.svdvals(x.double())
    p = p / p.sum()
    assert effective_rank(x) == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-6)


def test_effective_rank_of_nothing_is_one():
    assert effective_rank(torch.zeros(10, 4)) == 1.0


HEALTHY = {
    "isotropic": lambda: torch.randn(400, 32, generator=generator()),
    # half of an untrained ReLU network's outputs are zero and all share a large mean
    "positive": lambda: torch.randn(400, 32, generator=generator()).relu() + 1.0,
    "two dimensions in thirty-two": lambda: torch.cat(
        (torch.randn(400, 4, generator=generator()), torch.zeros(400, 28)), dim=1
    ),
    # an untrained convolutional network on digits: feature_std 0.04, effective rank 3.3
    "mostly constant": lambda: collapsed_features(noise=4e-2),
    "anisotropic": lambda: torch.randn(400, 32, generator=generator()) * torch.logspace(0, -2, 32),
}
COLLAPSED = {
    "constant": lambda: torch.ones(400, 32),
    "zero": lambda: torch.zeros(400, 32),
    "constant and tiny noise": collapsed_features,
    "constant and noise, wide": lambda: collapsed_features(dims=768, noise=5e-3),
    "constant direction": lambda: torch.rand(400, 1, generator=generator()) * torch.ones(400, 32),
    "one line": lambda: torch.randn(400, 1, generator=generator()) * torch.ones(400, 32),
}


@pytest.mark.parametrize("name", sorted(HEALTHY))
def test_healthy_features_are_not_called_collapsed(name):
    x = HEALTHY[name]()
    assert not is_collapsed(feature_std(x), effective_rank(x))


@pytest.mark.parametrize("name", sorted(COLLAPSED))
def test_collapsed_features_are_called_collapsed(name):
    x = COLLAPSED[name]()
    assert is_collapsed(feature_std(x), effective_rank(x))


# agreement with a teacher


def test_agreement_is_complete_with_oneself():
    x = torch.randn(60, 12, generator=generator())
    assert mean_cosine(x, x) == pytest.approx(1)
    assert linear_cka(x, x) == pytest.approx(1)
    assert neighbour_overlap(x, x) == pytest.approx(1)


def test_cka_and_overlap_do_not_change_under_rotation_and_scale():
    x = torch.randn(80, 12, generator=generator())
    y = x + torch.randn(80, 12, generator=generator(1))
    rotation = torch.linalg.qr(torch.randn(12, 12, generator=generator(2))).Q
    assert linear_cka(3 * x @ rotation, y) == pytest.approx(linear_cka(x, y), abs=1e-6)
    assert neighbour_overlap(3 * x @ rotation, y) == pytest.approx(neighbour_overlap(x, y), abs=0.01)


def test_cka_equals_the_hsic_of_gram_matrices():
    x, y = torch.randn(50, 6, generator=generator()).double(), torch.randn(50, 9, generator=generator(1)).double()
    centre = torch.eye(50).double() - 1 / 50
    k, g = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * g).sum() / ((k * k).sum().sqrt() * (g * g).sum().sqrt())
    assert linear_cka(x, y) == pytest.approx(expected.item(), rel=1e-6)


def test_unrelated_features_agree_only_by_chance():
    x, y = torch.randn(1000, 8, generator=generator()), torch.randn(1000, 8, generator=generator(1))
    assert linear_cka(x, y) < 0.05
    assert neighbour_overlap(x, y) == pytest.approx(10 / 999, abs=0.01)
    assert mean_cosine(x, y) == pytest.approx(0, abs=0.05)


def test_overlap_falls_with_noise_and_does_not_depend_on_chunks(monkeypatch):
    x = torch.randn(200, 16, generator=generator())
    noise = torch.randn(200, 16, generator=generator(1))
    values = [neighbour_overlap(x, x + s * noise) for s in (0.0, 0.3, 1.0, 10.0)]
    assert values == sorted(values, reverse=True) and values[0] > values[1] > values[2] > values[3]
    monkeypatch.setattr(measures, "MAX_SIMILARITIES", 1000)
    assert neighbour_overlap(x, x + 0.3 * noise) == values[1]


def test_overlap_counts_by_hand():
    # on a circle: x has the pairs (0,1) and (2,3); in y row 1 has moved over to 2 and 3
    angles_x, angles_y = torch.tensor([0.0, 0.1, 2.0, 2.1]), torch.tensor([0.0, 1.98, 2.0, 2.1])
    x, y = (torch.stack((a.cos(), a.sin()), 1) for a in (angles_x, angles_y))
    # nearest in x: 1, 0, 3, 2; in y: 1, 2, 1, 2
    assert neighbour_overlap(x, y, k=1) == pytest.approx(2 / 4)


def test_a_single_row_and_a_constant_have_nothing_to_agree_on():
    assert neighbour_overlap(torch.ones(1, 3), torch.ones(1, 3)) == 0.0
    assert linear_cka(torch.ones(5, 3), torch.randn(5, 3, generator=generator())) == 0.0
