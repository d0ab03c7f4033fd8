"""Checks of what k-means is given, and its pixels, weights and centroids as views of one shape."""

import torch
from torch import Tensor

from fgfast.tensors import TILE_ELEMENTS, as_size, check_device, check_float, shape_error, values_checked

BACKENDS = ("torch", "reference")
METRICS = ("euclidean", "cosine")


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(map(repr, allowed))}.")


def columns(x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A view [B, D, N] (or [B, D, H, W]) of x, and the shape that its labels have."""
    check_float("x", x)
    if x.dim() == 2:
        return x.T[None], (x.shape[0],)
    if x.dim() == 3:
        return x.transpose(1, 2), (x.shape[0], x.shape[1])
    if x.dim() == 4:
        return x, (x.shape[0], *x.shape[2:])
    raise shape_error("x", "[N, D], [B, N, D], [B, D, H, W] or a list of maps", x)


def flat_weight(weight: Tensor | None, shape: tuple[int, ...], batch: int, device: torch.device) -> Tensor | None:
    if weight is None:
        return None
    check_float("weight", weight)
    check_device("weight", weight, device)
    if tuple(weight.shape) != shape:
        raise shape_error("weight", str(list(shape)), weight)
    return weight.detach().reshape(batch, -1)


def match_centroids(name: str, centroids: Tensor, batch: int, channels: int, device: torch.device) -> Tensor:
    """[B, K, D] view of centroids [B, K, D] or [K, D] (the same for every problem)."""
    check_float(name, centroids)
    check_device(name, centroids, device)
    if centroids.dim() == 2:
        centroids = centroids.expand(batch, *centroids.shape)
    if centroids.dim() != 3 or centroids.shape[0] != batch or centroids.shape[2] != channels:
        raise shape_error(name, f"[B, K, D] or [K, D] with B = {batch} and D = {channels}", centroids)
    if centroids.shape[1] < 1:
        raise ValueError(f"{name} holds no centroid: give at least one.")
    return centroids.detach()


def check_finite(name: str, x: Tensor) -> None:
    if values_checked(x) and not bool(x.isfinite().all()):
        raise ValueError(f"{name} holds a number that is not finite: give finite centroids.")


def groups(batch: int, elements: int, device: torch.device) -> range:
    """First problems of the groups that run together: all on a device, a tile's worth on the CPU."""
    return range(0, batch, max(1, TILE_ELEMENTS // max(1, elements)) if device.type == "cpu" else max(1, batch))


def check_maps(
    x: list[Tensor] | tuple[Tensor, ...], size: int | tuple[int, int] | None
) -> tuple[list[Tensor], tuple[int, int]]:
    """The maps of a pyramid and its size, checked."""
    if not x:
        raise ValueError("x is an empty list: give at least one map [B, D, H, W].")
    if size is None:
        raise ValueError("size is missing: a list of maps needs the (height, width) at which its pixels are clustered.")
    height, width = as_size(size)
    for i, m in enumerate(x):
        name = f"x[{i}]"
        check_float(name, m)
        check_device(name, m, x[0].device)
        if m.dim() != 4 or m.shape[0] != x[0].shape[0] or 0 in m.shape[1:]:
            raise shape_error(name, f"[B, D, H, W] with B = {x[0].shape[0]} and no side 0", m)
        if m.dtype != x[0].dtype:
            raise TypeError(f"{name} has dtype {m.dtype} but x[0] has {x[0].dtype}: use one dtype.")
    return [m.detach() for m in x], (height, width)


def seed_tensor(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """A 0-d int64 tensor on the device; None draws it from torch's generator."""
    if seed is None:
        return torch.randint(1 << 62, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed is {seed.dtype} of shape {tuple(seed.shape)}: give an int or a 0-d int64 tensor.")
        check_device("seed", seed, device)
        return seed
    return torch.full((), seed, dtype=torch.int64, device=device)
