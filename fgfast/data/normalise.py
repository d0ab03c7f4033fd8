"""Statistics of a network's input images; normalisation with them, and its inverse."""

import math
from numbers import Real
from typing import NamedTuple

from torch import Tensor

Triple = tuple[float, float, float]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("bilinear", "bicubic")


class InputStats(NamedTuple):
    """How images are resized and normalised for a network: (values - mean) / std per channel, values in [0, 1].

    Args:
        mean: mean of each channel, in [0, 1].
        std: standard deviation of each channel, > 0.
        interpolation: "bilinear" or "bicubic" (a = -1/2), both with antialiasing.

    Example:
        >>> InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).check().interpolation
        'bilinear'
    """

    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    interpolation: str = "bilinear"

    def check(self) -> "InputStats":
        """The statistics themselves.

        Raises:
            ValueError: there are not three numbers each, a mean outside [0, 1], a deviation that is not positive and
                finite, or another interpolation.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not all(isinstance(value, Real) for value in values):
                raise ValueError(f"{name} is {values!r}: give three numbers, one per channel.")
        if not all(0 <= value <= 1 for value in self.mean):
            raise ValueError(f"mean is {self.mean}: give numbers in [0, 1], of values in [0, 1].")
        if not all(0 < value < math.inf for value in self.std):
            raise ValueError(f"std is {self.std}: give numbers above 0, of values in [0, 1].")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is {self.interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}.")
        return self

    def texts(self) -> dict[str, str]:
        """The statistics as texts by name, for options, checkpoints and the metadata of exports.

        Example:
            >>> InputStats((0.5, 0.5, 0.5)).texts()["mean"]
            '0.5,0.5,0.5'
        """
        mean, std = (",".join(repr(float(value)) for value in values) for values in self[:2])
        return {"mean": mean, "std": std, "interpolation": self.interpolation}

    def __str__(self) -> str:
        mean, std = (",".join(f"{value:.4g}" for value in values) for values in self[:2])
        return f"mean {mean}, std {std}, {self.interpolation}"


IMAGENET = InputStats()


def normalise(values: Tensor, stats: InputStats = IMAGENET) -> Tensor:
    """(values - mean) / std per channel; values in [0, 1], [..., 3 or 1, H, W].

    Example:
        >>> import torch
        >>> normalise(torch.full((3, 1, 1), 0.485)).flatten()[0].item()
        0.0
    """
    centre, scale = _as_tensors(stats, values)
    return (values - centre) / scale


def denormalise(images: Tensor, stats: InputStats = IMAGENET) -> Tensor:
    """The inverse of :func:`normalise`: images * std + mean, [..., 3, H, W]; not clamped to [0, 1].

    Example:
        >>> import torch
        >>> bool(torch.allclose(denormalise(normalise(torch.ones(3, 1, 1))), torch.ones(1)))
        True
    """
    centre, scale = _as_tensors(stats, images)
    return images * scale + centre


def _as_tensors(stats: InputStats, like: Tensor) -> list[Tensor]:
    """Mean and standard deviation [3, 1, 1]."""
    return [like.new_tensor(v).view(3, 1, 1) for v in stats.check()[:2]]
