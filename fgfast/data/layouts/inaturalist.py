"""iNaturalist 2017 to 2021: one COCO-style JSON file per split."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, TypeVar

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts.text import check_paths, check_unique, read_text
from fgfast.errors import UserError
from fgfast.formats import parse_json

T = TypeVar("T")

YEARS = ("", "2017", "2018", "2019", "2021")
"""Suffixes of "train" and "val" in the file names; those of 2021 may have none."""

FOLDERS = ("train_mini", "train_val_images", "train_val2018", "train_val2019")
"""Folders of images whose names no other set has."""


EDITED = 2**26
"""Characters of the largest file in which repeated keys are looked for."""


class _Image(TypedDict):
    id: int | str
    file_name: str


class _Category(TypedDict):
    id: int
    name: str | int
    supercategory: NotRequired[str | int | None]


class _Label(TypedDict):
    image_id: int | str
    category_id: int
    bbox: NotRequired[Any]


class _Labels(TypedDict):
    images: list[_Image]
    categories: list[_Category]
    annotations: list[_Label]


class _Box(TypedDict):
    image_id: int | str
    bbox: NotRequired[Any]


class _Boxes(TypedDict):
    annotations: list[_Box]


def is_inaturalist(root: Path) -> bool:
    """Whether the folder has the file of a split."""
    names = ["train_mini.json", *(f"{split}{year}.json" for split in ("train", "val") for year in YEARS)]
    return any((root / name).is_file() for name in names)


def read_inaturalist(root: Path) -> ImageSet:
    """iNaturalist: trainYEAR.json and valYEAR.json (2021: train.json or train_mini.json, val.json), and the images.

    The test split is val (the labels of the official test split were never published). Classes are the categories with
    images, in the order of their ids; ``groups`` are their super-categories, and names come from categories.json if it
    exists (2018 and 2019 were first released without names). Boxes are those of the annotations or of 2017's
    {train,val}_2017_bboxes.json, the largest of each image; a bbox that is null, empty or of no area is no box.

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
    names: dict[int, _Category] = {}
    for part in parts:
        for number, category in part.categories.items():
            if names.setdefault(number, category)["name"] != category["name"]:
                raise UserError(
                    f"{part.path} gives category {number} the name {category['name']!r}, {file} gives it "
                    f"{names[number]['name']!r}: restore the files."
                )
    if (root / "categories.json").is_file():
        names |= _categories(root / "categories.json", _load(root / "categories.json", list[_Category]))
    numbers = [number for part in parts for number in part.classes]
    used = sorted(set(numbers))
    order = {number: i for i, number in enumerate(used)}
    for number in used:
        if number not in names:
            raise UserError(f"{file} has images of category {number}, which it does not define: add the category.")
    classes = tuple(str(names[number]["name"]) for number in used)
    groups = tuple(str(names[number].get("supercategory") or "") for number in used)
    check_unique(zip(groups, classes, strict=True), "category", lambda i: f"{file}, category {used[i]}")
    n_train = len(parts[0].paths)
    boxes = np.concatenate([part.boxes for part in parts])
    return ImageSet(
        root=root,
        paths=check_paths(
            [rel for part in parts for rel in part.paths],
            lambda i: parts[0].place(i) if i < n_train else parts[1].place(i - n_train),
        ),
        targets=np.array([order[number] for number in numbers], np.int64),
        classes=classes,
        train=np.repeat([True, False], [len(part.paths) for part in parts]),
        boxes=None if np.isnan(boxes).all() else boxes,
        groups=groups if any(groups) else (),
    )


class _Split:
    """The images of one file with their categories and boxes."""

    def __init__(self, path: Path, year: str) -> None:
        self.path = path
        table = _load(path, _Labels)
        images, annotations = table["images"], table["annotations"]
        check_unique([image["id"] for image in images], "id", self.place)
        self.categories = _categories(path, table["categories"])
        index = {image["id"]: i for i, image in enumerate(images)}
        self.paths = [image["file_name"] for image in images]
        classes: list[int | None] = [None] * len(images)
        for entry, annotation in enumerate(annotations):
            i = index.get(annotation["image_id"])
            if i is None:
                raise UserError(
                    f"{path}, entry {entry} of annotations: the image {annotation['image_id']} is not listed: "
                    "correct it."
                )
            if classes[i] not in (None, annotation["category_id"]):
                raise UserError(
                    f"{path}, entry {entry} of annotations: {self.paths[i]} has another category too: keep one."
                )
            classes[i] = annotation["category_id"]
        if None in classes:
            raise UserError(f"{path} has no annotation for {self.paths[classes.index(None)]}: add it.")
        self.classes = [number for number in classes if number is not None]
        self.boxes = np.full((len(images), 4), np.nan, np.float32)
        box_file = path.with_name(f"{path.stem.removesuffix(year)}_{year}_bboxes.json")
        boxes: Sequence[_Label | _Box] = annotations
        if year and box_file.is_file():
            path, boxes = box_file, _load(box_file, _Boxes)["annotations"]
        for entry, boxed in enumerate(boxes):
            i = index.get(boxed["image_id"])
            box = None if i is None else _box(boxed.get("bbox"), path, entry)
            if box is not None and not _area(self.boxes[i]) >= _area(box):
                self.boxes[i] = box

    def place(self, i: int) -> str:
        """File and entry of image ``i``."""
        return f"{self.path}, entry {i} of images"


def _box(box: Any, path: Path, entry: int) -> np.ndarray | None:
    """The box of an annotation, float32 [4]; None if it is absent, null, empty or has no area."""
    if box in (None, [], [None] * 4):
        return None
    numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)
    if not numbers or min(box[2:]) < 0:
        raise UserError(
            f"{path}, entry {entry} of annotations: bbox is {str(box)[:60]}: give x, y, width and height, or null."
        )
    return np.array(box, np.float32) if _area(box) > 0 else None


def _area(box: Any) -> float:
    return float(box[2]) * float(box[3])


def _categories(path: Path, rows: list[_Category]) -> dict[int, _Category]:
    check_unique([row["id"] for row in rows], "category", lambda i: f"{path}, entry {i}")
    return {row["id"]: row for row in rows}


def _load(path: Path, kind: type[T]) -> T:
    """The content of a JSON file; keys given twice are refused unless it is too large to be edited by hand."""
    text = read_text(path, "iNaturalist")
    return parse_json(text, kind, str(path), remedy="restore the file", strict=len(text) < EDITED)
