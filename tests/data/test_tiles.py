"""Tiles: the batched gather equals a plain loop, joining is its inverse, brightness equals torchvision's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms.v2 import functional as TF

from fgfast.data.tiles import brighten, cut_tiles, draw_puzzles, join_tiles
from fgfast.reference.tiles import cut_tiles as plain
from tests.examples import examples


@examples(30)
@given(
    batch=st.integers(1, 3),
    grid=st.integers(1, 4),
    side=st.integers(1, 5),
    spare=st.integers(0, 3),
    left=st.integers(0, 3),  # pixels of the image outside all tiles
    channels=st.sampled_from([1, 3]),
    last=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_gather_equals_the_loop(
    batch: int, grid: int, side: int, spare: int, left: int, channels: int, last: bool, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    size = grid * (side + spare) + min(left, grid - 1)
    images = torch.randn(batch, channels, size, size, generator=g)
    images = images.to(memory_format=torch.channels_last) if last else images
    source = torch.randint(grid**2, (batch, grid**2), generator=g)
    corner = torch.randint(spare + 1, (batch, grid**2, 2), generator=g)
    found = cut_tiles(images, grid, side, source, corner)
    assert torch.equal(found, plain(images, grid, side, source, corner))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("grid", [1, 2, 3, 5])
def test_the_inverse_permutation_restores_the_image(grid: int) -> None:
    g = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 4 * grid, 4 * grid, generator=g)
    permutation = torch.rand(4, grid**2, generator=g).argsort(1)
    tiles = cut_tiles(images, grid, 4, permutation, torch.zeros(4, grid**2, 2, dtype=torch.int64))
    assert torch.equal(join_tiles(tiles, grid, permutation.argsort(1)), images)


def test_brightness_is_torchvisions() -> None:
    g = torch.Generator().manual_seed(0)
    values, mean, std = torch.rand(5, 3, 4, 4, generator=g), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    factor = torch.tensor([0.0, 0.5, 1.0, 1.3, 3.0])
    expected = torch.stack([TF.adjust_brightness(v, float(f)) for v, f in zip(values, factor, strict=True)])
    normalised = TF.normalize(values, list(mean), list(std))
    found = brighten(normalised, factor, mean, std)
    torch.testing.assert_close(found, TF.normalize(expected, list(mean), list(std)), rtol=1e-5, atol=1e-5)


def test_draws_cover_their_ranges() -> None:
    label, corner, factor = draw_puzzles(7, 9, 400, 2, (0.5, 1.5), np.random.default_rng(0))
    assert set(label.tolist()) == set(range(7))
    assert set(corner.flatten().tolist()) == {0, 1, 2}
    assert corner.shape == (400, 9, 2)
    assert 0.5 <= factor.min() < 0.51
    assert 1.49 < factor.max() <= 1.5


@pytest.mark.parametrize(
    ("shape", "grid", "side", "match"),
    [((2, 3, 8, 9), 2, 3, "images: "), ((2, 3, 8, 8), 2, 5, "crops of 1 to 4"), ((1, 3, 8, 8), 2, 3, "source: ")],
)
def test_wrong_shapes_are_named(shape: tuple[int, ...], grid: int, side: int, match: str) -> None:
    source, corner = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=match):
        cut_tiles(torch.zeros(shape), grid, side, source, corner)
