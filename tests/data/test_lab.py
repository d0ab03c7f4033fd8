"""Lab equals scikit-image's, converts back, and its lightness gives grey images."""

import numpy as np
import pytest
import torch

from fgfast.data.lab import lab_to_rgb, lightness, rgb_to_lab, to_grey
from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD

color = pytest.importorskip("skimage.color")


@pytest.fixture(scope="module")
def rgb() -> torch.Tensor:
    """The corners of the RGB cube, dark values around the linear part of sRGB, and random values, [3, 40, 64]."""
    rng = np.random.default_rng(0)
    corners = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), -1).reshape(-1, 3)
    values = np.concatenate([corners, rng.random((1000, 3)) * 0.05, rng.random((1552, 3))])
    return torch.from_numpy(values.astype(np.float32)).T.reshape(3, 40, 64)


def channels_last(x: torch.Tensor) -> np.ndarray:
    return x.movedim(-3, -1).numpy()


def test_lab_is_that_of_scikit_image(rgb: torch.Tensor) -> None:
    expected = color.rgb2lab(channels_last(rgb.double()))
    # scikit-image rounds the constants of the linear part near black to four digits
    np.testing.assert_allclose(channels_last(rgb_to_lab(rgb.double())), expected, atol=2e-4)
    np.testing.assert_allclose(channels_last(rgb_to_lab(rgb)), expected, atol=1e-3)


def test_rgb_is_that_of_scikit_image(rgb: torch.Tensor) -> None:
    """Colours outside the gamut of sRGB are clamped."""
    g = torch.Generator().manual_seed(0)
    scale = torch.tensor([100.0, 160.0, 160.0]).view(3, 1, 1)
    lab = torch.rand(3, 40, 64, generator=g) * scale - torch.tensor([0.0, 80.0, 80.0]).view(3, 1, 1)
    with np.testing.suppress_warnings() as quiet:
        quiet.filter(UserWarning)
        expected = color.lab2rgb(channels_last(lab.double()))
    # scikit-image also clamps z < 0 before the conversion, which changes colours outside the gamut
    in_gamut = (expected > 0).all(-1) & (expected < 1).all(-1)
    assert in_gamut.mean() > 0.2
    np.testing.assert_allclose(channels_last(lab_to_rgb(lab))[in_gamut], expected[in_gamut], atol=1e-3)
    assert lab_to_rgb(lab).min() >= 0
    assert lab_to_rgb(lab).max() <= 1


def test_the_round_trip_is_the_identity(rgb: torch.Tensor) -> None:
    torch.testing.assert_close(lab_to_rgb(rgb_to_lab(rgb[None])), rgb[None], atol=1e-4, rtol=0)


def test_autocast_does_not_change_the_conversion_of_a_batch(rgb: torch.Tensor) -> None:
    batch = torch.stack([rgb, rgb.flip(-1)])
    with torch.autocast("cpu", torch.bfloat16):
        found = rgb_to_lab(batch)
    assert torch.equal(found[1], rgb_to_lab(rgb).flip(-1))


def test_grey_images_keep_the_lightness(rgb: torch.Tensor) -> None:
    torch.testing.assert_close(lightness(rgb), rgb_to_lab(rgb)[:1])
    shift, scale = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    grey = to_grey((rgb - shift) / scale) * scale + shift
    torch.testing.assert_close(grey, lightness(rgb).expand(3, -1, -1) / 100, atol=1e-5, rtol=0)
