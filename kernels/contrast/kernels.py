"""Kernels of the contrastive loss, in one file because ``forward`` and ``gradient`` call the same tile functions.

A program keeps a block of X vectors and loops over blocks of Y vectors; s' [X, Y] is a tile of logits in base 2. Beside
its features a kernel reads one number per vector, ``inverse``: 1 / max(norm, eps), or -1 for an absent vector. Features
are multiplied in their stored dtype and the tile is scaled afterwards, which avoids rounding a vector a second time.

Where ``prepare`` made a copy of y, absent vectors are 0 there and all blocks complete: a load of a tile depends on no
other load, and several of them are in flight. Without it loads are masked by presence.

The loop over blocks of Y runs in chunks. In each chunk the blocks whose range of image ids overlaps that of the program
lie between two bounds. The blocks outside come first: no id is read for them, and "same_image" skips them. Then the
blocks inside, where ids are compared for BLOCK_S vectors at a time, because ids take many registers.

Where query is key and logits are bounded, ``forward`` computes one triangle of the symmetric logits: the mask of
counted pairs is symmetric too, and each tile past the diagonal is summed along its rows and along its columns.

Arguments that belong together are tuples: vectors (x, stride_n, stride_d), ids (image, part, view and their strides).
"""

import triton
import triton.language as tl

from fgfast.kernels.contrast.vectors import (
    HIGHEST,
    INFINITY,
    LOWEST,
    id_range,
    indices,
    load_copied,
    load_inverse,
    load_vectors,
    logit_scale,
    store_rows,
)


@triton.jit
def _overlapping_blocks(
    low, high, start, stop, x_low, x_high, scratch, CHUNK: tl.constexpr, STEP: tl.constexpr = 1
):  # fmt: skip
    """Bounds (first, after) of the blocks in start..stop with an image id in x_low..x_high; j is block j * STEP."""
    if scratch is not None:  # kept there, not in registers
        x_low, x_high = tl.load(scratch + 2), tl.load(scratch + 3)
    j = start + tl.arange(0, CHUNK)
    inside = j < stop
    hit = inside & (tl.load(low + j * STEP, mask=inside, other=HIGHEST) <= x_high)
    hit &= tl.load(high + j * STEP, mask=inside, other=LOWEST) >= x_low
    first = tl.min(tl.where(hit, j, stop), 0)
    return first, tl.max(tl.where(hit, j + 1, first), 0)


@triton.jit
def _any_present(present, x_low, x_high, scratch):
    """Whether the program has a present vector."""
    if x_low is None:
        return tl.max(present.to(tl.int32), 0) > 0
    else:
        if scratch is not None:
            x_low, x_high = tl.load(scratch + 2), tl.load(scratch + 3)
        return x_low <= x_high


@triton.jit
def _keep(scratch, x_low, x_high):
    """Write the range of image ids of this program."""
    if scratch is not None:
        tl.debug_barrier()  # all threads have read the range of the rows before
        tl.store(scratch + 2, x_low)
        tl.store(scratch + 3, x_high)
        tl.debug_barrier()


@triton.jit
def _uniform(scratch, a, b):
    """The integers a and b, written to memory and read again; as they are if scratch is None.

    A value of a load from one address is known to be the same in all threads, one of a reduction is not: loops with
    such bounds take their addresses and buffers in registers of every thread, and the gradient spills.
    """
    if scratch is None:
        return a, b
    else:
        tl.debug_barrier()  # all threads have read what was there before
        tl.store(scratch, a.to(tl.int64))
        tl.store(scratch + 1, b.to(tl.int64))
        tl.debug_barrier()
        return tl.load(scratch).to(tl.int32), tl.load(scratch + 1).to(tl.int32)


@triton.jit
def _blocks_before(block, split, SPLITS: tl.constexpr):
    """How many blocks of a split, i.e. of blocks split, split + SPLITS, ..., come before ``block``."""
    return tl.cdiv(tl.maximum(block - split, 0), SPLITS)


@triton.jit
def _may_overlap(low, high, block, x_low, x_high):
    """Whether the image ids of one block overlap x_low..x_high."""
    return (tl.load(low + block) <= x_high) & (tl.load(high + block) >= x_low)


