"""Logistic regression on the GPU, for the linear probe: the fits that scikit-learn makes on the CPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# scikit-learn's: the largest entry of the gradient (of the mean loss over rows) at which a fit has converged
_TOLERANCE = 1e-4
_HISTORY = 10


def minimise(
    objective: Callable[[], Tensor], parameters: list[Tensor], *, max_iter: int, tolerance: float = _TOLERANCE
) -> int:
    """L-BFGS; the parameters are changed in place.

    Args:
        objective: the loss with the parameters as they are, a scalar, a mean over rows.
        parameters: what it is minimised over.
        max_iter: iterations at most.
        tolerance: a fit has converged once no entry of the gradient is larger.
    Returns:
        Iterations done.
    """
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=max_iter,
        max_eval=10 * max_iter,
        history_size=_HISTORY,
        tolerance_grad=tolerance,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss_and_gradient() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(loss_and_gradient)
    return optimizer.state[parameters[0]]["n_iter"]


class LogisticRegression:
    """The part of sklearn.linear_model.LogisticRegression that the probe needs: its objective, start and stopping rule.

    The loss is the mean cross-entropy over N rows plus |w|^2 / (2 C N); the intercept is not penalised. Two classes
    have one vector of weights between them.

    Args:
        device: where it is fitted; rows and labels come and go as numpy arrays.
        max_iter: L-BFGS iterations of a fit.
        warm_start: begin a fit at the last one's outcome; otherwise at 0.
    """

    def __init__(self, device: torch.device | str, *, max_iter: int, warm_start: bool = False) -> None:
        self.device, self.max_iter, self.warm_start = device, max_iter, warm_start
        self.C = 1.0
        self.classes: np.ndarray | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def coef_(self) -> np.ndarray:
        """Weights of the last fit, float32 [C, D]; [1, D] of two classes."""
        return self.weight.detach().cpu().numpy()

    @property
    def intercept_(self) -> np.ndarray:
        """Biases of the last fit, float32 [C], or [1]."""
        return self.bias.detach().cpu().numpy()

    def set_params(self, **params: Any) -> "LogisticRegression":
        """C: strength of the data against the regularisation, > 0, no unit."""
        self.C = params["C"]
        return self

    def fit(self, x: np.ndarray, y: np.ndarray) -> "LogisticRegression":
        """Fit float32 [N, D] and labels int64 [N] of two or more classes."""
        self.classes, targets = np.unique(y, return_inverse=True)
        rows, targets = torch.from_numpy(x).to(self.device), torch.from_numpy(targets).to(self.device)
        num_outputs = 1 if len(self.classes) == 2 else len(self.classes)
        shape = (num_outputs, x.shape[1])
        if not self.warm_start or self.weight is None or self.weight.shape != shape:
            self.weight = torch.zeros(shape, device=self.device, requires_grad=True)
            self.bias = torch.zeros(num_outputs, device=self.device, requires_grad=True)

        def objective() -> Tensor:
            logits = F.linear(rows, self.weight, self.bias)
            if num_outputs == 1:
                loss = F.binary_cross_entropy_with_logits(logits[:, 0], targets.float())
            else:
                loss = F.cross_entropy(logits, targets)
            return loss + self.weight.square().sum() / (2 * self.C * len(rows))

        minimise(objective, [self.weight, self.bias], max_iter=self.max_iter)
        return self

    @torch.no_grad()
    def predict(self, x: np.ndarray) -> np.ndarray:
        """Labels int64 [M] of float32 [M, D]."""
        logits = F.linear(torch.from_numpy(x).to(self.device), self.weight, self.bias)
        chosen = (logits[:, 0] > 0).long() if len(self.classes) == 2 else logits.argmax(dim=1)
        return self.classes[chosen.cpu().numpy()]

    def score(self, x: np.ndarray, y: np.ndarray) -> float:
        """Share of the rows whose label is predicted."""
        return float((self.predict(x) == y).mean())
