"""k-means by Triton kernels: start, Lloyd's iteration and the repair of empty clusters, without a look from the host.

A step is that of :mod:`fgfast.kernels.kmeans_step`, around the mean of the pixels. `_update` follows it: a program
takes one problem, repairs its empty clusters, moves its centroids and writes down whether it has converged; programs of
a problem that has converged return at once. k-means++ works on the inner products of the samples (`_plus_plus`).
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels._common import MOST_REGISTERS, AotCase, interpreted, launch_options
from fgfast.kernels._kmeans_device import EPS, centred, centroids_tile, farthest
from fgfast.kernels.kmeans_step import Solver, case, power
from fgfast.ops._kmeans_source import Dense
from fgfast.ops._kmeans_start import start
from fgfast.reference.draws import uniform

GRAM = 1 << 28  # elements of inner products that are kept at a time: 1 GiB
SAMPLES = 4096  # the most that one program draws from: beyond, torch draws


@triton.jit
def _repair(
    x_ptr, weight_ptr, labels_ptr, near_ptr, sums_ptr, counts_ptr, mass_ptr,
    N, WIDTH, D, K, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Give the i-th empty cluster the i-th farthest pixel, which leaves the sum of its donor.

    mass is a copy of counts that this changes. Barriers: a later turn reads what an earlier one wrote.
    """
    far = float("inf")
    taken = N  # ties go to the lowest pixel, so the next one at this distance lies above
    searching = True
    for k in range(K):
        if (tl.load(counts_ptr + k) == 0) & searching:
            best, pixel = farthest(near_ptr, N, far, taken, BLOCK)
            searching = (best >= 0) & ((far < float("inf")) | (best > 0))
            if searching:
                far = best
                taken = pixel
                w = tl.load(weight_ptr + pixel) if WEIGHTED else 1.0
                donor = tl.load(labels_ptr + pixel)
                place = x_ptr + (pixel // WIDTH).to(tl.int64) * stride_y + (pixel % WIDTH).to(tl.int64) * stride_x
                square = tl.zeros([BLOCK], tl.float32)
                if COSINE:
                    for first in range(0, D, BLOCK):
                        d = first + tl.arange(0, BLOCK)
                        x = tl.load(place + d.to(tl.int64) * stride_d, d < D, other=0.0).to(tl.float32)
                        square += x * x
                factor = w / tl.maximum(tl.sqrt(tl.sum(square, 0)), EPS) if COSINE else w
                for first in range(0, D, BLOCK):
                    d = first + tl.arange(0, BLOCK)
                    x = tl.load(place + d.to(tl.int64) * stride_d, d < D, other=0.0).to(tl.float32) * factor
                    tl.store(sums_ptr + k * D + d, x, d < D)
                    theirs = sums_ptr + donor * D + d
                    tl.store(theirs, tl.load(theirs, d < D, other=0.0) - x, d < D)
                tl.store(mass_ptr + k, w)
                rest = tl.load(mass_ptr + donor) - w
                tl.debug_barrier()
                tl.store(mass_ptr + donor, rest)
                tl.debug_barrier()


@triton.jit
def _update(
    x_ptr, weight_ptr, labels_ptr, near_ptr, sums_ptr, counts_ptr, mass_ptr, changed_ptr,
    c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
    N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, WEIGHTED: tl.constexpr, FARTHEST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centroids c [B, K, D] from the sums, empty clusters repaired; then m, bias, and whether the problem is done."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + b) != 0:
        return
    c_ptr += b * K * D
    sums_ptr += b * K * D
    counts_ptr += b * K
    mass_ptr += b * K
    weight_ptr += b * N
    e = tl.arange(0, BLOCK_D)
    if FARTHEST:
        empty = tl.zeros([BLOCK_K], tl.int32)
        for low in range(0, K, BLOCK_K):
            k = low + tl.arange(0, BLOCK_K)
            count = tl.load(counts_ptr + k, k < K, other=1.0)
            tl.store(mass_ptr + k, count, k < K)
            empty += (count == 0).to(tl.int32)
        tl.debug_barrier()
        if tl.sum(empty, 0) > 0:
            _repair(
                x_ptr + b * stride_b, weight_ptr, labels_ptr + b * N, near_ptr + b * N, sums_ptr, counts_ptr, mass_ptr,
                N, WIDTH, D, K, stride_d, stride_y, stride_x, COSINE, WEIGHTED, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()
        counts_ptr = mass_ptr
    shift = tl.zeros([BLOCK_K], tl.float32)
    for low in range(0, KP, BLOCK_K):
        k = low + tl.arange(0, BLOCK_K)
        count = tl.load(counts_ptr + k, k < K, other=0.0)
        full = count > 0
        divisor = tl.where(full, count, 1.0)
        if COSINE:
            square = tl.zeros([BLOCK_K], tl.float32)
            for first in range(0, DP, BLOCK_D):
                total = centroids_tile(sums_ptr, k, first + e, K, D, D, 1)
                square += tl.sum(total * total, 0)
            divisor = tl.maximum(tl.sqrt(square), EPS)
        bias = tl.zeros([BLOCK_K], tl.float32)
        for first in range(0, DP, BLOCK_D):
            d = first + e
            before = centroids_tile(c_ptr, k, d, K, D, D, 1)
            means = centroids_tile(sums_ptr, k, d, K, D, D, 1) / divisor[None, :]
            c = tl.where(full[None, :], means, before)
            shift += tl.sum((c - before) * (c - before), 0)
            tl.store(c_ptr + k[None, :] * D + d[:, None], c, (k < K)[None, :] & (d < D)[:, None])
            bias += centred(m_ptr + b * DP * KP, c, tl.load(mu_ptr + b * DP + d), k, d, K, D, KP)
        tl.store(bias_ptr + b * KP + k, bias)
    same = (tl.sum(shift, 0) <= tl.load(limit_ptr + b)) | (tl.load(changed_ptr + b) == 0)
    tl.store(done_ptr + b, same.to(tl.int32))
    tl.store(steps_ptr + b, tl.load(steps_ptr + b) + 1)


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
    """Centroids [B, K, D] in float32, with the draws of `fgfast.ops._kmeans_start`."""
    keys = uniform(seed, 3 * run + 1, w.shape[1])
    if init == "random":
        keys = torch.log(keys + 2**-33) / w.double().clamp_min(1e-30)
        return pixels(x, sample(w, keys, n_clusters)).to(torch.float32)
    samples = min(samples, w.shape[1])
    if samples > SAMPLES:
        source = Dense(x.flatten(2))
        source.around(metric, w, mean)
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

    Iterates as `fgfast.ops._kmeans_lloyd` does: two launches an iteration, three where sums come in parts.
    """
    x, batch = solver.x, solver.batch
    c = centroids.contiguous()
    solver.prepare(c, given=True)
    solver.labels.fill_(-2)  # no pixel's: the first step changes every label
    done, steps, never = (torch.zeros(batch, dtype=torch.int32, device=x.device) for _ in range(3))
    near = torch.empty(batch, solver.N, dtype=torch.float32, device=x.device)
    mass = torch.empty_like(solver.totals.counts)
    weight = near if solver.weight is None else solver.weight
    for _ in range(n_iter):
        totals = solver.step(near, done)
        _update[(batch,)](
            x, weight, solver.labels, near, totals.sums, totals.counts, mass, totals.changed,
            c, solver.m, solver.bias, solver.mu, limit, done, steps,
            solver.N, solver.width, solver.D, solver.K, solver.DP, solver.KP, *solver.strides,
            COSINE=solver.cosine, WEIGHTED=solver.weight is not None, FARTHEST=empty == "farthest",
            BLOCK=1024, BLOCK_K=16, BLOCK_D=min(32, solver.DP), **launch_options(4, 3, MOST_REGISTERS),
        )  # fmt: skip
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
    """Every kernel, dtype and metric."""
    launch = {"num_warps": 4, "num_stages": 3}
    for dtype, cosine in product(("fp32", "fp16", "bf16"), (False, True)):
        name = f"kmeans update {dtype}{' cosine' * cosine}"
        options: dict[str, Any] = {"WEIGHTED": True, "FARTHEST": True, "BLOCK": 1024, "BLOCK_K": 16, "BLOCK_D": 32}
        its = case(name, _update, dtype, launch, rare=dtype == "fp16", COSINE=cosine, **options)
        yield its._replace(registers=MOST_REGISTERS)
    yield case("kmeans plus_plus", _plus_plus, "fp32", launch | {"num_warps": 8}, BLOCK=SAMPLES, COSINE=False)
