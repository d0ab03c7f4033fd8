"""Kernels of the gradient of part pooling."""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.part_pool.tiles import one_hot_dot, part_ids, pixel_offset


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
        ids = part_ids(labels, pixel_offset(p, WIDTH, l_y, l_x, FLAT, WIDE), inside, K)
        scale = tl.full([BLOCK_P], 1.0, tl.float32)
        if WEIGHTED:
            at = weight + pixel_offset(p, WIDTH, w_y, w_x, FLAT, WIDE)
            scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            ids = tl.where(scale > 0, ids, -1)
        if MEAN and (LOAD or WEIGHTED):
            scale = scale / tl.load(area + ids, mask=ids >= 0, other=1.0)
        if LOAD:
            at = grad + d.to(tl.int64)[:, None] * g_d + ids.to(tl.int64)[None, :] * g_k
            values = upcast(tl.load(at, mask=(d < D)[:, None] & (ids >= 0)[None, :], other=0.0), UPCAST).to(tl.float32)
        else:
            hot = k[:, None] == ids[None, :]
            values = one_hot_dot(rows, hot, tl.zeros([BLOCK_D, BLOCK_P], tl.float32), UPCAST)
        if LOAD or WEIGHTED:
            values = tl.where((ids >= 0)[None, :], values * scale[None, :], 0.0)
        across = (d.to(tl.int64) if WIDE else d)[:, None] * o_d
        at = out + across + pixel_offset(p, WIDTH, o_y, o_x, FLAT, WIDE)[None, :]
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
def runs_backward_kernel(
    grad, labels, weight, area, out, D, K, N, WIDTH, group_blocks, g_b, g_k, g_d, l_b, l_y, l_x, o_b,
    MEAN: tl.constexpr, UPCAST: tl.constexpr,
    V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of small maps [B, D, N] without weights, in runs of V elements; layout and programs of `runs_kernel`.

    A run belongs to the channel of its first element; its last ones may belong to the next channel, hence two products.
    """
    groups = tl.cdiv(tl.cdiv(D, BLOCK_D), group_blocks)
    image, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    grad, labels, area = grad + image * g_b, labels + image * l_b, area + image * K
    out += image * (o_b // V * V)
    begin_d = group * group_blocks * BLOCK_D
    end_d = tl.minimum(begin_d + group_blocks * BLOCK_D, D)
    c = tl.arange(0, V)
    g = tl.arange(0, BLOCK_D // V)
    q = tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    begin = (c * N + V - 1) // V * V
    length = (c * N + N + V - 1) // V * V - begin
    p = q[None, :] + (begin - c * N)[:, None]
    ids = part_ids(labels, tl.where(p < N, p, p - N) * l_x, q[None, :] < length[:, None], K)
    own = k[None, :, None] == tl.where(p < N, ids, -1)[:, None, :]
    following = k[None, :, None] == tl.where(p < N, -1, ids)[:, None, :]
    factor = tl.full([BLOCK_K], 1.0, tl.float32)
    if MEAN:
        areas = tl.load(area + k, mask=k < K, other=1.0)
        factor = 1.0 / tl.where(areas > 0, areas, 1.0)
    bad = tl.zeros([V, BLOCK_D // V, BLOCK_K], tl.int32)
    for first in range(begin_d, end_d, BLOCK_D):
        d = first + c[:, None] + V * g[None, :]
        values = tl.zeros([V, BLOCK_D // V, BLOCK_P], tl.float32)
        for j in tl.static_range(2):
            at = grad + (d + j).to(tl.int64)[:, :, None] * g_d + k.to(tl.int64)[None, None, :] * g_k
            rows = upcast(tl.load(at, mask=(d + j < D)[:, :, None] & (k < K)[None, None, :], other=0.0), UPCAST)
            scaled = rows.to(tl.float32) * factor[None, None, :]
            bad |= tl.where(tl.abs(scaled) < float("inf"), 0, 1)
            values = one_hot_dot(scaled.to(rows.dtype), following if j else own, values, UPCAST)
        at = out + first * N + g[None, :] * (V * N) + begin[:, None]
        mask = (q[None, :] < length[:, None])[:, None, :] & (first + g * V < D)[None, :, None]
        tl.store(at[:, :, None] + q[None, None, :], values, mask=mask)
    if tl.max(bad) > 0:  # rare: again, by loads
        for first in range(begin_d, end_d, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D)
            _write_gradients(
                grad, factor, labels, weight, area, out, d, k, 0, N, D, K, WIDTH, g_k, g_d, l_y, l_x, 0, 0, N, WIDTH, 1,
                True, MEAN, True, False, False, UPCAST, BLOCK_D, 16,
            )  # fmt: skip
