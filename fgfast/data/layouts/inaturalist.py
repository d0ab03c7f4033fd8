"""iNaturalist 2017 to 2021: one COCO-style JSON file for each split."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.errors import UserError

YEARS = ("", "2017", "2018", "2019", "2021")
"""What stands after "train" and "val" in the names of the files; the files of 2021 have no year."""


def is_inaturalist(root: Path) -> bool:
    """Whether the folder has a file of a split."""
    names = ["train_mini.json", *(f"{split}{year}.json" for split in ("train", "val") for year in YEARS)]
    return any((root / name).is_file() for name in names)


def read_inaturalist(root: Path) -> ImageSet:
    """iNaturalist: trainYEAR.json and valYEAR.json (2021: train.json or train_mini.json, val.json), and the images.

    Training is train, test is val (the labels of the test split were never published). Classes are the categories that
    images have, in the order of their numbers; ``groups`` are their super-categories, and names come from
    categories.json where it is there (2018 and 2019 first hid them). Boxes are those of the annotations or of 2017's
    {train,val}_2017_bboxes.json, the largest of each image.

    Source: Van Horn et al., "The iNaturalist Species Classification and Detection Dataset", CVPR 2018.
    """
    years = [y for y in YEARS if (root / f"train{y}.json").is_file() or (root / f"val{y}.json").is_file()]
    if len(years) > 1:
        raise UserError(f"{root} holds the files of several years ({', '.join(years)}): give each its own folder.")
    year = years[0] if years else ""
    file = root / f"train{year}.json"
    if not file.is_file() and (root / "train_mini.json").is_file():
        file = root / "train_mini.json"
    parts = [_Split(path, year) for path in (file, root / f"val{year}.json")]
    names: dict[int, dict[str, Any]] = {}
    for part in parts:
        names |= part.categories
    if (root / "categories.json").is_file():
        names |= {c["id"]: c for c in _need(_load(root / "categories.json"), root / "categories.json", ("id", "name"))}
    numbers = [number for part in parts for number in part.classes]
    used = sorted(set(numbers))
    order = {number: i for i, number in enumerate(used)}
    for number in used:
        if number not in names:
            raise UserError(f"{file} has images of category {number}, which it does not list: add the category.")
    boxes = np.concatenate([part.boxes for part in parts])
    groups = tuple(str(names[number].get("supercategory", "")) for number in used)
    return ImageSet(
        root=root,
        paths=tuple(rel for part in parts for rel in part.paths),
        targets=np.array([order[number] for number in numbers], np.int64),
        classes=tuple(str(names[number]["name"]) for number in used),
        train=np.repeat([True, False], [len(part.paths) for part in parts]),
        boxes=None if np.isnan(boxes).all() else boxes,
        groups=groups if any(groups) else (),
    )


class _Split:
    """The images of one file with their categories and boxes."""

    def __init__(self, path: Path, year: str) -> None:
        table = _load(path)
        images = _need(table, path, ("id", "file_name"), "images")
        self.categories = {c["id"]: c for c in _need(table, path, ("id", "name"), "categories")}
        notes = _need(table, path, ("image_id", "category_id"), "annotations")
        place = {image["id"]: i for i, image in enumerate(images)}
        self.paths = [str(image["file_name"]) for image in images]
        found: list[int | None] = [None] * len(images)
        for note in notes:
            i = place.get(note["image_id"])
            if i is None:
                raise UserError(f"{path} annotates image {note['image_id']}, which it does not list: correct it.")
            if found[i] not in (None, note["category_id"]):
                raise UserError(f"{path} gives {self.paths[i]} two categories: correct it.")
            found[i] = note["category_id"]
        if None in found:
            raise UserError(f"{path} has no annotation for {self.paths[found.index(None)]}: add it.")
        self.classes = [number for number in found if number is not None]
        self.boxes = np.full((len(images), 4), np.nan, np.float32)
        more = path.with_name(f"{path.stem.removesuffix(year)}_{year}_bboxes.json")
        if year and more.is_file():
            notes = _need(_load(more), more, ("image_id",), "annotations")
        for note in notes:
            i = place.get(note["image_id"])
            if i is not None and "bbox" in note and not _area(self.boxes[i]) >= _area(note["bbox"]):
                self.boxes[i] = note["bbox"]


def _area(box: Any) -> float:
    return float(box[2]) * float(box[3])


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: the layout of iNaturalist has it, restore the file.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: the JSON does not parse ({error.msg}): restore the file.") from error


def _need(table: Any, path: Path, keys: tuple[str, ...], name: str = "") -> list[dict[str, Any]]:
    """The list ``name`` of a table (the table itself without a name), every entry of which has the keys."""
    rows = table.get(name) if name and isinstance(table, dict) else table
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list {name or 'of categories'!r}: give the file of a split that has labels.")
    for i, row in enumerate(rows):
        absent = next((key for key in keys if not isinstance(row, dict) or key not in row), None)
        if absent is not None:
            raise UserError(f"{path}: entry {i} of {name or 'the list'} has no {absent!r}: restore the file.")
    return rows
