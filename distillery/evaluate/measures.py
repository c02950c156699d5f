"""Measure how good features are: k-NN and linear probe need labels; collapse and agreement with a teacher do not.

In every function N is the number of rows (images), D of dimensions and C of classes. Features are float32 [N, D] and
labels int64 [N], both on the CPU where a function takes a `device`, else both on one device. Accuracies are fractions,
0..1.
"""

import math
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.evaluate.probe import LogisticRegression

# similarities held at once, 256 MiB in float32: chunks follow from it, results do not
MAX_SIMILARITIES = 2**26
# grid of the linear probe, ascending: each fit starts from the one before it
PROBE_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBE_MAX_ITERATIONS = 200
# untrained networks, whose healthy features spread least, gave 0.04 to 0.97 and 3.3 to 214 (digits, CIFAR-10)
COLLAPSED_STD = 0.01
COLLAPSED_RANK = 1.5


def knn_top1(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> float:
    """Accuracy of a weighted k-NN vote under cosine similarity s, each neighbour counting exp(s / temperature).

    Args:
        train_x: the bank, [N, D].
        train_y: its labels, [N], 0..C-1.
        test_x: rows to classify, [M, D].
        test_y: their labels, [M].
        k: neighbours; more than N are taken as N.
        temperature: > 0, no unit.
        device: where the similarities are computed.
    Source: Wu et al. 2018, arXiv:1805.01978; k and temperature as in DINO, arXiv:2104.14294.
    """
    bank = F.normalize(train_x.to(device).float(), dim=1)
    bank_y = train_y.to(device)
    num_classes = int(max(train_y.max(), test_y.max())) + 1
    k = min(k, len(bank))
    correct = 0
    rows = max(1, MAX_SIMILARITIES // len(bank))
    for chunk_x, chunk_y in zip(test_x.split(rows), test_y.split(rows), strict=True):
        queries = F.normalize(chunk_x.to(device).float(), dim=1)
        similarity, neighbours = (queries @ bank.T).topk(k, dim=1)
        # minus the best one: the same vote, and exp cannot overflow at small temperatures
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(queries), num_classes, device=device)
        votes.scatter_add_(1, bank_y[neighbours], weights)
        correct += (votes.argmax(dim=1) == chunk_y.to(device)).sum().item()
    return correct / len(test_x)


def linear_top1(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int = 0,
    max_rows: int = 20_000,
    device: torch.device | str = "cpu",
) -> float:
    """Accuracy of logistic regression on features standardised with the training rows' statistics.

    The strength of the regularisation is chosen on a fifth of the training rows, never on test rows; then all training
    rows are fitted with it. A fit that has not converged after 200 iterations counts as it is.

    Args:
        train_x: [N, D].
        train_y: [N].
        test_x: [M, D].
        test_y: [M].
        seed: chooses the rows of the cap and of the validation split.
        max_rows: training rows used at most; the time grows with their number, D and C.
        device: where it is fitted: by scikit-learn on the CPU, by distillery.evaluate.probe on CUDA.
    """
    order = np.random.default_rng(seed).permutation(len(train_x))[:max_rows]
    x, y = train_x.numpy()[order].astype(np.float32), train_y.numpy()[order]
    if len(np.unique(y)) == 1:
        return float((test_y.numpy() == y[0]).mean())
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std < 1e-6 * max(float(std.max()), 1e-30)] = 1.0  # a dead dimension must not be blown up to noise
    x, test = (x - mean) / std, (test_x.numpy().astype(np.float32) - mean) / std

    held_out = max(1, len(x) // 5)
    probe = _logistic_regression(device, warm_start=True)
    best_c, best_score = PROBE_C[0], -1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
        if len(np.unique(y[held_out:])) > 1:
            for c in PROBE_C:
                score = probe.set_params(C=c).fit(x[held_out:], y[held_out:]).score(x[:held_out], y[:held_out])
                if score > best_score:
                    best_c, best_score = c, score
        final = _logistic_regression(device).set_params(C=best_c).fit(x, y)
    return float((final.predict(test) == test_y.numpy()).mean())


def _logistic_regression(device: torch.device | str, **options: Any) -> Any:
    if torch.device(device).type == "cuda":
        return LogisticRegression(device, max_iter=PROBE_MAX_ITERATIONS, **options)
    from sklearn import linear_model

    return linear_model.LogisticRegression(max_iter=PROBE_MAX_ITERATIONS, **options)


def feature_std(x: Tensor) -> float:
    """Spread of the features' directions: 0 when all rows point the same way, 1 when they are isotropic.

    Rows are scaled to length 1; the standard deviation of each dimension is averaged and multiplied by sqrt(D).

    Args:
        x: [N, D].
    Source: Chen and He 2021 (SimSiam), arXiv:2011.10566, section 4.1.
    """
    unit = F.normalize(x.double(), dim=1)
    return (unit.std(dim=0, correction=0).mean() * math.sqrt(x.shape[1])).item()


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the singular values: how many dimensions the features use, 1 to min(N, D).

    Args:
        x: [N, D], not centred.
    Source: RankMe, Garrido et al. 2023, arXiv:2210.02885, equation 1; Roy and Vetterli 2007.
    """
    x = x.double()
    gram = x.T @ x if x.shape[0] >= x.shape[1] else x @ x.T
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular.sum()
    if total <= 0:
        return 1.0
    p = singular / total
    return torch.exp(-torch.xlogy(p, p).sum()).item()


def is_collapsed(std: float, rank: float) -> bool:
    """Whether features say next to nothing about their image: all alike, or all on one line.

    Args:
        std: from `feature_std`.
        rank: from `effective_rank`.
    """
    return std < COLLAPSED_STD or rank < COLLAPSED_RANK


def mean_cosine(x: Tensor, y: Tensor) -> float:
    """Mean cosine of corresponding rows, [N, D] each: the student after its head against the teacher."""
    return F.cosine_similarity(x.double(), y.double(), dim=1).mean().item()


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment, 0..1: the same up to rotation and scale at 1; widths may differ.

    It is biased upwards when N is not several times D.

    Args:
        x: [N, D1].
        y: [N, D2], the same images.
    Source: Kornblith et al. 2019, arXiv:1905.00414, section 3.
    """
    x, y = x.double() - x.double().mean(dim=0), y.double() - y.double().mean(dim=0)
    size = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    if size <= 0:
        return 0.0
    return (torch.linalg.norm(y.T @ x) ** 2 / size).item()


def neighbour_overlap(x: Tensor, y: Tensor, *, k: int = 10, device: torch.device | str = "cpu") -> float:
    """Share of an image's k nearest neighbours (cosine, itself left out) that two feature spaces agree on, 0..1.

    By chance it is k / (N - 1), so values of different N do not compare.

    Args:
        x: [N, D1].
        y: [N, D2], the same images.
        k: neighbours; at most N - 1.
        device: where the similarities are computed.
    """
    num_rows = len(x)
    k = min(k, num_rows - 1)
    if k < 1:
        return 0.0
    x, y = (F.normalize(features.to(device).float(), dim=1) for features in (x, y))
    shared = 0
    for rows in torch.arange(num_rows, device=device).split(max(1, MAX_SIMILARITIES // num_rows)):
        member = torch.zeros(2, len(rows), num_rows, dtype=torch.bool, device=device)
        for which, features in enumerate((x, y)):
            similarity = features[rows] @ features.T
            similarity[torch.arange(len(rows), device=device), rows] = -math.inf
            member[which].scatter_(1, similarity.topk(k, dim=1).indices, True)
        shared += (member[0] & member[1]).sum().item()
    return shared / (num_rows * k)
