"""Pictures as networks are fed them, and as values in [0, 1]."""

from collections.abc import Sequence

from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def normalise(values: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(values - mean) / std of each channel, [..., C, H, W] of values in [0, 1].

    Example:
        >>> import torch
        >>> normalise(torch.ones(1, 1, 1), (0.5,), (0.25,)).item()
        2.0
    """
    centre, scale = (values.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    return (values - centre) / scale


def denormalise(pictures: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """What :func:`normalise` was given: pictures std + mean, [..., C, H, W]; changed pictures may leave [0, 1].

    Example:
        >>> import torch
        >>> denormalise(torch.full((1, 1, 1), 2.0), (0.5,), (0.25,)).item()
        1.0
    """
    centre, scale = (pictures.new_tensor(v).view(-1, 1, 1) for v in (mean, std))
    return pictures * scale + centre
