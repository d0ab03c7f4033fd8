"""The source of DetCon's masks: segments of even colour, found without a network."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.parts.sources import DiscoveryConfig, Source, read_blocks

SCALE = 1000.0  # DetCon's scale and least segment in pixels, for images of
SIDE = 224
MOST = 254  # segments of an id map


class Segments(Source):
    """Segments of even colour by the algorithm of Felzenszwalb and Huttenlocher, from scikit-image.

    DetCon takes scale 1000 and segments of at least 1000 pixels for images of 224 x 224. Both count pixels, so for
    images of side S they become 1000 (S / 224)^2: no image has more than 50 segments. Ids go from the largest segment
    to the smallest; segments beyond ``n_parts`` belong to no part.

    Args:
        n_parts: number of segments of an image that are kept, at most.
        config: sizes, origin and loader.
        scale: scale and least number of pixels of a segment, for images of 224 x 224.
        device: the device of the ranks.

    Source: Felzenszwalb and Huttenlocher, "Efficient Graph-Based Image Segmentation", 2004; Henaff et al., "Efficient
    Visual Pretraining with Contrastive Detection", 2021.
    """

    def __init__(
        self, n_parts: int, config: DiscoveryConfig, scale: float = SCALE, device: torch.device | None = None
    ) -> None:
        super().__init__(config, device=device)
        self.n_parts, self.scale = n_parts, scale

    @property
    def settings(self) -> str:
        """The number of parts, the scale and the side of the images."""
        return f"segments {self.n_parts}, scale {self.scale:g}, image size {self.config.image_size}"

    def content(self, images: ImageSet) -> dict[str, Any]:
        """The same."""
        size = self.config.image_size
        return {"source": "felzenszwalb", "n_parts": self.n_parts, "scale": self.scale, "image_size": size}

    def label(self, images: ImageSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield positions and id maps of blocks of images."""
        for of_block, whole in read_blocks(images, rows, self.block, self.config, self.device, self.stats):
            maps = np.stack([segment(image, self.n_parts, self.scale) for image in whole])
            nearest = np.arange(self.side) * maps.shape[1] // self.side
            yield of_block, torch.from_numpy(maps[:, nearest][:, :, nearest])


def segment(image: Tensor, n_parts: int, scale: float = SCALE) -> np.ndarray:
    """Segments of a square image by size, int64 [S, S]: 0 is the largest, -1 those beyond ``n_parts``.

    Args:
        image: float [3, S, S] in [0, 1].
        n_parts: segments to keep.
        scale: scale and least segment in pixels, for S = 224.
    """
    from skimage.segmentation import felzenszwalb

    pixels = image.permute(1, 2, 0).double().cpu().numpy()
    scale = scale * (len(pixels) / SIDE) ** 2
    found = felzenszwalb(pixels, scale=scale, min_size=math.ceil(scale))
    order = np.argsort(-np.bincount(found.ravel()), kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return np.where(rank < n_parts, rank, -1)[found]


def most_segments(scale: float = SCALE) -> int:
    """The largest number of segments of an image, at most the 254 of an id map.

    Example:
        >>> most_segments()
        50
    """
    return max(2, min(MOST, int(SIDE**2 / scale)))
