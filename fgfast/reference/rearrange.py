"""The definition of rearranged views: swapped patches, permuted blocks, holes and pasted regions, in plain loops."""

from collections.abc import Sequence

import torch
from torch import Tensor

Rectangle = Sequence[int]  # (y, x, side)


def rearrange(
    layers: Sequence[Tensor],
    fills: Sequence[tuple[int, int]],
    *,
    patches: Sequence[Rectangle] | None = None,
    blocks: Tensor | None = None,
    holes: Sequence[Rectangle] | None = None,
    paste: tuple[int, int] | None = None,
) -> list[Tensor]:
    """Swap two patches, permute blocks, make holes and paste a region at the centre, in this order.

    Args:
        layers: tensors that change together, each [S, S, ...]; the first is the image [S, S, C], whose edges place the
            region.
        fills: the values of a hole and around the pasted region, for each layer.
        patches: (y, x, side) of two.
        blocks: number of the block, row by row, that comes to each place of an n x n grid, [n, n].
        holes: (y, x, side) of any number; side 0 is none.
        paste: (h, w) of the region.

    Returns:
        New layers.

    Example:
        >>> image = torch.arange(4).reshape(2, 2, 1)
        >>> rearrange([image], [(0, 255)], blocks=torch.tensor([[3, 0], [1, 2]]))[0][:, :, 0].tolist()
        [[3, 0], [1, 2]]
    """
    size = len(layers[0])
    layers = [x.clone() for x in layers]
    if patches is not None:
        (y, x, side), (v, u, _) = patches
        for layer in layers:
            first = layer[y : y + side, x : x + side].clone()
            layer[y : y + side, x : x + side] = layer[v : v + side, u : u + side]
            layer[v : v + side, u : u + side] = first
    if blocks is not None:
        edges = [i * size // len(blocks) for i in range(len(blocks) + 1)]
        layers = [_permute_blocks(layer, blocks, edges) for layer in layers]
    for y, x, side in holes or []:
        for layer, (hole, _) in zip(layers, fills, strict=True):
            layer[y : y + side, x : x + side] = hole
    if paste is not None:
        centre = edge_centre(layers[0])
        (y, h), (x, w) = ((min(max(c - n // 2, 0), size - n), n) for c, n in zip(centre, paste, strict=True))
        v, u = (size - h) // 2, (size - w) // 2
        for i, (layer, (_, around)) in enumerate(zip(layers, fills, strict=True)):
            layers[i] = torch.full_like(layer, around)
            layers[i][v : v + h, u : u + w] = layer[y : y + h, x : x + w]
    return layers


def _permute_blocks(layer: Tensor, blocks: Tensor, edges: list[int]) -> Tensor:
    """Move every block to its place; a block one pixel too long is cropped, one too short repeats its last pixel."""
    out, n = torch.empty_like(layer), len(blocks)
    for place in range(n * n):
        (i, j), (k, m) = divmod(place, n), divmod(int(blocks.flatten()[place]), n)
        rows, columns = range(edges[i], edges[i + 1]), range(edges[j], edges[j + 1])
        block = layer[edges[k] : edges[k + 1], edges[m] : edges[m + 1]]
        down = [min(t, block.shape[0] - 1) for t in range(len(rows))]
        across = [min(t, block.shape[1] - 1) for t in range(len(columns))]
        out[rows.start : rows.stop, columns.start : columns.stop] = block[down][:, across]
    return out


def edge_centre(image: Tensor) -> tuple[int, int]:
    """Mean position (y, x) of the edges, weighted by their strength.

    Edges are the differences |x[i] - x[i - 1]| of the summed channels along both axes. Rounded down; the middle if the
    image is constant.

    Example:
        >>> image = torch.zeros(8, 8, 3, dtype=torch.uint8)
        >>> image[5, 2] = 9
        >>> edge_centre(image)  # the differences are at (5, 2) twice, (6, 2) and (5, 3)
        (5, 2)
    """
    light = image.long().sum(2)
    steps = torch.zeros_like(light)
    steps[1:] += (light[1:] - light[:-1]).abs()
    steps[:, 1:] += (light[:, 1:] - light[:, :-1]).abs()
    if not steps.any():
        return len(image) // 2, len(image) // 2
    place = torch.arange(len(image))
    y, x = (int((steps.sum(axis) * place).sum() // steps.sum()) for axis in (1, 0))
    return y, x
