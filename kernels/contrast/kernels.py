"""The device side of the contrastive loss: what one program of each kernel does.

A program keeps a block of X vectors and walks over blocks of Y vectors; s' [X, Y] is a tile of logits in base 2. What a
kernel reads of a vector beside its features is one number, ``inverse``: 1 / max(norm, eps), or -1 where it is absent.
Features are multiplied as they are stored and the tile is scaled, so that no vector is rounded a second time.

Blocks of Y are walked in chunks. In each chunk the blocks whose range of image ids overlaps that of the program lie
between two bounds. First come all blocks outside: there no id is read, and under "same_image" there is nothing to do.
Then come the blocks inside, where ids are compared, BLOCK_S vectors at a time, because ids take many registers.

Where query is key and logits are bounded, ``forward`` makes half the square: s is symmetric, and so is what counts, so
a tile behind the diagonal is summed along its rows and along its columns.

Arguments that travel together are tuples: vectors (x, stride_n, stride_d), ids (image, part, view and their strides).
"""

import triton
import triton.language as tl

from fgfast.kernels.common import widened

EPS = tl.constexpr(1e-12)
CLAMPED = tl.constexpr(0.999999e12)  # an inverse from here on is 1 / EPS, a constant without a gradient
ABSENT = tl.constexpr(-1.0)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(2**63))
HIGHEST = tl.constexpr(2**63 - 1)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _indices(block, N, BLOCK: tl.constexpr):
    """Indices of the vectors of a block, which 32 bits hold, in int64 for the strides; and which of them exist."""
    n = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return n, n < N


@triton.jit
def _inverse(inverse, n, exists):
    """Factors of vectors n, and which of them are present; NaN, which a vector of NaN has, is present."""
    values = tl.load(inverse + n, mask=exists, other=ABSENT)
    return values, ~(values < 0)


@triton.jit
def _load(vectors, n, wanted, start, D, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr):
    """Channels start.. of vectors n [N, BLOCK_D]; 0 in those that are not wanted, whatever stands there."""
    x, stride_n, stride_d = vectors
    d = start + tl.arange(0, BLOCK_D).to(tl.int64)
    mask = wanted[:, None] & (d < D)[None, :]
    return widened(tl.load(x + n[:, None] * stride_n + d[None, :] * stride_d, mask=mask, other=0.0), UPCAST)


@triton.jit
def _scale(temperature, scale):
    """log2(e) / T, where T may be a number on the device."""
    if temperature is None:
        return scale
    else:
        return LOG2E / tl.load(temperature).to(tl.float32)


@triton.jit
def _extent(image, stride_image, n, present):
    """Lowest and highest image id of the present vectors; the highest is under the lowest where there is none."""
    ids = tl.load(image + n * stride_image, mask=present, other=0).to(tl.int64)
    return tl.min(tl.where(present, ids, HIGHEST), 0), tl.max(tl.where(present, ids, LOWEST), 0)


@triton.jit
def _shared_blocks(low, high, start, stop, x_low, x_high, CHUNK: tl.constexpr, STEP: tl.constexpr = 1):
    """Bounds first, after of those blocks among start..stop which may share an image with the program.

    Blocks are counted in steps: number j is block j * STEP.
    """
    j = start + tl.arange(0, CHUNK)
    inside = j < stop
    hit = inside & (tl.load(low + j * STEP, mask=inside, other=HIGHEST) <= x_high)
    hit &= tl.load(high + j * STEP, mask=inside, other=LOWEST) >= x_low
    first = tl.min(tl.where(hit, j, stop), 0)
    return first, tl.max(tl.where(hit, j + 1, first), 0)


@triton.jit
def _number(block, split, SPLITS: tl.constexpr):
    """How many blocks of a share, which are split, split + SPLITS, ..., lie before ``block``."""
    return tl.cdiv(tl.maximum(block - split, 0), SPLITS)


