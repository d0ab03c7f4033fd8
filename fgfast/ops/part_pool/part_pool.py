"""Part pooling: one vector per part and image; checks, choice of backend, registration."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.ops.derivatives import gradients, needs_definition
from fgfast.ops.part_pool.grid import check_n_parts, labels_to_grid
from fgfast.ops.part_pool.tiled import empty_gradient, majority_grid, one_hot, pool, tiles
from fgfast.ops.registration import operation
from fgfast.reference import part_pool as reference
from fgfast.tensors import (
    accumulation,
    check_device,
    check_float,
    check_ids,
    check_integers,
    check_weight,
    exact,
    shape_error,
    transformed,
)


class PartPool(NamedTuple):
    """What `part_pool` returns: pooled [B, K, D] in the dtype of the features, area float32 [B, K]."""

    pooled: Tensor
    area: Tensor


@operation("part_pool")
def _part_pool(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    if weight is not None:
        check_weight(weight)
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.pool(features, labels, n_parts, weight, mean)
    with exact(features.device):
        return pool(features, labels, n_parts, weight, mean)


@_part_pool.register_fake
def _(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool, backend: str = "torch"
) -> tuple[Tensor, Tensor]:
    shape = (features.shape[0], n_parts)
    pooled = features.new_empty(*shape, features.shape[1])
    return pooled, features.new_empty(shape, dtype=accumulation(features.dtype))


@operation("part_pool_backward")
def part_pool_backward(
    grad: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    area: Tensor,
    mean: bool,
    pixel_major: bool,
    backend: str = "torch",
) -> Tensor:
    out = empty_gradient(grad, labels, pixel_major)
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.pool_backward(grad, labels, weight, area, mean, out)
    _, n_parts, channels = grad.shape
    g = grad.to(area.dtype)
    if mean:
        g = g / torch.where(area > 0, area, 1)[..., None]
    use_product = grad.device.type == "cpu" and not pixel_major and bool(g.isfinite().all())
    with exact(grad.device):
        for b, y in tiles(out, n_parts):
            ids, tile = labels[b, y].flatten(1), out[b, :, y]
            w = None if weight is None else weight[b, y].flatten(1).to(g.dtype)
            if use_product:
                values = torch.bmm(g[b].transpose(1, 2), one_hot(ids, w, n_parts, g.dtype))  # [b, D, P]
            else:  # a vector of zeros after those of the parts serves the pixels without a part
                kept = (ids >= 0) & (ids < n_parts) if w is None else (ids >= 0) & (ids < n_parts) & (w > 0)
                padded = torch.cat([g[b], g.new_zeros(len(ids), 1, channels)], 1).flatten(0, 1)  # [b (K + 1), D]
                first = torch.arange(len(ids), device=ids.device)[:, None] * (n_parts + 1)
                rows = padded[first + torch.where(kept, ids.long(), n_parts)]  # [b, P, D]
                values = (rows if w is None else rows * torch.where(kept, w, 1)[..., None]).transpose(1, 2)
            tile.copy_(values.reshape(tile.shape))
    return out


@part_pool_backward.register_fake
def _(
    grad: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    area: Tensor,
    mean: bool,
    pixel_major: bool,
    backend: str = "torch",
) -> Tensor:
    return empty_gradient(grad, labels, pixel_major)


def _setup_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, labels, weight, _, ctx.mean, _, ctx.backend = inputs
    ctx.n_parts = grad.shape[1]
    ctx.save_for_backward(labels, weight)


def _backward_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Pooling is linear, so what is adjoint to its gradient is pooling."""
    labels, weight = ctx.saved_tensors
    pooled, _ = _part_pool(grad, labels, ctx.n_parts, weight, ctx.mean, ctx.backend)
    return pooled, None, None, None, None, None, None


part_pool_backward.register_autograd(_backward_backward, setup_context=_setup_backward)


