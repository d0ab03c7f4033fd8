"""A step of k-means on pixels that are read once: scores, labels and the sums of the new centroids of a tile on chip.

Scores are taken around a point mu (the mean of the centroids, or of the pixels; 0 for cosine), as
:mod:`fgfast.ops._kmeans_source` derives:
    |x - c|^2 = |x - mu|^2 + bias_k - 2 <x, m_k>,   m = c - mu,  bias_k = |m_k|^2 + 2 <mu, m_k>.
m is rounded to the dtype of x, and bias is that of the rounded m. So labels and inertia are exact, to float32, for
centroids that moved by at most 2^-9 (bfloat16) or 2^-12 (float16) of each coordinate of m.

Shapes: x [B, D, H, W] with any strides, weight [B, N], N = H W; m [B, DP, KP], bias [B, KP] and mu [B, DP] are padded
to whole tiles. A program walks over TILES tiles of BLOCK_N pixels of one problem and owns one row of partial results,
sums [B, S, K, D], counts [B, S, K], inertia and changed [B, S]; `_reduce` adds the S rows in order. The sums stay in
registers. Where K x D does not fit there, `_assign` finds the labels and `_sum` reads x again.
"""

import math
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels._common import AotCase, interpreted, launch_options, output_dtype, widened
from fgfast.kernels.configs import SHARED, Row, choose, config, kmeans_row, processors, row_kind
from fgfast.kernels.tune import TuneCase
from fgfast.kernels.tuned import TUNED

EPS = tl.constexpr(1e-12)
SHARE = 0.08  # of the bytes of x: the most that partial sums may cost, written and read
WIDEST = 8192  # channels

# ---------------------------------------------------------------- what the kernels share


@triton.jit
def _finished(done_ptr, b, LLOYD: tl.constexpr):
    """Whether problem b has converged: then a step of Lloyd's loop has nothing to do."""
    return tl.load(done_ptr + b) != 0 if LLOYD else False


