"""Figures of a run or of a network without one: parts, components of features, nearest neighbours, a method's own."""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.manifest import check_images
from fgfast.data.panels import Panel, in_rows, to_pixels
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.features import extract_rows
from fgfast.files import write_json
from fgfast.methods.base import Method
from fgfast.methods.part_pictures import discovered, thumbnail
from fgfast.methods.run_folder import Checkpoint, load_run_method, read_run
from fgfast.models.backbone import Backbone
from fgfast.models.probe import evaluating
from fgfast.parts.clusters import Clusters
from fgfast.parts.sources import DiscoveryConfig, read_blocks
from fgfast.report.pca import pca_colours
from fgfast.report.pictures import neighbour_panels, write_grid

log = logging.getLogger("fgfast")

SHOWN = 8  # images per figure
SEARCHED = 1000  # images among which nearest neighbours are searched
DESCRIPTIONS = {
    "pca": "Features of the foreground as colours: one PCA for all images, background black",
    "neighbours": "Each row: an image and its five nearest neighbours by cosine similarity of the features",
}

Rows = list[list[Panel]]
Draw = Callable[[], dict[str, Rows]]


def draw_run(
    run: Path, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device,
    source_of: Callable[[Backbone, TrainConfig], Clusters] | None = None,
) -> list[Path]:  # fmt: skip
    """Write RUN/parts.png (methods with parts) and RUN/pictures/*.png; names for the checkpoint "init" end in -init.

    A figure that these images do not allow is left out; the reason is logged, and stored for the report.

    Args:
        run: run folder.
        data: data set; its test split is shown if there is one.
        checkpoint: "init" or "last".
        device: device of the networks.
        source_of: the clustering of an encoder by the options of its run, whose parts are drawn too.

    Returns:
        The files written.

    Raises:
        UserError: the run, the checkpoint or the data cannot be used.
    """
    name, config = read_run(run)
    config = replace(config, data=str(data), init="none")
    images = open_images(data)
    method = load_run_method(run, checkpoint, name, config)
    method.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]

    shown = _shown(images)
    side = getattr(method, "discover_size", 2 * config.size)
    figures: list[tuple[str, Draw]] = [
        ("images of the method", lambda: _method_pictures(method, images, shown, run, device)),
        ("figures of the set", lambda: method.set_pictures(shown, run)),
    ]
    if source_of is not None:
        source = source_of(method.encoder, config)
        source.check()
        side = source.config.image_size
        figures.append(("discovered parts", lambda: {"discovered parts": discovered(source, shown)}))
    figures += [
        ("components of the features", lambda: {"pca": _pca(method.encoder, shown, config, side)}),
        ("nearest neighbours", lambda: {"neighbours": _neighbours(method.encoder, shown, config)}),
    ]
    suffix = "" if checkpoint == "last" else f"-{checkpoint}"
    written: list[Path] = []
    reasons = []
    for what, draw in figures:
        try:
            for title, rows in draw().items():
                slug = title.replace(" ", "-") + suffix
                path = run / f"{slug}.png" if title == "parts" else run / "pictures" / f"{slug}.png"
                description = DESCRIPTIONS.get(title, f"{title} ({name}, {checkpoint})")
                written.append(write_grid(rows, path, description=description))
        except UserError as error:
            reasons.append(f"The {what} are left out: {error}")
    for reason in reasons:
        log.warning(reason)
    write_json(run / "pictures" / f"left-out{suffix}.json", reasons)
    return written


