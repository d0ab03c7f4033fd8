r"""Part pooling and the majority grid.

Forward, one launch: features [B, D, N] by strides, labels [B, N] -> pooled [B, K, D], area [B, K].

.. math:: pooled_{bkd} = \frac{1}{area_{bk}} \sum_p [labels_{bp} = k]\, w_{bp} x_{bdp}

A program owns an image and a block of channels and walks over the pixels: [BLOCK_D, BLOCK_P] x one-hot [BLOCK_P, K] on
the tensor cores, K in one tile. Nobody shares an output, so sums have a fixed order. Few programs split the pixels and
leave partial sums, which a second kernel adds in order. Backward writes grad[labels] w / area, walking likewise.

Floors: forward reads B D N elements, labels and weights, and writes B K D; backward mirrors it. Labels are read again
by each block of channels, hence blocks of 256 bytes. Operations: 2 B D N K on tensor cores (three times that for
float32), under a tenth of their rate at the speed of the memory for K to 32.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgfast.kernels._common import MOST_REGISTERS, AotCase, interpreted, on_device_of, output_dtype, widened
from fgfast.kernels.configs import Row, config, processors, row_kind, served, table
from fgfast.kernels.tune import TuneCase

JOIN_D = 32
MOST_PARTS = 64  # parts a tile holds: forward reads the features again for each further block of them


@triton.jit
def _at(p, WIDTH, stride_y, stride_x, FLAT: tl.constexpr, WIDE: tl.constexpr):
    """Offset of pixel p within its image, where rows may have gaps between them; WIDE: int32 does not hold it."""
    if FLAT:
        return (p.to(tl.int64) if WIDE else p) * stride_x
    y, x = p // WIDTH, p % WIDTH
    return (y.to(tl.int64) if WIDE else y) * stride_y + (x.to(tl.int64) if WIDE else x) * stride_x


@triton.jit
def _part_ids(labels, offsets, inside, K):
    """Part of each pixel, -1 for none: compared before it is narrowed, so that no wide id turns into a part."""
    ids = tl.load(labels + offsets, mask=inside, other=0).to(tl.int64)
    return tl.where(inside & (ids >= 0) & (ids < K), ids, -1).to(tl.int32)


@triton.jit
def _truncated(x):
    """Keep the 8 leading bits of its significand of x: a bfloat16."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _one_hot_dot(x, hot, sums, UPCAST: tl.constexpr):
    """Add x @ hot to sums. A float32 is the exact sum of three bfloat16, so tensor cores multiply it exactly too."""
    if x.dtype == tl.float32:
        narrow: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16  # the interpreter knows no bfloat16
        hot = hot.to(narrow)
        high = _truncated(x)
        middle = _truncated(x - high)
        sums = tl.dot((x - high - middle).to(narrow), hot, sums)
        sums = tl.dot(middle.to(narrow), hot, sums)
        return tl.dot(high.to(narrow), hot, sums)
    return tl.dot(x, hot.to(x.dtype), sums)


