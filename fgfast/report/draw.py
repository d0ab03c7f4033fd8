"""Figures of a run: the images that its method draws, and nearest neighbours by its features."""

import logging
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.panels import Panel
from fgfast.data.views import ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate.features import extract
from fgfast.files import write_json
from fgfast.methods.base import Method
from fgfast.methods.run_folder import Checkpoint, load_run_method, read_run
from fgfast.report.pictures import neighbour_panels, write_grid

log = logging.getLogger("fgfast")

SHOWN = 8  # images per figure
SEARCHED = 1000  # images among which nearest neighbours are searched


def draw_run(run: Path, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device) -> list[Path]:
    """Write RUN/parts.png (methods with parts) and RUN/pictures/*.png; names for the checkpoint "init" end in -init.

    A figure that these images do not allow is left out; the reason is logged, and stored for the report.

    Args:
        run: run folder.
        data: data set; its test split is shown if there is one.
        checkpoint: "init" or "last".
        device: device of the networks.

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

    shown = images.test_set() if len(images.test_set()) else images.train_set()
    suffix = "" if checkpoint == "last" else f"-{checkpoint}"
    written: list[Path] = []
    reasons = []
    for what, draw in (
        ("images of the method", lambda: _method_pictures(method, images, shown, run, device)),
        ("figures of the set", lambda: method.set_pictures(shown, run)),
    ):
        try:
            for title, rows in draw().items():
                slug = title.replace(" ", "-") + suffix
                path = run / f"{slug}.png" if title == "parts" else run / "pictures" / f"{slug}.png"
                written.append(write_grid(rows, path, description=f"{title} ({name}, {checkpoint})"))
        except UserError as error:
            reasons.append(f"The {what} are left out: {error}")
    try:
        path = run / "pictures" / f"neighbours{suffix}.png"
        written.append(_draw_neighbours(method.encoder, shown, config.size, path, device, config.threads))
    except UserError as error:
        reasons.append(f"The nearest neighbours are left out: {error}")
    for reason in reasons:
        log.warning(reason)
    write_json(run / "pictures" / f"left-out{suffix}.json", reasons)
    return written


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


def _draw_neighbours(
    encoder: torch.nn.Module, images: ImageSet, size: int, path: Path, device: torch.device, threads: int
) -> Path:
    searched = images.sample(SEARCHED, seed=1)
    features, targets = extract(encoder, searched, size, device=device, threads=threads)
    n = len(features)
    if n < 2:
        raise UserError(f"{images.root} has one image to show: neighbours need two or more.")
    loader = make_loader(searched, ViewSpec(whole=96), 64, shuffle=False, device="cpu", threads=threads)
    try:
        whole = torch.cat([b.whole[b.valid] for b in loader if b.whole is not None])
    finally:
        loader.close()
    queries = list(range(0, n, max(1, n // 6)))[:6]
    rows = neighbour_panels(whole, features, min(5, n - 1), queries=queries, targets=targets, classes=searched.classes)
    description = "Each row: an image and its five nearest neighbours by cosine similarity of the features"
    return write_grid(rows, path, description=description)
