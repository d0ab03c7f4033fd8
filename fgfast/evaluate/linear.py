"""A linear classifier on frozen features."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fgfast.errors import UserError
from fgfast.evaluate.checks import check_split


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, *, C: float | Sequence[float] = 1.0, max_iter: int = 1000
) -> Tensor:
    """Multinomial logistic regression (L-BFGS) on standardised features.

    Every feature is centred and divided by its standard deviation over the training rows, which makes C comparable
    between networks whose features have different scales; a constant feature is only centred.

    Args:
        train_x: float [N, D].
        train_y: int64 [N].
        test_x: float [M, D].
        C: inverse strength of the L2 penalty. Of several values the best one on a held-out fifth of the training rows
            (every fifth row of each class; the smallest among equals) is used for the fit on all rows.
        max_iter: largest number of L-BFGS iterations.

    Returns:
        Predicted classes int64 [M], on the CPU.

    Raises:
        UserError: all training rows have the same class.
        TypeError: the features are no tensors, or the labels are no integers.
        ValueError: wrong shapes, a feature that is not finite, or no positive C.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        >>> linear_probe(x, torch.tensor([3, 3, 7, 7]), torch.tensor([[0.4], [9.0]]))
        tensor([3, 7])

    Source: the evaluation of Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained
    Recognition", ICCV workshops 2023, which uses scikit-learn's LogisticRegression with C = 1.
    """
    check_split(train_x, train_y, test_x)
    grid = [float(C)] if isinstance(C, int | float) else sorted(float(c) for c in C)
    if not grid or grid[0] <= 0:
        raise ValueError(f"C is {C}: give one or more positive numbers.")
    x, y = train_x.detach().cpu().double().numpy(), train_y.cpu().numpy()
    if len(np.unique(y)) < 2:
        raise UserError("The training split has fewer than two classes: a linear probe needs labelled classes.")
    best = grid[0]
    if len(grid) > 1:
        held = _fifth_of_each_class(y)
        if not held.any():
            raise UserError("No class has five training images, which choosing C needs: give one value of C.")
        scores = [np.mean(_fit_predict(x[~held], y[~held], x[held], c, max_iter) == y[held]) for c in grid]
        best = grid[int(np.argmax(scores))]
    predictions = _fit_predict(x, y, test_x.detach().cpu().double().numpy(), best, max_iter)
    return torch.from_numpy(predictions.astype(np.int64))


def _fifth_of_each_class(y: np.ndarray) -> np.ndarray:
    """Mask of every fifth row of each class, bool [N]."""
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
        # The number of iterations is limited on purpose: late ones change the penalty but hardly any prediction.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=C, max_iter=max_iter).fit((x - mean) / spread, y)
    return model.predict((test - mean) / spread)
