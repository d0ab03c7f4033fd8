r"""Part pooling and the majority grid.

Forward, one launch: features [B, D, N] by strides, labels [B, N] -> pooled [B, K, D], area [B, K].

.. math:: pooled_{bkd} = \frac{1}{area_{bk}} \sum_p [labels_{bp} = k]\, w_{bp} x_{bdp}

A program owns an image and a block of channels and loops over the pixels: [BLOCK_D, BLOCK_P] x one-hot [BLOCK_P, K] on
the tensor cores, K in one tile. Each output has one program: sums have a fixed order. If there are few programs, the
pixels are split among more, whose partial sums are added in order by a second kernel. Backward writes
grad[labels] w / area in the same kind of loop.

Labels [B, H, W] of another resolution are first reduced to [B, N] by majority. If that is fast it is part of the same
launch (`_group_blocks`): a program owns an image and a group of its blocks of channels, and votes before it pools.

Minimum traffic: forward reads B D N elements, labels and weights, and writes B K D; backward reads B K D and writes
B D N. Labels are read again for each block of channels, hence blocks of 256 bytes. Operations: 2 B D N K on tensor
cores (three times that for float32), under a tenth of their peak rate when memory-bound, for K up to 32.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fgfast.kernels.common import (
    MOST_REGISTERS,
    AotCase,
    cdiv,
    interpreted,
    on_device_of,
    output_dtype,
    power_of_2,
    wide,
)
from fgfast.kernels.configs import Row, architecture, architectures_for, config, processors, row_kind, table
from fgfast.kernels.part_pool.kernels import backward_kernel, forward_kernel, grid_kernel, join_kernel, map_kernel
from fgfast.kernels.tune import TuneCase

JOIN_D = 32
GRID = Row("ids", {}, 4, 3, 0, MOST_REGISTERS)  # warps, stages and registers of a separate launch of votes
MOST_PIXELS = 1 << 30  # of an image: with those of the last tile they are 32-bit integers
MOST_PARTS = 64  # parts of a tile: forward reads the features once per block of parts
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


def _split(pixels: int, block: int, programs: int, least: int, device: torch.device) -> tuple[int, int]:
    """(chunk, splits): pixels per program, at least about ``least``, and programs per image and block of channels."""
    wanted = -(-2 * processors(device) // max(1, programs))
    splits = max(1, min(wanted, pixels // least))
    chunk = max(block, cdiv(cdiv(pixels, splits), block) * block)
    return chunk, max(1, cdiv(pixels, chunk))


def _blocks(row: Row, channels: int, parts: int, flat: bool) -> dict[str, int]:
    """Tile sizes of a problem.

    Pixels are halved where gaps between rows require an offset per pixel in registers, channels too for many parts.
    """
    block_k = min(MOST_PARTS, max(16, power_of_2(parts)))
    most_d = row.tiles["BLOCK_D"] // (2 if _many(parts, flat) else 1)
    block_d = min(most_d, max(16, power_of_2(channels)))
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
    tiles, chunk, splits = _grid(features, n_parts, blocks)
    sums, areas = pooled, area
    if splits > 1:
        sums = features.new_empty(splits, *pooled.shape, dtype=torch.float32)
        areas = area.new_empty(splits, *area.shape)
    with on_device_of(features):
        forward_kernel[(tiles * splits,)](
            features, labels, labels if weight is None else weight, sums, areas,
            batch, channels, n_parts, pixels, width, chunk, splits,
            *_strides(features, flat), *_strides(labels, flat), *_strides(weight, flat),
            MEAN=mean and splits == 1, FLAT=flat, WIDE=wide(features, labels, weight), WEIGHTED=weight is not None,
            UPCAST=interpreted(), **blocks, **_forward_row(row, n_parts, flat).launch,
        )  # fmt: skip
        if splits > 1:
            join_kernel[(batch * cdiv(channels, JOIN_D) * cdiv(n_parts, blocks["BLOCK_K"]),)](
                sums, areas, pooled, area, batch, channels, n_parts, splits,
                MEAN=mean, BLOCK_D=JOIN_D, BLOCK_K=blocks["BLOCK_K"],
            )  # fmt: skip
    return pooled.to(features.dtype), area


def _many(parts: int, flat: bool) -> bool:
    """Whether a tile has many parts and also an offset per pixel."""
    return parts > MOST_PARTS // 2 and not flat


def _forward_row(row: Row, parts: int, flat: bool) -> Row:
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
    blocks = _blocks(row, channels, n_parts, n_parts <= 16)  # more parts take registers: halve the pixels too
    pixels, (rows, columns) = height * width, labels.shape[1:]
    tallest, widest = _longest(rows, height), _longest(columns, width)
    votes = _grid_blocks(n_parts, widest, pixels, row.warps)
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
        map_kernel[(batch * groups,)](
            features, labels, grid, features if weight is None else weight, pooled, area,
            batch, channels, n_parts, pixels, width, group_blocks, rows, columns, height, tallest, widest,
            *_strides(features, True), *labels.stride(), *_strides(weight, True),
            MEAN=mean, WIDE=wide(features, weight), WEIGHTED=weight is not None, UPCAST=interpreted(),
            **blocks, **votes, **_map_row(row, architecture(features.device)).launch,
        )  # fmt: skip
    return pooled.to(features.dtype), area, grid[0]


def _map_row(row: Row, arch: str) -> Row:
    """The row for `map_kernel`: except on sm_90 the default of ptxas spills 8 to 16 bytes."""
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
    flat = _flat(labels, weight, out)
    blocks = _blocks(row, channels, n_parts, flat)
    tiles = batch * cdiv(channels, blocks["BLOCK_D"])
    chunk, splits = _split(pixels, blocks["BLOCK_P"], tiles, max(256, 64 * n_parts), device)
    with on_device_of(grad):
        backward_kernel[(tiles * splits,)](
            grad, labels, labels if weight is None else weight, area.contiguous(), out,
            channels, n_parts, pixels, width, chunk, splits,
            *grad.stride(), *_strides(labels, flat), *_strides(weight, flat), *_strides(out, flat),
            MEAN=mean, FLAT=flat, WIDE=wide(labels, weight, out), WEIGHTED=weight is not None, UPCAST=interpreted(),
            **blocks, **row.launch,
        )  # fmt: skip
    return empty if out is empty else empty.copy_(out)


def labels_to_grid(labels: Tensor, height: int, width: int, n_parts: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """[B, height, width]: the majority id of each adaptive-pooling cell of labels [B, H, W]."""
    batch, rows, columns = labels.shape
    grid = labels.new_empty(batch, height, width, dtype=dtype)
    if not grid.numel():
        return grid
    cells, tallest, widest = height * width, _longest(rows, height), _longest(columns, width)
    blocks = _grid_blocks(n_parts, widest, cells)
    with on_device_of(labels):
        grid_kernel[(batch * cdiv(cells, blocks["BLOCK_J"]),)](
            labels, grid, cells, rows, columns, n_parts, height, width, tallest, widest, *labels.stride(),
            **blocks, **GRID.launch,
        )  # fmt: skip
    return grid


def _longest(length: int, cells: int) -> int:
    """The largest number of positions in an adaptive-pooling cell along one side, or one more."""
    cells = max(1, cells)
    return cdiv(length, cells) + (length % cells > 0)


def _grid_blocks(parts: int, widest: int, cells: int, warps: int = 4) -> dict[str, int]:
    """A tile of votes [cells, pixels across, parts] with at most 512 counters per warp."""
    block_v = min(32, power_of_2(parts))
    block_x = min(64, power_of_2(max(1, widest)))
    block_j = max(1, min(power_of_2(cells), 512 * warps // (block_v * block_x)))
    return {"BLOCK_J": block_j, "BLOCK_X": block_x, "BLOCK_V": block_v}


def tune_cases(device: str = "cuda", images: int = 32, side: int = 64) -> Iterator[TuneCase]:
    """Forward and backward with 1,024 channels and 15 parts."""
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(images, 1024, side, side, device=device, dtype=dtype)
        labels = torch.randint(-1, 15, (images, side, side), device=device)

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
    """Each kernel and row: both memory orders, sizes that are not multiples of 16, gaps between rows, many parts."""
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
        name, tuned, archs = f"part_pool {name}", "tuned" in name, architectures_for("part_pool", arch, row)
        for kind in ("fp32",) if row.kind == "fp32" else ("bf16", "fp16"):
            pointers = types | dict.fromkeys(("x", "grad", "out", "pooled"), f"*{kind}:16")
            for order, (flat, weighted, size, parts) in orders.items():
                if kind == "fp16" and order != "rows":
                    continue  # as for bfloat16 but for one instruction
                unit = ("x_d", "o_d") if order == "channels" else ("x_x", "o_x")
                flags = fixed | _blocks(row, 1024, parts, flat) | dict.fromkeys(("l_x", "w_x", "g_d", *unit), 1)
                flags |= {"FLAT": flat, "WEIGHTED": weighted}
                rare = order not in ("rows", "many") or kind == "fp16"
                ways = (("forward", forward_kernel, _forward_row(row, parts, flat)), ("backward", backward_kernel, row))
                for way, kernel, kernel_row in ways:
                    full = f"{name} {way} {kind} {order}"
                    yield _case(full, kernel, pointers, flags, size, kernel_row, archs, rare, tuned)
                pointers |= {"grid": "*i32:16"}
                if order == "gaps":
                    continue
                voted = min(parts, MOST_VOTED)
                flags |= _blocks(row, 1024, voted, voted <= 16) | _grid_blocks(voted, 9, 49, row.warps)
                for budget in sorted({_map_row(row, arch).registers for arch in archs}):
                    full = f"{name} map {kind} {order}" + (f" {budget}" if budget != row.registers else "")
                    some = tuple(arch for arch in archs if _map_row(row, arch).registers == budget)
                    budget_row = row._replace(registers=budget)
                    yield _case(full, map_kernel, pointers, flags, size, budget_row, some, rare, tuned)
    small = Row("fp32", {}, 4, 3, 0)  # Triton's defaults
    for kind in ("fp32", "bf16", "fp16"):
        flags = fixed | {"BLOCK_D": JOIN_D, "BLOCK_K": MOST_PARTS}
        pointers = types | {"pooled": f"*{kind}:16"}
        yield _case(f"part_pool join {kind}", join_kernel, pointers, flags, "i32", small, rare=kind != "fp32")
    for cell, parts in ((9, 15), (65, 100)):
        flags = _grid_blocks(parts, cell, 4096) | {"l_x": 1}
        yield _case(f"labels_to_grid {cell} {parts}", grid_kernel, types, flags, "i32", GRID)


def _case(
    name: str, kernel: Any, pointers: dict[str, str], flags: dict[str, Any], size: str, row: Row,
    archs: tuple[str, ...] = (), rare: bool = False, tuned: bool = False,
) -> AotCase:  # fmt: skip
    """A case in which every argument without a type in ``pointers`` or a value in ``flags`` has the type ``size``."""
    constexprs = {n: v for n, v in flags.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constexprs else pointers.get(n, size) for n in kernel.arg_names}
    return AotCase(
        name, kernel, signature, constexprs, row.warps, row.stages, archs, rare, tuned, row.registers, row.shared
    )
