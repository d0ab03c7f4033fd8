"""An encoder with an attention map over its final feature map, by which its features are weighted."""

from typing import Any

import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone


class RationaleEncoder(Backbone):
    r"""A CNN whose features may be weighted by an attention map A in place of the plain average over positions.

    .. math:: a = \max_k \text{ReLU}(\text{BN}(\text{conv}_{1 \times 1}(F)))_k, \qquad
              A = \frac{a - \min a}{\max a - \min a}, \qquad r = \text{mean}_{hw}(A F),

    F the final map [D, h, w], minimum and maximum over the positions of each image (see :func:`scale_to_unit`). Its
    ``net`` is the plain network.

    Args:
        name: as for :class:`Backbone`, which takes the other options too.
        channels: channels of the convolution.
        weighted: whether the features are weighted.
        size: side of the images in training.
        options: further options of :class:`Backbone`.

    Raises:
        UserError: the network has no feature map of at least two positions that it pools.

    Example:
        >>> encoder = RationaleEncoder("test_resnet", size=64)
        >>> encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.dim)
        True

    Source: Shu, van den Hengel, Liu, "Learning Common Rationale to Improve Self-Supervised Representation for
    Fine-Grained Visual Recognition Problems", CVPR 2023.
    """

    def __init__(self, name: str, *, channels: int = 32, weighted: bool = True, size: int = 64, **options: Any) -> None:
        super().__init__(name, size=size, **options)
        self.weighted = weighted
        if self.is_vit:
            raise UserError(
                f"{name} pools no feature map, over which attention could be: choose a CNN such as resnet18."
            )
        if self.map_side(size) < 2:
            raise UserError(
                f"The feature map of {name} at --size {size} has one position, and no attention over it: give a larger "
                "--size, or output_stride in --model-args."
            )
        self.rationale = nn.Sequential(
            nn.Conv2d(self.map_dim, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        )

    def attention(self, features: Tensor) -> Tensor:
        """Attention float32 [B, h, w] in [0, 1] over the maps [B, D, h, w] of :meth:`features`."""
        return scale_to_unit(self.rationale(features).float().amax(1))

    def forward(self, x: Tensor) -> Tensor:
        """Pooled features [B, D] of images [B, 3, S, S], weighted by the attention if ``weighted``."""
        features = self.features(x)
        if self.weighted:
            features = features * self.attention(features)[:, None].to(features.dtype)
        return self.pool(features)


def scale_to_unit(maps: Tensor) -> Tensor:
    """Scale maps [B, h, w] to [0, 1], each by its own minimum and maximum; a constant map becomes 1, without gradient.

    Example:
        >>> scale_to_unit(torch.tensor([[[2.0, 4.0, 3.0]], [[5.0, 5.0, 5.0]]])).tolist()
        [[[0.0, 1.0, 0.5]], [[1.0, 1.0, 1.0]]]
    """
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    varied = high > low
    return torch.where(varied, (maps - low) / torch.where(varied, high - low, 1), 1)
