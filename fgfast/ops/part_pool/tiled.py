"""Part pooling and majority grids in plain PyTorch, by tiles: the "torch" backend.

Pooling is a product with the one-hot matrix of the labels, [K, P] x [P, D] per image, over tiles of images and rows:
the features are read once in their own memory layout, and nothing larger than a tile is written besides the result.
A one-hot zero times NaN is NaN, so a tile whose sums are not finite is computed again with non-finite values replaced.
"""

import math

import torch
from torch import Tensor

from fgfast.tensors import TILE_ELEMENTS, accumulation, exact


def one_hot(labels: Tensor, weight: Tensor | None, n_parts: int, dtype: torch.dtype) -> Tensor:
    """Weights of the pixels of each part [b, K, P]; 0 for ids outside 0..K-1."""
    hot = labels[:, None] == torch.arange(n_parts, device=labels.device)[:, None]
    return hot.to(dtype) if weight is None else hot * weight[:, None].to(dtype)


def sum_pixels(hot: Tensor, pixels: Tensor) -> Tensor:
    """[b, K, P] x [b, P, D], where a non-finite pixel makes only its own part NaN."""
    if hot.device.type == "cpu":
        sums = torch.bmm(hot, pixels)
        if bool(sums.isfinite().all()):
            return sums
    bad = ~pixels.isfinite()
    poison = torch.bmm((hot != 0).to(hot.dtype), bad.to(hot.dtype)) > 0
    return torch.bmm(hot, torch.where(bad, 0, pixels)).masked_fill_(poison, math.nan)


def tiles(features: Tensor, n_parts: int) -> list[tuple[slice, slice]]:
    """(images, rows) slices of [B, D, h, w] whose one-hot matrix and copy have about TILE_ELEMENTS elements each."""
    batch, channels, height, width = features.shape
    line = max(1, width * max(n_parts, channels))
    rows = min(max(1, TILE_ELEMENTS // line), max(1, height))
    images = max(1, TILE_ELEMENTS // (line * rows)) if rows == height else 1
    return [(slice(b, b + images), slice(y, y + rows)) for b in range(0, batch, images) for y in range(0, height, rows)]


def pool(features: Tensor, labels: Tensor, n_parts: int, weight: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    """Pool features [B, D, h, w] by tiles: pooled in the dtype of the features, area in the accumulation dtype."""
    batch, channels = features.shape[:2]
    wide = accumulation(features.dtype)
    pooled = features.new_zeros(batch, n_parts, channels, dtype=wide)
    area = features.new_zeros(batch, n_parts, dtype=wide)
    for b, y in tiles(features, n_parts):
        w = None if weight is None else weight[b, y].flatten(1)
        hot = one_hot(labels[b, y].flatten(1), w, n_parts, wide)
        pooled[b] += sum_pixels(hot, features[b, :, y].flatten(2).transpose(1, 2).to(wide))
        area[b] += hot.sum(2)
    if mean:
        pooled /= torch.where(area > 0, area, 1)[..., None]
    return pooled.to(features.dtype), area


def empty_gradient(grad: Tensor, labels: Tensor, pixel_major: bool) -> Tensor:
    """An empty gradient [B, D, h, w] in the memory order of the features: channels last or channels first."""
    batch, height, width = labels.shape
    channels = grad.shape[2]
    if pixel_major:
        return grad.new_empty(batch, height, width, channels).permute(0, 3, 1, 2)
    return grad.new_empty(batch, channels, height, width)


def cell_membership(length: int, cells: int, device: torch.device) -> Tensor:
    """Which positions each adaptive-pooling cell covers, float 0 or 1 [cells, length]."""
    cell = torch.arange(cells, device=device)[:, None]
    position = torch.arange(length, device=device)
    start, end = cell * length // cells, -((-(cell + 1) * length) // cells)
    return ((position >= start) & (position < end)).float()


def majority_grid(labels: Tensor, height: int, width: int, n_parts: int, dtype: torch.dtype) -> Tensor:
    """The majority id of each cell [B, height, width], computed by tiles of images."""
    batch, rows, columns = labels.shape
    grid = torch.empty(batch, height, width, dtype=dtype, device=labels.device)
    if not grid.numel():
        return grid
    down, across = cell_membership(rows, height, labels.device), cell_membership(columns, width, labels.device).T
    parts = torch.arange(n_parts, device=labels.device)[:, None, None]
    images = max(1, TILE_ELEMENTS // max(1, n_parts * rows * columns))
    with exact(labels.device):
        for b in range(0, batch, images):
            hot = (labels[b : b + images, None] == parts).float()  # [b, K, H, W]
            votes = down @ (hot @ across)  # [b, K, h, w], integers
            most = votes.amax(1, keepdim=True)
            first = torch.where(votes == most, parts, n_parts).amin(1)
            grid[b : b + images] = torch.where(most[:, 0] > 0, first, -1)
    return grid