@triton.jit
def _may_share(low, high, block, x_low, x_high):
    """Whether one block may share an image with the program."""
    return (tl.load(low + block) <= x_high) & (tl.load(high + block) >= x_low)


@triton.jit
def _same(x, x_stride, x_n, x_present, y, y_stride, y_n, y_present):
    """Whether ids of vectors x_n and y_n agree, bool [X, Y]."""
    of_x = tl.load(x + x_n * x_stride, mask=x_present, other=0).to(tl.int64)
    of_y = tl.load(y + y_n * y_stride, mask=y_present, other=0).to(tl.int64)
    return of_x[:, None] == of_y[None, :]


@triton.jit
def _compare(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES: tl.constexpr):
    """Which pairs are positive and which count, bool [X, Y] each."""
    x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view = x_ids
    y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view = y_ids
    present = x_present[:, None] & y_present[None, :]
    same_image = present & _same(x_image, x_stride_image, x_n, x_present, y_image, y_stride_image, y_n, y_present)
    same_part = same_image & _same(x_part, x_stride_part, x_n, x_present, y_part, y_stride_part, y_n, y_present)
    same = same_part & _same(x_view, x_stride_view, x_n, x_present, y_view, y_stride_view, y_n, y_present)
    positive = same_part ^ same
    if NEGATIVES == "other_images":
        counted = present ^ same_image ^ positive
    elif NEGATIVES == "same_image":
        counted = same_image ^ same
    else:
        counted = present ^ same
    return positive, counted


@triton.jit
def _products(
    x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> [X, Y]: of whole tiles, or summed over blocks of channels."""
    if WHOLE:
        s = tl.dot(x_tile, tl.trans(y_tile), input_precision=PRECISION)
    else:
        s = tl.zeros([BLOCK_X, BLOCK_Y], tl.float32)
        for start in range(0, D, BLOCK_D):
            of_x = _load(x, x_n, x_present, start, D, BLOCK_D, UPCAST)
            of_y = _load(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            s = tl.dot(of_x, tl.trans(of_y), s, input_precision=PRECISION)
    return s


@triton.jit
def prepare(
    x, x_stride_n, x_stride_d, image, part, stride_image, stride_part, inverse, low, high,
    grad, stride_grad, lse, count, of_exp, of_positive, of_lse, N, D,
    NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Inverse [N] of every vector; low, high [blocks], the range of image ids in each block; coefficients of rows.

    dL/ds_ij = of_exp_i 2^(s'_ij - of_lse_i) - [j in P_i] of_positive_i. Bounded logits have 2^-lse in of_exp. A row
    without a positive has 0, inf and 0.
    """
    block = tl.program_id(0)
    n, exists = _indices(block, N, BLOCK)
    present = exists
    if part is not None:
        present &= tl.load(part + n * stride_part, mask=exists, other=0).to(tl.int64) >= 0
        lowest, highest = _extent(image, stride_image, n, present)
        tl.store(low + block, lowest)
        tl.store(high + block, highest)
    value = tl.full([BLOCK], 1.0, tl.float32)
    if NORMALIZE:
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, BLOCK_D):
            tile = _load((x, x_stride_n, x_stride_d), n, present, start, D, BLOCK_D, UPCAST).to(tl.float32)
            squares += tl.sum(tile * tile, 1)
        value = 1.0 / tl.maximum(tl.sqrt(squares), EPS)
    tl.store(inverse + n, tl.where(present, value, ABSENT), mask=exists)
    if grad is not None:
        positives = tl.load(count + n, mask=exists, other=0.0)
        valid = positives > 0
        g = tl.load(grad + n * stride_grad, mask=valid, other=0.0)
        its_lse = tl.load(lse + n, mask=valid, other=INFINITY)
        if BOUNDED:
            tl.store(of_exp + n, g * tl.exp2(-its_lse), mask=exists)
        else:
            tl.store(of_exp + n, g, mask=exists)
            tl.store(of_lse + n, its_lse, mask=exists)
        tl.store(of_positive + n, g / tl.maximum(positives, 1.0), mask=exists)


