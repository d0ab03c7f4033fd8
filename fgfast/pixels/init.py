"""Initial centroids of k-means: greedy k-means++ or random pixels, from the same random numbers for every problem."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fgfast.pixels.source import COPIED, Dense, PixelSource
from fgfast.reference.draws import uniform


class Sample(NamedTuple):
    """Indices [B, n] of pixels, ascending, and the weight [B, n] with which each stands for those not drawn."""

    pixels: Tensor
    weight: Tensor


def random_pixels(weight: Tensor, n: int, seed: Tensor, run: int) -> Tensor:
    """Indices [B, n], ascending, of pixels drawn without replacement in proportion to their weight [B, N].

    Source: Efraimidis and Spirakis, "Weighted random sampling with a reservoir", 2006: the largest log(u) / weight.
    """
    u = uniform(seed, 3 * run + 1, weight.shape[1])
    keys = torch.log(u + 2**-33) / weight.double().clamp_min(1e-30)
    return torch.where(weight > 0, keys, -math.inf).topk(n, dim=1).indices.sort(1).values


def sample_pixels(weight: Tensor, spread: Tensor | None, n: int, seed: Tensor, run: int) -> Sample:
    """N pixels that stand for all, among which a few that lie far away are not missed; all if n is N.

    Half of the chance to be drawn goes to pixels alike, half in proportion to weight x spread, the distance [B, N] from
    the centre; weights correct for it, so that sums over the sample are unbiased estimates of sums over all pixels.
    ``spread`` is not read where n is N.

    Source: Bachem, Lucic, Krause, "Scalable k-means clustering via lightweight coresets", KDD 2018, for the chances;
    Duffield, Lund, Thorup, "Priority sampling for estimation of arbitrary subset sums", J. ACM 2007, for the draw.
    """
    batch, pixels = weight.shape
    if n == pixels or spread is None:
        return Sample(torch.arange(n, device=weight.device).expand(batch, -1), weight)
    w = weight.double()
    mass, counted = w * spread, (w > 0).double()
    chance = counted / counted.sum(1, keepdim=True).clamp_min(1) + mass / mass.sum(1, keepdim=True).clamp_min(1e-300)
    priority = chance / (uniform(seed, 3 * run + 1, pixels) + 2**-33)
    top = priority.topk(n + 1, dim=1)
    index = top.indices[:, :n].sort(1).values
    drawn = chance.gather(1, index)
    stands_for = torch.where(drawn > 0, (top.values[:, n:] / drawn).clamp_min(1), 0)
    return Sample(index, (w.gather(1, index) * stands_for).to(weight.dtype))


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
    if init == "random":
        return source.points(random_pixels(source.w, n_clusters, seed, run))
    w = source.w
    if init_samples < source.pixels:
        chosen = sample_pixels(w, source.spread(), init_samples, seed, run)
        if isinstance(source, Dense) or chosen.pixels.numel() * source.channels <= COPIED:
            source, w = source.subset(chosen.pixels), chosen.weight
        else:
            w = torch.zeros_like(w).scatter_(1, chosen.pixels, chosen.weight)
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
