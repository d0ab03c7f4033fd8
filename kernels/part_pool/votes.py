"""Kernels of the majority grid: alone, and in the launch that pools by it."""

import triton
import triton.language as tl

from fgfast.kernels.part_pool.sums import pool, pool_runs
from fgfast.kernels.part_pool.tiles import part_ids


@triton.jit
def _vote(
    labels, grid, first, cells, H, W, K, height, width, tallest, widest, l_y, l_x,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Majority ids of BLOCK_J adaptive-pooling cells of an image, from cell ``first`` on, to its grid.

    No cell is taller than ``tallest`` or wider than ``widest``. An iteration reads BLOCK_X pixels of a row of each
    cell; unrolling by two overlaps the loads of two iterations.
    """
    cell = first + tl.arange(0, BLOCK_J).to(tl.int64)
    i, j = cell // width, cell % width
    top, bottom = i * H // height, tl.minimum(((i + 1) * H + height - 1) // height, H)
    left, right = j * W // width, tl.minimum(((j + 1) * W + width - 1) // width, W)
    bottom = tl.where(cell < cells, bottom, top)
    across = tl.cdiv(widest, BLOCK_X)
    most = tl.zeros([BLOCK_J], tl.int32)
    winner = tl.full([BLOCK_J], -1, tl.int64)
    for part in range(0, K, BLOCK_V):
        k = part + tl.arange(0, BLOCK_V)
        votes = tl.zeros([BLOCK_J, BLOCK_X, BLOCK_V], tl.int32)
        for turn in tl.range(0, tallest * across, loop_unroll_factor=2):
            y = top + turn // across
            x = left[:, None] + turn % across * BLOCK_X + tl.arange(0, BLOCK_X)[None, :]
            ids = part_ids(labels, y[:, None] * l_y + x * l_x, (y < bottom)[:, None] & (x < right[:, None]), K)
            votes += (ids[:, :, None] == k[None, None, :]).to(tl.int32)
        count = tl.sum(votes, 1)
        best = tl.max(count, 1)
        lowest = tl.min(tl.where(count == best[:, None], k[None, :], K), 1)
        winner = tl.where(best > most, lowest, winner)
        most = tl.maximum(best, most)
    tl.store(grid + cell, winner, mask=cell < cells)


@triton.jit
def grid_kernel(
    labels, grid, cells, H, W, K, height, width, tallest, widest, l_b, l_y, l_x,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Majority ids of BLOCK_J cells of an image."""
    image, block = (
        (tl.program_id(0) // tl.cdiv(cells, BLOCK_J)).to(tl.int64),
        tl.program_id(0) % tl.cdiv(cells, BLOCK_J),
    )
    _vote(
        labels + image * l_b, grid + image * cells, block.to(tl.int64) * BLOCK_J, cells,
        H, W, K, height, width, tallest, widest, l_y, l_x, BLOCK_J, BLOCK_X, BLOCK_V,
    )  # fmt: skip


@triton.jit
def map_kernel(
    x, labels, grid, weight, pooled, area, B, D, K, N, WIDTH, group_blocks, H, W, height, tallest, widest,
    x_b, x_d, x_y, x_x, l_b, l_y, l_x, w_b, w_y, w_x,
    MEAN: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    ALIGN: tl.constexpr, V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Pooled [B, K, D] and area [B, K] by the majority of id maps [B, H, W]; pixels are evenly spaced.

    A program computes the full grid of an image, stores its own copy in grid [groups, B, N], and pools
    ``group_blocks`` blocks of channels by it.
    """
    N, x_b, x_d = N // ALIGN * ALIGN, x_b // ALIGN * ALIGN, x_d // ALIGN * ALIGN  # as in `forward_kernel`
    blocks = tl.cdiv(D, BLOCK_D)
    groups = tl.cdiv(blocks, group_blocks)
    image, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    grid += (group * B + image) * N
    for first in range(0, N, BLOCK_J):
        _vote(
            labels + image * l_b, grid, first, N, H, W, K, height, WIDTH, tallest, widest, l_y, l_x,
            BLOCK_J, BLOCK_X, BLOCK_V,
        )  # fmt: skip
    tl.debug_barrier()  # the code below reads cells written by other threads of this program
    first = group * group_blocks
    last = tl.minimum(first + group_blocks, blocks)
    if V > 0:
        pool_runs(
            x + image * (x_b // V * V), grid, weight + image * w_b, pooled + image * K * D, area + image * K,
            first * BLOCK_D, tl.minimum(last * BLOCK_D, D), group == 0, D, K, N, WIDTH, WIDTH, 1, w_y, w_x,
            MEAN, WEIGHTED, UPCAST, V, BLOCK_D, BLOCK_P, BLOCK_K,
        )  # fmt: skip
    else:
        # Without hoisting, offsets of pixels are recomputed for each block: keeping them would take 40 more registers.
        for d_block in tl.range(first, last, disable_licm=True):
            pool(
                x + image * x_b, grid, weight + image * w_b, pooled, area, 0, B, image,
                d_block, 0, 0, N, D, K, WIDTH, x_d, x_y, x_x, WIDTH, 1, w_y, w_x,
                MEAN, True, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P, BLOCK_K,
            )  # fmt: skip
