"""Checks of what k-means is given, and its pixels, weights and centroids as views of one shape."""

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor

from fgfast.tensors import (
    FLOATS,
    TILE_ELEMENTS,
    as_size,
    check_device,
    check_float,
    check_seed,
    check_whole,
    shape_error,
    values_checked,
)

BACKENDS = ("torch", "reference")
METRICS = ("euclidean", "cosine")


class Array(Protocol):
    """A NumPy array, or what converts itself to one, as a pandas DataFrame does."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """The numbers as a NumPy array."""


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, allowed))}.")


def _from_array(name: str, x: object) -> Tensor:
    """An `Array` as a tensor, copied only where torch cannot share its memory."""
    if not hasattr(x, "__array__"):
        raise TypeError(f"{name} is a {type(x).__name__}: give a torch.Tensor or a NumPy array.")
    import numpy as np

    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: give its data, and weight 0 to what is masked.")
    array = np.asarray(x)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} is an array of dtype {array.dtype}: give numbers.")
    dtype = np.dtype(f"{array.dtype.kind}{min(array.itemsize, 8)}")  # of this machine's byte order
    strides_fit = all(step >= 0 and step % array.itemsize == 0 for step in array.strides)
    shared = array.flags.writeable and strides_fit and array.dtype.num == dtype.num
    return torch.from_numpy(array.astype(dtype, copy=not shared))


def as_floats(name: str, x: object, device: torch.device | None = None) -> Tensor:
    """Numbers as a float tensor: an array on the CPU, or on ``device``; a tensor stays where it is.

    Integers and booleans of up to 16 bits become float32, wider ones float64, as float32 has only 24 bits.

    Raises:
        TypeError: neither a tensor nor an array, or of no real numbers, or sparse.
    """
    if not isinstance(x, Tensor):
        x = _from_array(name, x).to(device)
    if x.layout != torch.strided:
        raise TypeError(f"{name} is sparse: give it as a dense tensor (to_dense).")
    if x.dtype not in FLOATS and not x.dtype.is_floating_point and not x.dtype.is_complex:
        x = x.to(torch.float32 if x.dtype.itemsize <= 2 else torch.float64)
    check_float(name, x)
    return x


def check_counts(n_clusters: int, pixels: int, n_iter: int, n_init: int, init_samples: int | None, tol: float) -> None:
    """Raise unless the numbers that ``kmeans`` is given are of their type and in their range."""
    if pixels == 0:
        raise ValueError(f"x has {pixels} pixels: give at least one.")
    check_whole("n_clusters", n_clusters)
    if not 1 <= n_clusters <= pixels:
        raise ValueError(f"n_clusters is {n_clusters} for {pixels} pixels: give 1 to {pixels}.")
    drawn = n_clusters if init_samples is None else init_samples
    for name, number, least in (("n_iter", n_iter, 0), ("n_init", n_init, 1), ("init_samples", drawn, n_clusters)):
        check_whole(name, number)
        if number < least:
            raise ValueError(f"{name} is {number}: give at least {least}.")
    if not isinstance(tol, Real | torch.SymFloat):
        raise TypeError(f"tol is {tol!r}: give a number.")
    if not tol >= 0:
        raise ValueError(f"tol is {tol}: give at least 0.")


def columns(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A view [B, D, N] (or [B, D, H, W]) of x, and the shape that its labels have."""
    if x.dim() == 2:
        return x.T[None], (x.shape[0],)
    if x.dim() == 3:
        return x.transpose(1, 2), (x.shape[0], x.shape[1])
    if x.dim() == 4:
        return x, (x.shape[0], *x.shape[2:])
    raise shape_error("x", "[N, D], [B, N, D], [B, D, H, W] or a list of maps", x)


def flat_weight(
    weight: Tensor | Array | None, shape: tuple[int, ...], batch: int, device: torch.device
) -> Tensor | None:
    if weight is None:
        return None
    weight = as_floats("weight", weight, device)
    check_device("weight", weight, device)
    if tuple(weight.shape) != shape:
        raise shape_error("weight", str(list(shape)), weight)
    return weight.detach().reshape(batch, -1)


def match_centroids(name: str, centroids: Tensor | Array, batch: int, channels: int, device: torch.device) -> Tensor:
    """[B, K, D] view of centroids [B, K, D] or [K, D] (the same for every problem)."""
    centroids = as_floats(name, centroids, device)
    check_device(name, centroids, device)
    if centroids.dim() == 2:
        centroids = centroids.expand(batch, *centroids.shape)
    if centroids.dim() != 3 or centroids.shape[0] != batch or centroids.shape[2] != channels:
        raise shape_error(name, f"[B, K, D] or [K, D] with B = {batch} and D = {channels}", centroids)
    if centroids.shape[1] < 1:
        raise ValueError(f"{name} holds no centroid: give at least one.")
    return centroids.detach()


def check_finite(name: str, x: Tensor) -> None:
    if values_checked(x) and x.numel() and not all(map(math.isfinite, torch.stack(x.aminmax()).tolist())):
        raise ValueError(f"{name} holds a number that is not finite: give finite centroids.")


def groups(batch: int, elements: int, device: torch.device) -> range:
    """First problems of the groups that run together: all on a device, a tile's worth on the CPU."""
    return range(0, batch, max(1, TILE_ELEMENTS // max(1, elements)) if device.type == "cpu" else max(1, batch))


def check_maps(x: Sequence[Tensor | Array], size: int | tuple[int, int] | None) -> tuple[list[Tensor], tuple[int, int]]:
    """The maps of a pyramid and its size, checked."""
    if not x:
        raise ValueError("x is an empty list: give at least one map [B, D, H, W].")
    maps = [as_floats(f"x[{i}]", m) for i, m in enumerate(x)]
    if size is None:
        raise ValueError("size is missing: a list of maps needs the (height, width) at which its pixels are clustered.")
    height, width = as_size(size)
    first = maps[0]
    for i, m in enumerate(maps):
        name = f"x[{i}]"
        check_device(name, m, first.device)
        if m.dim() != 4 or m.shape[0] != first.shape[0] or 0 in m.shape[1:]:
            raise shape_error(name, f"[B, D, H, W] with B = {first.shape[0]} and no side 0", m)
        if m.dtype != first.dtype:
            raise TypeError(f"{name} has dtype {m.dtype} but x[0] has {first.dtype}: use one dtype.")
    return [m.detach() for m in maps], (height, width)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A 0-d int64 tensor on the device, from a number 0 to 2^63 - 1; None draws it from torch's generator."""
    if seed is None:
        return torch.randint(1 << 62, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}: give an int or a 0-d int64 tensor.")
        check_device("seed", seed, device)
        return seed
    check_seed(seed)
    return torch.full((), seed, dtype=torch.int64, device=device)
