"""Data sets as they lie on disk: CUB-200-2011's layout and folders of pictures, read into one ImageSet."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fgfast.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})


@dataclass(frozen=True)
class ImageSet:
    """The records of a data set: N pictures with class, split and whatever else the set knows.

    Args:
        root: folder that ``paths`` are relative to.
        paths: N relative paths with forward slashes.
        targets: class numbers, int64 [N].
        classes: class names.
        train: bool [N], True for the training split.
        boxes: (x, y, w, h) of the object in pixels, float32 [N, 4], or None.
        keypoints: (x, y, visible) of P parts in pixels, float32 [N, P, 3], or None.
        part_names: P names.
        masks: folder of true part id maps in the form of ``fgfast.data.maps``, or None.
    """

    root: Path
    paths: tuple[str, ...]
    targets: np.ndarray
    classes: tuple[str, ...]
    train: np.ndarray
    boxes: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    part_names: tuple[str, ...] = ()
    masks: Path | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.paths)

    def subset(self, which: np.ndarray | Sequence[int]) -> ImageSet:
        """The records that a bool mask [N] or a list of numbers picks, in that order."""
        rows = np.asarray(which)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        return replace(
            self,
            paths=tuple(self.paths[i] for i in rows),
            targets=self.targets[rows],
            train=self.train[rows],
            boxes=None if self.boxes is None else self.boxes[rows],
            keypoints=None if self.keypoints is None else self.keypoints[rows],
        )

    def train_set(self) -> ImageSet:
        """The training split."""
        return self.subset(self.train)

    def test_set(self) -> ImageSet:
        """The records outside the training split."""
        return self.subset(~self.train)


def open_images(root: Path | str) -> ImageSet:
    """Read a data set from its folder.

    A folder with images.txt is read in CUB-200-2011's layout (a folder part_masks/ holds true part maps). Otherwise
    train/CLASS/picture with val/ or test/; CLASS/picture, all training; or pictures alone, one unlabelled class.

    Args:
        root: the folder.

    Raises:
        UserError: the folder is missing, holds no picture, lacks a file, or has a line that does not parse.

    Example:
        >>> open_images("/nowhere")
        Traceback (most recent call last):
        fgfast.errors.UserError: The data folder /nowhere does not exist: check the path given with --data.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"The data folder {root} does not exist: check the path given with --data.")
    return _open_cub(root) if (root / "images.txt").exists() else _open_folder(root)


