"""A linear classifier on frozen features."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fgfast.errors import UserError


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, C: float | Sequence[float] = 1.0, max_iter: int = 1000
) -> Tensor:
    """Multinomial logistic regression (L-BFGS) on standardised features.

    Every feature is centred and divided by its standard deviation over the training rows, so that C means the same for
    networks whose features have different scales (from random weights to normalised ones); a constant feature is only
    centred.

    Args:
        train_x: float [N, D].
        train_y: int64 [N].
        test_x: float [M, D].
        C: inverse strength of the L2 penalty. Several values: the one that is best on a held-out fifth of the training
            rows (every fifth of each class; the smallest of equals) is used to fit all of them.
        max_iter: L-BFGS iterations at most.

    Returns:
        Predicted classes int64 [M], on the CPU.

    Raises:
        UserError: the training rows are of one class only.
        ValueError: shapes that do not fit, or no positive C.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> linear_probe(x, torch.tensor([3, 3, 7, 7]), torch.tensor([[0.4], [9.0]]))
        tensor([3, 7])

    Source: the evaluation of Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained
    Recognition", ICCV workshops 2023, which uses scikit-learn's LogisticRegression with C = 1.
    """
    if train_x.ndim != 2 or test_x.ndim != 2 or train_x.shape[1] != test_x.shape[1]:
        raise ValueError(f"train_x is {list(train_x.shape)}, test_x {list(test_x.shape)}: give [N, D] and [M, D].")
    if train_y.shape != train_x.shape[:1]:
        raise ValueError(f"train_y is {list(train_y.shape)}: give one class for each of {len(train_x)} training rows.")
    grid = [float(C)] if isinstance(C, int | float) else sorted(float(c) for c in C)
    if not grid or grid[0] <= 0:
        raise ValueError(f"C is {C}: give one or more positive numbers.")
    x, y = train_x.detach().cpu().double().numpy(), train_y.cpu().numpy()
    if len(np.unique(y)) < 2:
        raise UserError("The training split has fewer than two classes: a linear probe needs labelled classes.")
    best = grid[0]
    if len(grid) > 1:
        held = _held_out(y)
        if not held.any():
            raise UserError("No class has five training images: give one C, there is nothing to choose it on.")
        scores = [np.mean(_fit_predict(x[~held], y[~held], x[held], c, max_iter) == y[held]) for c in grid]
        best = grid[int(np.argmax(scores))]
    predictions = _fit_predict(x, y, test_x.detach().cpu().double().numpy(), best, max_iter)
    return torch.from_numpy(predictions.astype(np.int64))


def _held_out(y: np.ndarray) -> np.ndarray:
    """Every fifth row of each class, bool [N]."""
    held = np.zeros(len(y), bool)
    for value in np.unique(y):
        held[np.flatnonzero(y == value)[4::5]] = True
    return held


def _fit_predict(x: np.ndarray, y: np.ndarray, test: np.ndarray, C: float, max_iter: int) -> np.ndarray:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    if not len(test):
        return np.empty(0, np.int64)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    spread[spread < 1e-12 * np.maximum(np.abs(mean), 1)] = 1
    with warnings.catch_warnings():
        # Iterations are bounded on purpose: late ones move the penalty, hardly a prediction.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=C, max_iter=max_iter).fit((x - mean) / spread, y)
    return model.predict((test - mean) / spread)
