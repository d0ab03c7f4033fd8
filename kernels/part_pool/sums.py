"""Kernels of part pooling: sums or means, also of small maps that are read in runs."""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.part_pool.tiles import one_hot_dot, part_ids, pixel_offset


@triton.jit
def _sum_parts(
    x, labels, weight, d, k, first, last, D, K, WIDTH,
    x_d, x_y, x_x, l_y, l_x, w_y, w_x,
    SELECT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_D, BLOCK_K] and areas [BLOCK_K] over pixels first to last.

    Without SELECT a value that is not finite makes its channel NaN in every part. With it only the sum of its own part
    becomes NaN.
    """
    sums = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    bad_sums = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    areas = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        ids = part_ids(labels, pixel_offset(p, WIDTH, l_y, l_x, FLAT, WIDE), inside, K)
        channels = (d.to(tl.int64) if WIDE else d)[:, None] * x_d
        tile = x + channels + pixel_offset(p, WIDTH, x_y, x_x, FLAT, WIDE)[None, :]
        values = upcast(tl.load(tile, mask=(d < D)[:, None] & inside[None, :], other=0.0), UPCAST)
        hot = ids[:, None] == k[None, :]
        if WEIGHTED:
            w = tl.load(weight + pixel_offset(p, WIDTH, w_y, w_x, FLAT, WIDE), mask=inside, other=0.0).to(tl.float32)
            hot = hot & (w > 0)[:, None]
            areas += tl.where(hot, w[:, None], 0.0)
        else:
            areas += hot.to(tl.float32)
        if SELECT:
            bad = ~(tl.abs(values.to(tl.float32)) < float("inf"))
            values = tl.where(bad, 0.0, values)
            narrow: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
            bad_sums = tl.dot(bad.to(narrow), hot.to(narrow), bad_sums)
        if WEIGHTED:
            values = values.to(tl.float32) * w[None, :]
        sums = one_hot_dot(values, hot, sums, UPCAST)
    if SELECT:
        sums = tl.where(bad_sums > 0, float("nan"), sums)
    return sums, tl.sum(areas, 0)


@triton.jit
def pool(
    x, labels, weight, pooled, area, split, B, image, d_block, k_block, first, last, D, K, WIDTH,
    x_d, x_y, x_x, l_y, l_x, w_y, w_x,
    MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled [splits, B, K, D] and area of pixels first to last, for a block of channels and a block of parts."""
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    sums, areas = _sum_parts(
        x, labels, weight, d, k, first, last, D, K, WIDTH, x_d, x_y, x_x, l_y, l_x, w_y, w_x,
        False, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    # Over both axes at once: reducing one after the other fails in the compiler of Triton 3.6 for sm_100.
    if tl.max(tl.where(tl.abs(sums) < float("inf"), 0, 1)) > 0:
        # Rare, hence narrow tiles: with wide ones this loop would take half of the registers of the loop above.
        sums, _ = _sum_parts(
            x, labels, weight, d, k, first, last, D, K, WIDTH, x_d, x_y, x_x, l_y, l_x, w_y, w_x,
            True, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, 16, BLOCK_K,
        )  # fmt: skip
    if MEAN:
        sums = sums / tl.where(areas > 0, areas, 1.0)[None, :]
    row = (split * B + image) * K + k
    tl.store(pooled + row[None, :] * D + d[:, None], sums, mask=(d < D)[:, None] & (k < K)[None, :])
    if d_block == 0:
        tl.store(area + row, areas, mask=k < K)


@triton.jit
def forward_kernel(
    x, labels, weight, pooled, area, B, D, K, N, WIDTH, chunk, splits,
    x_b, x_d, x_y, x_x, l_b, l_y, l_x, w_b, w_y, w_x,
    MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled [splits, B, K, D] and area [splits, B, K] of the pixels of each split.

    N and the strides of images and channels are multiples of ALIGN.
    """
    N, x_b, x_d = N // ALIGN * ALIGN, x_b // ALIGN * ALIGN, x_d // ALIGN * ALIGN
    program, d_block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    program, k_block = program // tl.cdiv(K, BLOCK_K), program % tl.cdiv(K, BLOCK_K)
    image, split = (program // splits).to(tl.int64), program % splits
    first = split * chunk
    last = tl.minimum(first + chunk, N)
    pool(
        x + image * x_b, labels + image * l_b, weight + image * w_b, pooled, area, split, B, image,
        d_block, k_block, first, last, D, K, WIDTH, x_d, x_y, x_x, l_y, l_x, w_y, w_x,
        MEAN, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _runs_of_channels(x, first, D, N, c, g, q, V: tl.constexpr, UPCAST: tl.constexpr):
    """Values [V, G, BLOCK_P] of channels first + c + V g of an image [D, N] without gaps, D a multiple of V.

    Channel c starts (c N) mod V elements after an address that is a multiple of V of them, whatever g is. There its row
    begins: before and after the channel stand numbers of its neighbours.
    """
    begin = c * N // V * V
    end = (c * N + N + V - 1) // V * V
    at = first * N + g[None, :] * (V * N) + begin[:, None]
    mask = (q[None, :] < (end - begin)[:, None])[:, None, :] & (first + g * V < D)[None, :, None]
    return upcast(tl.load(x + at[:, :, None] + q[None, None, :], mask=mask, other=0.0), UPCAST)


@triton.jit
def pool_runs(
    x, labels, weight, pooled, area, first, last, store_area, D, K, N, WIDTH, l_y, l_x, w_y, w_x,
    MEAN: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled [K, D] and area [K] of channels first to last of an image of at most BLOCK_P - V + 1 pixels.

    V products in one batch, one for each alignment of a channel: labels are aligned as its pixels are.
    """
    c = tl.arange(0, V)
    g = tl.arange(0, BLOCK_D // V)
    q = tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    p = q[None, :] - (c * N % V)[:, None]
    inside = (p >= 0) & (p < N)
    ids = part_ids(labels, p * l_x, inside, K)
    hot = ids[:, :, None] == k[None, None, :]
    counts = hot.to(tl.float32)
    if WEIGHTED:
        w = tl.load(weight + p * w_x, mask=inside, other=0.0).to(tl.float32)
        hot = hot & (w > 0)[:, :, None]
        counts = tl.where(hot, w[:, :, None], 0.0)
    areas = tl.sum(tl.sum(tl.where((c == 0)[:, None, None], counts, 0.0), 1), 0)
    if store_area:
        tl.store(area + k, areas, mask=k < K)
    divisor = tl.where(areas > 0, areas, 1.0)
    bad = tl.zeros([V, BLOCK_D // V, BLOCK_K], tl.int32)
    for start in range(first, last, BLOCK_D):
        values = _runs_of_channels(x, start, D, N, c, g, q, V, UPCAST)
        if WEIGHTED:
            values = values.to(tl.float32) * w[:, None, :]
        sums = one_hot_dot(values, hot, tl.zeros([V, BLOCK_D // V, BLOCK_K], tl.float32), UPCAST)
        bad |= tl.where(tl.abs(sums) < float("inf"), 0, 1)
        if MEAN:
            sums = sums / divisor[None, None, :]
        d = start + c[:, None] + V * g[None, :]
        tl.store(pooled + k[None, None, :] * D + d[:, :, None], sums, mask=(d < D)[:, :, None] & (k < K)[None, None, :])
    if tl.max(bad) > 0:  # rare: again, each channel by itself
        for start in range(first, last, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            sums, _ = _sum_parts(
                x, labels, weight, d, k, 0, N, D, K, WIDTH, N, WIDTH, 1, l_y, l_x, w_y, w_x,
                True, True, False, WEIGHTED, UPCAST, BLOCK_D, 16, BLOCK_K,
            )  # fmt: skip
            if MEAN:
                sums = sums / divisor[None, :]
            tl.store(pooled + k[None, :] * D + d[:, None], sums, mask=(d < D)[:, None] & (k < K)[None, :])


@triton.jit
def runs_kernel(
    x, labels, weight, pooled, area, D, K, N, WIDTH, group_blocks,
    x_b, l_b, l_y, l_x, w_b, w_y, w_x,
    MEAN: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled [B, K, D] and area [B, K] of small maps [B, D, N]; a program has ``group_blocks`` blocks of channels.

    There are no gaps within an image, and strides of images are multiples of V.
    """
    groups = tl.cdiv(tl.cdiv(D, BLOCK_D), group_blocks)
    image, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    first = group * group_blocks * BLOCK_D
    pool_runs(
        x + image * (x_b // V * V), labels + image * l_b, weight + image * w_b,
        pooled + image * K * D, area + image * K, first, tl.minimum(first + group_blocks * BLOCK_D, D), group == 0,
        D, K, N, WIDTH, l_y, l_x, w_y, w_x,
        MEAN, WEIGHTED, UPCAST, V, BLOCK_D, BLOCK_P, BLOCK_K,
    )  # fmt: skip


@triton.jit
def join_kernel(
    parts, areas, pooled, area, B, D, K, splits,
    MEAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [splits, B, K, D] and areas [splits, B, K] added over splits in order."""
    program, d_block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    image, k_block = (program // tl.cdiv(K, BLOCK_K)).to(tl.int64), program % tl.cdiv(K, BLOCK_K)
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = (k < K)[:, None] & (d < D)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    for split in range(splits):
        row = (split * B + image) * K + k
        total += tl.load(parts + row[:, None] * D + d[None, :], mask=tile, other=0.0)
        count += tl.load(areas + row, mask=k < K, other=0.0)
    if MEAN:
        total = total / tl.where(count > 0, count, 1.0)[:, None]
    row = image * K + k
    tl.store(pooled + row[:, None] * D + d[None, :], total, mask=tile)
    if d_block == 0:
        tl.store(area + row, count, mask=k < K)
