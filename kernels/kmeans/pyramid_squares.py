"""Kernels of feature pyramids that run once per problem: squared norms, and rows of pixels."""

import triton
import triton.language as tl

from fgfast.kernels.kmeans.pyramid_cells import cell_offsets, channel_offsets, load_resized, taps
from fgfast.kernels.kmeans.tiles import is_finite


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
    here = cell_offsets(y, x, w, strides, FLAT, WIDE)
    own = tl.zeros([BLOCK_C], tl.float32)
    across, down, diagonal = own, own, own
    for first in range(0, channels, BLOCK_D):
        mu = tl.load(mu_ptr + first + d)
        at = x_ptr + here[:, None] + channel_offsets(first + d, strides, WIDE)[None, :]
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
        y, dy = taps(n // width, h, height)
        x, dx = taps(n % width, w, width)
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
            level_ptr = xs[level] + b * strides[level][0]
            x = load_resized(level_ptr, strides[level], sizes[level], at, d, height, width, WIDE)
            x -= tl.load(mu_ptr + d)[None, :]
            x = tl.where(is_finite(x), x, 0.0)
            mask = (i < count)[:, None] & (d < sizes[level][0])[None, :]
            tl.store(out_ptr + i.to(tl.int64)[:, None] * channels + d[None, :], x, mask)
        block -= here
        out_ptr += sizes[level][0]
        mu_ptr += here * BLOCK_D
