"""Images of a run: what its method sees, drawn by the method, and nearest neighbours of its features."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import ViewSpec
from fgfast.evaluate.features import extract
from fgfast.methods.base import method_class
from fgfast.methods.stored import Checkpoint, read_run
from fgfast.report.pictures import grid, neighbours
from fgfast.run import load_checkpoint

SHOWN = 8  # images in a grid
SEARCHED = 1000  # images among which neighbours are looked for


def draw_run(run: Path, data: Path, *, checkpoint: Checkpoint = "last", device: torch.device) -> list[Path]:
    """Draw RUN/parts.png (methods with parts) and RUN/pictures/*.png; those of step 0 end in -init.

    Args:
        run: run folder.
        data: images to draw on; the test split where there is one.
        checkpoint: "init" or "last".
        device: where the networks run.

    Returns:
        The files written.

    Raises:
        UserError: the run, the checkpoint or the data cannot be used.
    """
    name, config = read_run(run)
    config = replace(config, data=str(data), init="none")
    images = open_images(data)
    method = method_class(name)(config).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    method.load_state_dict(load_checkpoint(run / f"{checkpoint}.pt", name)["method"])
    method.eval()

    shown = images.test_set() if len(images.test_set()) else images.train_set()
    some = shown.subset(np.sort(np.random.default_rng(0).permutation(len(shown))[:SHOWN]))
    spec = method.views()
    if spec.masks:  # stored maps are those of the training images: draw on them
        some = images.train_set()
        some = some.subset(np.arange(min(SHOWN, len(some))))
    maps = method.prepare(images.train_set(), run, max(0, getattr(config, "rounds", 1) - 1)) if spec.masks else None
    loader = make_loader(
        some, replace(spec, whole=spec.whole or 2 * config.size), len(some), shuffle=False, seed=config.seed, maps=maps,
        device=device, threads=config.threads, backend=config.loader,
    )  # fmt: skip
    try:
        batch = next(iter(loader))
    finally:
        loader.close()
    written, mark = [], "" if checkpoint == "last" else f"-{checkpoint}"
    with torch.no_grad():
        for title, rows in method.pictures(batch).items():
            slug = title.replace(" ", "-") + mark
            path = run / f"{slug}.png" if title == "parts" else run / "pictures" / f"{slug}.png"
            written.append(grid(rows, path, description=f"{title} ({name}, {checkpoint})"))
    written.append(
        _neighbours(
            method.encoder, shown, config.size, run / "pictures" / f"neighbours{mark}.png", device, config.threads
        )
    )
    return written


def _neighbours(
    encoder: torch.nn.Module, images: ImageSet, size: int, path: Path, device: torch.device, threads: int
) -> Path:
    searched = images.subset(np.sort(np.random.default_rng(1).permutation(len(images))[:SEARCHED]))
    features, targets = extract(encoder, searched, size, device=device, threads=threads)
    loader = make_loader(searched, ViewSpec(whole=96), 64, shuffle=False, device="cpu", threads=threads)
    try:
        whole = torch.cat([b.whole[b.valid] for b in loader if b.whole is not None])
    finally:
        loader.close()
    queries = list(range(0, len(searched), max(1, len(searched) // 6)))[:6]
    rows = neighbours(
        whole,
        torch.as_tensor(features),
        min(5, len(features) - 1),
        queries=queries,
        targets=targets,
        classes=searched.classes,
    )
    return grid(rows, path, description="Each row: an image and its five nearest by cosine similarity of the features")
