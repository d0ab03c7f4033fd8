"""iNaturalist 2017 to 2021: one COCO-style JSON file per split."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.errors import UserError

YEARS = ("", "2017", "2018", "2019", "2021")
"""Suffixes of "train" and "val" in the file names; those of 2021 may have none."""


def is_inaturalist(root: Path) -> bool:
    """Whether the folder has the file of a split."""
    names = ["train_mini.json", *(f"{split}{year}.json" for split in ("train", "val") for year in YEARS)]
    return any((root / name).is_file() for name in names)


def read_inaturalist(root: Path) -> ImageSet:
    """iNaturalist: trainYEAR.json and valYEAR.json (2021: train.json or train_mini.json, val.json), and the images.

    The test split is val (the labels of the official test split were never published). Classes are the categories with
    images, in the order of their ids; ``groups`` are their super-categories, and names come from categories.json if it
    exists (2018 and 2019 were first released without names). Boxes are those of the annotations or of 2017's
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
        path = root / "categories.json"
        names |= {c["id"]: c for c in _require(_load(path), path, ("id", "name"))}
    numbers = [number for part in parts for number in part.classes]
    used = sorted(set(numbers))
    order = {number: i for i, number in enumerate(used)}
    for number in used:
        if number not in names:
            raise UserError(f"{file} has images of category {number}, which it does not define: add the category.")
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
        images = _require(table, path, ("id", "file_name"), "images")
        self.categories = {c["id"]: c for c in _require(table, path, ("id", "name"), "categories")}
        annotations = _require(table, path, ("image_id", "category_id"), "annotations")
        index = {image["id"]: i for i, image in enumerate(images)}
        self.paths = [str(image["file_name"]) for image in images]
        classes: list[int | None] = [None] * len(images)
        for annotation in annotations:
            i = index.get(annotation["image_id"])
            if i is None:
                raise UserError(f"{path} annotates image {annotation['image_id']}, which it does not list: correct it.")
            if classes[i] not in (None, annotation["category_id"]):
                raise UserError(f"{path} gives {self.paths[i]} two categories: correct it.")
            classes[i] = annotation["category_id"]
        if None in classes:
            raise UserError(f"{path} has no annotation for {self.paths[classes.index(None)]}: add it.")
        self.classes = [number for number in classes if number is not None]
        self.boxes = np.full((len(images), 4), np.nan, np.float32)
        box_file = path.with_name(f"{path.stem.removesuffix(year)}_{year}_bboxes.json")
        if year and box_file.is_file():
            annotations = _require(_load(box_file), box_file, ("image_id",), "annotations")
        for annotation in annotations:
            i = index.get(annotation["image_id"])
            if i is not None and "bbox" in annotation and not _area(self.boxes[i]) >= _area(annotation["bbox"]):
                self.boxes[i] = annotation["bbox"]


def _area(box: Any) -> float:
    return float(box[2]) * float(box[3])


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: iNaturalist has this file, restore it.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: the JSON does not parse ({error.msg}): restore the file.") from error


def _require(table: Any, path: Path, keys: tuple[str, ...], name: str = "") -> list[dict[str, Any]]:
    """The list ``name`` of a table (without a name the table itself), after a check that every entry has the keys."""
    rows = table.get(name) if name and isinstance(table, dict) else table
    if not isinstance(rows, list):
        raise UserError(f"{path} has no list {name or 'of categories'!r}: give the file of a split that has labels.")
    for i, row in enumerate(rows):
        missing = next((key for key in keys if not isinstance(row, dict) or key not in row), None)
        if missing is not None:
            raise UserError(f"{path}: entry {i} of {name or 'the list'} has no {missing!r}: restore the file.")
    return rows
