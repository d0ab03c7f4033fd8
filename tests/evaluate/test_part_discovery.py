"""Agreement of id maps: 1 for the same parts with other ids, near 0 for noise."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast.evaluate.part_discovery import nmi_ari
from tests.examples import examples

SCORES = ("nmi", "ari", "purity", "coverage", "nmi_all", "ari_all")


def parts(seed: int, images: int = 3, parts: int = 4) -> np.ndarray:
    """Blocks of parts -1..parts-1, different in every image, with at least one block of each."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(-1, parts, (images, 5, 5))
    coarse[:, 0] = np.arange(5) % (parts + 1) - 1
    return coarse.repeat(3, axis=1).repeat(3, axis=2)


@examples(15)
@given(seed=st.integers(0, 2**31))
def test_other_ids_of_the_same_parts_agree_fully(seed):
    truth = parts(seed)
    ids = np.random.default_rng(seed).permutation(4)
    labels = np.where(truth < 0, -1, ids[truth])
    scores = nmi_ari(labels, truth)
    assert [scores[name] for name in SCORES] == pytest.approx([1.0] * 6)
    assert (scores["images"], scores["skipped"]) == (3, 0)


def test_noise_does_not_agree():
    rng = np.random.default_rng(0)
    scores = nmi_ari(rng.integers(0, 4, (2, 40, 40)), rng.integers(0, 4, (2, 40, 40)))
    assert scores["nmi"] < 0.02
    assert abs(scores["ari"]) < 0.02


def test_pixels_without_a_part_affect_only_the_scores_of_all_pixels():
    truth = parts(1)
    rng = np.random.default_rng(1)
    labels = np.where(truth < 0, rng.integers(0, 4, truth.shape), truth)
    scores = nmi_ari(labels, truth)
    assert scores["nmi"] == pytest.approx(1)
    assert scores["ari"] == pytest.approx(1)
    assert scores["nmi_all"] < 0.99


def test_images_without_true_parts_are_counted_and_skipped():
    truth = parts(2)
    truth[1] = -1
    scores = nmi_ari(truth, truth)
    assert (scores["images"], scores["skipped"], scores["ari"]) == (2, 1, pytest.approx(1.0))
    assert np.isnan(nmi_ari(truth[1], truth[1])["nmi"])


def test_coverage_is_the_fraction_of_part_pixels_with_a_label():
    truth = np.zeros((4, 4), np.int64)
    labels = truth.copy()
    labels[0] = -1
    assert nmi_ari(labels, truth)["coverage"] == 0.75


def test_tensors_and_single_images_are_accepted():
    truth = parts(3)
    assert nmi_ari(torch.from_numpy(truth), torch.from_numpy(truth)) == nmi_ari(truth, truth)
    assert nmi_ari(truth[0], truth[0])["images"] == 1


def test_bad_maps_are_refused():
    with pytest.raises(ValueError, match="expected one shape"):
        nmi_ari(np.zeros((2, 3), int), np.zeros((3, 3), int))
    with pytest.raises(ValueError, match="integers"):
        nmi_ari(np.zeros((2, 3)), np.zeros((2, 3)))
