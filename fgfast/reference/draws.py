"""Counter-based random numbers: a function of (seed, stream, position), the same on every device and in every order.

torch.Generator cannot take its seed from a tensor, and its numbers differ between devices. SplitMix64 in int64 tensors
has neither limit: the seed may be on the device (CUDA graphs), and all problems of a batch may draw the same numbers,
which makes the result of each independent of the others.

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 wraps around, as the algorithm requires
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    for bits, factor in _MIX:
        z = (z ^ _shift(z, bits)) * factor
    return z ^ _shift(z, 31)


def uniform(seed: Tensor, stream: int, n: int) -> Tensor:
    """``n`` numbers in [0, 1) with 32 random bits, float64.

    Args:
        seed: 0-d int64; the numbers are on its device.
        stream: which independent sequence.
        n: how many.

    Example:
        >>> u = uniform(torch.tensor(0), 1, 4)
        >>> bool(((u >= 0) & (u < 1)).all()), torch.equal(u[:2], uniform(torch.tensor(0), 1, 2))
        (True, True)
    """
    start = _mix(_mix(seed * _GOLDEN) + torch.full_like(seed, stream) * _GOLDEN)
    z = _mix(start + torch.arange(1, n + 1, device=seed.device) * _GOLDEN)
    return _shift(z, 32).double() / (1 << 32)


def spaced_pixels(weight: Tensor, count: int = 8) -> Tensor:
    """Indices [B, count] of pixels of positive weight [B, N], evenly spaced among these; any pixels if there is none.

    Example:
        >>> spaced_pixels(torch.tensor([[1.0, 1, 0, 0, 1, 1]]), 2).tolist()
        [[1, 5]]
    """
    rank = (weight > 0).cumsum(1)  # [B, N]
    wanted = (rank[:, -1:] * (2 * torch.arange(count, device=weight.device) + 1)) // (2 * count) + 1
    return torch.searchsorted(rank, wanted).clamp_max(weight.shape[1] - 1)


def spaced_of_all(pixels: int, device: torch.device, count: int = 8) -> Tensor:
    """The indices [count] of :func:`spaced_pixels` where the weights of all pixels, at least one, are positive.

    Example:
        >>> spaced_of_all(4, torch.device("cpu"), 2).tolist()
        [1, 3]
    """
    return torch.arange(pixels, 2 * count * pixels, 2 * pixels, device=device) // (2 * count)


def philox(seed: int, images: int, patches: int, device: torch.device) -> Tensor:
    """Numbers in (0, 1) with 23 random bits, float32 [images, patches], by Philox 4x32-10.

    The counter is (patch // 4, 0, image), the word patch % 4, the key the seed: csrc/pivotal.h draws the same numbers.

    Example:
        >>> u = philox(0, 2, 8, torch.device("cpu"))
        >>> torch.equal(u[:, :3], philox(0, 2, 3, torch.device("cpu")))
        True

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    low = (1 << 32) - 1
    image = torch.arange(images, device=device)[:, None]
    quad = torch.arange(-(-patches // 4), device=device).expand(images, -1)
    c = [quad, torch.zeros_like(quad), (image & low).expand_as(quad), (image >> 32).expand_as(quad)]
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57  # below 2^64: the high half by a logical shift
        c = [_shift(b, 32) ^ c[1] ^ k0, b & low, _shift(a, 32) ^ c[3] ^ k1, a & low]
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    words = torch.stack(c, 2).flatten(1)[:, :patches]
    return ((words >> 9).float() + 0.5) * 2.0**-23


def normal(seed: int, rows: int, columns: int, device: torch.device) -> Tensor:
    """Standard normal numbers, float32 [rows, columns]: pairs of :func:`philox` by Box and Muller's transform.

    Example:
        >>> z = normal(0, 100, 100, torch.device("cpu"))
        >>> abs(float(z.mean())) < 0.03, abs(float(z.std()) - 1) < 0.03
        (True, True)
    """
    u, v = philox(seed, rows, columns + columns % 2, device).unflatten(1, (-1, 2)).unbind(2)
    radius, angle = (-2 * u.log()).sqrt(), 2 * torch.pi * v
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 2).flatten(1)[:, :columns]
