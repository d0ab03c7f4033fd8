"""The images that a run trains on, and those that it holds out for tuning."""

from pathlib import Path

import numpy as np

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images


def training_images(config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """The labelled training images without those held out, and those held out: ``config.holdout`` of every class."""
    images = open_images(Path(config.data))
    held_out = _held_out(images, config.holdout)
    return images.subset(images.train & (images.targets >= 0) & ~held_out), images.subset(held_out)


def scored_images(config: TrainConfig) -> ImageSet:
    """The images that are scored: the held-out ones if ``config.holdout`` > 0, else the test split."""
    return training_images(config)[1] if config.holdout else open_images(Path(config.data)).test_set()


def pretext_images(config: TrainConfig) -> ImageSet:
    """The training images of a run: the labelled ones and the unlabelled ones of the set and ``config.unlabelled``.

    A method that learns from labels gets only the labelled ones.
    """
    if not config.takes_unlabelled:
        return training_images(config)[0]
    images = open_images(Path(config.data))
    if config.unlabelled:
        images = images.with_folder(Path(config.unlabelled))
    return images.subset(images.train & ~_held_out(images, config.holdout))


def _held_out(images: ImageSet, fraction: float) -> np.ndarray:
    """Mask of the held-out images: ``fraction`` of the labelled training images of every class, bool [N]."""
    rows = np.flatnonzero(images.train & (images.targets >= 0))
    targets = images.targets[rows]
    rank_in_class = np.ones(len(rows))
    order = np.random.default_rng(12345).permutation(len(rows))
    for c in np.unique(targets):
        members = order[targets[order] == c]
        rank_in_class[members] = np.arange(len(members)) / len(members)
    mask = np.zeros(len(images), bool)
    mask[rows] = rank_in_class < fraction
    return mask
