"""The kernel of feature pyramids that adds up the pixels of each cluster; names as in ``pyramid_cells.py``."""

import triton
import triton.language as tl

from fgfast.kernels.common import upcast
from fgfast.kernels.kmeans.pyramid_cells import (
    aligned_strides,
    channel_offsets,
    flat_offsets,
    pixel_rows,
    tap_weight,
    taps,
)
from fgfast.kernels.kmeans.tiles import add_product, has_converged, is_finite


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
        low, high = pixel_rows(y, y, h, height)
        for start in range(0, w, BLOCK_C):
            cell = start + tl.arange(0, BLOCK_C)
            cell_weights = tl.zeros([BLOCK_C, KP], tl.float32)
            for left in range(0, width, BLOCK_X):
                x = left + tl.arange(0, BLOCK_X)
                column = tl.zeros([BLOCK_X, KP], tl.float32)
                for row in range(low, high + 1):
                    top, dy = taps(row, h, height)
                    share = tap_weight(y, top, dy)
                    if share > 0:  # the bounds are those of any scale, and one or two rows too wide
                        weight = tl.zeros([BLOCK_X], tl.float32) + share
                        label = tl.load(labels_ptr + row * width + x, x < width, other=-1)
                        if not UNIT:
                            weight *= tl.load(scale_ptr + row * width + x, x < width, other=0.0)
                        column += tl.where(label[:, None] == k[None, :], weight[:, None], 0.0)
                tap, dx = taps(x, w, width)
                along = tap_weight(cell[:, None], tap[None, :], dx[None, :])
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
        offsets = flat_offsets(c, w, strides, FLAT, WIDE)
        updated = ()
        for i in tl.static_range(CHUNKS):
            at = i * BLOCK_S + d
            mask = inside[None, :] & (at < channels)[:, None]
            f = tl.load(x_ptr + channel_offsets(at, strides, WIDE)[:, None] + offsets[None, :], mask, other=0.0)
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
            aligned = aligned_strides(strides[level], ALIGNS[level])
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
