"""Parts by clustering the pixels of a CNN's features or the keys of a ViT, and the control of fixed grid cells."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.ops.kmeans import KMeansResult, kmeans
from fgfast.ops.part_pool import part_pool

MIN_SALIENCY = 0.065  # mean saliency above which a cluster is foreground in an image
MIN_VOTES = 0.75  # fraction of the images of a group in which a foreground cluster must be foreground
ELBOW = 0.975  # stop adding clusters when one more leaves more than this fraction of the inertia
MAX_GROUP_CLUSTERS = 14  # maximum number of clusters of the first stage


@dataclass(frozen=True)
class ClusteringConfig:
    """How the pixels of an image are clustered.

    Args:
        n_parts: clusters per image (ViT: foreground parts).
        levels: number of feature maps of a CNN in the hypercolumn, from the final one; 1 takes only that one.
        metric: "euclidean", as released, or "cosine", which weights pixels equally and ignores differences of contrast.
        border: boundary connectivity above which a cluster of a CNN is background and becomes -1; 0 keeps all.
        position: variance of the two pixel coordinates that are appended to the hypercolumn of a CNN, relative to the
            variance of the features in the image; makes parts contiguous. Euclidean only.
        first_parts: clusters of a CNN's first stage: those that ``border`` keeps are the foreground, which is then
            clustered alone into ``n_parts``; 0 clusters all pixels into ``n_parts`` at once.
    """

    n_parts: int = 15
    levels: int = 4
    metric: Literal["euclidean", "cosine"] = "euclidean"
    border: float = 0.0
    position: float = 0.0
    first_parts: int = 0

    def check(self) -> None:
        """Raise a UserError for settings that exclude each other."""
        if self.position and self.metric == "cosine":
            raise UserError("--position cannot be combined with --metric cosine: use --metric euclidean.")
        if self.first_parts and not self.border:
            raise UserError("--first-parts needs --border, which says which of them are background: try --border 1.")

    def describe(self) -> str:
        """The settings that differ from the release, for the origin of a folder of maps."""
        changes = [str(self.metric)] if self.metric != "euclidean" else []
        numbers = ("border", "position", "first_parts")
        changes += [f"{name.replace('_', ' ')} {value:g}" for name in numbers if (value := getattr(self, name))]
        return "".join(f", {change}" for change in changes)


PHOTOGRAPHS = ClusteringConfig(n_parts=15, levels=2, border=1.4, position=0.3, first_parts=8)
"""The setting that found the key points and the outlines of birds and pets in photographs best, in
``python -m benchmarks.discovery`` (benchmarks/RESULTS.md, "Discovery on photographs")."""


def check_pixels(clustering: ClusteringConfig, side: int) -> None:
    """Raise a UserError for more clusters than a map of ``side`` x ``side`` has pixels."""
    for option, count in (("--n-parts", clustering.n_parts), ("--first-parts", clustering.first_parts)):
        if count > side**2:
            raise UserError(
                f"{option} {count} is more than the {side} x {side} pixels that are clustered: "
                "give fewer parts or a larger --map-size."
            )


@torch.no_grad()
def cluster_pyramid(
    encoder: Backbone, images: Tensor, config: ClusteringConfig, *, size: int, n_iter: int = 20, seed: int = 0
) -> Tensor:
    """Parts of each image by k-means on its hypercolumns, which are never materialised.

    Args:
        encoder: the CNN (or a ViT; its blocks are then the levels).
        images: images [B, 3, H, W], normalised.
        config: number of parts, levels, metric, border, position, and clusters of a first stage; an image whose
            foreground has fewer pixels than parts is clustered as a whole.
        size: side of the id maps.
        n_iter: maximum number of Lloyd steps.
        seed: seed of the k-means++ starts.

    Returns:
        Labels int64 [B, size, size] in [0, n_parts), -1 for background; ids of different images are unrelated.

    Source: Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained Recognition", 2023.
    """
    return _cluster_pyramid(encoder, images, config, size, n_iter, seed)[0]


@torch.no_grad()
def pyramid_clusters(
    encoder: Backbone, images: Tensor, config: ClusteringConfig, *, size: int, n_iter: int = 20, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """As :func:`cluster_pyramid`, with a vector of each part, float32 [B, K, D].

    It is the centroid of the part less the mean of the centroids of all pixels of the image (with ``first_parts`` of
    its foreground), both without the coordinates of ``position``; NaN for a part without a pixel.
    """
    labels, found = _cluster_pyramid(encoder, images, config, size, n_iter, seed)
    means = found.centroids[..., :-2] if config.position else found.centroids
    fraction = found.counts / found.counts.sum(1, keepdim=True)
    return labels, nan_where_absent(means - torch.einsum("bk,bkd->bd", fraction, means)[:, None], labels)


def _cluster_pyramid(
    encoder: Backbone, images: Tensor, config: ClusteringConfig, size: int, n_iter: int, seed: int
) -> tuple[Tensor, KMeansResult]:
    """The ids of the parts, and the clusters, which take in the two coordinates of ``position``."""
    maps = [m.float() for m in encoder.pyramid(images, config.levels)]
    if config.position:
        maps.append(coordinate_map(maps, config.position))
    cluster = partial(kmeans, maps, size=(size, size), n_iter=n_iter, metric=config.metric, seed=seed)
    found = cluster(config.first_parts or config.n_parts)
    if not config.border:
        return found.labels, found
    labels = remove_background(found.labels, config.first_parts or config.n_parts, config.border)
    if not config.first_parts:
        return labels, found
    foreground = labels >= 0
    few = foreground.sum((1, 2), keepdim=True) < config.n_parts
    found = cluster(config.n_parts, weight=(foreground | few).float())
    return found.labels, found


def nan_where_absent(vectors: Tensor, labels: Tensor) -> Tensor:
    """Vectors [B, K, D] of the parts of id maps [B, H, W] with NaN for parts without a pixel."""
    ids = torch.where(labels < 0, vectors.shape[1], labels).flatten(1)
    area = torch.zeros(len(vectors), vectors.shape[1] + 1, device=vectors.device)
    area.scatter_add_(1, ids, torch.ones_like(ids, dtype=area.dtype))
    return torch.where(area[:, :-1, None] > 0, vectors, torch.nan)


def coordinate_map(maps: list[Tensor], scale: float) -> Tensor:
    """Coordinates of the pixels [B, 2, h, w] as features.

    Args:
        maps: the feature maps [B, D_l, h_l, w_l]; [h, w] is the largest of them.
        scale: variance of the coordinates, relative to the total variance of an image's features.
    """
    variance = torch.stack([m.flatten(2).var(2, correction=0).sum(1) for m in maps]).sum(0)  # [B]
    height, width = max((m.shape[-2], m.shape[-1]) for m in maps)
    axes = [
        torch.linspace(-1, 1, n, device=variance.device) if n > 1 else variance.new_zeros(1) for n in (height, width)
    ]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # [2, h, w]
    unscaled = coordinates.flatten(1).var(1, correction=0).sum().clamp(min=1e-12)
    return (scale * variance / unscaled).sqrt()[:, None, None, None] * coordinates


def remove_background(labels: Tensor, n_parts: int, border: float) -> Tensor:
    """Set the clusters along the border of the image to -1: background often lies there, objects rarely.

    The boundary connectivity of a cluster is (its pixels on the border) / sqrt(its pixels): 4 for a full square image,
    about 1 for a quarter disc in a corner, less for a region with a small part of its outline on the border.

    Args:
        labels: int64 [B, H, W] in [0, n_parts), -1 for none.
        n_parts: K.
        border: connectivity above which a cluster becomes -1, > 0.

    Example:
        >>> labels = torch.zeros(1, 5, 5, dtype=torch.int64)
        >>> labels[0, 1:4, 1:4] = 1
        >>> remove_background(labels, 2, 1.0)[0, 1].tolist()
        [-1, 1, 1, 1, -1]

    Source: Zhu, Liang, Wei, Sun, "Saliency Optimization from Robust Background Detection", CVPR 2014, for clusters
    instead of superpixels.
    """
    on_border = torch.zeros_like(labels, dtype=torch.bool)
    for side in (on_border[:, 0], on_border[:, -1], on_border[:, :, 0], on_border[:, :, -1]):
        side.fill_(True)
    cluster = torch.where(labels < 0, n_parts, labels).flatten(1)  # [B, H W]
    area = torch.zeros(len(labels), n_parts + 1, device=labels.device)
    perimeter = area.scatter_add(1, cluster, on_border.flatten(1).to(area.dtype))
    area = area.scatter_add(1, cluster, torch.ones_like(cluster, dtype=area.dtype))
    background = perimeter > border * area.sqrt()
    return torch.where(background.gather(1, cluster).view_as(labels), -1, labels)


@torch.no_grad()
def cluster_keys(encoder: Backbone, images: Tensor, *, n_parts: int, seed: int = 0) -> Tensor:
    """Parts of each image by cosine k-means on the keys of the last block of a ViT, for use inside a training step.

    Returns:
        Labels int64 [B, h, w] on the patch grid.
    """
    return kmeans(encoder.keys(images).keys.float(), n_parts, n_iter=10, metric="cosine", seed=seed).labels


@torch.no_grad()
def discover_group(
    encoder: Backbone, images: Tensor, *, n_parts: int, stride: int | None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Parts with common ids for a group of images, by two stages of k-means on the keys of a ViT.

    The first stage clusters the normalised keys of the full group; the number of clusters is at the elbow of the
    inertia. A cluster is foreground if its mean saliency (attention of CLS, averaged over heads, scaled to [0, 1] in
    each image) is above 0.065 in at least 75% of the images that contain it. The second stage clusters the foreground
    keys into ``n_parts`` parts. Differences from the authors' release: no dense CRF, as its package no longer builds;
    and the saliency averages all heads, where the release takes heads 0, 2, 4 and 5, chosen for one network.

    Args:
        encoder: a ViT.
        images: the group [G, 3, H, W].
        n_parts: foreground parts.
        stride: stride of the patch embedding; half the patch size in the recipe.
        seed: seed of the starts.

    Returns:
        Labels int64 [G, h, w]: 0 is background, 1..n_parts are parts. With fewer foreground pixels than parts, the full
        images are clustered into parts.
        The mean of the normalised keys of each part less that of its image, float32 [G, n_parts + 1, D]; NaN for the
        background, and for a part without a pixel.
    """
    last = encoder.keys(images, stride=stride)
    keys = torch.nn.functional.normalize(last.keys.float(), dim=1).permute(0, 2, 3, 1)  # [G, h, w, D]
    saliency = last.attention.mean(1)  # [G, h, w]
    low, high = saliency.amin((1, 2), keepdim=True), saliency.amax((1, 2), keepdim=True)
    saliency = (saliency - low) / (high - low).clamp(min=1e-12)

    flat = keys.flatten(0, 2)  # [G h w, D]
    labels = _cluster_to_elbow(flat, seed).view(saliency.shape)
    foreground = torch.zeros_like(labels, dtype=torch.bool)
    for cluster in range(int(labels.max()) + 1):
        inside = labels == cluster
        area = inside.sum((1, 2))
        mean = torch.where(inside, saliency, 0).sum((1, 2)) / area.clamp(min=1)
        present = area > 0
        if present.any() and (mean[present] > MIN_SALIENCY).float().mean() >= MIN_VOTES:
            foreground |= inside
    if int(foreground.sum()) < n_parts:
        foreground = torch.ones_like(foreground)
    parts = kmeans(flat[foreground.flatten()], n_parts, n_iter=50, n_init=3, metric="cosine", seed=seed).labels
    out = torch.zeros_like(labels)
    out[foreground] = parts + 1
    without_background = torch.where(out > 0, out, -1)
    means = part_pool(keys.permute(0, 3, 1, 2), without_background, n_parts + 1).pooled
    return out, nan_where_absent(means - keys.mean((1, 2))[:, None], without_background)


def _cluster_to_elbow(x: Tensor, seed: int) -> Tensor:
    """Labels of vectors [N, D] with the first number of clusters at which one more hardly reduces the inertia."""
    best = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    previous = float("inf")
    for k in range(1, min(MAX_GROUP_CLUSTERS, len(x)) + 1):
        result = kmeans(x, k, n_iter=50, n_init=2, seed=seed)
        inertia = float(result.inertia)
        if inertia > ELBOW * previous:
            break
        best, previous = result.labels, inertia
    return best


def grid_labels(batch: int, cells: int, device: torch.device) -> Tensor:
    """Fixed grid cells of the full image as an id map int64 [batch, cells, cells]: parts independent of the content."""
    return torch.arange(cells * cells, device=device).view(1, cells, cells).expand(batch, -1, -1)
