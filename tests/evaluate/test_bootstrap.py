"""Bootstrap intervals: coverage on simulated data, pairing, repeatability."""

import numpy as np
import pytest

from fgfast.evaluate.bootstrap import accuracy_interval, paired_interval


def test_interval_of_one_seed_covers_the_true_accuracy():
    rng = np.random.default_rng(0)
    hits = 0
    for i in range(200):
        low, high = accuracy_interval(rng.uniform(size=300) < 0.7, n=500, seed=i)
        hits += low <= 0.7 <= high
    assert 0.90 <= hits / 200 <= 0.99


def simulate(repeats: int, of_runs: float, of_images: float) -> tuple[float, float]:
    """Coverage of a true difference of 0.1, and half the width over 1.96 true standard errors: 8 seeds, 200 images.

    Args:
        repeats: number of simulations.
        of_runs: standard deviation of the accuracies of training runs.
        of_images: variation of the advantage of a over b between images.
    """
    rng = np.random.default_rng(1)
    means, lows, highs = np.empty((3, repeats))
    for i in range(repeats):
        difficulty, advantage = rng.uniform(-0.25, 0.25, 200), of_images * rng.uniform(-1, 1, 200)
        run = of_runs * rng.standard_normal((2, 8, 1))
        a = rng.uniform(size=(8, 200)) < 0.6 + difficulty + advantage + run[0]
        b = rng.uniform(size=(8, 200)) < 0.5 + difficulty - advantage + run[1]
        means[i], lows[i], highs[i] = paired_interval(a, b, n=300, seed=i)
    covered = (lows <= 0.1) & (highs >= 0.1)
    return covered.mean(), (highs - lows).mean() / (2 * 1.96 * means.std())


def test_paired_interval_covers_a_difference_that_varies_over_images_and_seeds():
    coverage, width = simulate(200, of_runs=0.04, of_images=0.17)
    assert 0.92 <= coverage <= 0.995
    assert 0.9 <= width <= 1.25


def test_paired_interval_is_at_most_root_3_too_wide_for_independent_noise():
    coverage, width = simulate(100, of_runs=0.0, of_images=0.0)
    assert coverage >= 0.95
    assert width <= 1.95  # root 3, and the error of the standard error of 100 repeats


def test_pairing_makes_the_interval_narrower():
    rng = np.random.default_rng(2)
    a = rng.uniform(size=(3, 500)) < 0.6
    b = a ^ (rng.uniform(size=a.shape) < 0.03)
    _, low, high = paired_interval(a, b)
    _, unpaired_low, unpaired_high = paired_interval(a, b[:, rng.permutation(500)])
    assert high - low < 0.5 * (unpaired_high - unpaired_low)


def test_means_are_exact_and_inside_the_interval():
    rng = np.random.default_rng(3)
    a, b = rng.uniform(size=(2, 3, 77)) < 0.5
    mean, low, high = paired_interval(a, b)
    assert mean == pytest.approx(a.mean() - b.mean())
    assert low <= mean <= high


def test_swapping_a_and_b_changes_the_sign():
    rng = np.random.default_rng(4)
    a, b = rng.uniform(size=(2, 2, 50)) < 0.5
    mean, low, high = paired_interval(a, b)
    assert paired_interval(b, a) == pytest.approx((-mean, -high, -low))


def test_the_same_seed_gives_the_same_interval():
    correct = np.arange(100) % 3 == 0
    assert accuracy_interval(correct, seed=5) == accuracy_interval(correct, seed=5)
    assert accuracy_interval(correct, seed=5) != accuracy_interval(correct, seed=6)


def test_a_vector_equals_one_seed():
    correct = np.arange(50) % 2
    assert accuracy_interval(correct) == accuracy_interval(correct[None])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1, 2, 3)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="expected shape"):
        accuracy_interval(np.zeros(shape))
    with pytest.raises(ValueError, match="give the same"):
        paired_interval(np.zeros((2, 3)), np.zeros((2, 4)))
