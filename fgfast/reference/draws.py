"""Counter-based random numbers: a function of (seed, stream, position), the same on every device and in every order.

torch.Generator cannot take its seed from a tensor, and its numbers differ between devices. SplitMix64 in int64 tensors
can and do not: the seed may lie on the device (CUDA graphs), and every problem of a batch may draw the same numbers, so
that its result does not depend on its neighbours.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 wraps around, as the algorithm wants
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(z: Tensor) -> Tensor:
    for bits, factor in _MIX:
        z = (z ^ _shift(z, bits)) * factor
    return z ^ _shift(z, 31)


def uniform(seed: Tensor, stream: int, n: int) -> Tensor:
    """N numbers in [0, 1) with 32 random bits, float64.

    Args:
        seed: 0-d int64; the numbers come on its device.
        stream: which independent sequence.
        n: how many.

    Example:
        >>> u = uniform(torch.tensor(0), 1, 4)
        >>> bool(((u >= 0) & (u < 1)).all()), torch.equal(u[:2], uniform(torch.tensor(0), 1, 2))
        (True, True)
    """
    start = _mixed(_mixed(seed * _GOLDEN) + torch.full_like(seed, stream) * _GOLDEN)
    z = _mixed(start + torch.arange(1, n + 1, device=seed.device) * _GOLDEN)
    return _shift(z, 32).double() / (1 << 32)
