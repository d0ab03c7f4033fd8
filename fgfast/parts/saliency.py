"""The source of two parts, background and foreground: where the encoder itself looks."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.models.backbone import Backbone
from fgfast.models.probe import evaluating
from fgfast.parts.sources import DiscoveryConfig, Source, read_blocks


class Saliency(Source):
    """Background (0) and foreground (1) by the encoder's own attention, with Otsu's threshold for each image.

    The saliency of a ViT is the attention of CLS in the last block, averaged over all heads (PARTICLE's release takes
    heads 0, 2, 4 and 5, chosen for one network); that of a CNN is the norm of its final feature map. It is resized to
    the id map (bilinear), and a pixel is foreground if it is above the threshold that separates two classes of the
    image's pixels best: the one with the largest variance between the classes.

    Args:
        encoder: the network.
        config: sizes, origin and loader.

    Source: Otsu, "A Threshold Selection Method from Gray-Level Histograms", 1979, from scikit-image.
    """

    n_parts = 2

    def __init__(self, encoder: Backbone, config: DiscoveryConfig) -> None:
        super().__init__(config, encoder)

    encoder: Backbone

    @property
    def settings(self) -> str:
        """The side of the images."""
        return f"saliency, image size {self.config.image_size}"

    def content(self, images: ImageSet) -> dict[str, Any]:
        """The same."""
        return {"source": "saliency", "image_size": self.config.image_size}

    @torch.no_grad()
    def label(self, images: ImageSet, rows: np.ndarray) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield positions and id maps of blocks of images."""
        with evaluating(self.encoder):
            for of_block, whole in read_blocks(images, rows, self.block, self.config, self.device, self.stats):
                yield of_block, foreground(saliency_of(self.encoder, whole), self.side)


@torch.no_grad()
def saliency_of(encoder: Backbone, images: Tensor) -> Tensor:
    """Saliency [B, h, w] of square images [B, 3, S, S] on the grid of the network, at least 0."""
    attention = encoder.attend(images)[1][-1].float().mean(1)  # [B, h w]
    return attention.unflatten(1, (math.isqrt(attention.shape[1]), -1))


def foreground(saliency: Tensor, side: int) -> Tensor:
    """Ids int64 [B, side, side] of saliency [B, h, w]: 1 where it is above Otsu's threshold of the image, else 0."""
    from skimage.filters import threshold_otsu

    resized = torch.nn.functional.interpolate(saliency[:, None], size=(side, side), mode="bilinear")[:, 0].cpu()
    thresholds = [float(threshold_otsu(image)) for image in resized.double().numpy()]
    return (resized.double() > torch.tensor(thresholds, dtype=torch.float64)[:, None, None]).long()
