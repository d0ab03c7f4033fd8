"""Feature maps as colours: the foreground, one PCA for all images, and what has no components."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.report.pca import pca_colours
from tests.examples import examples


def planted(seed: int, sign: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps whose object of two halves, on other places of each, differs from the background; and the halves."""
    rng = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(12, 3, generator=rng))[0].T
    halves = torch.full((2, 9, 9), -1)
    halves[0, 2:5, 2:5], halves[0, 5:7, 2:5] = 0, 1
    halves[1, 3:5, 5:8], halves[1, 5:8, 5:8] = 0, 1
    maps = 0.01 * torch.randn(2, 9, 9, 12, generator=rng)
    maps[halves >= 0] += sign * 5 * directions[0]
    for half in (0, 1):
        maps[halves == half] += directions[1 + half]
    return maps.permute(0, 3, 1, 2), halves


@examples(20)
@given(st.integers(0, 2**31), st.sampled_from([1.0, -1.0]))
def test_the_object_is_foreground_and_its_parts_have_the_same_colours_in_every_image(seed: int, sign: float) -> None:
    """Whatever the sign of the features; the background is black."""
    maps, halves = planted(seed, sign)
    colours = pca_colours(maps).permute(0, 2, 3, 1)
    assert (colours[halves < 0] == 0).all()
    assert ((colours[halves >= 0] > 0).float().mean(0) > 0).all()
    first, second = (colours[halves == half][:, 0] for half in (0, 1))
    assert abs(float(first.mean() - second.mean())) > 0.8
    assert max(float(first.max() - first.min()), float(second.max() - second.min())) < 0.3


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (1, 1, 4, 4), (3, 2, 2, 2), (1, 700, 3, 3)])
def test_maps_of_few_cells_or_channels_have_colours(shape: tuple[int, ...]) -> None:
    """There are fewer than three components, and with cells on the border alone no sign."""
    colours = pca_colours(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert colours.shape == (shape[0], 3, *shape[2:])
    assert ((colours >= 0) & (colours <= 1)).all()


def test_equal_features_are_black() -> None:
    """Rounding is not drawn in full colours."""
    assert (pca_colours(torch.full((2, 7, 4, 4), 0.1)) == 0).all()


def test_the_scale_of_the_features_does_not_matter() -> None:
    maps, _ = planted(0)
    torch.testing.assert_close(pca_colours(maps), pca_colours(1e-4 * maps))
