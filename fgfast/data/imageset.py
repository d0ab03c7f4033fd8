"""ImageSet: the images of a data set with their classes, splits and annotations, as every reader returns them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fgfast.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})

EXTRA = "@unlabelled"
"""First component of the paths of images that :meth:`ImageSet.with_folder` adds."""


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the visible subfolders and of the visible files with the extension of an image."""
    with os.scandir(folder) as scan:
        found = sorted((entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith("."))
    images = [name for name, is_dir in found if not is_dir and Path(name).suffix.lower() in EXTENSIONS]
    return [name for name, is_dir in found if is_dir], images


def images_below(folder: Path, *, skip: str = "") -> list[str]:
    """Sorted relative paths of all visible images below a folder, except in folders named ``skip``."""
    folders, images = entries(folder)
    inside = (f"{name}/{rel}" for name in folders if name != skip for rel in images_below(folder / name, skip=skip))
    return [*images, *inside]


@dataclass(frozen=True)
class ImageSet:
    """A data set of N images with their classes, splits and annotations.

    Args:
        root: folder that ``paths`` are relative to.
        paths: N relative paths with forward slashes; see ``other_roots`` for those outside ``root``.
        targets: class indices, int64 [N]; -1 for an image without a label, used only for pretraining.
        classes: class names.
        train: bool [N], True for the training split and for images without a label.
        boxes: (x, y, w, h) of the object in pixels, float32 [N, 4], NaN for an image without a box; or None.
        keypoints: (x, y, visible) of P parts in pixels, float32 [N, P, 3], or None.
        part_names: P names.
        masks: folder of ground-truth id maps in the format of ``fgfast.data.maps``, or None.
        groups: the coarser class of each class (a genus, a manufacturer), or empty.
        banner: height in pixels of a strip at the bottom of every image that is not part of the photograph; views
            leave it out.
        other_roots: (name, folder) of images outside ``root``: a path whose first component is the name is relative
            to the folder.
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
    groups: tuple[str, ...] = ()
    banner: int = 0
    other_roots: tuple[tuple[str, Path], ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(self.paths)

    def files(self) -> list[str]:
        """The N absolute paths."""
        root = str(self.root.resolve())
        files = [f"{root}/{rel}" for rel in self.paths]
        for name, folder in self.other_roots:
            for i, rel in enumerate(self.paths):
                if rel.startswith(f"{name}/"):
                    files[i] = f"{folder}{rel.removeprefix(name)}"
        return files

    def subset(self, which: np.ndarray | Sequence[int]) -> ImageSet:
        """The images that a bool mask [N] or a list of indices selects, in that order."""
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
        """The labelled images of the training split."""
        return self.subset(self.train & (self.targets >= 0))

    def test_set(self) -> ImageSet:
        """The labelled images outside the training split."""
        return self.subset(~self.train & (self.targets >= 0))

    def with_unlabelled(self, paths: Sequence[str]) -> ImageSet:
        """The set with further images, without labels, appended."""
        n = len(paths)

        def pad(values: np.ndarray | None, fill: float) -> np.ndarray | None:
            if values is None:
                return None
            return np.concatenate([values, np.full((n, *values.shape[1:]), fill, values.dtype)])

        return replace(
            self,
            paths=(*self.paths, *paths),
            targets=np.concatenate([self.targets, np.full(n, -1, np.int64)]),
            train=np.concatenate([self.train, np.ones(n, bool)]),
            boxes=pad(self.boxes, np.nan),
            keypoints=pad(self.keypoints, 0),
        )

    def with_folder(self, folder: Path) -> ImageSet:
        """The set with every image below another folder appended, without labels.

        Raises:
            UserError: the folder is missing, holds no image, or holds one of this set (test images would be used for
                training).
        """
        if not folder.is_dir():
            raise UserError(f"The folder {folder} of --unlabelled does not exist: check the path.")
        folder = folder.resolve()
        found = images_below(folder, skip="part_masks")
        if not found:
            raise UserError(f"The folder {folder} of --unlabelled holds no image: check the path.")
        shared = set(self.files()) & {f"{folder}/{rel}" for rel in found}
        if shared:
            raise UserError(f"{min(shared)} is in --data and in --unlabelled: give a folder without images of the set.")
        with_root = replace(self, other_roots=(*self.other_roots, (EXTRA, folder)))
        return with_root.with_unlabelled([f"{EXTRA}/{rel}" for rel in found])
