"""Linear probes: on all training rows, on a few of each class, and as they are kept."""

import pytest
import sklearn.linear_model
import torch

from distillery.evaluate.linear import FEW_SHOT_C, few_shot_measures, few_shot_top1, fit_probe, linear_top1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def clusters(rows, *, dims=8, classes=4, spread=0.3, seed=0):
    centres = torch.randn(classes, dims, generator=generator(99))
    labels = torch.arange(rows) % classes
    return centres[labels] + spread * torch.randn(rows, dims, generator=generator(seed)), labels


def test_the_linear_probe_solves_separable_classes_and_is_seeded():
    train, test = clusters(400), clusters(200, seed=1)
    assert linear_top1(*train, *test) > 0.97
    noisy = clusters(300, spread=2.0, seed=2)
    assert linear_top1(*train, *noisy, seed=3) == linear_top1(*train, *noisy, seed=3)


def test_the_linear_probe_never_sees_a_test_label_before_it_scores():
    train_x, train_y = clusters(200, spread=2.0)
    test_x, test_y = clusters(100, spread=2.0, seed=1)
    right = linear_top1(train_x, train_y, test_x, test_y)
    other = (test_y + 1) % 4
    # the same predictions compared with other labels: right answers become wrong ones
    assert right + linear_top1(train_x, train_y, test_x, other) <= 1.0 + 1e-9


def test_the_linear_probe_does_not_depend_on_the_scale_of_a_dimension():
    train_x, train_y = clusters(300, spread=1.5)
    test_x, test_y = clusters(200, spread=1.5, seed=1)
    scale = torch.logspace(-3, 3, 8)
    plain = linear_top1(train_x, train_y, test_x, test_y)
    assert linear_top1(train_x * scale + 5, train_y, test_x * scale + 5, test_y) == pytest.approx(plain, abs=0.03)


def test_dead_dimensions_do_not_disturb_the_linear_probe():
    train_x, train_y = clusters(300)
    test_x, test_y = clusters(200, seed=1)
    dead_train, dead_test = torch.full((300, 4), 3.0), torch.full((200, 4), 3.0)
    score = linear_top1(torch.cat((train_x, dead_train), 1), train_y, torch.cat((test_x, dead_test), 1), test_y)
    assert score > 0.97


def test_the_cap_of_rows_is_kept(monkeypatch):
    seen = []
    plain = sklearn.linear_model.LogisticRegression

    class Watched(plain):
        def fit(self, x, y):
            seen.append(len(x))
            return super().fit(x, y)

    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Watched)
    linear_top1(*clusters(500), *clusters(20, seed=1), max_rows=100)
    assert max(seen) == 100 and min(seen) == 80


def test_a_bank_of_one_class_predicts_that_class():
    x, _ = clusters(50)
    labels = torch.zeros(50, dtype=torch.int64)
    assert linear_top1(x, labels, x[:4], torch.tensor([0, 0, 0, 1])) == 0.75


def test_features_without_information_score_chance():
    train_y, test_y = torch.arange(2000) % 10, torch.arange(1000) % 10
    train_x, test_x = torch.randn(2000, 16, generator=generator()), torch.randn(1000, 16, generator=generator(1))
    assert linear_top1(train_x, train_y, test_x, test_y) == pytest.approx(0.1, abs=0.04)


@pytest.mark.parametrize("classes", [2, 5])
def test_a_probe_predicts_what_scikit_learn_does(classes):
    (train_x, train_y), (test_x, _) = (clusters(300, classes=classes, spread=2.0, seed=seed) for seed in (0, 1))
    probe = fit_probe(train_x, train_y + 3)
    x = ((train_x - train_x.mean(0)) / train_x.std(0, correction=0)).numpy()
    test = ((test_x - train_x.mean(0)) / train_x.std(0, correction=0)).numpy()
    candidates = [
        sklearn.linear_model.LogisticRegression(C=c, max_iter=200).fit(x, train_y.numpy() + 3).predict(test)
        for c in (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    ]
    said = probe.predict(test_x).numpy()
    assert max((said == of_c).mean() for of_c in candidates) > 0.99


# a few images of each class


def test_few_shots_take_so_many_images_of_each_class_and_all_of_a_smaller_one(monkeypatch):
    seen, plain = [], sklearn.linear_model.LogisticRegression

    class Watched(plain):
        def fit(self, x, y):
            seen.append(sorted((y == number).sum() for number in set(y.tolist())))
            assert pytest.approx(FEW_SHOT_C / x.shape[1]) == self.C
            return super().fit(x, y)

    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Watched)
    x, y = clusters(40)
    rows = torch.cat([torch.arange(40)[y != 3], torch.arange(40)[y == 3][:2]])
    few_shot_top1(x[rows], y[rows], *clusters(20, seed=1), shots=5, draws=3)
    assert seen == [[2, 5, 5, 5]] * 3


def test_with_more_images_the_few_shot_probe_is_better_and_its_draws_are_the_same_for_every_model():
    train, test = clusters(400, spread=1.2), clusters(200, spread=1.2, seed=1)
    row = few_shot_measures(train, test, "cpu")
    assert list(row) == [f"linear_top1_{n}shot{end}" for n in (1, 5, 10) for end in ("", "_std")]
    assert row["linear_top1_1shot"] < row["linear_top1_5shot"] < row["linear_top1_10shot"] <= linear_top1(*train, *test)
    assert row["linear_top1_1shot_std"] > 0
    assert few_shot_measures((2 * train[0] + 1, train[1]), (2 * test[0] + 1, test[1]), "cpu") == pytest.approx(row)


def test_where_no_class_has_so_many_images_the_number_is_left_out():
    x, y = clusters(16)
    assert few_shot_top1(x, y, x, y, shots=5) == (None, None)
    assert few_shot_top1(x, y, x, y, shots=4) == (1.0, 0.0)
