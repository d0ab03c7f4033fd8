"""Id maps of a whole set: open the folder of maps, label every image, write."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig, check_pixels, cluster_pyramid, discover_group

GROUP = 30  # images whose ids agree in the ViT recipe


def discover(
    encoder: Backbone,
    images: "ImageSet",
    out: Path,
    config: ClusteringConfig,
    *,
    image_size: int,
    map_size: int,
    run: str,
    device: torch.device,
    threads: int = 2,
    seed: int = 0,
    loader: str = "auto",
) -> Path:
    """Write the id map of every image of a set; CNNs by :func:`cluster_pyramid`, ViTs by :func:`discover_group`.

    Args:
        encoder: the network whose features are clustered; it runs in evaluation mode.
        images: the images.
        out: folder of maps that is written. A call that was interrupted goes on where it stopped (CNN; a ViT's groups
            begin again); one that is complete is left as it is.
        how: number of parts (a ViT's maps have one id more, for the background), levels, metric, border.
        image_size: side to which the whole image is squashed.
        map_size: side of the id maps of a CNN (a ViT's have its key grid).
        run: what made the maps, for maps.json.
        device: where to run.
        threads: data threads.
        seed: seed of the k-means starts.
        loader: data pipeline.

    Returns:
        ``out``.

    Raises:
        UserError: the folder holds maps that other weights or settings made, or there are fewer pixels than clusters.
    """
    from fgfast.data.maps import map_path, read_maps_info, save_maps, write_maps_info

    if not encoder.is_vit:
        config.check()
        check_pixels(config.n_parts, map_size)
    total = config.n_parts + 1 if encoder.is_vit else config.n_parts
    name = f"{run}, weights {_digest(encoder)}, image size {image_size}, levels {config.levels}, seed {seed}"
    name += "" if encoder.is_vit else config.describe()
    if (out / "maps.json").is_file():
        info = read_maps_info(out)
        if info["run"] == name and info["n_parts"] == total:
            return out
        raise UserError(f"{out} already holds maps of {info['run']}: give another --out, or remove it.")
    begun, what = out / "begun.json", {"run": name, "n_parts": total, "map_size": map_size}
    if not encoder.is_vit and begun.is_file() and begun.read_text() == json.dumps(what):
        images = images.subset([i for i, rel in enumerate(images.paths) if not map_path(out, rel).is_file()])
    write_atomic(begun, lambda p: p.write_text(json.dumps(what)))
    side = (map_size, map_size)
    for rels, labels in _label_batches(
        encoder, images, config, image_size=image_size, map_size=map_size, device=device, threads=threads, seed=seed,
        loader=loader,
    ):  # fmt: skip
        save_maps(out, rels, labels.to(torch.uint8).cpu().numpy())
        side = (labels.shape[1], labels.shape[2])
    write_maps_info(out, n_parts=total, size=side, run=name)
    begun.unlink()
    return out


def _digest(encoder: Backbone) -> str:
    """Twelve digits that name the weights."""
    found = hashlib.sha256()
    for tensor in encoder.net.state_dict().values():
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:12]


def _label_batches(
    encoder: Backbone,
    images: "ImageSet",
    config: ClusteringConfig,
    *,
    image_size: int,
    map_size: int,
    device: torch.device,
    threads: int,
    seed: int,
    loader: str,
) -> Iterator[tuple[list[str], Tensor]]:
    from fgfast.data.loader import make_loader
    from fgfast.data.views import ViewSpec

    if not len(images):
        return
    spec = ViewSpec(whole=image_size)
    batches = make_loader(
        images, spec, GROUP if encoder.is_vit else 32, shuffle=False, device=device, threads=threads, backend=loader
    )
    was_training = encoder.training
    encoder.eval()
    try:
        for batch in batches:
            valid = batch.valid
            assert batch.whole is not None  # the specification asks for it
            whole = batch.whole[valid]
            rels = [images.paths[i] for i in batch.index[valid].tolist()]
            if encoder.is_vit:
                patch = encoder.patch
                labels = discover_group(encoder, whole, n_parts=config.n_parts, stride=max(1, patch // 2), seed=seed)
            else:
                labels = cluster_pyramid(encoder, whole, config, size=map_size, seed=seed)
            yield rels, labels
    finally:
        encoder.train(was_training)
        batches.close()
