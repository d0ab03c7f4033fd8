"""Tiles of a puzzle in a plain loop: the definition of ``fgfast.data.tiles.cut_tiles``."""

import torch
from torch import Tensor


def cut_tiles(images: Tensor, grid: int, side: int, source: Tensor, corner: Tensor) -> Tensor:
    """Crops [B * T, C, side, side] of the tiles ``source`` [B, T] of images [B, C, S, S], at ``corner`` [B, T, 2]."""
    size = images.shape[-1]
    tile = size // grid
    border = (size - grid * tile) // 2
    crops = []
    for image, tiles, corners in zip(images, source.tolist(), corner.tolist(), strict=True):
        for t, (down, across) in zip(tiles, corners, strict=True):
            y, x = border + t // grid * tile + down, border + t % grid * tile + across
            crops.append(image[:, y : y + side, x : x + side])
    return torch.stack(crops)