def is_pixel_major(features: Tensor) -> bool:
    return features.stride(1) == 1 and features.shape[2] * features.shape[3] > 1


def differentiate_pool(
    grad: Tensor, labels: Tensor, weight: Tensor | None, area: Tensor, mean: bool, pixel_major: bool, backend: str
) -> Tensor:
    """The gradient [B, D, h, w] of features: by ``part_pool_backward``, or by the definition in a transform."""
    if not transformed(grad):
        return part_pool_backward(grad, labels, weight, area, mean, pixel_major, backend)
    batch, n_parts, channels = grad.shape
    flat = None if weight is None else weight.flatten(1)

    def pooled(pixels: Tensor) -> Tensor:
        return reference.part_pool(pixels, labels.flatten(1), n_parts, flat, "mean" if mean else "sum")[0]

    zeros = torch.zeros(batch, labels[:1].numel(), channels, dtype=grad.dtype, device=grad.device)
    (found,) = gradients(pooled, [zeros], grad)
    assert found is not None
    return found.transpose(1, 2).unflatten(2, labels.shape[1:])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    features, labels, _, weight, ctx.mean, ctx.backend = inputs
    _, area, *grid = output
    ctx.pixel_major = is_pixel_major(features)
    ctx.save_for_backward(*(grid or (labels,)), weight, area)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    labels, weight, area = ctx.saved_tensors
    out = differentiate_pool(grad, labels, weight, area, ctx.mean, ctx.pixel_major, ctx.backend)
    return out, None, None, None, None, None


_part_pool.register_autograd(_backward, setup_context=_setup)


