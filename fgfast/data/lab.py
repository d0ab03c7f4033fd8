"""Conversion between sRGB and CIE Lab, batched on any device: lightness L in [0, 100] and colour axes a and b.

White is D65 under the 2 degree observer; values outside [0, 1] of sRGB are clamped on the way back.
Source: IEC 61966-2-1 (sRGB) and CIE 15 (Lab).
"""

import torch
from torch import Tensor

from fgfast.data.normalise import IMAGENET, InputStats, denormalise, normalise

_WHITE = (0.95047, 1.0, 1.08883)
_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_TO_RGB = tuple(tuple(row) for row in torch.tensor(_TO_XYZ, dtype=torch.float64).inverse().tolist())
_BEND = 6 / 29  # below it the cube root of Lab is replaced by a line


def _linearise(rgb: Tensor) -> Tensor:
    """Linear light from sRGB values."""
    return torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)


def _encode(light: Tensor) -> Tensor:
    """Values of sRGB from linear light."""
    return torch.where(light > 0.0031308, 1.055 * light.clamp(min=1e-9) ** (1 / 2.4) - 0.055, 12.92 * light)


def _root(x: Tensor) -> Tensor:
    return torch.where(x > _BEND**3, x.clamp(min=1e-9) ** (1 / 3), x / (3 * _BEND**2) + 4 / 29)


def _cube(x: Tensor) -> Tensor:
    return torch.where(x > _BEND, x**3, 3 * _BEND**2 * (x - 4 / 29))


def _mix(x: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Apply a 3 x 3 matrix to the channels; as sums, because autocast computes matrix products in 16 bits."""
    first, second, third = x.unbind(-3)
    return torch.stack([a * first + b * second + c * third for a, b, c in matrix], -3)


def rgb_to_lab(rgb: Tensor) -> Tensor:
    """Lab from sRGB values.

    Args:
        rgb: float [..., 3, H, W], values in [0, 1].

    Returns:
        [..., 3, H, W]: L in [0, 100], a and b in about [-110, 110].

    Example:
        >>> rgb_to_lab(torch.ones(3, 1, 1)).flatten().round().abs().tolist()
        [100.0, 0.0, 0.0]
    """
    white = rgb.new_tensor(_WHITE).view(3, 1, 1)
    x, y, z = _root(_mix(_linearise(rgb), _TO_XYZ) / white).unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """Values of sRGB from Lab, clamped to [0, 1]; the inverse of :func:`rgb_to_lab` inside the gamut.

    Example:
        >>> lab_to_rgb(torch.tensor([100.0, 0.0, 0.0]).view(3, 1, 1)).flatten().round(decimals=2).tolist()
        [1.0, 1.0, 1.0]
    """
    light, a, b = lab.unbind(-3)
    y = (light + 16) / 116
    white = lab.new_tensor(_WHITE).view(3, 1, 1)
    xyz = _cube(torch.stack([y + a / 500, y, y - b / 200], -3)) * white
    return _encode(_mix(xyz, _TO_RGB)).clamp(0, 1)


def lightness(rgb: Tensor) -> Tensor:
    """L of sRGB values [..., 3, H, W], as [..., 1, H, W] in [0, 100].

    Example:
        >>> lightness(torch.zeros(3, 2, 2)).shape
        torch.Size([1, 2, 2])
    """
    red, green, blue = _linearise(rgb).unbind(-3)
    r, g, b = _TO_XYZ[1]
    return (116 * _root(r * red + g * green + b * blue) - 16).unsqueeze(-3)


def to_grey(images: Tensor, stats: InputStats = IMAGENET) -> Tensor:
    """Normalised images converted to grey: L / 100 in all three channels, normalised again.

    Args:
        images: float [..., 3, H, W], normalised.
        stats: the statistics that they are normalised with.

    Returns:
        The same shape.

    Example:
        >>> bool((denormalise(to_grey(torch.rand(1, 3, 2, 2))).std(1) < 1e-6).all())
        True
    """
    return normalise(lightness(denormalise(images, stats).clamp(0, 1)) / 100, stats)
