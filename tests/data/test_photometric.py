"""Colour changes: equal to torchvision's where it has them, with the specified probabilities and ranges."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.data.photometric import photometric
from fgfast.data.sampling import Draw, draw_crop, generator
from fgfast.data.transforms import Gamma
from fgfast.data.views import Crop

tv = pytest.importorskip("torchvision.transforms.v2.functional")

RAW = ((0.0, 0.0, 0.0), (1 / 255, 1 / 255, 1 / 255))


def pixels(batch: int = 3, size: int = 17) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(60, 180, (batch, size, size, 3), generator=generator, dtype=torch.uint8)


def draw(batch: int = 3, colour: tuple = (1, 1, 1, 0), sigma: float = 0, solarize: bool = False) -> Draw:
    return Draw(
        window=np.zeros((batch, 4), np.int32),
        flip=np.zeros(batch, bool),
        colour=np.tile(np.array(colour, np.float32), (batch, 1)),
        sigma=np.full(batch, sigma, np.float32),
        solarize=np.full(batch, solarize),
    )


def test_without_changes_it_only_normalises() -> None:
    x = pixels()
    got = photometric(x, None, IMAGENET_MEAN, IMAGENET_STD)
    truth = tv.normalize(x.permute(0, 3, 1, 2) / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert torch.allclose(got, truth, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("colour", "truth"),
    [
        ((1.3, 1, 1, 0), lambda x: tv.adjust_brightness(x, 1.3)),
        ((1, 0.6, 1, 0), lambda x: tv.adjust_contrast(x, 0.6)),
        ((1, 1, 1.2, 0), lambda x: tv.adjust_saturation(x, 1.2)),
        ((1, 1, 0, 0), lambda x: tv.rgb_to_grayscale(x, 3)),
        (
            (1.1, 0.8, 0.7, 0),
            lambda x: tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(x, 1.1), 0.8), 0.7),
        ),
    ],
)
def test_colours_are_those_of_torchvision(colour: tuple, truth) -> None:
    x = pixels()
    expected = truth(x.permute(0, 3, 1, 2).float() / 255) * 255
    assert torch.allclose(photometric(x, draw(colour=colour), *RAW), expected, atol=0.2)


def test_hue_keeps_grey_and_brightness_and_half_a_turn_inverts_the_chroma() -> None:
    grey = torch.full((1, 4, 4, 3), 100, dtype=torch.uint8)
    assert torch.allclose(photometric(grey, draw(1, (1, 1, 1, 0.3)), *RAW), torch.tensor(100.0), atol=1e-3)
    x = torch.randint(110, 140, (1, 4, 4, 3), dtype=torch.uint8)
    turned = photometric(x, draw(1, (1, 1, 1, 0.5)), *RAW)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    raw = x.permute(0, 3, 1, 2).float()
    assert torch.allclose((turned * weights).sum(1), (raw * weights).sum(1), atol=1e-2)
    assert torch.allclose(turned + raw, 2 * (raw * weights).sum(1, keepdim=True).expand(-1, 3, -1, -1), atol=0.02)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_blur_is_that_of_torchvision(sigma: float) -> None:
    x = pixels(size=24)
    radius = int(np.ceil(3 * sigma))
    expected = tv.gaussian_blur(x.permute(0, 3, 1, 2).float(), [2 * radius + 1] * 2, [sigma, sigma])
    assert torch.allclose(photometric(x, draw(sigma=sigma), *RAW), expected, atol=0.05)


def test_solarise_inverts_from_128_up() -> None:
    x = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    got = photometric(x, draw(1, solarize=True), *RAW)
    values = torch.arange(256.0)
    assert torch.allclose(got[0, 0].flatten(), torch.where(values >= 128, 255 - values, values), atol=1e-4)


def test_gamma_is_that_of_torchvision_and_precedes_the_colour_jitter() -> None:
    x = torch.arange(256, dtype=torch.uint8).repeat_interleave(3).reshape(1, 16, 16, 3).repeat(4, 1, 1, 1)
    gamma = np.array([0.5, 1.0, 1.7, 2.5], np.float32)
    raw = x.permute(0, 3, 1, 2).float() / 255
    expected = torch.stack([tv.adjust_gamma(view, float(g)) for view, g in zip(raw, gamma, strict=True)])
    assert torch.allclose(photometric(x, replace(draw(4), gamma=gamma), *RAW), expected * 255, atol=1e-3)
    dark = photometric(x, replace(draw(4, (0.5, 1, 1, 0)), gamma=gamma), *RAW)
    assert torch.allclose(dark, expected * 127.5, atol=1e-3)


def test_each_image_gets_its_own_changes() -> None:
    x = pixels(100)  # more than one chunk of the loop over images
    crop = Crop(size=17, blur=0.5, solarize=0.3, grayscale=0.3, transforms=(Gamma((0.5, 2.5)),))
    many = draw_crop(crop, np.full((100, 2), 50), generator(0, 0, 0, 0))
    together = photometric(x, many, *RAW)
    for i in (0, 37, 99):
        assert torch.allclose(
            photometric(x[i : i + 1], many.rows(slice(i, i + 1)), *RAW), together[i : i + 1], atol=1e-3
        )


def test_an_empty_batch_is_accepted() -> None:
    assert photometric(torch.zeros(0, 8, 8, 3, dtype=torch.uint8), None, *RAW).shape == (0, 3, 8, 8)


def test_changes_have_the_specified_probabilities() -> None:
    crop = Crop(flip=0.3, jitter_p=0.8, grayscale=0.2, blur=0.1, solarize=0.25)
    n = 20000
    many = draw_crop(crop, np.full((n, 2), (90, 120)), generator(1, 0, 0, 0))
    jittered = (many.colour[:, 0] != 1).mean()
    frequencies = [
        many.flip.mean(),
        jittered,
        (many.colour[:, 2] == 0).mean(),
        (many.sigma > 0).mean(),
        many.solarize.mean(),
    ]
    assert np.allclose(frequencies, [0.3, 0.8, 0.2, 0.1, 0.25], atol=0.015)
    colour = many.colour[(many.colour[:, 0] != 1) & (many.colour[:, 2] > 0)]
    assert np.allclose(colour.min(0), [0.6, 0.6, 0.8, -0.1], atol=0.01)
    assert np.allclose(colour.max(0), [1.4, 1.4, 1.2, 0.1], atol=0.01)
    blurred = many.sigma[many.sigma > 0]
    assert blurred.min() > 0.1
    assert blurred.max() < 2.0
    assert abs(blurred.mean() - 1.05) < 0.05


def test_windows_have_the_specified_area_and_ratio() -> None:
    sizes = np.random.default_rng(0).integers(40, 300, (5000, 2))
    window = draw_crop(Crop(scale=(0.2, 0.6)), sizes, generator(0, 0, 0, 0)).window
    y, x, h, w = window.T
    assert ((y >= 0) & (x >= 0) & (h >= 1) & (w >= 1) & (y + h <= sizes[:, 0]) & (x + w <= sizes[:, 1])).all()
    usual = (sizes[:, 0] < 1.5 * sizes[:, 1]) & (sizes[:, 1] < 1.5 * sizes[:, 0])
    area, ratio = (h * w / sizes.prod(1))[usual], (w / h)[usual]
    assert area.min() > 0.18
    assert area.max() < 0.63
    assert ratio.min() > 0.7
    assert ratio.max() < 1.4


def test_an_image_too_narrow_for_any_window_is_cropped_at_its_centre() -> None:
    window = draw_crop(Crop(scale=(1.0, 1.0)), np.array([[10, 100], [100, 10], [1, 1]]), generator(0, 0, 0, 0)).window
    assert window.tolist() == [[0, 43, 10, 13], [43, 0, 13, 10], [0, 0, 1, 1]]