@triton.jit
def _equal_ids(x, x_stride, x_n, x_present, y, y_stride, y_n, y_present):
    """Whether the ids of vectors x_n and y_n are equal, bool [X, Y]."""
    of_x = tl.load(x + x_n * x_stride, mask=x_present, other=0).to(tl.int64)
    of_y = tl.load(y + y_n * y_stride, mask=y_present, other=0).to(tl.int64)
    return of_x[:, None] == of_y[None, :]


@triton.jit
def _compare_ids(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES: tl.constexpr):
    """Positive pairs, and pairs in the denominator of the loss (positive or negative), bool [X, Y] each."""
    x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view = x_ids
    y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view = y_ids
    present = x_present[:, None] & y_present[None, :]
    same_image = present & _equal_ids(x_image, x_stride_image, x_n, x_present, y_image, y_stride_image, y_n, y_present)
    same_part = same_image & _equal_ids(x_part, x_stride_part, x_n, x_present, y_part, y_stride_part, y_n, y_present)
    same = same_part & _equal_ids(x_view, x_stride_view, x_n, x_present, y_view, y_stride_view, y_n, y_present)
    positive = same_part ^ same
    if NEGATIVES == "other_images":
        counted = present ^ same_image ^ positive
    elif NEGATIVES == "same_image":
        counted = same_image ^ same
    else:
        counted = present ^ same
    return positive, counted


