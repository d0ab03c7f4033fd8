"""Parts by clustering: pixels of a CNN or a ViT, and the controls (fixed cells, random ids)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.ops.kmeans import kmeans

SALIENCY = 0.065  # mean saliency over which a cluster is foreground in an image
VOTES = 0.75  # share of the images of a group that must call a cluster foreground
ELBOW = 0.975  # stop when one more cluster keeps more than this share of the inertia
STAGE1 = 14  # most clusters of stage one


@dataclass(frozen=True)
class ClusteringConfig:
    """How the pixels of an image are clustered.

    Args:
        n_parts: clusters an image (ViT: foreground parts).
        levels: last maps of a CNN that the hypercolumn takes; 1 is the last map alone.
        metric: "euclidean", as released, or "cosine", which weighs pixels alike and hides differences of contrast.
        border: boundary connectivity over which a cluster of a CNN is background and becomes -1; 0 keeps all.
        position: variance of the two coordinates of a pixel that join the hypercolumn of a CNN, in units of the
            variance of its features in the image; parts then hang together. Euclidean only.
    """

    n_parts: int = 15
    levels: int = 4
    metric: Literal["euclidean", "cosine"] = "euclidean"
    border: float = 0.0
    position: float = 0.0

    def check(self) -> None:
        """Raise a UserError for what cannot be clustered that way."""
        if self.position and self.metric == "cosine":
            raise UserError("Coordinates have no direction to compare: give --position with --metric euclidean.")

    def describe(self) -> str:
        """What is not as released, for the record of a folder of maps."""
        changes = [str(self.metric)] if self.metric != "euclidean" else []
        changes += [f"{name} {value:g}" for name in ("border", "position") if (value := getattr(self, name))]
        return "".join(f", {change}" for change in changes)


def check_pixels(n_parts: int, side: int) -> None:
    """Raise a UserError for more clusters than a map of ``side`` has pixels."""
    if n_parts > side**2:
        raise UserError(
            f"--n-parts {n_parts} is more than the {side} x {side} pixels that are clustered: "
            "give fewer parts or a larger --map-size."
        )


@torch.no_grad()
def cluster_pyramid(
    encoder: Backbone, images: Tensor, config: ClusteringConfig, *, size: int, n_iter: int = 20, seed: int = 0
) -> Tensor:
    """Parts of each image by k-means of its hypercolumns, which are never built.

    Args:
        encoder: the CNN (or ViT, whose blocks are then the levels).
        images: images [B, 3, H, W], normalised.
        how: number of parts, levels, metric, border.
        size: side of the id maps.
        n_iter: most Lloyd steps.
        seed: seed of the k-means++ starts.

    Returns:
        Labels int64 [B, size, size] in [0, n_parts), -1 for background; they mean nothing across images.

    Source: Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained Recognition", 2023.
    """
    maps = [m.float() for m in encoder.pyramid(images, config.levels)]
    if config.position:
        maps.append(_coordinates(maps, config.position))
    labels = kmeans(maps, config.n_parts, size=(size, size), n_iter=n_iter, metric=config.metric, seed=seed).labels
    return without_background(labels, config.n_parts, config.border) if config.border else labels


def _coordinates(maps: list[Tensor], share: float) -> Tensor:
    """Coordinates of the pixels [B, 2, h, w], with ``share`` of the variance that the features of an image have."""
    variance = torch.stack([m.flatten(2).var(2, correction=0).sum(1) for m in maps]).sum(0)  # [B]
    height, width = max((m.shape[-2], m.shape[-1]) for m in maps)
    axes = [
        torch.linspace(-1, 1, n, device=variance.device) if n > 1 else variance.new_zeros(1) for n in (height, width)
    ]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij"))  # [2, h, w]
    own = place.flatten(1).var(1, correction=0).sum().clamp(min=1e-12)
    return (share * variance / own).sqrt()[:, None, None, None] * place


def without_background(labels: Tensor, n_parts: int, border: float) -> Tensor:
    """Take out the clusters that lie along the border of the image, as backgrounds do and objects seldom.

    A cluster's boundary connectivity is (its pixels on the border) / sqrt(its pixels): 4 for the whole of a square
    image, about 1 for a quarter disc in a corner, less for what touches the border with a small part of its outline.

    Args:
        labels: int64 [B, H, W] in [0, n_parts), -1 for none.
        n_parts: K.
        border: connectivity over which a cluster becomes -1, above 0.

    Example:
        >>> labels = torch.zeros(1, 5, 5, dtype=torch.int64)
        >>> labels[0, 1:4, 1:4] = 1
        >>> without_background(labels, 2, 1.0)[0, 1].tolist()
        [-1, 1, 1, 1, -1]

    Source: Zhu, Liang, Wei, Sun, "Saliency Optimization from Robust Background Detection", CVPR 2014, for clusters
    instead of superpixels.
    """
    edge = torch.zeros_like(labels, dtype=torch.bool)
    edge[:, 0], edge[:, -1], edge[:, :, 0], edge[:, :, -1] = True, True, True, True
    cluster = torch.where(labels < 0, n_parts, labels).flatten(1)  # [B, H W]
    area = torch.zeros(len(labels), n_parts + 1, device=labels.device)
    along = area.scatter_add(1, cluster, edge.flatten(1).to(area.dtype))
    area = area.scatter_add(1, cluster, torch.ones_like(cluster, dtype=area.dtype))
    background = along > border * area.sqrt()
    return torch.where(background.gather(1, cluster).view_as(labels), -1, labels)


@torch.no_grad()
def cluster_keys(encoder: Backbone, images: Tensor, *, n_parts: int, seed: int = 0) -> Tensor:
    """Parts of each image by cosine k-means of its last keys: the ViT's parts inside a training step.

    Returns:
        Labels int64 [B, h, w] on the patch grid.
    """
    return kmeans(encoder.keys(images).keys.float(), n_parts, n_iter=10, metric="cosine", seed=seed).labels


@torch.no_grad()
def discover_group(encoder: Backbone, images: Tensor, *, n_parts: int, stride: int | None, seed: int = 0) -> Tensor:
    """Parts that a group of images shares, by two stages of k-means on the keys of a ViT.

    Stage one clusters the normalised keys of the whole group with the smallest number of clusters at the elbow of
    the inertia. A cluster is foreground when its mean saliency (attention of CLS, averaged over heads, scaled to
    [0, 1] in each image) is over 0.065 in at least 75% of the images that hold it. Stage two clusters the
    foreground keys into ``n_parts`` parts. The dense CRF of the authors' release is left out, as its package no longer
    builds; its saliency takes heads 0, 2, 4 and 5, chosen for one network, where all heads are averaged here.

    Args:
        encoder: a ViT.
        images: the group [G, 3, H, W].
        n_parts: foreground parts.
        stride: stride of the patch embedding; half the patch size in the recipe.
        seed: seed of the starts.

    Returns:
        Labels int64 [G, h, w]: 0 is background, 1..n_parts are parts. No foreground gives parts of the whole.
    """
    found = encoder.keys(images, stride=stride)
    keys = torch.nn.functional.normalize(found.keys.float(), dim=1).permute(0, 2, 3, 1)  # [G, h, w, D]
    saliency = found.attention.mean(1)  # [G, h, w]
    low, high = saliency.amin((1, 2), keepdim=True), saliency.amax((1, 2), keepdim=True)
    saliency = (saliency - low) / (high - low).clamp(min=1e-12)

    flat = keys.flatten(0, 2)  # [G h w, D]
    first = _elbow(flat, seed)
    labels = first.view(saliency.shape)
    foreground = torch.zeros_like(labels, dtype=torch.bool)
    for cluster in range(int(labels.max()) + 1):
        inside = labels == cluster
        area = inside.sum((1, 2))
        mean = torch.where(inside, saliency, 0).sum((1, 2)) / area.clamp(min=1)
        here = area > 0
        if here.any() and (mean[here] > SALIENCY).float().mean() >= VOTES:
            foreground |= inside
    if int(foreground.sum()) < n_parts:
        foreground = torch.ones_like(foreground)
    parts = kmeans(flat[foreground.flatten()], n_parts, n_iter=50, n_init=3, metric="cosine", seed=seed).labels
    out = torch.zeros_like(labels)
    out[foreground] = parts + 1
    return out


def _elbow(x: Tensor, seed: int) -> Tensor:
    """Labels of rows [N, D] with the first number of clusters after which one more hardly helps."""
    best = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    before = float("inf")
    for k in range(1, min(STAGE1, len(x)) + 1):
        result = kmeans(x, k, n_iter=50, n_init=2, seed=seed)
        inertia = float(result.inertia)
        if inertia > ELBOW * before:
            break
        best, before = result.labels, inertia
    return best


def grid_labels(batch: int, cells: int, device: torch.device) -> Tensor:
    """Fixed cells of the whole image as an id map int64 [batch, cells, cells]: the control without any content."""
    return torch.arange(cells * cells, device=device).view(1, cells, cells).expand(batch, -1, -1)
