"""k-means by Triton kernels: initial centroids, Lloyd's iteration and repair of empty clusters, without device syncs.

A step is that of :mod:`fgfast.kernels.kmeans.step`, relative to the mean of the pixels. After it one program per
problem repairs empty clusters, updates the centroids and stores whether the problem has converged; programs of a
converged problem return at once. If a program has an entire problem it does this in the launch of the step, and an
iteration is one launch. k-means++ works on the inner products of the samples (`plus_plus`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels.common import interpreted, on_device_of
from fgfast.kernels.kmeans.step import Move, Solver, power
from fgfast.kernels.launches import launch
from fgfast.pixels.init import random_pixels, sample_pixels, start, trial_numbers
from fgfast.pixels.options import KMeansOptions
from fgfast.pixels.result import LloydResult, best_of
from fgfast.pixels.source import Dense, from_relative, middle, to_relative
from fgfast.reference.draws import spaced_of_all, spaced_pixels

GRAM = 1 << 28  # inner products in memory at a time: 1 GiB
SAMPLES = 4096  # most samples of a program; more are drawn by torch


# ---------------------------------------------------------------- k-means++


@triton.jit
def _draw_position(mass, u):
    """The position drawn in proportion to mass [BLOCK] by a uniform number u."""
    cumulative = tl.cumsum(mass.to(tl.float64), 0)
    return tl.sum((cumulative <= u * tl.max(cumulative, 0)).to(tl.int32), 0)


@triton.jit
def plus_plus(gram_ptr, weight_ptr, uniform_ptr, chosen_ptr, M, K, TRIALS, COSINE: tl.constexpr, BLOCK: tl.constexpr):
    """Positions [B, K] that greedy k-means++ chooses by inner products [B, M, M] of samples; a program per problem."""
    b = tl.program_id(0).to(tl.int64)
    gram_ptr += b * M * M
    i = tl.arange(0, BLOCK)
    w = tl.load(weight_ptr + b * M + i, i < M, other=0.0)
    squares = tl.load(gram_ptr + i.to(tl.int64) * (M + 1), i < M, other=0.0)
    closest = tl.full([BLOCK], float("inf"), tl.float32)
    for k in range(K):
        mass = tl.where(closest < float("inf"), closest * w, w)
        mass = tl.where(tl.sum(mass, 0) > 0, mass, w)
        cost = float("inf")
        winner = 0
        winner_closest = closest
        for trial in range(TRIALS):
            if (k > 0) | (trial == 0):
                at = tl.minimum(_draw_position(mass, tl.load(uniform_ptr + k * TRIALS + trial)), M - 1)
                inner = tl.load(gram_ptr + tl.cast(at, tl.int64) * M + i, i < M, other=0.0)
                if COSINE:
                    distance = 1 - inner
                else:
                    distance = squares + tl.load(gram_ptr + tl.cast(at, tl.int64) * (M + 1)) - 2 * inner
                closer = tl.minimum(closest, tl.where(w > 0, tl.maximum(distance, 0.0), 0.0))
                total = tl.sum(closer * w, 0)
                better = (total < cost) | (trial == 0)
                cost = tl.where(better, total, cost)
                winner = tl.where(better, at, winner)
                winner_closest = tl.where(better, closer, winner_closest)
        closest = winner_closest
        tl.store(chosen_ptr + b * K + k, tl.cast(winner, tl.int64))


def inner_products(rows: Tensor) -> Tensor:
    """Inner products [B, M, M] in float32 of rows [B, M, D]."""
    if rows.dtype == torch.float32:
        return torch.bmm(rows, rows.mT)
    return torch.bmm(rows, rows.mT, out_dtype=torch.float32)


def choose_samples(gram: Tensor, weight: Tensor, numbers: Tensor, n_clusters: int, metric: str) -> Tensor:
    """Positions [B, K] among M samples that greedy k-means++ chooses with uniform numbers [K, trials].

    Distances come from the inner products of the samples, float32 [B, M, M]: one product replaces K reads of x.
    """
    batch, samples, _ = gram.shape
    chosen = torch.empty(batch, n_clusters, dtype=torch.int64, device=gram.device)
    launch(
        plus_plus, (batch,),
        gram, weight, numbers, chosen, samples, n_clusters, numbers.shape[1], COSINE=metric == "cosine",
        BLOCK=power(samples), num_warps=8,
    )  # fmt: skip
    return chosen


# ---------------------------------------------------------------- the host side


class Moments(NamedTuple):
    """The pixels that count, bool [B, N], their mean [B, D] and their variance averaged over channels [B].

    ``centre`` [B, D] is the median of a few, and ``spread`` [B, N] the distance of each from it, 0 where none counts.
    """

    counted: Tensor
    mean: Tensor
    variance: Tensor
    centre: Tensor
    spread: Tensor


def pixels(x: Tensor, index: Tensor) -> Tensor:
    """Pixels index [B, m] or [1, m] of x [B, D, N] or [B, D, H, W], as [B, m, D]."""
    b = torch.arange(len(x), device=x.device)[:, None]
    at = (index,) if x.dim() == 3 else (index // x.shape[3], index % x.shape[3])
    return x[(b, slice(None), *at)]


def finite_pixels(x: Tensor, index: Tensor) -> Tensor:
    """`pixels` with 0 for values that are not finite."""
    rows = pixels(x, index)
    return torch.where(rows.isfinite(), rows, 0)


def moments(x: Tensor, weight: Tensor | None, metric: str, precision: str) -> Moments:
    """Moments from one read of x: a step whose only centroid is the median of a few pixels, to keep all digits."""
    ones = None if weight is None else (weight > 0).to(torch.float32)
    solver = Solver(x, 1, ones, metric, precision, True)
    few = spaced_of_all(solver.N, x.device)[None] if ones is None else spaced_pixels(ones)
    rows = pixels(x, few).to(torch.float32)
    rows = F.normalize(rows, dim=2, eps=1e-12) if metric == "cosine" else rows
    first = middle(rows, None if ones is None else ones.gather(1, few))[:, None]
    solver.prepare(first)
    distances = torch.empty(solver.labels.shape, dtype=torch.float32, device=x.device)
    totals = solver.step(distances, torch.zeros(len(x), dtype=torch.int32, device=x.device))
    n = totals.counts.clamp_min(1)
    mean = totals.sums[:, 0] / n
    mean = mean + first[:, 0] if solver.shifted else mean
    if metric == "cosine":
        variance = totals.counts[:, 0] / n[:, 0] - mean.square().sum(1)
    else:
        variance = distances.clamp_min(0).sum(1) / n[:, 0] - (mean - first[:, 0]).square().sum(1)
    return Moments(solver.labels >= 0, mean, variance.clamp_min(0) / x.shape[1], first[:, 0], distances.clamp_min(0))


def initial_centroids(x: Tensor, w: Tensor, stats: Moments, seed: Tensor, run: int, options: KMeansOptions) -> Tensor:
    """Centroids [B, K, D] in float32, with the random numbers of `fgfast.pixels.init`; w is the weight [B, N]."""
    n_clusters, init, metric = options.n_clusters, options.init, options.metric
    if init == "random":
        return finite_pixels(x, random_pixels(w, n_clusters, seed, run)).to(torch.float32)
    samples = min(options.init_samples, w.shape[1])
    if samples > SAMPLES:
        source = Dense(x.flatten(2))
        source.prepare(metric, w)
        return source.as_given(start(source, n_clusters, init, samples, seed, run))
    numbers = trial_numbers(seed, run, n_clusters)
    group_size = max(1, GRAM // samples**2)
    centroids = []
    for b in range(0, len(x), group_size):
        part = slice(b, b + group_size)
        chosen = sample_pixels(w[part], stats.spread[part], samples, seed, run)
        rows = finite_pixels(x[part], chosen.pixels)
        points = F.normalize(rows.float(), dim=2, eps=1e-12) if metric == "cosine" else rows - stats.mean[part, None]
        points = points.to(torch.float32 if interpreted() else x.dtype)
        positions = choose_samples(inner_products(points), chosen.weight.float(), numbers, n_clusters, metric)
        centroids.append(rows.gather(1, positions[..., None].expand(-1, -1, x.shape[1])))
    return torch.cat(centroids).to(torch.float32)


def lloyd(solver: Solver, centroids: Tensor, distances: Tensor, n_iter: int, limit: Tensor, empty: str) -> LloydResult:
    """Iterate as `fgfast.ops.kmeans.lloyd` does; fills ``distances`` [B, N], -1 for pixels that do not count.

    An iteration is one launch if a program has an entire problem, else two to four.
    """
    x, batch = solver.x, solver.batch
    shift = solver.mu[:, : solver.D] if solver.shifted else None
    c = to_relative(centroids, shift, None).contiguous()
    solver.prepare(c, given=True)
    solver.labels.fill_(-2)  # no label: the first step changes every one
    done, steps, never = (torch.zeros(batch, dtype=torch.int32, device=x.device) for _ in range(3))
    move = Move(c, torch.empty_like(solver.totals.counts), limit, done, steps, empty)
    for _ in range(n_iter):
        solver.step(distances, done, move=move)
    totals = solver.step(distances, never)
    return LloydResult(from_relative(c, shift, None), solver.labels, totals.counts, totals.inertia, steps)


def kmeans(x: Tensor, weight: Tensor | None, seed: Tensor, options: KMeansOptions) -> LloydResult:
    """The best of n_init runs of each problem of x [B, D, N] or [B, D, H, W], not empty; weight is [B, N]."""
    n_clusters, first, metric = options.n_clusters, options.first, options.metric
    with on_device_of(x):
        stats = moments(x, weight, metric, options.precision)
        w = stats.counted.to(torch.float32) if weight is None else torch.where(stats.counted, weight, 0)
        solver = Solver(x, n_clusters, weight, metric, options.precision, options.deterministic)
        if metric == "euclidean":
            solver.mu[:, : solver.D] = stats.centre if solver.shifted else stats.mean
        limit = options.tol * stats.variance
        distances = torch.empty(solver.batch, solver.N, dtype=torch.float32, device=x.device)

        def run(number: int) -> LloydResult:
            if first is None:
                c = initial_centroids(x, w, stats, seed, number, options)
            else:
                c = first.to(torch.float32, copy=True)
            if metric == "cosine":
                c = F.normalize(c, dim=2, eps=1e-12)
            return lloyd(solver, c, distances, options.n_iter, limit, options.empty)

        # The inertia of a result is NaN where a pixel is not finite; this is that of the finite pixels.
        return best_of(options.n_init, run, lambda _: (distances.clamp_min(0) * w).sum(1))
