"""PHI-S: a rotation after which every channel has the same variance, and one scale for all of them.

    x' = (1 / sqrt(mean(lambda))) H U^T (x - mean)

U and lambda are the eigenvectors and eigenvalues of the covariance, H is a Hadamard matrix: its entries are all
+-1 / sqrt(D), so each new channel takes the same share of every eigenvalue. Distances keep their proportions, which
dividing each channel by its own deviation does not do.
Source: Ranzinger et al. 2024, arXiv:2410.01680.
"""

import math

import torch
from torch import Tensor


def phi_s_rotation(covariance: Tensor) -> Tensor:
    """(1 / sqrt(mean(lambda))) H U^T for a covariance [D, D], float64 on the CPU; any D.

    Where no Hadamard matrix of order D is known here, a rotation takes its place that makes the variances of this
    very covariance equal (equalising_rotation).
    """
    variances, directions = torch.linalg.eigh(covariance.double().cpu())  # directions in columns
    mixing = hadamard(len(variances))
    if mixing is None:
        mixing = equalising_rotation(variances)
    return mixing @ directions.T / max(variances.mean().item(), 1e-24) ** 0.5


def hadamard(order: int) -> Tensor | None:
    """An orthogonal matrix of entries +-1 / sqrt(order), float64; None where none of these constructions gives one.

    Sylvester's doubling, then Paley's two constructions over a prime field: together all widths that are in common
    use, e.g. 384 and 768 = 12 x 2^k, 1152, 1280, 1536 and every power of two.
    Source: Sylvester 1867; Paley 1933, On orthogonal matrices.
    """
    signs = _hadamard_signs(order)
    return None if signs is None else signs / math.sqrt(order)


def _hadamard_signs(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if order % 2:
        return None
    half = _hadamard_signs(order // 2)
    if half is not None:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), half)
    if order % 4 == 0 and _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _paley_core(order - 1, corner=-1.0)
    if order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        core = _paley_core(order // 2 - 1, corner=1.0)
        on, off = torch.tensor([[[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]]], dtype=torch.float64)
        return torch.kron(core, on) + torch.kron(torch.eye(order // 2, dtype=torch.float64), off)
    return None


def _paley_core(prime: int, corner: float) -> Tensor:
    """[prime + 1, prime + 1]: quadratic characters of the differences, bordered by 1 above and `corner` at the left."""
    character = -torch.ones(prime, dtype=torch.float64)
    character[torch.arange(1, prime).square() % prime] = 1.0
    character[0] = 0.0
    numbers = torch.arange(prime)
    core = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    core[0, 1:], core[1:, 0] = 1.0, corner
    core[1:, 1:] = character[(numbers[:, None] - numbers) % prime]
    return core


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def equalising_rotation(variances: Tensor) -> Tensor:
    """An orthogonal Q for which every diagonal entry of Q diag(variances) Q^T is their mean; variances: float64 [D].

    At most D - 1 plane rotations: each takes the channels of least and of largest variance and brings one to the mean.
    Source: Bendel and Mickey 1978; Davies and Higham 2000, Numerically stable generation of correlation matrices.
    """
    width, mean = len(variances), variances.mean().item()
    spread, rotation = torch.diag(variances.double()), torch.eye(width, dtype=torch.float64)
    for _ in range(width - 1):
        low, high = int(spread.diagonal().argmin()), int(spread.diagonal().argmax())
        below, above = spread[low, low].item() - mean, spread[high, high].item() - mean
        if above - below <= 1e-12 * abs(mean):
            break
        shared = spread[low, high].item()
        # tan of the angle at which the entry (low, low) becomes the mean
        tangent = (shared + math.copysign(math.sqrt(shared**2 - below * above), shared)) / above
        cosine = 1 / math.hypot(1, tangent)
        turn = torch.tensor([[cosine, -cosine * tangent], [cosine * tangent, cosine]], dtype=torch.float64)
        pair = [low, high]
        spread[pair] = turn @ spread[pair]
        spread[:, pair] = spread[:, pair] @ turn.T
        rotation[pair] = turn @ rotation[pair]
    return rotation
