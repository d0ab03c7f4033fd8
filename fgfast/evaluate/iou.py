"""Intersection over union of segmentations, and its cross-validation over checkpoints and images."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fgfast.tensors import shape_error


def count_pixels(predicted: Tensor, truth: Tensor, n_classes: int, ignore: int = -1) -> Tensor:
    """Pixels of each image and class where prediction and truth agree, that are predicted, and that are true.

    Args:
        predicted: classes int64 [B, H, W], 0..C-1.
        truth: true classes, the same shape; ``ignore`` where a pixel does not count.
        n_classes: C.
        ignore: the value of ``truth`` that leaves a pixel out.

    Returns:
        int64 [B, 3, C].

    Raises:
        ValueError: shapes that differ or are not [B, H, W].

    Example:
        >>> count_pixels(torch.tensor([[[0, 1, 1]]]), torch.tensor([[[0, 0, -1]]]), 2).tolist()
        [[[1, 0], [1, 1], [2, 0]]]
    """
    if truth.ndim != 3:
        raise shape_error("truth", "[B, H, W]", truth)
    if predicted.shape != truth.shape:
        raise shape_error("predicted", str(list(truth.shape)), predicted)
    batch = len(predicted)
    image = torch.arange(batch, device=truth.device)[:, None, None].expand_as(truth)
    counted = truth != ignore
    pairs = ((image * n_classes + truth) * n_classes + predicted)[counted]
    table = torch.bincount(pairs, minlength=batch * n_classes**2).view(batch, n_classes, n_classes)
    return torch.stack([table.diagonal(dim1=1, dim2=2), table.sum(1), table.sum(2)], 1)


def iou(counts: np.ndarray) -> np.ndarray:
    """Intersection over union of each class, summed over images before the division.

    IoU_c = sum_i |predicted and true| / sum_i |predicted or true|, over pixels of class c in image i. A class without a
    true pixel in these images is left out (NaN), whether or not it is predicted: which classes are averaged then
    depends on the images alone.

    Args:
        counts: of :func:`count_pixels`, int [M, 3, C].

    Returns:
        float64 [C].

    Example:
        >>> iou(np.array([[[1, 0, 0], [1, 1, 0], [2, 0, 0]]])).tolist()
        [0.5, nan, nan]
    """
    both, predicted, true = counts.sum(0, dtype=np.int64)
    return np.where(true > 0, both / np.maximum(predicted + true - both, 1), np.nan)


def mean_iou(counts: np.ndarray) -> float:
    """Mean of :func:`iou` over the classes that have a true pixel; NaN if none has.

    Example:
        >>> mean_iou(np.array([[[1, 0, 0], [1, 1, 0], [2, 0, 0]]]))
        0.5
    """
    values = iou(counts)
    present = ~np.isnan(values)
    return float(values[present].mean()) if present.any() else float("nan")


def split_folds(n: int, folds: int, seed: int) -> list[np.ndarray]:
    """Positions of n images in random folds whose sizes differ by at most one.

    Example:
        >>> [len(fold) for fold in split_folds(8, 3, seed=0)]
        [3, 3, 2]
    """
    return np.array_split(np.random.default_rng(seed).permutation(n), folds)


@dataclass(frozen=True)
class CrossValidation:
    """Scores of K folds.

    Args:
        scores: mIoU of each fold, float64 [K].
        classes: IoU of each class in each fold, float64 [K, C], NaN where the class is absent.
        chosen: checkpoint chosen in each fold, int64 [K].
    """

    scores: np.ndarray
    classes: np.ndarray
    chosen: np.ndarray


def cross_validate(counts: np.ndarray, folds: list[np.ndarray]) -> CrossValidation:
    """In each fold its images choose the checkpoint with the largest mIoU (the first of equals); the rest is scored.

    Args:
        counts: of :func:`count_pixels` for E checkpoints, int [E, M, 3, C].
        folds: positions of images, in K folds, see :func:`split_folds`.

    Example:
        >>> perfect, wrong = [[[2, 2], [2, 2], [2, 2]]] * 4, [[[0, 0], [2, 2], [2, 2]]] * 4
        >>> cross_validate(np.array([wrong, perfect]), split_folds(4, 2, seed=0)).scores.tolist()
        [1.0, 1.0]

    Source: the evaluation of Saha and Maji, "PARTICLE: Part Discovery and Contrastive Learning for Fine-grained
    Recognition", 2023. Differences: folds are random instead of stretches of a list; images that do not divide evenly
    belong to folds too; an absent class is left out of the mean instead of counting as 0.
    """
    scores, classes, chosen = [], [], []
    for fold in folds:
        best = int(np.argmax([np.nan_to_num(mean_iou(checkpoint[fold])) for checkpoint in counts]))
        rest = np.delete(counts[best], fold, axis=0)
        scores.append(mean_iou(rest))
        classes.append(iou(rest))
        chosen.append(best)
    return CrossValidation(np.array(scores), np.array(classes), np.array(chosen))
