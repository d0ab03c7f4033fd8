r"""Part pooling and the majority grid.

Forward, one launch: features [B, D, N] by strides, labels [B, N] -> pooled [B, K, D], area [B, K].

.. math:: pooled_{bkd} = \frac{1}{area_{bk}} \sum_p [labels_{bp} = k]\, w_{bp} x_{bdp}

A program owns an image and a block of channels and loops over the pixels: [BLOCK_D, BLOCK_P] x one-hot [BLOCK_P, K] on
the tensor cores, K in one tile. Each output has one program: sums have a fixed order. If there are few programs, the
pixels are split among more, whose partial sums are added in order by a second kernel. Backward writes
grad[labels] w / area in the same kind of loop.

Labels [B, H, W] of another resolution are first reduced to [B, N] by majority. If that is fast it is part of the same
launch (`_group_blocks`): a program owns an image and a group of its blocks of channels, and votes before it pools.

Small maps whose channels do not start at multiples of 16 bytes ([B, D, 7, 7]) are read as runs that do
(`sums._runs_of_channels`): 16 bytes per access, where otherwise every element is one.

Minimum traffic: forward reads B D N elements, labels and weights, and writes B K D; backward reads B K D and writes
B D N. Labels are read again for each block of channels, hence blocks of 256 bytes. Operations: 2 B D N K on tensor
cores (three times that for float32), under a tenth of their peak rate when memory-bound, for K up to 32.
"""

import math

import torch
from torch import Tensor

from fgfast.kernels.common import MOST_REGISTERS, cdiv, interpreted, on_device_of, output_dtype, power_of_2, wide
from fgfast.kernels.configs import Row, architecture, config, processors, row_kind
from fgfast.kernels.launches import launch
from fgfast.kernels.part_pool.gradient import backward_kernel, runs_backward_kernel
from fgfast.kernels.part_pool.sums import forward_kernel, join_kernel, runs_kernel
from fgfast.kernels.part_pool.votes import grid_kernel, map_kernel

JOIN_D = 32
GRID = Row("ids", {}, 4, 3, 0, MOST_REGISTERS)  # warps, stages and registers of a separate launch of votes
MOST_PIXELS = 1 << 30  # of an image: with those of the last tile they are 32-bit integers
MOST_PARTS = 64  # parts of a tile: forward reads the features once per block of parts
RUN_ROWS, RUN_PIXELS, RUN_PARTS = 16, 64, 16  # channels of an alignment, pixels and parts of a tile read in runs
MOST_VOTED = 32  # parts of a launch that also votes: with more parts, or gaps between rows, older compilers spill
MOST_VOTE_STEPS = 64  # steps of votes before pooling, about 0.3 us each (not measured): more take a separate launch


def _flat(*maps: Tensor | None) -> bool:
    """Whether the pixels of each map [..., h, w] are evenly spaced."""
    return all(x is None or x.shape[-2] == 1 or x.stride(-2) == x.stride(-1) * x.shape[-1] for x in maps)


def _strides(x: Tensor | None, flat: bool) -> tuple[int, ...]:
    """Strides of [B, ..., h, w]; (0, 0, 0) for no weight. A single column has the stride of rows between its pixels."""
    if x is None:
        return (0, 0, 0)
    *outer, y, across = x.stride()
    return (*outer, y, y if flat and x.shape[-1] == 1 else across)


def _alignment(x: Tensor, flat: bool) -> int:
    """A power of two, up to 8, that divides the pixels of a channel and the strides of channels and images.

    1 where Triton finds multiples of 16 by itself, or where pixels do not lie next to each other.
    """
    batch, channel, *_ = x.stride()
    common = math.gcd(16, x.shape[2] * x.shape[3], batch, channel)
    return min(8, common) if flat and x.stride(3) == 1 and common < 16 else 1


