"""kmeans of feature pyramids against kmeans of the built hypercolumns."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fgfast.ops.kmeans.kmeans  # noqa: F401  (registers the operations)
from fgfast import kmeans
from fgfast.pixels.pyramid import Pyramid
from fgfast.reference.kmeans import hypercolumns
from tests.examples import examples
from tests.ops.kmeans_data import METRICS, pyramid, same, seeds, sklearn


def test_pyramid_equals_scikit_learn_on_the_built_matrix():
    maps = pyramid(0, 1, torch.float32)
    x = hypercolumns(maps, (8, 8))[0]
    theirs = sklearn(x, x[:5])
    ours = kmeans(maps, 5, size=8, init=x[:5], n_iter=30)
    assert np.array_equal(ours.labels.flatten().numpy(), theirs.labels_)
    assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)


@pytest.mark.parametrize("metric", METRICS)
@examples(15)
@given(seed=seeds)
def test_pyramid_equals_kmeans_on_the_built_hypercolumns(metric, seed):
    maps = pyramid(seed)
    built = hypercolumns(maps, (8, 8))
    same(kmeans(maps, 4, size=8, seed=seed, metric=metric), kmeans(built, 4, seed=seed, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@examples(15)
@given(seed=seeds, bad=st.booleans(), flat=st.booleans())
def test_levels_of_few_cells_and_many_channels_are_rank_reduced_exactly(metric, seed, bad, flat):
    """48 channels of 9 cells become 10 channels, also with equal cells (a singular map) and non-finite ones."""
    g = torch.Generator().manual_seed(seed)
    deep = torch.randn(2, 48, 3, 3, generator=g, dtype=torch.float64)
    if flat:
        deep[:, :, 1:] = deep[:, :, :1]
    if bad:
        deep[0, 5, 0, 0] = torch.nan
    maps = [deep, torch.randn(2, 3, 6, 6, generator=g, dtype=torch.float64)]
    source = Pyramid(maps, (8, 8))
    source.prepare(metric, None)
    assert [level.channels for level in source.levels] == [10, 3]
    built = hypercolumns(maps, (8, 8))
    n_init = 1 if flat else 2  # two runs that find the same clusters of few distinct pixels tie: rounding chooses one
    for init in ("k-means++", "random"):
        ours = kmeans(maps, 4, size=8, seed=seed, metric=metric, init=init, n_init=n_init)
        same(ours, kmeans(built, 4, seed=seed, metric=metric, init=init, n_init=n_init))
    given = torch.randn(2, 4, 51, generator=g, dtype=torch.float64)  # in no space of the cells
    same(kmeans(maps, 4, size=8, init=given, metric=metric), kmeans(built, 4, init=given, metric=metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n_iter", [0, 5])
def test_a_start_outside_the_cells_that_stays_empty_comes_back_whole(metric, n_iter):
    """The part of a centroid that no pixel of a rank-reduced level has counts in distances and is returned."""
    g = torch.Generator().manual_seed(0)
    maps = [torch.rand(2, 48, 3, 3, generator=g, dtype=torch.float64)]
    built = hypercolumns(maps, (8, 8))
    init = built[:, :4].clone()
    init[:, 3] = -10 * torch.rand(2, 48, generator=g, dtype=torch.float64)
    ours = kmeans(maps, 4, size=8, init=init, metric=metric, empty="keep", n_iter=n_iter)
    assert (ours.counts[:, 3] == 0).all()
    same(ours, kmeans(built, 4, init=init, metric=metric, empty="keep", n_iter=n_iter))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_rank_reduced_levels_keep_the_digits_of_float32(offset):
    """A mean far from zero costs rank-reduced levels no more precision than the others."""
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 512, 4, 4, generator=g) + offset]
    wanted = kmeans([m.double() for m in maps], 5, size=8, seed=0)
    turned = kmeans(maps, 5, size=8, seed=0)
    assert torch.equal(turned.labels, wanted.labels)
    error = (turned.centroids - wanted.centroids).norm(dim=2)  # each of 16 reflectors rounds the vector once
    assert (error < 16 * torch.finfo(torch.float32).eps * wanted.centroids.norm(dim=2)).all()


@examples(15)
@given(seed=seeds, height=st.integers(1, 9), width=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_pyramid_norms_and_pixels_are_those_of_interpolate(seed, height, width, rows, columns):
    f = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    built = hypercolumns([f], (rows, columns))
    source = Pyramid([f], (rows, columns))
    every = torch.arange(rows * columns).expand(2, -1)
    torch.testing.assert_close(source.rows(every), built)
    source.move(None, None)
    torch.testing.assert_close(source.rows(every), built)
    torch.testing.assert_close(source.squares(), built.square().sum(2))
    mean = built.mean(1)
    source.move(mean, torch.tensor([0.5, 2.0]))
    wanted = torch.tensor([0.5, 2.0])[:, None, None] * (built - mean[:, None])
    torch.testing.assert_close(source.rows(every), wanted)
    torch.testing.assert_close(source.squares(), wanted.square().sum(2))
    torch.testing.assert_close(source.as_given(wanted), built)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_non_finite_cell_costs_the_other_pixels_no_digits(offset):
    maps = [(m + offset).float() for m in pyramid(6)[:2]]
    maps[1] = torch.cat([maps[1], maps[1]], 1)
    maps[1][0, 0, 0, 0] = math.nan
    init = hypercolumns([m[:, :, 4:, 4:] if m.shape[2] == 8 else m[:, :, 2:, 2:] for m in maps], (4, 4))[:, ::5]
    found = kmeans(maps, init.shape[1], size=8, init=init)
    wide = kmeans([m.double() for m in maps], init.shape[1], size=8, init=init.double(), backend="reference")
    assert torch.equal(found.labels, wide.labels)
    assert torch.equal(found.n_iter, wide.n_iter)


@pytest.mark.parametrize("level", [0, 1])
def test_a_non_finite_cell_affects_only_the_pixels_that_mix_it(level):
    maps = pyramid(6)
    maps[level] = maps[level].clone()
    maps[level][0, 1, 2, 3] = math.nan
    lost = ~hypercolumns(maps, (8, 8)).isfinite().all(2)
    clean = kmeans(pyramid(6), 3, size=8, seed=1, weight=(~lost).float().view(2, 8, 8))
    a = kmeans(maps, 3, size=8, seed=1)
    assert a.inertia.isnan().tolist() == [True, False]
    same(a._replace(inertia=clean.inertia), clean)
