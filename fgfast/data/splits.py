"""Which images a run trains on, and which it keeps back for tuning."""

from pathlib import Path

import numpy as np

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images


def training_images(config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """The labelled images to train on and those that ``config.holdout`` keeps (every class loses the same share)."""
    images = open_images(Path(config.data))
    held = _held_out(images, config.holdout)
    return images.subset(images.train & (images.targets >= 0) & ~held), images.subset(held)


def scored_images(config: TrainConfig) -> ImageSet:
    """The images that scores are taken on: the held-out ones under ``config.holdout``, else the test split."""
    return training_images(config)[1] if config.holdout else open_images(Path(config.data)).test_set()


def pretext_images(config: TrainConfig) -> ImageSet:
    """The images that a run sees: the labelled ones, the unlabelled ones of the set and of ``config.unlabelled``.

    A method that learns from labels sees the labelled ones alone.
    """
    if not config.takes_unlabelled:
        return training_images(config)[0]
    images = open_images(Path(config.data))
    if config.unlabelled:
        images = images.with_folder(Path(config.unlabelled))
    return images.subset(images.train & ~_held_out(images, config.holdout))


def _held_out(images: ImageSet, share: float) -> np.ndarray:
    """The labelled training images that are kept back, bool [N]."""
    rows = np.flatnonzero(images.train & (images.targets >= 0))
    targets = images.targets[rows]
    rank_in_class = np.ones(len(rows))
    order = np.random.default_rng(12345).permutation(len(rows))
    for c in np.unique(targets):
        members = order[targets[order] == c]
        rank_in_class[members] = np.arange(len(members)) / len(members)
    held = np.zeros(len(images), bool)
    held[rows] = rank_in_class < share
    return held
