"""k-means keeps its digits: common offsets, scales outside the range of squares, far pixels and bad ones."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fgfast.ops.kmeans.kmeans  # noqa: F401  (registers the operations)
from fgfast import kmeans, kmeans_step
from fgfast.pixels.source import middle
from fgfast.reference.draws import spaced_of_all, spaced_pixels
from tests.examples import examples
from tests.ops.kmeans_data import METRICS, blobs, seeds


def ties(x, init, weight, counted):
    """Whether a pixel is as far from two centroids of any iteration, so that rounding chooses between them.

    A float32 score, of six products relative to a shift within the pixels, errs by at most 8 u r^2 with r the radius of
    the pixels; two scores differ by more than twice that, or tie.
    """
    middle = (x * counted[..., None]).nan_to_num(0, 0, 0).sum(1, keepdim=True) / counted.sum(1)[:, None, None]
    radius = torch.where(counted, (x - middle).square().sum(2), 0).amax(1)[:, None]
    for n in range(5):
        centroids = kmeans(x, 4, init=init, n_iter=n, weight=weight, backend="torch").centroids if n else init
        nearest, second = (x[:, :, None] - centroids[:, None]).square().sum(3).sort(2).values[..., :2].unbind(2)
        if (counted & (second - nearest <= 16 * torch.finfo(torch.float32).eps * radius)).any():
            return True
    return False


@pytest.mark.parametrize("backend", ["torch", "reference"])
@examples(20)
@given(
    seed=seeds,
    offset=st.sampled_from([0.0, 1e2, 1e4, -1e5, 1e6]),
    scale=st.sampled_from([1e-30, 1e-17, 1e-8, 1.0, 1e8, 1e18, 1e30]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    maps=st.booleans(),
    bad=st.sampled_from([None, "weight", "nan"]),
)
def test_neither_an_offset_nor_a_scale_costs_digits(backend, seed, offset, scale, dtype, maps, bad):
    """Pixels that share an offset or a scale have the labels, and to its documented bound the inertia, of float64.

    ``bad``: the first pixels are far away and of weight 0, or not finite.
    """
    if dtype == torch.float16:
        scale = 1.0
    if dtype != torch.float32:
        offset /= 1e4  # of more, half precision would leave no differences
    x = (scale * blobs(seed, 2, 64, 6, offset=offset)).to(dtype)
    init = x[:, 10:14]
    spread = (x.double() - x.double().mean(1, keepdim=True)).square().sum((1, 2))
    weight = torch.ones(2, 64)
    if bad is not None:
        x = x.clone()
        x[:, :3] = math.nan if bad == "nan" else 50 * x[:, :3]
        weight[:, :3] = 0
        weight[0, 1] = float(bad == "nan")

    def run(x, backend):
        y, w = ([x.mT.unflatten(2, (8, 8))], weight.view(2, 8, 8)) if maps else (x, weight)
        return kmeans(y, 4, size=8 if maps else None, init=init.to(x.dtype), n_iter=5, weight=w, backend=backend)

    found, wide = run(x, backend), run(x.double(), "torch")
    assume(not ties(x.double(), init.double(), weight, wide.labels.flatten(1) >= 0))
    assert torch.equal(found.labels, wide.labels)
    finite = wide.inertia < torch.finfo(torch.float32).max
    assert torch.equal(found.inertia.isfinite(), finite)
    assert found.inertia.isnan().tolist() == [bad == "nan", False]
    error = (found.inertia.double() - wide.inertia).abs()[finite]
    assert (error <= 1e-6 * (wide.inertia + spread)[finite] + torch.finfo(torch.float32).tiny).all()
    u = torch.finfo(torch.float32).eps
    near = (found.centroids - wide.centroids).abs() <= u * wide.centroids.abs() + 16 * u * spread.sqrt()[:, None, None]
    assert near.all()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(("dtype", "far"), [(torch.float32, 1e6), (torch.float64, 1e12)])
def test_one_far_pixel_costs_the_others_no_digits(backend, dtype, far):
    """Wherever it is: the labels of the others are those of their own clustering, also if a centroid lies there."""
    x = blobs(2, 64, 6)
    alone = kmeans(x, 4, init=x[:4], n_iter=5).labels
    for at in range(0, 64, 3):
        y = x.clone()
        y[at] = far
        others = torch.arange(64) != at
        init = torch.cat([x[:4], y[at : at + 1]])
        centroids = torch.cat([kmeans(x[others], 4, init=x[:4], n_iter=5).centroids, y[at : at + 1]])
        wanted = kmeans(x[others], 4, init=x[:4], n_iter=5).labels
        found = kmeans(y.to(dtype), 5, init=init.to(dtype), n_iter=5, tol=0, backend=backend)
        assert torch.equal(found.labels[others], wanted)
        step = kmeans_step(y.to(dtype), centroids.to(dtype), backend=backend)
        assert torch.equal(step.labels[others], wanted)
    assert len(alone.unique()) == 4


@pytest.mark.parametrize("scale", [1e-200, 1e155, 1e300])
def test_float64_far_outside_the_range_of_its_squares(scale):
    x = blobs(2, 1, 64, 6)
    wanted = kmeans(x, 4, init=x[:, :4], n_iter=5)
    for n_init in (1, 2):
        found = kmeans(x * scale, 4, init=x[:, :4] * scale, n_iter=5, n_init=n_init)
        assert torch.equal(found.labels, wanted.labels)
        torch.testing.assert_close(found.centroids, wanted.centroids * scale)
        assert torch.equal(found.counts, wanted.counts)


def test_a_pixel_that_is_not_finite_changes_no_draw():
    """The same random numbers choose the same initial centroids on every backend."""
    x = blobs(2, 400, 6)
    x[3, 2] = math.nan
    for seed in range(8):
        options = {"seed": seed, "init_samples": 20, "n_iter": 0}
        found, wanted = (kmeans(x, 4, backend=backend, **options) for backend in ("torch", "reference"))
        torch.testing.assert_close(found.centroids, wanted.centroids)


@pytest.mark.parametrize("value", [1e19, 1e25, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_numbers_whose_squares_overflow_are_finite(metric, dtype, value):
    x = blobs(0, 50, 4)
    x = (x * (value / x.abs().max())).to(dtype)
    for backend in ("torch", "reference"):
        found, wide = (kmeans(y, 3, init=y[:3], metric=metric, backend=backend) for y in (x, x.double()))
        assert torch.equal(found.labels, wide.labels)
        assert not found.inertia.isnan()
        found, wide = (kmeans_step(y, y[:3], metric=metric, backend=backend) for y in (x, x.double()))
        assert torch.equal(found.labels, wide.labels)
        assert not found.inertia.isnan()


@given(st.integers(1, 10_000), st.integers(1, 12))
def test_pixels_are_spaced_alike_with_and_without_weights(pixels, count):
    found = spaced_of_all(pixels, torch.device("cpu"), count)
    assert torch.equal(found, spaced_pixels(torch.ones(1, pixels), count)[0])


@given(seeds)
def test_the_median_of_a_few_leaves_out_what_does_not_count(seed):
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 8, 4, generator=g)
    rows[torch.rand(rows.shape, generator=g) < 0.1] = torch.nan
    rows[torch.rand(rows.shape, generator=g) < 0.05] = -torch.inf
    weight = torch.rand(3, 8, generator=g).round()
    for w, found in ((weight, middle(rows, weight)), (torch.ones(3, 8), middle(rows))):
        counts = (w > 0) & rows.isfinite().all(2)
        good = [row[keep] for row, keep in zip(rows, counts, strict=True)]
        expected = [row.median(0).values if len(row) else torch.zeros(4) for row in good]
        assert torch.equal(found, torch.stack(expected))
