"""Kernels of the contrastive loss, in one file because ``forward`` and ``gradient`` call the same tile functions.

A program keeps a block of X vectors and loops over blocks of Y vectors; s' [X, Y] is a tile of logits in base 2. Beside
its features a kernel reads one number per vector, ``inverse``: 1 / max(norm, eps), or -1 for an absent vector. Features
are multiplied in their stored dtype and the tile is scaled afterwards, which avoids rounding a vector a second time.

The loop over blocks of Y runs in chunks. In each chunk the blocks whose range of image ids overlaps that of the program
lie between two bounds. The blocks outside come first: no id is read for them, and "same_image" skips them. Then the
blocks inside, where ids are compared for BLOCK_S vectors at a time, because ids take many registers.

Where query is key and logits are bounded, ``forward`` computes one triangle of the symmetric logits: the mask of
counted pairs is symmetric too, and each tile past the diagonal is summed along its rows and along its columns.

Arguments that belong together are tuples: vectors (x, stride_n, stride_d), ids (image, part, view and their strides).
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
def _indices(block, N, BLOCK: tl.constexpr):
    """Indices of the vectors of a block, in int64 for the products with strides; and which of them exist."""
    n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return n, n < N


@triton.jit
def _load_inverse(inverse, n, exists):
    """Inverse norms of vectors n, and which vectors are present; NaN (of a vector with NaN) is present."""
    values = tl.load(inverse + n, mask=exists, other=ABSENT)
    return values, ~(values < 0)


@triton.jit
def _load_vectors(vectors, n, wanted, start, D, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Channels from ``start`` on of vectors n [N, BLOCK_D]; 0 for vectors that are not wanted, without reading them."""
    x, stride_n, stride_d = vectors
    d = start + tl.arange(0, BLOCK_D).to(tl.int64)
    mask = wanted[:, None] & (d < D)[None, :]
    return upcast(tl.load(x + n[:, None] * stride_n + d[None, :] * stride_d, mask=mask, other=0.0), UPCAST)


@triton.jit
def _logit_scale(temperature, scale):
    """log2(e) / T; ``temperature`` points to T where it is on the device, else ``scale`` is the result."""
    if temperature is None:
        return scale
    else:
        return LOG2E / tl.load(temperature).to(tl.float32)


@triton.jit
def _id_range(image, stride_image, n, present):
    """Lowest and highest image id of the present vectors; HIGHEST and LOWEST if no vector is present."""
    ids = tl.load(image + n * stride_image, mask=present, other=0).to(tl.int64)
    return tl.min(tl.where(present, ids, HIGHEST), 0), tl.max(tl.where(present, ids, LOWEST), 0)


