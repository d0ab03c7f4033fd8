"""The kernel of the losses of the rows (names and layout: :mod:`fgfast.kernels.contrast.tiles`)."""

import triton
import triton.language as tl

from fgfast.kernels.contrast.tiles import (
    any_present,
    blocks_before,
    counted_pairs,
    keep_range,
    load_pieces,
    may_overlap,
    multiply,
    multiply_pieces,
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
    store_rows,
)


@triton.jit
def _add_to(at, values, mask):
    tl.store(at, tl.load(at, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def _products(
    x_tile, x, x_n, x_present, y, copied, y_block, Y, y_inverse, D, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, HELD: tl.constexpr, FLIPPED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> [X, Y] of one block of columns."""
    if HELD > 0:
        return multiply_pieces(x_tile, copied[0], y_block, CHANNELS, BLOCK_X, BLOCK_Y, UPCAST)
    elif FLIPPED:
        y_tile = load_copied(copied[0], y_block, CHANNELS, BLOCK_Y, BLOCK_D, UPCAST)
        return tl.trans(tl.dot(y_tile, tl.trans(x_tile), input_precision=PRECISION))
    else:
        y_n, y_exists = indices(y_block, Y, BLOCK_Y)
        _, y_present = load_inverse(y_inverse, y_n, y_exists)
        y_tile = None
        if copied[0] is not None:
            y_tile = load_copied(copied[0], y_block, CHANNELS, BLOCK_Y, BLOCK_D, UPCAST)
        elif WHOLE:
            y_tile = load_vectors(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
        return multiply(
            x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
        )


@triton.jit
def _add_tile(
    s, x_n, x_present, x_factor, x_ids, copied, y_block, Y, y_inverse, y_ids, sums, column_sums, past_own,
    COMPARE_IDS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """Add the products s of one block of columns to the sums of the rows; ids are compared only with COMPARE_IDS.

    column_sums (or None) points to total, positives and count of every column [3, Y]; the tile is added to those of
    columns ``past_own`` and later. The sums of exponentials [X] of the rows may be parts of them [X, Y // 16, 8].
    """
    total, top, positives, count = sums
    y_n, y_exists = indices(y_block, Y, BLOCK_Y)
    x_bias = None
    if column_sums is not None:
        column_sum, add_columns = column_sums + y_n, y_exists & (y_n >= past_own)
        before = tl.load(column_sum, mask=add_columns, other=0.0)
        x_bias = tl.where(x_present, 0.0, -INFINITY)
    s, _ = scale_tile(s, x_factor, x_bias, copied, y_block, Y, y_inverse, True, BLOCK_Y)
    if COMPARE_IDS:
        _, y_present = load_inverse(y_inverse, y_n, y_exists)
        positive, counted = counted_pairs(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        positive_logits = tl.where(positive, s, 0.0)
        positives += tl.sum(positive_logits, 1)
        count += tl.sum(positive.to(tl.float32), 1)
        if column_sums is not None:
            _add_to(column_sum + Y, tl.sum(positive_logits, 0), add_columns)
            _add_to(column_sum + Y + Y, tl.sum(positive.to(tl.float32), 0), add_columns)
        s = tl.where(counted, s, -INFINITY)
    if BOUNDED:
        e = tl.exp2(s)
        if len(total.shape) > 1:  # a thread adds its own numbers, two of every 16 columns, and none of another one
            total += tl.sum(tl.reshape(e, [e.shape[0], e.shape[1] // 16, 2, 8]), 2)
        else:
            total += tl.sum(e, 1)
        if column_sums is not None:
            tl.store(column_sum, before + tl.sum(e, 0), mask=add_columns)
    else:
        higher = tl.maximum(top, tl.max(s, 1))
        offset = tl.where(higher == -INFINITY, 0.0, higher)
        total = total * tl.exp2(top - offset) + tl.sum(tl.exp2(s - offset[:, None]), 1)
        top = higher
    return total, top, positives, count


@triton.jit
def _forward_rows(
    x_block, x, x_inverse, x_ids, y, copied, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial, slot,
    column_sums, scratch, X, Y, D, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, HELD: tl.constexpr, FLIPPED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows over one split of the columns; with column_sums only columns from the rows' own on."""
    x_n, exists = indices(x_block, X, BLOCK_X)
    inverse, present = load_inverse(x_inverse, x_n, exists)
    factor *= inverse
    compare_ids: tl.constexpr = y_ids[0] is not None
    x_low, x_high = None, None
    if compare_ids:
        x_low, x_high = id_range(x_ids[0], x_ids[3], x_n, present)
        keep_range(scratch, x_low, x_high)
    x_tile = None
    if HELD > 0:
        x_tile = load_pieces(x, x_n, present, D, CHANNELS, HELD, UPCAST)
    elif WHOLE:
        x_tile = load_vectors(x, x_n, present, 0, D, BLOCK_D, UPCAST)

    zero = tl.zeros([BLOCK_X], tl.float32)
    if FLIPPED:
        sums = (tl.zeros([BLOCK_X, BLOCK_Y // 16, 8], tl.float32), zero, zero, zero)
    else:
        sums = (zero, zero if BOUNDED else zero - INFINITY, zero, zero)
    # A split is every SPLITS-th block. Block number ``own`` is the first with columns that are rows of this program
    # (the diagonal), block number ``begin`` the first past them.
    split = tl.program_id(1)
    begin, end, past_own = 0, blocks_before(tl.cdiv(Y, BLOCK_Y), split, SPLITS), 0
    if column_sums is not None:
        after_own = tl.cdiv((x_block + 1) * BLOCK_X, BLOCK_Y)
        past_own = after_own * BLOCK_Y
        begin = tl.minimum(blocks_before(after_own, split, SPLITS), end)
        own = tl.minimum(blocks_before(x_block * BLOCK_X // BLOCK_Y, split, SPLITS), end)
    if compare_ids:
        low += split
        high += split
    if NEGATIVES != "same_image" or not compare_ids:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = stop, stop
            if compare_ids:
                first, after = overlapping_blocks(low, high, chunk, stop, x_low, x_high, scratch, CHUNK, SPLITS)
            last = tl.where(any_present(present, x_low, x_high, scratch), stop - (after - first), chunk)
            first, last = uniform_bounds(scratch, first, last)
            skipped = stop - last
            if AHEAD:  # the product of the next tile runs while exponentials of this one are computed
                if chunk < last:
                    j = (chunk + tl.where(chunk >= first, skipped, 0)) * SPLITS + split
                    s = _products(
                        x_tile, x, x_n, present, y, copied, j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_Y, BLOCK_D,
                        WHOLE, HELD, FLIPPED, PRECISION, UPCAST,
                    )  # fmt: skip
                    for i in range(chunk + 1, last):
                        next_j = (i + tl.where(i >= first, skipped, 0)) * SPLITS + split
                        ahead = _products(
                            x_tile, x, x_n, present, y, copied, next_j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_Y,
                            BLOCK_D, WHOLE, HELD, FLIPPED, PRECISION, UPCAST,
                        )  # fmt: skip
                        sums = _add_tile(
                            s, x_n, present, factor, x_ids, copied, j, Y, y_inverse, y_ids, sums, column_sums, past_own,
                            False, NEGATIVES, BOUNDED, BLOCK_Y,
                        )  # fmt: skip
                        s, j = ahead, next_j
                    sums = _add_tile(
                        s, x_n, present, factor, x_ids, copied, j, Y, y_inverse, y_ids, sums, column_sums, past_own,
                        False, NEGATIVES, BOUNDED, BLOCK_Y,
                    )  # fmt: skip
            else:
                for i in range(chunk, last):
                    j = (i + tl.where(i >= first, skipped, 0)) * SPLITS + split
                    s = _products(
                        x_tile, x, x_n, present, y, copied, j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_Y, BLOCK_D,
                        WHOLE, HELD, FLIPPED, PRECISION, UPCAST,
                    )  # fmt: skip
                    sums = _add_tile(
                        s, x_n, present, factor, x_ids, copied, j, Y, y_inverse, y_ids, sums, column_sums, past_own,
                        False, NEGATIVES, BOUNDED, BLOCK_Y,
                    )  # fmt: skip
    if FLIPPED:
        sums = (tl.sum(tl.sum(sums[0], 2), 1), sums[1], sums[2], sums[3])
    if compare_ids:
        # The blocks on the diagonal come first, as a separate chunk: bounds around all blocks would be wide.
        for chunk in range(begin if column_sums is None else begin - CHUNK, end, CHUNK):
            start, stop = tl.maximum(chunk, begin), tl.minimum(chunk + CHUNK, end)
            first, after = overlapping_blocks(low, high, start, stop, x_low, x_high, scratch, CHUNK, SPLITS)
            if column_sums is not None:
                own_too = (chunk < begin) & any_present(present, x_low, x_high, scratch)
                first = tl.where(own_too, own, first)
            first, after = uniform_bounds(scratch, first, after)
            for i in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                block, part = i // (BLOCK_Y // BLOCK_S) * SPLITS, i % (BLOCK_Y // BLOCK_S)
                if NEGATIVES != "same_image" or may_overlap(low, high, block, x_low, x_high):
                    j = (block + split) * (BLOCK_Y // BLOCK_S) + part
                    s = _products(
                        x_tile, x, x_n, present, y, copied, j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_S, BLOCK_D,
                        WHOLE, HELD, False, PRECISION, UPCAST,
                    )  # fmt: skip
                    sums = _add_tile(
                        s, x_n, present, factor, x_ids, copied, j, Y, y_inverse, y_ids, sums, column_sums, past_own,
                        True, NEGATIVES, BOUNDED, BLOCK_S,
                    )  # fmt: skip

    total, top, positives, count = sums
    if partial is None:
        store_rows(loss, lse, counts, x_n, exists, total, top, positives, count)
    else:
        at = partial + (slot + split).to(tl.int64) * (3 if BOUNDED else 4) * X + x_n
        tl.store(at, total, mask=exists)
        tl.store(at + X, positives, mask=exists)
        tl.store(at + X + X, count, mask=exists)
        if not BOUNDED:
            tl.store(at + X + X + X, top, mask=exists)


@triton.jit
def forward(
    x, x_stride_n, x_stride_d, x_inverse, x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view,
    y, y_stride_n, y_stride_d, y_inverse, y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view,
    y_copy, y_factor, y_bias, low, high, temperature, scale, loss, lse, counts, partial, slot, scratch,
    X, Y, D, TRIANGULAR: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, SPLITS: tl.constexpr,
    CHUNK: tl.constexpr, AHEAD: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, HELD: tl.constexpr, FLIPPED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of one block of rows x over one split of the columns y; columns without ids are negatives of every row.

    Columns are read from y_copy, y_factor and y_bias of ``prepare`` if there are such; then every program has four
    integers of ``scratch``. With AHEAD the products of a tile are computed before the exponentials of the one before.
    With HELD the channels are multiplied in pieces, and the rows' first HELD channels stay in registers.
    If ``partial`` is None a program sees every column and stores results. Otherwise it stores the sums of each row in
    partial [slots, 3 or 4, X], at index slot + split: total, positives, count and, for unbounded logits, the maximum.

    With TRIANGULAR (y is x, logits are bounded) one triangle of the symmetric logits is computed. A program has a group
    of blocks of rows, dealt in alternating order for an equal number of tiles per group, and adds the sums of columns
    past the diagonal to the slot of its group, which must be 0 initially. Splits of a group touch different columns.
    FLIPPED tiles are computed as their transposes: a thread then has half of a tile's rows of one column and adds them
    itself, and the sums along rows stay apart until the loop ends.
    """
    of_x, of_y, copied = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d), (y_copy, y_factor, y_bias)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    factor = logit_scale(temperature, scale)
    group = tl.program_id(0)
    if scratch is not None:
        scratch += 4 * (group * tl.num_programs(1) + tl.program_id(1))
    if TRIANGULAR:
        groups = tl.num_programs(0)
        column_sums = partial + group.to(tl.int64) * 3 * X
        for turn in tl.range(0, tl.cdiv(tl.cdiv(X, BLOCK_X), groups), disable_licm=True):
            block = turn * groups + tl.where(turn % 2 == 0, group, groups - 1 - group)
            _forward_rows(
                block, of_x, x_inverse, x_ids, of_y, copied, y_inverse, y_ids, low, high, factor, loss, lse, counts,
                partial, slot, column_sums, scratch, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, AHEAD, CHANNELS,
                BLOCK_X, BLOCK_Y, BLOCK_S, BLOCK_D, WHOLE, HELD, FLIPPED, PRECISION, UPCAST,
            )  # fmt: skip
            tl.debug_barrier()  # the next rows read sums written by other threads of this program
    else:
        _forward_rows(
            group, of_x, x_inverse, x_ids, of_y, copied, y_inverse, y_ids, low, high, factor, loss, lse, counts,
            partial, slot, None, scratch, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, AHEAD, CHANNELS, BLOCK_X,
            BLOCK_Y, BLOCK_S, BLOCK_D, WHOLE, HELD, FLIPPED, PRECISION, UPCAST,
        )  # fmt: skip
