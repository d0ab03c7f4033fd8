"""What is worth a look in the curves of a run: a sentence for each rule that they break, and none otherwise."""

import math
from collections.abc import Sequence

import numpy as np

from fgfast.evaluate.health import COLLAPSED
from fgfast.report.plots import Row, series

WAIT = 0.05  # fraction of the step time
RANK = 0.5  # of the first effective rank
ACCURACY = 0.9  # of the best kNN accuracy
LEAST = 10  # losses, for a comparison of the first and the last of them


def findings(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Sentences on what is off, by the title of their chart.

    ================================  ===============================================================================
    chart                             rule
    ================================  ===============================================================================
    Loss                              the mean of the last fifth is not below that of the first fifth by two standard
                                      errors, of 10 values or more; or a step was skipped for a loss that is not finite
    kNN accuracy                      the last is below 0.9 of the best
    Effective rank of the features    the last is below half of the first
    Uniformity, alignment             the last uniformity is above -3e-5 (``fgfast.evaluate.health.COLLAPSED``)
    Waiting for data                  the median is above 5% of the step time
    ================================  ===============================================================================

    Args:
        rows: rows of metrics.jsonl.

    Example:
        >>> findings([{"step": s, "data_wait": 0.01} for s in range(9)])
        {}
        >>> print(*findings([{"step": s, "data_wait": 0.25} for s in range(9)])["Waiting for data"])
        Training waits for data for 25% of its time, and over 5% is a lot: fgfast data-bench tells what it waits for.
    """
    found: dict[str, list[str]] = {}

    def add(title: str, sentence: str) -> None:
        found.setdefault(title, []).append(sentence)

    if (ends := _loss_ends(rows)) is not None:
        add(
            "Loss",
            f"The loss has not fallen: {ends[0]:.3g} in the first fifth of the run, {ends[1]:.3g} in the last. Try "
            "another --lr; where a target moves (byol, simsiam, dino, srgan), kNN and effective rank tell more.",
        )
    if (skipped := _finite(rows, "skipped")) and skipped[-1] > 0:
        add("Loss", f"Steps skipped because their loss was not finite: {skipped[-1]:.0f}. log.txt names their images.")
    if (knn := _finite(rows, "knn")) and knn[-1] < ACCURACY * max(knn):
        add(
            "kNN accuracy",
            f"The accuracy has fallen from {max(knn):.1%} to {knn[-1]:.1%}: the last weights are not the best.",
        )
    if (rank := _finite(rows, "effective_rank")) and rank[-1] < RANK * rank[0]:
        add(
            "Effective rank of the features",
            f"The features vary along ever fewer directions ({rank[-1]:.1f}, at first {rank[0]:.1f}), a sign that they "
            "collapse: lower --lr, or compare the nearest neighbours below.",
        )
    if (uniformity := _finite(rows, "uniformity")) and uniformity[-1] > COLLAPSED:
        add(
            "Uniformity, alignment",
            "The features have collapsed: those of all images have one direction. Lower --lr, or check the images.",
        )
    if (wait := _finite(rows, "data_wait")) and (median := float(np.median(wait))) > WAIT:
        add(
            "Waiting for data",
            f"Training waits for data for {median:.0%} of its time, and over {WAIT:.0%} is a lot: fgfast "
            "data-bench tells what it waits for.",
        )
    return found


def _finite(rows: Sequence[Row], key: str) -> list[float]:
    return [value for value in series(rows, key)[1].tolist() if math.isfinite(value)]


def _loss_ends(rows: Sequence[Row]) -> tuple[float, float] | None:
    """The mean loss of the first and the last fifth, if the loss has not fallen."""
    losses = np.array(_finite(rows, "loss"))
    if len(losses) < LEAST:
        return None
    n = len(losses) // 5
    first, last = losses[:n], losses[-n:]
    error = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / n)
    return None if last.mean() < first.mean() - 2 * error else (float(first.mean()), float(last.mean()))
