"""The cases of the gradient by chunks that are compiled ahead of time and timed by the tuner."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch

from fgfast.ids import Ids
from fgfast.kernels.common import MOST_REGISTERS, AotCase
from fgfast.kernels.configs import Row, architectures_for, contrast_row, table
from fgfast.kernels.contrast import wide_kernels as device_side
from fgfast.kernels.contrast.launch import backward, forward
from fgfast.kernels.contrast.problem import LARGEST_D, TileShape
from fgfast.kernels.contrast.wide import COPY_ROWS
from fgfast.kernels.tune import TuneCase

STRIDES = tuple(f"{side}_stride_{name}" for side in "xy" for name in ("d", "image", "part", "view"))
OUTPUTS = {  # arguments that are None, of launches that keep weights
    "rows": ("of_columns", "y_exp", "y_positive"),
    "columns": ("of_rows", "y_exp", "y_positive"),
    "both": ("y_exp", "y_positive"),
    "same": (),
    "bank": ("y_exp", "y_positive", "y_image", "y_part", "y_view"),
}


def _types(kernel: Any, dtype: str, stored: str, constants: dict[str, Any]) -> dict[str, str]:
    """Types of the arguments of ``kernel``, for aligned vectors of ``dtype``, contiguous in D, and int64 ids."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in ("x", "y"):
            types[name] = f"*{dtype}:16"
        elif name in ("out", "of_rows", "of_columns", "logits"):
            types[name] = f"*{stored}:16"
        elif "stride" not in name and name.endswith(("image", "part", "view")):
            types[name] = "*i64:16"
        elif name in ("X", "Y", "D", "width") or name.endswith("stride_n"):
            types[name] = "i32:16"
        else:
            types[name] = "fp32" if name == "scale" else "*fp32:16"
    return types


def aot_cases() -> Iterator[AotCase]:
    """Cases of every kernel, dtype and row of the table."""
    for dtype in ("bf16", "fp16", "fp32"):
        stored = "fp32" if dtype == "fp32" else "bf16"
        copy = {"x_stride_d": 1, "BLOCK": COPY_ROWS, "BLOCK_D": 128, "UPCAST": False}
        types = _types(device_side.copy_present, dtype, stored, copy)
        yield AotCase(f"contrast copy {dtype}", device_side.copy_present, types, copy, 4, 3, rare=dtype == "fp16")
        for arch, row_name, row in table("contrast weights"):
            if (row.kind == "fp32") == (dtype == "fp32"):
                yield from _row_cases(dtype, stored, arch, row, "tuned" in row_name)


def _row_cases(dtype: str, stored: str, arch: str, row: Row, tuned: bool) -> Iterator[AotCase]:
    """Cases of one row: bounded or not; what is kept of the weights, and for which columns."""
    archs, tile = architectures_for("contrast weights", arch, row), TileShape.of(row)
    name = f"contrast weights {arch} {dtype} {row.kind} D{row.channels}{' tuned' * tuned}"
    for bounded, (outputs, absent) in product((True, False), OUTPUTS.items()):
        if outputs == "same" and not bounded:
            continue
        nothing = ["temperature", *absent, *["x_lse"] * bounded, *["logits"] * (dtype != "fp32")]
        constants = dict.fromkeys(STRIDES, 1) | dict.fromkeys(nothing) | {
            "NEGATIVES": "all", "BOUNDED": bounded, "BLOCK_X": tile.x, "BLOCK_Y": tile.y, "BLOCK_S": tile.compared,
            "BLOCK_D": tile.d, "UPCAST": False,
        }  # fmt: skip
        types = _types(device_side.weights, dtype, stored, constants)
        rare = dtype == "fp16" or outputs not in ("both", "same")
        yield AotCase(
            f"{name} {'bounded' if bounded else 'online'} {outputs}", device_side.weights, types, constants, tile.warps,
            tile.stages, archs, rare, tuned, row.registers, row.shared,
        )  # fmt: skip


def tune_cases(device: str = "cuda", number: int = 1 << 14) -> Iterator[TuneCase]:
    """Query and key of 1,024 channels."""
    query, key = (torch.randn(number, 1024, device=device, dtype=torch.bfloat16) for _ in range(2))
    image = torch.arange(number, device=device)
    one, two = (Ids(image, torch.zeros_like(image), torch.full_like(image, view)) for view in (0, 1))
    call: tuple[Any, ...] = (query, one, key, two, None, None, 0.1, "all", True, "ieee")
    _, lse, count = forward(*call)
    rows = [
        contrast_row("half", LARGEST_D, x, y, compared, d, warps, stages, 0, registers)
        for x, y, compared, d, warps, stages, registers in product(
            (64, 128, 256), (64, 128, 256), (16, 32), (32, 64), (4, 8), (3, 4), (0, MOST_REGISTERS)
        )
    ]
    run = partial(backward, torch.ones_like(lse), lse, count, [True, True, False, False], *call)
    yield TuneCase("contrast weights", rows, run)
