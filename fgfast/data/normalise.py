"""Normalisation of images with ImageNet's statistics, and its inverse."""

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(values: Tensor) -> Tensor:
    """(values - mean) / std per channel with ImageNet's statistics; values in [0, 1], [..., 3 or 1, H, W].

    Example:
        >>> import torch
        >>> normalise(torch.full((3, 1, 1), 0.485)).flatten()[0].item()
        0.0
    """
    centre, scale = _statistics(values)
    return (values - centre) / scale


def denormalise(images: Tensor) -> Tensor:
    """The inverse of :func:`normalise`: images * std + mean, [..., 3, H, W]; not clamped to [0, 1].

    Example:
        >>> import torch
        >>> bool(torch.allclose(denormalise(normalise(torch.ones(3, 1, 1))), torch.ones(1)))
        True
    """
    centre, scale = _statistics(images)
    return images * scale + centre


def _statistics(like: Tensor) -> list[Tensor]:
    """Mean and standard deviation [3, 1, 1]."""
    return [like.new_tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]
