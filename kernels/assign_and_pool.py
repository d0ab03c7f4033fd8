"""Assignment and pooling together: a step of k-means whose sums, divided, are the pooled features.

Euclidean: one launch reads the features [B, D, h, w] once. Cosine: the sums of the step are those of unit vectors, so
the features are pooled by a second launch, from the labels.
"""

import torch
from torch import Tensor

from fgfast.kernels.common import on_device_of
from fgfast.kernels.kmeans.step import kmeans_step
from fgfast.kernels.part_pool.launch import pool


def assign_and_pool(
    features: Tensor, centroids: Tensor, weight: Tensor | None, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Means [B, K, D], area float32 [B, K] and labels int64 [B, h, w] of features that are not empty."""
    flat = None if weight is None else weight.flatten(1)
    with on_device_of(features):
        labels, sums, area, _ = kmeans_step(features, centroids, flat, metric, "ieee", True)
        labels = labels.view(len(features), *features.shape[2:])
        if metric == "cosine":
            return (*pool(features, labels, centroids.shape[1], weight, True), labels)
        return (sums / torch.where(area > 0, area, 1)[..., None]).to(features.dtype), area, labels
