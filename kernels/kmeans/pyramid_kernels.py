"""Kernels of k-means of feature pyramids, in one file because they share names, shapes and the resizing functions.

Shapes: level l is x_l [B, D_l, h_l, w_l] with any strides; the pixels are those of size (H, W), N = H W. Cells of all
levels are concatenated in scores [B, cells, KP] and grams [B, 4, cells]; channels of all levels are concatenated, each
level padded to full blocks, in m [B, DP, KP] and mu [B, DP]. Tuples have one entry per level.
:mod:`fgfast.kernels.kmeans.pyramid` is the host side.
"""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.kmeans.tiles import (
    EPS,
    add_product,
    find_farthest,
    has_converged,
    is_finite,
    nearest_centroid,
    pixel_distances,
    relative,
    store_centred,
)


@triton.jit
def _taps(at, length, size):
    """Of the two cells that positions ``at`` of ``size`` interpolate: the lower one and the weight of the upper one.

    That weight is 0 at the edge. Integer arithmetic until one division that is rounded correctly, which a plain one is
    not on a GPU: every kernel and the host agree.
    """
    twice = tl.maximum((2 * at + 1) * length - size, 0)
    low = twice // (2 * size)
    fraction = tl.div_rn((twice - low * 2 * size).to(tl.float32), tl.cast(2 * size, tl.float32))
    return low, tl.where(low < length - 1, fraction, 0.0)


@triton.jit
def _tap_weight(cell, low, fraction):
    """The weight of a cell in positions with taps (low, fraction)."""
    return tl.where(cell == low, 1 - fraction, tl.where(cell == low + 1, fraction, 0.0))


@triton.jit
def _pixel_rows(first, last, length, size):
    """First and last row of pixels that interpolate rows of cells first to last, or one more at each end."""
    low = tl.maximum(2 * first - 1, 0) * size // (2 * length) - 1
    high = (2 * last + 3) * size // (2 * length) + 1
    return tl.maximum(low, 0), tl.minimum(high, size - 1)


