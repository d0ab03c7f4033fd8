"""Assignment and pooling in one call: the sums of a k-means step, divided by the areas, are the pooled features.

Euclidean: one launch reads the features [B, D, h, w] once. Cosine: the step sums unit vectors, hence a second launch
pools the features by the labels.
"""

import torch
from torch import Tensor

from fgfast.kernels.common import on_device_of
from fgfast.kernels.kmeans.step import kmeans_step
from fgfast.kernels.part_pool.launch import pool


def assign_and_pool(
    features: Tensor, centroids: Tensor, weight: Tensor | None, metric: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Means [B, K, D], area float32 [B, K] and labels int64 [B, h, w]; the features must not be empty."""
    flat = None if weight is None else weight.flatten(1)
    with on_device_of(features):
        labels, sums, area, _ = kmeans_step(features, centroids, flat, metric, "ieee", True)
        labels = labels.view(len(features), *features.shape[2:])
        if metric == "cosine":
            return (*pool(features, labels, centroids.shape[1], weight, True), labels)
        return (sums / torch.where(area > 0, area, 1)[..., None]).to(features.dtype), area, labels
