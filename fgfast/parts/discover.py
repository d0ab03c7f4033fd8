"""Discovery: the id map of every image of a set, in three steps: open the folder, label the images, write the maps."""

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fgfast.claim import claim_folder
from fgfast.data.imageset import ImageSet
from fgfast.data.maps import save_maps
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.clusters import Clusters
from fgfast.parts.folder import STARTED, close_maps, is_complete, open_maps, read_centroids, save_centroids
from fgfast.parts.sources import DiscoveryConfig, Source
from fgfast.ranks import on_all, on_first, ranks_of, share_first

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["STARTED", "DiscoveryConfig", "discover", "write_maps"]


def discover(
    encoder: Backbone, images: ImageSet, out: Path, clustering: ClusteringConfig, config: DiscoveryConfig, *,
    shared: bool = False, group: "ProcessGroup | None" = None, own: bool = False,
) -> Path:  # fmt: skip
    """Write the id map of every image of a set; see :class:`Clusters` and :func:`write_maps`."""
    return write_maps(Clusters(encoder, clustering, config, shared=shared), images, out, group=group, own=own)


def write_maps(
    source: Source, images: ImageSet, out: Path, *, group: "ProcessGroup | None" = None, own: bool = False
) -> Path:
    """Write the id map of every image of a set.

    The maps are the same for any number of ranks, and whether or not the work was interrupted: the images are labelled
    in blocks, which depend on the position of the image in the set only. What a source with shared ids has learned from
    the set is kept beside the maps; if it is lost while maps are missing, all are made again.

    Args:
        source: what labels the images; its network runs in evaluation mode.
        images: the images.
        out: folder of maps to write. Maps that are there are kept if they are whole and of these weights, images and
            settings; of a block with common ids only if all of them are.
        group: processes that call this at the same time, with equal arguments, and share the work; or None.
        own: the folder is one of a run: maps of other weights, images or settings are made again instead of refused,
            and lost images are skipped.

    Returns:
        ``out``.

    Raises:
        UserError: the folder holds maps of other weights, images or settings, or the images cannot be labelled.
    """
    ranks = ranks_of(group, source.device)
    origin = source.origin(images)
    if share_first(ranks, lambda: is_complete(out, images, origin)):
        return out
    with ExitStack() as stack:
        on_first(ranks, lambda: stack.enter_context(claim_folder(out)))
        if source.shared:
            source.centroids = share_first(ranks, lambda: read_centroids(out, origin.digest))
        again = source.shared and source.centroids is None
        needed = share_first(ranks, lambda: open_maps(out, images, origin, own=own, again=again))
        if needed is None:
            return out
        if again:
            source.fit(images, group)
            assert source.centroids is not None  # fit() has set them
            on_first(ranks, partial(save_centroids, out, origin, source.centroids))
        blocks = np.unique(np.flatnonzero(needed) // origin.block)[ranks.rank :: ranks.world]
        rows = np.flatnonzero(np.isin(np.arange(len(images)) // origin.block, blocks))

        def write() -> None:
            for of_block, labels in source.label(images, rows):
                kept = needed[of_block]
                paths = [images.paths[row] for row in of_block[kept]]
                save_maps(out, paths, labels.to(torch.uint8).cpu().numpy()[kept])

        on_all(ranks, write)
        on_first(ranks, lambda: close_maps(out, origin))
    return out
