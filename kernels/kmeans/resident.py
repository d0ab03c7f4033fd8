"""The kernel of a k-means step that reads each tile of pixels once, from memory and from L2: for aligned pixel rows.

A tile [BLOCK_N, D] of half-precision pixels is copied to shared memory through a tensor descriptor, STAGES - 1 tiles
ahead, and serves both products from there; the operand m stays there for all tiles. Each of the program's 8 warps has
32 of every 256 channels in both products, so a warp reads its part of the tile and of m, and no warp reads it again;
the scores of the warps are then added. Names and shapes are those of :mod:`fgfast.kernels.kmeans.tiles`, but m is
[B, KP, DP].
"""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.kmeans.centroids import prepare_centroids, update_centroids
from fgfast.kernels.kmeans.fused import store_labels, store_numbers
from fgfast.kernels.kmeans.tiles import has_converged, is_finite, pixel_distances


@triton.jit
def load_tile(x_desc, b, start, UPCAST: tl.constexpr, CHUNKS: tl.constexpr):
    """The tile of pixels from ``start`` on: CHUNKS pieces [GROUPS, BLOCK_N, LANES], 0 outside."""
    GROUPS: tl.constexpr = x_desc.block_shape[1]
    SHAPE: tl.constexpr = x_desc.block_shape[1:]
    pieces = ()
    for i in tl.static_range(CHUNKS):
        x = tl.reshape(x_desc.load([b, i * GROUPS, start, 0]), SHAPE)
        pieces += (upcast(x, UPCAST),)  # type: ignore[assignment]
    return pieces


@triton.jit
def add_groups(x):
    """The sum [M, N] of x [8, M, N], of which each warp has one: one exchange through shared memory, no shuffles."""
    halves = tl.reshape(x, [2, 2, 2, x.shape[1], x.shape[2]])
    left, right = tl.split(tl.permute(halves, (3, 4, 0, 1, 2)))
    left, right = tl.split(left + right)
    left, right = tl.split(left + right)
    return left + right


@triton.jit
def add_tile(sums, pieces, label, k, CHUNKS: tl.constexpr, CLEAN: tl.constexpr):
    """Sums + one-hot labels x pixels; CLEAN: with 0 for values that are not finite."""
    hot = k[:, None] == label[None, :]
    updated = ()
    for i in tl.static_range(CHUNKS):
        x = pieces[i]
        if CLEAN:
            x = tl.where(is_finite(x.to(tl.float32)), x, 0.0)
        every = tl.broadcast_to(hot.to(x.dtype)[None, :, :], [x.shape[0], hot.shape[0], hot.shape[1]])
        updated += (tl.dot(every, x, sums[i]),)  # type: ignore[assignment]
    return updated


