"""A step of k-means on pixels that are read once: scores, labels and the sums of the new centroids of a tile on chip.

Scores are taken around a point mu (the mean of the centroids, or of the pixels; 0 for cosine), as
:mod:`fgfast.pixels.source` derives:
    |x - c|^2 = |x - mu|^2 + bias_k - 2 <x, m_k>,   m = c - mu,  bias_k = |m_k|^2 + 2 <mu, m_k>.
m is rounded to the dtype of x, and bias is that of the rounded m. So labels and inertia are exact, to float32, for
centroids that moved by at most 2^-9 (bfloat16) or 2^-12 (float16) of each coordinate of m.

Shapes: x [B, D, H, W] with any strides, weight [B, N], N = H W; m [B, DP, KP], bias [B, KP] and mu [B, DP] are padded
to whole tiles. A program walks over TILES tiles of BLOCK_N pixels of one problem and owns one row of partial results,
sums [B, S, K, D], counts [B, S, K], inertia and changed [B, S]; `reduce_rows` adds the S rows in order. The sums stay
in registers (:mod:`fgfast.kernels.kmeans.fused`). Where K x D does not fit there, `assign` finds the labels and
`sum_pixels` reads x again. What is done with the centroids: :mod:`fgfast.kernels.kmeans.centroids`.
"""

import triton
import triton.language as tl

from fgfast.kernels.common import widened

EPS = tl.constexpr(1e-12)

# ---------------------------------------------------------------- what the kernels share


@triton.jit
def finished(done_ptr, b, LLOYD: tl.constexpr):
    """Whether problem b has converged: then a step of Lloyd's loop has nothing to do."""
    return tl.load(done_ptr + b) != 0 if LLOYD else False


