"""Tiles of a k-means step that reads the pixels once: scores, labels and the sums of the new centroids stay on chip.

Scores are relative to a point mu (the mean of the centroids or of the pixels; 0 for cosine), the shift of
:mod:`fgfast.pixels.source`. In float32 (SHIFT) it is subtracted from the pixels in registers:
    |x - c|^2 = |y|^2 + |m_k|^2 - 2 <y, m_k>,   y = x - mu,  m = c - mu,
and in Lloyd's loop centroids and sums are those of y. Half precision multiplies x as it is, since y would be rounded:
    |x - c|^2 = |y|^2 + bias_k - 2 <x, m_k>,   bias_k = |m_k|^2 + 2 <mu, m_k>;
such pixels have at most 2^8 or 2^11 times the digits of their mean, which leaves float32 sums of products enough.
m is rounded to the dtype of x, and bias belongs to the rounded m: labels and inertia are exact, to float32, for
centroids perturbed by at most 2^-9 (bfloat16) or 2^-12 (float16) of each coordinate of m.

Shapes: x [B, D, H, W] with any strides, weight [B, N], N = H W; m [B, DP, KP], bias [B, KP] and mu [B, DP] are padded
to full tiles. A program loops over TILES tiles of BLOCK_N pixels of one problem and owns one row of partial results,
sums [B, S, K, D], counts [B, S, K], inertia and changed [B, S]; `reduce_rows` adds the S rows in order. The sums stay
in registers (:mod:`fgfast.kernels.kmeans.fused`). If K x D numbers do not fit there, `assign` computes the labels and
`sum_pixels` reads x again. :mod:`fgfast.kernels.kmeans.centroids` prepares and updates the centroids.
"""

import triton
import triton.language as tl

from fgfast.kernels.common import Constant, upcast

EPS = Constant(1e-12)

# ---------------------------------------------------------------- functions called by several kernels


@triton.jit
def has_converged(done_ptr, b, LLOYD: tl.constexpr):
    """Whether problem b has converged and a step of Lloyd's loop can return; False outside the loop."""
    return tl.load(done_ptr + b) != 0 if LLOYD else False


