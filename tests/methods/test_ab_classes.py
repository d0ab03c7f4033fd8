"""Colour classes: bins, soft labels, the prior and its weights."""

import pytest
import torch

from fgfast.data.lab import rgb_to_lab
from fgfast.methods.ab_classes import AbClasses, ab_bins, rebalancing_weights


@pytest.fixture(scope="module")
def classes() -> AbClasses:
    return AbClasses()


@pytest.fixture(scope="module")
def colours() -> torch.Tensor:
    """Random colours of sRGB and the corners of its cube, ab [N, 2]."""
    g = torch.Generator().manual_seed(0)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    rgb = torch.cat([corners, torch.rand(3000, 3, generator=g)])
    return rgb_to_lab(rgb.T[:, :, None])[1:, :, 0].T.contiguous()


def test_bins_surround_every_colour(colours: torch.Tensor) -> None:
    """There are 309 points of the grid, and each colour lies in a cell whose four corners are among them."""
    bins = {tuple(b) for b in ab_bins().tolist()}
    assert len(bins) == 309
    low = (colours / 10).floor() * 10
    for shift in ((0, 0), (0, 10), (10, 0), (10, 10)):
        assert {tuple(c) for c in (low + torch.tensor(shift)).tolist()} <= bins


def test_soft_labels_equal_a_search_over_all_bins(classes: AbClasses, colours: torch.Tensor) -> None:
    """The five nearest of all bins are weighted by exp(-d^2 / 50), with sum 1."""
    index, weight = classes.encode(colours)
    distance = torch.cdist(colours.double(), classes.centres.double())
    nearest, _ = distance.topk(5, dim=1, largest=False)
    torch.testing.assert_close(distance.gather(1, index), nearest, rtol=0, atol=1e-4)  # ties go either way
    expected = torch.exp(-nearest.square() / 50)
    torch.testing.assert_close(weight.double(), expected / expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.sum(1), torch.ones(len(colours)))


def test_the_nearest_bin_of_a_bin_is_itself(classes: AbClasses) -> None:
    assert torch.equal(classes.encode(classes.centres)[0][:, 0], torch.arange(len(classes)))


def test_histogram_counts_every_colour_once(classes: AbClasses, colours: torch.Tensor) -> None:
    counts = classes.histogram(colours)
    index, weight = classes.encode(colours)
    expected = torch.zeros(len(classes), dtype=torch.float64)
    for row, values in zip(index.tolist(), weight.double(), strict=True):
        expected[row] += values
    torch.testing.assert_close(counts, expected)
    assert counts.sum() == pytest.approx(len(colours), rel=1e-5)


def test_the_smoothed_prior_is_a_probability(classes: AbClasses) -> None:
    """It has sum 1 and spreads to neighbours, at the edge of the gamut too."""
    one = torch.zeros(len(classes))
    one[0] = 7.0
    smooth = classes.smooth(one)
    assert smooth.sum().item() == pytest.approx(1)
    assert smooth.argmax() == 0
    assert (smooth > 0.01).sum() > 1


@pytest.mark.parametrize("mix", [0.0, 0.5, 1.0])
def test_weights_have_expectation_one(mix: float) -> None:
    g = torch.Generator().manual_seed(0)
    prior = torch.rand(309, generator=g, dtype=torch.float64) ** 4 + 1e-6
    prior = prior / prior.sum()
    weights = rebalancing_weights(prior, mix)
    assert (weights * prior).sum().item() == pytest.approx(1)
    torch.testing.assert_close(
        weights[0] / weights[1], ((1 - mix) * prior[1] + mix / 309) / ((1 - mix) * prior[0] + mix / 309)
    )


def test_annealed_mean_goes_from_mean_to_mode(classes: AbClasses) -> None:
    """At temperature 1 it is the mean of the distribution, near 0 its most likely bin."""
    logits = torch.randn(4, len(classes), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(classes.annealed_mean(logits, 1.0), logits.softmax(1) @ classes.centres)
    torch.testing.assert_close(classes.annealed_mean(logits, 1e-3), classes.centres[logits.argmax(1)])
