"""Discovery: the id map of every image of a set, in three steps: open the folder, label the images, write the maps."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fgfast.claim import claim_folder
from fgfast.data.imageset import ImageSet
from fgfast.data.loader import make_loader
from fgfast.data.maps import map_path, read_maps_info, save_maps, write_maps_info
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig, check_pixels, cluster_pyramid, discover_group

BATCH = 32  # images that a CNN labels at once; each is clustered separately
GROUP = 30  # images that a ViT clusters together, with common ids
STARTED = "begun.json"  # marks a folder whose maps are incomplete


class DiscoveryConfig(NamedTuple):
    """How the id maps of a set are made, apart from the clustering.

    Args:
        image_size: side to which the images are resized, ignoring their aspect ratio.
        map_size: side of the id maps of a CNN; those of a ViT have the size of its grid of keys.
        run: origin of the maps, for maps.json.
        seed: seed of the k-means starts.
        threads: threads of the loader.
        loader: backend of the loader.
    """

    image_size: int
    map_size: int
    run: str
    seed: int = 0
    threads: int = 2
    loader: str = "auto"


class Origin(NamedTuple):
    """Identifies how the maps of a folder were made; the content of begun.json, and in part of maps.json."""

    run: str
    n_parts: int
    map_size: int


def discover(
    encoder: Backbone, images: ImageSet, out: Path, clustering: ClusteringConfig, config: DiscoveryConfig
) -> Path:
    """Write the id map of every image of a set; CNNs by :func:`cluster_pyramid`, ViTs by :func:`discover_group`.

    Args:
        encoder: the network whose features are clustered, on its device; it runs in evaluation mode.
        images: the images.
        out: folder of maps to write. After an interruption a CNN continues where it stopped, a ViT starts over, as
            its ids are common to a group of images; a complete folder is not changed.
        clustering: number of parts (maps of a ViT have one more id, for the background), levels, metric, border.
        config: sizes, origin, seed and loader.

    Returns:
        ``out``.

    Raises:
        UserError: the folder holds maps of other weights or settings, or there are fewer pixels than clusters.
    """
    origin = describe_origin(encoder, clustering, config)
    if not _is_complete(out, origin):
        with claim_folder(out):
            unlabelled = open_maps(out, images, origin, resume=not encoder.is_vit)
            if unlabelled is not None:
                write_maps(out, label_images(encoder, unlabelled, clustering, config), origin)
    return out


def describe_origin(encoder: Backbone, clustering: ClusteringConfig, config: DiscoveryConfig) -> Origin:
    """Check the settings and describe the maps that they give.

    Raises:
        UserError: the images cannot be clustered with these settings.
    """
    c = config
    run = f"{c.run}, weights {_digest(encoder)}, image size {c.image_size}, levels {clustering.levels}, seed {c.seed}"
    if encoder.is_vit:
        return Origin(run, clustering.n_parts + 1, c.map_size)
    clustering.check()
    check_pixels(clustering.n_parts, c.map_size)
    return Origin(run + clustering.describe(), clustering.n_parts, c.map_size)


def open_maps(out: Path, images: ImageSet, origin: Origin, *, resume: bool) -> ImageSet | None:
    """Open a folder of maps for writing.

    Args:
        out: the folder; created if it is missing.
        images: the images to label.
        origin: origin of the maps to write.
        resume: keep the maps of an interrupted call with the same origin.

    Returns:
        The images that still need a map; None if the folder is complete.

    Raises:
        UserError: the folder is complete and has another origin.
    """
    if _is_complete(out, origin):
        return None
    started, content = out / STARTED, json.dumps(origin._asdict())
    if resume and started.is_file() and started.read_text() == content:
        images = images.subset([i for i, path in enumerate(images.paths) if not map_path(out, path).is_file()])
    write_atomic(started, lambda p: p.write_text(content))
    return images


def _is_complete(out: Path, origin: Origin) -> bool:
    if not (out / "maps.json").is_file():
        return False
    info = read_maps_info(out)
    if (info["run"], info["n_parts"]) == (origin.run, origin.n_parts):
        return True
    raise UserError(f"{out} already holds maps of {info['run']}: give another --out, or remove it.")


def label_images(
    encoder: Backbone, images: ImageSet, clustering: ClusteringConfig, config: DiscoveryConfig
) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the relative paths and id maps, int64 [B, h, w], of batches of images."""
    if not len(images):
        return
    device = next(encoder.parameters()).device
    batches = make_loader(
        images, ViewSpec(whole=config.image_size), GROUP if encoder.is_vit else BATCH, shuffle=False, device=device,
        threads=config.threads, backend=config.loader,
    )  # fmt: skip
    was_training = encoder.training
    encoder.eval()
    try:
        for batch in batches:
            assert batch.whole is not None  # the specification asks for it
            whole = batch.whole[batch.valid]
            if encoder.is_vit:
                stride = max(1, encoder.patch // 2)
                labels = discover_group(encoder, whole, n_parts=clustering.n_parts, stride=stride, seed=config.seed)
            else:
                labels = cluster_pyramid(encoder, whole, clustering, size=config.map_size, seed=config.seed)
            yield [images.paths[i] for i in batch.index[batch.valid].tolist()], labels
    finally:
        encoder.train(was_training)
        batches.close()


def write_maps(out: Path, batches: Iterable[tuple[list[str], Tensor]], origin: Origin) -> None:
    """Save batches of id maps, then mark the folder as complete with maps.json."""
    size = (origin.map_size, origin.map_size)
    for paths, labels in batches:
        save_maps(out, paths, labels.to(torch.uint8).cpu().numpy())
        size = (labels.shape[1], labels.shape[2])
    write_maps_info(out, n_parts=origin.n_parts, size=size, run=origin.run)
    (out / STARTED).unlink()


def _digest(encoder: Backbone) -> str:
    """Twelve hexadecimal digits of a hash of the weights."""
    digest = hashlib.sha256()
    for tensor in encoder.net.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
