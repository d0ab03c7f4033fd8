"""k-means by Triton kernels: start, Lloyd's iteration and the repair of empty clusters, without a look from the host.

A step is that of :mod:`fgfast.kernels.kmeans.step`, around the mean of the pixels. What follows it is done by one
program a problem: it repairs empty clusters, moves the centroids and writes down whether the problem has converged;
programs of a problem that has converged return at once. It is the program of the step itself, in the same launch, where
that has the whole problem, so that an iteration is one launch. k-means++ works on the inner products of the samples
(`_plus_plus`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels.common import AotCase, interpreted
from fgfast.kernels.kmeans.step import Move, Solver, case, power
from fgfast.pixels.init import start
from fgfast.pixels.source import Dense
from fgfast.reference.draws import uniform

GRAM = 1 << 28  # elements of inner products that are kept at a time: 1 GiB
SAMPLES = 4096  # the most that one program draws from: beyond, torch draws


# ---------------------------------------------------------------- k-means++


@triton.jit
def _drawn(mass, u):
    """The position drawn in proportion to mass [BLOCK] by a uniform number u."""
    c = tl.cumsum(mass.to(tl.float64), 0)
    return tl.sum((c <= u * tl.max(c, 0)).to(tl.int32), 0)


@triton.jit
def _plus_plus(gram_ptr, weight_ptr, uniform_ptr, chosen_ptr, M, K, TRIALS, COSINE: tl.constexpr, BLOCK: tl.constexpr):
    """Greedy k-means++ on the inner products [B, M, M] of M samples; a program solves one problem."""
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
        kept = closest
        for trial in range(TRIALS):
            if (k > 0) | (trial == 0):
                at = tl.minimum(_drawn(mass, tl.load(uniform_ptr + k * TRIALS + trial)), M - 1)
                inner = tl.load(gram_ptr + tl.cast(at, tl.int64) * M + i, i < M, other=0.0)
                if COSINE:
                    near = 1 - inner
                else:
                    near = squares + tl.load(gram_ptr + tl.cast(at, tl.int64) * (M + 1)) - 2 * inner
                closer = tl.minimum(closest, tl.where(w > 0, tl.maximum(near, 0.0), 0.0))
                total = tl.sum(closer * w, 0)
                better = (total < cost) | (trial == 0)
                cost = tl.where(better, total, cost)
                winner = tl.where(better, at, winner)
                kept = tl.where(better, closer, kept)
        closest = kept
        tl.store(chosen_ptr + b * K + k, tl.cast(winner, tl.int64))


def inner_products(rows: Tensor) -> Tensor:
    """Inner products [B, M, M] in float32 of rows [B, M, D]."""
    turned = rows.transpose(1, 2)
    half = rows.dtype != torch.float32
    return torch.bmm(rows, turned, out_dtype=torch.float32) if half else torch.bmm(rows, turned)


def drawn(gram: Tensor, weight: Tensor, numbers: Tensor, n_clusters: int, metric: str) -> Tensor:
    """Positions [B, K] among M samples that greedy k-means++ chooses with uniform numbers [K, trials].

    Distances come from the inner products of the samples, [B, M, M] in float32: the reads of K rounds at one product.
    """
    batch, samples, _ = gram.shape
    chosen = torch.empty(batch, n_clusters, dtype=torch.int64, device=gram.device)
    _plus_plus[(batch,)](
        gram, weight, numbers, chosen, samples, n_clusters, numbers.shape[1], COSINE=metric == "cosine",
        BLOCK=power(samples), num_warps=8,
    )  # fmt: skip
    return chosen


# ---------------------------------------------------------------- the host side


class Outcome(NamedTuple):
    """Centroids [B, K, D], labels [B, N], counts [B, K], inertia [B] and n_iter int32 [B]."""

    centroids: Tensor
    labels: Tensor
    counts: Tensor
    inertia: Tensor
    n_iter: Tensor


class Moments(NamedTuple):
    """Of the pixels that count: which they are [B, N], their mean [B, D] and mean variance [B]."""

    kept: Tensor
    mean: Tensor
    variance: Tensor


def pixels(x: Tensor, index: Tensor) -> Tensor:
    """Pixels index [B, m] of x [B, D, N] or [B, D, H, W], as [B, m, D]; zeros in place of what is not finite."""
    b = torch.arange(len(x), device=x.device)[:, None]
    at = (index,) if x.dim() == 3 else (index // x.shape[3], index % x.shape[3])
    rows = x[(b, slice(None), *at)]
    return torch.where(rows.isfinite(), rows, 0)


def moments(x: Tensor, weight: Tensor | None, metric: str, precision: str) -> Moments:
    """One read of x, as a step whose one centroid is the first pixel: a point near the mean spares digits."""
    counted = None if weight is None else (weight > 0).to(torch.float32)
    solver = Solver(x, 1, counted, metric, precision, True)
    first = pixels(x, torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)).to(torch.float32)
    solver.prepare(first)
    near = torch.empty(solver.labels.shape, dtype=torch.float32, device=x.device)
    totals = solver.step(near, torch.zeros(len(x), dtype=torch.int32, device=x.device))
    n = totals.counts.clamp_min(1)
    mean = totals.sums[:, 0] / n
    if metric == "cosine":
        variance = totals.counts[:, 0] / n[:, 0] - mean.square().sum(1)
    else:
        variance = near.clamp_min(0).sum(1) / n[:, 0] - (mean - first[:, 0]).square().sum(1)
    return Moments(solver.labels >= 0, mean, variance.clamp_min(0) / x.shape[1])


def sample(w: Tensor, keys: Tensor, n: int) -> Tensor:
    """The n pixels of weight > 0 with the largest keys, ascending [B, n]."""
    return torch.where(w > 0, keys, -math.inf).topk(n, dim=1).indices.sort(1).values


def starts(
    x: Tensor, w: Tensor, mean: Tensor, n_clusters: int, init: str, samples: int, metric: str, seed: Tensor, run: int
) -> Tensor:
    """Centroids [B, K, D] in float32, with the draws of `fgfast.pixels.init`."""
    keys = uniform(seed, 3 * run + 1, w.shape[1])
    if init == "random":
        keys = torch.log(keys + 2**-33) / w.double().clamp_min(1e-30)
        return pixels(x, sample(w, keys, n_clusters)).to(torch.float32)
    samples = min(samples, w.shape[1])
    if samples > SAMPLES:
        source = Dense(x.flatten(2))
        source.prepare(metric, w, mean)
        return start(source, n_clusters, init, samples, seed, run)
    trials = 2 + int(math.log(n_clusters))
    u = uniform(seed, 3 * run + 2, n_clusters * trials).view(n_clusters, trials)
    at_once = max(1, GRAM // samples**2)
    found = []
    for b in range(0, len(x), at_once):
        part = slice(b, b + at_once)
        if samples < w.shape[1]:
            chosen = sample(w[part], keys, samples)
        else:
            chosen = torch.arange(samples, device=x.device).expand(len(w[part]), -1)
        rows = pixels(x[part], chosen)
        points = F.normalize(rows.float(), dim=2, eps=1e-12) if metric == "cosine" else rows - mean[part, None]
        points = points.to(torch.float32 if interpreted() else x.dtype)
        weights = w[part].gather(1, chosen).to(torch.float32)
        picked = drawn(inner_products(points), weights, u, n_clusters, metric)
        found.append(rows.gather(1, picked[..., None].expand(-1, -1, x.shape[1])))
    return torch.cat(found).to(torch.float32)


def lloyd(solver: Solver, centroids: Tensor, n_iter: int, limit: Tensor, empty: str) -> tuple[Outcome, Tensor]:
    """The outcome, and distances [B, N] that are -1 where no pixel counts.

    Iterates as `fgfast.ops.kmeans.lloyd` does: one launch an iteration where a program has a whole problem, else two
    to four.
    """
    x, batch = solver.x, solver.batch
    c = centroids.contiguous()
    solver.prepare(c, given=True)
    solver.labels.fill_(-2)  # no pixel's: the first step changes every label
    done, steps, never = (torch.zeros(batch, dtype=torch.int32, device=x.device) for _ in range(3))
    near = torch.empty(batch, solver.N, dtype=torch.float32, device=x.device)
    move = Move(c, torch.empty_like(solver.totals.counts), limit, done, steps, empty)
    for _ in range(n_iter):
        solver.step(near, done, move=move)
    totals = solver.step(near, never)
    return Outcome(c, solver.labels, totals.counts, totals.inertia, steps), near


def kmeans(
    x: Tensor,
    n_clusters: int,
    n_iter: int,
    init: str,
    first: Tensor | None,
    init_samples: int,
    n_init: int,
    tol: float,
    weight: Tensor | None,
    metric: str,
    empty: str,
    seed: Tensor,
    precision: str,
    deterministic: bool,
) -> Outcome:
    """The best of n_init runs of each problem of x [B, D, N] or [B, D, H, W], which is not empty."""
    found = moments(x, weight, metric, precision)
    w = found.kept.to(torch.float32) if weight is None else torch.where(found.kept, weight, 0)
    solver = Solver(x, n_clusters, weight, metric, precision, deterministic)
    if metric == "euclidean":
        solver.mu[:, : solver.D] = found.mean
    limit = tol * found.variance
    best: Outcome | None = None
    least = torch.full((len(x),), math.inf, device=x.device)
    for run in range(n_init):
        if first is None:
            c = starts(x, w, found.mean, n_clusters, init, init_samples, metric, seed, run)
        else:
            c = first.to(torch.float32, copy=True)
        if metric == "cosine":
            c = F.normalize(c, dim=2, eps=1e-12)
        new, near = lloyd(solver, c, n_iter, limit, empty)
        if n_init == 1:
            return new
        inertia = (near.clamp_min(0) * w).sum(1)  # new.inertia is NaN where a pixel is not finite
        better = inertia < least
        least = torch.where(better, inertia, least)
        pairs = zip(new, new if best is None else best, strict=True)
        best = Outcome(*(torch.where(better.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in pairs))
    assert best is not None
    return best


# ---------------------------------------------------------------- ahead of time


def aot_cases() -> Iterator[AotCase]:
    """k-means++, for every dtype: what it reads are float32 products."""
    launch = {"num_warps": 8, "num_stages": 3}
    yield case("kmeans plus_plus", _plus_plus, "fp32", launch, BLOCK=SAMPLES, COSINE=False)
