"""The L2 sweep: each fit against scikit-learn, the choice of the weight, and errors."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression as Peer
from torch import Tensor

from fgfast.errors import UserError
from fgfast.evaluate.mlp import part_of_each_class
from fgfast.evaluate.sweep import WEIGHTS, LogisticRegression, SweepOptions, sweep_probe
from tests.examples import examples


def rows(seed: int, n: int, d: int, classes: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    """Overlapping blobs whose features have very different scales; every class occurs."""
    g = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, d, generator=g, dtype=torch.float64)
    y = torch.arange(n) % classes
    x = centres[y] + spread * torch.randn(n, d, generator=g, dtype=torch.float64)
    return x * torch.logspace(-1, 1, d, dtype=torch.float64), y


def objective(weights: Tensor, x: Tensor, y: Tensor, l2: float) -> float:
    """What a fit minimises, by definition, over the number of rows."""
    log_p = torch.log_softmax(x @ weights.T, 1)
    return float((-log_p[torch.arange(len(y)), y].sum() + l2 * (weights**2).sum()) / len(y))


def test_the_weights_are_45_from_a_millionth_to_a_hundred_thousand():
    assert len(WEIGHTS) == 45
    assert sorted(WEIGHTS) == pytest.approx(np.logspace(-6, 5, 45).tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "d"),
    [(90, 7), (40, 60)],  # more rows than features; fewer, where the weights are sought in the span of the rows
)
def test_fits_along_the_path_have_the_loss_of_scikit_learn(n: int, d: int) -> None:
    x, y = rows(0, n, d, 4)
    regression, weights = LogisticRegression(x, y, 4), torch.zeros(4, d, dtype=torch.float64)
    for i, l2 in enumerate(WEIGHTS):
        weights = regression.fit(l2, weights)
        if i % 4:
            continue
        peer = Peer(C=1 / (2 * l2), fit_intercept=False, tol=1e-9, max_iter=20_000).fit(x.numpy(), y.numpy())
        assert objective(weights, x, y, l2) <= objective(torch.from_numpy(peer.coef_), x, y, l2) + 1e-6, l2


@examples(10)
@given(
    seed=st.integers(0, 2**31), n=st.integers(6, 40), d=st.integers(1, 30), classes=st.integers(2, 5),
    power=st.integers(-1, 4),
)  # fmt: skip
def test_probabilities_are_those_of_scikit_learn(seed: int, n: int, d: int, classes: int, power: int) -> None:
    x, y = rows(seed, n, d, classes)
    l2 = 10.0**power
    weights = LogisticRegression(x, y, classes).fit(l2, torch.zeros(classes, d, dtype=torch.float64), tolerance=1e-10)
    # Of two classes scikit-learn has one vector: the difference of ours, with half the penalty. Its default, L-BFGS,
    # stops up to 1.4e-6 from the optimum.
    c = 1 / l2 if classes == 2 else 1 / (2 * l2)
    peer = Peer(C=c, fit_intercept=False, tol=1e-10, max_iter=20_000, solver="newton-cg").fit(x.numpy(), y.numpy())
    expected = peer.predict_proba(x.numpy())
    found = (x @ weights.T).softmax(1).numpy()
    assert np.abs(found - expected).max() < 1e-6


def test_the_start_does_not_change_the_optimum() -> None:
    x, y = rows(1, 60, 12, 3)
    regression = LogisticRegression(x, y, 3)
    cold, warm = (
        regression.fit(1.0, start, tolerance=1e-10)
        for start in (torch.zeros(3, 12, dtype=torch.float64), regression.fit(100.0, torch.ones(3, 12).double()))
    )
    assert torch.allclose(cold, warm, rtol=0, atol=1e-6)


def brute_force(x: Tensor, y: Tensor, test: Tensor, options: SweepOptions) -> tuple[Tensor, float, float]:
    """The protocol by scikit-learn, each fit on its own; ones are appended for the bias."""

    def prepared(fit: Tensor, *others: Tensor) -> list[np.ndarray]:
        mean = fit.mean(0) if options.standardise else torch.zeros_like(fit[0])
        scale = fit.std(0, correction=0) if options.standardise else torch.ones_like(fit[0])
        return [np.c_[((t - mean) / scale).numpy(), np.ones(len(t))] for t in (fit, *others)]

    def fitted(rows: np.ndarray, labels: Tensor, l2: float) -> Peer:
        return Peer(C=1 / (2 * l2), fit_intercept=False, tol=1e-8, max_iter=20_000).fit(rows, labels.numpy())

    held = torch.from_numpy(part_of_each_class(y.numpy(), options.seed, options.val))
    fit, val = prepared(x[~held], x[held])
    scores = {l2: (fitted(fit, y[~held], l2).predict(val) == y[held].numpy()).mean() for l2 in sorted(WEIGHTS)}
    best = max(scores, key=lambda l2: scores[l2])  # the first one of equal ones: the smallest
    fit, scored = prepared(x, test)
    return torch.from_numpy(fitted(fit, y, best).predict(scored)), best, float(scores[best])


@pytest.mark.parametrize("standardise", [False, True])
def test_the_protocol_is_that_of_45_separate_fits(standardise: bool) -> None:
    x, y = rows(3, 120, 6, 3, spread=1.5)
    test, _ = rows(4, 50, 6, 3, spread=1.5)
    options = SweepOptions(standardise=standardise, seed=5)
    predicted, l2, val_top1 = brute_force(x, y, test, options)
    result = sweep_probe(x.float(), 10 * y + 3, test.float(), options)
    assert result.l2 == pytest.approx(l2, rel=1e-12)
    assert result.val_top1 == pytest.approx(val_top1)
    assert torch.equal(result.predicted, 10 * predicted + 3)


def test_the_validation_part_depends_on_the_seed_alone() -> None:
    x, y = rows(6, 60, 4, 3)
    first, again = (sweep_probe(x, y, x, SweepOptions(seed=1)) for _ in range(2))
    assert torch.equal(first.predicted, again.predicted)
    assert first[1:] == again[1:]


def test_rows_that_no_sweep_can_use_are_refused() -> None:
    with pytest.raises(UserError, match="fewer than two classes"):
        sweep_probe(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64), torch.randn(1, 2), SweepOptions())
    with pytest.raises(UserError, match="No class has two training images"):
        sweep_probe(torch.randn(3, 2), torch.arange(3), torch.randn(1, 2), SweepOptions())
    with pytest.raises(ValueError, match="not finite"):
        sweep_probe(torch.full((4, 2), torch.nan), torch.tensor([0, 0, 1, 1]), torch.randn(1, 2), SweepOptions())
