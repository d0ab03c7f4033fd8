"""The kernel of the gradients of one side (names and layout: :mod:`fgfast.kernels.contrast.tiles`)."""

import triton
import triton.language as tl

from fgfast.kernels.contrast.tiles import (
    add_product,
    any_present,
    counted_pairs,
    keep_range,
    may_overlap,
    multiply,
    overlapping_blocks,
    scale_tile,
    uniform_bounds,
)
from fgfast.kernels.contrast.vectors import (
    INFINITY,
    id_range,
    indices,
    load_copied,
    load_inverse,
    load_vectors,
    logit_scale,
)


@triton.jit
def _pair_coefficients(values, x_n, x_present, y_n, y_present, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr):
    """Coefficients of the pairs of a tile: those of the row x (X_ROWS), of the row y (Y_ROWS), or their sum.

    They are 0 for absent rows y; y_present None: all of the block may be read, as ``prepare`` fills whole blocks.
    """
    if Y_ROWS:
        if y_present is None:
            pair = tl.load(values + y_n)[None, :]
        else:
            pair = tl.load(values + y_n, mask=y_present, other=0.0)[None, :]
        if X_ROWS:
            pair += tl.load(values + x_n, mask=x_present, other=0.0)[:, None]
        return pair
    else:
        return tl.load(values + x_n, mask=x_present, other=0.0)[:, None]


