"""Linear probes on frozen features: on all training rows, or on a few of each class."""

import statistics
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from distillery.evaluate.probe import LogisticRegression

# grid of the linear probe, ascending: each fit starts from the one before it
PROBE_C = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
PROBE_MAX_ITERATIONS = 200
SHOTS = (1, 5, 10)
FEW_SHOT_DRAWS = 5
# of features whose squared length is 1 on average: a few images leave none to choose the regularisation with. It was
# within 1 % of the best strength for 1, 5 and 10 images of a class, on features of CIFAR-10 and on pixels of digits
FEW_SHOT_C = 5.0


@dataclass(frozen=True)
class Probe:
    """A fitted linear classifier, on the CPU.

    weight: float32 [C, D]; bias: [C]; mean, std: [D], of the training rows; classes: int64 [C], what the rows of
    weight stand for.
    """

    weight: Tensor
    bias: Tensor
    mean: Tensor
    std: Tensor
    classes: Tensor

    def predict(self, x: Tensor, device: torch.device | str = "cpu") -> Tensor:
        """Labels int64 [M] of features float32 [M, D], both on the CPU; computed on `device`."""
        mean, std, weight, bias = (t.to(device) for t in (self.mean, self.std, self.weight, self.bias))
        return self.classes[F.linear((x.to(device) - mean) / std, weight, bias).argmax(dim=1).cpu()]

    def top1(self, x: Tensor, y: Tensor, device: torch.device | str = "cpu") -> float:
        """Accuracy on features [M, D] with labels [M]."""
        return (self.predict(x, device) == y).double().mean().item()


def linear_top1(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, **options: Any) -> float:
    """Accuracy of `fit_probe` on test rows [M, D]; options: as fit_probe."""
    probe = fit_probe(train_x, train_y, **options)
    return probe.top1(test_x, test_y, options.get("device", "cpu"))


def fit_probe(
    train_x: Tensor,
    train_y: Tensor,
    *,
    seed: int = 0,
    max_rows: int = 20_000,
    device: torch.device | str = "cpu",
) -> Probe:
    """Logistic regression on features standardised with the training rows' statistics.

    The strength of the regularisation is chosen on a fifth of the training rows; then all training rows are fitted with
    it. A fit that has not converged after 200 iterations counts as it is.

    Args:
        train_x: float32 [N, D], on the CPU.
        train_y: int64 [N].
        seed: chooses the rows of the cap and of the validation split.
        max_rows: training rows used at most; the time grows with their number, D and C.
        device: where it is fitted: by scikit-learn on the CPU, by distillery.evaluate.probe on CUDA.
    """
    order = np.random.default_rng(seed).permutation(len(train_x))[:max_rows]
    x, y = train_x.numpy()[order].astype(np.float32), train_y.numpy()[order]
    mean, std = _statistics(x)
    x = (x - mean) / std
    held_out = max(1, len(x) // 5)
    search = _logistic_regression(device, warm_start=True)
    best_c, best_score = PROBE_C[0], -1.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
        if len(np.unique(y[held_out:])) > 1:
            for c in PROBE_C:
                score = search.set_params(C=c).fit(x[held_out:], y[held_out:]).score(x[:held_out], y[:held_out])
                if score > best_score:
                    best_c, best_score = c, score
        return _fit(x, y, mean, std, c=best_c, device=device)


def few_shot_top1(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    shots: int,
    seed: int = 0,
    draws: int = FEW_SHOT_DRAWS,
    device: torch.device | str = "cpu",
) -> tuple[float, float] | tuple[None, None]:
    """Accuracy of logistic regression on `shots` training images of each class: mean and deviation over random draws.

    Features are standardised with the statistics of all training rows, which need no labels. The regularisation is
    fixed. A class with fewer images gives all that it has.

    Args:
        train_x: float32 [N, D], on the CPU as all of these.
        train_y: int64 [N].
        test_x: [M, D].
        test_y: [M].
        shots: images of each class.
        seed: chooses the images; the same for every model, so that models compare.
        draws: how many times.
        device: as of fit_probe.
    Returns:
        (mean, standard deviation of the draws); (None, None) where no class has as many images.
    """
    x, y = train_x.numpy(), train_y.numpy()
    members = [np.flatnonzero(y == number) for number in np.unique(y)]
    if max(map(len, members)) < shots:
        return None, None
    mean, std = _statistics(x)
    found = []
    for draw in range(draws):
        rng = np.random.default_rng((seed, shots, draw))
        rows = np.concatenate([rng.permutation(of_class)[:shots] for of_class in members])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=UserWarning, module="sklearn")
            probe = _fit((x[rows] - mean) / std, y[rows], mean, std, c=FEW_SHOT_C / x.shape[1], device=device)
        found.append(probe.top1(test_x, test_y, device))
    return statistics.fmean(found), statistics.pstdev(found)


def few_shot_measures(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], device: Any) -> dict[str, Any]:
    """linear_top1_1shot, linear_top1_1shot_std and so on, of features and labels of both splits."""
    row = {}
    for shots in SHOTS:
        name = f"linear_top1_{shots}shot"
        row[name], row[f"{name}_std"] = few_shot_top1(*train, *test, shots=shots, device=device)
    return row


def _statistics(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = x.mean(axis=0), x.std(axis=0)
    std[std < 1e-6 * max(float(std.max()), 1e-30)] = 1.0  # a dead dimension must not be blown up to noise
    return mean, std


def _fit(
    x: np.ndarray, y: np.ndarray, mean: np.ndarray, std: np.ndarray, *, c: float, device: torch.device | str
) -> Probe:
    """The probe of standardised features [N, D]; of a single class, one that always says that."""
    classes = np.unique(y)
    weight, bias = np.zeros((1, x.shape[1]), np.float32), np.zeros(1, np.float32)
    if len(classes) > 1:
        fitted = _logistic_regression(device).set_params(C=c).fit(x, y)
        weight, bias = fitted.coef_, fitted.intercept_
    if len(classes) == 2:  # two classes have one vector of weights between them, that of the second
        weight, bias = (np.concatenate([np.zeros_like(part), part]) for part in (weight, bias))
    return Probe(*(torch.from_numpy(np.asarray(part)) for part in (weight, bias, mean, std, classes)))


def _logistic_regression(device: torch.device | str, **options: Any) -> Any:
    if torch.device(device).type == "cuda":
        return LogisticRegression(device, max_iter=PROBE_MAX_ITERATIONS, **options)
    from sklearn import linear_model

    return linear_model.LogisticRegression(max_iter=PROBE_MAX_ITERATIONS, **options)
