"""Images for people: part ids over photographs, captioned grids, nearest neighbours."""

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

_SAME = (0, 114, 178)  # blue and vermillion are told apart by all eyes; the caption says the same in words
_OTHER = (213, 94, 0)
_INK = (32, 33, 36)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # the DejaVu font that comes with it has most of the world's letters

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _caption_lines(caption: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    letters = max(4, int(width / font.getlength("n")))
    lines = [line for part in caption.splitlines() for line in textwrap.wrap(part, letters) or [""]]
    if len(lines) > 3:
        lines = [*lines[:2], lines[2][: letters - 1] + "…"]
    return lines


def compose(rows: Sequence[Sequence[Panel]], cell: int = 160) -> NDArray[np.uint8]:
    """Lay panels out on white: images enlarged or reduced to fit a square cell, captions under them.

    Args:
        rows: panels row by row; rows may differ in length.
        cell: side of a cell in pixels, at least 16.

    Returns:
        uint8 [H, W, 3].

    Raises:
        ValueError: there is no panel, or the cell is too small.
    """
    if cell < 16:
        raise ValueError(f"cell is {cell}: give at least 16 pixels.")
    if not any(len(row) for row in rows):
        raise ValueError("The grid has no panel: give at least one row with one panel.")
    gap, font = max(4, cell // 20), _font(max(10, cell // 13))
    line_height = int(font.size * 1.35)
    text = [[_caption_lines(panel.caption, font, cell) for panel in row] for row in rows]
    heights = [cell + gap + line_height * max((len(lines) for lines in row), default=0) for row in text]
    width = gap + max(len(row) for row in rows) * (cell + gap)
    canvas = Image.new("RGB", (width, gap + sum(heights) + gap * (len(rows) - 1)), "white")
    draw = ImageDraw.Draw(canvas)
    y = gap
    for row, captions, height in zip(rows, text, heights, strict=True):
        for column, (panel, lines) in enumerate(zip(row, captions, strict=True)):
            x = gap + column * (cell + gap)
            image = Image.fromarray(to_uint8(panel.image))
            scale = cell / max(image.size)
            size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
            # Small images keep their pixels, so that one sees what the network saw.
            how = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
            canvas.paste(image.resize(size, how), (x + (cell - size[0]) // 2, y + (cell - size[1]) // 2))
            for i, line in enumerate(lines):
                draw.text((x + cell // 2, y + cell + gap // 2 + i * line_height), line, _INK, font, anchor="ma")
        y += height + gap
    return np.asarray(canvas)


def save_png(image: NDArray[np.uint8], path: Path, description: str = "") -> Path:
    """Write a PNG atomically; ``description`` travels inside it and becomes its caption and alt text in the report."""
    info = PngInfo()
    if description:
        info.add_itxt("Description", description)
    drawing = Image.fromarray(image)
    write_atomic(path, lambda p: drawing.save(p, format="PNG", pnginfo=info, optimize=True))
    return path


def grid(rows: Sequence[Sequence[Panel]], path: Path, *, cell: int = 160, description: str = "") -> Path:
    """Write rows of captioned panels to one PNG file: :func:`compose`, then :func:`save_png`.

    Example:
        >>> import tempfile
        >>> panel = Panel(np.zeros((8, 8, 3), np.uint8), "black")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     grid([[panel, panel]], Path(folder, "pair.png"), description="Two black squares").name
        'pair.png'
    """
    return save_png(compose(rows, cell), path, description)


def framed(image: NDArray[np.uint8], colour: tuple[int, int, int], share: float = 0.04) -> NDArray[np.uint8]:
    """``image`` with a frame drawn inside its border, at least one pixel wide."""
    out = np.array(image)
    width = max(1, round(share * min(out.shape[:2])))
    out[:width] = out[-width:] = colour
    out[:, :width] = out[:, -width:] = colour
    return out


def neighbours(
    images: Tensor | Sequence[NDArray[np.uint8]] | NDArray[np.uint8],
    features: Tensor,
    k: int = 5,
    *,
    queries: Sequence[int] | None = None,
    targets: Sequence[int] | Tensor | NDArray[np.integer[Any]] | None = None,
    classes: Sequence[str] | None = None,
) -> list[list[Panel]]:
    """Rows of a query and its k nearest images by cosine similarity of the features; the query itself left out.

    Args:
        images: normalised float tensor [N, 3, H, W], or N uint8 images [H, W, 3].
        features: float [N, D], any device.
        k: neighbours of a row, 1 to N - 1.
        queries: rows to draw; the first eight unless given.
        targets: class ids [N]; neighbours of the query's class get a blue frame and a tick, others an orange frame and
            a cross.
        classes: name of each class id, for the captions.

    Returns:
        one row of k + 1 panels a query.

    Raises:
        ValueError: counts do not agree, or k is out of range.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
        >>> rows = neighbours(torch.zeros(3, 3, 8, 8), x, 1, queries=[0], targets=[4, 4, 7])
        >>> [panel.caption for panel in rows[0]]
        ['class 4', '✓ class 4']
    """
    n = len(features)
    if len(images) != n or (targets is not None and len(targets) != n):
        counts = f"{len(images)} images, {n} features" + ("" if targets is None else f", {len(targets)} targets")
        raise ValueError(f"neighbours got {counts}: give one of each for every image.")
    if not 1 <= k < n:
        raise ValueError(f"k is {k}: among {n} images there are 1 to {n - 1} neighbours.")
    chosen = list(range(min(8, n))) if queries is None else [int(q) for q in queries]
    unit = torch.nn.functional.normalize(features.detach().float(), dim=1)
    similarity = unit[chosen] @ unit.T
    similarity[torch.arange(len(chosen)), chosen] = -torch.inf
    nearest = similarity.topk(k, dim=1).indices.tolist()
    ids = None if targets is None else [int(t) for t in targets]

    def name(i: int) -> str:
        if ids is None:
            return f"image {i}"
        if classes is None:
            return f"class {ids[i]}"
        return re.sub(r"^\d+\.", "", classes[ids[i]]).replace("_", " ")  # CUB's "001.Black_footed_Albatross"

    def panel(query: int, i: int) -> Panel:
        pixels = to_uint8(images[i])
        if ids is None:
            return Panel(pixels, name(i))
        same = ids[i] == ids[query]
        return Panel(framed(pixels, _SAME if same else _OTHER), f"{'✓' if same else '✗'} {name(i)}")

    return [
        [Panel(to_uint8(images[q]), name(q)), *(panel(q, i) for i in row)]
        for q, row in zip(chosen, nearest, strict=True)
    ]
