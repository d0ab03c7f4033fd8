"""The images that a run trains on, and those that it holds out for tuning."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fgfast.config import TrainConfig
from fgfast.data.imageset import ImageSet, describe
from fgfast.data.kept import FILE, held_out_paths
from fgfast.data.layouts import open_images


@dataclass(frozen=True)
class Splits:
    """The images of a run, by use.

    Args:
        images: all images.
        held_out: mask of the training images that are held out for tuning, bool [N].
        config: the options of the run.
    """

    images: ImageSet
    held_out: np.ndarray
    config: TrainConfig

    def training(self) -> ImageSet:
        """The labelled training images without those held out."""
        return self.images.subset(self.images.train & (self.images.targets >= 0) & ~self.held_out)

    def pretext(self) -> ImageSet:
        """The training images without those held out, with or without a label."""
        return self.images.subset(self.images.train & ~self.held_out)

    def scored(self) -> ImageSet:
        """The images that are scored: the held-out ones if ``config.holdout`` > 0, else the test split."""
        return self.images.subset(self.held_out) if self.config.holdout else self.images.test_set()

    def held_out_paths(self) -> list[str]:
        """The relative paths of the held-out images."""
        return [self.images.paths[i] for i in np.flatnonzero(self.held_out)]

    def describe(self) -> str:
        """One line that says what was read, and what was left out and why."""
        return describe(self.images, held_out=int(self.held_out.sum()))


def pretext_splits(config: TrainConfig) -> Splits:
    """The images of a training run, with those of ``config.unlabelled``; only labelled ones if the method needs labels.

    Raises:
        UserError: a folder cannot be read.
    """
    images = open_images(Path(config.data))
    if not config.takes_unlabelled:
        images = images.without_unlabelled("the method learns from labels")
    elif config.unlabelled:
        images = images.with_folder(Path(config.unlabelled))
    run = Path(config.out)
    began = config.resume and any((run / name).exists() for name in ("last.pt", "previous.pt"))
    return Splits(images, _held_out(images, config.holdout, run if began else None), config)


def labelled_splits(config: TrainConfig) -> Splits:
    """The labelled images of the set, for scores.

    Raises:
        UserError: the folder cannot be read.
    """
    images = open_images(Path(config.data)).without_unlabelled("scores need labels")
    return Splits(images, _held_out(images, config.holdout, Path(config.out)), config)


def training_images(config: TrainConfig) -> tuple[ImageSet, ImageSet]:
    """The labelled training images without those held out, and those held out: ``config.holdout`` of every class."""
    splits = labelled_splits(config)
    return splits.training(), splits.images.subset(splits.held_out)


def scored_images(config: TrainConfig) -> ImageSet:
    """The images that are scored: the held-out ones if ``config.holdout`` > 0, else the test split."""
    return labelled_splits(config).scored()


def pretext_images(config: TrainConfig) -> ImageSet:
    """The training images of a run: the labelled ones and the unlabelled ones of the set and ``config.unlabelled``.

    A method that learns from labels gets only the labelled ones.
    """
    return pretext_splits(config).pretext()


def _held_out(images: ImageSet, fraction: float, run: Path | None = None) -> np.ndarray:
    """Mask of the held-out images: ``fraction`` of the labelled training images of every class, bool [N].

    Those of a run stay what they were when it began, or it would be scored on images that it trained on once one is
    lost. The folder may also hold other images than the run's, of which few are named alike.
    """
    if fraction and run is not None:
        began = held_out_paths(run / FILE)
        mask = np.array([rel in began for rel in images.paths], bool)
        if 2 * mask.sum() > len(began):
            return mask
    rows = np.flatnonzero(images.train & (images.targets >= 0))
    order = np.random.default_rng(12345).permutation(len(rows))
    order = order[np.argsort(images.targets[rows][order], kind="stable")]  # the classes one after another
    counts = np.bincount(images.targets[rows])
    rank_in_class = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = np.zeros(len(images), bool)
    mask[rows[order]] = rank_in_class / np.repeat(counts, counts) < fraction
    return mask
