"""IoU against scikit-learn, and its cross-validation against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score

from fgfast.evaluate.iou import count_pixels, cross_validate, iou, mean_iou, split_folds


@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 2**32 - 1))
def test_iou_equals_that_of_scikit_learn(n_images: int, n_classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, n_classes, (n_images, 3, 5))
    predicted = rng.integers(0, n_classes, truth.shape)
    counts = count_pixels(torch.from_numpy(predicted), torch.from_numpy(truth), n_classes).numpy()
    counted = truth >= 0
    present = [c for c in range(n_classes) if (truth == c).any()]
    expected = jaccard_score(truth[counted], predicted[counted], labels=present, average=None) if present else []
    found = iou(counts)
    assert np.flatnonzero(~np.isnan(found)).tolist() == present
    assert found[present] == pytest.approx(np.asarray(expected), abs=1e-12)
    assert mean_iou(counts) == pytest.approx(np.mean(expected) if present else np.nan, abs=1e-12, nan_ok=True)


@given(st.integers(2, 4), st.integers(0, 2**32 - 1))
def test_cross_validation_equals_a_plain_loop_over_pixels(n_folds: int, seed: int) -> None:
    """Every fold chooses by its images and scores the others, each class over all pixels of these images."""
    rng = np.random.default_rng(seed)
    n_images, n_classes, n_checkpoints = 7, 3, 4
    truth = rng.integers(0, n_classes, (n_images, 4, 4))
    predicted = np.where(
        rng.random((n_checkpoints, n_images, 4, 4)) < 0.5, truth, rng.integers(0, n_classes, truth.shape)
    )
    counts = torch.stack(
        [count_pixels(torch.from_numpy(p), torch.from_numpy(truth), n_classes) for p in predicted]
    ).numpy()

    def plain(images: list[int], checkpoint: int) -> float:
        values = []
        for c in range(n_classes):
            found = {(i, *p) for i in images for p in np.argwhere(predicted[checkpoint, i] == c).tolist()}
            true = {(i, *p) for i in images for p in np.argwhere(truth[i] == c).tolist()}
            values += [len(found & true) / len(found | true)] if true else []
        return sum(values) / len(values)

    folds = split_folds(n_images, n_folds, seed)
    result = cross_validate(counts, folds)
    for k, fold in enumerate(folds):
        selection = [plain(fold.tolist(), e) for e in range(n_checkpoints)]
        best = max(range(n_checkpoints), key=lambda e: selection[e])
        rest = [i for i in range(n_images) if i not in fold]
        assert result.chosen[k] == best
        assert result.scores[k] == pytest.approx(plain(rest, best), abs=1e-12)


@given(st.integers(2, 30), st.integers(2, 6), st.integers(0, 9))
def test_folds_split_the_images_evenly(n: int, folds: int, seed: int) -> None:
    parts = split_folds(n, folds, seed)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_class_that_the_images_do_not_show_is_left_out_though_it_is_predicted() -> None:
    truth, predicted = torch.tensor([[[0, 0, 1, 1]]]), torch.tensor([[[0, 2, 1, 1]]])
    assert mean_iou(count_pixels(predicted, truth, 3).numpy()) == (1 / 2 + 1) / 2


def test_maps_of_different_shapes_or_without_a_batch_are_refused() -> None:
    one, other = (torch.zeros(1, *side, dtype=torch.int64) for side in ((3, 2), (2, 3)))
    with pytest.raises(ValueError, match=r"^predicted: expected shape \[1, 2, 3\], got \[1, 3, 2\]"):
        count_pixels(one, other, 2)
    with pytest.raises(ValueError, match=r"^truth: expected shape \[B, H, W\], got \[3, 2\]"):
        count_pixels(one[0], one[0], 2)
