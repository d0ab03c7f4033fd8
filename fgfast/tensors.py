"""Helpers of every operation: dtypes, checks of arguments, autocast and matmul precision."""

import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
LOG2E = math.log2(math.e)
BOUNDED = 50.0  # logits in base 2 up to here: sums of 2^31 of them and their inverses stay normal in float32
TILE_ELEMENTS = 1 << 21  # elements of a tile: 8 MiB of float32
EPS = 1e-12  # a vector shorter than this is divided by it instead of by its norm
ZERO = 1e-15  # a vector with no larger entry is shorter than EPS; its square is still a float32 number

# Private names of torch, which has no public ones; where a release lacks one, a test says so.
in_func = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
is_wrapped = getattr(torch._C._functorch, "is_functorch_wrapped_tensor", lambda _: False)


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums accumulate: float64 for float64, float32 for every other float dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent, or belongs to a transform of torch.func, as vmap and grad are."""
    inside, forward_mode = in_func(), getattr(forward_ad, "_current_level", 0) >= 0
    if not (inside or forward_mode):
        return False
    if torch.compiler.is_compiling():  # which cannot trace what follows, and keeps a graph per transform
        return True

    def is_transformed(x: Tensor) -> bool:
        if inside and (is_wrapped(x) or x.requires_grad):
            return True
        return forward_mode and forward_ad.unpack_dual(x).tangent is not None

    return any(x is not None and is_transformed(x) for x in tensors)


def untransformed(x: Tensor) -> Tensor:
    """The tensor inside all transforms of torch.func, with the whole batch of each vmap."""
    while not torch.compiler.is_compiling() and is_wrapped(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def has_values(x: Tensor) -> bool:
    """False for a tensor that stands for its shape, as in FakeTensorMode."""
    return type(x).__torch_dispatch__ is Tensor.__torch_dispatch__


def readable(x: Tensor) -> bool:
    """Whether the values of ``x`` can be read at no cost: on the CPU, and neither traced nor transformed."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return has_values(x) and not is_wrapped(x)


def values_checked(x: Tensor) -> bool:
    """Whether the values of ``x`` may be read: free on the CPU, a device sync elsewhere (only with FGFAST_CHECKS=1)."""
    if x.device.type in ("cpu", "meta") or torch.compiler.is_compiling():
        return readable(x)
    return has_values(x) and not is_wrapped(x) and os.environ.get("FGFAST_CHECKS") == "1"


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
    weight = untransformed(weight)
    if values_checked(weight) and weight.numel() and not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError("weight holds a negative or non-finite number: use 0 to leave a pixel out.")


def check_ids(labels: Tensor, n_parts: int) -> None:
    """Raise on a label other than -1 (uint8: 255), 0, ..., n_parts - 1 if reading it costs no device sync."""
    labels = untransformed(labels)
    if not values_checked(labels) or not labels.numel():
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


def check_seed(seed: object) -> None:
    """Raise unless ``seed`` is a whole number from 0 to 2^63 - 1; True and False are not numbers here."""
    if isinstance(seed, bool):
        raise TypeError(f"seed is {seed}: give a whole number.")
    check_whole("seed", seed)
    if not 0 <= seed < 1 << 63:  # type: ignore[operator]  # check_whole has seen that it is one
        raise ValueError(f"seed is {seed}: give a number from 0 to 2^63 - 1.")


def seed_or_random(seed: int | None, needed: bool) -> int:
    """The given seed; if None, one drawn from torch's generator, or 0 if no seed is ``needed``.

    Raises:
        TypeError: the seed is not an integer.
        ValueError: the seed is not in 0..2^63 - 1.
    """
    if seed is None:
        drawn = torch.randint(1 << 62, (), device="cpu") if needed else None
        return int(drawn) if drawn is not None and has_values(drawn) else 0
    check_seed(seed)
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


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Run the block without autocast; "meta", which computes nothing, has none."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def largest(x: Tensor) -> Tensor:
    """The largest magnitude of each vector of [N, D], D at least 1: [N, 1], a constant."""
    return torch.linalg.vector_norm(x.detach(), math.inf, dim=1, keepdim=True)


def shrinking(top: Tensor) -> Tensor:
    """Factors that bring vectors with the largest magnitudes ``top`` to where squares are finite, 1 for most."""
    return (2.0 ** (500 if top.dtype == torch.float64 else 50) / top).clamp(max=1)


def unit_vectors(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors x / max(|x|, EPS), [N, D] in float32 or float64, differentiable twice, for every finite x.

    The gradient of a vector below EPS is 1 / EPS times that of its unit vector. float16 could not hold it: there, where
    only zero is below EPS, it is 0.

    Example:
        >>> unit_vectors(torch.tensor([[4e30, 0.0], [0.0, 0.0]]), torch.float32).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    wide = x.to(dtype)
    norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    if readable(norm) and norm.numel():
        low, high = norm.detach().aminmax()
        if low > EPS and high < math.inf:  # nearly always, and 4 operations less
            return wide / norm
    if not x.shape[1]:
        return wide
    top = largest(wide)
    wide = wide * (top > 0 if x.dtype == torch.float16 else shrinking(top))
    nonzero = torch.where(top < ZERO, ZERO, wide)  # the norm of zero has no second derivative
    return wide / torch.linalg.vector_norm(nonzero, dim=1, keepdim=True).clamp_min(EPS)


@contextmanager
def exact(device: torch.device, precision: str = "ieee") -> Iterator[None]:
    """Run the block without autocast, with float32 products on a GPU in ``precision`` ("ieee" or "tf32")."""
    with without_autocast(device):
        if device.type != "cuda":
            yield
            return
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, precision
        try:
            yield
        finally:
            matmul.fp32_precision = before
