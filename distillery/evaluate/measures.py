"""Measure how good features are: k-NN needs labels; collapse and agreement with a teacher do not.

In every function N is the number of rows (images), D of dimensions and C of classes. Features are float32 [N, D] and
labels int64 [N], both on the CPU where a function takes a `device`, else both on one device. Accuracies are fractions,
0..1.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# similarities held at once, 256 MiB in float32: chunks follow from it, results do not
MAX_SIMILARITIES = 2**26
# untrained networks, whose healthy features spread least, gave 0.04 to 0.97 and 3.3 to 214 (digits, CIFAR-10)
COLLAPSED_STD = 0.01
COLLAPSED_RANK = 1.5


def knn_top1(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, k: int = 20, **options: Any) -> float:
    """Accuracy of `knn_predictions` with k neighbours; options: as of that."""
    (predicted,) = knn_predictions(train_x, train_y, test_x, ks=[k], **options).values()
    return accuracy(predicted, test_y)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of the rows, int64 [M] each, that have their label."""
    return (predicted == labels).sum().item() / len(labels)


def knn_predictions(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    ks: Iterable[int],
    temperature: float = 0.07,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Labels by a weighted k-NN vote under cosine similarity s, each neighbour counting exp(s / temperature).

    The similarities are computed once for all k.

    Args:
        train_x: the bank, [N, D].
        train_y: its labels, [N], any integers.
        test_x: rows to classify, [M, D].
        ks: numbers of neighbours; more than N are taken as N.
        temperature: > 0, no unit.
        device: where the similarities are computed.
    Returns:
        k -> int64 [M], on the CPU.
    Source: Wu et al. 2018, arXiv:1805.01978; k and temperature as in DINO, arXiv:2104.14294.
    """
    # in place: the bank is as large as memory allows, and is there once
    bank = train_x.to(device, torch.float32, copy=True)
    bank /= bank.norm(dim=1, keepdim=True).clamp_min(1e-12)
    classes, bank_y = train_y.to(device).unique(return_inverse=True)
    found: dict[int, list[Tensor]] = {k: [] for k in ks}
    most = min(max(found), len(bank))
    for chunk in test_x.split(max(1, MAX_SIMILARITIES // len(bank))):
        queries = F.normalize(chunk.to(device).float(), dim=1)
        similarity, neighbours = (queries @ bank.T).topk(most, dim=1)
        # minus the best one: the same vote, and exp cannot overflow at small temperatures
        weights, labels = ((similarity - similarity[:, :1]) / temperature).exp(), bank_y[neighbours]
        for k, parts in found.items():
            votes = torch.zeros(len(queries), len(classes), device=device)
            parts.append(classes[votes.scatter_add_(1, labels[:, :k], weights[:, :k]).argmax(dim=1)])
    return {k: torch.cat(parts).cpu() for k, parts in found.items()}


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
