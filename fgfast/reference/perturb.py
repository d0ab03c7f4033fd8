"""The definition of the perturbation of features, in loops over vectors, and of the running variance behind it."""

import math

import torch
from torch import Tensor

from fgfast.reference.draws import normal
from fgfast.tensors import accumulation

UNITS = 30  # bits of the largest energy of a vector


def smallest(scores: Tensor, count: int) -> list[int]:
    """Indices of the ``count`` smallest of scores [D], ties to the lowest index, NaN last.

    Example:
        >>> smallest(torch.tensor([2.0, 1.0, 1.0, 0.0]), 2)
        [3, 1]
    """
    values = [math.inf if math.isnan(v) else v for v in scores.tolist()]
    return sorted(range(len(values)), key=lambda d: (values[d], d))[:count]


def energies(row: Tensor) -> list[int]:
    """Squares of the vector [D] as integers below 2^30, after scaling it below 2^15 by a power of two.

    The sum of integers does not depend on their order, so every backend leaves the same dimensions unchanged.

    Example:
        >>> energies(torch.tensor([1.0, 0.5])) == [2**28, 2**26]
        True
    """
    exponent = max(math.frexp(float(row.abs().max()))[1], UNITS // 2 - 127)
    return (row.double() * 2.0 ** (UNITS // 2 - exponent)).float().square().long().tolist()


def limit_energy(row: Tensor, candidates: set[int], budget: int) -> set[int]:
    """The candidates that may change: those of least energy first, up to budget / 2^16 of the energy of the vector."""
    cost = energies(row.float())
    left = sum(cost) * budget >> 16
    chosen = set()
    for d in sorted(candidates, key=lambda d: (cost[d], d)):
        left -= cost[d]
        if left < 0:
            break
        chosen.add(d)
    return chosen


def perturb(
    features: Tensor,
    gradient: Tensor | None,
    low_variance: Tensor | None,
    std: Tensor | None,
    noise: Tensor | None,
    count: int,
    importance: str,
    combine: str,
    strategy: str,
    strength: float,
    budget: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Features [B, D] with the chosen dimensions changed, and the mask bool [B, D] of these; see `fgfast.perturb`."""
    batch, channels = features.shape
    wide = features.to(accumulation(features.dtype))
    out, mask = wide.clone(), torch.zeros_like(features, dtype=torch.bool)
    if strategy == "noise" and noise is None:
        noise = normal(seed, batch, channels, features.device)
    for b, row in enumerate(wide):
        if not row.float().isfinite().all():
            continue
        criteria = []
        if low_variance is not None:
            criteria.append(set(low_variance.nonzero().flatten().tolist()))
        if gradient is not None:
            weight = gradient[b].to(wide.dtype)
            product = weight * row
            score = {"absolute": product.abs(), "positive": product.relu(), "given": weight.abs()}[importance]
            criteria.append(set(smallest(score, count)))
        chosen = set.union(*criteria) if combine == "union" else set.intersection(*criteria)
        for d in limit_energy(row, chosen, budget):
            mask[b, d] = True
            if strategy == "noise":
                assert std is not None  # checked by the operation
                assert noise is not None
                change = row.double().norm().to(wide.dtype) * std[d].to(wide.dtype) * noise[b, d].to(wide.dtype)
            else:
                change = (wide[(b + 1) % batch, d] if strategy == "swap" else 0) - row[d]
            out[b, d] = row[d] + strength * change
    return out.to(features.dtype), mask


def running_variance(batches: list[Tensor], decay: float) -> Tensor:
    """Variance [D] of unit vectors: each batch [n, D] of features has ``decay`` times the weight of the next one.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
        >>> running_variance([x], 0.9).tolist()
        [0.25, 0.25]
    """
    weights = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
    units = [torch.nn.functional.normalize(x.double(), dim=1) for x in batches]
    mean = sum(w * x.mean(0) for w, x in zip(weights, units, strict=True)) / sum(weights)
    spread = sum(w * (x - mean).square().mean(0) for w, x in zip(weights, units, strict=True)) / sum(weights)
    assert isinstance(spread, Tensor)  # of one batch at least
    return spread