def draw_network(source: Clusters, config: TrainConfig, data: Path, out: Path, name: str) -> list[Path]:
    """Write OUT/parts.png, OUT/pca.png and OUT/neighbours.png of a network without a run.

    Args:
        source: the network and its clustering.
        config: size of the images, for the neighbours, and threads.
        data: data set; its test split is shown if there is one.
        out: folder of the figures; none is written before all are drawn.
        name: of the network and its weights.

    Returns:
        The files written; without neighbours if there is one image.

    Raises:
        UserError: the network cannot give parts, or the data cannot be used.
    """
    shown = _shown(open_images(data))
    source.check()
    found = {"parts": discovered(source, shown)}
    found["pca"] = _pca(source.encoder, shown, config, source.config.image_size)
    try:
        found["neighbours"] = _neighbours(source.encoder, shown, config)
    except UserError as error:
        log.warning("The nearest neighbours are left out: %s", error)
    return [
        write_grid(rows, out / f"{title}.png", description=DESCRIPTIONS.get(title, f"{title} ({name})"))
        for title, rows in found.items()
    ]


def _shown(images: ImageSet) -> ImageSet:
    """The images that are shown: the test split, else the training images, else those without a label."""
    return next(found for found in (images.test_set(), images.train_set(), images) if len(found))


def _method_pictures(
    method: Method, images: ImageSet, shown: ImageSet, run: Path, device: torch.device
) -> dict[str, list[list[Panel]]]:
    """The figures of a method, by title."""
    config, spec = method.config, method.normalised_views()
    sample = shown.sample(SHOWN)
    if spec.masks:  # only the training images have stored id maps
        sample = images.train_set()
        sample = sample.subset(np.arange(min(SHOWN, len(sample))))
    if not len(sample):
        raise UserError(f"{images.root} has no labelled image to show.")
    with tempfile.TemporaryDirectory() as scratch:
        maps = method.figure_maps(sample, run, Path(scratch)) if spec.masks else None
        loader = make_loader(
            sample, replace(spec, whole=spec.whole or 2 * config.size), len(sample), shuffle=False, seed=config.seed,
            maps=maps, device=device, threads=config.threads, backend=config.loader,
        )  # fmt: skip
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
    with torch.no_grad():
        return method.pictures(batch)


@torch.no_grad()
def _pca(encoder: Backbone, images: ImageSet, config: TrainConfig, side: int) -> Rows:
    """Images beside the colours of the final map of the pyramid, or of the features of a network without one."""
    encoder.check_side(side, "--image-size")
    images = images.sample(SHOWN)
    check_images(images)
    reading = DiscoveryConfig(side, 0, "", threads=config.threads, loader=config.loader)
    rows, x = next(read_blocks(images, np.arange(len(images)), SHOWN, reading, _device(encoder), encoder.stats))
    with evaluating(encoder):
        has_pyramid = hasattr(encoder.net, "forward_intermediates")
        maps = encoder.pyramid(x, 1)[0] if has_pyramid else encoder.to_map(encoder.features(x), (side, side))
    panels = []
    for row, colours in zip(rows.tolist(), pca_colours(maps), strict=True):
        small = thumbnail(images, row)
        large = torch.nn.functional.interpolate(colours[None], size=small.shape[:2], mode="bilinear")[0]
        panels += [Panel(small, Path(images.paths[row]).stem), Panel(to_pixels(large), "components")]
    return in_rows(panels, 4)


def _neighbours(encoder: Backbone, images: ImageSet, config: TrainConfig) -> Rows:
    searched = images.sample(SEARCHED, seed=1)
    features, found = extract_rows(
        encoder, searched, config.size, device=_device(encoder), threads=config.threads, loader=config.loader
    )
    n = len(features)
    if n < 2:
        raise UserError(f"{images.root} has one image to show: neighbours need two or more.")
    loader = make_loader(searched, ViewSpec(whole=96), 64, shuffle=False, device="cpu", threads=config.threads)
    try:
        whole = torch.cat([b.whole[b.valid] for b in loader if b.whole is not None])
    finally:
        loader.close()
    queries = list(range(0, n, max(1, n // 6)))[:6]
    searched = searched.subset(found)
    return neighbour_panels(
        whole, features, min(5, n - 1), queries=queries, targets=searched.targets if searched.has_labels else None,
        classes=searched.classes, names=[Path(path).stem for path in searched.paths],
    )  # fmt: skip


def _device(encoder: Backbone) -> torch.device:
    return next(encoder.parameters()).device
