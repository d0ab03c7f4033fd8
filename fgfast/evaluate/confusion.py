"""The pairs of classes that an evaluation confuses most."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fgfast.data.imageset import ImageSet

PAIRS = 5  # pairs that are kept
IMAGES = 3  # images of each class


def confused_pairs(predicted: NDArray[Any], truth: NDArray[Any], images: ImageSet) -> list[dict[str, Any]]:
    """The pairs of classes with the most mistakes between them, the most confused first.

    Args:
        predicted: predicted classes, int64 [M].
        truth: classes, int64 [M].
        images: the images scored, whose classes these are; they are named if there are M in the same order, which is
            not so if some could not be read.

    Returns:
        At most 5 times {"classes": [A, B], "mistakes": [images of A taken for B, of B taken for A], "of": [images of A
        that were scored, of B], "images": [paths of up to 3 images of A, of B]}: those mistakes, then images that are
        classified correctly.

    Example:
        >>> from pathlib import Path
        >>> y = np.array([0, 0, 1])
        >>> found = confused_pairs(np.array([0, 1, 1]), y, ImageSet(Path(), ("a", "b", "c"), y, ("A", "B"), y > 1))
        >>> found[0]["mistakes"], found[0]["images"]
        ([1, 0], [['b', 'a'], ['c']])
    """
    wrong = predicted != truth
    pairs, counts = np.unique(np.sort(np.stack([predicted, truth])[:, wrong], axis=0), axis=1, return_counts=True)
    aligned = np.array_equal(truth, images.targets)
    found = []
    for a, b in pairs.T[np.argsort(-counts, kind="stable")[:PAIRS]].tolist():
        classes = [images.classes[a], images.classes[b]]
        row: dict[str, Any] = {"classes": classes, "mistakes": [], "of": [], "images": []}
        for one, other in ((a, b), (b, a)):
            of, mistaken = truth == one, (truth == one) & (predicted == other)
            row["mistakes"].append(int(mistaken.sum()))
            row["of"].append(int(of.sum()))
            order = [*np.flatnonzero(mistaken), *np.flatnonzero(of & ~wrong)]
            row["images"].append([images.paths[i] for i in order[:IMAGES]] if aligned else [])
        found.append(row)
    return found