@operation("part_pool_map")
def _part_pool_map(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, area and the majority grid int32 [B, h, w] of labels [B, H, W]."""
    if weight is not None:
        check_weight(weight)
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.pool_map(features, labels, n_parts, weight, mean)
    grid = majority_grid(labels, features.shape[2], features.shape[3], n_parts, torch.int32)
    with exact(features.device):
        return (*pool(features, grid, n_parts, weight, mean), grid)


@_part_pool_map.register_fake
def _(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = features.shape
    return (
        features.new_empty(batch, n_parts, channels),
        features.new_empty(batch, n_parts, dtype=accumulation(features.dtype)),
        labels.new_empty(batch, height, width, dtype=torch.int32),
    )


_part_pool_map.register_autograd(_backward, setup_context=_setup)


def _canonical(features: Tensor, labels: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Features as a view [B, D, h, w], labels and weight as [B, h, w]; checks shapes; id maps stay [B, H, W]."""
    check_float("features", features)
    check_integers("labels", labels)
    if weight is not None:
        check_float("weight", weight)
    if features.dim() == 4:
        spatial, other = (features.shape[0], *features.shape[2:]), "an id map [B, H, W] per image"
        is_map = labels.dim() == 3 and labels.shape[0] == features.shape[0]
    elif features.dim() == 3:
        spatial, other, is_map = tuple(features.shape[:2]), "features [B, D, h, w] to pool by id maps", False
        features = features.transpose(1, 2).unsqueeze(3)
    else:
        raise shape_error("features", "[B, D, h, w] or [B, N, D]", features)
    shape = (features.shape[0], *features.shape[2:])
    if not is_map:
        if tuple(labels.shape) != spatial:
            raise shape_error("labels", f"{list(spatial)} (or {other})", labels)
        labels = labels.reshape(shape)
    check_device("labels", labels, features.device)
    if weight is not None:
        if tuple(weight.shape) != spatial:
            raise shape_error("weight", str(list(spatial)), weight)
        check_device("weight", weight, features.device)
        weight = weight.detach().reshape(shape)
    return features, labels, weight


def part_pool(
    features: Tensor,
    labels: Tensor,
    n_parts: int,
    *,
    weight: Tensor | None = None,
    reduce: str = "mean",
    deterministic: bool = True,
    backend: str | None = None,
) -> PartPool:
    r"""Pool the feature vectors of each part of each image into one.

    .. math:: pooled_{bk} = \frac{1}{area_{bk}} \sum_{p: labels_{bp} = k} w_{bp} f_{bp}, \quad
              area_{bk} = \sum_{p: labels_{bp} = k} w_{bp}

    Labels at another resolution than the features, id maps [B, H, W], are first reduced to it by majority, as by
    `labels_to_grid`; gradients and area are those of that grid.

    Features under label -1 (or any other id outside 0..n_parts-1) or weight 0, NaN included, are masked out and affect
    neither result nor gradients; a non-finite feature only affects its own part.
    Sums are float32 (float64 for float64): the error of a mean is about area x 6e-8 times the mean absolute value at
    worst, then one rounding to the dtype of the features. float32, float16, bfloat16 and float64 are taken.

    There are derivatives of every order. Forward mode and the transforms of torch.func take the definition in plain
    PyTorch, one part after the other: memory for a few copies of the features, and for the gradient a mask per part.

    Args:
        features: float [B, D, h, w] or [B, N, D], any strides, read without a copy. Gets a gradient.
        labels: integer [B, h, w] or [B, N], or for features [B, D, h, w] an id map [B, H, W] of any size; in
            0..n_parts-1, or -1 for no part (on a GPU any other id is treated as -1).
        n_parts: K, the number of parts, at least 1.
        weight: float [B, h, w] or [B, N], one per pixel of the features, not negative. Gets no gradient.
        reduce: "mean", or "sum" for the sum without the division.
        deterministic: accepted for symmetry with the other operations; every path sums in a fixed order.
        backend: "triton", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        PartPool(pooled [B, K, D] in the dtype of features, area float32 [B, K]); an empty part has zeros, area 0 and
        gives no gradient. area gets no gradient.

    Raises:
        ValueError: shapes or devices do not fit, n_parts < 1, unknown reduce, or (seen on the CPU, or with
            FGFAST_CHECKS=1) a negative weight or a label that is no part id.
        TypeError: features or weight are not float, or labels not integer.
        RuntimeError: forward mode or torch.func with backend "triton".

    Example:
        >>> import torch
        >>> from fgfast import part_pool
        >>> features = torch.tensor([[[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]]])
        >>> pool = part_pool(features, torch.tensor([[1, 1, -1]]), 2)
        >>> pool.pooled.tolist(), pool.area.tolist()
        ([[[0.0, 0.0], [2.0, 1.0]]], [[0.0, 2.0]])
        >>> ids = torch.tensor([[[0, 0, 1, 1], [0, 1, 1, -1]]])  # two cells of 2 x 2: parts 0 and 1
        >>> part_pool(torch.tensor([[[[5.0, 7.0]]]]), ids, 2).pooled.tolist()
        [[[5.0], [7.0]]]

    Source: mask pooling of DetCon (Henaff et al., ICCV 2021).
    """
    check_n_parts(n_parts)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}: choose 'mean' or 'sum'.")
    x, ids, w = _canonical(features, labels, weight)
    size = (x.shape[2], x.shape[3])
    is_map = tuple(ids.shape[1:]) != size
    check_ids(labels, n_parts)
    chosen = resolve("part_pool", backend, preference("part_pool", x))
    by_definition = needs_definition("part_pool", backend, x, ids, w)
    if by_definition or chosen == "reference":
        if w is not None:
            check_weight(w)
        if is_map:
            to_grid = labels_to_grid if by_definition else reference.labels_to_grid
            ids = to_grid(ids, size, n_parts)
        flat = None if w is None else w.flatten(1)
        return PartPool(*reference.part_pool(x.flatten(2).transpose(1, 2), ids.flatten(1), n_parts, flat, reduce))
    if chosen == "triton":
        check_triton("features", x)
    run = _part_pool_map if is_map else _part_pool
    pooled, area, *_ = run(x, ids, n_parts, w, reduce == "mean", chosen)
    return PartPool(pooled, area.detach().float())
