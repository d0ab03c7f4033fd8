"""Puzzles of a batch, in seconds: one gather for all tiles against a loop over them and against torchvision.

A batch of normalised images is cut into 3 x 3 tiles, each cropped at its own place, permuted, and changed in
brightness. The loop is the definition that the tests use; "torchvision" crops and brightens tile by tile, as the
release does in its loader. All three apply the same draws, and an answer that differs stops the benchmark.
"""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from benchmarks.conftest import Race
from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.data.tiles import brighten, cut_tiles, draw_puzzles
from fgfast.methods.permutations import permutation_set
from fgfast.reference.tiles import cut_tiles as plain

GRID = 3


@pytest.mark.benchmark(group="jigsaw: tiles of a batch")
@pytest.mark.parametrize(("batch", "size", "side"), [(64, 64, 18), (64, 225, 64)])
def test_tiles(race: Race, device: torch.device, batch: int, size: int, side: int) -> None:
    torch.manual_seed(0)
    tile = size // GRID
    border = (size - GRID * tile) // 2
    values = torch.rand(batch, 3, size, size, device=device).to(memory_format=torch.channels_last)
    images = F.normalize(values, list(IMAGENET_MEAN), list(IMAGENET_STD))
    found = draw_puzzles(100, GRID**2, batch, tile - side, (0.5, 1.5), np.random.default_rng(0))
    label, corner, factor = (torch.from_numpy(x).to(device) for x in found)
    source = torch.from_numpy(permutation_set(100, GRID**2)).to(device)[label]

    def ours() -> list[Tensor]:
        tiles = cut_tiles(images, GRID, side, source, corner)
        return [brighten(tiles, factor.flatten(), IMAGENET_MEAN, IMAGENET_STD)]

    def loop() -> list[Tensor]:
        tiles = plain(images, GRID, side, source, corner)
        return [brighten(tiles, factor.flatten(), IMAGENET_MEAN, IMAGENET_STD)]

    def torchvision() -> list[Tensor]:
        crops = []
        for b in range(batch):
            for t, (down, across), f in zip(source[b].tolist(), corner[b].tolist(), factor[b].tolist(), strict=True):
                y, x = border + t // GRID * tile + down, border + t % GRID * tile + across
                crops.append(F.adjust_brightness(F.crop(values[b], y, x, side, side), f))
        return [F.normalize(torch.stack(crops), list(IMAGENET_MEAN), list(IMAGENET_STD))]

    race({"fgfast": ours, "plain loop": loop, "torchvision": torchvision}, reference="plain loop", rounds=9)
