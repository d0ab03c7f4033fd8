"""Frozen features of a set of images, one row per image: of the full image without augmentation, or of its parts."""

from collections.abc import Callable
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fgfast.data.imageset import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.probe import evaluating
from fgfast.ops.part_pool import part_pool
from fgfast.ranks import Ranks, gather, on_all, ranks_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def extract(
    encoder: Callable[..., Tensor],
    images: ImageSet,
    size: int,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    center: float | None = None,
    threads: int | None = None,
    loader: str = "auto",
    maps: Path | None = None,
    group: "ProcessGroup | None" = None,
    lenient: bool = False,
    stats: InputStats | None = None,
    crops: tuple[Crop, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Features and classes of every image that can be read, in the order of the set.

    A network runs in evaluation mode; then each of its modules returns to its own mode. Broken images have no row.

    Args:
        encoder: maps images [B, 3, S, S] (normalised, on ``device``) to features [B, D].
        images: the images.
        size: side S in pixels.
        batch_size: images per batch.
        device: device of the encoder.
        center: side of a centred square as a fraction of the short side; None takes the full image. Both are resized to
            the square without keeping the aspect ratio.
        threads: decoding threads; None leaves the choice to the loader.
        loader: backend of the loader: "auto", "dali" or "torchvision".
        maps: folder of id maps; ``encoder`` then takes (images, id maps int64 [B, S, S], -1 = absent).
        group: processes that call this at the same time, with equal arguments, and share the work; or None. Batches
            then hold other images, which changes features by roundings.
        lenient: leave out missing images too, and any number of broken ones.
        stats: how images are resized and normalised; None is as the :class:`Backbone` in ``encoder`` takes them, and
            with ImageNet's statistics if there is none.
        crops: random views of each image, the same at every call; ``encoder`` then maps (image, view, view, ...) to
            features [B, D].

    Returns:
        Features float32 [N, D] and classes int64 [N], both on the CPU; of all images, and the same on every rank.

    Raises:
        UserError: no image can be read, or a feature is not finite; in a group on every rank.
    """
    ranks = ranks_of(group, torch.device(device))
    spec = ViewSpec(crops=crops, whole=size, center=center, whole_masks=maps is not None)
    spec = spec.with_stats(stats or stats_of(encoder))
    own = on_all(ranks, lambda: _extract(encoder, images, spec, batch_size, ranks, threads, loader, maps, lenient))
    features, targets, order = (torch.cat(parts) for parts in zip(*gather(ranks, own), strict=True))
    if not len(features):
        raise UserError(f"No image under {images.root} could be read: check the data folder.")
    if not features.isfinite().all():
        raise UserError("The features are not finite: the weights have diverged, use an earlier checkpoint.")
    in_order = order.argsort()
    return features[in_order], targets[in_order]


def extract_rows(
    encoder: Callable[..., Tensor], images: ImageSet, size: int, **options: Any
) -> tuple[Tensor, np.ndarray]:
    """Features of every image that can be read, and the ascending positions of these images in the set, int64 [N].

    Arguments, and what is raised, are those of :func:`extract`.
    """
    features, rows = extract(encoder, replace(images, targets=np.arange(len(images))), size, **options)
    return features, rows.numpy()


def stats_of(encoder: object) -> InputStats:
    """The input statistics of the backbone that a module is or contains; ImageNet's if there is none.

    Example:
        >>> stats_of(nn.Sequential(Backbone("test_resnet"), nn.Flatten())) == stats_of(None)
        True
    """
    modules = encoder.modules() if isinstance(encoder, nn.Module) else ()
    return next((module.stats for module in modules if isinstance(module, Backbone)), IMAGENET)


def _extract(
    encoder: Callable[..., Tensor], images: ImageSet, spec: ViewSpec, batch_size: int, ranks: Ranks,
    threads: int | None, loader: str, maps: Path | None, lenient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Features, classes and positions of this rank's images."""
    device = ranks.device
    own = -(-len(images) // ranks.world)  # an incomplete batch is padded, and the network would see the padding too
    batches = make_loader(
        images, spec, max(1, min(batch_size, own)), shuffle=False, maps=maps, device=str(device), threads=threads,
        rank=ranks.rank, world=ranks.world, backend=loader, lenient=lenient,
    )  # fmt: skip
    rows, targets, order = [], [], []
    with closing(batches), evaluating(encoder) if isinstance(encoder, nn.Module) else nullcontext():
        for batch in batches:
            valid = batch.valid.cpu()
            inputs = [x for x in (batch.whole, batch.whole_labels, *batch.views) if x is not None]
            rows.append(encoder(*inputs).float()[valid.to(device)].cpu())
            targets.append(batch.target.cpu()[valid])
            order.append(batch.index.cpu()[valid])
    return torch.cat(rows), torch.cat(targets), torch.cat(order)


class PartFeatures(nn.Module):
    """The final feature map of an encoder averaged over each part, concatenated; zeros for absent parts.

    Args:
        encoder: the network.
        n_parts: K; ids are 0..K-1, and -1 where there is no part.

    Example:
        >>> features = PartFeatures(Backbone("resnet18", size=64), 5)
        >>> features(torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.int64)).shape
        torch.Size([2, 2560])
    """

    def __init__(self, encoder: Backbone, n_parts: int) -> None:
        super().__init__()
        self.encoder, self.n_parts = encoder, n_parts

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Features [B, K D] of images [B, 3, S, S] with id maps [B, S, S]."""
        size = (images.shape[-2], images.shape[-1])
        features = self.encoder.to_map(self.encoder.features(images), size)
        return part_pool(features, labels, self.n_parts).pooled.flatten(1)
