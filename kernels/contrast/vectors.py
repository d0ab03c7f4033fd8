"""Kernels of the contrastive loss that treat every vector by itself, and the loads of all of its kernels.

``prepare`` comes before ``forward`` and ``gradient`` (:mod:`fgfast.kernels.contrast.tiles`), ``join``, ``inner`` and
``finish`` after them.
"""

import triton
import triton.language as tl

from fgfast.kernels.common import Constant, upcast

EPS = Constant(1e-12)
CLAMPED = Constant(0.999999e12)  # an inverse at or above this is 1 / EPS, a constant without gradient
ABSENT = Constant(-1.0)
LN2 = Constant(0.6931471805599453)
LOG2E = Constant(1.4426950408889634)
LOWEST = Constant(-(2**63))
HIGHEST = Constant(2**63 - 1)
INFINITY = Constant(float("inf"))


@triton.jit
def indices(block, N, BLOCK: tl.constexpr):
    """Indices of the vectors of a block, in int64 for the products with strides; and which of them exist."""
    n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return n, n < N


@triton.jit
def load_inverse(inverse, n, exists):
    """Inverse norms of vectors n, and which vectors are present; NaN (of a vector with NaN) is present."""
    values = tl.load(inverse + n, mask=exists, other=ABSENT)
    return values, ~(values < 0)


