"""Every random choice of the data path, drawn on the host from (seed, epoch, rank, batch): no state to save.

Both loaders apply these draws, so that they cut the same windows, and a resumed run draws what it would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from fgfast.data.views import Crop

_ATTEMPTS = 10


@dataclass(frozen=True)
class Draw:
    """What happens to one crop of B images.

    Args:
        window: (y, x, h, w) in pixels of the upright image, int32 [B, 4].
        flip: bool [B].
        colour: factors of brightness, contrast and saturation, and the turn of hue (share of a circle), float32
            [B, 4]; (1, 1, 1, 0) changes nothing, saturation 0 is grey.
        sigma: standard deviation of the blur in pixels, float32 [B]; 0 = none.
        solarize: bool [B].
        gamma: exponent, float32 [B], or None.
        patches: (y, x, side) of two patches in pixels of the view, int64 [B, 2, 3], or None.
        blocks: number of the block, row by row, that comes to each place, int64 [B, n, n], or None.
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
        """The same for some of the images."""
        return replace(self, **{name: value[which] for name, value in vars(self).items() if value is not None})

    def boxes(self, sizes: np.ndarray) -> np.ndarray:
        """(y0, x0, h, w, flip) in [0, 1], float32 [B, 5], for image sizes (H, W) [B, 2]."""
        window = self.window / np.concatenate([sizes, sizes], 1)
        return np.concatenate([window, self.flip[:, None]], 1).astype(np.float32)


def generator(seed: int, epoch: int, rank: int, batch: int) -> np.random.Generator:
    """The random numbers of one batch, the same whenever it is asked for."""
    return np.random.default_rng([seed, epoch, rank, batch])


