"""Kernels of the gradient by chunks of the logits: :mod:`fgfast.kernels.contrast.wide` is their host side.

``copy_present`` makes the operand of products from the vectors of a chunk, ``weights`` the derivatives of the losses by
the logits of a chunk of rows x and a chunk of columns y.
"""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.contrast.tiles import counted_pairs
from fgfast.kernels.contrast.vectors import INFINITY, id_range, indices, load_inverse, load_vectors, logit_scale


@triton.jit
def copy_present(
    x, x_stride_n, x_stride_d, x_inverse, out, X, D, width,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Vectors x into out [blocks x BLOCK, width]: zeros for absent ones, whatever they hold, and past channel D."""
    n, exists = indices(tl.program_id(0), X, BLOCK)
    _, present = load_inverse(x_inverse, n, exists)
    for start in range(0, width, BLOCK_D):
        tile = load_vectors((x, x_stride_n, x_stride_d), n, present, start, D, BLOCK_D, UPCAST)
        d = start + tl.arange(0, BLOCK_D)
        tl.store(out + n[:, None] * width + d[None, :], tile.to(out.dtype.element_ty), mask=(d < width)[None, :])


@triton.jit
def _load_tile(vectors, n, exists, start, D, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Channels from ``start`` on of vectors n; what does not exist is 0.

    A mask that depends on a load, such as of the vectors present, would keep copies from being asynchronous.
    """
    x, stride_n, stride_d = vectors
    d = start + tl.arange(0, BLOCK_D)
    at = x + n[:, None] * stride_n + d.to(tl.int64)[None, :] * stride_d
    return upcast(tl.load(at, mask=exists[:, None] & (d < D)[None, :], other=0.0), UPCAST)


@triton.jit
def _halves(tile):
    """The left and the right half of the columns of a tile: of registers only, where a thread has both."""
    X: tl.constexpr = tile.shape[0]
    Y: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, [X, 2, Y // 2]), (0, 2, 1)))


@triton.jit
def _pair_coefficients(of_x, x_n, x_exists, of_y, y_n, y_exists):
    """Coefficients of the pairs of a tile: those of the row x, and of the column y where it is a row too."""
    pair = tl.load(of_x + x_n, mask=x_exists, other=0.0)[:, None]
    if of_y is not None:
        pair += tl.load(of_y + y_n, mask=y_exists, other=0.0)[None, :]
    return pair


@triton.jit
def _store_weights(
    s, x_n, x_exists, x_inverse, x_present, x_factor, x_ids, first, Y, y_inverse, y_ids, coefficients, of_rows,
    of_columns, width,
    COMPARE_IDS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The weights of a tile of inner products s, BLOCK_S columns at a time, as registers for all would not suffice."""
    if s.shape[1] > BLOCK_S:
        left, right = _halves(s)
        _store_weights(
            left, x_n, x_exists, x_inverse, x_present, x_factor, x_ids, first, Y, y_inverse, y_ids, coefficients,
            of_rows, of_columns, width, COMPARE_IDS, NEGATIVES, BOUNDED, BLOCK_S,
        )  # fmt: skip
        _store_weights(
            right, x_n, x_exists, x_inverse, x_present, x_factor, x_ids, first + s.shape[1] // 2, Y, y_inverse, y_ids,
            coefficients, of_rows, of_columns, width, COMPARE_IDS, NEGATIVES, BOUNDED, BLOCK_S,
        )  # fmt: skip
    else:
        x_exp, x_positive, x_lse, y_exp, y_positive = coefficients
        y_n = (first + tl.arange(0, s.shape[1])).to(tl.int64)
        y_exists = y_n < Y
        inverse, y_present = load_inverse(y_inverse, y_n, y_exists)
        s = s * x_factor[:, None] * inverse[None, :]
        if COMPARE_IDS:
            positive, counted = counted_pairs(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        else:
            counted = x_present[:, None] & y_present[None, :]
        s = tl.where(counted, s, -INFINITY)
        if not BOUNDED:
            tl.static_assert(y_exp is None, "unbounded logits need two exponentials per pair")
            s -= tl.load(x_lse + x_n, mask=x_exists, other=INFINITY)[:, None]
        w = tl.exp2(s) * _pair_coefficients(x_exp, x_n, x_exists, y_exp, y_n, y_exists)
        if COMPARE_IDS:
            w -= tl.where(positive, _pair_coefficients(x_positive, x_n, x_exists, y_positive, y_n, y_exists), 0.0)
        at = x_n.to(tl.int32)[:, None] * width + y_n.to(tl.int32)[None, :]
        if of_rows is not None:
            tl.store(of_rows + at, (w * inverse[None, :]).to(of_rows.dtype.element_ty))
        if of_columns is not None:
            tl.store(of_columns + at, (w * x_inverse[:, None]).to(of_columns.dtype.element_ty))


@triton.jit
def weights(
    x, x_stride_n, x_stride_d, x_inverse, x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view,
    y, y_stride_n, y_stride_d, y_inverse, y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view,
    x_exp, x_positive, x_lse, y_exp, y_positive, temperature, scale, logits, of_rows, of_columns, width, X, Y, D,
    NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W_ij = dL/ds_ij of rows x and columns y; of_rows [X, Y]: W_ij inverse_j, of_columns: W_ij inverse_i; or None.

    With coefficients of the columns, which are rows too, W_ij = dL/ds_ij + dL/ds_ji. Rows of the results have ``width``
    numbers and are padded to whole tiles. ``logits``: <x_i, y_j> in such rows (may be of_rows), None to multiply here.
    """
    x_n, x_exists = indices(tl.program_id(0), X, BLOCK_X)
    y_n, y_exists = indices(tl.program_id(1), Y, BLOCK_Y)
    if logits is None:
        of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
        s = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        for start in range(0, D, BLOCK_D):
            x_tile = _load_tile(of_x, x_n, x_exists, start, D, BLOCK_D, UPCAST)
            y_tile = _load_tile(of_y, y_n, y_exists, start, D, BLOCK_D, UPCAST)
            s = tl.dot(x_tile, tl.trans(y_tile), s)
    else:
        at = x_n.to(tl.int32)[:, None] * width + y_n.to(tl.int32)[None, :]
        s = tl.load(logits + at, mask=x_exists[:, None] & y_exists[None, :], other=0.0)

    inverse, present = load_inverse(x_inverse, x_n, x_exists)
    factor = inverse * logit_scale(temperature, scale)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    coefficients = (x_exp, x_positive, x_lse, y_exp, y_positive)
    HAVE_IDS: tl.constexpr = x_image is not None and y_image is not None
    tl.static_assert(NEGATIVES != "same_image" or not HAVE_IDS, "pairs without a common image would need products")
    compare_ids = False
    if HAVE_IDS:
        _, y_present = load_inverse(y_inverse, y_n, y_exists)
        x_low, x_high = id_range(x_image, x_stride_image, x_n, present)
        y_low, y_high = id_range(y_image, y_stride_image, y_n, y_present)
        compare_ids = (x_low <= y_high) & (y_low <= x_high)
    first = tl.program_id(1) * BLOCK_Y
    if compare_ids:
        _store_weights(
            s, x_n, x_exists, inverse, present, factor, x_ids, first, Y, y_inverse, y_ids, coefficients, of_rows,
            of_columns, width, HAVE_IDS, NEGATIVES, BOUNDED, BLOCK_S,
        )  # fmt: skip
    else:
        _store_weights(
            s, x_n, x_exists, inverse, present, factor, x_ids, first, Y, y_inverse, y_ids, coefficients, of_rows,
            of_columns, width, False, NEGATIVES, BOUNDED, BLOCK_S,
        )  # fmt: skip