@triton.jit
def _add(at, values, mask):
    tl.store(at, tl.load(at, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def _forward_tile(
    x_tile, x, x_n, x_present, x_factor, x_ids, y, y_block, Y, y_inverse, y_ids, sums, of_columns, behind, D,
    SHARED: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one block of columns to the sums of the rows; SHARED says whether ids are compared.

    of_columns, if any, points to total, positives and count of every column [3, Y]: those from column ``behind`` on are
    added to.
    """
    total, top, positives, count = sums
    y_n, y_exists = _indices(y_block, Y, BLOCK_Y)
    inverse, y_present = _inverse(y_inverse, y_n, y_exists)
    if of_columns is not None:  # loaded here, so that the product hides the wait
        of_column, counts_too = of_columns + y_n, y_exists & (y_n >= behind)
        before = tl.load(of_column, mask=counts_too, other=0.0)
    y_tile = None
    if WHOLE:
        y_tile = _load(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
    s = _products(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    s *= x_factor[:, None]
    if of_columns is not None:  # a fused multiply-add in place of the product; no inf * -1 may turn it around
        s += tl.where(x_present, 0.0, -INFINITY)[:, None]
        inverse = tl.where(y_present, inverse, 1.0)
    s = s * inverse[None, :] + tl.where(y_present, 0.0, -INFINITY)[None, :]
    if SHARED:
        positive, counted = _compare(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        of_pairs = tl.where(positive, s, 0.0)
        positives += tl.sum(of_pairs, 1)
        count += tl.sum(positive.to(tl.float32), 1)
        if of_columns is not None:
            _add(of_column + Y, tl.sum(of_pairs, 0), counts_too)
            _add(of_column + Y + Y, tl.sum(positive.to(tl.float32), 0), counts_too)
        s = tl.where(counted, s, -INFINITY)
    if BOUNDED:
        e = tl.exp2(s)
        total += tl.sum(e, 1)
        if of_columns is not None:
            tl.store(of_column, before + tl.sum(e, 0), mask=counts_too)
    else:
        higher = tl.maximum(top, tl.max(s, 1))
        offset = tl.where(higher == -INFINITY, 0.0, higher)
        total = total * tl.exp2(top - offset) + tl.sum(tl.exp2(s - offset[:, None]), 1)
        top = higher
    return total, top, positives, count


@triton.jit
def _store_rows(loss, lse, counts, n, exists, total, top, positives, count):
    """Loss in nats, log2-sum-exp2 and positives of rows, all of them 0 for a row without a positive."""
    valid = count > 0
    value = tl.where(valid, tl.log2(tl.where(valid, total, 1.0)) + top, 0.0)
    tl.store(lse + n, value, mask=exists)
    tl.store(loss + n, tl.where(valid, value - positives / tl.maximum(count, 1.0), 0.0) * LN2, mask=exists)
    tl.store(counts + n, count, mask=exists)


@triton.jit
def _forward_rows(
    x_block, x, x_inverse, x_ids, y, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial, slot, of_columns,
    X, Y, D, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows over a share of the columns: all of them, or with of_columns those from its own rows on."""
    x_n, exists = _indices(x_block, X, BLOCK_X)
    inverse, present = _inverse(x_inverse, x_n, exists)
    factor *= inverse
    shared: tl.constexpr = y_ids[0] is not None
    x_low, x_high = None, None
    if shared:
        x_low, x_high = _extent(x_ids[0], x_ids[3], x_n, present)
    x_tile = None
    if WHOLE:
        x_tile = _load(x, x_n, present, 0, D, BLOCK_D, UPCAST)

    zero = tl.zeros([BLOCK_X], tl.float32)
    sums = (zero, zero if BOUNDED else zero - INFINITY, zero, zero)
    # A share is every SPLITS-th block. From number ``own`` on come those of the rows themselves, from ``begin`` on
    # those behind them.
    split = tl.program_id(1)
    blocks = tl.cdiv(Y, BLOCK_Y) * tl.max(present.to(tl.int32), 0)
    begin, end, behind = 0, _number(blocks, split, SPLITS), 0
    if of_columns is not None:
        after_own = tl.cdiv((x_block + 1) * BLOCK_X, BLOCK_Y)
        behind = after_own * BLOCK_Y
        begin = tl.minimum(_number(after_own, split, SPLITS), end)
        own = tl.minimum(_number(x_block * BLOCK_X // BLOCK_Y, split, SPLITS), end)
    if shared:
        low += split
        high += split
    if NEGATIVES != "same_image" or not shared:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = stop, stop
            if shared:
                first, after = _shared_blocks(low, high, chunk, stop, x_low, x_high, CHUNK, SPLITS)
            for i in range(chunk, stop - (after - first)):
                j = (i + tl.where(i >= first, after - first, 0)) * SPLITS + split
                sums = _forward_tile(
                    x_tile, x, x_n, present, factor, x_ids, y, j, Y, y_inverse, y_ids, sums, of_columns, behind, D,
                    False, NEGATIVES, BOUNDED, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST,
                )  # fmt: skip
    if shared:
        # The blocks of the rows themselves come first, as a chunk of their own: the range around all is wide.
        for chunk in range(begin if of_columns is None else begin - CHUNK, end, CHUNK):
            start, stop = tl.maximum(chunk, begin), tl.minimum(chunk + CHUNK, end)
            first, after = _shared_blocks(low, high, start, stop, x_low, x_high, CHUNK, SPLITS)
            if of_columns is not None:
                first = tl.where(chunk < begin, own, first)
            for i in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                block, part = i // (BLOCK_Y // BLOCK_S) * SPLITS, i % (BLOCK_Y // BLOCK_S)
                if NEGATIVES != "same_image" or _may_share(low, high, block, x_low, x_high):
                    j = (block + split) * (BLOCK_Y // BLOCK_S) + part
                    sums = _forward_tile(
                        x_tile, x, x_n, present, factor, x_ids, y, j, Y, y_inverse, y_ids, sums, of_columns, behind, D,
                        True, NEGATIVES, BOUNDED, BLOCK_X, BLOCK_S, BLOCK_D, WHOLE, PRECISION, UPCAST,
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
    """The sums of blocks of rows x over a share of the columns y; columns without ids are negatives of every row.

    Results where one program sees every column, else sums of each row in partial [slots, 3 or 4, X], at slot + share:
    total, positives, count and, for logits without a bound, the maximum. A program has one block of rows.

    With TRIANGULAR (y is x, logits are bounded) one triangle of the symmetric logits is computed: a program has a
    group of blocks of rows, dealt there and back so that each group takes as many tiles, and adds the sums of columns
    behind the diagonal to the slot of its group, 0 at first. The splits of a group touch different columns there.
    """
    of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    factor = _scale(temperature, scale)
    group = tl.program_id(0)
    if TRIANGULAR:
        groups = tl.num_programs(0)
        of_columns = partial + group.to(tl.int64) * 3 * X
        for turn in range(tl.cdiv(tl.cdiv(X, BLOCK_X), groups)):
            block = turn * groups + tl.where(turn % 2 == 0, group, groups - 1 - group)
            _forward_rows(
                block, of_x, x_inverse, x_ids, of_y, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial,
                slot, of_columns, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, BLOCK_X, BLOCK_Y, BLOCK_S, BLOCK_D,
                WHOLE, PRECISION, UPCAST,
            )  # fmt: skip
            tl.debug_barrier()  # the next rows read sums that other threads of the program have written
    else:
        _forward_rows(
            group, of_x, x_inverse, x_ids, of_y, y_inverse, y_ids, low, high, factor, loss, lse, counts, partial,
            slot, None, X, Y, D, NEGATIVES, BOUNDED, SPLITS, CHUNK, BLOCK_X, BLOCK_Y, BLOCK_S, BLOCK_D,
            WHOLE, PRECISION, UPCAST,
        )  # fmt: skip


@triton.jit
def join(partial, loss, lse, counts, slots, X, BOUNDED: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Join the sums of all slots, partial [slots, 3 or 4, X], in their order."""
    n, exists = _indices(tl.program_id(0), X, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    top = total if BOUNDED else total - INFINITY
    positives, count = total, total
    for start in range(0, slots, BLOCK_SLOTS):
        slot = start + tl.arange(0, BLOCK_SLOTS).to(tl.int64)
        mask = (slot < slots)[:, None] & exists[None, :]
        at = partial + slot[:, None] * (3 if BOUNDED else 4) * X + n[None, :]
        its_total = tl.load(at, mask=mask, other=0.0)
        if BOUNDED:
            total += tl.sum(its_total, 0)
        else:
            its_top = tl.load(at + X + X + X, mask=mask, other=-INFINITY)
            higher = tl.maximum(top, tl.max(its_top, 0))
            offset = tl.where(higher == -INFINITY, 0.0, higher)
            total = total * tl.exp2(top - offset) + tl.sum(its_total * tl.exp2(its_top - offset[None, :]), 0)
            top = higher
        positives += tl.sum(tl.load(at + X, mask=mask, other=0.0), 0)
        count += tl.sum(tl.load(at + X + X, mask=mask, other=0.0), 0)
    _store_rows(loss, lse, counts, n, exists, total, top, positives, count)


@triton.jit
def _of_pair(values, x_n, x_present, y_n, y_present, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr):
    """Coefficients of the pairs of a tile: of the row that x is, of the row that y is, or their sum."""
    if Y_ROWS:
        pair = tl.load(values + y_n, mask=y_present, other=0.0)[None, :]
        if X_ROWS:
            pair += tl.load(values + x_n, mask=x_present, other=0.0)[:, None]
        return pair
    else:
        return tl.load(values + x_n, mask=x_present, other=0.0)[:, None]


@triton.jit
def _add_product(acc, w, y, PRECISION: tl.constexpr):
    """Acc + w y. Weights of float16 vectors are bfloat16: they are as small as 1 / (rows x columns)."""
    if y.dtype == tl.float16:
        y = y.to(tl.bfloat16)
    return tl.dot(w.to(y.dtype), y, acc, input_precision=PRECISION)


@triton.jit
def _gradient_tile(
    x_tile, x, x_n, x_present, x_factor, x_ids, y, y_block, Y, y_inverse, y_ids, coefficients, acc, raw, D,
    SHARED: tl.constexpr, X_ROWS: tl.constexpr, Y_ROWS: tl.constexpr, NEGATIVES: tl.constexpr, BOUNDED: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Add one block of y to the gradient of the program's vectors; SHARED says whether ids are compared."""
    of_exp, of_positive, of_lse = coefficients
    y_n, y_exists = _indices(y_block, Y, BLOCK_Y)
    inverse, y_present = _inverse(y_inverse, y_n, y_exists)
    y_tile = None
    if WHOLE:
        y_tile = _load(y, y_n, y_present, 0, D, BLOCK_D, UPCAST)
    s = _products(
        x_tile, x, x_n, x_present, y_tile, y, y_n, y_present, D, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION, UPCAST
    )
    s = s * x_factor[:, None] * inverse[None, :]
    if not BOUNDED:  # absent vectors are 0 in the products below, so that a bounded, finite weight does nothing there
        s += tl.where(y_present, 0.0, -INFINITY)[None, :]
    if SHARED:
        positive, counted = _compare(x_ids, x_n, x_present, y_ids, y_n, y_present, NEGATIVES)
        s = tl.where(counted, s, -INFINITY)

    if BOUNDED:
        w = tl.exp2(s) * _of_pair(of_exp, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS)
    else:
        tl.static_assert(
            X_ROWS != Y_ROWS, "two exponentials a pair: logits without a bound are done one side at a time"
        )
        its_lse = _of_pair(of_lse, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS)
        w = tl.exp2(s - its_lse) * _of_pair(of_exp, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS)
    if SHARED:
        w -= tl.where(positive, _of_pair(of_positive, x_n, x_present, y_n, y_present, X_ROWS, Y_ROWS), 0.0)

    w *= inverse[None, :]
    if WHOLE:
        acc = _add_product(acc, w, y_tile, PRECISION)
    else:
        for start in range(0, D, BLOCK_D):
            tile = _load(y, y_n, y_present, start, D, BLOCK_D, UPCAST)
            d = start + tl.arange(0, BLOCK_D)
            at = raw + (x_n * SPLITS)[:, None] * D + d[None, :]
            mask = x_present[:, None] & (d < D)[None, :]
            tl.store(at, _add_product(tl.load(at, mask=mask, other=0.0), w, tile, PRECISION), mask=mask)
        tl.debug_barrier()  # the next block reads what other threads of the program have written
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
    """T dL/d(unit vector) of a block of x over a share of y, into raw [X, SPLITS, D] (added to it with ADD).

    X_ROWS and Y_ROWS say whose losses count: those of x (x is query), of y (x is key or bank), or both (query is key,
    where dL/ds + (dL/ds)^T is symmetric). Without WHOLE the sums are kept in raw, which must be 0 at first.
    """
    split = tl.program_id(1)
    x_n, exists = _indices(tl.program_id(0), X, BLOCK_X)
    inverse, present = _inverse(x_inverse, x_n, exists)
    factor = inverse * _scale(temperature, scale)
    of_x, of_y = (x, x_stride_n, x_stride_d), (y, y_stride_n, y_stride_d)
    x_ids = (x_image, x_part, x_view, x_stride_image, x_stride_part, x_stride_view)
    y_ids = (y_image, y_part, y_view, y_stride_image, y_stride_part, y_stride_view)
    coefficients = (of_exp, of_positive, of_lse)
    SHARED: tl.constexpr = x_image is not None and y_image is not None
    x_low, x_high = None, None
    if SHARED:
        x_low, x_high = _extent(x_image, x_stride_image, x_n, present)
    x_tile = None
    if WHOLE:
        x_tile = _load(of_x, x_n, present, 0, D, BLOCK_D, UPCAST)
    raw += split.to(tl.int64) * D
    acc = tl.zeros([BLOCK_X, BLOCK_D if WHOLE else 1], tl.float32)

    share = tl.cdiv(tl.cdiv(Y, BLOCK_Y), SPLITS)
    begin = split * share
    end = tl.minimum(begin + share, tl.cdiv(Y, BLOCK_Y)) * tl.max(present.to(tl.int32), 0)
    if NEGATIVES != "same_image" or not SHARED:
        for chunk in range(begin, end, CHUNK):
            stop = tl.minimum(chunk + CHUNK, end)
            first, after = stop, stop
            if SHARED:
                first, after = _shared_blocks(low, high, chunk, stop, x_low, x_high, CHUNK)
            for i in range(chunk, stop - (after - first)):
                j = i + tl.where(i >= first, after - first, 0)
                acc = _gradient_tile(
                    x_tile, of_x, x_n, present, factor, x_ids, of_y, j, Y, y_inverse, y_ids, coefficients, acc, raw, D,
                    False, X_ROWS, Y_ROWS, NEGATIVES, BOUNDED, SPLITS, BLOCK_X, BLOCK_Y, BLOCK_D, WHOLE, PRECISION,
                    UPCAST,
                )  # fmt: skip
    if SHARED:
        for chunk in range(begin, end, CHUNK):
            first, after = _shared_blocks(low, high, chunk, tl.minimum(chunk + CHUNK, end), x_low, x_high, CHUNK)
            for j in range(first * (BLOCK_Y // BLOCK_S), after * (BLOCK_Y // BLOCK_S)):
                if NEGATIVES != "same_image" or _may_share(low, high, j // (BLOCK_Y // BLOCK_S), x_low, x_high):
                    acc = _gradient_tile(
                        x_tile, of_x, x_n, present, factor, x_ids, of_y, j, Y, y_inverse, y_ids, coefficients, acc, raw,
                        D, True, X_ROWS, Y_ROWS, NEGATIVES, BOUNDED, SPLITS, BLOCK_X, BLOCK_S, BLOCK_D, WHOLE,
                        PRECISION, UPCAST,
                    )  # fmt: skip

    if WHOLE:
        d = tl.arange(0, BLOCK_D)
        at = raw + (x_n * SPLITS)[:, None] * D + d[None, :]
        mask = exists[:, None] & (d < D)[None, :]
        if ADD:
            acc += tl.load(at, mask=mask, other=0.0)
        tl.store(at, acc, mask=mask)


@triton.jit
def _sum_shares(raw, n, present, start, D, SPLITS: tl.constexpr, BLOCK_D: tl.constexpr):
    """Channels start.. of raw [X, SPLITS, D], summed over the shares in their order."""
    d = start + tl.arange(0, BLOCK_D)
    mask = present[:, None] & (d < D)[None, :]
    at = raw + (n * SPLITS)[:, None] * D + d[None, :]
    g = tl.load(at, mask=mask, other=0.0)
    for split in range(1, SPLITS):
        g += tl.load(at + split * D, mask=mask, other=0.0)
    return g


@triton.jit
def _along(vectors, n, present, raw, D, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST):
    """<x, g> of vectors n, where g is the sum of the shares of raw."""
    along = tl.zeros([BLOCK], tl.float32)
    for start in range(0, D, BLOCK_D):
        tile = _load(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32)
        along += tl.sum(tile * _sum_shares(raw, n, present, start, D, SPLITS, BLOCK_D), 1)
    return along


@triton.jit
def inner(
    x, x_stride_n, x_stride_d, inverse, raw, out, X, D,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """T times the share of each x in sum_ij s_ij dL/ds_ij: <u, g> of the unit vector and what raw holds of it."""
    n, exists = _indices(tl.program_id(0), X, BLOCK)
    factor, present = _inverse(inverse, n, exists)
    along = _along((x, x_stride_n, x_stride_d), n, present, raw, D, SPLITS, BLOCK, BLOCK_D, UPCAST)
    tl.store(out + n, tl.where(present, along * factor, 0.0), mask=exists)


@triton.jit
def finish(
    x, x_stride_n, x_stride_d, inverse, temperature, scale, raw, out, X, D,
    NORMALIZE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dL/dx [X, D] from raw [X, SPLITS, D]: the sum of the shares, 1/T, and back through the normalisation.

    For the unit vector u = x inverse: dL/dx = inverse (g - u <u, g>). ``out`` may be raw.
    """
    vectors = (x, x_stride_n, x_stride_d)
    n, exists = _indices(tl.program_id(0), X, BLOCK)
    factor, present = _inverse(inverse, n, exists)
    along = tl.zeros([BLOCK], tl.float32)
    if NORMALIZE:
        along = _along(vectors, n, present, raw, D, SPLITS, BLOCK, BLOCK_D, UPCAST)
        along = tl.where(factor < CLAMPED, along * factor * factor, 0.0)
    factor *= _scale(temperature, scale) * LN2
    for start in range(0, D, BLOCK_D):
        g = _sum_shares(raw, n, present, start, D, SPLITS, BLOCK_D)
        if NORMALIZE:
            g -= _load(vectors, n, present, start, D, BLOCK_D, UPCAST).to(tl.float32) * along[:, None]
        g = tl.where(present[:, None], g * factor[:, None], 0.0)
        d = start + tl.arange(0, BLOCK_D)
        tl.store(out + n[:, None] * D + d[None, :], g.to(out.dtype.element_ty), mask=exists[:, None] & (d < D)[None, :])
