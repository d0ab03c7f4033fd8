"""The images of a few-shot segmentation: which are labelled, what their masks say, and whether they fit."""

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fgfast.data.imageset import ImageSet
from fgfast.data.manifest import check_images
from fgfast.data.maps import ABSENT, map_path, read_map, read_maps_info
from fgfast.errors import UserError
from fgfast.evaluate.iou import split_folds

IGNORED = -1
"""The class of a pixel that counts nowhere."""


@dataclass(frozen=True)
class SegmentationOptions:
    """Options of :func:`fgfast.evaluate.segmentation.segment`; the defaults are those of Saha and Maji."""

    n_labelled: int = 150
    """Labelled training images, drawn at random."""
    folds: int = 5
    """Folds of the test images; in each, its images choose the checkpoint and the rest is scored."""
    epochs: int = 200
    """Epochs over the labelled images."""
    every: int = 5
    """Epochs between two checkpoints; the last epoch is one too."""
    lr: float = 1e-5
    """Learning rate of Adam, constant."""
    batch_size: int = 8
    """Images per step; an incomplete batch is left out."""
    seed: int = 0
    """Seed of the labelled images, the folds, the decoder, the views and the order."""


@dataclass(frozen=True)
class MaskClasses:
    """The classes of the pixels of a folder of id maps.

    Args:
        names: C names, the background first if it is a class.
        first: class of id 0: 1 if pixels without an id are the background, class 0; else 0, and they are ignored.
        mirrored: the class that each class has in a flipped image: left and right parts are swapped.
    """

    names: tuple[str, ...]
    first: int
    mirrored: tuple[int, ...]

    def of(self, ids: Tensor, flipped: Tensor | None = None) -> Tensor:
        """Classes, -1 where ignored, of ids int64 [B, H, W]; ``flipped``, bool [B], marks flipped images."""
        classes = ids + self.first
        if flipped is None or self.mirrored == tuple(range(len(self.names))):
            return classes
        swapped = torch.tensor([*self.mirrored, IGNORED], device=ids.device)[classes]  # -1 takes the last
        return torch.where(flipped[:, None, None], swapped, classes)


_OTHER_SIDE = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}


def mask_classes(maps: Path) -> MaskClasses:
    """The classes of the pixels of a folder of id maps, from its maps.json.

    Names come from "parts", else they are numbers. Names that differ in the words left and right are mirror images.

    Raises:
        UserError: the file is missing or damaged, or its names are not one for each id.
    """
    info = read_maps_info(maps)
    names = info.get("parts") or [f"part {i}" for i in range(info["n_parts"])]
    background = info.get("absent", "background") == "background"
    names = (["background"] if background else []) + names
    if len(set(names)) < len(names) or len(names) != info["n_parts"] + background:
        raise UserError(
            f"{maps / 'maps.json'} names the parts {', '.join(names[background:])}: give {info['n_parts']} names that "
            f"differ{' and are not background' if background else ''}."
        )
    mirrored = [names.index(_mirror(name)) if _mirror(name) in names else i for i, name in enumerate(names)]
    return MaskClasses(tuple(names), int(background), tuple(mirrored))


def _mirror(name: str) -> str:
    """A name with left for right and right for left."""
    return re.sub("(?<![A-Za-z])(left|right|Left|Right)(?![A-Za-z])", lambda m: _OTHER_SIDE[m[0]], name)


@dataclass(frozen=True)
class FewShot:
    """The images of a segmentation.

    Args:
        labelled: the labelled images to train on.
        test: the images to score.
        classes: the classes of their pixels.
        folds: positions of the images of each fold in ``test``.
    """

    labelled: ImageSet
    test: ImageSet
    classes: MaskClasses
    folds: list[np.ndarray]


def choose_images(fit: ImageSet, test: ImageSet, options: SegmentationOptions) -> FewShot:
    """Draw the labelled images, split the test images into folds, and check every image and mask of both.

    Args:
        fit: training images, from which the labelled ones are drawn.
        test: images to score.
        options: see ``SegmentationOptions``.

    Raises:
        UserError: no masks, a damaged one or one of another size than its image, too few images, or only one class.
    """
    o = options
    if fit.masks is None:
        raise UserError(f"{fit.root} has no part masks: choose another protocol than segmentation.")
    if len(fit) < o.n_labelled:
        raise UserError(
            f"n_labelled is {o.n_labelled} and {fit.root} has {len(fit)} training images: give at most as many."
        )
    classes = mask_classes(fit.masks)
    drawn = np.random.default_rng(o.seed).permutation(len(fit))[: o.n_labelled]
    labelled, _ = _with_masks(fit.subset(np.sort(drawn)), classes, "labelled training images")
    test, tested = _with_masks(test, classes, "test images")
    if len(test) < o.folds:
        raise UserError(f"folds is {o.folds} and {fit.root} has {len(test)} test images: give at most as many.")
    folds = split_folds(len(test), o.folds, o.seed)
    for fold in folds:
        if not tested[fold].any() or not np.delete(tested, fold, axis=0).any():
            raise UserError(f"A fold of the test images of {fit.root} has no labelled pixel: give fewer folds.")
    return FewShot(labelled, test, classes, folds)


def _with_masks(images: ImageSet, classes: MaskClasses, what: str) -> tuple[ImageSet, np.ndarray]:
    """The images that can be read, and which classes each of them shows, bool [M, C]."""
    assert images.masks is not None  # checked before
    maps = images.masks
    records = check_images(images)
    images = images.subset(records.index)

    def classes_of(rel: str, size: np.ndarray) -> np.ndarray:
        ids = torch.from_numpy(read_map(maps, rel)).long()
        if tuple(ids.shape) != tuple(size):
            raise UserError(
                f"{map_path(maps, rel)} is {ids.shape[0]} x {ids.shape[1]} and its image {size[0]} x {size[1]}: give "
                "masks of the size of their images."
            )
        found = classes.of(ids.masked_fill(ids == ABSENT, -1)).unique()
        return np.isin(np.arange(len(classes.names)), found.numpy())

    with ThreadPoolExecutor() as pool:
        shown = np.stack(list(pool.map(classes_of, images.paths, records.sizes)))
    names = [classes.names[c] for c in np.flatnonzero(shown.any(axis=0))]
    if len(names) < 2:
        raise UserError(
            f"The {len(images)} {what} of {images.root} show {f'one class ({names[0]})' if names else 'no class'}: "
            "segmentation needs two or more."
        )
    return images, shown
