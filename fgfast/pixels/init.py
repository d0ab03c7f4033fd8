"""Where k-means starts: greedy k-means++ or random pixels, every problem with the same numbers."""

import math

import torch
from torch import Tensor

from fgfast.pixels.source import Dense, PixelSource
from fgfast.reference.draws import uniform


def _sample(w: Tensor, keys: Tensor, n: int) -> Tensor:
    """The n pixels of weight > 0 with the largest keys, ascending [B, n]."""
    return torch.where(w > 0, keys, -math.inf).topk(n, dim=1).indices.sort(1).values


def _drawn(p: Tensor, u: Tensor) -> Tensor:
    """Positions [B, m] drawn in proportion to p [B, N] by uniform numbers u [m]."""
    c = p.double().cumsum(1)
    return torch.searchsorted(c, u * c[:, -1:], right=True).clamp_max_(p.shape[1] - 1)


def start(source: PixelSource, n_clusters: int, init: str, init_samples: int, seed: Tensor, run: int) -> Tensor:
    """Centroids [B, K, D]; run numbers the restarts.

    k-means++ draws 2 + floor(log K) candidates in proportion to weight x distance and keeps the one that leaves the
    least, as scikit-learn does (Arthur and Vassilvitskii, SODA 2007).
    """
    keys = uniform(seed, 3 * run + 1, source.pixels)
    if init == "random":
        keys = torch.log(keys + 2**-33) / source.w.double().clamp_min(1e-30)
        return source.points(_sample(source.w, keys, n_clusters))
    w = source.w
    if init_samples < source.pixels:
        chosen = _sample(w, keys, init_samples)
        if isinstance(source, Dense):
            source = source.subset(chosen)
            w = source.w
        else:
            w = w * torch.zeros_like(w).scatter_(1, chosen, 1)
    trials = 2 + int(math.log(n_clusters))
    u = uniform(seed, 3 * run + 2, n_clusters * trials).view(n_clusters, trials)
    first = source.points(_drawn(w, u[0, :1]))  # [B, 1, D]
    found = [first]
    closest = source.distances(first)[:, 0]  # [B, N]
    for k in range(1, n_clusters):
        p = closest * w
        candidates = source.points(_drawn(torch.where(p.sum(1, keepdim=True) > 0, p, w), u[k]))  # [B, trials, D]
        closer = torch.minimum(closest[:, None], source.distances(candidates))
        best = torch.bmm(closer, w[..., None]).argmin(1, keepdim=True)  # [B, 1, 1]
        found.append(candidates.gather(1, best.expand(-1, -1, source.channels)))
        closest = closer.gather(1, best.expand(-1, -1, source.pixels))[:, 0]
    return torch.cat(found, 1)
