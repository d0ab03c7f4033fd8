"""What every reader returns: the records of a data set, and where their files lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fgfast.errors import UserError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})

EXTRA = "@unlabelled"
"""First part of the paths of images that :meth:`ImageSet.with_folder` adds."""


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the visible sub-folders and of everything else that looks like an image."""
    with os.scandir(folder) as scan:
        found = sorted((entry.name, entry.is_dir()) for entry in scan if not entry.name.startswith("."))
    images = [name for name, is_dir in found if not is_dir and Path(name).suffix.lower() in EXTENSIONS]
    return [name for name, is_dir in found if is_dir], images


def images_below(folder: Path, *, skip: str = "") -> list[str]:
    """Relative paths of all visible images below a folder, sorted; folders called ``skip`` are left out."""
    folders, images = entries(folder)
    inside = (f"{name}/{rel}" for name in folders if name != skip for rel in images_below(folder / name, skip=skip))
    return [*images, *inside]


@dataclass(frozen=True)
class ImageSet:
    """The records of a data set: N images with class, split and whatever else the set knows.

    Args:
        root: folder that ``paths`` are relative to.
        paths: N relative paths with forward slashes; those that begin with the name of a mount lie there instead.
        targets: class numbers, int64 [N]; -1 where an image has no label (it is for pretext training alone).
        classes: class names.
        train: bool [N], True for the training split and for images without a label.
        boxes: (x, y, w, h) of the object in pixels, float32 [N, 4], NaN where an image has none; or None.
        keypoints: (x, y, visible) of P parts in pixels, float32 [N, P, 3], or None.
        part_names: P names.
        masks: folder of true part id maps in the form of ``fgfast.data.maps``, or None.
        groups: the coarser class of each class (a genus, a manufacturer), or nothing.
        banner: rows at the bottom of every image that are no part of the photograph; no view shows them.
        mounts: (name, folder) of paths that lie outside ``root``.
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
    mounts: tuple[tuple[str, Path], ...] = ()

    def __len__(self) -> int:
        """N."""
        return len(self.paths)

    def files(self) -> list[str]:
        """The N absolute paths."""
        root = str(self.root.resolve())
        files = [f"{root}/{rel}" for rel in self.paths]
        for name, folder in self.mounts:
            for i, rel in enumerate(self.paths):
                if rel.startswith(f"{name}/"):
                    files[i] = f"{folder}{rel.removeprefix(name)}"
        return files

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
        """The training split; images without a label are not in it."""
        return self.subset(self.train & (self.targets >= 0))

    def test_set(self) -> ImageSet:
        """The labelled records outside the training split."""
        return self.subset(~self.train & (self.targets >= 0))

    def with_unlabelled(self, paths: Sequence[str]) -> ImageSet:
        """The same set with further images without labels at its end."""
        n = len(paths)

        def padded(values: np.ndarray | None, fill: float) -> np.ndarray | None:
            if values is None:
                return None
            return np.concatenate([values, np.full((n, *values.shape[1:]), fill, values.dtype)])

        return replace(
            self,
            paths=(*self.paths, *paths),
            targets=np.concatenate([self.targets, np.full(n, -1, np.int64)]),
            train=np.concatenate([self.train, np.ones(n, bool)]),
            boxes=padded(self.boxes, np.nan),
            keypoints=padded(self.keypoints, 0),
        )

    def with_folder(self, folder: Path) -> ImageSet:
        """The same set with every image below another folder, without labels, at its end.

        Raises:
            UserError: the folder is missing, holds no image, or one of this set (test images would be trained on).
        """
        if not folder.is_dir():
            raise UserError(f"The folder {folder} of --unlabelled does not exist: check the path.")
        folder = folder.resolve()
        found = images_below(folder, skip="part_masks")
        if not found:
            raise UserError(f"The folder {folder} of --unlabelled holds no image: check the path.")
        both = set(self.files()) & {f"{folder}/{rel}" for rel in found}
        if both:
            raise UserError(f"{min(both)} is in --data and in --unlabelled: give a folder that holds none of the set.")
        mounted = replace(self, mounts=(*self.mounts, (EXTRA, folder)))
        return mounted.with_unlabelled([f"{EXTRA}/{rel}" for rel in found])
