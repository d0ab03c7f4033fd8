"""Colours of parts that are easy to tell apart, with and without colour blindness."""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

# Okabe and Ito, "Color Universal Design" (2008), without black: readable with every common form of colour blindness.
OKABE_ITO = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7")

# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency" (2009),
# severity 1.0, on linear RGB.
_PROTANOPIA = [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
_DEUTERANOPIA = [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]

# Ottosson, "A perceptual color space for image processing" (2020): linear RGB -> cone responses -> Oklab.
_TO_LMS = [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
           [0.0883024619, 0.2817188376, 0.6299787005]]  # fmt: skip
_TO_LAB = [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
           [0.0259040371, 0.7827717662, -0.8086757660]]  # fmt: skip

_MAX_COLOURS = 255  # the ids of an 8-bit map without "absent"


def _oklab(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    lms = np.cbrt(linear.clip(0.0, 1.0) @ np.array(_TO_LMS).T)
    return lms @ np.array(_TO_LAB).T


def _perceived(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Oklab coordinates of ``rgb`` [n, 3] under normal vision, protanopia and deuteranopia, [3, n, 3]."""
    srgb = rgb / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    return np.stack(
        [_oklab(linear), _oklab(linear @ np.array(_PROTANOPIA).T), _oklab(linear @ np.array(_DEUTERANOPIA).T)]
    )


@lru_cache(maxsize=1)
def _all_colours() -> NDArray[np.uint8]:
    """The full palette in the order of the ids, [255, 3]."""
    start = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in OKABE_ITO], dtype=np.uint8)
    steps = np.linspace(0, 255, 16).round().astype(np.uint8)
    candidates = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _oklab((candidates / 255.0) ** 2.2)
    vivid = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.92) & (np.hypot(lab[:, 1], lab[:, 2]) > 0.05)
    candidates = candidates[vivid]
    perceived = _perceived(candidates)

    def distance(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
        # Distances under normal vision are halved: most people have it, and its colours are farther apart.
        distances = np.linalg.norm(perceived - _perceived(rgb[None]), axis=-1) * np.array([[0.5], [1.0], [1.0]])
        return np.asarray(distances.min(axis=0))

    colours = list(start)
    nearest = np.min([distance(colour) for colour in start], axis=0)
    while len(colours) < _MAX_COLOURS:
        colours.append(candidates[int(nearest.argmax())])
        nearest = np.minimum(nearest, distance(colours[-1]))
    return np.stack(colours)


def label_colours(n_parts: int) -> NDArray[np.uint8]:
    """One colour per part id, each as far as possible from the previous ones.

    The first seven are those of Okabe and Ito; each further one maximises the smallest distance in Oklab to the
    previous colours, over normal vision, protanopia and deuteranopia. The colour of an id is the same for any
    ``n_parts``.

    Args:
        n_parts: number of ids, 0 to 255.

    Returns:
        uint8 [n_parts, 3], sRGB.

    Raises:
        ValueError: ``n_parts`` is outside 0..255.

    Example:
        >>> label_colours(2).tolist()
        [[230, 159, 0], [86, 180, 233]]
    """
    if not 0 <= n_parts <= _MAX_COLOURS:
        raise ValueError(f"n_parts is {n_parts}: there are colours for 0 to {_MAX_COLOURS} parts.")
    return _all_colours()[:n_parts].copy()
