"""CUB-200-2011 and NABirds, which has the same lists with other keys and a hierarchy of classes."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts.text import (
    Rows,
    align_rows,
    check_boxes,
    check_listed,
    check_paths,
    check_split,
    check_unique,
    integer,
    named,
    numbers,
    read_rows,
)
from fgfast.errors import UserError


def read_cub(root: Path) -> ImageSet:
    """CUB-200-2011: images.txt, classes.txt, image_class_labels.txt, train_test_split.txt, images/.

    Boxes (bounding_boxes.txt) and key points (parts/) are optional, as is a folder part_masks/ of ground-truth id maps.
    Every class of classes.txt must have an image.

    Source: Wah et al., "The Caltech-UCSD Birds-200-2011 Dataset", 2011.
    """
    lists = _read(root, integer, "CUB-200-2011")
    check_unique([name for _, name in lists.classes], "class", lists.classes.place)
    order = {number: i for i, (number, _) in enumerate(lists.classes)}
    targets = np.array([order[label] for label in lists.labels], np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(order)) == 0)
    if len(empty):
        name = lists.classes[empty[0]][1]
        raise UserError(f"Class {name} of {root / 'classes.txt'} has no image: add images or drop the class.")
    return ImageSet(targets=targets, classes=tuple(name for _, name in lists.classes), **lists.fields)


def read_nabirds(root: Path) -> ImageSet:
    """NABirds: the lists of CUB-200-2011 with hashes for images, and hierarchy.txt ("CHILD PARENT").

    classes.txt names every node of the hierarchy; the classes are those with images (555 in the full set), and their
    parents are the ``groups``.

    Source: Van Horn et al., "Building a bird recognition app and large scale dataset with citizen scientists",
    CVPR 2015.
    """
    lists = _read(root, str, "NABirds")
    names = {int(number): name for number, name in lists.classes}
    path = root / "hierarchy.txt"
    edges = read_rows(path, _parse_edge, layout="NABirds", key="class")
    parents = {child: int(parent) for child, parent in edges}
    used = sorted(set(lists.labels))
    order = {number: i for i, number in enumerate(used)}
    inner = set(parents.values()) & set(used)
    if inner:
        number = min(inner)
        image = list(lists.ids)[lists.labels.index(number)]
        raise UserError(f"Image {image} has class {number}, which has children in {path}: give it a leaf class.")
    for number in used:
        if parents.get(number) not in names:
            raise UserError(f"{path} has no parent for class {number} that classes.txt names: add the line.")
    classes, groups = [names[number] for number in used], [names[parents[number]] for number in used]
    check_unique(zip(groups, classes, strict=True), "class", lambda i: f"{root / 'classes.txt'}, class {used[i]}")
    return ImageSet(
        targets=np.array([order[label] for label in lists.labels], np.int64), classes=tuple(classes),
        groups=tuple(groups), **lists.fields,
    )  # fmt: skip


def _parse_edge(line: str) -> tuple[int, int]:
    child, parent = map(integer, line.split())
    return child, parent


@dataclass(frozen=True)
class _Lists:
    """The lists common to both layouts.

    Args:
        fields: fields of ImageSet.
        classes: rows (number, name).
        labels: class number of each image.
        ids: index by image key.
    """

    fields: dict[str, Any]
    classes: Rows
    labels: list[int]
    ids: dict[Hashable, int]


def _read(root: Path, key: Callable[[str], Hashable], layout: str) -> _Lists:
    listed = read_rows(root / "images.txt", named(key), layout=layout, key="image")
    if not listed:
        raise UserError(f"{root / 'images.txt'} lists no image: restore the file.")
    paths = check_paths([name for _, name in listed], listed.place)
    ids = {number: i for i, (number, _) in enumerate(listed)}
    classes = read_rows(root / "classes.txt", named(integer), layout=layout, key="class")

    def table(name: str, count: int) -> tuple[np.ndarray, Callable[[int], str]]:
        rows = read_rows(root / name, numbers(count, key), layout=layout, key="image")
        return align_rows(rows, ids, "images.txt")

    labels, place = table("image_class_labels.txt", 2)
    known = {number for number, _ in classes}
    for i, label in enumerate(labels[:, 0]):
        if label not in known:
            raise UserError(
                f"{place(i)}: {paths[i]} has class {label:g}, which {root / 'classes.txt'} does not name: "
                "add the class."
            )
    split, place = table("train_test_split.txt", 2)
    train = check_split(split[:, 0], place)
    boxes, keypoints, part_names = None, None, tuple[str, ...]()
    if (root / "bounding_boxes.txt").exists():
        boxes = check_boxes(*table("bounding_boxes.txt", 5))
    if (root / "parts").is_dir():
        keypoints, part_names = _keypoints(root / "parts", ids, key, layout)
    if not (root / "images").is_dir():
        raise UserError(f"{root / 'images'} is missing: move the images there.")
    masks = root / "part_masks"
    fields: dict[str, Any] = {
        "root": root / "images", "paths": paths, "train": train, "boxes": boxes, "keypoints": keypoints,
        "part_names": part_names, "masks": masks if masks.is_dir() else None,
    }  # fmt: skip
    return _Lists(fields, classes, [int(label) for label in labels[:, 0]], ids)


def _keypoints(
    folder: Path, ids: dict[Hashable, int], key: Callable[[str], Hashable], layout: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    parts = read_rows(folder / "parts.txt", named(integer), layout=layout, key="part")
    names = tuple(name for _, name in parts)
    check_unique(names, "part", parts.place)
    index = {number: i for i, (number, _) in enumerate(parts)}
    keypoints = np.zeros((len(ids), len(parts), 3), np.float32)
    rows = read_rows(folder / "part_locs.txt", numbers(5, key, integer), layout=layout, key="image and part")
    check_listed(rows, (image for (image, _), *_ in rows), ids, "images.txt")
    for i, ((image, part), x, y, visible) in enumerate(rows):
        if part not in index:
            raise UserError(f"{rows.place(i)}: parts.txt does not have part {part}: correct one of the two.")
        if visible not in (0, 1):
            raise UserError(f"{rows.place(i)}: visible is {visible:g}: give 0 (hidden) or 1 (visible).")
        keypoints[ids[image], index[part]] = x, y, visible
    return keypoints, names
