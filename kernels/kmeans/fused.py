"""The kernel of a k-means step that reads x once; names and shapes are those of :mod:`fgfast.kernels.kmeans.tiles`."""

import triton
import triton.language as tl

from fgfast.kernels.kmeans.centroids import prepare_centroids, update_centroids
from fgfast.kernels.kmeans.tiles import (
    add_one_hot,
    has_converged,
    is_finite,
    load_pixels,
    nearest_centroid,
    pixel_distances,
    pixel_offsets,
    relative,
)


@triton.jit
def store_labels(labels_ptr, distances_ptr, n, inside, label, counted, distance, changed, LLOYD: tl.constexpr):
    """Store the labels of pixels n, with LLOYD their distances too; returns ``changed`` + 1 where a label changed."""
    if LLOYD:
        changed += (inside & (tl.load(labels_ptr + n, inside, other=-1) != label)).to(tl.int32)
        tl.store(distances_ptr + n, tl.where(counted, distance, -1.0), inside)
    tl.store(labels_ptr + n, label.to(tl.int64), inside)
    return changed


@triton.jit
def store_numbers(
    counts_ptr, inertia_ptr, changed_ptr, row, k, K, counts, inertia, changed,
    LLOYD: tl.constexpr, MOVE: tl.constexpr, ATOMIC: tl.constexpr,
):  # fmt: skip
    """Store counts [K], inertia and the number of changed labels in a row of the results, or add them (ATOMIC)."""
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


@triton.jit
def step(
    x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, distances_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    c_ptr, repaired_ptr, limit_ptr, steps_ptr,
    N, WIDTH, D, K, SPLITS, TILES,
    stride_b, stride_d, stride_y, stride_x, stride_cb, stride_ck, stride_cd,
    FLAT: tl.constexpr, EVEN: tl.constexpr, COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    LLOYD: tl.constexpr, PREPARE: tl.constexpr, MOVE: tl.constexpr, FARTHEST: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Labels, partial sums, counts and inertia; with LLOYD also distances and the number of changed labels.

    A program that has an entire problem computes m, bias and mu of the centroids c first (PREPARE), or updates the
    centroids afterwards (MOVE, which stores no inertia), BLOCK_C channels at a time. Barriers: threads read what other
    threads of the program wrote.
    """
    program = tl.program_id(0)
    b, split = (program // SPLITS).to(tl.int64), program % SPLITS
    if has_converged(done_ptr, b, LLOYD):
        return
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    sum_d = tl.arange(0, BLOCK_S)
    DP: tl.constexpr = CHUNKS * BLOCK_S
    if PREPARE:
        prepare_centroids(
            c_ptr + b * stride_cb, m_ptr + b * DP * BLOCK_K, bias_ptr + b * BLOCK_K, mu_ptr + b * DP, 0, K, D, DP,
            BLOCK_K, stride_ck, stride_cd, COSINE, SHIFT, False, True, False, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
    bias = tl.load(bias_ptr + b * BLOCK_K + k)
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums += (tl.zeros([BLOCK_S, BLOCK_K], tl.float32),)  # type: ignore[assignment]
    counts = tl.zeros([BLOCK_K], tl.float32)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(TILES):
        start = (split * TILES + tile) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = pixel_offsets(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_D
        )
        sum_base, sum_offsets = pixel_offsets(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_S
        )
        dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, DP, BLOCK_D):
            x = load_pixels(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
            m = tl.load(m_ptr + (b * DP + first + d[:, None]) * BLOCK_K + k[None, :])
            y = relative(x, mu_ptr + b * DP + first + d, COSINE)
            squares += tl.sum(y * y, 1)
            dots = tl.dot(y if SHIFT else x, m, dots, input_precision=PRECISION)
        best, index = nearest_centroid(dots, bias, k, K, COSINE)
        w = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weight_ptr + b * N + n, inside, other=0.0)
        distance, counted, scale, has_nonfinite = pixel_distances(best, squares, w, COSINE)
        label = tl.where(counted, index, -1)
        match = label[:, None] == k[None, :]
        # A store here frees registers for the loop below, but prevents merging its loads with those above.
        EARLY: tl.constexpr = DP > BLOCK_D and (PREPARE or MOVE or x_ptr.dtype.element_ty != tl.bfloat16)
        if EARLY:
            changed = store_labels(
                labels_ptr + b * N, distances_ptr + b * N, n, inside, label, counted, distance, changed, LLOYD
            )
        updated = ()
        UNIT: tl.constexpr = not (WEIGHTED or COSINE)
        for i in tl.static_range(CHUNKS):
            x = load_pixels(sum_base, sum_offsets, inside, i * BLOCK_S, sum_d, D, stride_d, EVEN, UPCAST)
            x = tl.where(is_finite(x.to(tl.float32)), x, 0.0)
            if SHIFT and LLOYD:
                x = relative(x, mu_ptr + b * DP + i * BLOCK_S + sum_d, False)
            total = add_one_hot(sums[i], tl.trans(x), match, scale, UNIT, PRECISION, UPCAST)
            updated += (total,)  # type: ignore[assignment]
        sums = updated
        counts += tl.sum(tl.where(match, w[:, None], 0.0), 0)
        if not MOVE:
            inertia += tl.where(has_nonfinite, float("nan"), tl.where(counted, w * distance, 0.0))
        if not EARLY:
            changed = store_labels(
                labels_ptr + b * N, distances_ptr + b * N, n, inside, label, counted, distance, changed, LLOYD
            )
    row = b if ATOMIC else program.to(tl.int64)
    store_numbers(counts_ptr, inertia_ptr, changed_ptr, row, k, K, counts, inertia, changed, LLOYD, MOVE, ATOMIC)
    for i in tl.static_range(CHUNKS):
        target = sums_ptr + row * K * D + i * BLOCK_S + (k[None, :] * D + sum_d[:, None])
        mask = (k < K)[None, :] if EVEN else (k < K)[None, :] & (i * BLOCK_S + sum_d < D)[:, None]
        if ATOMIC:
            tl.atomic_add(target, sums[i], mask, sem="relaxed")
        else:
            tl.store(target, sums[i], mask)
    if MOVE:
        tl.debug_barrier()
        update_centroids(
            b, x_ptr, weight_ptr, labels_ptr, distances_ptr, sums_ptr, counts_ptr, repaired_ptr, tl.sum(changed, 0),
            c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
            N, WIDTH, D, K, DP, BLOCK_K, stride_b, stride_d, stride_y, stride_x,
            COSINE, SHIFT, WEIGHTED, FARTHEST, False, 1024, BLOCK_K, BLOCK_C,
        )  # fmt: skip
