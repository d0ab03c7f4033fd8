"""Helpers of every operation: dtypes, checks of arguments, autocast and matmul precision."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Integral

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LOG2E = math.log2(math.e)
BOUNDED = 50.0  # logits in base 2 up to here: sums of 2^31 of them and their inverses stay normal in float32
TILE_ELEMENTS = 1 << 21  # elements of a tile: 8 MiB of float32


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums accumulate: float64 for float64, float32 for every other float dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def values_checked(x: Tensor) -> bool:
    """Whether the values of ``x`` may be read: free on the CPU, a device sync elsewhere (only with FGFAST_CHECKS=1)."""
    return x.device.type == "cpu" or os.environ.get("FGFAST_CHECKS") == "1"


def shape_error(name: str, expected: str, x: Tensor) -> ValueError:
    """The error for a tensor of the wrong shape.

    Example:
        >>> shape_error("query", "[N, D]", torch.zeros(3))
        ValueError('query: expected shape [N, D], got [3].')
    """
    return ValueError(f"{name}: expected shape {expected}, got {list(x.shape)}.")


def check_integers(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a tensor of integers."""
    check_tensor(name, x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name} has dtype {x.dtype}: give integers.")


def check_weight(weight: Tensor) -> None:
    """Raise on a negative or non-finite weight if reading it costs no device sync."""
    if values_checked(weight) and weight.numel() and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("weight holds a negative or non-finite number: use 0 to leave a pixel out.")


def check_ids(labels: Tensor, n_parts: int) -> None:
    """Raise on a label other than -1 (uint8: 255), 0, ..., n_parts - 1 if reading it costs no device sync."""
    if torch.compiler.is_compiling() or not values_checked(labels) or not labels.numel():
        return
    signed = labels.masked_fill(labels == 255, 0) if labels.dtype == torch.uint8 else labels
    low, high = (int(v) for v in signed.aminmax())
    if low < -1 or high >= n_parts:
        wrong = low if low < -1 else high
        raise ValueError(
            f"labels holds {wrong}: with {n_parts} parts give 0 to {n_parts - 1}, or -1 (uint8: 255) for no part."
        )


def check_tensor(name: str, x: object) -> None:
    """Raise unless ``x`` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}: give a torch.Tensor.")


def check_whole(name: str, n: object) -> None:
    """Raise unless ``n`` is an integer or a symbolic integer of a traced shape."""
    if not isinstance(n, Integral | torch.SymInt):
        raise TypeError(f"{name} is {n!r}: give a whole number.")


def seed_or_random(seed: int | None, needed: bool) -> int:
    """The given seed; if None, one drawn from torch's generator, or 0 if no seed is ``needed``.

    Raises:
        TypeError: the seed is not an integer.
        ValueError: the seed is not in 0..2^63 - 1.
    """
    if seed is None:
        return int(torch.randint(1 << 62, ())) if needed else 0
    check_whole("seed", seed)
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed is {seed}: give a number from 0 to 2^63 - 1.")
    return seed


def as_size(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), both at least 1, from a pair or from one number for a square."""
    pair = (size, size) if not isinstance(size, tuple | list) else tuple(size)
    if len(pair) != 2:
        raise ValueError(f"size is {size!r}: give (height, width) or one whole number.")
    for side in pair:
        check_whole("size", side)
    if min(pair) < 1:
        raise ValueError(f"size is {pair}: give at least 1 x 1.")
    return pair


def check_float(name: str, x: Tensor) -> None:
    """Raise unless ``x`` is a tensor of one of the four float dtypes."""
    check_tensor(name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {x.dtype}: use float16, bfloat16, float32 or float64.")


def check_device(name: str, x: Tensor, device: torch.device) -> None:
    """Raise unless ``x`` is on ``device``."""
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the features are on {device}: move it there.")


@contextmanager
def exact(device: torch.device, precision: str = "ieee") -> Iterator[None]:
    """Run the block without autocast, with float32 products on a GPU in ``precision`` ("ieee" or "tf32")."""
    with torch.autocast(device.type, enabled=False):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, precision
        try:
            yield
        finally:
            matmul.fp32_precision = before
