"""CUB-200-2011 and NABirds, which has the same lists with other keys and a hierarchy of classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts.text import align_rows, named, numbers, read_rows
from fgfast.errors import UserError


def read_cub(root: Path) -> ImageSet:
    """CUB-200-2011: images.txt, classes.txt, image_class_labels.txt, train_test_split.txt, images/.

    Boxes (bounding_boxes.txt) and key points (parts/) are optional, as is a folder part_masks/ of ground-truth id maps.
    Every class of classes.txt must have an image.

    Source: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011.
    """
    images, names, labels, _ = _read(root, int, "CUB-200-2011")
    order = {number: i for i, number in enumerate(names)}
    targets = np.array([order[int(label)] for label in labels], np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(order)) == 0)
    if len(empty):
        name = list(names.values())[empty[0]]
        raise UserError(f"Class {name} of {root / 'classes.txt'} has no image: add images or drop the class.")
    return ImageSet(targets=targets, classes=tuple(names.values()), **images)


def read_nabirds(root: Path) -> ImageSet:
    """NABirds: the lists of CUB-200-2011 with hashes for images, and hierarchy.txt ("CHILD PARENT").

    classes.txt names every node of the hierarchy; the classes are those with images (555 in the full set), and their
    parents are the ``groups``.

    Source: Van Horn et al., "Building a bird recognition app and large scale dataset with citizen scientists",
    CVPR 2015.
    """
    images, names, labels, ids = _read(root, str, "NABirds")
    path = root / "hierarchy.txt"
    parents = {child: int(parent) for child, parent in read_rows(path, numbers(2), layout="NABirds")}
    used = sorted({int(label) for label in labels})
    order = {number: i for i, number in enumerate(used)}
    inner = set(parents.values()) & set(used)
    if inner:
        number = min(inner)
        image = list(ids)[int((labels == number).argmax())]
        raise UserError(f"Image {image} has class {number}, which has children in {path}: give it a leaf class.")
    for number in used:
        if parents.get(number) not in names:
            raise UserError(f"{path} has no parent for class {number} that classes.txt names: add the line.")
    return ImageSet(
        targets=np.array([order[int(label)] for label in labels], np.int64),
        classes=tuple(names[number] for number in used),
        groups=tuple(names[parents[number]] for number in used),
        **images,
    )


def _read(
    root: Path, key: Callable[[str], Any], layout: str
) -> tuple[dict[str, Any], dict[int, str], np.ndarray, dict]:
    """The parts common to both layouts: fields of ImageSet, class names by number, class number of each image, index by
    image key.
    """
    listed = read_rows(root / "images.txt", named(key), layout=layout)
    ids = {number: i for i, (number, _) in enumerate(listed)}
    if not listed:
        raise UserError(f"{root / 'images.txt'} lists no image: restore the file.")
    if len(ids) != len(listed):
        raise UserError(f"{root / 'images.txt'} gives one number to two images: correct the numbers.")
    names = dict(read_rows(root / "classes.txt", named(int), layout=layout))

    def table(name: str, count: int) -> np.ndarray:
        rows = read_rows(root / name, numbers(count, key), layout=layout)
        return align_rows(rows, root / name, count, ids, "images.txt")

    labels = table("image_class_labels.txt", 2)[:, 0]
    for (_, name), label in zip(listed, labels, strict=True):
        if label not in names:
            raise UserError(f"{name} has class {label:g}, which {root / 'classes.txt'} does not name: add the class.")
    split = table("train_test_split.txt", 2)[:, 0]
    if not np.isin(split, (0, 1)).all():
        raise UserError(f"{root / 'train_test_split.txt'} must hold 0 (test) or 1 (train): correct the values.")
    boxes, keypoints, part_names = None, None, tuple[str, ...]()
    if (root / "bounding_boxes.txt").exists():
        boxes = table("bounding_boxes.txt", 5).astype(np.float32)
    if (root / "parts").is_dir():
        keypoints, part_names = _keypoints(root / "parts", ids, key, layout)
    if not (root / "images").is_dir():
        raise UserError(f"{root / 'images'} is missing: move the images there.")
    masks = root / "part_masks"
    fields: dict[str, Any] = {
        "root": root / "images", "paths": tuple(name for _, name in listed), "train": split == 1, "boxes": boxes,
        "keypoints": keypoints, "part_names": part_names, "masks": masks if masks.is_dir() else None,
    }  # fmt: skip
    return fields, names, labels, ids


def _keypoints(folder: Path, ids: dict, key: Callable[[str], Any], layout: str) -> tuple[np.ndarray, tuple[str, ...]]:
    parts = dict(read_rows(folder / "parts.txt", named(int), layout=layout))
    place = {number: i for i, number in enumerate(parts)}
    keypoints = np.zeros((len(ids), len(parts), 3), np.float32)
    path = folder / "part_locs.txt"
    for number, part, *xyv in read_rows(path, numbers(5, key), layout=layout):
        if number not in ids or int(part) not in place:
            raise UserError(f"{path} names image {number}, part {int(part)}, which are not listed: correct it.")
        keypoints[ids[number], place[int(part)]] = xyv
    return keypoints, tuple(parts.values())
