"""A step of k-means that reads x once, on the device: names and shapes as in :mod:`fgfast.kernels.kmeans.tiles`."""

import triton
import triton.language as tl

from fgfast.kernels.kmeans.centroids import prepare_centroids, update_centroids
from fgfast.kernels.kmeans.tiles import added, finished, finite, least, nearest, pixels_tile, places, squared


@triton.jit
def store_labels(labels_ptr, near_ptr, n, inside, label, kept, near, changed, LLOYD: tl.constexpr):
    """Store the labels of pixels n, with LLOYD their distances too; changed, with 1 more where a label is new."""
    if LLOYD:
        changed += (inside & (tl.load(labels_ptr + n, inside, other=-1) != label)).to(tl.int32)
        tl.store(near_ptr + n, tl.where(kept, near, -1.0), inside)
    tl.store(labels_ptr + n, label.to(tl.int64), inside)
    return changed


@triton.jit
def step(
    x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, near_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    c_ptr, mass_ptr, limit_ptr, steps_ptr,
    N, WIDTH, D, K, SPLITS, TURNS,
    stride_b, stride_d, stride_y, stride_x, stride_cb, stride_ck, stride_cd,
    FLAT: tl.constexpr, EVEN: tl.constexpr, COSINE: tl.constexpr, WEIGHTED: tl.constexpr, LLOYD: tl.constexpr,
    PREPARE: tl.constexpr, MOVE: tl.constexpr, FARTHEST: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Labels, partial sums, counts and inertia; with LLOYD also distances, and how many labels changed.

    A program that has a whole problem makes m, bias and mu of the centroids c before (PREPARE), or moves the centroids
    after (MOVE; then nobody asks for the inertia), BLOCK_C channels at a time. Barriers: its threads read what others
    of them wrote.
    """
    program = tl.program_id(0)
    b, split = (program // SPLITS).to(tl.int64), program % SPLITS
    if finished(done_ptr, b, LLOYD):
        return
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_S)
    DP: tl.constexpr = CHUNKS * BLOCK_S
    if PREPARE:
        prepare_centroids(
            c_ptr + b * stride_cb, m_ptr + b * DP * BLOCK_K, bias_ptr + b * BLOCK_K, mu_ptr + b * DP, 0, K, D, DP,
            BLOCK_K, stride_ck, stride_cd, COSINE, False, True, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
    bias = tl.load(bias_ptr + b * BLOCK_K + k)
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums += (tl.zeros([BLOCK_S, BLOCK_K], tl.float32),)  # type: ignore[assignment]
    counts = tl.zeros([BLOCK_K], tl.float32)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(TURNS):
        start = (split * TURNS + tile) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = places(x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_D)
        wide_base, across = places(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_S
        )
        dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, DP, BLOCK_D):
            x = pixels_tile(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
            m = tl.load(m_ptr + (b * DP + first + d[:, None]) * BLOCK_K + k[None, :])
            squares += squared(x, mu_ptr + b * DP + first + d, COSINE)
            dots = tl.dot(x, m, dots, input_precision=PRECISION)
        best, index = least(dots, bias, k, K, COSINE)
        w = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weight_ptr + b * N + n, inside, other=0.0)
        near, kept, scale, has_nonfinite = nearest(best, squares, w, COSINE)
        label = tl.where(kept, index, -1)
        match = label[:, None] == k[None, :]
        # What is stored here needs no registers below; but a store parts two reads of one tile, which else are one.
        EARLY: tl.constexpr = DP > BLOCK_D and (PREPARE or MOVE or x_ptr.dtype.element_ty != tl.bfloat16)
        if EARLY:
            changed = store_labels(labels_ptr + b * N, near_ptr + b * N, n, inside, label, kept, near, changed, LLOYD)
        updated = ()
        UNIT: tl.constexpr = not (WEIGHTED or COSINE)
        for i in tl.static_range(CHUNKS):
            x = pixels_tile(wide_base, across, inside, i * BLOCK_S, e, D, stride_d, EVEN, UPCAST)
            x = tl.where(finite(x.to(tl.float32)), x, 0.0)
            updated += (added(sums[i], tl.trans(x), match, scale, UNIT, PRECISION, UPCAST),)  # type: ignore[assignment]
        sums = updated
        counts += tl.sum(tl.where(match, w[:, None], 0.0), 0)
        if not MOVE:
            inertia += tl.where(has_nonfinite, float("nan"), tl.where(kept, w * near, 0.0))
        if not EARLY:
            changed = store_labels(labels_ptr + b * N, near_ptr + b * N, n, inside, label, kept, near, changed, LLOYD)
    row = b if ATOMIC else program.to(tl.int64)
    if ATOMIC:
        tl.atomic_add(counts_ptr + row * K + k, counts, k < K, sem="relaxed")
        tl.atomic_add(inertia_ptr + row, tl.sum(inertia, 0), sem="relaxed")
        if LLOYD:
            tl.atomic_add(changed_ptr + row, tl.sum(changed, 0), sem="relaxed")
    else:
        tl.store(counts_ptr + row * K + k, counts, k < K)
        if not MOVE:
            tl.store(inertia_ptr + row, tl.sum(inertia, 0))
            if LLOYD:
                tl.store(changed_ptr + row, tl.sum(changed, 0))
    for i in tl.static_range(CHUNKS):
        target = sums_ptr + row * K * D + i * BLOCK_S + (k[None, :] * D + e[:, None])
        mask = (k < K)[None, :] if EVEN else (k < K)[None, :] & (i * BLOCK_S + e < D)[:, None]
        if ATOMIC:
            tl.atomic_add(target, sums[i], mask, sem="relaxed")
        else:
            tl.store(target, sums[i], mask)
    if MOVE:
        tl.debug_barrier()
        update_centroids(
            b, x_ptr, weight_ptr, labels_ptr, near_ptr, sums_ptr, counts_ptr, mass_ptr, tl.sum(changed, 0),
            c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
            N, WIDTH, D, K, DP, BLOCK_K, stride_b, stride_d, stride_y, stride_x,
            COSINE, WEIGHTED, FARTHEST, 1024, BLOCK_K, BLOCK_C,
        )  # fmt: skip
