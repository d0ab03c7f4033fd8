"""Initial centroids of k-means: greedy k-means++ or random pixels, from the same random numbers for every problem."""

import math

import torch
from torch import Tensor

from fgfast.pixels.source import Dense, PixelSource
from fgfast.reference.draws import uniform


def pixel_keys(seed: Tensor, run: int, weight: Tensor, init: str) -> Tensor:
    """Random keys of the N pixels for :func:`sample_pixels`, float64 [N] ("k-means++") or [B, N] ("random").

    Keys of "random" draw pixels without replacement in proportion to their weight [B, N]: log(u) / weight.

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006.
    """
    keys = uniform(seed, 3 * run + 1, weight.shape[1])
    return torch.log(keys + 2**-33) / weight.double().clamp_min(1e-30) if init == "random" else keys


def sample_pixels(weight: Tensor, keys: Tensor, n: int) -> Tensor:
    """Indices [B, n], ascending, of the n pixels of positive weight [B, N] with the largest keys; all if n is N."""
    batch, pixels = weight.shape
    if n == pixels:
        return torch.arange(n, device=weight.device).expand(batch, -1)
    return torch.where(weight > 0, keys, -math.inf).topk(n, dim=1).indices.sort(1).values


def trial_numbers(seed: Tensor, run: int, n_clusters: int) -> Tensor:
    """Uniform numbers [K, trials] for the candidates of greedy k-means++, 2 + floor(log K) of them per centroid."""
    trials = 2 + int(math.log(n_clusters))
    return uniform(seed, 3 * run + 2, n_clusters * trials).view(n_clusters, trials)


def _draw_positions(p: Tensor, u: Tensor) -> Tensor:
    """Positions [B, m] drawn in proportion to p [B, N] by uniform numbers u [m]."""
    c = p.double().cumsum(1)
    return torch.searchsorted(c, u * c[:, -1:], right=True).clamp_max_(p.shape[1] - 1)


def start(source: PixelSource, n_clusters: int, init: str, init_samples: int, seed: Tensor, run: int) -> Tensor:
    """Initial centroids [B, K, D] of restart number ``run``.

    k-means++ draws 2 + floor(log K) candidates in proportion to weight x distance and keeps the one that leaves the
    least, as scikit-learn does (Arthur and Vassilvitskii, SODA 2007).
    """
    keys = pixel_keys(seed, run, source.w, init)
    if init == "random":
        return source.points(sample_pixels(source.w, keys, n_clusters))
    w = source.w
    if init_samples < source.pixels:
        chosen = sample_pixels(w, keys, init_samples)
        if isinstance(source, Dense):
            source = source.subset(chosen)
            w = source.w
        else:
            w = w * torch.zeros_like(w).scatter_(1, chosen, 1)
    u = trial_numbers(seed, run, n_clusters)
    first = source.points(_draw_positions(w, u[0, :1]))  # [B, 1, D]
    found = [first]
    closest = source.distances(first)[:, 0]  # [B, N]
    for k in range(1, n_clusters):
        p = closest * w
        candidates = source.points(
            _draw_positions(torch.where(p.sum(1, keepdim=True) > 0, p, w), u[k])
        )  # [B, trials, D]
        closer = torch.minimum(closest[:, None], source.distances(candidates))
        best = torch.bmm(closer, w[..., None]).argmin(1, keepdim=True)  # [B, 1, 1]
        found.append(candidates.gather(1, best.expand(-1, -1, source.channels)))
        closest = closer.gather(1, best.expand(-1, -1, source.pixels))[:, 0]
    return torch.cat(found, 1)
