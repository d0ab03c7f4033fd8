"""FGVC-Aircraft."""

from pathlib import Path

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts.text import (
    align_rows,
    check_boxes,
    check_paths,
    corner_boxes,
    named,
    numbers,
    read_rows,
)
from fgfast.errors import UserError

LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}
BANNER = 20
_LAYOUT = "FGVC-Aircraft"


def lists_folder(root: Path) -> Path:
    """The folder of the lists: data/ of the unpacked archive, or the folder itself."""
    return root / "data" if (root / "data" / "images").is_dir() else root


def is_aircraft(root: Path) -> bool:
    """Whether the folder has one of the lists of this set."""
    lists = (*LEVELS.values(), *(f"images_{level}_{split}.txt" for level in LEVELS for split in ("trainval", "test")))
    return any((lists_folder(root) / name).is_file() for name in lists)


def read_aircraft(root: Path, level: str = "variant") -> ImageSet:
    """FGVC-Aircraft: images_LEVEL_{trainval,test}.txt ("ID NAME"), variants.txt, images_box.txt, images/ID.jpg.

    The training split is trainval (train and val if that list is missing). Boxes in the file are corners, 1-based and
    inclusive. The lowest 20 rows of pixels of each image name its photographer: ``banner``.

    Args:
        root: the unpacked archive, or its folder data/.
        level: "variant" (100 classes), "family" (70) or "manufacturer" (30).

    Source: Maji et al., "Fine-Grained Visual Classification of Aircraft", 2013.
    """
    if level not in LEVELS:
        raise UserError(f"FGVC-Aircraft has no level {level!r}: choose one of {', '.join(LEVELS)}.")
    base = lists_folder(root)
    classes = [name for (name,) in read_rows(base / LEVELS[level], lambda line: (line,), layout=_LAYOUT, key="class")]
    order = {name: i for i, name in enumerate(classes)}
    listed = {split for split in ("trainval", "train") if (base / f"images_{level}_{split}.txt").is_file()}
    ids: list[str] = []
    places: list[str] = []
    targets: list[int] = []
    train: list[bool] = []
    for split in ("train", "val", "test") if listed == {"train"} else ("trainval", "test"):
        rows = read_rows(base / f"images_{level}_{split}.txt", named(str), layout=_LAYOUT, key="image")
        for i, (number, name) in enumerate(rows):
            if name not in order:
                raise UserError(
                    f"{rows.place(i)}: image {number} has class {name!r}, which {LEVELS[level]} lacks: correct it."
                )
            ids.append(number)
            places.append(rows.place(i))
            targets.append(order[name])
            train.append(split != "test")
    paths = check_paths([f"{number}.jpg" for number in ids], places.__getitem__)
    boxes = None
    if (base / "images_box.txt").is_file():
        rows = read_rows(base / "images_box.txt", numbers(5, str), layout=_LAYOUT, key="image")
        index = {number: i for i, number in enumerate(ids)}
        corners, place = align_rows(rows, index, f"images_{level}_*.txt", others=True)
        boxes = check_boxes(corner_boxes(corners), place)
    if not (base / "images").is_dir():
        raise UserError(f"{base / 'images'} is missing: unpack the images there.")
    return ImageSet(
        base / "images", paths, np.array(targets, np.int64), tuple(classes), np.array(train, bool), boxes,
        banner=BANNER,
    )  # fmt: skip