@triton.jit
def pixel_offsets(
    x_ptr, start, WIDTH, stride_d, stride_y, stride_x, FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Base pointer and offsets [BLOCK_N, BLOCK_D] of the pixels from ``start`` on.

    FLAT: rows of the image are contiguous with each other and a tile spans less than 2^31 elements. Then the offsets
    are 32-bit and the same for every tile, which takes fewer registers than pointers.
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
def load_pixels(base, offsets, inside, first, d, D, stride_d, EVEN: tl.constexpr, UPCAST: tl.constexpr):
    """Channels first + d of a tile of pixels, 0 outside; EVEN where D is a multiple of the tile's channels."""
    mask = inside[:, None] if EVEN else inside[:, None] & (first + d < D)[None, :]
    return upcast(tl.load(base + tl.cast(first, tl.int64) * stride_d + offsets, mask, other=0.0), UPCAST)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def find_farthest(distances_ptr, N, far, taken, BLOCK: tl.constexpr):
    """The next distance after (far, taken) in descending order, ties by index, and its pixel; -1 if none is left."""
    best = -1.0
    pixel = 0
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        distance = tl.load(distances_ptr + n, n < N, other=-1.0)
        left = (distance < far) | ((distance == far) & (n > taken))
        top, at = tl.max(tl.where(left, distance, -1.0), 0, return_indices=True)
        pixel = tl.where(top > best, first + at, pixel)
        best = tl.maximum(best, top)
    return best, pixel


@triton.jit
def pixel_distances(best, squares, w, COSINE: tl.constexpr):
    """From the lowest score of each pixel: its distance, whether it counts, its factor in the sums, whether it is bad.

    A pixel is bad if its weight is positive and a value of it is not finite.
    """
    good = is_finite(squares) & is_finite(best)
    if COSINE:
        inverse_norm = 1 / tl.maximum(tl.sqrt(squares), EPS)
        distance = tl.maximum(1 + best * inverse_norm, 0)
        scale = w * inverse_norm
    else:
        distance = tl.maximum(best + squares, 0)
        scale = w
    counted = good & (w > 0)
    return tl.where(counted, distance, 0), counted, tl.where(counted, scale, 0), (w > 0) & (good == 0)


@triton.jit
def _scores(dots, bias, k, K, COSINE: tl.constexpr):
    """Scores [BLOCK_N, BLOCK_K], lowest for the nearest centroid: never NaN, infinite past the last centroid."""
    scores = -dots if COSINE else bias[None, :] - 2 * dots
    return tl.where((k[None, :] < K) & (scores == scores), scores, float("inf"))


@triton.jit
def relative(x, mu_ptr, COSINE: tl.constexpr):
    """X - mu of the channels of a tile in float32; x for cosine."""
    y = x.to(tl.float32)
    if not COSINE:
        y -= tl.load(mu_ptr)[None, :]
    return y


@triton.jit
def nearest_centroid(dots, bias, k, K, COSINE: tl.constexpr):
    """Lowest score of each pixel and its position in k, ties to the lowest: never NaN, never past K."""
    scores = _scores(dots, bias, k, K, COSINE)
    return tl.min(scores, 1, return_indices=True, return_indices_tie_break_left=True)


@triton.jit
def load_centroids(c_ptr, k, d, K, D, stride_k, stride_d):
    """Centroids [BLOCK_D, BLOCK_K] in float32, 0 outside."""
    mask = (k < K)[None, :] & (d < D)[:, None]
    return tl.load(c_ptr + k[None, :] * stride_k + d[:, None] * stride_d, mask, other=0.0).to(tl.float32)


@triton.jit
def store_centred(m_ptr, c, mu, k, d, K, D, KP, SHIFT: tl.constexpr, DP=0, TURNED: tl.constexpr = False):
    """Store m = c - mu of a tile of centroids [BLOCK_D, BLOCK_K]; returns the bias [BLOCK_K] of these channels.

    m is [DP, KP], TURNED [KP, DP].
    """
    m = tl.where((k < K)[None, :] & (d < D)[:, None], c - mu[:, None], 0.0).to(m_ptr.dtype.element_ty)
    tl.store(m_ptr + (k[None, :] * DP + d[:, None] if TURNED else d[:, None] * KP + k[None, :]), m)
    rounded = m.to(tl.float32)
    if SHIFT:
        return tl.sum(rounded * rounded, 0)
    return tl.sum(rounded * (rounded + 2 * mu[:, None]), 0)


@triton.jit
def _leading_bits(x):
    """The leading 11 bits of float32 x, which is what a tf32 product reads."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    """Float32 x rounded to the 11 bits of a tf32 number."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def full_product(x, m, acc):
    """Acc + <x, m> of float32 numbers, from three tf32 products: within 2^-21 |x| |m| of each term.

    x is its leading 11 bits, the next 11 and a rest of at most 2^-23 |x|, which is left out, as is the product of the
    second pieces.
    """
    leading, of_m = _rounded(x), _rounded(m)
    acc = tl.dot(leading, _rounded(m - of_m), acc, input_precision="tf32")
    acc = tl.dot(_rounded(x - leading), of_m, acc, input_precision="tf32")
    return tl.dot(leading, of_m, acc, input_precision="tf32")


@triton.jit
def add_product(acc, xt, factor, PRECISION: tl.constexpr):
    """Acc [BLOCK_D, BLOCK_K] + xt [BLOCK_D, BLOCK_N] x factor, float32 [BLOCK_N, BLOCK_K].

    In half precision ``factor`` is split into two bfloat16, with a relative error of at most 2^-16. A float16 xt, whose
    range is too short for such factors, is split into two bfloat16 exactly.
    """
    if xt.dtype == tl.float32:
        acc = tl.dot(xt, factor, acc, input_precision=PRECISION)
    else:
        high = factor.to(tl.bfloat16)
        low = (factor - high.to(tl.float32)).to(tl.bfloat16)
        lead = xt.to(tl.bfloat16)
        acc = tl.dot(lead, low, tl.dot(lead, high, acc))
        if xt.dtype == tl.float16:
            rest = (xt.to(tl.float32) - lead.to(tl.float32)).to(tl.bfloat16)
            acc = tl.dot(rest, low, tl.dot(rest, high, acc))
    return acc


@triton.jit
def add_one_hot(acc, xt, match, scale, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Acc [BLOCK_D, BLOCK_K] + xt [BLOCK_D, BLOCK_N] x one-hot [BLOCK_N, BLOCK_K] times scale [BLOCK_N].

    Products with 0 or 1 are exact, and three tf32 products of the 11 + 11 + 2 bits of a float32 give the full-precision
    product on tensor cores. In half precision a scale is applied by `add_product`.
    """
    if xt.dtype == tl.float32:
        if not UNIT:
            xt = xt * scale[None, :]
        hot = match.to(tl.float32)
        if PRECISION == "tf32" or UPCAST:
            acc = tl.dot(xt, hot, acc, input_precision=PRECISION)
        else:
            high = _leading_bits(xt)
            middle = _leading_bits(xt - high)
            acc = tl.dot(high, hot, acc, input_precision="tf32")
            acc = tl.dot(middle, hot, acc, input_precision="tf32")
            acc = tl.dot(xt - high - middle, hot, acc, input_precision="tf32")
    elif UNIT:
        acc = tl.dot(xt, match.to(xt.dtype), acc)
    else:
        acc = add_product(acc, xt, tl.where(match, scale[:, None], 0.0), PRECISION)
    return acc


# ---------------------------------------------------------------- two reads of x, for large K x D


@triton.jit
def assign(
    x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, distances_ptr, scale_ptr, inertia_ptr, changed_ptr,
    N, WIDTH, D, K, DP, KP, SPLITS, TILES,
    stride_b, stride_d, stride_y, stride_x,
    FLAT: tl.constexpr, EVEN: tl.constexpr, COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    LLOYD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Labels, factors in the sums and partial inertia; with LLOYD also distances and changed labels, as in `step`.

    PIECES: float32 products are made of three on tensor cores.
    """
    program = tl.program_id(0).to(tl.int64)
    b, split = program // SPLITS, program % SPLITS
    if has_converged(done_ptr, b, LLOYD):
        return
    d = tl.arange(0, BLOCK_D)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(TILES):
        start = (split * TILES + tile).to(tl.int32) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = pixel_offsets(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_D
        )
        best = tl.full([BLOCK_N], float("inf"), tl.float32)
        index = tl.zeros([BLOCK_N], tl.int32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for low in range(0, KP, BLOCK_K):
            k = low + tl.arange(0, BLOCK_K)
            dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            squares = tl.zeros([BLOCK_N], tl.float32)
            for first in range(0, DP, BLOCK_D):
                x = load_pixels(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
                m = tl.load(m_ptr + (b * DP + first + d[:, None]) * KP + k[None, :])
                y = relative(x, mu_ptr + b * DP + first + d, COSINE)
                squares += tl.sum(y * y, 1)
                if PIECES:
                    dots = full_product(y if SHIFT else x, m, dots)
                else:
                    dots = tl.dot(y if SHIFT else x, m, dots, input_precision=PRECISION)
            lower, at = nearest_centroid(dots, tl.load(bias_ptr + b * KP + k), k, K, COSINE)
            index = tl.where(lower < best, low + at, index)
            best = tl.minimum(best, lower)
        w = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weight_ptr + b * N + n, inside, other=0.0)
        distance, counted, scale, has_nonfinite = pixel_distances(best, squares, w, COSINE)
        label = tl.where(counted, index, -1)
        inertia += tl.where(has_nonfinite, float("nan"), tl.where(counted, w * distance, 0.0))
        if LLOYD:
            changed += (inside & (tl.load(labels_ptr + b * N + n, inside, other=-1) != label)).to(tl.int32)
            tl.store(distances_ptr + b * N + n, tl.where(counted, distance, -1.0), inside)
        tl.store(scale_ptr + b * N + n, scale, inside)
        tl.store(labels_ptr + b * N + n, label.to(tl.int64), inside)
    tl.store(inertia_ptr + program, tl.sum(inertia, 0))
    if LLOYD:
        tl.store(changed_ptr + program, tl.sum(changed, 0))


@triton.jit
def sum_pixels(
    x_ptr, mu_ptr, weight_ptr, done_ptr, labels_ptr, scale_ptr, sums_ptr, counts_ptr,
    N, WIDTH, D, K, DP, KP, SPLITS, TILES,
    stride_b, stride_d, stride_y, stride_x,
    FLAT: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    LLOYD: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Partial sums and counts of one tile of channels and clusters, from the labels."""
    program = tl.program_id(0).to(tl.int64)
    across, within = DP // BLOCK_S, KP // BLOCK_K
    row = program // (across * within)
    first = program // within % across * BLOCK_S
    k = program % within * BLOCK_K + tl.arange(0, BLOCK_K)
    b, split = row // SPLITS, row % SPLITS
    if has_converged(done_ptr, b, LLOYD):
        return
    d = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    counts = tl.zeros([BLOCK_K], tl.float32)
    for tile in range(TILES):
        start = (split * TILES + tile).to(tl.int32) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = pixel_offsets(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_S
        )
        x = load_pixels(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
        x = tl.where(is_finite(x.to(tl.float32)), x, 0.0)
        if SHIFT and LLOYD:
            x = relative(x, mu_ptr + b * DP + first + d, False)
        match = tl.load(labels_ptr + b * N + n, inside, other=-1)[:, None] == k[None, :]
        scale = tl.load(scale_ptr + b * N + n, inside, other=0.0)
        w = tl.load(weight_ptr + b * N + n, inside, other=0.0) if WEIGHTED else tl.where(inside, 1.0, 0.0)
        sums = add_one_hot(sums, tl.trans(x), match, scale, UNIT, PRECISION, UPCAST)
        counts += tl.sum(tl.where(match, w[:, None], 0.0), 0)
    at = first + d
    tl.store(sums_ptr + row * K * D + k[None, :] * D + at[:, None], sums, (k < K)[None, :] & (at < D)[:, None])
    if first == 0:
        tl.store(counts_ptr + row * K + k, counts, k < K)


# ---------------------------------------------------------------- reduction over programs


@triton.jit
def reduce_rows(
    from_ptr, counts_from, inertia_from, changed_from, done_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    SIZE, K, SPLITS, LLOYD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [B, SIZE] of rows [B, SPLITS, SIZE] in order; counts, inertia and changed are summed over SPLITS."""
    pieces = tl.cdiv(SIZE, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, piece = program // pieces, program % pieces
    if has_converged(done_ptr, b, LLOYD):
        return
    at = piece * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(SPLITS):
        total += tl.load(from_ptr + (b * SPLITS + s) * SIZE + at, at < SIZE, other=0.0)
    tl.store(sums_ptr + b * SIZE + at, total, at < SIZE)
    count = tl.zeros([BLOCK], tl.float32)  # SIZE = K D: the pieces cover K
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