@lru_cache(maxsize=8)
def epoch_order(n: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of n records in an epoch, int64 [n], read-only, the same on every rank."""
    order = np.random.default_rng(seed + epoch).permutation(n) if shuffle else np.arange(n)
    order.flags.writeable = False
    return order


def draw_crop(crop: Crop, sizes: np.ndarray, rng: np.random.Generator) -> Draw:
    """Draw one crop of each of B images.

    Args:
        crop: the ranges and probabilities.
        sizes: (H, W) of the upright images, [B, 2].
        rng: where the numbers come from.
    """
    batch = len(sizes)
    if crop.scale is None:
        window = np.concatenate([np.zeros_like(sizes), sizes], 1)
    else:
        window = _window(crop.scale, crop.ratio, sizes, rng)
    cut = np.rint(crop.border * window[:, 2:]).astype(window.dtype)
    window = np.concatenate([window[:, :2] + cut, np.maximum(1, window[:, 2:] - 2 * cut)], 1)

    chance = rng.random((batch, 5))  # flip, jitter, grey, blur, solarise: drawn always, so that views never shift
    strength = np.asarray(crop.jitter)
    turn = rng.uniform(-1, 1, (batch, 4)) * strength
    colour = np.concatenate([np.maximum(0, 1 + turn[:, :3]), turn[:, 3:]], 1)
    colour[:, :3] = np.where(
        strength[:3] > 1, rng.random((batch, 3)) * (1 + strength[:3]), colour[:, :3]
    )  # [max(0, 1 - s), 1 + s]
    colour = np.where(chance[:, 1:2] < crop.jitter_p, colour, [1.0, 1.0, 1.0, 0.0])
    colour[:, 2] *= chance[:, 2] >= crop.grayscale
    sigma = rng.uniform(*crop.blur_sigma, batch) * (chance[:, 3] < crop.blur)
    return Draw(
        window=window.astype(np.int32),
        flip=chance[:, 0] < crop.flip,
        colour=colour.astype(np.float32),
        sigma=sigma.astype(np.float32),
        solarize=chance[:, 4] < crop.solarize,
        gamma=None if crop.gamma is None else rng.uniform(*crop.gamma, batch).astype(np.float32),
        patches=_patches(crop, batch, rng) if crop.swap else None,
        blocks=_blocks(crop, batch, rng) if crop.grid else None,
        holes=_holes(crop, batch, rng) if crop.holes[1] else None,
        paste=None if crop.paste is None else _sides(crop, crop.paste, (batch, 2), rng),
    )


def _sides(crop: Crop, shares: tuple[float, float], shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Sides uniform over whole pixels, at least one."""
    low, high = (max(1, crop.pixels(share)) for share in shares)
    return rng.integers(low, high, shape, endpoint=True)


def _patches(crop: Crop, batch: int, rng: np.random.Generator) -> np.ndarray:
    """A place within the upper and one within the lower half."""
    half, side = crop.size // 2, crop.pixels(crop.swap)
    y = rng.integers(0, half - side, (batch, 2), endpoint=True) + np.array([0, crop.size - half])
    x = rng.integers(0, crop.size - side, (batch, 2), endpoint=True)
    return np.stack([y, x, np.full((batch, 2), side)], 2)


def _blocks(crop: Crop, batch: int, rng: np.random.Generator) -> np.ndarray:
    """An order of all blocks, or one in which none moves farther than ``reach``."""
    n = crop.grid
    if not crop.reach:
        return rng.random((batch, n * n)).argsort(1).reshape(batch, n, n)
    blocks = np.broadcast_to(np.arange(n * n).reshape(n, n), (batch, n, n))
    for axis in (2, 1):  # two blocks that are reach + 1 places apart never exchange
        place = np.arange(n)[:, None] if axis == 1 else np.arange(n)
        moved = place + (crop.reach + 1) * (rng.random((batch, n, n)) - 0.5)
        blocks = np.take_along_axis(blocks, moved.argsort(axis), axis)
    return blocks


def _holes(crop: Crop, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Holes that lie within the view; those over the number drawn have side 0."""
    count = rng.integers(*crop.holes, (batch, 1), endpoint=True)
    side = _sides(crop, crop.hole_size, (batch, crop.holes[1]), rng)
    place = np.floor(rng.random((batch, crop.holes[1], 2)) * (crop.size - side + 1)[..., None]).astype(np.int64)
    side = np.where(np.arange(crop.holes[1]) < count, side, 0)
    return np.concatenate([place, side[..., None]], 2)


def _window(
    scale: tuple[float, float], ratios: tuple[float, float], sizes: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """The window (y, x, h, w) of torchvision's RandomResizedCrop.

    Ten attempts at an area and a ratio, then the largest centred window whose ratio is allowed.
    """
    batch = len(sizes)
    height, width = sizes[:, :1].astype(np.float64), sizes[:, 1:].astype(np.float64)
    area = height * width * rng.uniform(*scale, (batch, _ATTEMPTS))
    ratio = np.exp(rng.uniform(np.log(ratios[0]), np.log(ratios[1]), (batch, _ATTEMPTS)))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w >= 1) & (h >= 1) & (w <= width) & (h <= height)
    rows, first = np.arange(batch), fits.argmax(1)
    narrow, wide = width[:, 0] / height[:, 0] < ratios[0], width[:, 0] / height[:, 0] > ratios[1]
    spare_h = np.where(narrow, np.maximum(1, np.rint(width[:, 0] / ratios[0])), height[:, 0])
    spare_w = np.where(wide, np.maximum(1, np.rint(height[:, 0] * ratios[1])), width[:, 0])
    found = fits[rows, first]
    h = np.where(found, h[rows, first], np.minimum(spare_h, height[:, 0]))
    w = np.where(found, w[rows, first], np.minimum(spare_w, width[:, 0]))
    place = rng.random((batch, 2))
    y = np.where(found, np.floor(place[:, 0] * (height[:, 0] - h + 1)), (height[:, 0] - h) // 2)
    x = np.where(found, np.floor(place[:, 1] * (width[:, 0] - w + 1)), (width[:, 0] - w) // 2)
    return np.stack([y, x, h, w], 1)


def whole_window(sizes: np.ndarray, center: float | None) -> np.ndarray:
    """The window of the unaugmented view, float32 [B, 4] in pixels: everything, or a centred square."""
    sizes = sizes.astype(np.float32)
    if center is None:
        return np.concatenate([np.zeros_like(sizes), sizes], 1)
    side = np.repeat(center * sizes.min(1, keepdims=True), 2, 1)
    return np.concatenate([(sizes - side) / 2, side], 1)
