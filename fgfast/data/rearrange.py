"""Transforms that move or erase pixels, for a batch of views at once: swapped patches, blocks, holes, a pasted region.

Each is an index into the pixels of the full batch, computed on the device from the few numbers that were drawn on the
host. Id maps go through the same index, and both loaders share the code. DALI has operators for two of them,
``fn.erase`` (holes) and ``fn.multi_paste`` (blocks of equal size): fed with rectangles per image they take three to
five times the CPU time of an index for all images on views of 64 pixels, and about the same on 224.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fgfast.data.photometric import chunks, upload
from fgfast.data.sampling import Draw

BLACK, WHITE, ABSENT = 0, 255, -1
_CHUNK_BYTES = 2**20


def rearrange(pixels: Tensor, draw: Draw, labels: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Apply the patches, blocks, holes and paste of ``draw``, in this order, to B views and their id maps.

    Args:
        pixels: uint8 [B, S, S, 3]; not modified.
        draw: the random numbers of each view.
        labels: id maps, a signed integer type [B, S, S]; not modified. The result is -1 in holes and around a pasted
            region.

    Returns:
        New pixels and labels of the same shapes and types; the arguments themselves if ``draw`` has no such change.

    Example:
        >>> from dataclasses import replace
        >>> from fgfast.data.sampling import draw_crop, generator
        >>> from fgfast.data.transforms import BlockShuffle
        >>> from fgfast.data.views import Crop
        >>> view = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4, 1).expand(-1, -1, -1, 3)
        >>> draw = draw_crop(Crop(size=4, transforms=(BlockShuffle(2),)), np.array([[9, 9]]), generator(0, 0, 0, 0))
        >>> draw = replace(draw, blocks=np.array([[[2, 0], [3, 1]]]))
        >>> rearrange(view, draw)[0][0, :, :, 0].tolist()
        [[8, 9, 0, 1], [12, 13, 4, 5], [10, 11, 2, 3], [14, 15, 6, 7]]
    """
    if draw.patches is draw.blocks is draw.holes is draw.paste is None or not len(pixels):
        return pixels, labels
    parts = [
        _rearrange(pixels[rows], draw.rows(rows), None if labels is None else labels[rows])
        for rows in chunks(pixels, _CHUNK_BYTES)
    ]
    return torch.cat([part[0] for part in parts]), None if labels is None else torch.cat([part[1] for part in parts])


def _rearrange(pixels: Tensor, draw: Draw, labels: Tensor | None) -> list[Tensor]:
    batch, size = pixels.shape[:2]
    layers = [pixels.clone(memory_format=torch.contiguous_format).view(batch * size**2, -1)]  # [B S S, 3]
    if labels is not None:
        layers.append(labels.clone(memory_format=torch.contiguous_format).view(batch * size**2, 1))
    if draw.patches is not None:
        cells = _square_indices(draw.patches, size, pixels.device).view(batch, 2, -1)
        for x in layers:
            x.index_copy_(0, cells.flatten(), x.index_select(0, cells.flip(1).flatten()))
    if draw.blocks is not None:
        blocks = upload(draw.blocks, pixels.device)
        layers = [_permute_blocks(x, blocks, size) for x in layers]
    if draw.holes is not None:
        cells = _square_indices(draw.holes, size, pixels.device).flatten()
        for x, fill in zip(layers, (BLACK, ABSENT), strict=False):
            x.index_fill_(0, cells, fill)
    if draw.paste is not None:
        layers = _paste_on_white(layers, draw.paste, size)
    return [layers[0].view(pixels.shape), *(x.view(batch, size, size) for x in layers[1:])]


