"""The source of parts that needs no network: the cells of annotated key points."""

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import check_images
from fgfast.data.maps import ABSENT
from fgfast.errors import UserError
from fgfast.parts.sources import DiscoveryConfig, Source

log = logging.getLogger("fgfast")


class KeyPoints(Source):
    """Gives each pixel in the object's box the nearest visible key point: what the best parts could give.

    Part k is the cell of key point k in the box of :attr:`ImageSet.boxes`, or in the full image without one. An image
    without a visible key point has no parts.

    Args:
        n_points: number of key points of the set, from :func:`count_points`.
        config: side of the maps and origin; the other settings have no effect.
        device: the device of the ranks.
    """

    settings = "key points"

    def __init__(self, n_points: int, config: DiscoveryConfig, device: torch.device | None = None) -> None:
        super().__init__(config, device=device)
        self.n_parts = n_points

    def content(self, images: ImageSet) -> dict[str, Any]:
        """The key points and boxes."""
        assert images.keypoints is not None  # count_points
        digest = hashlib.sha256()
        for values in (images.keypoints, images.boxes):
            digest.update(b"" if values is None else np.ascontiguousarray(values).tobytes())
        return {"source": "keypoints", "points": digest.hexdigest()}

    def label(self, images: ImageSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield positions and id maps of blocks of images; of each file only the size is read."""
        assert images.keypoints is not None
        records = check_images(images, quiet=True, lenient=True)
        sizes = dict(zip(records.index.tolist(), records.sizes, strict=True))
        readable = np.array([row for row in rows if row in sizes], np.int64)
        for block in np.unique(readable // self.block):
            of_block = readable[readable // self.block == block]
            maps = [
                cells(images.keypoints[row], None if images.boxes is None else images.boxes[row], sizes[row], self.side)
                for row in of_block
            ]
            yield of_block, torch.from_numpy(np.stack(maps))


def cells(points: np.ndarray, box: np.ndarray | None, size: np.ndarray, side: int) -> np.ndarray:
    r"""The id map of one image: the nearest visible key point of each pixel in the box, -1 elsewhere.

    .. math:: map_{ij} = \arg\min_k \|c_{ij} - p_k\|, \quad c_{ij} = ((j + 1/2) W / side, (i + 1/2) H / side)

    Args:
        points: (x, y, visible) of P key points in pixels of the upright image, float [P, 3].
        box: (x, y, w, h) in pixels; None or NaN stands for the full image.
        size: (H, W) of the upright image without its banner.
        side: side of the map.

    Returns:
        int64 [side, side]; ties go to the first point.

    Example:
        >>> points = np.array([[1.0, 2.0, 1], [3.0, 2.0, 1], [2.0, 2.0, 0]])
        >>> cells(points, np.array([0.0, 0.0, 4.0, 2.0]), np.array([4, 4]), 4)[:3].tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1], [-1, -1, -1, -1]]
    """
    visible = np.flatnonzero(points[:, 2] > 0)
    if not len(visible):
        return np.full((side, side), -1)
    y, x = ((np.arange(side) + 0.5) * length / side for length in size)
    squares = (x[None, None] - points[visible, 0, None, None]) ** 2 + (y[:, None] - points[visible, 1, None, None]) ** 2
    nearest = visible[squares.argmin(0)]
    if box is None or np.isnan(box).any():
        return nearest
    left, top, width, height = box
    inside = ((y >= top) & (y < top + height))[:, None] & (x >= left) & (x < left + width)
    return np.where(inside, nearest, -1)


def count_points(images: ImageSet) -> int:
    """The number of key points of a set.

    Raises:
        UserError: the set has no key points, or more than an id map can hold.
    """
    name = images.source or images.root
    if images.keypoints is None or not images.keypoints.shape[1]:
        raise UserError(f"{name} has no key points: choose another --parts than keypoints.")
    if images.keypoints.shape[1] >= ABSENT:
        raise UserError(
            f"{name} has {images.keypoints.shape[1]} key points, more than the {ABSENT - 1} parts of an id map: leave "
            "some out."
        )
    return images.keypoints.shape[1]


def check_points(images: ImageSet) -> None:
    """Raise a UserError for a set in which no key point of any image is visible; log that a set has no boxes."""
    name = images.source or images.root
    if images.keypoints is not None and not (images.keypoints[..., 2] > 0).any():
        raise UserError(
            f"No key point of any training image of {name} is visible: restore the file with the key points, or choose "
            "another --parts."
        )
    if images.boxes is None:
        log.warning("%s has no boxes: the cells of its key points cover the full images.", name)
