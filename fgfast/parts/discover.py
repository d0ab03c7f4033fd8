"""Discovery: the id map of every image of a set, in three steps: open the folder, label the images, write the maps."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fgfast.claim import claim_folder
from fgfast.data.imageset import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.maps import save_maps
from fgfast.data.views import ViewSpec
from fgfast.files import digest_of
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig, check_pixels, cluster_pyramid, discover_group
from fgfast.parts.folder import FORMAT, STARTED, Origin, close_maps, is_complete, open_maps, weights_digest
from fgfast.ranks import on_all, on_first, ranks_of, share_first

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["STARTED", "DiscoveryConfig", "describe_origin", "discover", "is_complete", "label_images"]

BATCH = 32  # images that a CNN labels at once; each is clustered separately
GROUP = 30  # images that a ViT clusters together, with common ids


class DiscoveryConfig(NamedTuple):
    """How the id maps of a set are made, apart from the clustering.

    Args:
        image_size: side to which the images are resized, ignoring their aspect ratio.
        map_size: side of the id maps of a CNN; those of a ViT have the size of its grid of keys.
        run: origin of the maps, for maps.json.
        seed: seed of the k-means starts.
        threads: threads of the loader.
        loader: backend of the loader.
        network: options of the network beside its weights, such as its --model and --model-args.
    """

    image_size: int
    map_size: int
    run: str
    seed: int = 0
    threads: int = 2
    loader: str = "auto"
    network: str = ""


def discover(
    encoder: Backbone, images: ImageSet, out: Path, clustering: ClusteringConfig, config: DiscoveryConfig, *,
    group: "ProcessGroup | None" = None, own: bool = False,
) -> Path:  # fmt: skip
    """Write the id map of every image of a set; CNNs by :func:`cluster_pyramid`, ViTs by :func:`discover_group`.

    The maps are the same for any number of ranks, and whether or not the work was interrupted: the images are labelled
    in blocks, which depend on the position of the image in the set only.

    Args:
        encoder: the network whose features are clustered, on its device; it runs in evaluation mode.
        images: the images.
        out: folder of maps to write. Maps that are there are kept if they are whole and of these weights, images and
            settings; of a ViT only if all of their block are, as the ids are common to it.
        clustering: number of parts (maps of a ViT have one more id, for the background), levels, metric, border.
        config: sizes, origin, seed and loader.
        group: processes that call this at the same time, with equal arguments, and share the work; or None.
        own: the folder is one of a run: maps of other weights, images or settings are made again instead of refused,
            and lost images are skipped.

    Returns:
        ``out``.

    Raises:
        UserError: the folder holds maps of other weights, images or settings, or there are fewer pixels than clusters.
    """
    ranks = ranks_of(group, next(encoder.parameters()).device)
    origin = describe_origin(encoder, images, clustering, config)
    if share_first(ranks, lambda: is_complete(out, images, origin)):
        return out
    with ExitStack() as stack:
        on_first(ranks, lambda: stack.enter_context(claim_folder(out)))
        needed = share_first(ranks, lambda: open_maps(out, images, origin, own=own))
        if needed is None:
            return out
        blocks = np.unique(np.flatnonzero(needed) // origin.block)[ranks.rank :: ranks.world]
        rows = np.flatnonzero(np.isin(np.arange(len(images)) // origin.block, blocks))

        def write() -> None:
            for of_block, labels in label_images(encoder, images, rows, clustering, config):
                kept = needed[of_block]
                paths = [images.paths[row] for row in of_block[kept]]
                save_maps(out, paths, labels.to(torch.uint8).cpu().numpy()[kept])

        on_all(ranks, write)
        on_first(ranks, lambda: close_maps(out, origin))
    return out


def describe_origin(
    encoder: Backbone, images: ImageSet, clustering: ClusteringConfig, config: DiscoveryConfig, weights: str = ""
) -> Origin:
    """Check the settings and describe the maps that they give.

    Args:
        encoder: the network.
        images: the images.
        clustering: how they are clustered.
        config: sizes, origin and seed.
        weights: :func:`weights_digest` of the network's weights if they are not those of now.

    Raises:
        UserError: the images cannot be clustered with these settings.
    """
    c, weights, vit = config, weights or weights_digest(encoder.net), encoder.is_vit
    run = f"{c.run}, weights {weights[:12]}, image size {c.image_size}, levels {clustering.levels}, seed {c.seed}"
    if vit:
        side = (c.image_size - encoder.patch) // _stride(encoder) + 1
    else:
        clustering.check()
        check_pixels(clustering.n_parts, c.map_size)
        run, side = run + clustering.describe(), c.map_size
    content = {
        "format": FORMAT, "weights": weights, "network": [encoder.name, encoder.grey, c.network],
        "images": digest_of([images.banner, *images.paths]),
        "clustering": {"n_parts": clustering.n_parts, "group": GROUP} if vit else asdict(clustering),
        "image_size": c.image_size, "side": side, "seed": c.seed,
    }  # fmt: skip
    return Origin(run, clustering.n_parts + vit, side, digest_of(content), GROUP if vit else BATCH, vit)


def label_images(
    encoder: Backbone, images: ImageSet, rows: np.ndarray, clustering: ClusteringConfig, config: DiscoveryConfig
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the positions [B] and id maps, int64 [B, h, w], of blocks of images; unreadable ones are left out.

    Args:
        encoder: the network.
        images: the images.
        rows: ascending positions of those to label.
        clustering: how they are clustered.
        config: sizes, seed and loader.
    """
    device = next(encoder.parameters()).device
    was_training = encoder.training
    encoder.eval()
    try:
        for of_block, whole in _read_blocks(images, rows, GROUP if encoder.is_vit else BATCH, config, device):
            if encoder.is_vit:
                stride = _stride(encoder)
                labels = discover_group(encoder, whole, n_parts=clustering.n_parts, stride=stride, seed=config.seed)
            else:
                labels = cluster_pyramid(encoder, whole, clustering, size=config.map_size, seed=config.seed)
            yield of_block, labels
    finally:
        encoder.train(was_training)


def _read_blocks(
    images: ImageSet, rows: np.ndarray, size: int, config: DiscoveryConfig, device: torch.device
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Yield the positions and the full images [B, 3, H, W] of blocks of ``size`` consecutive images of a set."""
    if not len(rows):
        return
    batches = make_loader(
        images.subset(rows), ViewSpec(whole=config.image_size), size, shuffle=False, device=device,
        threads=config.threads, backend=config.loader,
    )  # fmt: skip
    read: list[tuple[int, Tensor]] = []

    def block() -> tuple[np.ndarray, Tensor]:
        return np.array([row for row, _ in read]), torch.stack([image for _, image in read])

    try:
        for batch in batches:
            assert batch.whole is not None  # the specification asks for it
            for row, image in zip(rows[batch.index[batch.valid].cpu().numpy()], batch.whole[batch.valid], strict=True):
                if read and read[-1][0] // size != row // size:
                    yield block()
                    read.clear()
                read.append((int(row), image))
    finally:
        batches.close()
    if read:
        yield block()


def _stride(encoder: Backbone) -> int:
    """Stride of the patch embedding of a ViT: half a patch, as in the recipe."""
    return max(1, encoder.patch // 2)
