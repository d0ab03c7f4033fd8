"""Images for display: tensors as pixels, id maps drawn over an image, captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fgfast.data.normalise import IMAGENET, InputStats, denormalise
from fgfast.data.palette import label_colours
from fgfast.tensors import shape_error


@dataclass(frozen=True)
class Panel:
    """One image of a grid.

    Args:
        image: uint8 [H, W, 3], sRGB.
        caption: text below it; may be empty.
    """

    image: NDArray[np.uint8]
    caption: str = ""


def to_pixels(values: Tensor) -> NDArray[np.uint8]:
    """Convert values in [0, 1] to pixels: round(255 x), clipped to 0..255, NaN black.

    Args:
        values: [..., 3, H, W], any float dtype and device.

    Returns:
        uint8 [..., H, W, 3].

    Raises:
        ValueError: a wrong shape.

    Example:
        >>> import torch
        >>> to_pixels(torch.full((3, 1, 1), 0.5)).tolist()
        [[[128, 128, 128]]]
    """
    if values.ndim < 3 or values.shape[-3] != 3:
        raise shape_error("values", "[..., 3, H, W]", values)
    x = values.detach().float().cpu()
    return (x.nan_to_num(0.0) * 255).round().clamp(0, 255).byte().movedim(-3, -1).contiguous().numpy()


def to_uint8(image: Tensor | NDArray[Any], stats: InputStats = IMAGENET) -> NDArray[np.uint8]:
    """Convert an image to uint8 [H, W, 3].

    Args:
        image: normalised float tensor [3, H, W], or uint8 [H, W, 3] or [3, H, W].
        stats: the statistics that a float tensor is normalised with; in a method ``self.encoder.stats``.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: another dtype or shape.

    Example:
        >>> import torch
        >>> to_uint8(torch.zeros(3, 2, 4)).shape
        (2, 4, 3)
    """
    if isinstance(image, Tensor) and image.is_floating_point():
        return to_pixels(denormalise(image.detach().float(), stats))
    array = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype == np.uint8 and array.ndim == 3:
        if array.shape[-1] == 3:
            return array
        if array.shape[0] == 3:
            return array.transpose(1, 2, 0)
    raise ValueError(
        f"image is {array.dtype} {array.shape}: "
        "give a normalised float tensor [3, H, W], or uint8 [H, W, 3] or [3, H, W]."
    )


def overlay(
    image: Tensor | NDArray[np.uint8],
    labels: Tensor | NDArray[np.integer[Any]],
    alpha: float = 0.55,
    n_parts: int | None = None,
    stats: InputStats = IMAGENET,
) -> NDArray[np.uint8]:
    """Draw an id map over an image: parts tinted, their borders almost opaque; pixels without a part unchanged.

    Args:
        image: normalised float tensor [3, H, W], or uint8 [H, W, 3] or [3, H, W].
        labels: integer [h, w], -1 = absent; resized to the image by nearest neighbour.
        alpha: opacity of the colours, 0 (only the image) to 1 (only the colours).
        n_parts: number of ids; None takes the largest label + 1. The colour of an id does not depend on it.
        stats: see :func:`to_uint8`.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: a wrong shape, alpha outside [0, 1], or a label >= n_parts.

    Example:
        >>> grey = np.full((4, 4, 3), 128, dtype=np.uint8)
        >>> overlay(grey, np.array([[0, -1]]), alpha=1.0)[0].tolist()
        [[230, 159, 0], [230, 159, 0], [128, 128, 128], [128, 128, 128]]
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}: give a number from 0 to 1.")
    pixels = to_uint8(image, stats)
    ids = labels.cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"labels is {ids.dtype} {ids.shape}: give an id map, integer [h, w].")
    n_parts = int(ids.max(initial=-1)) + 1 if n_parts is None else n_parts
    if ids.max(initial=-1) >= n_parts:
        raise ValueError(f"labels holds the id {ids.max()}, but n_parts is {n_parts}: give ids of -1 to n_parts - 1.")
    height, width = pixels.shape[:2]
    if 0 in ids.shape or 0 in (height, width):
        return pixels.copy()
    ids = ids[np.arange(height) * ids.shape[0] // height][:, np.arange(width) * ids.shape[1] // width]
    painted = np.zeros_like(pixels) if n_parts == 0 else label_colours(n_parts)[ids.clip(0)]
    edge = np.zeros(ids.shape, dtype=bool)
    # Borders are one pixel wide: in the right or lower one of two parts, and in a part next to absent pixels.
    for rows, ahead, behind in ((edge, ids[1:], ids[:-1]), (edge.T, ids.T[1:], ids.T[:-1])):
        rows[1:] |= (ahead != behind) & (ahead >= 0)
        rows[:-1] |= (ahead != behind) & (ahead < 0)
    weight = np.where(edge & (alpha > 0), max(alpha, 0.9), alpha) * (ids >= 0)
    mixed = pixels + weight[..., None] * (painted.astype(np.float64) - pixels)
    return np.asarray(mixed.round().astype(np.uint8))


def in_rows(panels: Sequence[Panel], columns: int) -> list[list[Panel]]:
    """Split a list of panels into rows of ``columns``; the last row may be shorter.

    Example:
        >>> [len(row) for row in in_rows([Panel(np.zeros((1, 1, 3), np.uint8))] * 5, 2)]
        [2, 2, 1]
    """
    return [list(panels[i : i + columns]) for i in range(0, len(panels), columns)]
