"""Assignment and pooling in plain PyTorch: the definition that every backend is tested against."""

from torch import Tensor

from fgfast.reference.kmeans import kmeans_step
from fgfast.reference.part_pool import part_pool


def assign_and_pool(
    features: Tensor, centroids: Tensor, weight: Tensor | None = None, metric: str = "euclidean"
) -> tuple[Tensor, Tensor, Tensor]:
    """Label each pixel of [B, N, D] with its nearest centroid of [B, K, D], then take the mean of each part.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[0.0], [1.0], [9.0]]])
        >>> pooled, _, labels = assign_and_pool(x, torch.tensor([[[0.0], [8.0]]]))
        >>> pooled.tolist(), labels.tolist()
        ([[[0.5], [9.0]]], [[0, 0, 1]])
    """
    labels = kmeans_step(features.detach(), centroids.detach(), weight=weight, metric=metric)[0]
    pooled, area = part_pool(features, labels, centroids.shape[1], weight)
    return pooled, area, labels
