"""The result of Lloyd's iteration, and the choice among restarts."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class LloydResult(NamedTuple):
    """Centroids [B, K, D], labels [B, N], counts [B, K], inertia [B] and n_iter int32 [B]."""

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    inertia: Tensor
    n_iter: Tensor


def best_of(n_init: int, run: Callable[[int], LloydResult], inertia: Callable[[LloydResult], Tensor]) -> LloydResult:
    """Make n_init runs and keep, for each problem of the batch, the run with the least inertia.

    Args:
        n_init: number of runs, at least 1.
        run: called with 0 to n_init - 1.
        inertia: called right after each run, returns its inertia [B] over finite pixels; not called if n_init is 1.

    Returns:
        LloydResult: the first one of equal runs.
    """
    best = run(0)
    if n_init == 1:
        return best
    least = inertia(best)
    best = LloydResult(*(value.clone() for value in best))  # a backend may write the next run into the same tensors
    for number in range(1, n_init):
        new = run(number)
        new_inertia = inertia(new)
        better = new_inertia < least
        least = torch.where(better, new_inertia, least)
        pairs = zip(new, best, strict=True)
        best = LloydResult(*(torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))
    return best
