"""Device code for the centroids of k-means: prepared before a step reads the pixels, updated after it.

A program of the step that has an entire problem (:mod:`fgfast.kernels.kmeans.fused`) calls both functions itself. Where
several programs work on one problem, or its sums do not fit the registers, `prepare_centroids_kernel` and
`update_centroids_kernel` are launched. Names and shapes are those of :mod:`fgfast.kernels.kmeans.tiles`.
"""

import triton
import triton.language as tl

from fgfast.kernels.kmeans.tiles import EPS, find_farthest, load_centroids, store_centred


@triton.jit
def prepare_centroids(
    c_ptr, m_ptr, bias_ptr, mu_ptr, low, K, D, DP, KP, stride_k, stride_d,
    COSINE: tl.constexpr, SHIFT: tl.constexpr, GIVEN: tl.constexpr, WHOLE: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, bias and, unless GIVEN, mu of BLOCK_K centroids from index ``low`` on; WHOLE: the problem has no others.

    With SHIFT and GIVEN the centroids are relative to mu already.
    """
    k = low + tl.arange(0, BLOCK_K)
    lane = tl.arange(0, BLOCK_D)
    length = tl.full([BLOCK_K], 1.0, tl.float32)
    if COSINE:
        square = tl.zeros([BLOCK_K], tl.float32)
        for first in range(0, DP, BLOCK_D):
            c = load_centroids(c_ptr, k, first + lane, K, D, stride_k, stride_d)
            square += tl.sum(c * c, 0)
        length = tl.maximum(tl.sqrt(square), EPS)
    bias = tl.zeros([BLOCK_K], tl.float32)
    for first in range(0, DP, BLOCK_D):
        d = first + lane
        c = load_centroids(c_ptr, k, d, K, D, stride_k, stride_d) / length[None, :]
        mu = tl.zeros([BLOCK_D], tl.float32)
        if GIVEN:
            if not SHIFT:
                mu = tl.load(mu_ptr + d)
        elif not COSINE:
            if WHOLE:
                mu = tl.sum(c, 1)
            else:
                for other in range(0, KP, BLOCK_K):
                    mu += tl.sum(load_centroids(c_ptr, other + tl.arange(0, BLOCK_K), d, K, D, stride_k, stride_d), 1)
            mu /= K
        bias += store_centred(m_ptr, c, mu, k, d, K, D, KP, SHIFT, DP, TURNED)
        if not GIVEN and low == 0:
            tl.store(mu_ptr + d, mu)
    tl.store(bias_ptr + k, bias)


@triton.jit
def prepare_centroids_kernel(
    c_ptr, m_ptr, bias_ptr, mu_ptr, K, D, DP, KP, stride_b, stride_k, stride_d,
    COSINE: tl.constexpr, SHIFT: tl.constexpr, GIVEN: tl.constexpr, TURNED: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, bias and, unless GIVEN, mu of the centroids c; a program takes BLOCK_K of them."""
    within = KP // BLOCK_K
    program = tl.program_id(0).to(tl.int64)
    b, low = program // within, program % within * BLOCK_K
    prepare_centroids(
        c_ptr + b * stride_b, m_ptr + b * DP * KP, bias_ptr + b * KP, mu_ptr + b * DP, low, K, D, DP, KP,
        stride_k, stride_d, COSINE, SHIFT, GIVEN, False, TURNED, BLOCK_K, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _repair_empty(
    x_ptr, mu_ptr, weight_ptr, labels_ptr, distances_ptr, sums_ptr, counts_ptr, repaired_ptr,
    N, WIDTH, D, K, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Move the i-th farthest pixel from the cluster that has it, the donor, into the i-th empty cluster.

    ``repaired_ptr`` is a copy of the counts and is updated. Barriers: later iterations read what earlier ones wrote.
    """
    far = float("inf")
    taken = N  # ties go to the lowest pixel: the next one at this distance has a higher index
    searching = True
    for k in range(K):
        if (tl.load(counts_ptr + k) == 0) & searching:
            best, pixel = find_farthest(distances_ptr, N, far, taken, BLOCK)
            searching = (best >= 0) & ((far < float("inf")) | (best > 0))
            if searching:
                far = best
                taken = pixel
                w = tl.load(weight_ptr + pixel) if WEIGHTED else 1.0
                donor = tl.load(labels_ptr + pixel)
                pixel_ptr = x_ptr + (pixel // WIDTH).to(tl.int64) * stride_y + (pixel % WIDTH).to(tl.int64) * stride_x
                square = tl.zeros([BLOCK], tl.float32)
                if COSINE:
                    for first in range(0, D, BLOCK):
                        d = first + tl.arange(0, BLOCK)
                        x = tl.load(pixel_ptr + d.to(tl.int64) * stride_d, d < D, other=0.0).to(tl.float32)
                        square += x * x
                factor = w / tl.maximum(tl.sqrt(tl.sum(square, 0)), EPS) if COSINE else w
                for first in range(0, D, BLOCK):
                    d = first + tl.arange(0, BLOCK)
                    x = tl.load(pixel_ptr + d.to(tl.int64) * stride_d, d < D, other=0.0).to(tl.float32)
                    if SHIFT:
                        x -= tl.load(mu_ptr + d, d < D, other=0.0)
                    x *= factor
                    tl.store(sums_ptr + k * D + d, x, d < D)
                    donor_sums = sums_ptr + donor * D + d
                    tl.store(donor_sums, tl.load(donor_sums, d < D, other=0.0) - x, d < D)
                tl.store(repaired_ptr + k, w)
                left = tl.load(repaired_ptr + donor) - w
                tl.debug_barrier()
                tl.store(repaired_ptr + donor, left)
                tl.debug_barrier()


@triton.jit
def update_centroids(
    b, x_ptr, weight_ptr, labels_ptr, distances_ptr, sums_ptr, counts_ptr, repaired_ptr, changed,
    c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
    N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, FARTHEST: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Centroids c [B, K, D] of problem b from the sums, with empty clusters repaired; m, bias and convergence.

    The repair works on BLOCK pixels or channels at a time, the rest on BLOCK_K x BLOCK_D centroids. With SHIFT sums and
    centroids are relative to mu.
    """
    c_ptr += b * K * D
    sums_ptr += b * K * D
    counts_ptr += b * K
    repaired_ptr += b * K
    lane = tl.arange(0, BLOCK_D)
    if FARTHEST:
        empty = tl.zeros([BLOCK_K], tl.int32)
        for low in range(0, K, BLOCK_K):
            k = low + tl.arange(0, BLOCK_K)
            count = tl.load(counts_ptr + k, k < K, other=1.0)
            tl.store(repaired_ptr + k, count, k < K)
            empty += (count == 0).to(tl.int32)
        tl.debug_barrier()
        if tl.sum(empty, 0) > 0:
            _repair_empty(
                x_ptr + b * stride_b, mu_ptr + b * DP, weight_ptr + b * N, labels_ptr + b * N, distances_ptr + b * N,
                sums_ptr, counts_ptr, repaired_ptr, N, WIDTH, D, K, stride_d, stride_y, stride_x,
                COSINE, SHIFT, WEIGHTED, BLOCK,
            )  # fmt: skip
        tl.debug_barrier()
        counts_ptr = repaired_ptr
    shift = tl.zeros([BLOCK_K], tl.float32)
    for low in range(0, KP, BLOCK_K):
        k = low + tl.arange(0, BLOCK_K)
        count = tl.load(counts_ptr + k, k < K, other=0.0)
        full = count > 0
        divisor = tl.where(full, count, 1.0)
        if COSINE:
            square = tl.zeros([BLOCK_K], tl.float32)
            for first in range(0, D, BLOCK_D):
                total = load_centroids(sums_ptr, k, first + lane, K, D, D, 1)
                square += tl.sum(total * total, 0)
            divisor = tl.maximum(tl.sqrt(square), EPS)
        bias = tl.zeros([BLOCK_K], tl.float32)
        for first in range(0, D, BLOCK_D):
            d = first + lane
            before = load_centroids(c_ptr, k, d, K, D, D, 1)
            means = load_centroids(sums_ptr, k, d, K, D, D, 1) / divisor[None, :]
            c = tl.where(full[None, :], means, before)
            shift += tl.sum((c - before) * (c - before), 0)
            tl.store(c_ptr + k[None, :] * D + d[:, None], c, (k < K)[None, :] & (d < D)[:, None])
            mu = tl.zeros([BLOCK_D], tl.float32)
            if not SHIFT:
                mu = tl.load(mu_ptr + b * DP + d)
            bias += store_centred(m_ptr + b * DP * KP, c, mu, k, d, K, D, KP, SHIFT, DP, TURNED)
        tl.store(bias_ptr + b * KP + k, bias)
    converged = (tl.sum(shift, 0) <= tl.load(limit_ptr + b)) | (changed == 0)
    tl.store(done_ptr + b, converged.to(tl.int32))
    tl.store(steps_ptr + b, tl.load(steps_ptr + b) + 1)


@triton.jit
def update_centroids_kernel(
    x_ptr, weight_ptr, labels_ptr, distances_ptr, sums_ptr, counts_ptr, repaired_ptr, changed_ptr,
    c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
    N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
    COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, FARTHEST: tl.constexpr, TURNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`update_centroids` with one program per problem; returns at once for a problem that has converged."""
    b = tl.program_id(0).to(tl.int64)
    if tl.load(done_ptr + b) != 0:
        return
    update_centroids(
        b, x_ptr, weight_ptr, labels_ptr, distances_ptr, sums_ptr, counts_ptr, repaired_ptr, tl.load(changed_ptr + b),
        c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
        N, WIDTH, D, K, DP, KP, stride_b, stride_d, stride_y, stride_x,
        COSINE, SHIFT, WEIGHTED, FARTHEST, TURNED, BLOCK, BLOCK_K, BLOCK_D,
    )  # fmt: skip
