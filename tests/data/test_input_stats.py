"""Input statistics: loaders and augmentations follow them, and both loaders resize bicubically as PIL does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.data.lab import to_grey
from fgfast.data.layouts import ImageSet, open_images
from fgfast.data.normalise import IMAGENET, InputStats, denormalise, normalise
from fgfast.data.panels import overlay, to_uint8
from fgfast.data.tiles import brighten
from fgfast.data.transforms import BlockShuffle, Gamma, Holes, PasteOnWhite, PatchSwap
from fgfast.data.views import Crop, ViewSpec
from tests.data.loading import RAW, VARIANTS, loading

HALF = InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
UNEVEN = InputStats((0.1, 0.5, 0.9), (0.2, 0.4, 1.5), "bicubic")


def test_normalisation_is_that_of_the_statistics() -> None:
    x = torch.rand(2, 3, 4, 5)
    expected = torch.stack([(x[:, c] - UNEVEN.mean[c]) / UNEVEN.std[c] for c in range(3)], 1)
    torch.testing.assert_close(normalise(x, UNEVEN), expected)
    torch.testing.assert_close(denormalise(normalise(x, UNEVEN), UNEVEN), x)


@pytest.mark.parametrize(
    ("stats", "message"),
    [
        (((0.5, 0.5), (1, 1, 1), "bicubic"), "mean is"),
        (((0.5, 0.5, "x"), (1, 1, 1), "bicubic"), "mean is"),
        (((0.5, 0.5, 1.1), (1, 1, 1), "bicubic"), "mean is"),
        (((0.5, float("nan"), 1), (1, 1, 1), "bicubic"), "mean is"),
        (((0.5, 0.5, 1), (1, 1, 0), "bicubic"), "std is"),
        (((0.5, 0.5, 1), (1, 1, -1), "bicubic"), "std is"),
        (((0.5, 0.5, 1), (1, 1, float("inf")), "bicubic"), "std is"),
        (((0.5, 0.5, 1), (1, 1), "bicubic"), "std is"),
        (((0.5, 0.5, 1), (1, 1, 1), "lanczos"), "interpolation is 'lanczos': choose one of bilinear, bicubic"),
    ],
)
def test_impossible_statistics_are_refused_by_name(stats: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputStats(*stats).check()
    with pytest.raises(ValueError, match=f"ViewSpec.{message}"):
        ViewSpec(whole=8).with_stats(InputStats(*stats))
    with pytest.raises(ValueError, match=message):
        normalise(torch.zeros(3, 2, 2), InputStats(*stats))


def test_brightness_refuses_statistics_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"mean and std have 2 and 3 numbers: give 3, one per channel"):
        brighten(torch.zeros(1, 3, 2, 2), torch.ones(1), (0.5, 0.5), (1.0, 1.0, 1.0))


EVERYTHING = Crop(
    size=24, jitter_p=1.0, grayscale=0.3, blur=0.5, solarize=0.5,
    transforms=(Gamma((0.5, 2.0)), Holes((1, 4), (0.1, 0.3)), PatchSwap(0.3), BlockShuffle(4)),
)  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("crop", [EVERYTHING, Crop(size=24, transforms=(PasteOnWhite((0.5, 0.9)),))])
@pytest.mark.parametrize("stats", [IMAGENET, HALF, UNEVEN])
def test_views_are_the_unnormalised_ones_normalised(
    smooth_set: ImageSet, variant: str, crop: Crop, stats: InputStats
) -> None:
    """Every augmentation, holes, white and solarise among them, gives the same pixels under any statistics."""
    raw = ViewSpec(crops=(crop,), whole=16, **RAW, interpolation=stats.interpolation)
    with loading(smooth_set, raw, 25, variant) as plain, loading(smooth_set, raw.with_stats(stats), 25, variant) as one:
        a, b = next(iter(plain)), next(iter(one))
    assert a.whole is not None
    assert b.whole is not None
    for pixels, view in ((a.views[0], b.views[0]), (a.whole, b.whole)):
        # float32: values of at most 5 with a rounding of 255 x 2^-24 / (255 x 0.2) on each side
        torch.testing.assert_close(view, normalise(pixels / 255, stats), rtol=1e-5, atol=1e-5)


def test_grey_and_brightness_are_those_of_unnormalised_images() -> None:
    g = torch.Generator().manual_seed(0)
    x, factor = torch.rand(4, 3, 6, 6, generator=g), torch.tensor([0.5, 0.9, 1.3, 2.0])
    for stats in (IMAGENET, HALF, UNEVEN):
        images = normalise(x, stats)
        torch.testing.assert_close(denormalise(to_grey(images, stats), stats), denormalise(to_grey(normalise(x))))
        bright = brighten(images.clone(), factor, stats.mean, stats.std)
        expected = (x * factor.view(-1, 1, 1, 1)).clamp(0, 1)
        torch.testing.assert_close(denormalise(bright, stats), expected, rtol=1e-5, atol=1e-5)


def test_figures_show_the_pixels_under_any_statistics() -> None:
    pixels = torch.randint(0, 256, (3, 6, 6), generator=torch.Generator().manual_seed(0)).byte()
    labels = np.array([[0, -1], [1, 0]])
    for stats in (IMAGENET, HALF, UNEVEN):
        image = normalise(pixels / 255, stats)
        assert np.array_equal(to_uint8(image, stats), pixels.permute(1, 2, 0).numpy())
        assert np.array_equal(overlay(image, labels, stats=stats), overlay(pixels, labels))


def keys(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic kernel."""
    x = np.abs(x)
    near, far = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def resized(pixels: np.ndarray, size: int, a: float) -> np.ndarray:
    """The definition: both axes by the kernel, widened where the image shrinks, its weights scaled to the sum 1."""
    matrices = []
    for n in pixels.shape[:2]:
        scale = n / size
        centre = (np.arange(size) + 0.5) * scale
        weight = keys((np.arange(n) + 0.5 - centre[:, None]) / max(1, scale), a)
        matrices.append(weight / weight.sum(1, keepdims=True))
    return np.einsum("ih,jw,hwc->ijc", *matrices, pixels.astype(np.float64))


