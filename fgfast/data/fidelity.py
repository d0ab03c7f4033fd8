"""Image fidelity: PSNR and SSIM of batches."""

import torch
import torch.nn.functional as F
from torch import Tensor

_RADIUS, _SIGMA = 5, 1.5


def psnr(x: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, 10 log10(1 / mean square error), in dB; equal images give infinity.

    Args:
        x: [B, C, H, W], values in [0, 1].
        truth: the same shape.

    Returns:
        float32 [B].

    Example:
        >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).tolist()
        [20.0]
    """
    return -10 * (x.double() - truth.double()).square().mean((1, 2, 3)).log10().float()


def ssim(x: Tensor, truth: Tensor) -> Tensor:
    """Structural similarity of each image, the mean over channels and pixels of

        (2 mx my + c1) (2 cov + c2) / ((mx^2 + my^2 + c1) (vx + vy + c2)),   c1 = 0.01^2, c2 = 0.03^2,

    moments under a Gaussian window of standard deviation 1.5 and 11 x 11 pixels, at all positions inside the image.

    Args:
        x: [B, C, H, W], values in [0, 1], H and W at least 11.
        truth: the same shape.

    Returns:
        float32 [B].

    Raises:
        ValueError: the images are smaller than the window.

    Source: Wang, Bovik, Sheikh, Simoncelli, "Image quality assessment", IEEE TIP 2004.

    Example:
        >>> ssim(torch.ones(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).tolist()
        [1.0]
    """
    if min(x.shape[-2:]) < 2 * _RADIUS + 1:
        raise ValueError(f"SSIM got images of {tuple(x.shape[-2:])}: give at least 11 x 11 pixels.")
    x, truth = x.double(), truth.double()
    mean_x, mean_y = _smooth(x), _smooth(truth)
    var_x, var_y = _smooth(x * x) - mean_x**2, _smooth(truth * truth) - mean_y**2
    cov = _smooth(x * truth) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    above = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    return (above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))).mean((1, 2, 3)).float()


def _smooth(x: Tensor) -> Tensor:
    """Means under the window, [B, C, H - 10, W - 10]."""
    offset = torch.arange(-_RADIUS, _RADIUS + 1, dtype=x.dtype, device=x.device)
    taps = torch.exp(-offset.square() / (2 * _SIGMA**2))
    taps = (taps / taps.sum()).expand(x.shape[1], 1, 1, -1)  # [C, 1, 1, 11]
    return F.conv2d(F.conv2d(x, taps, groups=x.shape[1]), taps.transpose(2, 3), groups=x.shape[1])
