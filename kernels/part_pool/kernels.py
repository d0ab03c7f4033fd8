"""Kernels of part pooling: sums, gradient and votes, in one file because they call the same tile functions."""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast


@triton.jit
def _pixel_offset(p, WIDTH, stride_y, stride_x, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offset of pixel p within its image; FLAT: no gaps between rows; WIDE: in int64."""
    if FLAT:
        return (p.to(tl.int64) if WIDE else p) * stride_x
    y, x = p // WIDTH, p % WIDTH
    return (y.to(tl.int64) if WIDE else y) * stride_y + (x.to(tl.int64) if WIDE else x) * stride_x


@triton.jit
def _part_ids(labels, offsets, inside, K):
    """Part of each pixel, -1 for none; compared in int64, because narrowing could turn a large id into a part."""
    ids = tl.load(labels + offsets, mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (ids >= 0) & (ids < K), ids, -1).to(tl.int32)


@triton.jit
def _truncate(x):
    """Float32 x truncated to the 8 leading bits of its significand, which a bfloat16 holds."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _one_hot_dot(x, hot, sums, UPCAST: tl.constexpr):
    """Sums + x @ hot. A float32 is the exact sum of three bfloat16, so products on tensor cores are exact too."""
    if x.dtype == tl.float32:
        narrow: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16  # the interpreter has no bfloat16
        hot = hot.to(narrow)
        high = _truncate(x)
        middle = _truncate(x - high)
        sums = tl.dot((x - high - middle).to(narrow), hot, sums)
        sums = tl.dot(middle.to(narrow), hot, sums)
        return tl.dot(high.to(narrow), hot, sums)
    return tl.dot(x, hot.to(x.dtype), sums)


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
        ids = _part_ids(labels, _pixel_offset(p, WIDTH, l_y, l_x, FLAT, WIDE), inside, K)
        channels = (d.to(tl.int64) if WIDE else d)[:, None] * x_d
        tile = x + channels + _pixel_offset(p, WIDTH, x_y, x_x, FLAT, WIDE)[None, :]
        values = upcast(tl.load(tile, mask=(d < D)[:, None] & inside[None, :], other=0.0), UPCAST)
        hot = ids[:, None] == k[None, :]
        if WEIGHTED:
            w = tl.load(weight + _pixel_offset(p, WIDTH, w_y, w_x, FLAT, WIDE), mask=inside, other=0.0).to(tl.float32)
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
        sums = _one_hot_dot(values, hot, sums, UPCAST)
    if SELECT:
        sums = tl.where(bad_sums > 0, float("nan"), sums)
    return sums, tl.sum(areas, 0)


@triton.jit
def _pool(
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
    _pool(
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
def _pool_runs(
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
    ids = _part_ids(labels, p * l_x, inside, K)
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
        sums = _one_hot_dot(values, hot, tl.zeros([V, BLOCK_D // V, BLOCK_K], tl.float32), UPCAST)
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
    _pool_runs(
        x + image * (x_b // V * V), labels + image * l_b, weight + image * w_b,
        pooled + image * K * D, area + image * K, first, tl.minimum(first + group_blocks * BLOCK_D, D), group == 0,
        D, K, N, WIDTH, l_y, l_x, w_y, w_x,
        MEAN, WEIGHTED, UPCAST, V, BLOCK_D, BLOCK_P, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _vote(
    labels, grid, first, cells, H, W, K, height, width, tallest, widest, l_y, l_x,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Majority ids of BLOCK_J adaptive-pooling cells of an image, from cell ``first`` on, to its grid.

    No cell is taller than ``tallest`` or wider than ``widest``. An iteration reads BLOCK_X pixels of a row of each
    cell; unrolling by two overlaps the loads of two iterations.
    """
    cell = first + tl.arange(0, BLOCK_J).to(tl.int64)
    i, j = cell // width, cell % width
    top, bottom = i * H // height, tl.minimum(((i + 1) * H + height - 1) // height, H)
    left, right = j * W // width, tl.minimum(((j + 1) * W + width - 1) // width, W)
    bottom = tl.where(cell < cells, bottom, top)
    across = tl.cdiv(widest, BLOCK_X)
    most = tl.zeros([BLOCK_J], tl.int32)
    winner = tl.full([BLOCK_J], -1, tl.int64)
    for part in range(0, K, BLOCK_V):
        k = part + tl.arange(0, BLOCK_V)
        votes = tl.zeros([BLOCK_J, BLOCK_X, BLOCK_V], tl.int32)
        for turn in tl.range(0, tallest * across, loop_unroll_factor=2):
            y = top + turn // across
            x = left[:, None] + turn % across * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
            ids = _part_ids(labels, y[:, None] * l_y + x * l_x, (y < bottom)[:, None] & (x < right[:, None]), K)
            votes += (ids[:, :, None] == k[None, None, :]).to(tl.int32)
        count = tl.sum(votes, 1)
        best = tl.max(count, 1)
        lowest = tl.min(tl.where(count == best[:, None], k[None, :], K), 1)
        winner = tl.where(best > most, lowest, winner)
        most = tl.maximum(best, most)
    tl.store(grid + cell, winner, mask=cell < cells)


@triton.jit
def map_kernel(
    x, labels, grid, weight, pooled, area, B, D, K, N, WIDTH, group_blocks, H, W, height, tallest, widest,
    x_b, x_d, x_y, x_x, l_b, l_y, l_x, w_b, w_y, w_x,
    MEAN: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Pooled [B, K, D] and area [B, K] by the majority of id maps [B, H, W]; pixels are evenly spaced.

    A program computes the full grid of an image, stores its own copy in grid [groups, B, N], and pools
    ``group_blocks`` blocks of channels by it.
    """
    N, x_b, x_d = N // ALIGN * ALIGN, x_b // ALIGN * ALIGN, x_d // ALIGN * ALIGN  # as in `forward_kernel`
    blocks = tl.cdiv(D, BLOCK_D)
    groups = tl.cdiv(blocks, group_blocks)
    image, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    grid += (group * B + image) * N
    for first in range(0, N, BLOCK_J):
        _vote(
            labels + image * l_b, grid, first, N, H, W, K, height, WIDTH, tallest, widest, l_y, l_x,
            BLOCK_J, BLOCK_X, BLOCK_V,
        )  # fmt: skip
    tl.debug_barrier()  # the code below reads cells written by other threads of this program
    first = group * group_blocks
    last = tl.minimum(first + group_blocks, blocks)
    if V > 0:
        _pool_runs(
            x + image * (x_b // V * V), grid, weight + image * w_b, pooled + image * K * D, area + image * K,
            first * BLOCK_D, tl.minimum(last * BLOCK_D, D), group == 0, D, K, N, WIDTH, WIDTH, 1, w_y, w_x,
            MEAN, WEIGHTED, UPCAST, V, BLOCK_D, BLOCK_P, BLOCK_K,
        )  # fmt: skip
    else:
        # Without hoisting, offsets of pixels are recomputed for each block: keeping them would take 40 more registers.
        for d_block in tl.range(first, last, disable_licm=True):
            _pool(
                x + image * x_b, grid, weight + image * w_b, pooled, area, 0, B, image,
                d_block, 0, 0, N, D, K, WIDTH, x_d, x_y, x_x, WIDTH, 1, w_y, w_x,
                MEAN, True, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P, BLOCK_K,
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


@triton.jit
def _write_gradients(
    grad, rows, labels, weight, area, out, d, k, first, last, D, K, WIDTH,
    g_k, g_d, l_y, l_x, w_y, w_x, o_d, o_y, o_x,
    LOAD: tl.constexpr, MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the gradients of pixels first to last: a one-hot product with rows [BLOCK_D, BLOCK_K], or loads (LOAD).

    Without weights the rows of the product are already divided by the area.
    """
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        ids = _part_ids(labels, _pixel_offset(p, WIDTH, l_y, l_x, FLAT, WIDE), inside, K)
        scale = tl.full([BLOCK_P], 1.0, tl.float32)
        if WEIGHTED:
            at = weight + _pixel_offset(p, WIDTH, w_y, w_x, FLAT, WIDE)
            scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            ids = tl.where(scale > 0, ids, -1)
        if MEAN and (LOAD or WEIGHTED):
            scale = scale / tl.load(area + ids, mask=ids >= 0, other=1.0)
        if LOAD:
            at = grad + d.to(tl.int64)[:, None] * g_d + ids.to(tl.int64)[None, :] * g_k
            values = upcast(tl.load(at, mask=(d < D)[:, None] & (ids >= 0)[None, :], other=0.0), UPCAST).to(tl.float32)
        else:
            hot = k[:, None] == ids[None, :]
            values = _one_hot_dot(rows, hot, tl.zeros([BLOCK_D, BLOCK_P], tl.float32), UPCAST)
        if LOAD or WEIGHTED:
            values = tl.where((ids >= 0)[None, :], values * scale[None, :], 0.0)
        across = (d.to(tl.int64) if WIDE else d)[:, None] * o_d
        at = out + across + _pixel_offset(p, WIDTH, o_y, o_x, FLAT, WIDE)[None, :]
        tl.store(at, values, mask=(d < D)[:, None] & inside[None, :])


@triton.jit
def backward_kernel(
    grad, labels, weight, area, out, D, K, N, WIDTH, chunk, splits,
    g_b, g_k, g_d, l_b, l_y, l_x, w_b, w_y, w_x, o_b, o_d, o_y, o_x,
    MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the features: each pixel gets that of its part.

    With more than BLOCK_K parts, or values that are not finite and would spread in a product, elements are loaded.
    """
    N, o_b, o_d = N // ALIGN * ALIGN, o_b // ALIGN * ALIGN, o_d // ALIGN * ALIGN  # as in the forward pass
    program, d_block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    image, split = (program // splits).to(tl.int64), program % splits
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    first = split * chunk
    last = tl.minimum(first + chunk, N)
    grad += image * g_b
    labels += image * l_b
    weight += image * w_b
    area += image * K
    out += image * o_b
    at = grad + d.to(tl.int64)[:, None] * g_d + k.to(tl.int64)[None, :] * g_k
    rows = upcast(tl.load(at, mask=(d < D)[:, None] & (k < K)[None, :], other=0.0), UPCAST)
    if MEAN and not WEIGHTED:
        areas = tl.load(area + k, mask=k < K, other=1.0)
        scaled = rows.to(tl.float32) * (1.0 / tl.where(areas > 0, areas, 1.0))[None, :]
        rows = scaled if UPCAST else scaled.to(rows.dtype)  # rounded once: each pixel gets one of these values
    nonfinite = tl.max(tl.max(tl.where(tl.abs(rows.to(tl.float32)) < float("inf"), 0, 1), 0), 0)
    if (nonfinite > 0) | (K > BLOCK_K):
        _write_gradients(
            grad, rows, labels, weight, area, out, d, k, first, last, D, K, WIDTH,
            g_k, g_d, l_y, l_x, w_y, w_x, o_d, o_y, o_x, True, MEAN, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P,
        )  # fmt: skip
    else:
        _write_gradients(
            grad, rows, labels, weight, area, out, d, k, first, last, D, K, WIDTH,
            g_k, g_d, l_y, l_x, w_y, w_x, o_d, o_y, o_x, False, MEAN, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P,
        )  # fmt: skip


@triton.jit
def grid_kernel(
    labels, grid, cells, H, W, K, height, width, tallest, widest, l_b, l_y, l_x,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Majority ids of BLOCK_J cells of an image."""
    image, block = (
        (tl.program_id(0) // tl.cdiv(cells, BLOCK_J)).to(tl.int64),
        tl.program_id(0) % tl.cdiv(cells, BLOCK_J),
    )
    _vote(
        labels + image * l_b, grid + image * cells, block.to(tl.int64) * BLOCK_J, cells,
        H, W, K, height, width, tallest, widest, l_y, l_x, BLOCK_J, BLOCK_X, BLOCK_V,
    )  # fmt: skip
