"""Centroids of k-means as they run on the device: what a step reads of them, and how they move after it.

A program of the step that has a whole problem (:mod:`fgfast.kernels.kmeans.fused`) does both itself, before and after
it reads the pixels. Where several programs work on one problem, or its sums do not fit their registers,
`prepare_centroids_kernel` and `update_centroids_kernel` are launched. Names and shapes are those of
:mod:`fgfast.kernels.kmeans.tiles`.
"""

import triton
import triton.language as tl

from fgfast.kernels.kmeans.tiles import EPS, centred, centroids_tile, farthest


@triton.jit
def prepare_centroids(
    c_ptr, m_ptr, bias_ptr, mu_ptr, low, K, D, DP, KP, stride_k, stride_d,
    COSINE: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, bias and, unless GIVEN, mu of the BLOCK_K centroids from low on; WHOLE: these are all of the problem."""
    k = low + tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_D)
    length = tl.full([BLOCK_K], 1.0, tl.float32)
    if COSINE:
        square = tl.zeros([BLOCK_K], tl.float32)
        for first in range(0, DP, BLOCK_D):
            c = centroids_tile(c_ptr, k, first + e, K, D, stride_k, stride_d)
            square += tl.sum(c * c, 0)
        length = tl.maximum(tl.sqrt(square), EPS)
    bias = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, DP, BLOCK_D):
        d = first + e
        c = centroids_tile(c_ptr, k, d, K, D, stride_k, stride_d) / length[None, :]
        mu = tl.zeros([BLOCK_D], tl.float32)
        if GIVEN:
            mu = tl.load(mu_ptr + d)
        elif not COSINE:
            if WHOLE:
                mu = tl.sum(c, 1)
            else:
                for other in range(0, KP, BLOCK_K):
                    mu += tl.sum(centroids_tile(c_ptr, other + tl.arange(0, BLOCK_K), d, K, D, stride_k, stride_d), 1)
            mu /= K
        bias += centred(m_ptr, c, mu, k, d, K, D, KP)
        if not GIVEN and low == 0:
            tl.store(mu_ptr + d, mu)
    tl.store(bias_ptr + k, bias)


@triton.jit
def prepare_centroids_kernel(
    c_ptr, m_ptr, bias_ptr, mu_ptr, K, D, DP, KP, stride_b, stride_k, stride_d,
    COSINE: tl.constexpr, GIVEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, bias and, unless GIVEN, mu of the centroids c; a program takes BLOCK_K of them."""
    within = KP // BLOCK_K
    program = tl.program_id(0).to(tl.int64)
    b, low = program // within, program % within * BLOCK_K
    prepare_centroids(
        c_ptr + b * stride_b, m_ptr + b * DP * KP, bias_ptr + b * KP, mu_ptr + b * DP, low, K, D, DP, KP,
        stride_k, stride_d, COSINE, GIVEN, False, BLOCK_K, BLOCK_D,
    )  # fmt: skip


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
def update_centroids(
    b, x_ptr, weight_ptr, labels_ptr, near_ptr, sums_ptr, counts_ptr, mass_ptr, changed,
    c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
    N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, WEIGHTED: tl.constexpr, FARTHEST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centroids c [B, K, D] of problem b from the sums, empty clusters repaired; m, bias, and whether it is done.

    BLOCK pixels or channels at a time for the repair, BLOCK_K x BLOCK_D centroids for the rest.
    """
    c_ptr += b * K * D
    sums_ptr += b * K * D
    counts_ptr += b * K
    mass_ptr += b * K
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
                x_ptr + b * stride_b, weight_ptr + b * N, labels_ptr + b * N, near_ptr + b * N, sums_ptr, counts_ptr,
                mass_ptr, N, WIDTH, D, K, stride_d, stride_y, stride_x, COSINE, WEIGHTED, BLOCK,
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
            for first in range(0, D, BLOCK_D):
                total = centroids_tile(sums_ptr, k, first + e, K, D, D, 1)
                square += tl.sum(total * total, 0)
            divisor = tl.maximum(tl.sqrt(square), EPS)
        bias = tl.zeros([BLOCK_K], tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + e
            before = centroids_tile(c_ptr, k, d, K, D, D, 1)
            means = centroids_tile(sums_ptr, k, d, K, D, D, 1) / divisor[None, :]
            c = tl.where(full[None, :], means, before)
            shift += tl.sum((c - before) * (c - before), 0)
            tl.store(c_ptr + k[None, :] * D + d[:, None], c, (k < K)[None, :] & (d < D)[:, None])
            bias += centred(m_ptr + b * DP * KP, c, tl.load(mu_ptr + b * DP + d), k, d, K, D, KP)
        tl.store(bias_ptr + b * KP + k, bias)
    same = (tl.sum(shift, 0) <= tl.load(limit_ptr + b)) | (changed == 0)
    tl.store(done_ptr + b, same.to(tl.int32))
    tl.store(steps_ptr + b, tl.load(steps_ptr + b) + 1)


@triton.jit
def update_centroids_kernel(
    x_ptr, weight_ptr, labels_ptr, near_ptr, sums_ptr, counts_ptr, mass_ptr, changed_ptr,
    c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
    N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, WEIGHTED: tl.constexpr, FARTHEST: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`update_centroids`, a problem a program; one that has converged is left alone."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + b) != 0:
        return
    update_centroids(
        b, x_ptr, weight_ptr, labels_ptr, near_ptr, sums_ptr, counts_ptr, mass_ptr, tl.load(changed_ptr + b),
        c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
        N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
        COSINE, WEIGHTED, FARTHEST, BLOCK, BLOCK_K, BLOCK_D,
    )  # fmt: skip
