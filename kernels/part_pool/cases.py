"""The cases of the kernels of part pooling that are compiled ahead of time and timed by the tuner."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fgfast.kernels.common import MOST_REGISTERS, AotCase
from fgfast.kernels.configs import Row, architectures_for, row_kind, table
from fgfast.kernels.part_pool.gradient import backward_kernel, runs_backward_kernel
from fgfast.kernels.part_pool.launch import (
    GRID,
    JOIN_D,
    MOST_PARTS,
    MOST_VOTED,
    RUN_PARTS,
    blocks_of,
    forward_row,
    grid_blocks,
    pool,
    pool_backward,
    roomy,
    run_blocks,
)
from fgfast.kernels.part_pool.sums import forward_kernel, join_kernel, runs_kernel
from fgfast.kernels.part_pool.votes import grid_kernel, map_kernel
from fgfast.kernels.tune import TuneCase


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
        "aligned": (True, False, "i32", 15),  # rows of a multiple of 4 pixels
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
            pointers |= {"grid": "*i32:16", "chunk": "i32:16"}
            for order, (flat, weighted, size, parts) in orders.items():
                if kind == "fp16" and order != "rows":
                    continue  # as for bfloat16 but for one instruction
                unit = ("x_d", "o_d") if order == "channels" else ("x_x", "o_x")
                flags = fixed | blocks_of(row, 1024, parts, flat) | dict.fromkeys(("l_x", "w_x", "g_d", *unit), 1)
                flags |= {"FLAT": flat, "WEIGHTED": weighted, "ALIGN": 4 if order == "aligned" else 1, "V": 0}
                rare = order not in ("rows", "many") or kind == "fp16"
                args = pointers, flags, size
                full = f"{name} forward {kind} {order}"
                yield _case(full, forward_kernel, *args, forward_row(row, parts, flat), archs, rare, tuned)
                yield from _roomy(f"{name} backward {kind} {order}", backward_kernel, *args, row, archs, rare, tuned)
                if order in ("gaps", "aligned"):
                    continue
                voted = min(parts, MOST_VOTED)
                flags |= blocks_of(row, 1024, voted, voted <= 16) | grid_blocks(voted, 9, 49, row.warps)
                yield from _roomy(f"{name} map {kind} {order}", map_kernel, *args, row, archs, rare, tuned)
            runs = run_blocks(kind == "fp32")
            enough = row.warps >= runs["V"]
            for weighted in (False, True)[: 1 + enough]:
                flags = fixed | runs | {"WEIGHTED": weighted, "ALIGN": 1} | dict.fromkeys(("l_x", "w_x", "x_x"), 1)
                flags |= grid_blocks(RUN_PARTS, 9, 49, row.warps)
                args, rare = (pointers | {"D": "i32:16"}, flags, "i32"), weighted or kind == "fp16"
                full = f"{kind} small{' weighted' * weighted}"
                yield _case(f"{name} runs {full}", runs_kernel, *args, row, archs, rare, tuned)
                if enough and not weighted:
                    args = pointers | {"D": "i32:16", "g_k": "i32:16"}, flags | {"g_d": 1}, "i32"
                    yield _case(f"{name} runs backward {full}", runs_backward_kernel, *args, row, archs, rare, tuned)
                yield from _roomy(f"{name} map {full}", map_kernel, *args, row, archs, rare, tuned)
    small = Row("fp32", {}, 4, 3, 0)  # Triton's defaults
    for kind in ("fp32", "bf16", "fp16"):
        flags = fixed | {"BLOCK_D": JOIN_D, "BLOCK_K": MOST_PARTS}
        pointers = types | {"pooled": f"*{kind}:16"}
        yield _case(f"part_pool join {kind}", join_kernel, pointers, flags, "i32", small, rare=kind != "fp32")
    for cell, parts in ((9, 15), (65, 100)):
        flags = grid_blocks(parts, cell, 4096) | {"l_x": 1}
        yield _case(f"labels_to_grid {cell} {parts}", grid_kernel, types, flags, "i32", GRID)


def _roomy(
    name: str, kernel: Any, pointers: dict[str, str], flags: dict[str, Any], size: str, row: Row,
    archs: tuple[str, ...], rare: bool, tuned: bool,
) -> Iterator[AotCase]:  # fmt: skip
    """A case with the budget of registers of each architecture."""
    for budget in sorted({roomy(row, arch).registers for arch in archs}):
        full = name + (f" {budget}" if budget != row.registers else "")
        some = tuple(arch for arch in archs if roomy(row, arch).registers == budget)
        yield _case(full, kernel, pointers, flags, size, row._replace(registers=budget), some, rare, tuned)


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