@triton.jit
def _sums(
    x, labels, weight, d, k, first, last, D, K, WIDTH,
    x_d, x_y, x_x, l_y, l_x, w_y, w_x,
    SELECT: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums [BLOCK_D, BLOCK_K] and areas [BLOCK_K] over pixels first to last.

    Without SELECT a value that is not finite spoils its whole row, seen in the result. With it such a value reaches
    the sum of its own part alone, as NaN.
    """
    sums = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    bad_sums = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    areas = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        ids = _part_ids(labels, _at(p, WIDTH, l_y, l_x, FLAT, WIDE), inside, K)
        tile = x + (d.to(tl.int64) if WIDE else d)[:, None] * x_d + _at(p, WIDTH, x_y, x_x, FLAT, WIDE)[None, :]
        values = widened(tl.load(tile, mask=(d < D)[:, None] & inside[None, :], other=0.0), UPCAST)
        hot = ids[:, None] == k[None, :]
        if WEIGHTED:
            w = tl.load(weight + _at(p, WIDTH, w_y, w_x, FLAT, WIDE), mask=inside, other=0.0).to(tl.float32)
            hot = hot & (w > 0)[:, None]
            areas += tl.where(hot, w[:, None], 0.0)
        else:
            areas += hot.to(tl.float32)
        if SELECT:
            bad = ~(tl.abs(values.to(tl.float32)) < float("inf"))
            values = tl.where(bad, 0.0, values)
            narrow: tl.constexpr = tl.float32 if UPCAST else tl.bfloat16
            bad_sums = tl.dot(bad.to(narrow), hot.to(narrow), bad_sums)
        if WEIGHTED:
            values = values.to(tl.float32) * w[None, :]
        sums = _one_hot_dot(values, hot, sums, UPCAST)
    if SELECT:
        sums = tl.where(bad_sums > 0, float("nan"), sums)
    return sums, tl.sum(areas, 0)


@triton.jit
def forward_kernel(
    x, labels, weight, pooled, area, B, D, K, N, WIDTH, chunk, splits,
    x_b, x_d, x_y, x_x, l_b, l_y, l_x, w_b, w_y, w_x,
    MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Pooled [splits, B, K, D] and area [splits, B, K] of the pixels of each split."""
    program, d_block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    program, k_block = program // tl.cdiv(K, BLOCK_K), program % tl.cdiv(K, BLOCK_K)
    image, split = (program // splits).to(tl.int64), program % splits
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    first = split * chunk
    last = tl.minimum(first + chunk, N)

    x += image * x_b
    labels += image * l_b
    weight += image * w_b
    sums, areas = _sums(
        x, labels, weight, d, k, first, last, D, K, WIDTH, x_d, x_y, x_x, l_y, l_x, w_y, w_x,
        False, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    if tl.max(tl.max(tl.where(tl.abs(sums) < float("inf"), 0, 1), 0), 0) > 0:
        # Rare, so in narrow tiles: in wide ones this loop would cost the loop above half of its registers.
        sums, _ = _sums(
            x, labels, weight, d, k, first, last, D, K, WIDTH, x_d, x_y, x_x, l_y, l_x, w_y, w_x,
            True, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, 16, BLOCK_K,
        )  # fmt: skip
    if MEAN:
        sums = sums / tl.where(areas > 0, areas, 1.0)[None, :]

    row = (split * B + image) * K + k
    tl.store(pooled + row[None, :] * D + d[:, None], sums, mask=(d < D)[:, None] & (k < K)[None, :])
    if d_block == 0:
        tl.store(area + row, areas, mask=k < K)


@triton.jit
def join_kernel(
    parts, areas, pooled, area, B, D, K, splits,
    MEAN: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over splits, in order, of sums [splits, B, K, D] and areas [splits, B, K]."""
    program, d_block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    image, k_block = (program // tl.cdiv(K, BLOCK_K)).to(tl.int64), program % tl.cdiv(K, BLOCK_K)
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    tile = (k < K)[:, None] & (d < D)[None, :]
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    count = tl.zeros([BLOCK_K], tl.float32)
    for split in range(splits):
        row = (split * B + image) * K + k
        total += tl.load(parts + row[:, None] * D + d[None, :], mask=tile, other=0.0)
        count += tl.load(areas + row, mask=k < K, other=0.0)
    if MEAN:
        total = total / tl.where(count > 0, count, 1.0)[:, None]
    row = image * K + k
    tl.store(pooled + row[:, None] * D + d[None, :], total, mask=tile)
    if d_block == 0:
        tl.store(area + row, count, mask=k < K)


@triton.jit
def _spread(
    grad, rows, labels, weight, area, out, d, k, first, last, D, K, WIDTH,
    g_k, g_d, l_y, l_x, w_y, w_x, o_d, o_y, o_x,
    LOAD: tl.constexpr, MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the gradients of pixels first to last: one-hot product with rows [BLOCK_D, BLOCK_K], or loads."""
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = p < last
        ids = _part_ids(labels, _at(p, WIDTH, l_y, l_x, FLAT, WIDE), inside, K)
        scale = tl.full([BLOCK_P], 1.0, tl.float32)
        if WEIGHTED:
            scale = tl.load(weight + _at(p, WIDTH, w_y, w_x, FLAT, WIDE), mask=inside, other=0.0).to(tl.float32)
        kept = (ids >= 0) & (scale > 0)
        if MEAN:
            scale = scale / tl.load(area + ids, mask=kept, other=1.0)
        if LOAD:
            at = grad + d.to(tl.int64)[:, None] * g_d + tl.where(kept, ids, 0).to(tl.int64)[None, :] * g_k
            values = widened(tl.load(at, mask=(d < D)[:, None] & kept[None, :], other=0.0), UPCAST).to(tl.float32)
        else:
            hot = k[:, None] == ids[None, :]
            values = _one_hot_dot(rows, hot, tl.zeros([BLOCK_D, BLOCK_P], tl.float32), UPCAST)
        values = tl.where(kept[None, :], values * scale[None, :], 0.0)
        across = (d.to(tl.int64) if WIDE else d)[:, None] * o_d
        at = out + across + _at(p, WIDTH, o_y, o_x, FLAT, WIDE)[None, :]
        tl.store(at, values, mask=(d < D)[:, None] & inside[None, :])


@triton.jit
def backward_kernel(
    grad, labels, weight, area, out, D, K, N, WIDTH, chunk, splits,
    g_b, g_k, g_d, l_b, l_y, l_x, w_b, w_y, w_x, o_b, o_d, o_y, o_x,
    MEAN: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the features: that of its part at each pixel.

    More than BLOCK_K parts, and values that are not finite, which no product keeps apart, take a load an element.
    """
    program, d_block = tl.program_id(0) // tl.cdiv(D, BLOCK_D), tl.program_id(0) % tl.cdiv(D, BLOCK_D)
    image, split = (program // splits).to(tl.int64), program % splits
    d = d_block * BLOCK_D + tl.arange(0, BLOCK_D)
    k = tl.arange(0, BLOCK_K)
    first = split * chunk
    last = tl.minimum(first + chunk, N)
    grad += image * g_b
    labels += image * l_b
    weight += image * w_b
    area += image * K
    out += image * o_b
    at = grad + d.to(tl.int64)[:, None] * g_d + k.to(tl.int64)[None, :] * g_k
    rows = widened(tl.load(at, mask=(d < D)[:, None] & (k < K)[None, :], other=0.0), UPCAST)
    odd = tl.max(tl.max(tl.where(tl.abs(rows.to(tl.float32)) < float("inf"), 0, 1), 0), 0)
    if (odd > 0) | (K > BLOCK_K):
        _spread(
            grad, rows, labels, weight, area, out, d, k, first, last, D, K, WIDTH,
            g_k, g_d, l_y, l_x, w_y, w_x, o_d, o_y, o_x, True, MEAN, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P,
        )  # fmt: skip
    else:
        _spread(
            grad, rows, labels, weight, area, out, d, k, first, last, D, K, WIDTH,
            g_k, g_d, l_y, l_x, w_y, w_x, o_d, o_y, o_x, False, MEAN, FLAT, WIDE, WEIGHTED, UPCAST, BLOCK_D, BLOCK_P,
        )  # fmt: skip


@triton.jit
def grid_kernel(
    labels, grid, H, W, K, height, width, widest, l_b, l_y, l_x,
    BLOCK_J: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Majority id of BLOCK_J adaptive-pooling cells of one row of cells; no cell is wider than ``widest``."""
    program, block = tl.program_id(0) // tl.cdiv(width, BLOCK_J), tl.program_id(0) % tl.cdiv(width, BLOCK_J)
    image, i = (program // height).to(tl.int64), (program % height).to(tl.int64)
    j = block.to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    left, right = j * W // width, tl.minimum(((j + 1) * W + width - 1) // width, W)
    labels += image * l_b
    most = tl.zeros([BLOCK_J], tl.int32)
    winner = tl.full([BLOCK_J], -1, tl.int64)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        votes = tl.zeros([BLOCK_J, BLOCK_X, BLOCK_K], tl.int32)
        for y in range(i * H // height, ((i + 1) * H + height - 1) // height):
            for start in range(0, widest, BLOCK_X):
                x = left[:, None] + start + tl.arange(0, BLOCK_X)[None, :]
                inside = (x < right[:, None]) & (j < width)[:, None]
                ids = _part_ids(labels, y * l_y + x * l_x, inside, K)
                votes += (ids[:, :, None] == k[None, None, :]).to(tl.int32)
        count = tl.sum(votes, 1)
        top = tl.max(count, 1)
        lowest = tl.min(tl.where(count == top[:, None], k[None, :], K), 1)
        winner = tl.where(top > most, lowest, winner)
        most = tl.maximum(top, most)
    tl.store(grid + (image * height + i) * width + j, winner, mask=j < width)


def _flat(*maps: Tensor | None) -> bool:
    """Whether the pixels of each map [..., h, w] are evenly spaced."""
    return all(x is None or x.shape[-2] == 1 or x.stride(-2) == x.stride(-1) * x.shape[-1] for x in maps)


def _wide(*maps: Tensor | None) -> bool:
    """Whether an offset within one image of some map exceeds int32."""
    return any(
        x is not None and sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31
        for x in maps
    )


def _strides(x: Tensor | None, flat: bool) -> tuple[int, ...]:
    """Strides of [B, ..., h, w]; (0, 0, 0) for no weight. One column alone is walked by rows."""
    if x is None:
        return (0, 0, 0)
    *outer, y, across = x.stride()
    return (*outer, y, y if flat and x.shape[-1] == 1 else across)


def _split(pixels: int, block: int, programs: int, least: int, device: torch.device) -> tuple[int, int]:
    """(chunk, splits): pixels a program walks over, at least ``least``, and how many programs share an image."""
    wanted = -(-2 * processors(device) // max(1, programs))
    splits = max(1, min(wanted, pixels // least))
    chunk = max(block, triton.cdiv(triton.cdiv(pixels, splits), block) * block)
    return chunk, max(1, triton.cdiv(pixels, chunk))


def _blocks(row: Row, channels: int, parts: int, flat: bool) -> dict[str, int]:
    """Tiles of a problem; half of the pixels where each has an offset of its own to be held in registers."""
    block_k = min(MOST_PARTS, max(16, triton.next_power_of_2(parts)))
    block_d = min(row.tiles["BLOCK_D"], max(16, triton.next_power_of_2(channels)))
    return {"BLOCK_D": block_d, "BLOCK_P": row.tiles["BLOCK_P"] // (1 if flat else 2), "BLOCK_K": block_k}


def pool(features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    """Sums or means [B, K, D] of features [B, D, h, w], and area float32 [B, K]; labels and weight are [B, h, w]."""
    batch, channels, height, width = features.shape
    pixels, device = height * width, features.device
    pooled = features.new_empty(batch, n_parts, channels, dtype=output_dtype(features.dtype))
    area = features.new_empty(batch, n_parts, dtype=torch.float32)
    if batch == 0:
        return pooled.to(features.dtype), area
    if channels == 0:
        stand_in = features.new_zeros(batch, 1, height, width)
        return pooled.to(features.dtype), pool(stand_in, labels, n_parts, weight, mean)[1]
    row = config("part_pool", device, row_kind(features.dtype))
    flat = _flat(features, labels, weight)
    blocks = _blocks(row, channels, n_parts, flat)
    tiles = batch * triton.cdiv(channels, blocks["BLOCK_D"]) * triton.cdiv(n_parts, blocks["BLOCK_K"])
    # Partial sums are written and read: 8 K bytes a channel, against at least 256 K a channel of pixels.
    chunk, splits = _split(pixels, blocks["BLOCK_P"], tiles, max(1024, 128 * n_parts), device)
    sums, areas = pooled, area
    if splits > 1:
        sums = features.new_empty(splits, *pooled.shape, dtype=torch.float32)
        areas = area.new_empty(splits, *area.shape)
    with on_device_of(features):
        forward_kernel[(tiles * splits,)](
            features, labels, labels if weight is None else weight, sums, areas,
            batch, channels, n_parts, pixels, width, chunk, splits,
            *_strides(features, flat), *_strides(labels, flat), *_strides(weight, flat),
            MEAN=mean and splits == 1, FLAT=flat, WIDE=_wide(features, labels, weight), WEIGHTED=weight is not None,
            UPCAST=interpreted(), **blocks, **row.launch,
        )  # fmt: skip
        if splits > 1:
            join_kernel[(batch * triton.cdiv(channels, JOIN_D) * triton.cdiv(n_parts, blocks["BLOCK_K"]),)](
                sums, areas, pooled, area, batch, channels, n_parts, splits,
                MEAN=mean, BLOCK_D=JOIN_D, BLOCK_K=blocks["BLOCK_K"],
            )  # fmt: skip
    return pooled.to(features.dtype), area


def pool_backward(
    grad: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    area: Tensor,
    mean: bool,
    empty: Tensor,
) -> Tensor:
    """The gradient of the features, in ``empty`` [B, D, h, w] of any strides; grad is [B, K, D], area [B, K]."""
    batch, n_parts, channels = grad.shape
    height, width = labels.shape[1:]
    pixels, device = height * width, grad.device
    if not empty.numel():
        return empty
    wide = output_dtype(empty.dtype)
    out = empty if wide == empty.dtype else torch.empty_like(empty, dtype=wide)
    row = config("part_pool", device, row_kind(grad.dtype))
    flat = _flat(labels, weight, out)
    blocks = _blocks(row, channels, n_parts, flat)
    tiles = batch * triton.cdiv(channels, blocks["BLOCK_D"])
    chunk, splits = _split(pixels, blocks["BLOCK_P"], tiles, max(256, 64 * n_parts), device)
    with on_device_of(grad):
        backward_kernel[(tiles * splits,)](
            grad, labels, labels if weight is None else weight, area.contiguous(), out,
            channels, n_parts, pixels, width, chunk, splits,
            *grad.stride(), *_strides(labels, flat), *_strides(weight, flat), *_strides(out, flat),
            MEAN=mean, FLAT=flat, WIDE=_wide(labels, weight, out), WEIGHTED=weight is not None, UPCAST=interpreted(),
            **blocks, **row.launch,
        )  # fmt: skip
    return empty if out is empty else empty.copy_(out)


def labels_to_grid(labels: Tensor, height: int, width: int, n_parts: int) -> Tensor:
    """int64 [B, height, width]: the majority id of each adaptive-pooling cell of labels [B, H, W]."""
    batch, rows, columns = labels.shape
    grid = labels.new_empty(batch, height, width, dtype=torch.int64)
    if batch == 0:
        return grid
    widest = triton.cdiv(columns, width) + 1
    blocks = _grid_blocks(n_parts, widest, width)
    with on_device_of(labels):
        grid_kernel[(batch * height * triton.cdiv(width, blocks["BLOCK_J"]),)](
            labels, grid, rows, columns, n_parts, height, width, widest, *labels.stride(), **blocks
        )
    return grid


def _grid_blocks(parts: int, widest: int, width: int) -> dict[str, int]:
    """A tile of votes [cells, pixels across, parts] of at most 2,048 counters."""
    block_k = min(32, triton.next_power_of_2(parts))
    block_x = min(64, triton.next_power_of_2(widest))
    block_j = max(1, min(triton.next_power_of_2(width), 2048 // (block_k * block_x)))
    return {"BLOCK_J": block_j, "BLOCK_X": block_x, "BLOCK_K": block_k}


def tune_cases(device: str = "cuda", pictures: int = 32, side: int = 64) -> Iterator[TuneCase]:
    """Forward and backward with 1,024 channels and 15 parts."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(pictures, 1024, side, side, device=device, dtype=dtype)
        labels = torch.randint(-1, 15, (pictures, side, side), device=device)

        def run(x: Tensor = x, labels: Tensor = labels) -> None:
            pooled, area = pool(x, labels, 15, None, True)
            pool_backward(pooled, labels, None, area, True, torch.empty_like(x))

        sizes = product((32, 64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4), (0, MOST_REGISTERS))
        rows = [
            Row(row_kind(dtype), {"BLOCK_D": d, "BLOCK_P": p}, warps, stages, 0, registers)
            for d, p, warps, stages, registers in sizes
            if d * dtype.itemsize >= 256 and d * p <= 16384
        ]
        yield TuneCase("part_pool", rows, run)


def aot_cases() -> Iterator[AotCase]:
    """Each kernel for each row: both memory orders, sizes not multiples of 16, gaps between the rows, many parts."""
    orders = {  # flat, weighted, type of sizes and strides, parts
        "rows": (True, False, "i32:16", 15),
        "odd": (True, False, "i32", 15),
        "channels": (True, False, "i32:16", 15),
        "gaps": (False, True, "i32", 15),
        "many": (False, True, "i32", MOST_PARTS),
    }
    fixed = {"UPCAST": False, "WIDE": False, "MEAN": True}
    types = dict.fromkeys(("weight", "area", "parts", "areas"), "*fp32:16") | {"labels": "*i64:16", "grid": "*i64:16"}
    for arch, name, row in table("part_pool"):
        name, tuned, archs = f"part_pool {name}", "tuned" in name, served("part_pool", arch, row)
        for kind in ("fp32",) if row.kind == "fp32" else ("bf16", "fp16"):
            pointers = types | dict.fromkeys(("x", "grad", "out", "pooled"), f"*{kind}:16")
            for order, (flat, weighted, size, parts) in orders.items():
                if kind == "fp16" and order != "rows":
                    continue  # the code of bfloat16, with one other instruction
                unit = ("x_d", "o_d") if order == "channels" else ("x_x", "o_x")
                flags = fixed | _blocks(row, 1024, parts, flat) | dict.fromkeys(("l_x", "w_x", "g_d", *unit), 1)
                flags |= {"FLAT": flat, "WEIGHTED": weighted}
                rare = order not in ("rows", "many") or kind == "fp16"
                for way, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
                    full = f"{name} {way} {kind} {order}"
                    yield _case(full, kernel, pointers, flags, size, row, archs, rare, tuned)
    small = Row("fp32", {}, 4, 3, 0)  # what Triton takes where a launch says nothing
    for kind in ("fp32", "bf16", "fp16"):
        flags = fixed | {"BLOCK_D": JOIN_D, "BLOCK_K": MOST_PARTS}
        pointers = types | {"pooled": f"*{kind}:16"}
        yield _case(f"part_pool join {kind}", join_kernel, pointers, flags, "i32", small, rare=kind != "fp32")
    for cell, parts in ((9, 15), (65, 100)):
        flags = _grid_blocks(parts, cell, 64) | {"l_x": 1}
        yield _case(f"labels_to_grid {cell} {parts}", grid_kernel, types, flags, "i32", small)


def _case(
    name: str, kernel: Any, pointers: dict[str, str], flags: dict[str, Any], size: str, row: Row,
    archs: tuple[str, ...] = (), rare: bool = False, tuned: bool = False,
) -> AotCase:  # fmt: skip
    """A case where every argument that is neither pointer nor flag has the type ``size``."""
    constexprs = {n: v for n, v in flags.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constexprs else pointers.get(n, size) for n in kernel.arg_names}
    return AotCase(
        name, kernel, signature, constexprs, row.warps, row.stages, archs, rare, tuned, row.registers, row.shared
    )