@triton.jit
def _cell_offsets(y, x, width, strides, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of cells (y, x) within an image; FLAT: rows of cells are contiguous with each other."""
    cell = y * width + x
    if FLAT:
        return (cell.to(tl.int64) if WIDE else cell) * strides[3]
    if WIDE:
        return y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return y * strides[2] + x * strides[3]


@triton.jit
def _flat_offsets(c, width, strides, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of cells c, numbered row by row; where rows follow each other neighbours are seen to be neighbours."""
    if FLAT:
        return (c.to(tl.int64) if WIDE else c) * strides[3]
    return _cell_offsets(c // width, c % width, width, strides, False, WIDE)


@triton.jit
def _aligned(strides, ALIGN: tl.constexpr):
    """The strides of a level whose images, channels and cells are multiples of ALIGN, so that the compiler sees it."""
    return strides[0] // ALIGN * ALIGN, strides[1] // ALIGN * ALIGN, strides[2], strides[3]


@triton.jit
def _channel_offsets(d, strides, WIDE: tl.constexpr):
    """Offsets of channels d within an image."""
    return (d.to(tl.int64) if WIDE else d) * strides[1]


@triton.jit
def _resize_scores(
    ptr, y, x, dy, dx, height, width, k, K, inside, KP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Scores [cells, KP] of one level resized to pixels, [BLOCK_N, BLOCK_K]; a cell of weight 0 is not read."""
    out = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            weight = (dy if i == 1 else 1 - dy) * (dx if j == 1 else 1 - dx)
            mixed = (inside & (weight > 0))[:, None] & (k < K)[None, :]
            at = ((y + i) * width + x + j).to(tl.int64)[:, None] * KP + k[None, :]
            out += tl.load(ptr + at, mixed, other=0.0) * weight[:, None]
    return out


# ---------------------------------------------------------------- labels


@triton.jit
def _score_tile(
    x_ptr, strides, size, m_ptr, mu_ptr, out_ptr, start,
    FLAT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Scores <f, m_k> of one tile of cells, <f - mu, m_k> with SHIFT."""
    channels, height, width = size
    c = start + tl.arange(0, BLOCK_C)
    k = tl.arange(0, KP)
    d = tl.arange(0, BLOCK_D)
    inside = c < height * width // ALIGN * ALIGN
    cell_offsets = _flat_offsets(c, width, strides, FLAT, WIDE)
    dots = tl.zeros([BLOCK_C, KP], tl.float32)
    for first in range(0, channels, BLOCK_D):
        mask = inside[:, None] & (first + d < channels)[None, :]
        offsets = cell_offsets[:, None] + _channel_offsets(first + d, strides, WIDE)[None, :]
        x = upcast(tl.load(x_ptr + offsets, mask, other=0.0), UPCAST)
        if SHIFT:
            x = relative(x, mu_ptr + first + d, False)
        m = tl.load(m_ptr + (first + d)[:, None] * KP + k[None, :])
        dots = tl.dot(x, m, dots, input_precision=PRECISION)
    tl.store(out_ptr + c.to(tl.int64)[:, None] * KP + k[None, :], dots, inside[:, None])


@triton.jit
def _label_strip(
    sizes, scores_ptr, bias_ptr, squares_ptr, weight_ptr, labels_ptr, distances_ptr, counts_ptr, inertia_ptr,
    changed_ptr, strip, height, width, rows, blocks, K,
    LEVELS: tl.constexpr, COSINE: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Labels and distances of a strip of rows of pixels; its counts, inertia and number of changed labels."""
    k = tl.arange(0, KP)
    bias = tl.zeros([KP], tl.float32)
    for block in range(blocks):
        bias += tl.load(bias_ptr + block * KP + k)
    counts = tl.zeros([KP], tl.float32)
    inertia = tl.zeros([BLOCK_N], tl.float32)
    changed = tl.zeros([BLOCK_N], tl.int32)
    last = tl.minimum((strip + 1) * rows, height) * width
    for start in range(strip * rows * width, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        dots = tl.zeros([BLOCK_N, KP], tl.float32)
        base = scores_ptr
        for level in tl.static_range(LEVELS):
            h, w = sizes[level][1], sizes[level][2]
            y, dy = _taps(n // width, h, height)
            x, dx = _taps(n % width, w, width)
            dots += _resize_scores(base, y, x, dy, dx, h, w, k, K, inside, KP, BLOCK_N, KP)
            base += tl.cast(h * w, tl.int64) * KP
        best, index = nearest_centroid(dots, bias, k, K, COSINE)
        weight = tl.where(inside, 1.0, 0.0)
        if WEIGHTED:
            weight = tl.load(weight_ptr + n, inside, other=0.0)
        squares = tl.load(squares_ptr + n, inside, other=0.0)
        distance, counted, _, has_nonfinite = pixel_distances(best, squares, weight, COSINE)
        label = tl.where(counted, index, -1)
        counts += tl.sum(tl.where(label[:, None] == k[None, :], weight[:, None], 0.0), 0)
        inertia += tl.where(has_nonfinite, float("nan"), tl.where(counted, weight * distance, 0.0))
        changed += (inside & (tl.load(labels_ptr + n, inside, other=-1) != label)).to(tl.int32)
        tl.store(distances_ptr + n, tl.where(counted, distance, -1.0), inside)
        tl.store(labels_ptr + n, label.to(labels_ptr.dtype.element_ty), inside)
    tl.store(counts_ptr + strip * KP + k, counts)
    tl.store(inertia_ptr + strip, tl.sum(inertia, 0))
    tl.store(changed_ptr + strip, tl.sum(changed, 0))


@triton.jit
def score(
    xs, strides, sizes, m_ptr, mu_ptr, scores_ptr, bias_ptr, squares_ptr, weight_ptr, done_ptr, needed_ptr, arrived_ptr,
    labels_ptr, distances_ptr, counts_ptr, inertia_ptr, changed_ptr,
    height, width, rows, strips, spans, programs, cells, blocks, DP, K,
    FLATS: tl.constexpr, ALIGNS: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, COSINE: tl.constexpr,
    SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    TILES: tl.constexpr, PAD: tl.constexpr, BLOCK_N: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Scores of spans[l] cells of a level; the last program that a strip of pixels waits for also labels the strip.

    TILES: cells and channels of a tile of each level. Which program labels a strip varies, but not what it computes.
    """
    b = (tl.program_id(0) // programs).to(tl.int64)
    program = tl.program_id(0) % programs
    if has_converged(done_ptr, b, True):
        return
    scores_ptr += b * cells * KP
    m_ptr += b * DP * KP
    mu_ptr += b * DP
    base = scores_ptr
    first = 0
    last = -1
    for level in tl.static_range(LEVELS):
        h, w = sizes[level][1], sizes[level][2]
        count = tl.cdiv(h * w, spans[level])
        if (program >= 0) & (program < count):
            begin = program * spans[level]
            end = tl.minimum(begin + spans[level], h * w)
            aligned = _aligned(strides[level], ALIGNS[level])
            for start in range(begin, end, TILES[level][0]):
                _score_tile(
                    xs[level] + b * aligned[0], aligned, sizes[level], m_ptr, mu_ptr, base, start,
                    FLATS[level], ALIGNS[level], WIDE, SHIFT, PRECISION, UPCAST, TILES[level][0], TILES[level][1], KP,
                )  # fmt: skip
            low, high = _pixel_rows(begin // w, (end - 1) // w, h, height)
            first = low // rows
            last = high // rows
        program -= count
        base += tl.cast(h * w, tl.int64) * KP
        m_ptr += tl.cdiv(sizes[level][0], PAD) * PAD * KP
        mu_ptr += tl.cdiv(sizes[level][0], PAD) * PAD
    tl.debug_barrier()  # all threads store their scores before one of them signals it
    arrived_ptr += b * strips
    n = b * height * width
    for strip in range(first, last + 1):
        others = tl.atomic_add(arrived_ptr + strip, 1, sem="acq_rel")
        if others == tl.load(needed_ptr + strip) - 1:
            _label_strip(
                sizes, scores_ptr, bias_ptr + b * blocks * KP, squares_ptr + n, weight_ptr + n, labels_ptr + n,
                distances_ptr + n, counts_ptr + b * strips * KP, inertia_ptr + b * strips, changed_ptr + b * strips,
                strip, height, width, rows, blocks, K, LEVELS, COSINE, WEIGHTED, BLOCK_N, KP,
            )  # fmt: skip
            tl.store(arrived_ptr + strip, 0)  # for the next step


# ---------------------------------------------------------------- sums


@triton.jit
def _weigh_cells(
    size, labels_ptr, scale_ptr, weights_ptr, first, last, height, width,
    UNIT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_X: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Weights [last - first, KP] of cells in each cluster: the adjoint of the resizing, applied to one-hot labels.

    For one row of cells at a time: first across the rows of pixels that interpolate this row, one weight per row; then
    along the row, as a product with the weights of its cells.
    """
    _, h, w = size
    k = tl.arange(0, KP)
    for y in range(first // w, (last - 1) // w + 1):
        low, high = _pixel_rows(y, y, h, height)
        for start in range(0, w, BLOCK_C):
            cell = start + tl.arange(0, BLOCK_C)
            cell_weights = tl.zeros([BLOCK_C, KP], tl.float32)
            for left in range(0, width, BLOCK_X):
                x = left + tl.arange(0, BLOCK_X)
                column = tl.zeros([BLOCK_X, KP], tl.float32)
                for row in range(low, high + 1):
                    top, dy = _taps(row, h, height)
                    share = _tap_weight(y, top, dy)
                    if share > 0:  # the bounds are those of any scale, and one or two rows too wide
                        weight = tl.zeros([BLOCK_X], tl.float32) + share
                        label = tl.load(labels_ptr + row * width + x, x < width, other=-1)
                        if not UNIT:
                            weight *= tl.load(scale_ptr + row * width + x, x < width, other=0.0)
                        column += tl.where(label[:, None] == k[None, :], weight[:, None], 0.0)
                tap, dx = _taps(x, w, width)
                along = _tap_weight(cell[:, None], tap[None, :], dx[None, :])
                cell_weights = tl.dot(along, column, cell_weights, input_precision="ieee")
            c = y * w + cell
            inside = (cell < w) & (c >= first) & (c < last)
            at = (c - first).to(tl.int64)[:, None] * KP + k[None, :]
            tl.store(weights_ptr + at, cell_weights, inside[:, None])


@triton.jit
def _sum_cells(
    x_ptr, strides, size, mu_ptr, labels_ptr, scale_ptr, weights_ptr, out_ptr, first_d, first, last, K,
    FLAT: tl.constexpr, SAME: tl.constexpr, WIDE: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Sums [K, D_l] over cells first to last, of CHUNKS blocks of channels; of cells less mu with SHIFT.

    SAME: cells are pixels, and labels give the weights that `_weigh_cells` would.
    """
    channels, _, w = size
    k = tl.arange(0, KP)
    d = first_d + tl.arange(0, BLOCK_S)
    acc = ()
    for _ in tl.static_range(CHUNKS):
        acc += (tl.zeros([BLOCK_S, KP], tl.float32),)  # type: ignore[assignment]
    for start in range(first, last, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = c < last
        if SAME:
            label = tl.load(labels_ptr + c, inside, other=-1)
            scale = tl.zeros([BLOCK_C], tl.float32) + 1
            if not UNIT:
                scale = tl.load(scale_ptr + c, inside, other=0.0)
            weights = tl.where(label[:, None] == k[None, :], scale[:, None], 0.0)
        else:
            at = (c - first).to(tl.int64)[:, None] * KP + k[None, :]
            weights = tl.load(weights_ptr + at, inside[:, None], other=0.0)
        offsets = _flat_offsets(c, w, strides, FLAT, WIDE)
        updated = ()
        for i in tl.static_range(CHUNKS):
            at = i * BLOCK_S + d
            mask = inside[None, :] & (at < channels)[:, None]
            f = tl.load(x_ptr + _channel_offsets(at, strides, WIDE)[:, None] + offsets[None, :], mask, other=0.0)
            f = upcast(tl.where(is_finite(f.to(tl.float32)), f, 0.0), UPCAST)
            if SHIFT:
                f -= tl.load(mu_ptr + at, at < channels, other=0.0)[:, None]
            updated += (add_product(acc[i], f, weights, PRECISION),)  # type: ignore[assignment]
        acc = updated
    for i in tl.static_range(CHUNKS):
        at = i * BLOCK_S + d
        target = out_ptr + k[None, :] * channels + at[:, None]
        tl.store(target, acc[i], (k < K)[None, :] & (at < channels)[:, None])


@triton.jit
def sums(
    xs, strides, sizes, parts, splits, spans, copies, weights_ptr, mu_ptr, labels_ptr, scale_ptr, done_ptr,
    height, width, units, weighed, DP, K,
    FLATS: tl.constexpr, SAME: tl.constexpr, ALIGNS: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr,
    SHIFT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, PAD: tl.constexpr,
    CHUNKS: tl.constexpr, BLOCKS_C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_X: tl.constexpr,
    KP: tl.constexpr,
):  # fmt: skip
    """Partial sums parts[l] [B, splits_l, K, D_l]: a program takes spans_l cells of a level, and some channels.

    It weighs its cells once, in a copy of its own in weights [B, weighed, KP], for its groups of channels: those of a
    level are dealt to copies_l programs.
    """
    b = (tl.program_id(0) // units).to(tl.int64)
    unit = tl.program_id(0) % units
    if has_converged(done_ptr, b, True):
        return
    labels_ptr += b * height * width
    scale_ptr += b * height * width
    weights_ptr += b * weighed * KP
    mu_ptr += b * DP
    for level in tl.static_range(LEVELS):
        channels = sizes[level][0]
        cells = sizes[level][1] * sizes[level][2] // ALIGNS[level] * ALIGNS[level]
        count = splits[level] * copies[level]
        if (unit >= 0) & (unit < count):
            split = unit // copies[level]
            first = split * spans[level]
            last = tl.minimum(first + spans[level], cells)
            own_ptr = weights_ptr + (tl.cast(unit % copies[level], tl.int64) * cells + first) * KP
            if not SAME[level]:
                _weigh_cells(
                    sizes[level], labels_ptr, scale_ptr, own_ptr, first, last, height, width,
                    UNIT, BLOCKS_C[level], BLOCK_X, KP,
                )  # fmt: skip
                tl.debug_barrier()  # the code below reads weights written by other threads of this program
            size = CHUNKS[level] * BLOCK_S
            aligned = _aligned(strides[level], ALIGNS[level])
            for group in range(unit % copies[level], tl.cdiv(channels, size), copies[level]):
                _sum_cells(
                    xs[level] + b * aligned[0], aligned, sizes[level], mu_ptr, labels_ptr, scale_ptr, own_ptr,
                    parts[level] + (b * splits[level] + split) * K * channels, group * size, first, last, K,
                    FLATS[level], SAME[level], WIDE, SHIFT, UNIT, PRECISION, UPCAST, CHUNKS[level], BLOCK_C, BLOCK_S,
                    KP,
                )  # fmt: skip
        unit -= count
        if not SAME[level]:
            weights_ptr += tl.cast(copies[level], tl.int64) * cells * KP
        mu_ptr += tl.cdiv(channels, PAD) * PAD


# ---------------------------------------------------------------- centroids


@triton.jit
def _load_resized(x_ptr, strides, size, at, d, height, width, WIDE: tl.constexpr):
    """Channels d of the resized map at pixels ``at`` [n], float32 [n, BLOCK_D]."""
    channels, h, w = size
    y, dy = _taps(at // width, h, height)
    x, dx = _taps(at % width, w, width)
    out = 0.0
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            weight = (dy if i == 1 else 1 - dy) * (dx if j == 1 else 1 - dx)
            mask = (weight > 0)[:, None] & (d < channels)[None, :]
            offsets = _cell_offsets(y + i, x + j, w, strides, False, WIDE)
            at_channels = x_ptr + offsets[:, None] + _channel_offsets(d, strides, WIDE)[None, :]
            out += tl.load(at_channels, mask, other=0.0).to(tl.float32) * weight[:, None]
    return out


@triton.jit
def _repair_empty(
    tile, count, x_ptr, strides, size, mu, weight_ptr, scale_ptr, labels_ptr, distances_ptr, k, d, height, width, K,
    WIDE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_D, KP] of one level and counts [KP] after the i-th farthest pixel moved to the i-th empty cluster.

    Every program of a problem makes the same choices. Ties go to the lowest pixel: the next one at this distance has a
    higher index.
    """
    pixels = height * width
    far = float("inf")
    taken = pixels
    searching = True
    before = count
    for empty in range(K):
        if (tl.sum(tl.where(k == empty, before, 0.0), 0) == 0) & searching:
            best, pixel = find_farthest(distances_ptr, pixels, far, taken, BLOCK)
            searching = (best >= 0) & ((far < float("inf")) | (best > 0))
            if searching:
                far = best
                taken = pixel
                w = tl.load(weight_ptr + pixel) if WEIGHTED else 1.0
                donor = tl.load(labels_ptr + pixel)
                at = pixel + tl.zeros([1], tl.int32)
                vector = tl.sum(_load_resized(x_ptr, strides, size, at, d, height, width, WIDE), 0)
                if SHIFT:
                    vector -= mu
                vector *= tl.load(scale_ptr + pixel)
                is_donor = tl.where(k == donor, 1.0, 0.0)
                tile = tl.where((k == empty)[None, :], vector[:, None], tile - vector[:, None] * is_donor[None, :])
                count = tl.where(k == empty, w, count - w * is_donor)
    return tile, count


@triton.jit
def _move_level(
    x_ptr, strides, size, part_ptr, splits, weight_ptr, scale_ptr, labels_ptr, distances_ptr, counts_ptr, lengths_ptr,
    c_ptr, m_ptr, mu_ptr, first, height, width, strips, blocks, channels, K,
    START: tl.constexpr, LENGTHS: tl.constexpr, COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    FARTHEST: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Move the centroids in BLOCK_D channels of one level; returns the bias (or squares) and shift [KP] of these.

    With SHIFT sums and centroids are relative to mu.
    """
    k = tl.arange(0, KP)
    d = first + tl.arange(0, BLOCK_D)
    mask = (k < K)[None, :] & (d < size[0])[:, None]
    place = k[None, :].to(tl.int64) * channels + d[:, None]
    before = tl.load(c_ptr + place, mask, other=0.0)
    mu = tl.load(mu_ptr + d)
    c = before
    shift = tl.zeros([KP], tl.float32)
    if not START:
        tile = tl.zeros([BLOCK_D, KP], tl.float32)
        for _ in range(splits):
            tile += tl.load(part_ptr + k[None, :] * size[0] + d[:, None], mask, other=0.0)
            part_ptr += K * size[0]
        count = tl.zeros([KP], tl.float32)
        for strip in range(strips):
            count += tl.load(counts_ptr + strip * KP + k)
        if FARTHEST:  # noqa: SIM102  (the one a constant, the other a value)
            if tl.sum(((count == 0) & (k < K)).to(tl.int32), 0) > 0:
                tile, count = _repair_empty(
                    tile, count, x_ptr, strides, size, mu, weight_ptr, scale_ptr, labels_ptr, distances_ptr, k, d,
                    height, width, K, WIDE, SHIFT, WEIGHTED, BLOCK,
                )  # fmt: skip
        if LENGTHS:
            c = tile
        else:
            divisor = tl.where(count > 0, count, 1.0)
            if COSINE:
                square = tl.zeros([KP], tl.float32)
                for block in range(blocks):
                    square += tl.load(lengths_ptr + block * KP + k)
                divisor = tl.maximum(tl.sqrt(square), EPS)
            c = tl.where((count > 0)[None, :], tile / divisor[None, :], before)
            shift = tl.sum((c - before) * (c - before), 0)
            tl.store(c_ptr + place, c, mask)
    if LENGTHS:
        partial = tl.sum(c * c, 0)
    else:
        partial = store_centred(m_ptr, c, mu * 0 if SHIFT else mu, k, d, K, size[0], KP, SHIFT)
    return partial, shift


@triton.jit
def move(
    xs, strides, sizes, parts, splits, weight_ptr, scale_ptr, labels_ptr, distances_ptr, counts_ptr, changed_ptr,
    lengths_ptr, shift_ptr, bias_ptr, c_ptr, m_ptr, mu_ptr, limit_ptr, done_ptr, steps_ptr, arrived_ptr,
    height, width, strips, blocks, DP, channels, K,
    START: tl.constexpr, LENGTHS: tl.constexpr, COSINE: tl.constexpr, SHIFT: tl.constexpr, WEIGHTED: tl.constexpr,
    FARTHEST: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr, PAD: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Centroids c [B, K, D] from the sums, empty clusters repaired; m, and bias in parts [B, blocks, KP].

    The last program of a problem decides whether it has converged. START: only m and bias, of the given c. LENGTHS:
    only the squared lengths of the sums, in parts [B, blocks, KP], which cosine needs before the centroids.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    if has_converged(done_ptr, b, True):
        return
    k = tl.arange(0, KP)
    n = b * height * width
    row = b * blocks + block
    c_ptr += b * K * channels
    m_ptr += b * DP * KP
    mu_ptr += b * DP
    rest = block
    for level in tl.static_range(LEVELS):
        count = tl.cdiv(sizes[level][0], PAD) * (PAD // BLOCK_D)
        if (rest >= 0) & (rest < count):
            partial, shift = _move_level(
                xs[level] + b * strides[level][0], strides[level], sizes[level],
                parts[level] + b * splits[level] * K * sizes[level][0], splits[level], weight_ptr + n, scale_ptr + n,
                labels_ptr + n, distances_ptr + n, counts_ptr + b * strips * KP, lengths_ptr + b * blocks * KP,
                c_ptr, m_ptr, mu_ptr, rest * BLOCK_D, height, width, strips, blocks, channels, K,
                START, LENGTHS, COSINE, SHIFT, WEIGHTED, FARTHEST, WIDE, BLOCK, BLOCK_D, KP,
            )  # fmt: skip
            if LENGTHS:
                tl.store(lengths_ptr + row * KP + k, partial)
            else:
                tl.store(bias_ptr + row * KP + k, partial)
            if not (START or LENGTHS):
                tl.store(shift_ptr + row, tl.sum(shift, 0))
        rest -= count
        c_ptr += sizes[level][0]
        m_ptr += count * BLOCK_D * KP
        mu_ptr += count * BLOCK_D
    if not (START or LENGTHS):
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + b, 1, sem="acq_rel") == blocks - 1:
            moved = 0.0
            for i in range(blocks):
                moved += tl.load(shift_ptr + b * blocks + i)
            changed = 0
            for i in range(strips):
                changed += tl.load(changed_ptr + b * strips + i)
            converged = (moved <= tl.load(limit_ptr + b)) | (changed == 0)
            tl.store(done_ptr + b, converged.to(tl.int32))
            tl.store(steps_ptr + b, tl.load(steps_ptr + b) + 1)
            tl.store(arrived_ptr + b, 0)


# ---------------------------------------------------------------- once per problem


@triton.jit
def _gram_tile(
    x_ptr, strides, size, mu_ptr, out_ptr, cells, tile,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channels, h, w = size
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    y, x = c // w, c % w
    inside = c < h * w
    right, below = inside & (x < w - 1), inside & (y < h - 1)
    here = _cell_offsets(y, x, w, strides, FLAT, WIDE)
    own = tl.zeros([BLOCK_C], tl.float32)
    across, down, diagonal = own, own, own
    for first in range(0, channels, BLOCK_D):
        mu = tl.load(mu_ptr + first + d)
        at = x_ptr + here[:, None] + _channel_offsets(first + d, strides, WIDE)[None, :]
        mask = (first + d < channels)[None, :]
        f = tl.load(at, inside[:, None] & mask, other=0.0).to(tl.float32) - mu[None, :]
        f_x = tl.load(at + strides[3], right[:, None] & mask, other=0.0).to(tl.float32) - mu[None, :]
        f_y = tl.load(at + strides[2], below[:, None] & mask, other=0.0).to(tl.float32) - mu[None, :]
        both = (right & below)[:, None] & mask
        f_xy = tl.load(at + strides[2] + strides[3], both, other=0.0).to(tl.float32) - mu[None, :]
        own += tl.sum(tl.where(mask, f * f, 0.0), 1)
        across += tl.sum(tl.where(mask, f * f_x, 0.0), 1)
        down += tl.sum(tl.where(mask, f * f_y, 0.0), 1)
        diagonal += tl.sum(tl.where(mask, f * f_xy + f_x * f_y, 0.0), 1)
    tl.store(out_ptr + c, own, inside)
    out_ptr += cells  # step by step: 3 cells may exceed 32 bits
    tl.store(out_ptr + c, across, inside)
    out_ptr += cells
    tl.store(out_ptr + c, down, inside)
    out_ptr += cells
    tl.store(out_ptr + c, diagonal, inside)


@triton.jit
def grams(
    xs, strides, sizes, mu_ptr, out_ptr, tiles, cells, DP,
    FLATS: tl.constexpr, WIDE: tl.constexpr, LEVELS: tl.constexpr,
    PAD: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Inner products [B, 4, cells], relative to mu, of each cell with itself, its right, lower and diagonal neighbour.

    The last one is summed over both diagonals.
    """
    b = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    out_ptr += b * 4 * cells
    mu_ptr += b * DP
    for level in tl.static_range(LEVELS):
        here = sizes[level][1] * sizes[level][2]
        count = tl.cdiv(here, BLOCK_C)
        if (tile >= 0) & (tile < count):
            _gram_tile(
                xs[level] + b * strides[level][0], strides[level], sizes[level], mu_ptr, out_ptr, cells, tile,
                FLATS[level], WIDE, BLOCK_C, BLOCK_D,
            )  # fmt: skip
        tile -= count
        out_ptr += here
        mu_ptr += tl.cdiv(sizes[level][0], PAD) * PAD


@triton.jit
def squares(sizes, gram_ptr, out_ptr, height, width, tiles, cells, LEVELS: tl.constexpr, BLOCK_N: tl.constexpr):
    """|x_n - mu|^2 [B, N] from the inner products of the cells that each pixel interpolates."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < height * width
    gram_ptr += b * 4 * cells
    total = tl.zeros([BLOCK_N], tl.float32)
    for level in tl.static_range(LEVELS):
        h, w = sizes[level][1], sizes[level][2]
        y, dy = _taps(n // width, h, height)
        x, dx = _taps(n % width, w, width)
        at = gram_ptr + y * w + x
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                weight = (dy if i == 1 else 1 - dy) * (dx if j == 1 else 1 - dx)
                total += weight * weight * tl.load(at + i * w + j, inside & (weight > 0), other=0.0)
            side = (dy if i == 1 else 1 - dy) * (dy if i == 1 else 1 - dy) * 2 * dx * (1 - dx)
            total += side * tl.load(at + cells + i * w, inside & (side > 0), other=0.0)
            side = (dx if i == 1 else 1 - dx) * (dx if i == 1 else 1 - dx) * 2 * dy * (1 - dy)
            total += side * tl.load(at + cells + cells + i, inside & (side > 0), other=0.0)
        side = 2 * dy * (1 - dy) * dx * (1 - dx)
        total += side * tl.load(at + cells + cells + cells, inside & (side > 0), other=0.0)
        gram_ptr += h * w
    total = tl.where(total < 0, 0.0, total)  # NaN stays
    tl.store(out_ptr + b * height * width + n, total, inside)


@triton.jit
def rows(
    xs, strides, sizes, index_ptr, mu_ptr, out_ptr, height, width, count, blocks, DP, channels,
    WIDE: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Pixels index [B, count] minus mu, [B, count, D]; values that are not finite become 0."""
    tiles = tl.cdiv(count, BLOCK)
    b = (tl.program_id(0) // (tiles * blocks)).to(tl.int64)
    tile = tl.program_id(0) // blocks % tiles
    block = tl.program_id(0) % blocks
    i = tile * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index_ptr + b * count + i, i < count, other=0).to(tl.int32)
    out_ptr += b * count * channels
    mu_ptr += b * DP
    for level in tl.static_range(LEVELS):
        here = tl.cdiv(sizes[level][0], BLOCK_D)
        if (block >= 0) & (block < here):
            d = block * BLOCK_D + tl.arange(0, BLOCK_D)
            x = (
                _load_resized(
                    xs[level] + b * strides[level][0], strides[level], sizes[level], at, d, height, width, WIDE
                )
                - tl.load(mu_ptr + d)[None, :]
            )
            x = tl.where(is_finite(x), x, 0.0)
            mask = (i < count)[:, None] & (d < sizes[level][0])[None, :]
            tl.store(out_ptr + i.to(tl.int64)[:, None] * channels + d[None, :], x, mask)
        block -= here
        out_ptr += sizes[level][0]
        mu_ptr += here * BLOCK_D