@triton.jit
def _places(
    x_ptr, start, WIDTH, stride_d, stride_y, stride_x, FLAT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Base pointer and offsets [BLOCK_N, BLOCK_D] of the pixels from start on.

    FLAT: the rows of the image follow each other in memory, and a tile spans less than 2^31 elements. Then the offsets
    are the same for every tile and have 32 bits, which spares the registers that pointers would take.
    """
    n = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    if FLAT:
        base = x_ptr + start * stride_x
        offsets = (n * stride_x)[:, None] + (d * stride_d)[None, :]
    else:
        n = start + n
        base = x_ptr
        offsets = ((n // WIDTH) * stride_y + (n % WIDTH) * stride_x)[:, None] + (d.to(tl.int64) * stride_d)[None, :]
    return base, offsets


@triton.jit
def _tile(base, offsets, inside, first, d, D, stride_d, EVEN: tl.constexpr, UPCAST: tl.constexpr):
    """Channels first + d of a tile of pixels, 0 outside; EVEN where D is a multiple of the tile's channels."""
    mask = inside[:, None] if EVEN else inside[:, None] & (first + d < D)[None, :]
    return widened(tl.load(base + tl.cast(first, tl.int64) * stride_d + offsets, mask, other=0.0), UPCAST)


@triton.jit
def _finite(x):
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
def _nearest(best, squares, w, COSINE: tl.constexpr):
    """Distance, whether the pixel counts, and its factor in the sums, from the least score."""
    good = _finite(squares) & _finite(best)
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
def _squares(x, mu_ptr, COSINE: tl.constexpr):
    """|x - mu|^2 over the channels of a tile [BLOCK_N]."""
    off = x.to(tl.float32)
    if not COSINE:
        off -= tl.load(mu_ptr)[None, :]
    return tl.sum(off * off, 1)


@triton.jit
def _least(dots, bias, k, K, COSINE: tl.constexpr):
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
def _weighed(acc, xt, part, PRECISION: tl.constexpr):
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
def _added(acc, xt, match, scale, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Acc [BLOCK_D, BLOCK_K] + xt [BLOCK_D, BLOCK_N] x one-hot [BLOCK_N, BLOCK_K] times scale [BLOCK_N].

    A product with 0 or 1 is exact, so three tf32 products of the 11 + 11 + 2 bits of a float32 are its full-precision
    product, on tensor cores. In half precision a scale goes the way of `_weighed`.
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
        acc = _weighed(acc, xt, tl.where(match, scale[:, None], 0.0), PRECISION)
    return acc


# ---------------------------------------------------------------- one read of x


@triton.jit
def _step(
    x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, near_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    N, WIDTH, D, K, SPLITS, TURNS,
    stride_b, stride_d, stride_y, stride_x,
    FLAT: tl.constexpr, EVEN: tl.constexpr, COSINE: tl.constexpr, WEIGHTED: tl.constexpr, LLOYD: tl.constexpr,
    ATOMIC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Labels, partial sums, counts and inertia; with LLOYD also distances, and how many labels changed."""
    program = tl.program_id(0).to(tl.int64)
    b, split = program // SPLITS, program % SPLITS
    if _finished(done_ptr, b, LLOYD):
        return
    k = tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_S)
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
        base, offsets = _places(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_D
        )
        wide_base, across = _places(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_S
        )
        dots = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for first in range(0, CHUNKS * BLOCK_S, BLOCK_D):
            x = _tile(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
            m = tl.load(m_ptr + (b * CHUNKS * BLOCK_S + first + d[:, None]) * BLOCK_K + k[None, :])
            squares += _squares(x, mu_ptr + b * CHUNKS * BLOCK_S + first + d, COSINE)
            dots = tl.dot(x, m, dots, input_precision=PRECISION)
        best, index = _least(dots, bias, k, K, COSINE)
        w = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weight_ptr + b * N + n, inside, other=0.0)
        near, kept, scale, lost = _nearest(best, squares, w, COSINE)
        label = tl.where(kept, index, -1)
        match = label[:, None] == k[None, :]
        updated = ()
        UNIT: tl.constexpr = not (WEIGHTED or COSINE)
        for i in tl.static_range(CHUNKS):
            x = _tile(wide_base, across, inside, i * BLOCK_S, e, D, stride_d, EVEN, UPCAST)
            x = tl.where(_finite(x.to(tl.float32)), x, 0.0)
            updated += (_added(sums[i], tl.trans(x), match, scale, UNIT, PRECISION, UPCAST),)  # type: ignore[assignment]
        sums = updated
        counts += tl.sum(tl.where(match, w[:, None], 0.0), 0)
        inertia += tl.where(lost, float("nan"), tl.where(kept, w * near, 0.0))
        if LLOYD:
            changed += (inside & (tl.load(labels_ptr + b * N + n, inside, other=-1) != label)).to(tl.int32)
            tl.store(near_ptr + b * N + n, tl.where(kept, near, -1.0), inside)
        tl.store(labels_ptr + b * N + n, label.to(tl.int64), inside)
    row = b if ATOMIC else program
    for i in tl.static_range(CHUNKS):
        target = sums_ptr + row * K * D + i * BLOCK_S + (k[None, :] * D + e[:, None])
        mask = (k < K)[None, :] if EVEN else (k < K)[None, :] & (i * BLOCK_S + e < D)[:, None]
        if ATOMIC:
            tl.atomic_add(target, sums[i], mask, sem="relaxed")
        else:
            tl.store(target, sums[i], mask)
    if ATOMIC:
        tl.atomic_add(counts_ptr + row * K + k, counts, k < K, sem="relaxed")
        tl.atomic_add(inertia_ptr + row, tl.sum(inertia, 0), sem="relaxed")
    else:
        tl.store(counts_ptr + row * K + k, counts, k < K)
        tl.store(inertia_ptr + row, tl.sum(inertia, 0))
    if LLOYD:
        if ATOMIC:
            tl.atomic_add(changed_ptr + row, tl.sum(changed, 0), sem="relaxed")
        else:
            tl.store(changed_ptr + row, tl.sum(changed, 0))


# ---------------------------------------------------------------- two reads of x, for large K x D


@triton.jit
def _assign(
    x_ptr, m_ptr, bias_ptr, mu_ptr, weight_ptr, done_ptr,
    labels_ptr, near_ptr, scale_ptr, inertia_ptr, changed_ptr,
    N, WIDTH, D, K, DP, KP, SPLITS, TURNS,
    stride_b, stride_d, stride_y, stride_x,
    FLAT: tl.constexpr, EVEN: tl.constexpr, COSINE: tl.constexpr, WEIGHTED: tl.constexpr, LLOYD: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Labels, factors in the sums and partial inertia; with LLOYD also distances and changes, as `_step`."""
    program = tl.program_id(0).to(tl.int64)
    b, split = program // SPLITS, program % SPLITS
    if _finished(done_ptr, b, LLOYD):
        return
    d = tl.arange(0, BLOCK_D)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    for tile in range(TURNS):
        start = (split * TURNS + tile) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = _places(
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
                x = _tile(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
                m = tl.load(m_ptr + (b * DP + first + d[:, None]) * KP + k[None, :])
                squares += _squares(x, mu_ptr + b * DP + first + d, COSINE)
                dots = tl.dot(x, m, dots, input_precision=PRECISION)
            least, at = _least(dots, tl.load(bias_ptr + b * KP + k), k, K, COSINE)
            index = tl.where(least < best, low + at, index)
            best = tl.minimum(best, least)
        w = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            w = tl.load(weight_ptr + b * N + n, inside, other=0.0)
        near, kept, scale, lost = _nearest(best, squares, w, COSINE)
        label = tl.where(kept, index, -1)
        inertia += tl.where(lost, float("nan"), tl.where(kept, w * near, 0.0))
        if LLOYD:
            changed += (inside & (tl.load(labels_ptr + b * N + n, inside, other=-1) != label)).to(tl.int32)
            tl.store(near_ptr + b * N + n, tl.where(kept, near, -1.0), inside)
        tl.store(scale_ptr + b * N + n, scale, inside)
        tl.store(labels_ptr + b * N + n, label.to(tl.int64), inside)
    tl.store(inertia_ptr + program, tl.sum(inertia, 0))
    if LLOYD:
        tl.store(changed_ptr + program, tl.sum(changed, 0))


@triton.jit
def _sum(
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
    if _finished(done_ptr, b, LLOYD):
        return
    d = tl.arange(0, BLOCK_S)
    sums = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
    counts = tl.zeros([BLOCK_K], tl.float32)
    for tile in range(TURNS):
        start = (split * TURNS + tile) * BLOCK_N
        n = start + tl.arange(0, BLOCK_N)
        inside = n < N
        base, offsets = _places(
            x_ptr + b * stride_b, start, WIDTH, stride_d, stride_y, stride_x, FLAT, BLOCK_N, BLOCK_S
        )
        x = _tile(base, offsets, inside, first, d, D, stride_d, EVEN, UPCAST)
        x = tl.where(_finite(x.to(tl.float32)), x, 0.0)
        match = tl.load(labels_ptr + b * N + n, inside, other=-1)[:, None] == k[None, :]
        scale = tl.load(scale_ptr + b * N + n, inside, other=0.0)
        w = tl.load(weight_ptr + b * N + n, inside, other=0.0) if WEIGHTED else tl.where(inside, 1.0, 0.0)
        sums = _added(sums, tl.trans(x), match, scale, UNIT, PRECISION, UPCAST)
        counts += tl.sum(tl.where(match, w[:, None], 0.0), 0)
    at = first + d
    tl.store(sums_ptr + row * K * D + k[None, :] * D + at[:, None], sums, (k < K)[None, :] & (at < D)[:, None])
    if first == 0:
        tl.store(counts_ptr + row * K + k, counts, k < K)


# ---------------------------------------------------------------- what is small


@triton.jit
def _reduce(
    from_ptr, counts_from, inertia_from, changed_from, done_ptr, sums_ptr, counts_ptr, inertia_ptr, changed_ptr,
    SIZE, K, SPLITS, LLOYD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [B, SIZE] of rows [B, SPLITS, SIZE] in order, and those of the smaller results."""
    pieces = tl.cdiv(SIZE, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    b, piece = program // pieces, program % pieces
    if _finished(done_ptr, b, LLOYD):
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


@triton.jit
def _prepare(
    c_ptr, m_ptr, bias_ptr, mu_ptr, K, D, DP, KP, stride_b, stride_k, stride_d,
    COSINE: tl.constexpr, GIVEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m, bias and, unless GIVEN, mu of the centroids c; a program takes BLOCK_K of them."""
    within = KP // BLOCK_K
    program = tl.program_id(0).to(tl.int64)
    b, low = program // within, program % within * BLOCK_K
    k = low + tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_D)
    c_ptr += b * stride_b
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
        mu = tl.zeros([BLOCK_D], tl.float32)
        if GIVEN:
            mu = tl.load(mu_ptr + b * DP + d)
        elif not COSINE:
            for other in range(0, KP, BLOCK_K):
                mu += tl.sum(centroids_tile(c_ptr, other + tl.arange(0, BLOCK_K), d, K, D, stride_k, stride_d), 1)
            mu /= K
        c = centroids_tile(c_ptr, k, d, K, D, stride_k, stride_d) / length[None, :]
        bias += centred(m_ptr + b * DP * KP, c, mu, k, d, K, D, KP)
        if not GIVEN and low == 0:
            tl.store(mu_ptr + b * DP + d, mu)
    tl.store(bias_ptr + b * KP + k, bias)


# ---------------------------------------------------------------- the host side

MOST_CHUNKS = 8  # tiles of sums that a program holds: each takes registers for its addresses too


def power(n: int, least: int = 16) -> int:
    """The least power of two that is at least n and ``least``."""
    return max(least, triton.next_power_of_2(n))


ASSIGN_REGISTERS = 160  # of 128 some cases spill, and ptxas by itself goes down to 64


def kinds(dtype: torch.dtype, aligned: bool, flat: bool) -> tuple[str, ...]:
    """The kinds of rows of the table that serve ``dtype``.

    ``aligned``: rows of pixels or channels start at multiples of 16 elements; ``flat``: no gaps between rows of pixels.
    """
    kind, special = row_kind(dtype), " aligned" if aligned else "" if flat else " gaps"
    return (kind, kind + special)


def tile(row: Row, channels: int, clusters: int) -> dict[str, int]:
    """A row of the table cut to D channels and K clusters; HELD says whether the sums fit the registers."""
    t = row.tiles | {"num_warps": row.warps, "num_stages": row.stages, "registers": row.registers}
    t["BLOCK_S"] = min(t["BLOCK_S"], power(channels))
    t["BLOCK_D"] = min(t["BLOCK_D"], t["BLOCK_S"])
    t["BLOCK_K"] = power(clusters)
    t["CHUNKS"] = max(1, triton.cdiv(channels, t["BLOCK_S"]))
    sums = t["CHUNKS"] * t["BLOCK_S"] * t["BLOCK_K"]
    if t["BLOCK_K"] > t.pop("MOST_K") or t["CHUNKS"] > MOST_CHUNKS or sums > t["HELD"]:
        t |= {"HELD": 0, "BLOCK_N": 32, "BLOCK_S": min(64, t["BLOCK_S"])}
        t["BLOCK_D"] = min(16 if row.kind.startswith("fp32") else 32, t["BLOCK_S"])
        t["BLOCK_K"] = min(64, t["BLOCK_K"])
        t["CHUNKS"] = triton.cdiv(channels, t["BLOCK_S"])
        return t
    if sums > 16 << 10:
        t["BLOCK_N"] = min(32, t["BLOCK_N"])
    if t["BLOCK_K"] == 128:
        t["BLOCK_N"] = 16
    if t["BLOCK_N"] == 16 and sums > 16 << 10:
        t["BLOCK_D"] = min(16, t["BLOCK_D"])
    return t | {"HELD": 1}


def splits(batch: int, tiles: int, affordable: int, processors: int) -> int:
    """Programs a problem: the fewest that leave the least work to the last wave of programs."""
    most = max(1, min(tiles, affordable, triton.cdiv(4 * processors, max(1, batch))))
    return min(range(1, most + 1), key=lambda s: (triton.cdiv(batch * s, processors) * triton.cdiv(tiles, s), s))


class Totals(NamedTuple):
    """sums [B, K, D], counts [B, K], inertia [B] in float32 and changed int32 [B]."""

    sums: Tensor
    counts: Tensor
    inertia: Tensor
    changed: Tensor


def _totals(rows: int, clusters: int, channels: int, device: torch.device) -> Totals:
    shapes = (rows, clusters, channels), (rows, clusters), (rows,)
    sums, counts, inertia = (torch.empty(shape, dtype=torch.float32, device=device) for shape in shapes)
    return Totals(sums, counts, inertia, torch.empty(rows, dtype=torch.int32, device=device))


class Solver:
    """The launches of one batch of problems: x [B, D, N] or [B, D, H, W] where it lies, and K centroids each."""

    def __init__(
        self, x: Tensor, clusters: int, weight: Tensor | None, metric: str, precision: str, deterministic: bool
    ) -> None:
        self.x, self.K = x, clusters
        self.batch, self.D = x.shape[:2]
        self.N = math.prod(x.shape[2:])
        if self.D > WIDEST:
            raise ValueError(f"x has {self.D} channels and the Triton kernels take {WIDEST}: choose backend 'torch'.")
        if self.N >= 1 << 31:
            raise ValueError(f"x has {self.N} pixels and the Triton kernels take 2^31 - 1: choose backend 'torch'.")
        self.weight = None if weight is None else weight.to(torch.float32).contiguous()
        across = x.stride(3) if x.dim() == 4 else x.stride(2)
        width = x.shape[3] if x.dim() == 4 else self.N
        down = x.stride(2) if x.dim() == 4 else 0
        flat = width == self.N or down == width * across
        aligned = x.data_ptr() % 16 == 0 and all(stride % 16 == 0 or stride == 1 for stride in x.stride())
        self.tile = t = tile(config("kmeans_step", x.device, *kinds(x.dtype, aligned, flat)), self.D, clusters)
        self.DP = t["CHUNKS"] * t["BLOCK_S"]
        self.KP = triton.cdiv(clusters, t["BLOCK_K"]) * t["BLOCK_K"]
        short = t["BLOCK_N"] * across + t["BLOCK_S"] * x.stride(1) < 1 << 31
        self.strides = (x.stride(0), x.stride(1), 0 if flat else down, across)
        self.width = self.N if flat else width
        tiles = triton.cdiv(self.N, t["BLOCK_N"])
        affordable = int(SHARE * self.N * x.element_size() / (8 * clusters))
        self.splits = splits(self.batch, tiles, affordable, processors(x.device))
        self.turns = triton.cdiv(tiles, self.splits)
        self.splits = max(1, triton.cdiv(tiles, max(1, self.turns)))
        self.atomic = not deterministic and self.splits > 1 and bool(t["HELD"])
        self.cosine = metric == "cosine"
        self.common = {
            "FLAT": flat and short,
            "EVEN": self.D % t["BLOCK_S"] == 0,
            "WEIGHTED": weight is not None,
            "PRECISION": precision,
            "UPCAST": interpreted(),
        }
        self.m = torch.empty(self.batch, self.DP, self.KP, dtype=output_dtype(x.dtype), device=x.device)
        self.bias = torch.empty(self.batch, self.KP, dtype=torch.float32, device=x.device)
        self.mu = torch.zeros(self.batch, self.DP, dtype=torch.float32, device=x.device)
        self.labels = torch.empty(self.batch, self.N, dtype=torch.int64, device=x.device)
        rows = self.batch if self.atomic else self.batch * self.splits
        self.parts = _totals(rows, clusters, self.D, x.device)
        self.totals = self.parts if rows == self.batch else _totals(self.batch, clusters, self.D, x.device)
        if not t["HELD"]:
            self.scale = torch.empty(self.batch, self.N, dtype=torch.float32, device=x.device)

    def prepare(self, centroids: Tensor, given: bool = False) -> None:
        """Set m, bias and (unless ``given``) mu for centroids [B, K, D]."""
        blocks = {name: min(32, self.tile[name]) for name in ("BLOCK_K", "BLOCK_D")}
        _prepare[(self.batch * self.KP // blocks["BLOCK_K"],)](
            centroids, self.m, self.bias, self.mu, self.K, self.D, self.DP, self.KP, *centroids.stride(),
            COSINE=self.cosine, GIVEN=given, **blocks,
        )  # fmt: skip

    def step(self, near: Tensor | None = None, done: Tensor | None = None) -> Totals:
        """Labels and totals at what was prepared; with near and done as a step of `lloyd`."""
        t, lloyd, rows, out = self.tile, near is not None, self.batch * self.splits, self.parts
        if self.atomic:
            for part in out:
                part.zero_()
        sizes = (self.N, self.width, self.D, self.K)
        weight = out.inertia if self.weight is None else self.weight
        near_or, done_or = (out.inertia if near is None else near), (out.changed if done is None else done)
        common = self.common | {"LLOYD": lloyd}
        launch = partial(launch_options, t["num_warps"], t["num_stages"])
        if t["HELD"]:
            _step[(rows,)](
                self.x, self.m, self.bias, self.mu, weight, done_or, self.labels, near_or, *out,
                *sizes, self.splits, self.turns, *self.strides, **common, **launch(t["registers"]), COSINE=self.cosine,
                ATOMIC=self.atomic,
                **{name: t[name] for name in ("BLOCK_N", "BLOCK_D", "BLOCK_S", "BLOCK_K", "CHUNKS")},
            )  # fmt: skip
        else:
            padded = (*sizes, self.DP, self.KP, self.splits, self.turns)
            _assign[(rows,)](
                self.x, self.m, self.bias, self.mu, weight, done_or, self.labels, near_or, self.scale, out.inertia,
                out.changed, *padded, *self.strides, **common, **launch(ASSIGN_REGISTERS), COSINE=self.cosine,
                **{name: t[name] for name in ("BLOCK_N", "BLOCK_D", "BLOCK_K")},
            )  # fmt: skip
            _sum[(rows * (self.DP // t["BLOCK_S"]) * (self.KP // t["BLOCK_K"]),)](
                self.x, weight, done_or, self.labels, self.scale, out.sums, out.counts, *padded, *self.strides,
                **common, **launch(), UNIT=not (self.cosine or self.common["WEIGHTED"]),
                **{name: t[name] for name in ("BLOCK_N", "BLOCK_S", "BLOCK_K")},
            )  # fmt: skip
        if self.totals is not out:
            size = self.K * self.D
            block = min(1024, power(size))
            _reduce[(self.batch * triton.cdiv(size, block),)](
                *out, done_or, *self.totals, size, self.K, self.splits, LLOYD=lloyd, BLOCK=block
            )
        return self.totals


def kmeans_step(
    x: Tensor, centroids: Tensor, weight: Tensor | None, metric: str, precision: str, deterministic: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Labels int64 [B, N], sums [B, K, D], counts [B, K] and inertia [B] of x [B, D, N] or [B, D, H, W], not empty."""
    solver = Solver(x, centroids.shape[1], weight, metric, precision, deterministic)
    solver.prepare(centroids)
    totals = solver.step()
    return solver.labels, totals.sums, totals.counts, totals.inertia


def tune_cases(device: str = "cuda", pictures: int = 32, side: int = 64) -> Iterator[TuneCase]:
    """A step with 768 channels and 25 clusters."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(pictures, 768, side, side, device=device, dtype=dtype)
        centroids = x[:, :, 0, :25].mT.contiguous()
        sizes = product((16, 32, 64), (16, 32, 64), (64, 128), (16 << 10, 24 << 10, 32 << 10), (4, 8), (2, 3, 4))
        rows = [
            kmeans_row(kinds(dtype, aligned=True, flat=True)[-1], n, d, s, held, 128, warps, stages, 0)
            for n, d, s, held, warps, stages in sizes
            if d <= s
        ]
        yield TuneCase("kmeans_step", rows, partial(kmeans_step, x, centroids, None, "euclidean", "ieee", True))


# ---------------------------------------------------------------- ahead of time

# D, K: small, at the limits of what is held in registers, beyond them.
SHAPES = ((64, 60), (384, 60), (128, 128), (700, 25), (768, 25), (1024, 10), (1000, 25), (1024, 25), (2048, 256))
TYPICAL = {
    *((768, 25, "maps cosine"), (1024, 25, "maps cosine"), (700, 25, "gaps")),
    *((128, 128, "gaps"), (1024, 10, "gaps"), (2048, 256, "gaps")),
}

POINTERS = {
    "labels_ptr": "*i64",
    "chosen_ptr": "*i64",
    "uniform_ptr": "*fp64",
    "done_ptr": "*i32",
    "steps_ptr": "*i32",
    "changed_ptr": "*i32",
    "changed_from": "*i32",
}


class Layout(NamedTuple):
    """How the pixels of a case lie, and what is done with them."""

    unit: str  # the stride that is 1, or none
    flat: bool
    aligned: bool
    weighted: bool
    cosine: bool


LAYOUTS = {
    "maps": Layout("stride_x", True, True, False, False),
    "maps cosine": Layout("stride_x", True, True, False, True),
    "channels": Layout("stride_d", True, True, False, False),
    "channels weighted": Layout("stride_d", True, True, True, False),
    "odd": Layout("stride_d", True, False, False, False),
    "gaps": Layout("stride_x", False, False, True, True),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DEMANDING = ("maps cosine", "gaps")  # the most registers, among aligned layouts and of all


def case(
    name: str, kernel: triton.JITFunction, dtype: str, launch: dict[str, int], aligned: bool = False,
    archs: tuple[str, ...] = (), rare: bool = False, **constants: object,
) -> AotCase:  # fmt: skip
    """A case with the types that the host passes: x and m in ``dtype``, other data float32, sizes and strides i32."""
    types = POINTERS | {"x_ptr": f"*{dtype}", "m_ptr": f"*{dtype}"}
    fallback = {True: "*fp32", False: "i32"}
    signature = {
        a: types.get(a, fallback[a.endswith(("_ptr", "_from"))]) for a in kernel.arg_names if a not in constants
    }
    for a, kind in signature.items():
        ours = kind.startswith("*") and a != "x_ptr"  # allocated by the host side
        if ours or (aligned and (kind.startswith("*") or a in ("N", "DP", "KP") or a.startswith("stride"))):
            signature[a] += ":16"
    return AotCase(name, kernel, signature, constants, launch["num_warps"], launch["num_stages"], archs, rare)


def aot_cases() -> Iterator[AotCase]:
    """Every kernel, dtype and table row: demanding layouts at a shape of each class, the others at two of them."""
    for dtype, (channels, clusters), (name, layout) in product(DTYPES, SHAPES, LAYOUTS.items()):
        rare = (channels, clusters, name) not in TYPICAL
        if dtype == "fp16" and rare:
            continue  # the code of bfloat16, with one other instruction
        if name not in DEMANDING and (channels, clusters) not in ((768, 25), (2048, 256)):
            continue
        tiles: dict[Any, list[str]] = {}  # architectures by tile, shared memory of the row and whether it was measured
        for arch, most in SHARED.items():
            row = choose("kmeans_step", arch, most, kinds(DTYPES[dtype], layout.aligned, layout.flat))
            assert row is not None
            tuned = tuple(row) in TUNED.get(("kmeans_step", arch), ())
            tiles.setdefault((tuple(tile(row, channels, clusters).items()), row.shared, tuned), []).append(arch)
        for precision in ("ieee", "tf32") if dtype == "fp32" and name == "channels" else ("ieee",):
            for (items, shared, tuned), archs in tiles.items():
                name_of_row = "default" if archs[0] == next(iter(SHARED)) else archs[0]
                full = f"{name_of_row} {dtype}{' tf32' * (precision == 'tf32')} {channels}x{clusters} {name}"
                for found in _step_cases(full, dtype, dict(items), channels, layout, precision, tuple(archs), rare):
                    yield found._replace(shared=shared, tuned=tuned)
    small = {"num_warps": 4, "num_stages": 3}
    for dtype, cosine in product(("fp32", "fp16", "bf16"), (False, True)):
        name = f"kmeans prepare {dtype}{' cosine' * cosine}"
        blocks: dict[str, Any] = {"BLOCK_K": 32, "BLOCK_D": 32}
        yield case(name, _prepare, dtype, small, rare=dtype == "fp16", COSINE=cosine, GIVEN=False, **blocks)
    yield case("kmeans reduce", _reduce, "fp32", small, LLOYD=True, BLOCK=1024)


def _step_cases(
    name: str, dtype: str, t: dict[str, int], channels: int, layout: Layout, precision: str, archs: tuple[str, ...],
    rare: bool,
) -> Iterator[AotCase]:  # fmt: skip
    """The kernels of one step."""
    known: dict[str, Any] = {
        "archs": archs, "rare": rare, "FLAT": layout.flat, "EVEN": channels % t["BLOCK_S"] == 0,
        "WEIGHTED": layout.weighted, "LLOYD": True,
        "PRECISION": precision, "UPCAST": False, layout.unit: 1,
    }  # fmt: skip

    def one(which: str, kernel: triton.JITFunction, names: tuple[str, ...], **flags: Any) -> AotCase:
        blocks: dict[str, Any] = {n: t[n] for n in names}
        found = case(f"kmeans {which} {name}", kernel, dtype, t, layout.aligned, **known, **blocks, **flags)
        return found._replace(registers={"step": t["registers"], "assign": ASSIGN_REGISTERS}.get(which, 0))

    if t["HELD"]:
        blocks = ("BLOCK_N", "BLOCK_D", "BLOCK_S", "BLOCK_K", "CHUNKS")
        yield one("step", _step, blocks, COSINE=layout.cosine, ATOMIC=False)
    else:
        yield one("assign", _assign, ("BLOCK_N", "BLOCK_D", "BLOCK_K"), COSINE=layout.cosine)
        unit = not (layout.weighted or layout.cosine)
        yield one("sum", _sum, ("BLOCK_N", "BLOCK_S", "BLOCK_K"), UNIT=unit)
