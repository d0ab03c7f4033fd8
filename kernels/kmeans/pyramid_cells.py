"""Functions that the kernels of feature pyramids share: cells, channels and the weights of resizing.

Shapes of all of them: level l is x_l [B, D_l, h_l, w_l] with any strides; the pixels are those of size (H, W), N = H W.
Cells of all levels are concatenated in scores [B, cells, KP] and grams [B, 4, cells]; channels of all levels are
concatenated, each level padded to full blocks, in m [B, DP, KP] and mu [B, DP]. Tuples have one entry per level.
"""

import triton
import triton.language as tl


@triton.jit
def taps(at, length, size):
    """Of the two cells that positions ``at`` of ``size`` interpolate: the lower one and the weight of the upper one.

    That weight is 0 at the edge. Integer arithmetic until one division that is rounded correctly, which a plain one is
    not on a GPU: every kernel and the host agree.
    """
    twice = tl.maximum((2 * at + 1) * length - size, 0)
    low = twice // (2 * size)
    fraction = tl.div_rn((twice - low * 2 * size).to(tl.float32), tl.cast(2 * size, tl.float32))
    return low, tl.where(low < length - 1, fraction, 0.0)


@triton.jit
def tap_weight(cell, low, fraction):
    """The weight of a cell in positions with taps (low, fraction)."""
    return tl.where(cell == low, 1 - fraction, tl.where(cell == low + 1, fraction, 0.0))


@triton.jit
def pixel_rows(first, last, length, size):
    """First and last row of pixels that interpolate rows of cells first to last, or one more at each end."""
    low = tl.maximum(2 * first - 1, 0) * size // (2 * length) - 1
    high = (2 * last + 3) * size // (2 * length) + 1
    return tl.maximum(low, 0), tl.minimum(high, size - 1)


@triton.jit
def cell_offsets(y, x, width, strides, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of cells (y, x) within an image; FLAT: rows of cells are contiguous with each other."""
    cell = y * width + x
    if FLAT:
        return (cell.to(tl.int64) if WIDE else cell) * strides[3]
    if WIDE:
        return y.to(tl.int64) * strides[2] + x.to(tl.int64) * strides[3]
    return y * strides[2] + x * strides[3]


@triton.jit
def flat_offsets(c, width, strides, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of cells c, numbered row by row; where rows follow each other neighbours are seen to be neighbours."""
    if FLAT:
        return (c.to(tl.int64) if WIDE else c) * strides[3]
    return cell_offsets(c // width, c % width, width, strides, False, WIDE)


@triton.jit
def aligned_strides(strides, ALIGN: tl.constexpr):
    """The strides of a level whose images, channels and cells are multiples of ALIGN, so that the compiler sees it."""
    return strides[0] // ALIGN * ALIGN, strides[1] // ALIGN * ALIGN, strides[2], strides[3]


@triton.jit
def channel_offsets(d, strides, WIDE: tl.constexpr):
    """Offsets of channels d within an image."""
    return (d.to(tl.int64) if WIDE else d) * strides[1]


@triton.jit
def load_resized(x_ptr, strides, size, at, d, height, width, WIDE: tl.constexpr):
    """Channels d of the resized map at pixels ``at`` [n], float32 [n, BLOCK_D]."""
    channels, h, w = size
    y, dy = taps(at // width, h, height)
    x, dx = taps(at % width, w, width)
    out = 0.0
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            weight = (dy if i == 1 else 1 - dy) * (dx if j == 1 else 1 - dx)
            mask = (weight > 0)[:, None] & (d < channels)[None, :]
            offsets = cell_offsets(y + i, x + j, w, strides, False, WIDE)
            at_channels = x_ptr + offsets[:, None] + channel_offsets(d, strides, WIDE)[None, :]
            out += tl.load(at_channels, mask, other=0.0).to(tl.float32) * weight[:, None]
    return out