@triton.jit
def _gradient_tile(
    x_tile, x, x_n, x_present, x_factor, x_ids, y, copied, y_block, Y, y_inverse, y_ids, coefficients, acc, raw, D,
    COMPARE_IDS: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, NEGATIVES: tl.constexpr,
    BOUNDED: tl.constexpr, SPLITS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one block of y to the gradient of the program's vectors; ids are compared only with COMPARE_IDS."""
    of_exp, of_positive, of_lse = coefficients
    y_n, y_exists = indices(y_block, Y, BLOCK_Y)
    _, y_present = load_inverse(y_inverse, y_n, y_exists)
    y_tile = None
    if copied[0] is not None:
        y_tile = load_copied(copied[0], y_block, CHANNELS, BLOCK_Y, BLOCK_D, UPCAST)
    elif WHOLE:
        y_tile = load_vectors(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
    s = multiply(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    # Bounded weights are finite, and absent vectors are 0 in the products below.
    s, factor = scale_tile(s, x_factor, None, copied, y_block, Y, y_inverse, not BOUNDED, BLOCK_Y)
    if COMPARE_IDS:
        positive, counted = counted_pairs(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        s = tl.where(counted, s, -INFINITY)

    rows, rows_present = y_n, y_present
    if copied[0] is not None:
        rows, rows_present = y_block * BLOCK_Y + tl.arange(0, BLOCK_Y), None
    if BOUNDED:
        w = tl.exp2(s) * _pair_coefficients(of_exp, x_n, x_present, rows, rows_present, X_ROWS, Y_ROWS)
    else:
        tl.static_assert(X_ROWS != Y_ROWS, "unbounded logits need two exponentials per pair: launch once for each side")
        row_lse = _pair_coefficients(of_lse, x_n, x_present, rows, rows_present, X_ROWS, Y_ROWS)
        w = tl.exp2(s - row_lse) * _pair_coefficients(of_exp, x_n, x_present, rows, rows_present, X_ROWS, Y_ROWS)
    if COMPARE_IDS:
        w -= tl.where(
            positive, _pair_coefficients(of_positive, x_n, x_present, rows, rows_present, X_ROWS, Y_ROWS), 0.0
        )

    w *= factor[None, :]
    if WHOLE:
        acc = add_product(acc, w, y_tile, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            tile = load_vectors(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            d = start + tl.arange(0, BLOCK_D)
            at = raw + (x_n * SPLITS)[:, None] * D + d[None, :]
            mask = x_present[:, None] & (d < D)[None, :]
            tl.store(at, add_product(tl.load(at, mask=mask, other=0.0), w, tile, PRECISION), mask=mask)
        tl.debug_barrier()  # the next block reads values written by other threads of this program
    return acc


@triton.jit
def _raw_offsets(D, SPLITS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets in raw of the channels of a block of vectors from its first, in 32 bits."""
    return (tl.arange(0, BLOCK_X) * (SPLITS * D))[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def gradient(
    x, x_stride_n, x_stride_d, x_inverse, x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view,
    y, y_stride_n, y_stride_d, y_inverse, y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view,
    y_copy, y_factor, y_bias, of_exp, of_positive, of_lse, low, high, temperature, scale, raw, scratch, X, Y, D,
    X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, ADD: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T dL/d(unit vector) of a block of x over one split of y, into raw [X, SPLITS, D]; with ADD added to it.

    The losses are those of x with X_ROWS (x is query), those of y with Y_ROWS (x is key or bank), or both (query is
    key, where dL/ds + (dL/ds)^T is symmetric). Without WHOLE sums accumulate in raw, which must be 0 initially.
    """
    split = tl.program_id(1)
    if scratch is not None:
        scratch += 4 * (tl.program_id(0) * tl.num_programs(1) + split)
    x_n, exists = indices(tl.program_id(0), X, BLOCK_X)
    inverse, present = load_inverse(x_inverse, x_n, exists)
    factor = inverse * logit_scale(temperature, scale)
    of_x, of_y, copied = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d), (y_copy, y_factor, y_bias)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    coefficients = (of_exp, of_positive, of_lse)
    COMPARE_IDS: tl.constexpr = x_image is not None and y_image is not None
    x_low, x_high = None, None
    if COMPARE_IDS:
        x_low, x_high = id_range(x_image, x_stride_image, x_n, present)
        keep_range(scratch, x_low, x_high)
    x_tile = None
    if WHOLE:
        x_tile = load_vectors(of_x, x_n, present, 0, D, BLOCK_D, UPCAST)
    acc = tl.zeros([BLOCK_X, 1], tl.float32)
    if WHOLE:
        # Loaded before the loop, after which the sum would need the registers of a second tile. Without ADD nothing is
        # loaded, but the compiler does not know that X is positive: zeros that it knows it writes between products,
        # which then cannot overlap each other.
        first_raw = raw + (tl.program_id(0).to(tl.int64) * (BLOCK_X * SPLITS) + split) * D
        present_sums = x_n < (X if ADD else tl.minimum(X, 0))
        acc = tl.load(
            first_raw + _raw_offsets(D, SPLITS, BLOCK_X, BLOCK_D),
            mask=present_sums[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0.0,
        )  # fmt: skip
    else:
        raw += split.to(tl.int64) * D

    per_split = tl.cdiv(tl.cdiv(Y, BLOCK_Y), SPLITS)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tl.cdiv(Y, BLOCK_Y))
    if NEGATIVES != "same_image" or not COMPARE_IDS:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = stop, stop
            if COMPARE_IDS:
                first, after = overlapping_blocks(low, high, chunk, stop, x_low, x_high, scratch, CHUNK)
            last = tl.where(any_present(present, x_low, x_high, scratch), stop - (after - first), chunk)
            first, last = uniform_bounds(scratch, first, last)
            for i in range(chunk, last):
                j = i + tl.where(i >= first, stop - last, 0)
                acc = _gradient_tile(
                    x_tile, of_x, x_n, present, factor, x_ids, of_y, copied, j, Y, y_inverse, y_ids, coefficients, acc,
                    raw, D, False, X_ROWS, Y_ROWS, NEGATIVES, BOUNDED, SPLITS, CHANNELS, BLOCK_X, BLOCK_Y, BLOCK_D,
                    WHOLE, PRECISION, UPCAST,
                )  # fmt: skip
    if COMPARE_IDS:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = overlapping_blocks(low, high, chunk, stop, x_low, x_high, scratch, CHUNK)
            first, after = uniform_bounds(scratch, first, after)
            for j in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                if NEGATIVES != "same_image" or may_overlap(low, high, j // (BLOCK_Y // BLOCK_S), x_low, x_high):
                    acc = _gradient_tile(
                        x_tile, of_x, x_n, present, factor, x_ids, of_y, copied, j, Y, y_inverse, y_ids, coefficients,
                        acc, raw, D, True, X_ROWS, Y_ROWS, NEGATIVES, BOUNDED, SPLITS, CHANNELS, BLOCK_X, BLOCK_S,
                        BLOCK_D, WHOLE, PRECISION, UPCAST,
                    )  # fmt: skip

    if WHOLE:
        x_n, exists = indices(tl.program_id(0), X, BLOCK_X)  # again: not kept in registers
        tl.store(
            first_raw + _raw_offsets(D, SPLITS, BLOCK_X, BLOCK_D), acc,
            mask=exists[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :],
        )  # fmt: skip
