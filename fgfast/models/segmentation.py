"""Networks for segmentation: an encoder and a light decoder that doubles the side of its map three times."""

import torch.nn.functional as F
from torch import Tensor, nn

from fgfast.models.backbone import Backbone
from fgfast.models.probe import evaluating, probe_image

WIDTHS = (256, 128, 64)  # channels after each block of the decoder


class SegmentationDecoder(nn.Module):
    """Logits on a grid of 8 times the side: three blocks that double the side, then a 1x1 convolution.

    A block is [bilinear x2, convolution, BatchNorm, ReLU, further convolutions with BatchNorm and ReLU]. It differs
    from the blocks of :class:`~fgfast.models.decoder.Decoder`, which normalise within an image and have shortcuts.

    Args:
        dim: channels of the map.
        n_classes: C.
        kernels: side of the kernel of each convolution of a block, odd: (1,) for a CNN, (3, 3) for a ViT.

    Example:
        >>> import torch
        >>> SegmentationDecoder(16, 5)(torch.zeros(2, 16, 3, 4)).shape
        torch.Size([2, 5, 24, 32])

    Source: the decoders of Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained
    Recognition", 2023. Differences: bilinear resizing does not align corners, so that a cell lies over the pixels that
    it came from; convolutions before a BatchNorm have no bias, which it would cancel.
    """

    def __init__(self, dim: int, n_classes: int, kernels: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in WIDTHS:
            for i, kernel in enumerate(kernels):
                double = [nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)] if i == 0 else []
                convolution = nn.Conv2d(dim, width, kernel, padding=kernel // 2, bias=False)
                # A 1x1 convolution commutes with the resizing, and before it has a quarter of the cells.
                layers += [convolution, *double] if kernel == 1 else [*double, convolution]
                layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
                dim = width
        self.layers = nn.Sequential(*layers, nn.Conv2d(dim, n_classes, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, C, 8 h, 8 w] of a map [B, dim, h, w]."""
        return self.layers(features)


class Segmenter(nn.Module):
    """An encoder with a segmentation decoder: class logits at the resolution of the images.

    A CNN gives its final feature map. A ViT gives the keys of the first head of its last block and nothing else, as in
    the release of PARTICLE: the weights behind those keys are not trained.

    Args:
        encoder: the network; it is used, not copied.
        n_classes: C.
        size: side of the images in pixels for which the encoder is probed; it also takes others.

    Raises:
        UserError: the encoder is a ViT whose keys cannot be read, or has no map.

    Example:
        >>> import torch
        >>> Segmenter(Backbone("test_resnet", size=32), 3, size=32)(torch.zeros(2, 3, 48, 48)).shape
        torch.Size([2, 3, 48, 48])
    """

    def __init__(self, encoder: Backbone, n_classes: int, size: int) -> None:
        super().__init__()
        self.encoder = encoder
        if encoder.is_vit:
            self.width = _head_width(encoder, size)
            self.decoder = SegmentationDecoder(self.width, n_classes, kernels=(3, 3))
        else:
            encoder.map_side(size)
            self.width = encoder.map_dim
            self.decoder = SegmentationDecoder(self.width, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C, H, W] of images [B, 3, H, W]."""
        size = (images.shape[-2], images.shape[-1])
        if self.encoder.is_vit:
            features = self.encoder.keys(images).keys[:, : self.width]
        else:
            features = self.encoder.to_map(self.encoder.features(images), size)
        logits = self.decoder(features)
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _head_width(encoder: Backbone, size: int) -> int:
    """Channels of the keys of one head; those of the first head come first in the keys of all."""
    with evaluating(encoder):
        keys, attention = encoder.keys(probe_image(encoder.net, size))
    return keys.shape[1] // attention.shape[1]