def _rectangle_indices(image: Tensor, corner: Tensor, extent: Tensor, most: int, size: int) -> Tensor:
    """Indices of the pixels of R rectangles in a flattened batch, [R, most^2]; the last row and column repeat.

    ``image`` [R], ``corner`` and ``extent`` (y, x) [R, 2]; ``most`` is the longest side, known on the host.
    """
    step = torch.arange(most, device=corner.device)
    inside = corner[:, :, None] + torch.minimum(step, extent[:, :, None] - 1)  # [R, 2, most]
    rows = image[:, None] * size + inside[:, 0]
    return (rows[:, :, None] * size + inside[:, 1, None, :]).flatten(1)


def _square_indices(squares: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Indices of the pixels of every square (y, x, side) [B, N, 3] with side > 0."""
    image, which = np.nonzero(squares[..., 2])
    rows = np.concatenate([image[:, None], squares[image, which]], 1)  # (image, y, x, side)
    on_device = upload(rows, device)
    most = int(rows[:, 3].max(initial=1))
    return _rectangle_indices(on_device[:, 0], on_device[:, 1:3], on_device[:, 3:], most, size)


def _permute_blocks(x: Tensor, blocks: Tensor, size: int) -> Tensor:
    """Replace each block of the grid by the one that moves to its place.

    If the grid divides the size, rows of a block are moved instead of pixels.
    """
    batch, n = blocks.shape[:2]
    run = size // n if size % n == 0 else 1
    edges = np.arange(n + 1) * size // n
    place = upload(np.repeat(np.arange(n), np.diff(edges)), x.device)  # [S], the block of each row of pixels
    edge = upload(edges, x.device)
    length = edge.diff()
    inside = torch.arange(size, device=x.device) - edge[place]
    down, across = blocks // n, blocks % n  # [B, n, n]
    most = length[down].index_select(1, place) - 1
    rows = edge[down].index_select(1, place) + torch.minimum(inside[:, None], most)  # [B, S, n]
    left = edge[across] // run
    if run > 1:
        columns, at = left, torch.arange(n, device=x.device)  # [B, n, n], in runs
    else:
        most = length[across].index_select(2, place) - 1
        columns, at = left.index_select(2, place) + torch.minimum(inside, most), place  # [B, n, S]
    rows += size * torch.arange(batch, device=x.device)[:, None, None]
    cells = rows.index_select(2, at) * (size // run) + columns.index_select(1, place)  # [B, S, S / run]
    return x.view(-1, run * x.shape[1]).index_select(0, cells.flatten()).view_as(x)


def _paste_on_white(layers: list[Tensor], paste: np.ndarray, size: int) -> list[Tensor]:
    """A region around the centre of the edges, at the centre of an otherwise white view."""
    device = layers[0].device
    extent, most = upload(paste, device), int(paste.max())
    image = torch.arange(len(paste), device=device)
    corner = (_centre_of_edges(layers[0].view(len(paste), size, size, -1)) - extent // 2).clamp_(min=0)
    source = _rectangle_indices(image, torch.minimum(corner, size - extent), extent, most, size).flatten()
    target = _rectangle_indices(image, (size - extent) // 2, extent, most, size).flatten()
    pasted = []
    for x, fill in zip(layers, (WHITE, ABSENT), strict=False):
        pasted.append(torch.full_like(x, fill))
        pasted[-1].index_copy_(0, target, x.index_select(0, source))
    return pasted


def _centre_of_edges(pixels: Tensor) -> Tensor:
    """Mean position (y, x), weighted by the absolute differences between neighbouring pixels, int64 [B, 2].

    Integer arithmetic throughout: the result is the same on every device.
    """
    size = pixels.shape[1]
    light = pixels.sum(3, dtype=torch.int32)
    steps = torch.zeros_like(light)
    steps[:, 1:] += light.diff(dim=1).abs_()
    steps[:, :, 1:] += light.diff(dim=2).abs_()
    along = torch.stack([steps.sum(2), steps.sum(1)], 1)  # int64 [B, 2, S]
    total = along.sum(2)
    mean = (along * torch.arange(size, device=pixels.device)).sum(2) // total.clamp(min=1)
    return torch.where(total > 0, mean, size // 2)
