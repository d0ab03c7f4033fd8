"""The cases of the contrastive kernels that are compiled ahead of time and timed by the tuner."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from fgfast.ids import Ids
from fgfast.kernels.common import MOST_REGISTERS, AotCase
from fgfast.kernels.configs import architectures_for, contrast_row, table
from fgfast.kernels.contrast import vectors as per_vector
from fgfast.kernels.contrast.forward import forward as forward_kernel
from fgfast.kernels.contrast.gradient import gradient as gradient_kernel
from fgfast.kernels.contrast.launch import FINISH_ROWS, JOIN_ROWS, backward, forward
from fgfast.kernels.contrast.problem import CHUNK, HELD_TRIANGLE, LARGEST_D, TileShape, arithmetic, forward_registers
from fgfast.kernels.tune import TuneCase


def _signature(kernel: Any, dtype: str, constexprs: dict[str, Any]) -> dict[str, str]:
    """Types of the arguments of ``kernel``, for aligned vectors of ``dtype``, contiguous in D, and int64 ids."""
    types = {}
    for name in kernel.arg_names:
        if name in constexprs:
            types[name] = "constexpr"
        elif name in ("x", "y", "x_copy", "y_copy"):
            types[name] = f"*{dtype}:16"
        elif "stride" not in name and name.endswith(("low", "high", "image", "part", "view", "scratch")):
            types[name] = "*i64:16"
        elif name in ("N", "X", "Y", "D") or name.endswith("stride_n"):
            types[name] = "i32:16"
        elif "stride" in name or name.startswith("slot"):
            types[name] = "i32"
        else:
            types[name] = "fp32" if name == "scale" else "*fp32:16"
    return types


def _case(
    name: str, kernel: Any, dtype: str, constexprs: dict[str, Any], warps: int = 4, stages: int = 3,
    archs: tuple[str, ...] = (), rare: bool = False, registers: int = 0,
) -> AotCase:  # fmt: skip
    contiguous = [n for n in kernel.arg_names if n.endswith(("stride_d", "stride_image", "stride_part", "stride_view"))]
    absent = {"temperature"} & set(kernel.arg_names)
    known = constexprs | dict.fromkeys(contiguous, 1) | dict.fromkeys(absent)
    types = _signature(kernel, dtype, known)
    return AotCase(f"contrast {name}", kernel, types, known, warps, stages, archs, rare, registers=registers)


def tune_cases(device: str = "cuda", number: int = 1 << 14) -> Iterator[TuneCase]:
    """Query and key of 128 and 256 channels, all in one tile, and of 1,024."""
    sizes = list(product((64, 128), (32, 64, 128), (16, 32), (16, 32, 64, 0), (4, 8), (2, 3), (0, MOST_REGISTERS)))
    for dtype, (channels, most) in product(
        (torch.bfloat16, torch.float32), ((128, 128), (256, 256), (1024, LARGEST_D))
    ):
        query, key = (torch.randn(number, channels, device=device, dtype=dtype) for _ in range(2))
        image = torch.arange(number, device=device)
        one, two = (Ids(image, torch.zeros_like(image), torch.full_like(image, view)) for view in (0, 1))
        call: tuple[Any, ...] = (query, one, key, two, None, None, 0.1, "all", True, "ieee")
        _, lse, count = forward(*call)
        runs = {
            "forward": partial(forward, *call),
            "gradient": partial(backward, torch.ones_like(lse), lse, count, [True, True, False, False], *call),
        }
        rows = [
            contrast_row(arithmetic(dtype, "ieee"), most, x, y, compared, d or channels, warps, stages, 0, registers)
            for x, y, compared, d, warps, stages, registers in sizes
            if compared <= y and (d or channels) <= 256
        ]
        if most == LARGEST_D:
            del runs["gradient"]  # for few logits: that of many is made of chunks (``wide_cases``)
        for kernel, run in runs.items():
            yield TuneCase(f"contrast {kernel}", rows, run)


def aot_cases() -> Iterator[AotCase]:
    """Cases of every kernel, dtype and row of the table."""
    common = {"NORMALIZE": True, "UPCAST": False}
    for dtype in ("bf16", "fp16", "fp32"):
        for block, copied in product((32, 64, 128), (False, True) if dtype != "fp32" else (False,)):
            prepare: dict[str, Any] = common | {"BOUNDED": True, "BLOCK": block, "BLOCK_D": 128}
            prepare["CHANNELS"] = 256 * copied
            if not copied:
                prepare |= dict.fromkeys(f"{side}_{part}" for side in "xy" for part in ("copy", "factor", "bias"))
            rare = dtype == "fp16" or block < 128
            name = f"prepare {dtype} {block}{' copied' * copied}"
            yield _case(name, per_vector.prepare, dtype, prepare, rare=rare)
        for splits in (1, 4):
            small = {"UPCAST": False, "BLOCK": FINISH_ROWS, "BLOCK_D": 128}
            rare = dtype == "fp16" or splits == 1
            finish = small | {"NORMALIZE": True, "X_SPLITS": splits, "Y_SPLITS": 1}
            yield _case(f"finish {dtype} {splits}", per_vector.finish, dtype, finish, rare=rare)
            inner = small | {"SPLITS": splits}
            yield _case(f"inner {dtype} {splits}", per_vector.inner, dtype, inner, rare=rare, registers=MOST_REGISTERS)
    for bounded in (True, False):
        join = {"BOUNDED": bounded, "BLOCK_SLOTS": 16, "BLOCK": JOIN_ROWS}
        yield _case(f"join {'bounded' if bounded else 'online'}", per_vector.join, "fp32", join)
    for kernel in ("forward", "gradient"):
        rows = list(table(f"contrast {kernel}"))
        for arch, row_name, row in rows:
            kind = row.kind.removesuffix(" copied").removesuffix(" held")
            dtypes = {"half": ("bf16", "fp16"), "fp16": ("fp16",), "bf16": ("bf16",)}.get(kind, ("fp32",))
            of_float16 = [r for a, _, r in rows if a == arch and r.kind == row.kind.replace("half", "fp16")]
            if kind == "half" and any(r.channels >= row.channels for r in of_float16):
                dtypes = ("bf16",)
            archs, tuned = architectures_for(f"contrast {kernel}", arch, row), "tuned" in row_name
            for dtype in dtypes:
                name = f"{kernel} {arch} {dtype} {row.kind} D{row.channels}{' tuned' * tuned}"
                for case in _tile_cases(name, kernel, dtype, row.kind, TileShape.of(row), row.channels, archs):
                    yield case._replace(tuned=tuned, registers=case.registers or row.registers, shared=row.shared)


def _tile_cases(
    name: str, kernel: str, dtype: str, kind: str, row: TileShape, channels: int, archs: tuple[str, ...]
) -> Iterator[AotCase]:
    """Cases of one row: bounded or not; all pairs or one triangle; the sides that the gradient is taken for."""
    rare = dtype == "fp16" and not kind.startswith("fp16")  # as for bfloat16 but for one instruction
    fixed = row.options | {
        "NEGATIVES": "all", "SPLITS": 1, "CHUNK": CHUNK, "PRECISION": "tf32" if kind.startswith("tf32") else "ieee",
        "UPCAST": False,
    }  # fmt: skip
    fixed["CHANNELS"] = channels if row.copied else 0
    if not row.copied:
        fixed |= dict.fromkeys(("y_copy", "y_factor", "y_bias", "scratch"))
    for bounded in (True,) if row.held else (True, False):
        full, of_all = f"{name} {'bounded' if bounded else 'online'}", fixed | {"BOUNDED": bounded}
        if kernel == "forward":
            fits = bounded and row.triangle and not (row.held and channels > HELD_TRIANGLE)
            for triangular in (False, True) if fits else (False,):
                flags = of_all | row.of_forward(triangular)
                flags |= {"SPLITS": 4} if triangular else {"partial": None}
                registers = forward_registers(row.registers, bounded, triangular)
                yield _case(
                    f"{full}{' triangular' * triangular}", forward_kernel, dtype, flags, row.warps, row.stages,
                    archs, rare, registers,
                )  # fmt: skip
            continue
        for sides in ("x", "y", "xy") if bounded else ("x", "y"):
            flags = of_all | {"X_ROWS": "x" in sides, "Y_ROWS": "y" in sides, "ADD": False}
            yield _case(f"{full} {sides}", gradient_kernel, dtype, flags, row.warps, row.stages, archs, rare)
        if row.whole:  # a block of columns of another rank; without WHOLE the flag has no effect
            flags = of_all | {"X_ROWS": True, "Y_ROWS": False, "ADD": True}
            yield _case(f"{full} x added", gradient_kernel, dtype, flags, row.warps, row.stages, archs, rare)
