"""kmeans of feature pyramids by compiled code against PyTorch, and its updated sums against new ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fgfast import kmeans, use_backend
from fgfast.backend import missing
from fgfast.pixels.native import NativePyramid
from fgfast.pixels.pyramid import Pyramid
from fgfast.pixels.source import one_hot
from tests.examples import examples
from tests.ops.kmeans_data import METRICS, blobs, same, seeds

pytestmark = pytest.mark.skipif(missing("native") is not None, reason=f"{missing('native')}")


def levels(seed: int, batch: int, channels: int = 6, deep: int = 40) -> list[torch.Tensor]:
    """Maps of blobs, so that a rounding error does not decide a label; the deepest is rank-reduced."""
    wide, low = blobs(seed, batch, 64, channels), blobs(seed + 1, batch, 6, deep)
    return [m.mT.unflatten(2, size).float() for m, size in ((wide, (8, 8)), (low, (2, 3)))]


@pytest.mark.parametrize("metric", METRICS)
@examples(30)
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    clusters=st.integers(1, 6),
    size=st.sampled_from([(8, 8), (5, 9), (16, 3), (7, 7)]),
    bad=st.booleans(),
    weighted=st.booleans(),
    init=st.sampled_from(["k-means++", "random"]),
)
def test_native_results_are_those_of_pytorch(metric, seed, batch, clusters, size, bad, weighted, init):
    maps = levels(seed, batch)
    if bad:
        maps[0][0, 1, 2, 3] = torch.nan
    weight = torch.rand(batch, *size, generator=torch.Generator().manual_seed(seed)).round() if weighted else None
    options = {"size": size, "metric": metric, "weight": weight, "seed": seed, "init": init, "n_iter": 4}
    found, wanted = (kmeans(maps, clusters, backend=backend, **options) for backend in ("native", "torch"))
    same(found, wanted, 1e-4)


@examples(30)
@given(
    seed=seeds,
    batch=st.integers(1, 3),
    clusters=st.integers(1, 50),
    size=st.sampled_from([(8, 8), (1, 7), (3, 17), (30, 2), (40, 40)]),
)
def test_labels_have_the_least_resized_scores(seed, batch, clusters, size):
    """The score of a pixel is a sum of up to 4 x 46 products, which round to eps times the sum of their magnitudes."""
    maps = levels(seed, batch)
    source, plain = NativePyramid(maps, size), Pyramid(maps, size)
    for each in (source, plain):
        each.prepare("euclidean", None)
    m = torch.randn(batch, clusters, source.channels, generator=torch.Generator().manual_seed(seed))
    labels, best, *_ = source.assign(m, m[:, :, 0], source.scale)
    scores = plain.inner(m) + m[:, :, :1]
    bound = (
        184 * torch.finfo(torch.float32).eps * (1 + plain.squared_norms.sqrt() * m.norm(dim=2).amax(1, keepdim=True))
    )
    assert ((best - scores.amin(1)).abs() <= bound).all()
    assert ((scores.gather(1, labels[:, None])[:, 0] - best).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_as_float32(dtype):
    maps = [m.to(dtype) for m in levels(0, 2)]
    found = kmeans(maps, 5, size=8, seed=0, backend="native")
    same(found, kmeans([m.float() for m in maps], 5, size=8, seed=0, backend="torch"), 1e-5)


@pytest.mark.parametrize("metric", METRICS)
@examples(20)
@given(seed=seeds, batch=st.integers(1, 2), steps=st.lists(st.sampled_from([0, 1, 5, 64]), min_size=1, max_size=60))
def test_updated_sums_have_the_digits_of_new_ones(metric, seed, batch, steps):
    """Labels change at ``steps`` pixels at a time, of which a few are a million times as long as the others.

    A sum of n terms rounds at most n times, each time by at most half of eps times the sum of |y|, and an updated sum
    as one of four times as many pixels, among which are no more than four times the |y|.
    """
    g = torch.Generator().manual_seed(seed)
    maps = levels(seed, batch)
    maps[0] = torch.where(torch.rand(batch, 1, 8, 8, generator=g) < 0.05, 1e6 * maps[0], maps[0])
    source = NativePyramid(maps, (8, 8))
    source.prepare(metric, None)
    labels = torch.randint(4, (batch, 64), generator=g)
    for changes in steps:
        labels = labels.clone()
        labels[:, torch.randperm(64, generator=g)[:changes]] = torch.randint(4, (batch, changes), generator=g)
        sums, counts = source.label_sums(labels, source.scale, 4)
        hot = one_hot(labels, source.scale, 4)
        mass = torch.bmm(hot, source.squared_norms.sqrt()[..., None])
        torch.testing.assert_close(counts, hot.sum(2))
        bound = 4 * (4 * 64 + 64) * torch.finfo(torch.float32).eps / 2 * mass
        assert ((sums - source._weighted_sums(hot)).abs() <= bound).all()


def test_few_new_labels_are_an_update_and_many_are_not(monkeypatch):
    source = NativePyramid(levels(0, 1), (8, 8))
    source.prepare("euclidean", None)
    made = []
    new_sums = source._weighted_sums
    monkeypatch.setattr(source, "_weighted_sums", lambda hot: made.append(None) or new_sums(hot))
    labels = torch.arange(64)[None] % 4
    for changed, expected in ((0, 1), (0, 1), (1, 1), (64, 2)):
        labels = labels.clone()
        labels[:, :changed] = (labels[:, :changed] + 1) % 4
        source.label_sums(labels, source.scale, 4)
        assert len(made) == expected


def test_the_number_of_threads_changes_no_bit():
    maps = [torch.randn(2, 8, 40, 40), torch.randn(2, 16, 20, 20)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            source = NativePyramid(maps, (40, 40))
            source.prepare("euclidean", None)
            results.append(source.assign(torch.ones(2, 3, 24).cumsum(1), torch.zeros(2, 3), source.scale))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_scores_that_are_not_numbers_have_the_label_of_pytorch():
    """The last cluster, and no memory beyond it."""
    maps = levels(0, 1)
    source, plain = NativePyramid(maps, (8, 8)), Pyramid(maps, (8, 8))
    for each in (source, plain):
        each.prepare("euclidean", None)
    m, bias = torch.zeros(1, 5, source.channels), torch.full((1, 5), torch.nan)
    assert torch.equal(source.assign(m, bias, source.scale)[0], plain.assign(m, bias, plain.scale)[0])


def test_equal_scores_have_the_lowest_label():
    source = NativePyramid(levels(0, 1), (8, 8))
    source.prepare("euclidean", None)
    m = torch.randn(1, 1, source.channels).expand(-1, 40, -1)
    bias = torch.arange(40.0).sub(20).square().div(20).floor()[None]  # zero for clusters 16 to 24
    assert (source.assign(m, bias, source.scale)[0] == 16).all()


def test_native_takes_float32_maps_of_a_cpu_and_says_so():
    maps = levels(0, 1)
    with pytest.raises(ValueError, match="kmeans has no backend 'native'"):
        kmeans([m.double() for m in maps], 3, size=8, backend="native")
    with pytest.raises(ValueError, match="kmeans has no backend 'native'"):
        kmeans(torch.rand(20, 4), 3, backend="native")
    with use_backend("native"):
        assert kmeans(torch.rand(20, 4), 3).labels.shape == (20,)
        assert kmeans(maps, 30, size=8).labels.shape == (1, 8, 8)
