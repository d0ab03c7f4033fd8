"""The colour changes of a batch of views, in a few batched torch operations on the CPU or the GPU.

DALI's operators for these cost 300 us a 64-pixel view on one CPU core, mostly in rounding to 8 bits between them; the
same changes on a whole batch in float32 cost a tenth. Brightness, contrast and saturation are torchvision's formulas;
hue turns the chroma plane of YIQ (as DALI does), where torchvision goes through HSV; values are clamped once, after
all four. The blur reflects at the border, as both do.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from fgfast.data.sampling import Draw

Triple = tuple[float, float, float]

_CHUNK_VALUES = 2**19
_GREY = np.array([0.299, 0.587, 0.114])
_RGB_TO_YIQ = np.array([_GREY, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def colour_matrix(colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear map of brightness b, contrast c, saturation s and hue t, in this order.

    Contrast mixes with the mean grey m of the brightened picture, b m, so the result is M x + k m.

    Args:
        colour: (b, c, s, t) with t a share of the circle, float [B, 4].

    Returns:
        M float32 [B, 3, 3] and k float32 [B].

    Example:
        >>> matrix, offset = colour_matrix(np.array([[1.0, 1.0, 1.0, 0.0]]))
        >>> bool(np.allclose(matrix[0], np.eye(3), atol=1e-6)), float(offset[0])
        (True, 0.0)
    """
    bright, contrast, saturation, turn = colour.astype(np.float64).T
    angle = 2 * np.pi * turn
    rotate = np.zeros((len(colour), 3, 3))
    rotate[:, 0, 0] = 1
    rotate[:, 1, 1] = rotate[:, 2, 2] = saturation * np.cos(angle)
    rotate[:, 2, 1] = saturation * np.sin(angle)
    rotate[:, 1, 2] = -rotate[:, 2, 1]
    matrix = (bright * contrast)[:, None, None] * (_YIQ_TO_RGB @ rotate @ _RGB_TO_YIQ)
    return matrix.astype(np.float32), (bright * (1 - contrast)).astype(np.float32)


@lru_cache(maxsize=512)
def blur_matrix(sigma: float, size: int) -> np.ndarray:
    """Gaussian blur along one axis as a matrix, float32 [size, size]; rows sum to 1, the border reflects.

    Example:
        >>> bool(np.allclose(blur_matrix(1.5, 8).sum(1), 1))
        True
    """
    at = np.arange(size)
    weight = np.exp(-(np.arange(2 * size) ** 2) / (2.0 * sigma**2))  # by distance
    kernel = weight[abs(at[:, None] - at)]
    kernel += weight[at[:, None] + at] * (at > 0)
    kernel += weight[abs(at[:, None] - 2 * (size - 1) + at)] * (at < size - 1)
    return (kernel / kernel.sum(1, keepdims=True)).astype(np.float32)


def photometric(pixels: Tensor, draw: Draw | None, mean: Triple, std: Triple) -> Tensor:
    """Colour, blur, solarise and normalise a batch of resized views.

    Args:
        pixels: uint8 [B, S, S, 3].
        draw: what happens to each picture; None only normalises.
        mean: of each channel, for values in [0, 1].
        std: of each channel, for values in [0, 1].

    Returns:
        float32 [B, 3, S, S], channels_last in memory.
    """
    out = torch.empty_like(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
    # On the CPU a few pictures at a time, so that the steps in between stay in the cache.
    chunk = (
        max(1, _CHUNK_VALUES // max(1, pixels.shape[1:].numel()))
        if pixels.device.type == "cpu"
        else max(1, len(pixels))
    )
    for start in range(0, len(pixels), chunk):
        rows = slice(start, start + chunk)
        _photometric(pixels[rows], None if draw is None else draw.rows(rows), mean, std, out[rows])
    return out


def _photometric(pixels: Tensor, draw: Draw | None, mean: Triple, std: Triple, out: Tensor) -> None:
    device = pixels.device
    x = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)  # [B, 3, S, S]
    if draw is not None:
        if (draw.colour != (1, 1, 1, 0)).any():
            x = _recolour(x, draw.colour)
        rows = np.flatnonzero(draw.sigma > 0)
        if len(rows):
            kernel = _upload(
                np.stack([blur_matrix(float(sigma), x.shape[-1]) for sigma in draw.sigma[rows]]), device
            )  # [b, S, S]
            which = _upload(rows, device)
            picked = x[which]  # [b, 3, S, S]
            across = torch.bmm(picked.flatten(1, 2), kernel.transpose(1, 2)).view_as(picked)
            x.index_copy_(0, which, torch.matmul(kernel[:, None], across))
        rows = np.flatnonzero(draw.solarize)
        if len(rows):
            which = _upload(rows, device)
            picked = x[which]
            x.index_copy_(0, which, torch.where(picked >= 128, 255 - picked, picked))
    scale = _upload(1 / (255 * np.array(std, np.float32)), device)[:, None, None]
    shift = _upload(-np.array(mean, np.float32) / np.array(std, np.float32), device)[:, None, None]
    out.copy_(x.mul_(scale).add_(shift))


def _upload(values: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _recolour(x: Tensor, colour: np.ndarray) -> Tensor:
    matrix, share = colour_matrix(colour)
    factor = _upload(matrix, x.device)[:, :, :, None, None]  # [B, 3, 3, 1, 1]
    weights = _upload(_GREY.astype(np.float32), x.device)
    grey = (x.mean((2, 3)) * weights).sum(1)  # [B]
    offset = (_upload(share, x.device) * grey)[:, None, None]  # [B, 1, 1]
    out = torch.empty_like(x)
    for c in range(3):
        channel = torch.mul(x[:, 0], factor[:, c, 0], out=out[:, c])
        channel.addcmul_(x[:, 1], factor[:, c, 1]).addcmul_(x[:, 2], factor[:, c, 2]).add_(offset)
    return out.clamp_(0, 255)