def _rows(path: Path, parse: Callable[[str], tuple]) -> list[tuple]:
    """Parse every non-empty line; the first that does not parse is named with its number."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing: a folder with images.txt must have all of CUB-200-2011's lists."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): restore the file.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                rows.append(parse(line.strip()))
            except (ValueError, IndexError) as error:
                raise UserError(f"{path}:{number}: {line.strip()[:80]!r} does not parse: correct the line.") from error
    return rows


def _named(line: str) -> tuple[int, str]:
    number, name = line.split(maxsplit=1)
    return int(number), name


def _numbers(count: int) -> Callable[[str], tuple]:
    def parse(line: str) -> tuple:
        fields = line.split()
        if len(fields) != count:
            raise ValueError(f"{len(fields)} fields instead of {count}")
        values = [float(field) for field in fields]
        if not np.isfinite(values).all():
            raise ValueError("a number is not finite")
        return (int(fields[0]), *values[1:])

    return parse


def _by_image(path: Path, count: int, ids: dict[int, int]) -> np.ndarray:
    """Rows 'id a b ..' as an array [N, count - 1] in the order of images.txt."""
    table = np.full((len(ids), count - 1), np.nan)
    for number, *values in _rows(path, _numbers(count)):
        if number not in ids:
            raise UserError(f"{path} names picture {number}, which images.txt does not have: correct one of the two.")
        table[ids[number]] = values
    absent = np.isnan(table[:, 0])
    if absent.any():
        number = list(ids)[int(absent.argmax())]
        raise UserError(f"{path} has no line for picture {number} of images.txt: add the line.")
    return table


def _open_cub(root: Path) -> ImageSet:
    names = _rows(root / "images.txt", _named)
    ids = {number: i for i, (number, _) in enumerate(names)}
    if not names:
        raise UserError(f"{root / 'images.txt'} names no picture: restore the file.")
    if len(ids) != len(names):
        raise UserError(f"{root / 'images.txt'} gives one number to two pictures: correct the numbers.")
    class_names = dict(_rows(root / "classes.txt", _named))
    order = {number: i for i, number in enumerate(class_names)}
    labels = _by_image(root / "image_class_labels.txt", 2, ids)[:, 0]
    for (_, name), label in zip(names, labels, strict=True):
        if label not in order:
            raise UserError(f"{name} has class {label:g}, which {root / 'classes.txt'} does not name: add the class.")
    targets = np.array([order[int(label)] for label in labels], np.int64)
    empty = np.flatnonzero(np.bincount(targets, minlength=len(order)) == 0)
    if len(empty):
        name = list(class_names.values())[empty[0]]
        raise UserError(f"Class {name} of {root / 'classes.txt'} has no picture: add pictures or drop the class.")
    split = _by_image(root / "train_test_split.txt", 2, ids)[:, 0]
    if not np.isin(split, (0, 1)).all():
        raise UserError(f"{root / 'train_test_split.txt'} must hold 0 (test) or 1 (train): correct the values.")

    boxes, keypoints, part_names = None, None, ()
    if (root / "bounding_boxes.txt").exists():
        boxes = _by_image(root / "bounding_boxes.txt", 5, ids).astype(np.float32)
    if (root / "parts").is_dir():
        parts = dict(_rows(root / "parts" / "parts.txt", _named))
        place = {number: i for i, number in enumerate(parts)}
        part_names = tuple(parts.values())
        keypoints = np.zeros((len(names), len(parts), 3), np.float32)
        path = root / "parts" / "part_locs.txt"
        for number, part, *xyv in _rows(path, _numbers(5)):
            if number not in ids or int(part) not in place:
                raise UserError(f"{path} names picture {number}, part {int(part)}, which are not listed: correct it.")
            keypoints[ids[number], place[int(part)]] = xyv
    if not (root / "images").is_dir():
        raise UserError(f"{root / 'images'} is missing: a folder with images.txt keeps its pictures there.")
    masks = root / "part_masks"
    return ImageSet(
        root=root / "images",
        paths=tuple(name for _, name in names),
        targets=targets,
        classes=tuple(class_names.values()),
        train=split == 1,
        boxes=boxes,
        keypoints=keypoints,
        part_names=part_names,
        masks=masks if masks.is_dir() else None,
    )


def _entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the visible sub-folders and of everything else that looks like a picture."""
    with os.scandir(folder) as scan:
        found = sorted((entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith("."))
    pictures = [name for name, is_dir in found if not is_dir and Path(name).suffix.lower() in EXTENSIONS]
    return [name for name, is_dir in found if is_dir], pictures


def _pictures_below(folder: Path) -> list[str]:
    folders, pictures = _entries(folder)
    return pictures + [f"{name}/{rel}" for name in folders for rel in _pictures_below(folder / name)]


def _class_folders(root: Path, prefix: str) -> dict[str, list[str]]:
    folders, _ = _entries(root / prefix)
    found = {name: [f"{prefix}{name}/{rel}" for rel in _pictures_below(root / prefix / name)] for name in folders}
    for name, pictures in found.items():
        if not pictures:
            raise UserError(f"Class folder {root / prefix / name} has no picture: add pictures or remove the folder.")
    return found


def _open_folder(root: Path) -> ImageSet:
    folders, pictures = _entries(root)
    masks = root / "part_masks"
    if "train" in folders:
        held_out = [name for name in ("val", "test") if name in folders]
        if not held_out:
            raise UserError(f"{root} has train/ but neither val/ nor test/: add one of them.")
        parts = [(_class_folders(root, f"{name}/"), name == "train") for name in ("train", *held_out)]
        if not parts[0][0]:
            raise UserError(f"{root / 'train'} has no class folder: put the pictures into train/CLASS/.")
        classes = sorted(parts[0][0])
        for found, is_train in parts:
            strange = sorted(set(found) - set(classes))
            if strange and not is_train:
                raise UserError(f"Class {strange[0]} of {root} is not in train/: add it there or remove it.")
    else:
        folders = [name for name in folders if name != "part_masks"]
        if folders and pictures:
            raise UserError(f"{root} mixes pictures and folders: put the pictures into folders of their class.")
        if not folders and not pictures:
            raise UserError(f"{root} holds no picture and no class folder: check the path given with --data.")
        if pictures:
            parts = [({"unlabelled": pictures}, True)]
        else:
            found = {name: [f"{name}/{rel}" for rel in _pictures_below(root / name)] for name in folders}
            for name, inside in found.items():
                if not inside:
                    raise UserError(f"Class folder {root / name} has no picture: add pictures or remove the folder.")
            parts = [(found, True)]
        classes = sorted(parts[0][0])
    records = [
        (rel, classes.index(name), is_train)
        for found, is_train in parts
        for name in sorted(found)
        for rel in found[name]
    ]
    return ImageSet(
        root=root,
        paths=tuple(rel for rel, _, _ in records),
        targets=np.array([target for _, target, _ in records], np.int64),
        classes=tuple(classes),
        train=np.array([is_train for _, _, is_train in records], bool),
        masks=masks if masks.is_dir() else None,
    )
