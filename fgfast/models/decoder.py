"""A decoder from pooled features back to images: the mirror of a residual encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.errors import UserError

START_SIDE = 4  # side of the map that the code is projected to, before it is resized to the encoder's grid
GROUPS = 8  # groups of each group norm; widths are multiples of it


class DecoderBlock(nn.Module):
    """Two 3x3 convolutions with a group norm between them, and a shortcut: [B, before, h, w] to [B, after, h, w].

    Example:
        >>> DecoderBlock(16, 8)(torch.zeros(2, 16, 4, 4)).shape
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
        """Map [B, before, h, w] to [B, after, h, w]."""
        return F.relu(self.shortcut(x) + self.body(x))


class Decoder(nn.Module):
    """Images from pooled features: linear to a code, a map on the encoder's grid, residual stages, 3x3 to RGB.

    Each stage halves the width and then doubles the side by nearest neighbour, the last one to ``size``: any grid from
    1 to ``size`` works. Norms are over groups of channels of one image: a decoded image depends only on its own
    features, and equal vectors give equal images.

    Args:
        dim: width of the features.
        size: side of the images in pixels.
        grid: side of the encoder's final feature map.
        latent: width of the code.
        width: channels at the grid; 0 takes ``dim``, at most 512.
        depth: residual blocks per stage.

    Raises:
        UserError: the grid is larger than the images.

    Example:
        >>> Decoder(32, size=24, grid=3)(torch.zeros(2, 32)).shape
        torch.Size([2, 3, 24, 24])
    """

    def __init__(self, dim: int, size: int, grid: int, latent: int = 128, width: int = 0, depth: int = 1) -> None:
        super().__init__()
        if not 1 <= grid <= size:
            raise UserError(f"A map of {grid} x {grid} cannot be decoded to views of {size} px: give a larger --size.")
        self.grid = grid
        self.sides = [grid]
        while self.sides[-1] < size:
            self.sides.append(min(2 * self.sides[-1], size))
        widths = [max(16, ((width or min(dim, 512)) >> i) // GROUPS * GROUPS) for i in range(len(self.sides))]
        self.code = nn.Linear(dim, latent)
        self.spread = nn.Linear(latent, widths[0] * START_SIDE**2)
        self.stages = nn.ModuleList(
            nn.Sequential(*(DecoderBlock(before if i == 0 else after, after) for i in range(depth)))
            for before, after in zip(widths, widths[1:] or widths, strict=False)
        )
        self.to_rgb = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """Images [B, 3, size, size], normalised like the encoder's inputs, from features [B, dim]."""
        x = self.spread(self.code(features)).unflatten(1, (-1, START_SIDE, START_SIDE))
        x = x.contiguous(memory_format=torch.channels_last)
        x = F.interpolate(x, size=(self.grid, self.grid), mode="bilinear", align_corners=False)
        for stage, side in zip(self.stages, self.sides[1:] or self.sides, strict=True):
            x = F.interpolate(stage(x), size=(side, side), mode="nearest")
        return self.to_rgb(x)