@pytest.fixture
def noise_set(tmp_path: Path) -> ImageSet:
    """Noise of 90 to 165, which no overshoot of the kernel takes out of range, in three shapes."""
    rng = np.random.default_rng(0)
    for i, shape in enumerate([(40, 40), (64, 48), (97, 131)]):
        path = tmp_path / "noise" / "a" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(90, 166, (*shape, 3), dtype=np.uint8)).save(path)
    return open_images(tmp_path / "noise")


INSIDE = slice(5, -5)  # beside the border DALI repeats pixels, PIL and torch leave them out: as for bilinear


@pytest.mark.parametrize("variant", ["dali_files", "torchvision"])
def test_bicubic_is_the_kernel_with_one_half(noise_set: ImageSet, variant: str) -> None:
    """Within the rounding to 8 bits, once or after each axis; the kernel of -0.75 is further away.

    DALI rounds once, 0.5, and reads the kernel from a table: 0.05. The first rounding of torchvision, 0.5, is
    multiplied by the sum of the absolute weights of the second axis, at most 1.25 (at the middle between two pixels,
    2 x 0.5625 + 2 x 0.0625), and its weights have 8 to 15 bits: 0.3 for 255.
    """
    most = {"dali_files": 0.5 + 0.05, "torchvision": 0.5 + 0.5 * 1.25 + 0.3}[variant]
    spec = ViewSpec(whole=50, **RAW, interpolation="bicubic")
    with loading(noise_set, spec, 3, variant, shuffle=False) as loader:
        (batch,) = loader
    assert batch.whole is not None
    for row, view in zip(batch.index, batch.whole, strict=True):
        pixels = np.asarray(Image.open(noise_set.root / noise_set.paths[row]))
        got = view.permute(1, 2, 0).numpy()[INSIDE, INSIDE]
        assert np.abs(got - resized(pixels, 50, -0.5)[INSIDE, INSIDE]).max() <= most
        assert np.abs(got - resized(pixels, 50, -0.75)[INSIDE, INSIDE]).max() > 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_dali_and_torchvision_resize_alike(smooth_set: ImageSet, noise_set: ImageSet, interpolation: str) -> None:
    """Inside by at most the two roundings, and on average over smooth images as little as in bilinear resizing."""
    crop = Crop(size=32, scale=(0.1, 1), jitter_p=0.0)
    spec = ViewSpec(crops=(crop,), whole=24, **RAW, interpolation=interpolation)
    for images, mean in ((smooth_set, 1.5), (noise_set, None)):
        found = {}
        for variant in ("dali_files", "torchvision"):
            with loading(images, spec, len(images), variant) as loader:
                (found[variant],) = loader
        a, b = found["dali_files"], found["torchvision"]
        for x, y in ((a.views[0], b.views[0]), (a.whole, b.whole)):
            assert x is not None
            assert y is not None
            difference = (x - y).abs()
            assert difference[..., INSIDE, INSIDE].max() < 1.001  # whole numbers up to 0.55 and 1.43 from the same
            assert mean is None or difference.mean() < mean


def test_bicubic_views_of_kept_images_are_close(smooth_set: ImageSet) -> None:
    """From halved copies in memory, as for bilinear views."""
    spec = ViewSpec(crops=(Crop(size=32, scale=(0.1, 1), jitter_p=0.0),), **RAW, interpolation="bicubic")
    views = []
    for variant in ("dali_kept", "torchvision"):
        with loading(smooth_set, spec, 50, variant) as loader:
            (batch,) = loader
            views.append(batch.views[0])
    assert (views[0] - views[1]).abs().mean() < 1.5
