"""Figures of images: captioned grids, written as PNG, and rows of nearest neighbours."""

import json
import re
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from fgfast.data.panels import Panel, to_uint8
from fgfast.files import write_atomic

# Blue and vermilion are distinguishable with any colour vision; the caption has a tick or a cross besides.
_SAME_CLASS = (0, 114, 178)
_OTHER_CLASS = (213, 94, 0)
_INK = (32, 33, 36)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # it comes with DejaVu Sans, which covers most scripts

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _caption_lines(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    characters = max(4, int(width / font.getlength("n")))
    lines = [line for paragraph in caption.splitlines() for line in textwrap.wrap(paragraph, characters) or [""]]
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: characters - 1] + "…"]
    return lines


Box = tuple[int, int, int, int, str]  # left, top, width and height of an image in a figure, its caption


def compose_grid(rows: Sequence[Sequence[Panel]], cell: int = 160) -> tuple[NDArray[np.uint8], list[list[Box]]]:
    """Arrange panels in a grid on white: each image resized to fit a square cell, its caption below.

    Args:
        rows: the panels of each row; rows may differ in length.
        cell: side of a cell in pixels, at least 16.

    Returns:
        The figure, uint8 [H, W, 3], and where the image of each panel is in it.

    Raises:
        ValueError: there is no panel, or the cell is too small.
    """
    if cell < 16:
        raise ValueError(f"cell is {cell}: give at least 16 pixels.")
    if not any(len(row) for row in rows):
        raise ValueError("rows has no panel: give at least one.")
    gap, font = max(4, cell // 20), _font(max(10, cell // 13))
    line_height = int(font.size * 1.35)
    text = [[_caption_lines(panel.caption, font, cell) for panel in row] for row in rows]
    heights = [cell + gap + line_height * max((len(lines) for lines in row), default=0) for row in text]
    width = gap + max(len(row) for row in rows) * (cell + gap)
    canvas = Image.new("RGB", (width, gap + sum(heights) + gap * (len(rows) - 1)), "white")
    draw = ImageDraw.Draw(canvas)
    boxes: list[list[Box]] = [[] for _ in rows]
    y = gap
    for row, found, captions, height in zip(rows, boxes, text, heights, strict=True):
        for column, (panel, lines) in enumerate(zip(row, captions, strict=True)):
            x = gap + column * (cell + gap)
            image = Image.fromarray(to_uint8(panel.image))
            scale = cell / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # Small images keep visible pixels: the figure shows what the network saw.
            resampling = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            corner = x + (cell - size[0]) // 2, y + (cell - size[1]) // 2
            canvas.paste(image.resize(size, resampling), corner)
            found.append((*corner, *size, panel.caption))
            for i, line in enumerate(lines):
                draw.text((x + cell // 2, y + cell + gap // 2 + i * line_height), line, _INK, font, anchor="ma")
        y += height + gap
    return np.asarray(canvas), boxes


def save_png(figure: NDArray[np.uint8], path: Path, description: str = "", boxes: Sequence[Sequence[Box]] = ()) -> Path:
    """Write a PNG atomically.

    What is stored in it is for the report: ``description``, its caption and alt text, and ``boxes``, its images, which
    the page arranges by its width.
    """
    info = PngInfo()
    if description:
        info.add_itxt("Description", description)
    if boxes:
        info.add_itxt("Boxes", json.dumps(boxes))
    image = Image.fromarray(figure)
    write_atomic(path, lambda p: image.save(p, format="PNG", pnginfo=info, optimize=True))
    return path


def write_grid(rows: Sequence[Sequence[Panel]], path: Path, *, cell: int = 160, description: str = "") -> Path:
    """Write a grid of captioned panels to a PNG file: :func:`compose_grid`, then :func:`save_png`.

    Example:
        >>> import tempfile
        >>> panel = Panel(np.zeros((8, 8, 3), np.uint8), "black")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_grid([[panel, panel]], Path(folder, "pair.png"), description="Two black squares").name
        'pair.png'
    """
    figure, boxes = compose_grid(rows, cell)
    return save_png(figure, path, description, boxes)


def add_frame(image: NDArray[np.uint8], colour: tuple[int, int, int], fraction: float = 0.04) -> NDArray[np.uint8]:
    """A copy of ``image`` with a frame inside its border; its width is ``fraction`` of the shorter side, at least 1."""
    out = np.array(image)
    width = max(1, round(fraction * min(out.shape[:2])))
    out[:width] = out[-width:] = colour
    out[:, :width] = out[:, -width:] = colour
    return out


def class_label(name: str) -> str:
    """The name of a class for people.

    Example:
        >>> class_label("001.Black_footed_Albatross")  # of CUB-200-2011
        'Black footed Albatross'
    """
    return re.sub(r"^\d+\.", "", name).replace("_", " ")


def neighbour_panels(
    images: Tensor | Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    features: Tensor,
    k: int = 5,
    *,
    queries: Sequence[int] | None = None,
    targets: Sequence[int] | Tensor | NDArray[np.integer[Any]] | None = None,
    classes: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> list[list[Panel]]:
    """One row per query: the query image, then its k nearest other images by cosine similarity of the features.

    Args:
        images: normalised float tensor [N, 3, H, W], or N uint8 images [H, W, 3].
        features: float [N, D], any device.
        k: neighbours per query, 1 to N - 1.
        queries: indices of the query images; by default the first eight.
        targets: class ids [N]; neighbours of the query's class get a blue frame and a tick, others an orange frame and
            a cross.
        classes: name of each class id, for the captions.
        names: names of the N images, for the captions without targets.

    Returns:
        One row of k + 1 panels per query.

    Raises:
        ValueError: the numbers of images, features and targets differ, or k is out of range.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> rows = neighbour_panels(torch.zeros(3, 3, 8, 8), x, 1, queries=[0], targets=[4, 4, 7])
        >>> [panel.caption for panel in rows[0]]
        ['class 4', '✓ class 4']
    """
    n = len(features)
    if len(images) != n or (targets is not None and len(targets) != n):
        counts = f"{len(images)} images, {n} features" + ("" if targets is None else f", {len(targets)} targets")
        raise ValueError(f"neighbours got {counts}: give as many of each.")
    if not 1 <= k < n:
        raise ValueError(f"k is {k}: give 1 to {n - 1} neighbours for {n} images.")
    query_ids = list(range(min(8, n))) if queries is None else [int(q) for q in queries]
    unit = torch.nn.functional.normalize(features.detach().float(), dim=1)
    similarity = unit[query_ids] @ unit.T
    similarity[torch.arange(len(query_ids)), query_ids] = -torch.inf
    nearest = similarity.topk(k, dim=1).indices.tolist()
    class_ids = None if targets is None else [int(t) for t in targets]

    def name(i: int) -> str:
        if class_ids is None:
            return f"image {i}" if names is None else names[i]
        if classes is None:
            return f"class {class_ids[i]}"
        return class_label(classes[class_ids[i]])

    def panel(query: int, i: int) -> Panel:
        pixels = to_uint8(images[i])
        if class_ids is None:
            return Panel(pixels, name(i))
        same = class_ids[i] == class_ids[query]
        return Panel(add_frame(pixels, _SAME_CLASS if same else _OTHER_CLASS), f"{'✓' if same else '✗'} {name(i)}")

    return [
        [Panel(to_uint8(images[q]), name(q)), *(panel(q, i) for i in row)]
        for q, row in zip(query_ids, nearest, strict=True)
    ]