@triton.jit
def places(
    x_ptr, start, WIDTH, stride_d, stride_y, stride_x, FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Base pointer and offsets [BLOCK_N, BLOCK_D] of the pixels from start on.

    FLAT: the rows of the image follow each other in memory, and a tile spans less than 2^31 elements. Then the offsets
    are the same for every tile and have 32 bits, which spares the registers that pointers would take.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    if FLAT:
        base = x_ptr + start.to(tl.int64) * stride_x
        offsets = (n * stride_x)[:, None] + (d * stride_d)[None, :]
    else:
        n = start + n
        base = x_ptr
        row, column = (n // WIDTH).to(tl.int64), (n % WIDTH).to(tl.int64)
        offsets = (row * stride_y + column * stride_x)[:, None] + (d.to(tl.int64) * stride_d)[None, :]
    return base, offsets


@triton.jit
def pixels_tile(base, offsets, inside, first, d, D, stride_d, EVEN: tl.constexpr, UPCAST: tl.constexpr):
    """Channels first + d of a tile of pixels, 0 outside; EVEN where D is a multiple of the tile's channels."""
    mask = inside[:, None] if EVEN else inside[:, None] & (first + d < D)[None, :]
    return widened(tl.load(base + tl.cast(first, tl.int64) * stride_d + offsets, mask, other=0.0), UPCAST)


@triton.jit
def finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def farthest(near_ptr, N, far, taken, BLOCK: tl.constexpr):
    """Largest distance, and its pixel, of those after (far, taken) in falling order, ties to the lowest; -1: none."""
    best = -1.0
    pixel = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        near = tl.load(near_ptr + n, n < N, other=-1.0)
        left = (near < far) | ((near == far) & (n > taken))
        top, at = tl.max(tl.where(left, near, -1.0), 0, return_indices=True)
        pixel = tl.where(top > best, first + at, pixel)
        best = tl.maximum(best, top)
    return best, pixel


@triton.jit
def nearest(best, squares, w, COSINE: tl.constexpr):
    """Distance, whether the pixel counts, and its factor in the sums, from the least score."""
    good = finite(squares) & finite(best)
    if COSINE:
        r = 1 / tl.maximum(tl.sqrt(squares), EPS)
        near = tl.maximum(1 + best * r, 0)
        scale = w * r
    else:
        near = tl.maximum(best + squares, 0)
        scale = w
    kept = good & (w > 0)
    return tl.where(kept, near, 0), kept, tl.where(kept, scale, 0), (w > 0) & (good == 0)


@triton.jit
def _scores(dots, bias, k, K, COSINE: tl.constexpr):
    """What is least for the nearest centroid [BLOCK_N, BLOCK_K]: never NaN, infinite past the last centroid."""
    scores = -dots if COSINE else bias[None, :] - 2 * dots
    return tl.where((k[None, :] < K) & (scores == scores), scores, float("inf"))


@triton.jit
def squared(x, mu_ptr, COSINE: tl.constexpr):
    """|x - mu|^2 over the channels of a tile [BLOCK_N]."""
    off = x.to(tl.float32)
    if not COSINE:
        off -= tl.load(mu_ptr)[None, :]
    return tl.sum(off * off, 1)


@triton.jit
def least(dots, bias, k, K, COSINE: tl.constexpr):
    """The least score of each pixel and its place in k, the first of equals: never NaN, never past K."""
    scores = _scores(dots, bias, k, K, COSINE)
    return tl.min(scores, 1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def centroids_tile(c_ptr, k, d, K, D, stride_k, stride_d):
    """Centroids [BLOCK_D, BLOCK_K] in float32, 0 outside."""
    mask = (k < K)[None, :] & (d < D)[:, None]
    return tl.load(c_ptr + k[None, :] * stride_k + d[:, None] * stride_d, mask, other=0.0).to(tl.float32)


@triton.jit
def centred(m_ptr, c, mu, k, d, K, D, KP):
    """Store m = c - mu of a tile of centroids [BLOCK_D, BLOCK_K]; what its channels add to bias [BLOCK_K]."""
    m = tl.where((k < K)[None, :] & (d < D)[:, None], c - mu[:, None], 0.0).to(m_ptr.dtype.element_ty)
    tl.store(m_ptr + d[:, None] * KP + k[None, :], m)
    wide = m.to(tl.float32)
    return tl.sum(wide * (wide + 2 * mu[:, None]), 0)


@triton.jit
def _leading(x):
    """The leading 11 bits of float32 x, all that a tf32 product reads."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def weighed(acc, xt, part, PRECISION: tl.constexpr):
    """Acc [BLOCK_D, BLOCK_K] + xt [BLOCK_D, BLOCK_N] x part, float32 [BLOCK_N, BLOCK_K].

    In half precision part is split into two bfloat16, which lose at most 2^-16 of it; float16, which has too short a
    range for it, becomes two bfloat16, exactly.
    """
    if xt.dtype == tl.float32:
        acc = tl.dot(xt, part, acc, input_precision=PRECISION)
    else:
        high = part.to(tl.bfloat16)
        low = (part - high.to(tl.float32)).to(tl.bfloat16)
        lead = xt.to(tl.bfloat16)
        acc = tl.dot(lead, low, tl.dot(lead, high, acc))
        if xt.dtype == tl.float16:
            rest = (xt.to(tl.float32) - lead.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(rest, low, tl.dot(rest, high, acc))
    return acc


@triton.jit
def added(acc, xt, match, scale, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Acc [BLOCK_D, BLOCK_K] + xt [BLOCK_D, BLOCK_N] x one-hot [BLOCK_N, BLOCK_K] times scale [BLOCK_N].

    A product with 0 or 1 is exact, so three tf32 products of the 11 + 11 + 2 bits of a float32 are its full-precision
    product, on tensor cores. In half precision a scale goes the way of `weighed`.
    """
    if xt.dtype == tl.float32:
        if not UNIT:
            xt = xt * scale[None, :]
        hot = match.to(tl.float32)
        if PRECISION == "tf32" or UPCAST:
            acc = tl.dot(xt, hot, acc, input_precision=PRECISION)
        else:
            high = _leading(xt)
            middle = _leading(xt - high)
            acc = tl.dot(high, hot, acc, input_precision="tf32")
            acc = tl.dot(middle, hot, acc, input_precision="tf32")
            acc = tl.dot(xt - high - middle, hot, acc, input_precision="tf32")
    elif UNIT:
        acc = tl.dot(xt, match.to(xt.dtype), acc)
    else:
        acc = weighed(acc, xt, tl.where(match, scale[:, None], 0.0), PRECISION)
    return acc


# ---------------------------------------------------------------- two reads of x, for large K x D


@triton.jit
def assign(
    x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, near_ptr, scale_ptr, inertia_ptr, changed_ptr,
    N, WIDTH, D, K, DP, KP, SPLITS, TURNS,
    stride_b, stride_d, stride_y, stride_x,
    FLAT: tl.constexpr, EVEN: tl.constexpr, COSINE: tl.constexpr, WEIGHTED: tl.constexpr, LLOYD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Labels, factors in the sums and partial inertia; with LLOYD also distances and changes, as `step`."""
    program = tl.program_id(0).to(tl.int64)
    b, split = program // SPLITS, program % SPLITS
    if finished(done_ptr, b, LLOYD):
        return
    d = tl.arange(0, BLOCK_D)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(TURNS):
        start = (split * TURNS + tile).to(tl.int32) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = places(x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_D)
        best = tl.full([BLOCK_N], float("inf"), tl.float32)
        index = tl.zeros([BLOCK_N], tl.int32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for low in range(0, KP, BLOCK_K):
            k = low + tl.arange(0, BLOCK_K)
            dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            squares = tl.zeros([BLOCK_N], tl.float32)
            for first in range(0, DP, BLOCK_D):
                x = pixels_tile(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
                m = tl.load(m_ptr + (b * DP + first + d[:, None]) * KP + k[None, :])
                squares += squared(x, mu_ptr + b * DP + first + d, COSINE)
                dots = tl.dot(x, m, dots, input_precision=PRECISION)
            lower, at = least(dots, tl.load(bias_ptr + b * KP + k), k, K, COSINE)
            index = tl.where(lower < best, low + at, index)
            best = tl.minimum(best, lower)
        w = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weight_ptr + b * N + n, inside, other=0.0)
        near, kept, scale, has_nonfinite = nearest(best, squares, w, COSINE)
        label = tl.where(kept, index, -1)
        inertia += tl.where(has_nonfinite, float("nan"), tl.where(kept, w * near, 0.0))
        if LLOYD:
            changed += (inside & (tl.load(labels_ptr + b * N + n, inside, other=-1) != label)).to(tl.int32)
            tl.store(near_ptr + b * N + n, tl.where(kept, near, -1.0), inside)
        tl.store(scale_ptr + b * N + n, scale, inside)
        tl.store(labels_ptr + b * N + n, label.to(tl.int64), inside)
    tl.store(inertia_ptr + program, tl.sum(inertia, 0))
    if LLOYD:
        tl.store(changed_ptr + program, tl.sum(changed, 0))


@triton.jit
def sum_pixels(
    x_ptr, weight_ptr, done_ptr, labels_ptr, scale_ptr, sums_ptr, counts_ptr,
    N, WIDTH, D, K, DP, KP, SPLITS, TURNS,
    stride_b, stride_d, stride_y, stride_x,
    FLAT: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr, WEIGHTED: tl.constexpr, LLOYD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums and counts of one tile of channels and of clusters, from the labels."""
    program = tl.program_id(0).to(tl.int64)
    across, within = DP // BLOCK_S, KP // BLOCK_K
    row = program // (across * within)
    first = program // within % across * BLOCK_S
    k = program % within * BLOCK_K + tl.arange(0, BLOCK_K)
    b, split = row // SPLITS, row % SPLITS
    if finished(done_ptr, b, LLOYD):
        return
    d = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    counts = tl.zeros([BLOCK_K], tl.float32)
    for tile in range(TURNS):
        start = (split * TURNS + tile).to(tl.int32) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = places(x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_S)
        x = pixels_tile(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
        x = tl.where(finite(x.to(tl.float32)), x, 0.0)
        match = tl.load(labels_ptr + b * N + n, inside, other=-1)[:, None] == k[None, :]
        scale = tl.load(scale_ptr + b * N + n, inside, other=0.0)
        w = tl.load(weight_ptr + b * N + n, inside, other=0.0) if WEIGHTED else tl.where(inside, 1.0, 0.0)
        sums = added(sums, tl.trans(x), match, scale, UNIT, PRECISION, UPCAST)
        counts += tl.sum(tl.where(match, w[:, None], 0.0), 0)
    at = first + d
    tl.store(sums_ptr + row * K * D + k[None, :] * D + at[:, None], sums, (k < K)[None, :] & (at < D)[:, None])
    if first == 0:
        tl.store(counts_ptr + row * K + k, counts, k < K)


# ---------------------------------------------------------------- what is small


@triton.jit
def reduce_rows(
    from_ptr, counts_from, inertia_from, changed_from, done_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    SIZE, K, SPLITS, LLOYD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [B, SIZE] of rows [B, SPLITS, SIZE] in order, and those of the smaller results."""
    pieces = tl.cdiv(SIZE, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, piece = program // pieces, program % pieces
    if finished(done_ptr, b, LLOYD):
        return
    at = piece * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(SPLITS):
        total += tl.load(from_ptr + (b * SPLITS + s) * SIZE + at, at < SIZE, other=0.0)
    tl.store(sums_ptr + b * SIZE + at, total, at < SIZE)
    count = tl.zeros([BLOCK], tl.float32)  # SIZE = K D, so the pieces reach past K
    for s in range(SPLITS):
        count += tl.load(counts_from + (b * SPLITS + s) * K + at, at < K, other=0.0)
    tl.store(counts_ptr + b * K + at, count, at < K)
    if piece == 0:
        inertia = 0.0
        changed = 0
        for s in range(SPLITS):
            inertia += tl.load(inertia_from + b * SPLITS + s)
            if LLOYD:
                changed += tl.load(changed_from + b * SPLITS + s)
        tl.store(inertia_ptr + b, inertia)
        if LLOYD:
            tl.store(changed_ptr + b, changed)