@triton.jit
def step_resident(
    x_desc, x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, distances_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    c_ptr, repaired_ptr, limit_ptr, steps_ptr,
    N, D, K, SPLITS, TILES, stride_b, stride_x, stride_cb, stride_ck, stride_cd,
    EVEN: tl.constexpr, LLOYD: tl.constexpr, PREPARE: tl.constexpr, MOVE: tl.constexpr, FARTHEST: tl.constexpr,
    ATOMIC: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    SPARE: tl.constexpr,
):  # fmt: skip
    """As :func:`fgfast.kernels.kmeans.fused.step` for the euclidean metric without weights.

    SPARE: no centroid has the last column of the scores, and the squares of the pixels are added there. So they are
    computed in the layout of the product: a quarter of the bytes of mu is read, and they need no exchange of their own.
    """
    program = tl.program_id(0)
    b32, split = program // SPLITS, program % SPLITS
    b = b32.to(tl.int64)
    if has_converged(done_ptr, b, LLOYD):
        return
    GROUPS: tl.constexpr = x_desc.block_shape[1]
    LANES: tl.constexpr = x_desc.block_shape[3]
    WIDTH: tl.constexpr = GROUPS * LANES
    DP: tl.constexpr = CHUNKS * WIDTH
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, WIDTH)
    lane = tl.arange(0, LANES)
    channel = tl.arange(0, GROUPS)[:, None] * LANES + lane[None, :]
    if PREPARE:
        prepare_centroids(
            c_ptr + b * stride_cb, m_ptr + b * DP * BLOCK_K, bias_ptr + b * BLOCK_K, mu_ptr + b * DP, 0, K, D, DP,
            BLOCK_K, stride_ck, stride_cd, False, False, False, True, True, BLOCK_K, BLOCK_C,
        )  # fmt: skip
        tl.debug_barrier()
    m = ()
    sums = ()
    for i in tl.static_range(CHUNKS):
        rows = tl.load(m_ptr + (b * BLOCK_K + k[:, None]) * DP + i * WIDTH + d[None, :])
        m += (tl.permute(tl.reshape(rows, [BLOCK_K, GROUPS, LANES]), (1, 2, 0)),)  # type: ignore[assignment]
        sums += (tl.zeros([GROUPS, BLOCK_K, LANES], tl.float32),)  # type: ignore[assignment]
    bias = tl.load(bias_ptr + b * BLOCK_K + k)
    counts = tl.zeros([BLOCK_N, BLOCK_K] if SPARE else [BLOCK_K], tl.float32)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    bad = tl.zeros([BLOCK_N], tl.int32)
    for tile in tl.range(TILES, num_stages=STAGES, disable_licm=True):
        start = (split * TILES + tile) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        pieces = load_tile(x_desc, b32, start, UPCAST, CHUNKS)
        dots = tl.zeros([GROUPS, BLOCK_N, BLOCK_K], tl.float32)
        for i in tl.static_range(CHUNKS):
            dots = tl.dot(pieces[i], m[i], dots)
        squares = tl.zeros([GROUPS, BLOCK_N, LANES if SPARE else LANES // 8], tl.float32)
        for i in tl.static_range(CHUNKS):
            y = pieces[i].to(tl.float32) - tl.load(mu_ptr + b * DP + i * WIDTH + channel)[:, None, :]
            # Without the column, of eight channels at a time, which a thread has in the other layout.
            squares += y * y if SPARE else tl.sum(tl.reshape(y * y, [GROUPS, BLOCK_N, LANES // 8, 8]), 3)
        squares = tl.sum(squares, 2)
        if SPARE:
            dots = tl.where((k == BLOCK_K - 1)[None, None, :], squares[:, :, None], dots)
        dots = add_groups(dots)
        scores = bias[None, :] - 2 * dots
        scores = tl.where((k[None, :] < K) & (scores == scores), scores, float("inf"))  # never NaN
        best = tl.min(scores, 1)
        index = tl.min(tl.where(scores == best[:, None], k[None, :], BLOCK_K), 1)
        norm = tl.sum(tl.where((k == BLOCK_K - 1)[None, :], dots, 0.0), 1) if SPARE else tl.sum(squares, 0)
        w = tl.where(inside, 1.0, 0.0)
        distance, counted, _, has_nonfinite = pixel_distances(best, norm, w, False)
        label = tl.where(counted, index, -1)
        sums = add_tile(sums, pieces, label, k, CHUNKS, False)
        match = (label[:, None] == k[None, :]).to(tl.float32)
        counts += match if SPARE else tl.sum(match, 0)
        changed = store_labels(
            labels_ptr + b * N, distances_ptr + b * N, n, inside, label, counted, distance, changed, LLOYD
        )
        if MOVE:
            bad |= has_nonfinite.to(tl.int32)
        else:
            inertia += tl.where(has_nonfinite, float("nan"), tl.where(counted, distance, 0.0))
    if SPARE:
        counts = tl.sum(counts, 0)
    if not MOVE:
        bad = (inertia != inertia).to(tl.int32)
    if tl.max(bad, 0) > 0:  # 0 x NaN: the sums are made again without what is not finite
        tl.debug_barrier()
        sums = ()
        for _ in tl.static_range(CHUNKS):
            sums += (tl.zeros([GROUPS, BLOCK_K, LANES], tl.float32),)  # type: ignore[assignment]
        for tile in tl.range(TILES, num_stages=1):
            start = (split * TILES + tile) * BLOCK_N
            n = start + tl.arange(0, BLOCK_N)
            label = tl.load(labels_ptr + b * N + n, n < N, other=-1).to(tl.int32)
            pieces = load_tile(x_desc, b32, start, UPCAST, CHUNKS)
            sums = add_tile(sums, pieces, label, k, CHUNKS, True)
    row = b if ATOMIC else program.to(tl.int64)
    store_numbers(counts_ptr, inertia_ptr, changed_ptr, row, k, K, counts, inertia, changed, LLOYD, MOVE, ATOMIC)
    for i in tl.static_range(CHUNKS):
        target = sums_ptr + row * K * D + i * WIDTH + (k[None, :, None] * D + channel[:, None, :])
        mask = (k < K)[None, :, None] if EVEN else (k < K)[None, :, None] & (i * WIDTH + channel < D)[:, None, :]
        if ATOMIC:
            tl.atomic_add(target, sums[i], mask, sem="relaxed")
        else:
            tl.store(target, sums[i], mask)
    if MOVE:
        tl.debug_barrier()
        update_centroids(
            b, x_ptr, weight_ptr, labels_ptr, distances_ptr, sums_ptr, counts_ptr, repaired_ptr, tl.sum(changed, 0),
            c_ptr, m_ptr, bias_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr,
            N, N, D, K, DP, BLOCK_K, stride_b, 1, 0, stride_x,
            False, False, False, FARTHEST, True, 1024, BLOCK_K, BLOCK_C,
        )  # fmt: skip