@triton.jit
def _overlapping_blocks(low, high, start, stop, x_low, x_high, CHUNK: tl.constexpr, STEP: tl.constexpr = 1):
    """Bounds (first, after) of the blocks in start..stop with an image id in x_low..x_high; j is block j * STEP."""
    j = start + tl.arange(0, CHUNK)
    inside = j < stop
    hit = inside & (tl.load(low + j * STEP, mask=inside, other=HIGHEST) <= x_high)
    hit &= tl.load(high + j * STEP, mask=inside, other=LOWEST) >= x_low
    first = tl.min(tl.where(hit, j, stop), 0)
    return first, tl.max(tl.where(hit, j + 1, first), 0)


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
            of_x = _load_vectors(x, x_n, x_present, start, D, BLOCK_D, UPCAST)
            of_y = _load_vectors(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            s = tl.dot(of_x, tl.trans(of_y), s, input_precision=PRECISION)
    return s


@triton.jit
def _prepare_side(
    vectors, ids, inverse, low, high, block, N, D,
    NORMALIZE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inverse norms and range of image ids of a block of one side; ``ids``: image, part and their strides."""
    image, part, stride_image, stride_part = ids
    n, exists = _indices(block, N, BLOCK)
    present = exists
    if part is not None:
        present &= tl.load(part + n * stride_part, mask=exists, other=0).to(tl.int64) >= 0
        lowest, highest = _id_range(image, stride_image, n, present)
        tl.store(low + block, lowest)
        tl.store(high + block, highest)
    value = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK_D):
            tile = _load_vectors(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32)
            squares += tl.sum(tile * tile, 1)
        value = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(squares), EPS))  # rounded correctly, as the error bound needs
    tl.store(inverse + n, tl.where(present, value, ABSENT), mask=exists)


@triton.jit
def prepare(
    x, x_stride_n, x_stride_d, x_image, x_part, x_stride_image, x_stride_part, x_inverse, x_low, x_high, X,
    y, y_stride_n, y_stride_d, y_image, y_part, y_stride_image, y_stride_part, y_inverse, y_low, y_high, Y,
    grad, stride_grad, lse, count, of_exp, of_positive, of_lse, D,
    NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inverse norms [N]; low and high [blocks], the range of image ids of each block; gradient coefficients of rows.

    The first programs are for x, the others for y (or None): one launch for both. With ``grad`` x holds the rows:
    dL/ds_ij = of_exp_i 2^(s'_ij - of_lse_i) - [j in P_i] of_positive_i. For bounded logits 2^-lse is part of of_exp. A
    row without a positive gets of_exp 0, of_lse inf and of_positive 0.
    """
    block, blocks = tl.program_id(0), tl.cdiv(X, BLOCK)
    if block >= blocks:
        if y is not None:
            vectors, ids = (y, y_stride_n, y_stride_d), (y_image, y_part, y_stride_image, y_stride_part)
            _prepare_side(
                vectors, ids, y_inverse, y_low, y_high, block - blocks, Y, D, NORMALIZE, BLOCK, BLOCK_D, UPCAST
            )
    else:
        vectors, ids = (x, x_stride_n, x_stride_d), (x_image, x_part, x_stride_image, x_stride_part)
        _prepare_side(vectors, ids, x_inverse, x_low, x_high, block, X, D, NORMALIZE, BLOCK, BLOCK_D, UPCAST)
        if grad is not None:
            n, exists = _indices(block, X, BLOCK)
            positives = tl.load(count + n, mask=exists, other=0.0)
            valid = positives > 0
            g = tl.load(grad + n * stride_grad, mask=valid, other=0.0)
            row_lse = tl.load(lse + n, mask=valid, other=INFINITY)
            if BOUNDED:
                tl.store(of_exp + n, g * tl.exp2(-row_lse), mask=exists)
            else:
                tl.store(of_exp + n, g, mask=exists)
                tl.store(of_lse + n, row_lse, mask=exists)
            tl.store(of_positive + n, g / tl.maximum(positives, 1.0), mask=exists)


@triton.jit
def _add_to(at, values, mask):
    tl.store(at, tl.load(at, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def _forward_tile(
    x_tile, x, x_n, x_present, x_factor, x_ids, y, y_block, Y, y_inverse, y_ids, sums, column_sums, past_own, D,
    COMPARE_IDS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one block of columns to the sums of the rows; ids are compared only with COMPARE_IDS.

    column_sums (or None) points to total, positives and count of every column [3, Y]; the tile is added to those of
    columns ``past_own`` and later.
    """
    total, top, positives, count = sums
    y_n, y_exists = _indices(y_block, Y, BLOCK_Y)
    inverse, y_present = _load_inverse(y_inverse, y_n, y_exists)
    if column_sums is not None:  # loaded here: the product hides the latency
        column_sum, add_columns = column_sums + y_n, y_exists & (y_n >= past_own)
        before = tl.load(column_sum, mask=add_columns, other=0.0)
    y_tile = None
    if WHOLE:
        y_tile = _load_vectors(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
    s = _multiply(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    s *= x_factor[:, None]
    if column_sums is not None:  # a fused multiply-add; an inverse of -1 would flip the sign of -inf
        s += tl.where(x_present, 0.0, -INFINITY)[:, None]
        inverse = tl.where(y_present, inverse, 1.0)
    s = s * inverse[None, :] + tl.where(y_present, 0.0, -INFINITY)[None, :]
    if COMPARE_IDS:
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
def _store_rows(loss, lse, counts, n, exists, total, top, positives, count):
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
def _forward_rows(
    x_block, x, x_inverse, x_ids, y, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial, slot, column_sums,
    X, Y, D, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows over one split of the columns; with column_sums only columns from the rows' own on."""
    x_n, exists = _indices(x_block, X, BLOCK_X)
    inverse, present = _load_inverse(x_inverse, x_n, exists)
    factor *= inverse
    compare_ids: tl.constexpr = y_ids[0] is not None
    x_low, x_high = None, None
    if compare_ids:
        x_low, x_high = _id_range(x_ids[0], x_ids[3], x_n, present)
    x_tile = None
    if WHOLE:
        x_tile = _load_vectors(x, x_n, present, 0, D, BLOCK_D, UPCAST)

    zero = tl.zeros([BLOCK_X], tl.float32)
    sums = (zero, zero if BOUNDED else zero - INFINITY, zero, zero)
    # A split is every SPLITS-th block. Block number ``own`` is the first with columns that are rows of this program
    # (the diagonal), block number ``begin`` the first past them.
    split = tl.program_id(1)
    blocks = tl.cdiv(Y, BLOCK_Y) * tl.max(present.to(tl.int32), 0)
    begin, end, past_own = 0, _blocks_before(blocks, split, SPLITS), 0
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
                first, after = _overlapping_blocks(low, high, chunk, stop, x_low, x_high, CHUNK, SPLITS)
            for i in range(chunk, stop - (after - first)):
                j = (i + tl.where(i >= first, after - first, 0)) * SPLITS + split
                sums = _forward_tile(
                    x_tile, x, x_n, present, factor, x_ids, y, j, Y, y_inverse, y_ids, sums, column_sums, past_own, D,
                    False, NEGATIVES, BOUNDED, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST,
                )  # fmt: skip
    if compare_ids:
        # The blocks on the diagonal come first, as a separate chunk: bounds around all blocks would be wide.
        for chunk in range(begin if column_sums is None else begin - CHUNK, end, CHUNK):
            start, stop = tl.maximum(chunk, begin), tl.minimum(chunk + CHUNK, end)
            first, after = _overlapping_blocks(low, high, start, stop, x_low, x_high, CHUNK, SPLITS)
            if column_sums is not None:
                first = tl.where(chunk < begin, own, first)
            for i in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                block, part = i // (BLOCK_Y // BLOCK_S) * SPLITS, i % (BLOCK_Y // BLOCK_S)
                if NEGATIVES != "same_image" or _may_overlap(low, high, block, x_low, x_high):
                    j = (block + split) * (BLOCK_Y // BLOCK_S) + part
                    sums = _forward_tile(
                        x_tile, x, x_n, present, factor, x_ids, y, j, Y, y_inverse, y_ids, sums, column_sums, past_own,
                        D, True, NEGATIVES, BOUNDED, BLOCK_X, BLOCK_S, BLOCK_D, WHOLE, PRECISION, UPCAST,
                    )  # fmt: skip

    total, top, positives, count = sums
    if partial is None:
        _store_rows(loss, lse, counts, x_n, exists, total, top, positives, count)
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
    low, high, temperature, scale, loss, lse, counts, partial, slot, X, Y, D,
    TRIANGULAR: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums of one block of rows x over one split of the columns y; columns without ids are negatives of every row.

    If ``partial`` is None a program sees every column and stores results. Otherwise it stores the sums of each row in
    partial [slots, 3 or 4, X], at index slot + split: total, positives, count and, for unbounded logits, the maximum.

    With TRIANGULAR (y is x, logits are bounded) one triangle of the symmetric logits is computed. A program has a group
    of blocks of rows, dealt in alternating order for an equal number of tiles per group, and adds the sums of columns
    past the diagonal to the slot of its group, which must be 0 initially. Splits of a group touch different columns.
    """
    of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    factor = _logit_scale(temperature, scale)
    group = tl.program_id(0)
    if TRIANGULAR:
        groups = tl.num_programs(0)
        column_sums = partial + group.to(tl.int64) * 3 * X
        for turn in range(tl.cdiv(tl.cdiv(X, BLOCK_X), groups)):
            block = turn * groups + tl.where(turn % 2 == 0, group, groups - 1 - group)
            _forward_rows(
                block, of_x, x_inverse, x_ids, of_y, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial,
                slot, column_sums, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, BLOCK_X, BLOCK_Y, BLOCK_S, BLOCK_D,
                WHOLE, PRECISION, UPCAST,
            )  # fmt: skip
            tl.debug_barrier()  # the next rows read sums written by other threads of this program
    else:
        _forward_rows(
            group, of_x, x_inverse, x_ids, of_y, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial,
            slot, None, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, BLOCK_X, BLOCK_Y, BLOCK_S, BLOCK_D,
            WHOLE, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def join(partial, loss, lse, counts, slots, X, BOUNDED: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Results from the sums of all slots, partial [slots, 3 or 4, X], added in order."""
    n, exists = _indices(tl.program_id(0), X, BLOCK)
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
    _store_rows(loss, lse, counts, n, exists, total, top, positives, count)


@triton.jit
def _pair_coefficients(values, x_n, x_present, y_n, y_present, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr):
    """Coefficients of the pairs of a tile: those of the row x (X_ROWS), of the row y (Y_ROWS), or their sum."""
    if Y_ROWS:
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
    x_tile, x, x_n, x_present, x_factor, x_ids, y, y_block, Y, y_inverse, y_ids, coefficients, acc, raw, D,
    COMPARE_IDS: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, NEGATIVES: tl.constexpr,
    BOUNDED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one block of y to the gradient of the program's vectors; ids are compared only with COMPARE_IDS."""
    of_exp, of_positive, of_lse = coefficients
    y_n, y_exists = _indices(y_block, Y, BLOCK_Y)
    inverse, y_present = _load_inverse(y_inverse, y_n, y_exists)
    y_tile = None
    if WHOLE:
        y_tile = _load_vectors(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
    s = _multiply(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    s = s * x_factor[:, None] * inverse[None, :]
    if not BOUNDED:  # bounded weights are finite, and absent vectors are 0 in the products below
        s += tl.where(y_present, 0.0, -INFINITY)[None, :]
    if COMPARE_IDS:
        positive, counted = _compare_ids(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        s = tl.where(counted, s, -INFINITY)

    if BOUNDED:
        w = tl.exp2(s) * _pair_coefficients(of_exp, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS)
    else:
        tl.static_assert(X_ROWS != Y_ROWS, "unbounded logits need two exponentials per pair: launch once for each side")
        row_lse = _pair_coefficients(of_lse, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS)
        w = tl.exp2(s - row_lse) * _pair_coefficients(of_exp, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS)
    if COMPARE_IDS:
        w -= tl.where(positive, _pair_coefficients(of_positive, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS), 0.0)

    w *= inverse[None, :]
    if WHOLE:
        acc = _add_product(acc, w, y_tile, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            tile = _load_vectors(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            d = start + tl.arange(0, BLOCK_D)
            at = raw + (x_n * SPLITS)[:, None] * D + d[None, :]
            mask = x_present[:, None] & (d < D)[None, :]
            tl.store(at, _add_product(tl.load(at, mask=mask, other=0.0), w, tile, PRECISION), mask=mask)
        tl.debug_barrier()  # the next block reads values written by other threads of this program
    return acc


@triton.jit
def gradient(
    x, x_stride_n, x_stride_d, x_inverse, x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view,
    y, y_stride_n, y_stride_d, y_inverse, y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view,
    of_exp, of_positive, of_lse, low, high, temperature, scale, raw, X, Y, D,
    X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, ADD: tl.constexpr,
    SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T dL/d(unit vector) of a block of x over one split of y, into raw [X, SPLITS, D]; with ADD added to it.

    The losses are those of x with X_ROWS (x is query), those of y with Y_ROWS (x is key or bank), or both (query is
    key, where dL/ds + (dL/ds)^T is symmetric). Without WHOLE sums accumulate in raw, which must be 0 initially.
    """
    split = tl.program_id(1)
    x_n, exists = _indices(tl.program_id(0), X, BLOCK_X)
    inverse, present = _load_inverse(x_inverse, x_n, exists)
    factor = inverse * _logit_scale(temperature, scale)
    of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    coefficients = (of_exp, of_positive, of_lse)
    COMPARE_IDS: tl.constexpr = x_image is not None and y_image is not None
    x_low, x_high = None, None
    if COMPARE_IDS:
        x_low, x_high = _id_range(x_image, x_stride_image, x_n, present)
    x_tile = None
    if WHOLE:
        x_tile = _load_vectors(of_x, x_n, present, 0, D, BLOCK_D, UPCAST)
    raw += split.to(tl.int64) * D
    acc = tl.zeros([BLOCK_X, BLOCK_D if WHOLE else 1], tl.float32)
    if WHOLE and ADD:  # loaded first: after the loop the sum would need the registers of a second tile
        before = tl.arange(0, BLOCK_D)
        at_before = raw + (x_n * SPLITS)[:, None] * D + before[None, :]
        acc = tl.load(at_before, mask=exists[:, None] & (before < D)[None, :], other=0.0)

    per_split = tl.cdiv(tl.cdiv(Y, BLOCK_Y), SPLITS)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tl.cdiv(Y, BLOCK_Y)) * tl.max(present.to(tl.int32), 0)
    if NEGATIVES != "same_image" or not COMPARE_IDS:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = stop, stop
            if COMPARE_IDS:
                first, after = _overlapping_blocks(low, high, chunk, stop, x_low, x_high, CHUNK)
            for i in range(chunk, stop - (after - first)):
                j = i + tl.where(i >= first, after - first, 0)
                acc = _gradient_tile(
                    x_tile, of_x, x_n, present, factor, x_ids, of_y, j, Y, y_inverse, y_ids, coefficients, acc, raw, D,
                    False, X_ROWS, Y_ROWS, NEGATIVES, BOUNDED, SPLITS, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION,
                    UPCAST,
                )  # fmt: skip
    if COMPARE_IDS:
        for chunk in range(begin, end, CHUNK):
            first, after = _overlapping_blocks(low, high, chunk, tl.minimum(chunk + CHUNK, end), x_low, x_high, CHUNK)
            for j in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                if NEGATIVES != "same_image" or _may_overlap(low, high, j // (BLOCK_Y // BLOCK_S), x_low, x_high):
                    acc = _gradient_tile(
                        x_tile, of_x, x_n, present, factor, x_ids, of_y, j, Y, y_inverse, y_ids, coefficients, acc, raw,
                        D, True, X_ROWS, Y_ROWS, NEGATIVES, BOUNDED, SPLITS, BLOCK_X, BLOCK_S, BLOCK_D, WHOLE,
                        PRECISION, UPCAST,
                    )  # fmt: skip

    if WHOLE:
        d = tl.arange(0, BLOCK_D)
        at = raw + (x_n * SPLITS)[:, None] * D + d[None, :]
        tl.store(at, acc, mask=exists[:, None] & (d < D)[None, :])


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
        tile = _load_vectors(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32)
        along += tl.sum(tile * _sum_splits(raw, n, present, start, D, SPLITS, BLOCK_D), 1)
    return along


@triton.jit
def inner(
    x, x_stride_n, x_stride_d, inverse, raw, out, X, D,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T times the part of sum_ij s_ij dL/ds_ij due to each x: <u, g> of the unit vector u and its gradient g in raw."""
    n, exists = _indices(tl.program_id(0), X, BLOCK)
    factor, present = _load_inverse(inverse, n, exists)
    along = _dot_gradient((x, x_stride_n, x_stride_d), n, present, raw, D, SPLITS, BLOCK, BLOCK_D, UPCAST)
    tl.store(out + n, tl.where(present, along * factor, 0.0), mask=exists)


@triton.jit
def _finish_side(
    vectors, inverse, scale, raw, out, block, N, D,
    NORMALIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of one side."""
    n, exists = _indices(block, N, BLOCK)
    factor, present = _load_inverse(inverse, n, exists)
    along = tl.zeros([BLOCK], tl.float32)
    if NORMALIZE:
        along = _dot_gradient(vectors, n, present, raw, D, SPLITS, BLOCK, BLOCK_D, UPCAST)
        along = tl.where(factor < CLAMPED, along * factor * factor, 0.0)
    factor *= scale
    for start in range(0, D, BLOCK_D):
        g = _sum_splits(raw, n, present, start, D, SPLITS, BLOCK_D)
        if NORMALIZE:
            g -= _load_vectors(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32) * along[:, None]
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
    scale = _logit_scale(temperature, scale) * LN2
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
