"""A linear classifier on frozen features whose L2 weight is chosen on a validation part of the training images."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgfast.errors import UserError
from fgfast.evaluate.checks import check_split
from fgfast.evaluate.mlp import part_of_each_class

WEIGHTS = tuple(np.logspace(5, -6, 45).tolist())
"""The L2 weights, from the largest: each fit starts from the one before it, whose optimum is near."""


@dataclass(frozen=True)
class SweepOptions:
    """Options of :func:`sweep_probe`."""

    recipe: ClassVar[str] = "sweep"
    val: float = 0.2
    """Fraction of the training images of every class on which the L2 weight is chosen."""
    standardise: bool = False
    """Centre every feature and divide it by its standard deviation over the images that a fit sees."""
    seed: int = 0
    """Seed of the validation part."""


class Sweep(NamedTuple):
    """What :func:`sweep_probe` returns.

    Args:
        predicted: classes int64 [M], on the CPU.
        l2: the chosen weight.
        val_top1: top-1 of the validation part with that weight, fitted without it.
    """

    predicted: Tensor
    l2: float
    val_top1: float


def sweep_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, options: SweepOptions, device: torch.device | str = "cpu"
) -> Sweep:
    """Multinomial logistic regression with the best of 45 L2 weights, fitted again on all training rows.

    The weights are log-spaced from 1e-6 to 1e5; see :class:`LogisticRegression` for what is minimised. The best one has
    the highest top-1 on a random part of the rows of each class; of equal ones the smallest is taken.

    Args:
        train_x: float [N, D].
        train_y: int64 [N].
        test_x: float [M, D].
        options: see ``SweepOptions``.
        device: where the fits run, in float64.

    Raises:
        UserError: fewer than two classes, or no class with two rows.
        TypeError: the features are no tensors, or the labels are no integers.
        ValueError: shapes that do not fit, or a feature that is not finite.

    Source: the linear evaluation in the prototype of Wang, Liu, Weston, Tian, Li (ECCV 2024), as of Kornblith, Shlens,
    Le, "Do Better ImageNet Models Transfer Better?", CVPR 2019. Differences: a fit starts from that of the next larger
    weight, and ends at a gradient of 1e-7 a row; ``standardise`` uses the training rows alone, where the prototype
    divides by norms over all rows, test rows included, and does not centre.
    """
    check_split(train_x, train_y, test_x)
    x, test = (t.detach().to(device, torch.float64) for t in (train_x, test_x))
    classes, y = train_y.to(device).unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError("The training split has fewer than two classes: a linear probe needs labelled classes.")
    held = torch.from_numpy(part_of_each_class(train_y.cpu().numpy(), options.seed, options.val)).to(device)
    if not held.any():
        raise UserError("No class has two training images, one to choose L2 on: choose recipe=logistic.")
    fit, val = _prepare(x[~held], x[held], options.standardise)
    regression = LogisticRegression(fit, y[~held], len(classes))
    best, best_top1 = WEIGHTS[0], -1.0
    weights = best_weights = fit.new_zeros(len(classes), fit.shape[1])
    for l2 in WEIGHTS:
        weights = regression.fit(l2, weights)
        top1 = float(((val @ weights.T).argmax(1) == y[held]).double().mean())
        if top1 >= best_top1:
            best, best_top1, best_weights = l2, top1, weights
    fit, test = _prepare(x, test, options.standardise)
    weights = LogisticRegression(fit, y, len(classes)).fit(best, best_weights)
    return Sweep(classes[(test @ weights.T).argmax(1)].cpu(), best, best_top1)


def _prepare(x: Tensor, other: Tensor, standardise: bool) -> list[Tensor]:
    """Both, perhaps standardised by the rows of ``x``, with a column of ones for the bias."""
    mean, spread = torch.zeros_like(x[0]), torch.ones_like(x[0])
    if standardise:
        mean, spread = x.mean(0), x.std(0, correction=0)
        spread = torch.where(spread < 1e-12 * mean.abs().clamp(min=1), 1, spread)
    return [torch.cat([(t - mean) / spread, t.new_ones(len(t), 1)], 1) for t in (x, other)]


class LogisticRegression:
    r"""Multinomial logistic regression for many L2 weights, by L-BFGS.

    .. math:: \min_W \; \sum_i -\log \text{softmax}(W x_i)_{y_i} + \lambda \|W\|^2

    The optimum lies in the span of the rows, so W is sought in min(N, D) orthogonal coordinates, the eigenvectors of
    the scatter of the rows; each is scaled by the square root of a bound on its curvature, which halves the steps.
    scikit-learn's C is 1 / (2 l2), with ``fit_intercept=False``.

    Args:
        x: rows, float64 [N, D]; a column of ones gives a bias, which is penalised like the other weights.
        y: classes int64 [N], 0..C-1.
        n_classes: C.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> regression = LogisticRegression(x, torch.tensor([0, 1]), 2)
        >>> regression.fit(1.0, torch.zeros(2, 1, dtype=torch.float64)).sign().tolist()
        [[-1.0], [1.0]]
    """

    def __init__(self, x: Tensor, y: Tensor, n_classes: int) -> None:
        self.y = y
        basis = torch.linalg.qr(x.T).Q if len(x) < x.shape[1] else torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        reduced = x @ basis
        scatter, axes = torch.linalg.eigh(reduced.T @ reduced)
        self.rows, self.basis = reduced @ axes, basis @ axes  # [N, R], [D, R]
        self.curvature = scatter.clamp(min=0) / (10 * n_classes)

    def fit(self, l2: float, start: Tensor, *, tolerance: float = 1e-7, max_iter: int = 5000) -> Tensor:
        """The weights [C, D] for one L2 weight.

        Args:
            l2: lambda, > 0.
            start: weights [C, D] to start from.
            tolerance: largest component of the gradient, over N, in the scaled coordinates.
            max_iter: largest number of steps.
        """
        scale = (self.curvature + 2 * l2).rsqrt()
        rows, n = self.rows * scale, len(self.rows)
        scaled = (start @ self.basis / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled], max_iter=max_iter, max_eval=2 * max_iter, tolerance_grad=tolerance, tolerance_change=0,
            history_size=10, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def loss() -> Tensor:
            optimizer.zero_grad()
            fidelity = torch.nn.functional.cross_entropy(rows @ scaled.T, self.y, reduction="sum")
            value = (fidelity + l2 * (scaled * scale).square().sum()) / n
            value.backward()
            return value

        optimizer.step(loss)
        return scaled.detach() * scale @ self.basis.T
