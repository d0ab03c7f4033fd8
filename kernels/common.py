"""Helpers of every kernel file: compilation cases, launch options, and the differences of Triton's interpreter.

Under TRITON_INTERPRET=1 arithmetic on bfloat16 works on raw bits and a store of float32 to bfloat16 truncates. Hence a
kernel takes a constexpr UPCAST: loads are converted to float32 at once (:func:`upcast`), and the host allocates
float32 outputs and converts them afterwards (:func:`output_dtype`). Compiled kernels have UPCAST False.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class AotCase(NamedTuple):
    """One compilation that :mod:`fgfast.kernels.aot` makes without a GPU.

    A module lists its cases in ``aot_cases()``. The signature maps every argument to its Triton type ("*bf16", "i32",
    "constexpr"), followed by ":16" for a pointer or integer that is a multiple of 16. The type of a tuple is a tuple of
    types, in which "constexpr=1" is the constant 1. ``archs`` are the architectures that use the row of the case. A
    case that differs little from others is ``rare``.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[str, ...] = ()  # () for all
    rare: bool = False  # left out by --default-only
    tuned: bool = False  # of a measured row, which may spill if it was the fastest
    registers: int = 0  # see launch_options
    shared: int = 0  # KiB of shared memory that its row allows; 0 for the limit of the architecture


class Constant(tl.constexpr):
    """A global constant of kernels. Triton compares it with itself at every launch, here without a new constexpr."""

    def __ne__(self, other: object) -> bool:
        return self.value != getattr(other, "value", other)

    __hash__ = tl.constexpr.__hash__


COMPILER: tuple[int, ...] = tuple(int(n) for n in triton.__version__.split(".")[:2])
MOST_REGISTERS = 255  # per thread on an NVIDIA GPU


def launch_options(warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    """Keyword arguments of a launch.

    ``registers`` is the budget per thread on NVIDIA GPUs; with 0 ptxas chooses an occupancy and may spill a few
    registers to reach it.
    """
    budget = {"maxnreg": registers} if registers and torch.version.hip is None else {}
    return {"num_warps": warps, "num_stages": stages, **budget}


def cdiv(a: int, b: int) -> int:
    """The ceiling of a / b; a call of Triton's own function, which serves kernels too, takes microseconds."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n, 1 for 0.

    Example:
        >>> [power_of_2(n) for n in (0, 1, 2, 3, 64, 65)]
        [1, 1, 2, 4, 64, 128]
    """
    return 1 << max(0, n - 1).bit_length()


@cache
def interpreted() -> bool:
    """Whether Triton runs kernels as Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel stores a result of ``dtype``: float32 for half precision in the interpreter."""
    return torch.float32 if interpreted() and dtype in (torch.bfloat16, torch.float16) else dtype


def on_device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Make the device of ``x`` current, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def wide(*tensors: torch.Tensor | None) -> bool:
    """Whether an offset within one problem of some tensor [B, ...] exceeds int32."""
    return any(
        x is not None and sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31
        for x in tensors
    )


@triton.jit
def upcast(x, UPCAST: tl.constexpr):
    """x, converted to float32 if UPCAST (under the interpreter)."""
    return x.to(tl.float32) if UPCAST else x
