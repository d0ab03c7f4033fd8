"""The colour changes of a batch of views, gamma first, in a few batched torch operations on the CPU or the GPU.

DALI's operators for these cost 300 us per view of 64 pixels on one CPU core, mostly in rounding to 8 bits between them;
the same changes on a full batch in float32 cost a tenth. Brightness, contrast and saturation are torchvision's
formulas; hue rotates the chroma plane of YIQ (as DALI does), where torchvision goes through HSV; values are clamped
once, after all four. The blur reflects at the border, as in both libraries.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast.data.normalise import Triple
from fgfast.data.sampling import Draw

_CHUNK_VALUES = 2**18
_GREY = np.array([0.299, 0.587, 0.114])
_RGB_TO_YIQ = np.array([_GREY, [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_YIQ_TO_RGB = np.linalg.inv(_RGB_TO_YIQ)


def colour_matrix(colour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The linear map of brightness b, contrast c, saturation s and hue t, in this order.

    Contrast mixes with the mean grey m of the brightened image, b m, so the result is M x + k m.

    Args:
        colour: (b, c, s, t) with t a fraction of the circle, float [B, 4].

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


def blur(x: Tensor, sigma: np.ndarray) -> Tensor:
    """Gaussian blur of each image with its own standard deviation; the border reflects.

    Two passes of shifted sums over 2 ceil(3 max sigma) + 1 taps: a tenth of the time of a grouped convolution.

    Args:
        x: float32 [B, C, S, S].
        sigma: standard deviations in pixels, > 0, [B].

    Example:
        >>> bool(torch.allclose(blur(torch.ones(2, 1, 8, 8), np.array([0.5, 2.0])), torch.ones(1)))
        True
    """
    size = x.shape[-1]
    radius = min(math.ceil(3 * float(sigma.max())), size - 1)
    taps = np.exp(-(np.arange(radius + 1) ** 2) / (2.0 * sigma[:, None].astype(np.float64) ** 2))  # [B, R + 1]
    taps *= np.arange(radius + 1) <= np.ceil(3 * sigma[:, None])  # the width does not depend on the other images
    taps /= taps[:, :1] + 2 * taps[:, 1:].sum(1, keepdims=True)
    weight = upload(taps.astype(np.float32), x.device)[:, :, None, None, None]
    for axis, border in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded = F.pad(x, border, mode="reflect")
        x = padded.narrow(axis, radius, size) * weight[:, 0]
        for t in range(1, radius + 1):
            pair = padded.narrow(axis, radius - t, size) + padded.narrow(axis, radius + t, size)
            x.addcmul_(pair, weight[:, t])
    return x


def with_reduced(pixels: Tensor, factor: int) -> list[Tensor]:
    """Patches and their copies downscaled by ``factor``, both in [0, 1].

    Bicubic (a = -1/2) with antialiasing, weights renormalised at the border, rounded once to 8 bits: PIL's filter, but
    PIL rounds after each of its two passes. DALI's resize repeats the border instead, which changes values there by up
    to 10 of 255.

    Args:
        pixels: uint8 [B, 3, P, P], P a multiple of ``factor``.
        factor: how many times smaller the copies are.

    Returns:
        float32 [B, 3, P, P] and [B, 3, P / factor, P / factor], channels_last in memory.

    Example:
        >>> [x.shape[2] for x in with_reduced(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), 4)]
        [32, 8]
    """
    x = pixels.to(torch.float32, memory_format=torch.channels_last)
    small = F.interpolate(x, scale_factor=1 / factor, mode="bicubic", antialias=True).round().clamp(0, 255)
    return [x / 255, small.contiguous(memory_format=torch.channels_last) / 255]


def photometric(pixels: Tensor, draw: Draw | None, mean: Triple, std: Triple) -> Tensor:
    """Gamma, colour, blur, solarise and normalise a batch of resized views.

    Args:
        pixels: uint8 [B, S, S, 3].
        draw: the random numbers of each view; None only normalises.
        mean: of each channel, for values in [0, 1].
        std: of each channel, for values in [0, 1].

    Returns:
        float32 [B, 3, S, S], channels_last in memory.
    """
    out = torch.empty_like(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
    for rows in chunks(pixels):
        _photometric(pixels[rows], None if draw is None else draw.rows(rows), mean, std, out[rows])
    return out


def chunks(pixels: Tensor, values: int = _CHUNK_VALUES) -> list[slice]:
    """Slices of a batch: a few images each on the CPU, whose intermediate values fit the cache; all on a GPU."""
    few = values // max(1, pixels.shape[1:].numel()) if pixels.device.type == "cpu" else len(pixels)
    return [slice(start, start + max(1, few)) for start in range(0, len(pixels), max(1, few))]


def _photometric(pixels: Tensor, draw: Draw | None, mean: Triple, std: Triple, out: Tensor) -> None:
    device = pixels.device
    gamma = None if draw is None else draw.gamma
    kind = torch.float32 if gamma is None else torch.int64  # an index into the table of powers
    x = pixels.permute(0, 3, 1, 2).to(kind, memory_format=torch.contiguous_format)  # [B, 3, S, S]
    if gamma is not None:
        x = powers(gamma, device).gather(1, x.flatten(1)).reshape(x.shape)
    if draw is not None:
        if (draw.colour != (1, 1, 1, 0)).any():
            x = _recolour(x, draw.colour)
        rows = np.flatnonzero(draw.sigma > 0)
        if len(rows):
            which = upload(rows, device)
            x.index_copy_(0, which, blur(x[which], draw.sigma[rows]))
        rows = np.flatnonzero(draw.solarize)
        if len(rows):
            which = upload(rows, device)
            picked = x[which]
            x.index_copy_(0, which, torch.where(picked >= 128, 255 - picked, picked))
    scale = upload(1 / (255 * np.array(std, np.float32)), device)[:, None, None]
    shift = upload(-np.array(mean, np.float32) / np.array(std, np.float32), device)[:, None, None]
    out.copy_(x.mul_(scale).add_(shift))


def powers(gamma: np.ndarray, device: torch.device) -> Tensor:
    """255 (v / 255)^g of every 8-bit value v, float32 [B, 256]; the table costs a quarter of a power per pixel.

    Example:
        >>> powers(np.array([2.0]), torch.device("cpu"))[0, 51].item()  # 255 * 0.2^2
        10.199999809265137
    """
    table = 255 * (np.arange(256) / 255) ** gamma[:, None].astype(np.float64)
    return upload(table.astype(np.float32), device)


def upload(values: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor on ``device``, without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _recolour(x: Tensor, colour: np.ndarray) -> Tensor:
    matrix, grey_weight = colour_matrix(colour)
    factor = upload(matrix, x.device)[:, :, :, None, None]  # [B, 3, 3, 1, 1]
    weights = upload(_GREY.astype(np.float32), x.device)
    grey = (x.mean((2, 3)) * weights).sum(1)  # [B]
    offset = (upload(grey_weight, x.device) * grey)[:, None, None]  # [B, 1, 1]
    out = torch.empty_like(x)
    for c in range(3):
        channel = torch.mul(x[:, 0], factor[:, c, 0], out=out[:, c])
        channel.addcmul_(x[:, 1], factor[:, c, 1]).addcmul_(x[:, 2], factor[:, c, 2]).add_(offset)
    return out.clamp_(0, 255)
