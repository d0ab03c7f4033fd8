"""What every kernel file shares: whether Triton interprets, and what that changes.

Under TRITON_INTERPRET=1 arithmetic on bfloat16 works on raw bits and a store of float32 to bfloat16 truncates. So a
kernel takes a constexpr UPCAST: loads are converted to float32 at once (:func:`widened`), and the host allocates
float32 outputs and converts them afterwards (:func:`output_dtype`). Compiled kernels have UPCAST False.
"""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class AotCase(NamedTuple):
    """One compilation that :mod:`fgfast.kernels.aot` makes without a GPU.

    A kernel file offers its own through ``aot_cases()``. The signature maps every argument to its type as Triton writes
    it ("*bf16", "i32", "constexpr"), with ":16" behind it for a pointer or integer that is a multiple of 16, and the
    types of a tuple as a tuple, in which "constexpr=1" is the constant 1. A row that serves some architectures names
    them; a case that is like others, but for little, is rare.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    archs: tuple[str, ...] = ()  # () for each
    rare: bool = False  # left out by --default-only
    tuned: bool = False  # of a measured row, which may spill if it was fastest all the same
    registers: int = 0  # see launch_options
    shared: int = 0  # KiB of shared memory that its row says to suffice; 0 for what the part has


COMPILER: tuple[int, ...] = tuple(int(n) for n in triton.__version__.split(".")[:2])
MOST_REGISTERS = 255  # a thread can have on an NVIDIA GPU


def launch_options(warps: int, stages: int, registers: int = 0) -> dict[str, int]:
    """What a launch takes as keywords.

    ``registers`` is the budget of a thread on NVIDIA GPUs; at 0 ptxas aims at an occupancy of its own choice, and may
    spill a few registers for it.
    """
    budget = {"maxnreg": registers} if registers and torch.version.hip is None else {}
    return {"num_warps": warps, "num_stages": stages, **budget}


def interpreted() -> bool:
    """Whether Triton runs kernels as Python on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel stores a result that is wanted in ``dtype``."""
    return torch.float32 if interpreted() and dtype in (torch.bfloat16, torch.float16) else dtype


def on_device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device: make it that of ``x``."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


@triton.jit
def widened(x, UPCAST: tl.constexpr):
    """x, as float32 under the interpreter."""
    return x.to(tl.float32) if UPCAST else x
