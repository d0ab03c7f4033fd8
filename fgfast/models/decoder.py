"""A decoder from pooled features back to images: the mirror of a residual encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.errors import UserError

SEED = 4  # side of the map that the code is spread on before it takes the encoder's size
GROUPS = 8  # of each normalisation; widths are multiples of it


class Residual(nn.Module):
    """Two 3x3 convolutions with a group norm between, beside a shortcut: maps [B, before, h, w] to [B, after, h, w].

    Example:
        >>> Residual(16, 8)(torch.zeros(2, 16, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.GroupNorm(GROUPS, after),
            nn.ReLU(inplace=True),
            nn.Conv2d(after, after, 3, padding=1),
        )
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output."""
        return F.relu(self.shortcut(x) + self.body(x))


class Decoder(nn.Module):
    """Images from pooled features: linear to a code, its map at the encoder's grid, residual stages, 3x3 to RGB.

    Each stage halves the width and then doubles the side by nearest neighbours, the last one to ``size`` itself, so any
    grid from 1 to ``size`` fits. Norms are over groups of channels of one image: what is decoded depends on its own
    features alone, and two equal vectors give equal images.

    Args:
        dim: width of the features.
        size: side of the images, pixels.
        grid: side of the encoder's last map.
        latent: width of the code.
        width: channels at the grid; 0 takes ``dim``, at most 512.
        depth: residual blocks a stage.

    Raises:
        UserError: the grid is finer than the images.

    Example:
        >>> Decoder(32, size=24, grid=3)(torch.zeros(2, 32)).shape
        torch.Size([2, 3, 24, 24])
    """

    def __init__(self, dim: int, size: int, grid: int, latent: int = 128, width: int = 0, depth: int = 1) -> None:
        super().__init__()
        if not 1 <= grid <= size:
            raise UserError(f"No decoder leads from a map of {grid} x {grid} to views of {size} px: change --size.")
        self.grid = grid
        self.sides = [grid]
        while self.sides[-1] < size:
            self.sides.append(min(2 * self.sides[-1], size))
        widths = [max(16, ((width or min(dim, 512)) >> i) // GROUPS * GROUPS) for i in range(len(self.sides))]
        self.code = nn.Linear(dim, latent)
        self.spread = nn.Linear(latent, widths[0] * SEED**2)
        self.stages = nn.ModuleList(
            nn.Sequential(*(Residual(before if i == 0 else after, after) for i in range(depth)))
            for before, after in zip(widths, widths[1:] or widths, strict=False)
        )
        self.to_rgb = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Images [B, 3, size, size], normalised as the encoder's inputs are, of features [B, dim]."""
        x = self.spread(self.code(features)).unflatten(1, (-1, SEED, SEED))
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.interpolate(x, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        for stage, side in zip(self.stages, self.sides[1:] or self.sides, strict=True):
            x = F.interpolate(stage(x), size=(side, side), mode="nearest")
        return self.to_rgb(x)
