"""ImageSet: the images of a data set with their classes, splits and annotations, as every reader returns them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fgfast.data.inside import leads_out
from fgfast.data.slices import File, Slices
from fgfast.errors import UserError, one_line

log = logging.getLogger("fgfast")

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2"})

EXTRA = "@unlabelled"
"""First component of the paths of images that :meth:`ImageSet.with_folder` adds."""


UNLABELLED = "unlabelled"
"""The one class of a set that has none."""


def entries(folder: Path) -> tuple[list[str], list[str]]:
    """Sorted names of the visible subfolders and of the visible files with the extension of an image.

    A link that leads back to a folder on the way to it is left out and logged, as is a link to nothing without the
    extension of an image.

    Raises:
        UserError: the folder cannot be listed.
    """
    folders, images = [], []
    try:
        with os.scandir(folder) as scan:
            found = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be listed ({error.strerror}): change or remove it.") from error
    for entry in found:
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            if entry.is_symlink() and _leads_back(entry.path):
                _leave_out(entry.path, "a folder that it is in")
            else:
                folders.append(entry.name)
        elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
            images.append(entry.name)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            _leave_out(entry.path, "nothing")
    return folders, images


def _leads_back(link: str) -> bool:
    """Whether a link leads to a folder whose walk would come to the link again."""
    target = os.path.realpath(link)
    return any(Path(os.path.realpath(above)).is_relative_to(target) for above in Path(link).parents)


@cache
def _leave_out(link: str, target: str) -> None:
    """Log a link once, however often its folder is listed."""
    log.warning("left out %s: it is a link to %s", link, target)


def images_below(folder: Path, *, skip: str = "") -> list[str]:
    """Sorted relative paths of all visible images below a folder, except in folders named ``skip``."""
    found, waiting = [], [""]
    while waiting:
        inside = waiting.pop()
        folders, images = entries(folder / inside if inside else folder)
        found += [f"{inside}{name}" for name in images]
        waiting += [f"{inside}{name}/" for name in reversed(folders) if name != skip]
    return found


def linked_images(files: Iterable[File], others: Iterable[File]) -> Iterator[tuple[str, str]]:
    """The pairs of a path in ``files`` and one in ``others`` that are the same image, directly or by links."""
    real_folder = cache(os.path.realpath)

    def real(file: str) -> str:
        folder, name = os.path.split(file)
        return os.path.realpath(file) if os.path.islink(file) else os.path.join(real_folder(folder), name)

    known = {real(file): file for file in files if isinstance(file, str)}
    for file in (file for file in others if isinstance(file, str)) if known else ():
        if (same := known.get(real(file))) is not None:
            yield same, file


class LeftOut(NamedTuple):
    """Images of a folder that a reader did not take.

    Args:
        name: their folder, absolute or relative to ``ImageSet.root``, or what they are.
        n_images: how many they are; 0 for a list that was not read.
        reason: why they were left out.
    """

    name: str
    n_images: int
    reason: str


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
        left_out: images of the folder that are not in the set, and why.
        source: what was read, for messages: the layout and the folder.
        slices: where the images lie in larger files (shards), or None if each has a file of its own.
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
    left_out: tuple[LeftOut, ...] = ()
    source: str = ""
    slices: Slices | None = None

    def __len__(self) -> int:
        """N."""
        return len(self.paths)

    @property
    def has_labels(self) -> bool:
        """Whether the set has classes."""
        return self.classes != (UNLABELLED,)

    def files(self) -> list[File]:
        """The N absolute paths, or slices of larger files.

        Raises:
            UserError: a path leads out of ``root``.
        """
        outside = next((rel for rel in self.paths if leads_out(rel)), None)
        if outside is not None:
            raise UserError(f"The path {outside!r} leaves {self.root}: give one inside it.")
        root = str(self.root.resolve())
        files: list[File] = [f"{root}/{rel}" for rel in self.paths]
        for name, folder in self.other_roots:
            for i, rel in enumerate(self.paths):
                if rel.startswith(f"{name}/"):
                    files[i] = f"{folder}{rel.removeprefix(name)}"
        if self.slices is None:
            return files
        return [file if piece is None else piece for piece, file in zip(self.slices, files, strict=True)]

    def file(self, i: int) -> File:
        """The absolute path of image ``i``, or its slice of a larger file."""
        if self.slices is not None and (piece := self.slices[i]) is not None:
            return piece
        rel = self.paths[i]
        name, _, inside = rel.partition("/")
        folder = dict(self.other_roots).get(name) if inside else None
        return f"{self.root.resolve()}/{rel}" if folder is None else f"{folder}/{inside}"

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
            slices=None if self.slices is None else self.slices.take(rows),
        )

    def sample(self, n: int, seed: int = 0) -> ImageSet:
        """At most ``n`` random images, in the order of the set and the same for every call with a seed."""
        return self.subset(np.sort(np.random.default_rng(seed).permutation(len(self))[:n]))

    def train_set(self) -> ImageSet:
        """The labelled images of the training split."""
        return self.subset(self.train & (self.targets >= 0))

    def test_set(self) -> ImageSet:
        """The labelled images outside the training split."""
        return self.subset(~self.train & (self.targets >= 0))

    def without_unlabelled(self, reason: str) -> ImageSet:
        """The set without the images that have no label, which are left out for a reason."""
        labelled = self.targets >= 0
        if labelled.all():
            return self
        left_out = LeftOut("images without labels", int((~labelled).sum()), reason)
        return replace(self.subset(labelled), left_out=(*self.left_out, left_out))

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
            slices=None if self.slices is None else self.slices.take(np.r_[np.arange(len(self)), np.full(n, -1)]),
        )

    def with_folder(self, folder: Path) -> ImageSet:
        """The set with every image below another folder appended, without labels.

        Raises:
            UserError: the folder is missing, holds no image, or holds one of this set, be it by a link (test images
                would be used for training).
        """
        if not folder.is_dir():
            what = "is a file: give a folder" if folder.exists() else "does not exist: check the path"
            raise UserError(f"The folder {folder} of --unlabelled {what}.")
        folder = folder.resolve()
        found = images_below(folder, skip="part_masks")
        if not found:
            raise UserError(f"The folder {folder} of --unlabelled holds no image: check the path.")
        if any(rel.startswith(f"{EXTRA}/") for rel in self.paths):
            raise UserError(f"The set in {self.root} has a folder {EXTRA}, the name of --unlabelled: rename it.")
        for file, same in linked_images(self.files(), [f"{folder}/{rel}" for rel in found]):
            where = same if same == file else f"{same}, the same image as {file},"
            raise UserError(f"{where} is in --data and in --unlabelled: give a folder without images of the set.")
        left_out = tuple(part for part in self.left_out if (self.root / part.name).resolve() != folder)
        with_root = replace(self, other_roots=(*self.other_roots, (EXTRA, folder)), left_out=left_out)
        return with_root.with_unlabelled([f"{EXTRA}/{rel}" for rel in found])


def describe(images: ImageSet, *, held_out: int = 0) -> str:
    """One line that says what was read: classes, images of each kind, and what was left out and why.

    Args:
        images: the set.
        held_out: number of its training images that are held out.
    """
    labelled = images.targets >= 0
    n_train, n_test = int((images.train & labelled).sum()), int((~images.train & labelled).sum())
    shown = ", ".join(images.classes[:3]) + (", ..." if len(images.classes) > 3 else "")
    counts = [
        f"{len(images.classes):,} {'class' if len(images.classes) == 1 else 'classes'} ({shown})",
        _count(n_train, "training image") + (f" ({held_out:,} of them held out)" if held_out else ""),
        _count(n_test, "test image"),
        f"{len(images) - n_train - n_test:,} without labels",
    ]
    text = f"data: {images.source or images.root}: {', '.join(counts)}"
    if images.left_out:
        counted = ((name, f"{_count(n, 'image')}, " if n else "", reason) for name, n, reason in images.left_out)
        text += "; left out: " + ", ".join(f"{name} ({count}{reason})" for name, count, reason in counted)
    return one_line(text)


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