@triton.jit
def _multiply(
    x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> [X, Y]: one product with WHOLE (all channels in one tile), else summed over blocks of channels."""
    if WHOLE:
        s = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        for start in range(0, D, BLOCK_D):
            of_x = load_vectors(x, x_n, x_present, start, D, BLOCK_D, UPCAST)
            of_y = load_vectors(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            s = tl.dot(of_x, tl.trans(of_y), s, input_precision=PRECISION)
    return s


@triton.jit
def _scale(s, x_factor, x_bias, copied, y_block, Y, y_inverse, BIASED: tl.constexpr, BLOCK_Y: tl.constexpr):
    """Logits s' of products s, and the factors of the columns; -inf in absent columns if BIASED.

    ``x_bias``: 0 or -inf for each row, or None.
    """
    s *= x_factor[:, None]
    if x_bias is not None:  # a fused multiply-add
        s += x_bias[:, None]
    if copied[0] is not None:
        y_n = y_block * BLOCK_Y + tl.arange(0, BLOCK_Y)  # in 32 bits
        factor = tl.load(copied[1] + y_n)
        bias = tl.load(copied[2] + y_n) if BIASED else factor
    else:
        y_n, y_exists = indices(y_block, Y, BLOCK_Y)
        factor, y_present = load_inverse(y_inverse, y_n, y_exists)
        bias = tl.where(y_present, 0.0, -INFINITY)
        if x_bias is not None:  # a factor of -1 would flip the sign of -inf
            factor = tl.where(y_present, factor, 1.0)
    if BIASED:
        s = s * factor[None, :] + bias[None, :]
    else:
        s *= factor[None, :]
    return s, factor


@triton.jit
def _add_to(at, values, mask):
    tl.store(at, tl.load(at, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def _products(
    x_tile, x, x_n, x_present, y, copied, y_block, Y, y_inverse, D, CHANNELS: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> [X, Y] of one block of columns."""
    y_n, y_exists = indices(y_block, Y, BLOCK_Y)
    _, y_present = load_inverse(y_inverse, y_n, y_exists)
    y_tile = None
    if copied[0] is not None:
        y_tile = load_copied(copied[0], y_block, CHANNELS, BLOCK_Y, BLOCK_D, UPCAST)
    elif WHOLE:
        y_tile = load_vectors(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
    return _multiply(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )


@triton.jit
def _add_tile(
    s, x_n, x_present, x_factor, x_ids, copied, y_block, Y, y_inverse, y_ids, sums, column_sums, past_own,
    COMPARE_IDS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_Y: tl.constexpr,
):  # fmt: skip
    """Add the products s of one block of columns to the sums of the rows; ids are compared only with COMPARE_IDS.

    column_sums (or None) points to total, positives and count of every column [3, Y]; the tile is added to those of
    columns ``past_own`` and later.
    """
    total, top, positives, count = sums
    y_n, y_exists = indices(y_block, Y, BLOCK_Y)
    x_bias = None
    if column_sums is not None:
        column_sum, add_columns = column_sums + y_n, y_exists & (y_n >= past_own)
        before = tl.load(column_sum, mask=add_columns, other=0.0)
        x_bias = tl.where(x_present, 0.0, -INFINITY)
    s, _ = _scale(s, x_factor, x_bias, copied, y_block, Y, y_inverse, True, BLOCK_Y)
    if COMPARE_IDS:
        _, y_present = load_inverse(y_inverse, y_n, y_exists)
        positive, counted = _compare_ids(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        positive_logits = tl.where(positive, s, 0.0)
        positives += tl.sum(positive_logits, 1)
        count += tl.sum(positive.to(tl.float32), 1)
        if column_sums is not None:
            _add_to(column_sum + Y, tl.sum(positive_logits, 0), add_columns)
            _add_to(column_sum + Y + Y, tl.sum(positive.to(tl.float32), 0), add_columns)
        s = tl.where(counted, s, -INFINITY)
    if BOUNDED:
        e = tl.exp2(s)
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
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows over one split of the columns; with column_sums only columns from the rows' own on."""
    x_n, exists = indices(x_block, X, BLOCK_X)
    inverse, present = load_inverse(x_inverse, x_n, exists)
    factor *= inverse
    compare_ids: tl.constexpr = y_ids[0] is not None
    x_low, x_high = None, None
    if compare_ids:
        x_low, x_high = id_range(x_ids[0], x_ids[3], x_n, present)
        _keep(scratch, x_low, x_high)
    x_tile = None
    if WHOLE:
        x_tile = load_vectors(x, x_n, present, 0, D, BLOCK_D, UPCAST)

    zero = tl.zeros([BLOCK_X], tl.float32)
    sums = (zero, zero if BOUNDED else zero - INFINITY, zero, zero)
    # A split is every SPLITS-th block. Block number ``own`` is the first with columns that are rows of this program
    # (the diagonal), block number ``begin`` the first past them.
    split = tl.program_id(1)
    begin, end, past_own = 0, _blocks_before(tl.cdiv(Y, BLOCK_Y), split, SPLITS), 0
    if column_sums is not None:
        after_own = tl.cdiv((x_block + 1) * BLOCK_X, BLOCK_Y)
        past_own = after_own * BLOCK_Y
        begin = tl.minimum(_blocks_before(after_own, split, SPLITS), end)
        own = tl.minimum(_blocks_before(x_block * BLOCK_X // BLOCK_Y, split, SPLITS), end)
    if compare_ids:
        low += split
        high += split
    if NEGATIVES != "same_image" or not compare_ids:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = stop, stop
            if compare_ids:
                first, after = _overlapping_blocks(low, high, chunk, stop, x_low, x_high, scratch, CHUNK, SPLITS)
            last = tl.where(_any_present(present, x_low, x_high, scratch), stop - (after - first), chunk)
            first, last = _uniform(scratch, first, last)
            skipped = stop - last
            if AHEAD:  # the product of the next tile runs while exponentials of this one are computed
                if chunk < last:
                    j = (chunk + tl.where(chunk >= first, skipped, 0)) * SPLITS + split
                    s = _products(
                        x_tile, x, x_n, present, y, copied, j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_Y, BLOCK_D,
                        WHOLE, PRECISION, UPCAST,
                    )  # fmt: skip
                    for i in range(chunk + 1, last):
                        next_j = (i + tl.where(i >= first, skipped, 0)) * SPLITS + split
                        ahead = _products(
                            x_tile, x, x_n, present, y, copied, next_j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_Y,
                            BLOCK_D, WHOLE, PRECISION, UPCAST,
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
                        WHOLE, PRECISION, UPCAST,
                    )  # fmt: skip
                    sums = _add_tile(
                        s, x_n, present, factor, x_ids, copied, j, Y, y_inverse, y_ids, sums, column_sums, past_own,
                        False, NEGATIVES, BOUNDED, BLOCK_Y,
                    )  # fmt: skip
    if compare_ids:
        # The blocks on the diagonal come first, as a separate chunk: bounds around all blocks would be wide.
        for chunk in range(begin if column_sums is None else begin - CHUNK, end, CHUNK):
            start, stop = tl.maximum(chunk, begin), tl.minimum(chunk + CHUNK, end)
            first, after = _overlapping_blocks(low, high, start, stop, x_low, x_high, scratch, CHUNK, SPLITS)
            if column_sums is not None:
                own_too = (chunk < begin) & _any_present(present, x_low, x_high, scratch)
                first = tl.where(own_too, own, first)
            first, after = _uniform(scratch, first, after)
            for i in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                block, part = i // (BLOCK_Y // BLOCK_S) * SPLITS, i % (BLOCK_Y // BLOCK_S)
                if NEGATIVES != "same_image" or _may_overlap(low, high, block, x_low, x_high):
                    j = (block + split) * (BLOCK_Y // BLOCK_S) + part
                    s = _products(
                        x_tile, x, x_n, present, y, copied, j, Y, y_inverse, D, CHANNELS, BLOCK_X, BLOCK_S, BLOCK_D,
                        WHOLE, PRECISION, UPCAST,
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
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of one block of rows x over one split of the columns y; columns without ids are negatives of every row.

    Columns are read from y_copy, y_factor and y_bias of ``prepare`` if there are such; then every program has four
    integers of ``scratch``. With AHEAD the products of a tile are computed before the exponentials of the one before.
    If ``partial`` is None a program sees every column and stores results. Otherwise it stores the sums of each row in
    partial [slots, 3 or 4, X], at index slot + split: total, positives, count and, for unbounded logits, the maximum.

    With TRIANGULAR (y is x, logits are bounded) one triangle of the symmetric logits is computed. A program has a group
    of blocks of rows, dealt in alternating order for an equal number of tiles per group, and adds the sums of columns
    past the diagonal to the slot of its group, which must be 0 initially. Splits of a group touch different columns.
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
        for turn in range(tl.cdiv(tl.cdiv(X, BLOCK_X), groups)):
            block = turn * groups + tl.where(turn % 2 == 0, group, groups - 1 - group)
            _forward_rows(
                block, of_x, x_inverse, x_ids, of_y, copied, y_inverse, y_ids, low, high, factor, loss, lse, counts,
                partial, slot, column_sums, scratch, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, AHEAD, CHANNELS,
                BLOCK_X, BLOCK_Y, BLOCK_S, BLOCK_D, WHOLE, PRECISION, UPCAST,
            )  # fmt: skip
            tl.debug_barrier()  # the next rows read sums written by other threads of this program
    else:
        _forward_rows(
            group, of_x, x_inverse, x_ids, of_y, copied, y_inverse, y_ids, low, high, factor, loss, lse, counts,
            partial, slot, None, scratch, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, AHEAD, CHANNELS, BLOCK_X,
            BLOCK_Y, BLOCK_S, BLOCK_D, WHOLE, PRECISION, UPCAST,
        )  # fmt: skip


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
def _add_product(acc, w, y, PRECISION: tl.constexpr):
    """Acc + w y; for float16 vectors in bfloat16, because w is as small as 1 / (rows x columns)."""
    if y.dtype == tl.float16:
        y = y.to(tl.bfloat16)
    return tl.dot(w.to(y.dtype), y, acc, input_precision=PRECISION)


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
    s = _multiply(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    # Bounded weights are finite, and absent vectors are 0 in the products below.
    s, factor = _scale(s, x_factor, None, copied, y_block, Y, y_inverse, not BOUNDED, BLOCK_Y)
    if COMPARE_IDS:
        positive, counted = _compare_ids(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
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
        acc = _add_product(acc, w, y_tile, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            tile = load_vectors(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            d = start + tl.arange(0, BLOCK_D)
            at = raw + (x_n * SPLITS)[:, None] * D + d[None, :]
            mask = x_present[:, None] & (d < D)[None, :]
            tl.store(at, _add_product(tl.load(at, mask=mask, other=0.0), w, tile, PRECISION), mask=mask)
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
        _keep(scratch, x_low, x_high)
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
                first, after = _overlapping_blocks(low, high, chunk, stop, x_low, x_high, scratch, CHUNK)
            last = tl.where(_any_present(present, x_low, x_high, scratch), stop - (after - first), chunk)
            first, last = _uniform(scratch, first, last)
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
            first, after = _overlapping_blocks(low, high, chunk, stop, x_low, x_high, scratch, CHUNK)
            first, after = _uniform(scratch, first, after)
            for j in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                if NEGATIVES != "same_image" or _may_overlap(low, high, j // (BLOCK_Y // BLOCK_S), x_low, x_high):
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