def _split(pixels: int, block: int, programs: int, least: int, device: torch.device) -> tuple[int, int]:
    """(chunk, splits): pixels per program, at least about ``least``, and programs per image and block of channels."""
    wanted = -(-2 * processors(device) // max(1, programs))
    splits = max(1, min(wanted, pixels // least))
    chunk = max(block, cdiv(cdiv(pixels, splits), block) * block)
    return chunk, max(1, cdiv(pixels, chunk))


def blocks_of(row: Row, channels: int, parts: int, flat: bool) -> dict[str, int]:
    """Tile sizes of a problem.

    Pixels are halved where gaps between rows require an offset per pixel in registers, channels too for many parts.
    """
    block_k = min(MOST_PARTS, max(16, power_of_2(parts)))
    most_d = row.tiles["BLOCK_D"] // (2 if _many(parts, flat) else 1)
    block_d = min(most_d, max(16, power_of_2(channels)))
    return {"BLOCK_D": block_d, "BLOCK_P": row.tiles["BLOCK_P"] // (1 if flat else 2), "BLOCK_K": block_k}


def run_blocks(single: bool) -> dict[str, int]:
    """Tile sizes of small maps that are read in runs of V elements, 16 bytes; ``single``: of float32."""
    length = 4 if single else 8
    return {"V": length, "BLOCK_D": RUN_ROWS * length, "BLOCK_P": RUN_PIXELS, "BLOCK_K": RUN_PARTS}


def _in_runs(row: Row, x: Tensor, labels: Tensor | None, weight: Tensor | None, parts: int) -> bool:
    """Whether x [B, D, h, w] are small maps whose channels follow each other and are not aligned, but images are."""
    length = 16 // x.element_size()
    (batch, channels, height, width), strides = x.shape, x.stride()
    pixels = height * width
    return (
        pixels % 16 > 0 and length <= pixels <= RUN_PIXELS - length + 1
        and channels % length == 0 and parts <= RUN_PARTS
        and strides[1:] == (pixels, width, 1) and (batch == 1 or strides[0] % length == 0)
        and (weight is None or row.warps >= length)  # otherwise it spills
        and _flat(labels, weight) and not wide(x, labels, weight)
    )  # fmt: skip


def _pool_runs(
    row: Row, features: Tensor, labels: Tensor, weight: Tensor | None, pooled: Tensor, area: Tensor, mean: bool
) -> None:  # fmt: skip
    """`pool` of small maps."""
    _, channels, height, width = features.shape
    blocks = run_blocks(features.dtype == torch.float32)
    programs, group_blocks = _groups(features, blocks)
    with on_device_of(features):
        launch(
            runs_kernel, (programs,),
            features, labels, labels if weight is None else weight, pooled, area,
            channels, pooled.shape[1], height * width, width, group_blocks,
            features.stride(0), *_strides(labels, True), *_strides(weight, True),
            MEAN=mean, WEIGHTED=weight is not None, UPCAST=interpreted(), **blocks, **row.launch,
        )  # fmt: skip


def _groups(x: Tensor, blocks: dict[str, int]) -> tuple[int, int]:
    """Programs for x [B, D, h, w] and their blocks of channels: four per processor, as long as each has a block."""
    d_blocks = cdiv(x.shape[1], blocks["BLOCK_D"])
    group_blocks = cdiv(d_blocks, min(d_blocks, cdiv(4 * processors(x.device), len(x))))
    return len(x) * cdiv(d_blocks, group_blocks), group_blocks


def _write_runs(row: Row, grad: Tensor, labels: Tensor, area: Tensor, out: Tensor, mean: bool) -> None:
    """`pool_backward` of small maps into out [B, D, h, w]."""
    _, channels, height, width = out.shape
    blocks = run_blocks(out.dtype == torch.float32)
    programs, group_blocks = _groups(out, blocks)
    with on_device_of(out):
        launch(
            runs_backward_kernel, (programs,),
            grad, labels, labels, area.contiguous(), out, channels, grad.shape[1], height * width, width, group_blocks,
            *grad.stride(), *_strides(labels, True), out.stride(0),
            MEAN=mean, UPCAST=interpreted(), **blocks, **row.launch,
        )  # fmt: skip


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
    if _in_runs(row, features, labels, weight, n_parts):
        _pool_runs(row, features, labels, weight, pooled, area, mean)
        return pooled.to(features.dtype), area
    flat = _flat(features, labels, weight)
    blocks = blocks_of(row, channels, n_parts, flat)
    tiles, chunk, splits = _grid(features, n_parts, blocks)
    sums, areas = pooled, area
    if splits > 1:
        sums = features.new_empty(splits, *pooled.shape, dtype=torch.float32)
        areas = area.new_empty(splits, *area.shape)
    with on_device_of(features):
        launch(
            forward_kernel, (tiles * splits,),
            features, labels, labels if weight is None else weight, sums, areas,
            batch, channels, n_parts, pixels, width, chunk, splits,
            *_strides(features, flat), *_strides(labels, flat), *_strides(weight, flat),
            MEAN=mean and splits == 1, FLAT=flat, WIDE=wide(features, labels, weight), WEIGHTED=weight is not None,
            UPCAST=interpreted(), ALIGN=_alignment(features, flat), **blocks,
            **forward_row(row, n_parts, flat).launch,
        )  # fmt: skip
        if splits > 1:
            launch(
                join_kernel, (batch * cdiv(channels, JOIN_D) * cdiv(n_parts, blocks["BLOCK_K"]),),
                sums, areas, pooled, area, batch, channels, n_parts, splits,
                MEAN=mean, BLOCK_D=JOIN_D, BLOCK_K=blocks["BLOCK_K"],
            )  # fmt: skip
    return pooled.to(features.dtype), area


def _many(parts: int, flat: bool) -> bool:
    """Whether a tile has many parts and also an offset per pixel."""
    return parts > MOST_PARTS // 2 and not flat


def forward_row(row: Row, parts: int, flat: bool) -> Row:
    """The row for `forward_kernel`: the default of ptxas spills 8 bytes where registers are scarce."""
    return row._replace(registers=MOST_REGISTERS) if _many(parts, flat) else row


def _grid(features: Tensor, parts: int, blocks: dict[str, int]) -> tuple[int, int, int]:
    """(tiles, chunk, splits) of a forward pass: blocks of channels and parts, and `_split` of the pixels."""
    batch, channels, height, width = features.shape
    if height * width > MOST_PIXELS:
        raise ValueError(
            f"An image has {height * width} pixels and the Triton kernels take {MOST_PIXELS}: choose backend 'torch'."
        )
    tiles = batch * cdiv(channels, blocks["BLOCK_D"]) * cdiv(parts, blocks["BLOCK_K"])
    # Partial sums are written and read: 8 K bytes per channel, against at least 256 K for the pixels of a channel.
    return tiles, *_split(height * width, blocks["BLOCK_P"], tiles, max(1024, 128 * parts), features.device)


def pool_map(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`pool` by the majority of id maps [B, H, W]: pooled, area, and that grid, int32 [B, h, w]."""
    batch, channels, height, width = features.shape
    row = config("part_pool", features.device, row_kind(features.dtype))
    if _in_runs(row, features, None, weight, n_parts):
        blocks = run_blocks(features.dtype == torch.float32)
    else:
        blocks = {"V": 0} | blocks_of(row, channels, n_parts, n_parts <= 16)  # more parts: halve the pixels too
    pixels, (rows, columns) = height * width, labels.shape[1:]
    tallest, widest = _longest(rows, height), _longest(columns, width)
    votes = grid_blocks(n_parts, widest, pixels, row.warps)
    passes = cdiv(pixels, votes["BLOCK_J"]) * cdiv(n_parts, votes["BLOCK_V"])
    flat = _flat(features, weight)
    steps = passes * tallest * cdiv(widest, votes["BLOCK_X"])
    group_blocks = flat and _group_blocks(features, labels, n_parts, blocks, steps)
    if not group_blocks:
        grid = labels_to_grid(labels, height, width, n_parts, torch.int32)
        return (*pool(features, grid, n_parts, weight, mean), grid)
    groups = cdiv(cdiv(channels, blocks["BLOCK_D"]), group_blocks)
    grid = labels.new_empty(groups, batch, height, width, dtype=torch.int32)
    pooled = features.new_empty(batch, n_parts, channels, dtype=output_dtype(features.dtype))
    area = features.new_empty(batch, n_parts, dtype=torch.float32)
    with on_device_of(features):
        launch(
            map_kernel, (batch * groups,),
            features, labels, grid, features if weight is None else weight, pooled, area,
            batch, channels, n_parts, pixels, width, group_blocks, rows, columns, height, tallest, widest,
            *_strides(features, True), *labels.stride(), *_strides(weight, True),
            MEAN=mean, WIDE=wide(features, weight), WEIGHTED=weight is not None, UPCAST=interpreted(),
            ALIGN=_alignment(features, True), **blocks, **votes, **roomy(row, architecture(features.device)).launch,
        )  # fmt: skip
    return pooled.to(features.dtype), area, grid[0]


def roomy(row: Row, arch: str) -> Row:
    """The row for `map_kernel` and `backward_kernel`: except on sm_90 the default of ptxas spills 8 to 16 bytes."""
    return row if arch == "sm_90" else row._replace(registers=MOST_REGISTERS)


def _group_blocks(features: Tensor, labels: Tensor, parts: int, blocks: dict[str, int], steps: int) -> int:
    """Blocks of channels that a program pools after it has voted; 0 to vote in a separate launch.

    As many blocks as leave enough programs to fill the device, because each program reads all ids of its image. Votes
    take a separate launch if reading ids again would cost over a twentieth of the bytes of the features, if voting
    takes many steps, if pixels are split among programs, or if there are many parts. Only for rows without gaps.
    """
    batch, channels = features.shape[:2]
    if not features.numel() or parts > MOST_VOTED or _grid(features, parts, blocks)[2] > 1:
        return 0
    d_blocks = cdiv(channels, blocks["BLOCK_D"])
    count = cdiv(d_blocks, min(d_blocks, cdiv(2 * processors(features.device), batch)))
    reread = (cdiv(d_blocks, count) - 1) * labels.numel() * labels.element_size()
    return 0 if steps > MOST_VOTE_STEPS or 20 * reread > features.numel() * features.element_size() else count


def pool_backward(
    grad: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    area: Tensor,
    mean: bool,
    empty: Tensor,
) -> Tensor:
    """The gradient of the features, in ``empty`` [B, D, h, w] with any strides; grad is [B, K, D], area [B, K]."""
    batch, n_parts, channels = grad.shape
    height, width = labels.shape[1:]
    pixels, device = height * width, grad.device
    if not empty.numel():
        return empty
    dtype = output_dtype(empty.dtype)
    out = empty if dtype == empty.dtype else torch.empty_like(empty, dtype=dtype)
    row = config("part_pool", device, row_kind(grad.dtype))
    # With fewer warps its tiles take too many registers and too much shared memory.
    if weight is None and row.warps >= 16 // out.element_size() and _in_runs(row, out, labels, None, n_parts):
        _write_runs(row, grad, labels, area, out, mean)
        return empty if out is empty else empty.copy_(out)
    flat = _flat(labels, weight, out)
    blocks = blocks_of(row, channels, n_parts, flat)
    tiles = batch * cdiv(channels, blocks["BLOCK_D"])
    chunk, splits = _split(pixels, blocks["BLOCK_P"], tiles, max(256, 64 * n_parts), device)
    with on_device_of(grad):
        launch(
            backward_kernel, (tiles * splits,),
            grad, labels, labels if weight is None else weight, area.contiguous(), out,
            channels, n_parts, pixels, width, chunk, splits,
            *grad.stride(), *_strides(labels, flat), *_strides(weight, flat), *_strides(out, flat),
            MEAN=mean, FLAT=flat, WIDE=wide(labels, weight, out), WEIGHTED=weight is not None, UPCAST=interpreted(),
            ALIGN=_alignment(out, flat), **blocks, **roomy(row, architecture(device)).launch,
        )  # fmt: skip
    return empty if out is empty else empty.copy_(out)


def labels_to_grid(labels: Tensor, height: int, width: int, n_parts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """[B, height, width]: the majority id of each adaptive-pooling cell of labels [B, H, W]."""
    batch, rows, columns = labels.shape
    grid = labels.new_empty(batch, height, width, dtype=dtype)
    if not grid.numel():
        return grid
    cells, tallest, widest = height * width, _longest(rows, height), _longest(columns, width)
    blocks = grid_blocks(n_parts, widest, cells)
    with on_device_of(labels):
        launch(
            grid_kernel, (batch * cdiv(cells, blocks["BLOCK_J"]),),
            labels, grid, cells, rows, columns, n_parts, height, width, tallest, widest, *labels.stride(),
            **blocks, **GRID.launch,
        )  # fmt: skip
    return grid


def _longest(length: int, cells: int) -> int:
    """The largest number of positions in an adaptive-pooling cell along one side, or one more."""
    cells = max(1, cells)
    return cdiv(length, cells) + (length % cells > 0)


def grid_blocks(parts: int, widest: int, cells: int, warps: int = 4) -> dict[str, int]:
    """A tile of votes [cells, pixels across, parts] with at most 512 counters per warp."""
    block_v = min(32, power_of_2(parts))
    block_x = min(64, power_of_2(max(1, widest)))
    block_j = max(1, min(power_of_2(cells), 512 * warps // (block_v * block_x)))
    return {"BLOCK_J": block_j, "BLOCK_X": block_x, "BLOCK_V": block_v}
