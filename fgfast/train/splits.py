"""Which pictures a run trains on, and which it keeps back for tuning."""

from pathlib import Path

import numpy as np

from fgfast.data.layouts import ImageSet, open_images
from fgfast.train.config import TrainConfig


def training_images(config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """The pictures to train on and those that ``config.holdout`` keeps back (every class loses the same share)."""
    images = open_images(Path(config.data)).train_set()
    if config.holdout == 0:
        return images, images.subset(np.zeros(len(images), dtype=bool))
    rank_in_class = np.zeros(len(images))
    order = np.random.default_rng(12345).permutation(len(images))
    for c in np.unique(images.targets):
        members = order[images.targets[order] == c]
        rank_in_class[members] = np.arange(len(members)) / len(members)
    held = rank_in_class < config.holdout
    return images.subset(~held), images.subset(held)