@triton.jit
def load_vectors(vectors, n, wanted, start, D, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Channels from ``start`` on of vectors n [N, BLOCK_D]; 0 for vectors that are not wanted, without reading them."""
    x, stride_n, stride_d = vectors
    d = start + tl.arange(0, BLOCK_D).to(tl.int64)
    mask = wanted[:, None] & (d < D)[None, :]
    return upcast(tl.load(x + n[:, None] * stride_n + d[None, :] * stride_d, mask=mask, other=0.0), UPCAST)


@triton.jit
def load_copied(copy, block, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """One block of the vectors of ``prepare``'s copy [BLOCK, BLOCK_D]: all of them exist, so that loads run ahead."""
    d = tl.arange(0, BLOCK_D)
    first = copy + tl.full([], BLOCK * CHANNELS, tl.int64) * block
    at = first + tl.arange(0, BLOCK)[:, None] * CHANNELS + d[None, :]
    if CHANNELS == BLOCK_D:
        return upcast(tl.load(at), UPCAST)
    else:
        return upcast(tl.load(at, mask=(d < CHANNELS)[None, :], other=0.0), UPCAST)


@triton.jit
def logit_scale(temperature, scale):
    """log2(e) / T; ``temperature`` points to T where it is on the device, else ``scale`` is the result."""
    if temperature is None:
        return scale
    else:
        return LOG2E / tl.load(temperature).to(tl.float32)


@triton.jit
def id_range(image, stride_image, n, present):
    """Lowest and highest image id of the present vectors; HIGHEST and LOWEST if no vector is present."""
    ids = tl.load(image + n * stride_image, mask=present, other=0).to(tl.int64)
    return tl.min(tl.where(present, ids, HIGHEST), 0), tl.max(tl.where(present, ids, LOWEST), 0)


@triton.jit
def _prepare_side(
    vectors, ids, inverse, low, high, copied, block, N, D,
    NORMALIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inverse norms and range of image ids of a block of one side; ``ids``: image, part and their strides.

    ``copied``: copy, factor and bias of all vectors, or None (:func:`prepare`).
    """
    image, part, stride_image, stride_part = ids
    n, exists = indices(block, N, BLOCK)
    present = exists
    if part is not None:
        present &= tl.load(part + n * stride_part, mask=exists, other=0).to(tl.int64) >= 0
        lowest, highest = id_range(image, stride_image, n, present)
        tl.store(low + block, lowest)
        tl.store(high + block, highest)
    copy, factor, bias = copied
    value = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE or copy is not None:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK_D):
            tile = load_vectors(vectors, n, present, start, D, BLOCK_D, False)
            if copy is not None:
                d = start + tl.arange(0, BLOCK_D)
                tl.store(copy + n[:, None] * CHANNELS + d[None, :], tile, mask=(d < CHANNELS)[None, :])
            tile = upcast(tile, UPCAST).to(tl.float32)
            squares += tl.sum(tile * tile, 1)
        if NORMALIZE:
            value = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), EPS))  # rounded correctly, as the error bound needs
    tl.store(inverse + n, tl.where(present, value, ABSENT), mask=exists)
    if copy is not None:
        tl.store(factor + n, tl.where(present, value, 1.0))
        tl.store(bias + n, tl.where(present, 0.0, -INFINITY))


@triton.jit
def prepare(
    x, x_stride_n, x_stride_d, x_image, x_part, x_stride_image, x_stride_part, x_inverse, x_low, x_high,
    x_copy, x_factor, x_bias, X,
    y, y_stride_n, y_stride_d, y_image, y_part, y_stride_image, y_stride_part, y_inverse, y_low, y_high,
    y_copy, y_factor, y_bias, Y, grad, stride_grad, lse, count, of_exp, of_positive, of_lse, D,
    NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Inverse norms [N]; low and high [blocks], the range of image ids of each block; gradient coefficients of rows.

    The first programs are for x, the others for y (or None): one launch for both.
    ``copy`` [blocks x BLOCK, CHANNELS], if not None, receives the present vectors, and zeros for absent ones, past the
    last one and in channels from D on; ``factor`` and ``bias`` the numbers of each vector for which
    s' = <x, copy_j> factor_j + bias_j is its logit, -inf where it is absent.

    With ``grad`` x holds the rows: dL/ds_ij = of_exp_i 2^(s'_ij - of_lse_i) - [j in P_i] of_positive_i. For bounded
    logits 2^-lse is part of of_exp. A row without a positive, and one past the last, gets of_exp 0, of_lse inf and
    of_positive 0.
    """
    block, blocks = tl.program_id(0), tl.cdiv(X, BLOCK)
    if block >= blocks:
        if y is not None:
            vectors, ids = (y, y_stride_n, y_stride_d), (y_image, y_part, y_stride_image, y_stride_part)
            _prepare_side(
                vectors, ids, y_inverse, y_low, y_high, (y_copy, y_factor, y_bias), block - blocks, Y, D, NORMALIZE,
                CHANNELS, BLOCK, BLOCK_D, UPCAST,
            )  # fmt: skip
    else:
        vectors, ids = (x, x_stride_n, x_stride_d), (x_image, x_part, x_stride_image, x_stride_part)
        _prepare_side(
            vectors, ids, x_inverse, x_low, x_high, (x_copy, x_factor, x_bias), block, X, D, NORMALIZE, CHANNELS, BLOCK,
            BLOCK_D, UPCAST,
        )  # fmt: skip
        if grad is not None:
            n, exists = indices(block, X, BLOCK)
            positives = tl.load(count + n, mask=exists, other=0.0)
            valid = positives > 0
            g = tl.load(grad + n * stride_grad, mask=valid, other=0.0)
            row_lse = tl.load(lse + n, mask=valid, other=INFINITY)
            if BOUNDED:
                tl.store(of_exp + n, g * tl.exp2(-row_lse))
            else:
                tl.store(of_exp + n, g)
                tl.store(of_lse + n, row_lse)
            tl.store(of_positive + n, g / tl.maximum(positives, 1.0))


@triton.jit
def store_rows(loss, lse, counts, n, exists, total, top, positives, count):
    """Loss in nats, log2-sum-exp2 and number of positives of rows; all 0 for a row without a positive."""
    valid = count > 0
    log_total = tl.log2(tl.where(valid, total, 1.0))
    tl.store(lse + n, tl.where(valid, log_total + top, 0.0), mask=exists)
    # The sum relative to the positives: a loss far below the rounding error of the logits is not lost.
    positive = positives / tl.maximum(count, 1.0) - top
    of_positive = tl.exp2(tl.maximum(positive, -50.0))
    rest = (total - of_positive) / of_positive
    near = tl.where(rest < 2**-11, rest * (1 - 0.5 * rest) / LN2, tl.log2(1.0 + rest))
    value = tl.where(positive >= -50.0, near, log_total - positive)
    tl.store(loss + n, tl.where(valid, value, 0.0) * LN2, mask=exists)
    tl.store(counts + n, count, mask=exists)


@triton.jit
def join(partial, loss, lse, counts, slots, X, BOUNDED: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Results from the sums of all slots, partial [slots, 3 or 4, X], added in order."""
    n, exists = indices(tl.program_id(0), X, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    top = total if BOUNDED else total - INFINITY
    positives, count = total, total
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS).to(tl.int64)
        mask = (slot < slots)[:, None] & exists[None, :]
        at = partial + slot[:, None] * (3 if BOUNDED else 4) * X + n[None, :]
        slot_total = tl.load(at, mask=mask, other=0.0)
        if BOUNDED:
            total += tl.sum(slot_total, 0)
        else:
            slot_top = tl.load(at + X + X + X, mask=mask, other=-INFINITY)
            higher = tl.maximum(top, tl.max(slot_top, 0))
            offset = tl.where(higher == -INFINITY, 0.0, higher)
            total = total * tl.exp2(top - offset) + tl.sum(slot_total * tl.exp2(slot_top - offset[None, :]), 0)
            top = higher
        positives += tl.sum(tl.load(at + X, mask=mask, other=0.0), 0)
        count += tl.sum(tl.load(at + X + X, mask=mask, other=0.0), 0)
    store_rows(loss, lse, counts, n, exists, total, top, positives, count)


@triton.jit
def _sum_splits(raw, n, present, start, D, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels from ``start`` on of raw [X, SPLITS, D], summed over the splits in order."""
    d = start + tl.arange(0, BLOCK_D)
    mask = present[:, None] & (d < D)[None, :]
    at = raw + (n * SPLITS)[:, None] * D + d[None, :]
    g = tl.load(at, mask=mask, other=0.0)
    for split in range(1, SPLITS):
        g += tl.load(at + split * D, mask=mask, other=0.0)
    return g


@triton.jit
def _dot_gradient(
    vectors, n, present, raw, D, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """<x, g> of vectors n, where g is raw summed over its splits."""
    along = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        tile = load_vectors(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32)
        along += tl.sum(tile * _sum_splits(raw, n, present, start, D, SPLITS, BLOCK_D), 1)
    return along


@triton.jit
def inner(
    x, x_stride_n, x_stride_d, inverse, raw, out, X, D,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T times the part of sum_ij s_ij dL/ds_ij due to each x: <u, g> of the unit vector u and its gradient g in raw."""
    n, exists = indices(tl.program_id(0), X, BLOCK)
    factor, present = load_inverse(inverse, n, exists)
    along = _dot_gradient((x, x_stride_n, x_stride_d), n, present, raw, D, SPLITS, BLOCK, BLOCK_D, UPCAST)
    tl.store(out + n, tl.where(present, along * factor, 0.0), mask=exists)


@triton.jit
def _finish_side(
    vectors, inverse, scale, raw, out, block, N, D,
    NORMALIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of one side."""
    n, exists = indices(block, N, BLOCK)
    factor, present = load_inverse(inverse, n, exists)
    along = tl.zeros([BLOCK], tl.float32)
    if NORMALIZE:
        along = _dot_gradient(vectors, n, present, raw, D, SPLITS, BLOCK, BLOCK_D, UPCAST)
        along = tl.where(factor < CLAMPED, along * factor * factor, 0.0)
    factor *= scale
    for start in range(0, D, BLOCK_D):
        g = _sum_splits(raw, n, present, start, D, SPLITS, BLOCK_D)
        if NORMALIZE:
            g -= load_vectors(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32) * along[:, None]
        g = tl.where(present[:, None], g * factor[:, None], 0.0)
        d = start + tl.arange(0, BLOCK_D)
        tl.store(out + n[:, None] * D + d[None, :], g.to(out.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])


@triton.jit
def finish(
    x, x_stride_n, x_stride_d, x_inverse, x_raw, x_out, X, y, y_stride_n, y_stride_d, y_inverse, y_raw, y_out, Y,
    temperature, scale, D, NORMALIZE: tl.constexpr, X_SPLITS: tl.constexpr, Y_SPLITS: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dL/dx [X, D] from raw [X, SPLITS, D]: sum over the splits, divide by T, and back through the normalisation.

    For the unit vector u = x inverse: dL/dx = inverse (g - u <u, g>). ``out`` may be raw. The first programs are for x,
    the others for y (or None).
    """
    block, blocks = tl.program_id(0), tl.cdiv(X, BLOCK)
    scale = logit_scale(temperature, scale) * LN2
    if block >= blocks:
        if y is not None:
            vectors = (y, y_stride_n, y_stride_d)
            _finish_side(
                vectors, y_inverse, scale, y_raw, y_out, block - blocks, Y, D, NORMALIZE, Y_SPLITS, BLOCK, BLOCK_D,
                UPCAST,
            )  # fmt: skip
    else:
        vectors = (x, x_stride_n, x_stride_d)
        _finish_side(vectors, x_inverse, scale, x_raw, x_out, block, X, D, NORMALIZE, X_SPLITS, BLOCK, BLOCK_D, UPCAST)
