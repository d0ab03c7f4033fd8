"""Every random choice of the data loaders, drawn on the host from (seed, epoch, batch): no state to save.

Both loaders apply these draws: they crop the same windows, and a resumed run draws the same numbers as an uninterrupted
one. They are drawn for the images of all ranks at once, so any number of ranks draws the same for an image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fgfast.data.places import Numbers
from fgfast.data.transforms import DRAWN, TrimBorder
from fgfast.data.views import Crop

_ATTEMPTS = 10


@dataclass(frozen=True)
class Draw:
    """The random numbers of one crop of B images.

    Args:
        window: (y, x, h, w) in pixels of the upright image, int32 [B, 4].
        flip: bool [B].
        colour: factors of brightness, contrast and saturation, and the turn of hue (fraction of a circle), float32
            [B, 4]; (1, 1, 1, 0) changes nothing, saturation 0 is grey.
        sigma: standard deviation of the blur in pixels, float32 [B]; 0 = none.
        solarize: bool [B].
        gamma: exponent, float32 [B], or None.
        patches: (y, x, side) of two patches in pixels of the view, int64 [B, 2, 3], or None.
        blocks: index, row by row, of the block that moves to each place, int64 [B, n, n], or None.
        holes: (y, x, side) in pixels of the view, side 0 = none, int64 [B, H, 3], or None.
        paste: (h, w) of the pasted region in pixels of the view, int64 [B, 2], or None.
    """

    window: np.ndarray
    flip: np.ndarray
    colour: np.ndarray
    sigma: np.ndarray
    solarize: np.ndarray
    gamma: np.ndarray | None = None
    patches: np.ndarray | None = None
    blocks: np.ndarray | None = None
    holes: np.ndarray | None = None
    paste: np.ndarray | None = None

    def rows(self, which: slice) -> Draw:
        """The random numbers of some of the images."""
        return replace(self, **{name: value[which] for name, value in vars(self).items() if value is not None})

    def boxes(self, sizes: np.ndarray) -> np.ndarray:
        """(y0, x0, h, w, flip) in [0, 1], float32 [B, 5], for image sizes (H, W) [B, 2]."""
        window = self.window / np.concatenate([sizes, sizes], 1)
        return np.concatenate([window, self.flip[:, None]], 1).astype(np.float32)


def generator(seed: int, epoch: int, rank: int, batch: int) -> np.random.Generator:
    """The random number generator of one batch, the same at every call; the loaders use rank 0 for all ranks."""
    return np.random.default_rng([seed, epoch, rank, batch])


@lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of the n images in an epoch, int64 [n], read-only, the same on every rank."""
    order = np.random.default_rng(seed + epoch).permutation(n) if shuffle else np.arange(n)
    order.flags.writeable = False
    return order


def draw_corner(sizes: np.ndarray, side: int, rng: Numbers) -> np.ndarray:
    """Upper left corner (y, x) of a square patch of each of B images, int64 [B, 2].

    One number of 32 bits is drawn for each coordinate, whatever the size of the image.
    """
    raw = rng.integers(0, 2**32, (len(sizes), 2), dtype=np.uint32).astype(np.uint64)
    return (raw * (sizes - side + 1).astype(np.uint64) >> np.uint64(32)).astype(np.int64)


def draw_crop(crop: Crop, sizes: np.ndarray, rng: Numbers) -> Draw:
    """Draw one crop of each of B images.

    Args:
        crop: the ranges and probabilities.
        sizes: (H, W) of the upright images, [B, 2].
        rng: the random number generator, or one that draws for further images too.
    """
    batch = len(sizes)
    if crop.scale is None:
        window = np.concatenate([np.zeros_like(sizes), sizes], 1)
    else:
        window = _draw_window(crop.scale, crop.ratio, sizes, rng)
    border = crop.find(TrimBorder)
    if border is not None:
        cut = np.rint(border.fraction * window[:, 2:]).astype(window.dtype)
        window = np.concatenate([window[:, :2] + cut, np.maximum(1, window[:, 2:] - 2 * cut)], 1)

    chance = rng.random((batch, 5))  # flip, jitter, grey, blur, solarise: always drawn, so later draws never shift
    strength = np.asarray(crop.jitter)
    turn = rng.uniform(-1, 1, (batch, 4)) * strength
    colour = np.concatenate([np.maximum(0, 1 + turn[:, :3]), turn[:, 3:]], 1)
    colour[:, :3] = np.where(
        strength[:3] > 1, rng.random((batch, 3)) * (1 + strength[:3]), colour[:, :3]
    )  # [max(0, 1 - s), 1 + s]
    colour = np.where(chance[:, 1:2] < crop.jitter_p, colour, [1.0, 1.0, 1.0, 0.0])
    colour[:, 2] *= chance[:, 2] >= crop.grayscale
    sigma = rng.uniform(*crop.blur_sigma, batch) * (chance[:, 3] < crop.blur)
    drawn = ((kind.field, crop.find(kind)) for kind in DRAWN)
    extra = {name: transform.draw(crop.size, batch, rng) for name, transform in drawn if transform is not None}
    return Draw(
        window=window.astype(np.int32),
        flip=chance[:, 0] < crop.flip,
        colour=colour.astype(np.float32),
        sigma=sigma.astype(np.float32),
        solarize=chance[:, 4] < crop.solarize,
        **extra,
    )


def _draw_window(
    scale: tuple[float, float], ratios: tuple[float, float], sizes: np.ndarray, rng: Numbers
) -> np.ndarray:
    """The window (y, x, h, w) of torchvision's RandomResizedCrop.

    Ten attempts at an area and a ratio; if none fits, the largest centred window of an allowed ratio.
    """
    batch = len(sizes)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * rng.uniform(*scale, (batch, _ATTEMPTS))
    ratio = np.exp(rng.uniform(np.log(ratios[0]), np.log(ratios[1]), (batch, _ATTEMPTS)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    rows, first = np.arange(batch), fits.argmax(1)
    found = fits[rows, first]
    height, width = height[:, 0], width[:, 0]
    narrow, wide = width / height < ratios[0], width / height > ratios[1]
    centred_h = np.where(narrow, np.maximum(1, np.rint(width / ratios[0])), height)
    centred_w = np.where(wide, np.maximum(1, np.rint(height * ratios[1])), width)
    h = np.where(found, h[rows, first], np.minimum(centred_h, height))
    w = np.where(found, w[rows, first], np.minimum(centred_w, width))
    place = rng.random((batch, 2))
    y = np.where(found, np.floor(place[:, 0] * (height - h + 1)), (height - h) // 2)
    x = np.where(found, np.floor(place[:, 1] * (width - w + 1)), (width - w) // 2)
    return np.stack([y, x, h, w], 1)


def whole_window(sizes: np.ndarray, center: float | None) -> np.ndarray:
    """The window of the unaugmented view, float32 [B, 4] in pixels: the full image, or a centred square."""
    sizes = sizes.astype(np.float32)
    if center is None:
        return np.concatenate([np.zeros_like(sizes), sizes], 1)
    side = np.repeat(center * sizes.min(1, keepdims=True), 2, 1)
    return np.concatenate([(sizes - side) / 2, side], 1)
