"""Part pooling: the pixels of one part into one vector, and id maps to feature resolution.

Pooling is a product with the one-hot matrix of the labels, [K, P] x [P, D] an image, over tiles of images and rows: the
features are read once, where they lie, and nothing larger than a tile is written beside the result. One-hot zeros times
NaN are NaN, so a tile whose sums are not finite is done again with its non-finite values selected away.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fgfast.backend import check_triton, preference, resolve
from fgfast.reference import part_pool as reference
from fgfast.tensors import (
    TILE_ELEMENTS,
    accumulation,
    as_size,
    check_device,
    check_float,
    check_ids,
    check_integers,
    check_weight,
    check_whole,
    exact,
)


class PartPool(NamedTuple):
    """What `part_pool` returns: pooled [B, K, D] in the dtype of the features, area float32 [B, K]."""

    pooled: Tensor
    area: Tensor


def _one_hot(labels: Tensor, weight: Tensor | None, n_parts: int, dtype: torch.dtype) -> Tensor:
    """[b, K, P] weights of the pixels of each part; ids outside 0..K-1 and weight 0 stand in no row."""
    hot = labels[:, None] == torch.arange(n_parts, device=labels.device)[:, None]
    return hot.to(dtype) if weight is None else hot * weight[:, None].to(dtype)


def _sums(hot: Tensor, pixels: Tensor) -> Tensor:
    """[b, K, P] x [b, P, D], where a non-finite pixel reaches its own part alone (as NaN)."""
    if hot.device.type == "cpu":
        sums = torch.bmm(hot, pixels)
        if bool(sums.isfinite().all()):
            return sums
    bad = ~pixels.isfinite()
    poison = torch.bmm((hot != 0).to(hot.dtype), bad.to(hot.dtype)) > 0
    return torch.bmm(hot, torch.where(bad, 0, pixels)).masked_fill_(poison, math.nan)


def _tiles(features: Tensor, n_parts: int) -> list[tuple[slice, slice]]:
    """(images, rows) slices of [B, D, h, w]: a tile's one-hot matrix and copy stay near TILE_ELEMENTS elements."""
    batch, channels, height, width = features.shape
    line = max(1, width * max(n_parts, channels))
    rows = min(max(1, TILE_ELEMENTS // line), max(1, height))
    images = max(1, TILE_ELEMENTS // (line * rows)) if rows == height else 1
    return [(slice(b, b + images), slice(y, y + rows)) for b in range(0, batch, images) for y in range(0, height, rows)]


def pool(features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    """The tiled path on [B, D, h, w]: pooled in the dtype of the features, area in the accumulation dtype."""
    batch, channels = features.shape[:2]
    wide = accumulation(features.dtype)
    pooled = features.new_zeros(batch, n_parts, channels, dtype=wide)
    area = features.new_zeros(batch, n_parts, dtype=wide)
    for b, y in _tiles(features, n_parts):
        w = None if weight is None else weight[b, y].flatten(1)
        hot = _one_hot(labels[b, y].flatten(1), w, n_parts, wide)
        pooled[b] += _sums(hot, features[b, :, y].flatten(2).transpose(1, 2).to(wide))
        area[b] += hot.sum(2)
    if mean:
        pooled /= torch.where(area > 0, area, 1)[..., None]
    return pooled.to(features.dtype), area


def _cells(length: int, cells: int, device: torch.device) -> Tensor:
    """[cells, length] float 0/1: which positions each adaptive-pooling cell covers."""
    cell = torch.arange(cells, device=device)[:, None]
    position = torch.arange(length, device=device)
    start, end = cell * length // cells, -((-(cell + 1) * length) // cells)
    return ((position >= start) & (position < end)).float()


def _majority(labels: Tensor, height: int, width: int, n_parts: int, dtype: torch.dtype) -> Tensor:
    """`labels_to_grid` by tiles of images."""
    batch, rows, columns = labels.shape
    grid = torch.empty(batch, height, width, dtype=dtype, device=labels.device)
    if not grid.numel():
        return grid
    down, across = _cells(rows, height, labels.device), _cells(columns, width, labels.device).T
    parts = torch.arange(n_parts, device=labels.device)[:, None, None]
    images = max(1, TILE_ELEMENTS // max(1, n_parts * rows * columns))
    with exact(labels.device):
        for b in range(0, batch, images):
            hot = (labels[b : b + images, None] == parts).float()  # [b, K, H, W]
            votes = down @ (hot @ across)  # [b, K, h, w], whole numbers
            most = votes.amax(1, keepdim=True)
            first = torch.where(votes == most, parts, n_parts).amin(1)
            grid[b : b + images] = torch.where(most[:, 0] > 0, first, -1)
    return grid


@torch.library.custom_op("fgfast::part_pool", mutates_args=())
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


def _empty_grad(grad: Tensor, labels: Tensor, pixel_major: bool) -> Tensor:
    """[B, D, h, w] in the memory order of the features: channels next to each other, or pixels."""
    batch, height, width = labels.shape
    channels = grad.shape[2]
    if pixel_major:
        return grad.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return grad.new_empty(batch, channels, height, width)


@torch.library.custom_op("fgfast::part_pool_backward", mutates_args=())
def part_pool_backward(
    grad: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    area: Tensor,
    mean: bool,
    pixel_major: bool,
    backend: str = "torch",
) -> Tensor:
    out = _empty_grad(grad, labels, pixel_major)
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.pool_backward(grad, labels, weight, area, mean, out)
    _, n_parts, channels = grad.shape
    g = grad.to(area.dtype)
    if mean:
        g = g / torch.where(area > 0, area, 1)[..., None]
    use_product = grad.device.type == "cpu" and not pixel_major and bool(g.isfinite().all())
    with exact(grad.device):
        for b, y in _tiles(out, n_parts):
            ids, tile = labels[b, y].flatten(1), out[b, :, y]
            w = None if weight is None else weight[b, y].flatten(1).to(g.dtype)
            if use_product:
                values = torch.bmm(g[b].transpose(1, 2), _one_hot(ids, w, n_parts, g.dtype))  # [b, D, P]
            else:  # one row of zeros behind the parts stands for every pixel of no part
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
    return _empty_grad(grad, labels, pixel_major)


def is_pixel_major(features: Tensor) -> bool:
    return features.stride(1) == 1 and features.shape[2] * features.shape[3] > 1


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    features, labels, _, weight, ctx.mean, ctx.backend = inputs
    _, area, *grid = output
    ctx.pixel_major = is_pixel_major(features)
    ctx.save_for_backward(*(grid or (labels,)), weight, area)


def _backward(ctx, grad: Tensor, *_: Tensor | None):  # type: ignore[no-untyped-def]
    labels, weight, area = ctx.saved_tensors
    out = part_pool_backward(grad, labels, weight, area, ctx.mean, ctx.pixel_major, ctx.backend)
    return out, None, None, None, None, None


_part_pool.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("fgfast::part_pool_map", mutates_args=())
def _part_pool_map(
    features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool, backend: str = "torch"
) -> tuple[Tensor, Tensor, Tensor]:
    """Pooled, area and the majority grid int32 [B, h, w] of labels [B, H, W]."""
    if weight is not None:
        check_weight(weight)
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.pool_map(features, labels, n_parts, weight, mean)
    grid = _majority(labels, features.shape[2], features.shape[3], n_parts, torch.int32)
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
    """Views of features as [B, D, h, w], of labels and weight as [B, h, w], shapes checked; id maps stay [B, H, W]."""
    check_float("features", features)
    check_integers("labels", labels)
    if weight is not None:
        check_float("weight", weight)
    if features.dim() == 4:
        spatial, other = (features.shape[0], *features.shape[2:]), "give an id map [B, H, W] of each image"
        is_map = labels.dim() == 3 and labels.shape[0] == features.shape[0]
    elif features.dim() == 3:
        spatial, other, is_map = tuple(features.shape[:2]), "give features [B, D, h, w] to pool by id maps", False
        features = features.transpose(1, 2).unsqueeze(3)
    else:
        raise ValueError(f"features has shape {tuple(features.shape)}: give [B, D, h, w] or [B, N, D].")
    shape = (features.shape[0], *features.shape[2:])
    if not is_map:
        if tuple(labels.shape) != spatial:
            raise ValueError(
                f"labels has shape {tuple(labels.shape)} but the features have {spatial} pixels: make them agree, or "
                f"{other}."
            )
        labels = labels.reshape(shape)
    check_device("labels", labels, features.device)
    if weight is not None:
        if tuple(weight.shape) != spatial:
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} but the features have {spatial} pixels: make them agree."
            )
        check_device("weight", weight, features.device)
        weight = weight.detach().reshape(shape)
    return features, labels, weight


def _check_parts(n_parts: int) -> None:
    check_whole("n_parts", n_parts)
    if n_parts < 1:
        raise ValueError(f"n_parts is {n_parts}: give at least 1.")


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

    Labels of another resolution than the features, id maps [B, H, W], are first taken to it by majority, as by
    `labels_to_grid`; gradients and area are those of that grid.

    What stands under label -1 (or any other id outside 0..n_parts-1) or weight 0, NaN included, reaches nothing; a
    non-finite feature of a part reaches that part alone. Sums are float32 (float64 for float64): the error of a mean is
    about area x 6e-8 times the mean absolute value at worst, then one rounding to the dtype of the features.

    Args:
        features: float [B, D, h, w] or [B, N, D], any strides, read where they lie. Gets a gradient.
        labels: integer [B, h, w] or [B, N], or for features [B, D, h, w] an id map [B, H, W] of any size; in
            0..n_parts-1, or -1 for no part (on a GPU any other id is no part too).
        n_parts: K, the number of parts, at least 1.
        weight: float [B, h, w] or [B, N], the pixels of the features, not negative. Gets no gradient.
        reduce: "mean", or "sum" for the sum without the division.
        deterministic: every path sums in a fixed order either way.
        backend: "triton", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        PartPool(pooled [B, K, D] in the dtype of features, area float32 [B, K]); an empty part has zeros, area 0 and
        gives no gradient. area gets no gradient.

    Raises:
        ValueError: shapes or devices do not fit, n_parts < 1, unknown reduce, or (seen on the CPU, or with
            FGFAST_CHECKS=1) a negative weight or a label that is no part id.
        TypeError: features or weight are not float, or labels not integer.

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
    _check_parts(n_parts)
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce is {reduce!r}: choose 'mean' or 'sum'.")
    x, ids, w = _canonical(features, labels, weight)
    size = (x.shape[2], x.shape[3])
    is_map = tuple(ids.shape[1:]) != size
    check_ids(labels, n_parts)
    chosen = resolve("part_pool", backend, preference("part_pool", x))
    if chosen == "reference":
        if w is not None and not torch.compiler.is_compiling():
            check_weight(w)
        ids = reference.labels_to_grid(ids, size, n_parts) if is_map else ids
        flat = None if w is None else w.flatten(1)
        return PartPool(*reference.part_pool(x.flatten(2).transpose(1, 2), ids.flatten(1), n_parts, flat, reduce))
    if chosen == "triton":
        check_triton("features", x)
    run = _part_pool_map if is_map else _part_pool
    pooled, area, *_ = run(x, ids, n_parts, w, reduce == "mean", chosen)
    return PartPool(pooled, area.detach().float())


@torch.library.custom_op("fgfast::labels_to_grid", mutates_args=())
def _labels_to_grid(labels: Tensor, height: int, width: int, n_parts: int, backend: str = "torch") -> Tensor:
    if backend == "triton":
        from fgfast.kernels.part_pool import launch as kernels

        return kernels.labels_to_grid(labels, height, width, n_parts)
    return _majority(labels, height, width, n_parts, torch.int64)


@_labels_to_grid.register_fake
def _(labels: Tensor, height: int, width: int, n_parts: int, backend: str = "torch") -> Tensor:
    return labels.new_empty(labels.shape[0], height, width, dtype=torch.int64)


def labels_to_grid(labels: Tensor, size: int | tuple[int, int], n_parts: int, *, backend: str | None = None) -> Tensor:
    r"""Take id maps to feature resolution: the majority id of each adaptive-pooling cell.

    .. math:: grid_{ij} = \min \arg\max_k |\{p \in cell_{ij} : labels_p = k\}|

    Cell (i, j) covers rows floor(i H / h) to ceil((i + 1) H / h), columns likewise. Not differentiable.

    Args:
        labels: integer [B, H, W] in 0..n_parts-1, or -1, which does not vote (nor, on a GPU, any other id).
        size: (h, w) of the grid, or one number for a square.
        n_parts: K, at least 1.
        backend: "triton", "torch" or "reference"; strict. None follows `use_backend`.

    Returns:
        int64 [B, h, w]: ties go to the lowest id; -1 where nobody voted.

    Raises:
        ValueError: labels are not [B, H, W], or size or n_parts below 1.
        TypeError: labels are not integer.

    Example:
        >>> import torch
        >>> from fgfast import labels_to_grid
        >>> labels_to_grid(torch.tensor([[[1, 1, 0, -1], [2, 1, 0, -1]]]), (1, 2), 3).tolist()
        [[[1, 0]]]

    Source: mask pooling of DetCon (Henaff et al., ICCV 2021): one-hot, average pool, argmax.
    """
    _check_parts(n_parts)
    height, width = as_size(size)
    check_integers("labels", labels)
    if labels.dim() != 3:
        raise ValueError(f"labels has shape {tuple(labels.shape)}: give [B, H, W].")
    check_ids(labels, n_parts)
    chosen = resolve("labels_to_grid", backend, preference("labels_to_grid", labels))
    if chosen == "reference":
        return reference.labels_to_grid(labels, (height, width), n_parts)
    if chosen == "triton":
        check_triton("labels", labels.new_empty(0, dtype=torch.float32))  # the device alone: ids have no float dtype
    return _labels_to_grid(labels, height, width, n_parts, chosen)
