"""The figure of the classes that an evaluation confuses most."""

from pathlib import Path
from typing import Any

from fgfast.data.decode import read_image
from fgfast.data.layouts import open_images
from fgfast.data.panels import Panel
from fgfast.report.pictures import class_label, write_grid


def draw_confused(run: Path, data: Path, row: dict[str, Any]) -> Path | None:
    """Write RUN/pictures/confused-PROTOCOL.png (with "-init" for the weights before training).

    Each row has images of two classes, those that were taken for the other one first.

    Args:
        run: run folder.
        data: the data set that was scored.
        row: a score as in eval.json; "confused" is as of ``fgfast.evaluate.confusion.confused_pairs``.

    Returns:
        The file; None if the score names no mistaken images, and a figure of an earlier one is gone then.

    Raises:
        UserError: the data cannot be read.
    """
    suffix = "" if row["checkpoint"] == "last" else f"-{row['checkpoint']}"
    path = run / "pictures" / f"confused-{row['protocol']}{suffix}.png"
    pairs = [pair for pair in row.get("confused", []) if any(pair["images"])]
    if not pairs:
        path.unlink(missing_ok=True)
        return None
    images = open_images(data)
    number = {name: i for i, name in enumerate(images.paths)}

    rows: list[list[Panel]] = []
    for pair in pairs:
        rows.append([])
        for name, paths, mistakes, of in zip(*(pair[k] for k in ("classes", "images", "mistakes", "of")), strict=True):
            files = images.subset([number[path] for path in paths]).files()
            for i, file in enumerate(files):
                caption = f"{'✗' if i < mistakes else '✓'} {class_label(name)}"
                caption += f"\n{mistakes} of {of} mistaken" if i == 0 else ""
                rows[-1].append(Panel(read_image(file), caption))
    options = f", {row['options']}" if row.get("options") else ""
    title = f"Classes that are confused most ({row['protocol']}{options})"
    return write_grid(rows, path, description=title)
