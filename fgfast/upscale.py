"""Enlarge images four times with a trained generator: ``fgfast upscale``."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fgfast.data.manifest import read_image
from fgfast.data.panels import to_pixels
from fgfast.errors import UserError
from fgfast.files import write_atomic
from fgfast.methods.run_folder import Checkpoint, load_run_method, read_run
from fgfast.methods.srgan import FACTOR, SRGAN, SRGANConfig
from fgfast.models.srgan import Generator

log = logging.getLogger("fgfast")

PIECE = 128  # side of the pieces in which an image is enlarged, without their surroundings


def upscale(
    run: Path, images: list[Path], out: Path, *, checkpoint: Checkpoint = "last", device: torch.device
) -> list[Path]:
    """Write OUT/NAME.png, four times as large, for every readable image; a warning is logged for each of the others.

    Args:
        run: run folder of srgan.
        images: image files of any size and mode (grey, CMYK, 16 bits, rotated by EXIF).
        out: output folder; each file is written atomically.
        checkpoint: "init" or "last".
        device: device of the generator.

    Returns:
        The files written.

    Raises:
        UserError: the run is of another method, two images have the same name, an image would be overwritten, or none
            can be read.
    """
    name, config = read_run(run)
    if not isinstance(config, SRGANConfig):
        raise UserError(f"{run} is a run of {name}, which has no generator: give a run of srgan.")
    repeated = [p for i, p in enumerate(images) if p.stem in {q.stem for q in images[:i]}]
    if repeated:
        first = repeated[0]
        raise UserError(f"Two images would be written to {first.stem}.png ({first} is one): enlarge them separately.")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give another --out.")
    overwritten = [p for p in images if (out / f"{p.stem}.png").resolve() == p.resolve()]
    if overwritten:
        raise UserError(f"{overwritten[0]} would be overwritten by its enlargement: give another --out.")
    method = load_run_method(run, checkpoint, name, replace(config, init="none"))
    assert isinstance(method, SRGAN)
    generator = method.generator.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    written = []
    for path in images:
        try:
            pixels = read_image(str(path))
        except OSError as error:
            log.warning("skipped %s, which cannot be read as an image: %s", path, error)
            continue
        large, target = Image.fromarray(enlarge(generator, pixels)), out / f"{path.stem}.png"
        write_atomic(target, lambda p, large=large: large.save(p, format="PNG"))  # type: ignore[misc]
        written.append(target)
    if not written:
        raise UserError(f"None of the {len(images)} images could be read: check their paths.")
    return written


@torch.no_grad()
def enlarge(generator: Generator, pixels: np.ndarray, tile: int = PIECE) -> np.ndarray:
    """Enlarge an image four times, piece by piece to bound the memory of the network.

    A piece is enlarged together with its receptive field around it, so there are no seams between pieces.

    Args:
        generator: in evaluation mode.
        pixels: uint8 [H, W, 3].
        tile: side of a piece in pixels.

    Returns:
        uint8 [4 H, 4 W, 3].

    Example:
        >>> enlarge(Generator(4, 1).eval(), np.zeros((5, 7, 3), np.uint8)).shape
        (20, 28, 3)
    """
    height, width = pixels.shape[:2]
    device, reach = next(generator.parameters()).device, generator.reach
    out = np.empty((FACTOR * height, FACTOR * width, 3), np.uint8)
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            y0, x0 = max(0, y - reach), max(0, x - reach)
            piece = torch.from_numpy(pixels[y0 : y + tile + reach, x0 : x + tile + reach].copy()).to(device)
            large = to_pixels(generator(piece.permute(2, 0, 1)[None] / 255)[0])
            inner = large[FACTOR * (y - y0) :, FACTOR * (x - x0) :][: FACTOR * tile, : FACTOR * tile]
            part = out[FACTOR * y : FACTOR * (y + tile), FACTOR * x : FACTOR * (x + tile)]
            part[:] = inner[: part.shape[0], : part.shape[1]]
    return out
