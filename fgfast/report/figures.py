"""The figures of a run for its page: single images with captions, which a page arranges by its width."""

import base64
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

from fgfast.data.decode import open_image

ALT = {"parts": "Images with the discovered parts painted over them, one colour per part"}
LIMIT = 3_400_000  # bytes of the images of a page: as base64 4.5 MB, and the rest is well below 0.5 MB
SIDE = 1600  # pixels, of figures that are one image
QUALITY = 82
BEFORE = "-init"  # ends the names of figures of the weights before training


@dataclass(frozen=True)
class Cell:
    """One image of a figure."""

    source: str  # a data: URI
    alt: str
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Figure:
    """A figure of the page: rows of images."""

    title: str
    rows: list[list[Cell]]

    @property
    def columns(self) -> int:
        """Images of the longest row."""
        return max(len(row) for row in self.rows)


@dataclass
class Comparison:
    """A figure of the weights before and after training; one of them may be missing."""

    title: str = ""
    before: Figure | None = None
    after: Figure | None = None


def read_figures(run: Path, notes: list[str]) -> list[Comparison]:
    """The figures RUN/parts.png and RUN/pictures/*.png, each with that of the weights before training.

    Args:
        run: run folder.
        notes: takes a sentence for each file that cannot be read, or for which the page has no room.
    """
    found: dict[str, Comparison] = {}
    room = LIMIT
    paths = [run / "parts.png", run / f"parts{BEFORE}.png", *sorted((run / "pictures").glob("*.png"))]
    for path in paths:
        if not path.is_file():
            continue
        try:
            figure, size = _read(path)
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for a truncated PNG; other boxes
            notes.append(f"{path.relative_to(run)} is not a readable PNG and was left out ({error}).")
            continue
        if size > room:
            notes.append(f"{path.relative_to(run)} is left out: the page would be larger than 5 MB.")
            continue
        room -= size
        pair = found.setdefault(path.stem.removesuffix(BEFORE), Comparison())
        if path.stem.endswith(BEFORE):
            pair.before = figure
        else:
            pair.after = figure
        both = pair.before is not None and pair.after is not None
        pair.title = re.sub(r", (init|last)\)$", ")", figure.title) if both else figure.title
    return list(found.values())


def _read(path: Path) -> tuple[Figure, int]:
    """A figure, and the bytes of its images.

    Raises:
        OSError, SyntaxError, ValueError: the file is not one.
    """
    with open_image(path) as image:
        image.load()
        info, pixels = image.info, image.convert("RGB")
    name = path.stem.replace("_", " ").replace("-", " ")
    description = str(info.get("Description", ""))
    title = description or ALT.get(path.stem, name)
    title = title[:1].upper() + title[1:]
    boxes = json.loads(info["Boxes"]) if "Boxes" in info else [[(0, 0, *pixels.size, "")]]
    rows, total = [], 0
    for row in boxes:
        cells = []
        for left, top, width, height, caption in row:
            part = pixels.crop((left, top, left + width, top + height))
            part.thumbnail((SIDE, SIDE))
            buffer = io.BytesIO()
            part.save(buffer, format="WEBP", quality=QUALITY)
            total += len(buffer.getvalue())
            source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
            cells.append(Cell(source, caption or title, caption, *part.size))
        rows.append(cells)
    return Figure(title, rows), total
