"""kmeans, kmeans_step and assign_and_pool: scikit-learn, the reference, invariants, registration, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

import fgfast.ops.kmeans.kmeans  # noqa: F401  (registers the operations)
from fgfast import assign_and_pool, kmeans, kmeans_step, part_pool
from fgfast.pixels.pyramid import Pyramid
from fgfast.reference.kmeans import hypercolumns
from tests.examples import examples

METRICS = ["euclidean", "cosine"]
seeds = st.integers(0, 10**6)


def blobs(seed, *shape, n_blobs=4, dtype=torch.float64, offset=0.0):
    """Points [*shape, D] around a few centres, so that a rounding error does not decide a label."""
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(n_blobs, shape[-1], generator=g, dtype=torch.float64)
    which = torch.randint(n_blobs, shape[:-1], generator=g)
    noise = torch.randn(*shape, generator=g, dtype=torch.float64)
    return (centres[which] + noise + offset).to(dtype)


def pyramid(seed, batch=2, dtype=torch.float64):
    """Levels below, at and above (in one axis) the size (8, 8), one of them channels last."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 8, 8), (7, 4, 4), (5, 2, 3), (2, 11, 1)]
    maps = [torch.randn(batch, *s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]
    maps[1] = maps[1].contiguous(memory_format=torch.channels_last)
    return maps


def same(a, b, tolerance=1e-6):
    assert torch.equal(a.labels.flatten(), b.labels.flatten())
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(
            x.double().flatten(), y.double().flatten(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def sklearn(x, init, weight=None, n_iter=30, tol=1e-4):
    cluster = pytest.importorskip("sklearn.cluster")
    k = cluster.KMeans(len(init), init=init.double().numpy(), n_init=1, max_iter=n_iter, tol=tol, algorithm="lloyd")
    return k.fit(x.double().numpy(), sample_weight=None if weight is None else weight.double().numpy())


# ---------------------------------------------------------------- scikit-learn, from the same start


@pytest.mark.parametrize("tol", [0.0, 1e-4, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_scikit_learn(dtype, weighted, tol):
    for seed in range(5):
        x = blobs(seed, 300, 7, dtype=dtype, offset=20.0)
        weight = torch.rand(300, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
        ours = kmeans(x, 6, init=x[:6], n_iter=30, weight=weight, tol=tol)
        theirs = sklearn(x, x[:6], weight, tol=tol)
        assert np.array_equal(ours.labels.numpy(), theirs.labels_)
        assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)
        assert ours.n_iter.item() == theirs.n_iter_
        np.testing.assert_allclose(ours.centroids.numpy(), theirs.cluster_centers_, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n_empty", [1, 2])
@pytest.mark.parametrize("weighted", [False, True])
def test_relocates_empty_clusters_as_scikit_learn_does(weighted, n_empty):
    for seed in range(8):
        x = blobs(seed, 200, 5, dtype=torch.float32)
        weight = torch.rand(200, generator=torch.Generator().manual_seed(seed)) + 0.1 if weighted else None
        init = torch.cat([x[:4], torch.full((n_empty, 5), 1e3) + torch.arange(n_empty)[:, None]])
        ours = kmeans(x, 4 + n_empty, init=init, n_iter=30, weight=weight)
        theirs = sklearn(x, init, weight)
        assert np.array_equal(ours.labels.numpy(), theirs.labels_)
        assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)
        assert (ours.counts > 0).all()


def test_pyramid_equals_scikit_learn_on_the_built_matrix():
    maps = pyramid(0, 1, torch.float32)
    x = hypercolumns(maps, (8, 8))[0]
    theirs = sklearn(x, x[:5])
    ours = kmeans(maps, 5, size=8, init=x[:5], n_iter=30)
    assert np.array_equal(ours.labels.flatten().numpy(), theirs.labels_)
    assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)


def test_kmeans_plus_plus_is_as_good_as_scikit_learns():
    x = blobs(0, 400, 8, n_blobs=8)
    ours = np.mean([kmeans(x, 8, seed=s).inertia.item() for s in range(20)])
    cluster = pytest.importorskip("sklearn.cluster")
    theirs = np.mean([cluster.KMeans(8, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(20)])
    assert ours < 1.1 * theirs


# ---------------------------------------------------------------- the reference


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(2, 37, 5), (1, 1, 1), (3, 130, 1), (2, 64, 33)], ids=str)
def test_step_equals_reference(shape, metric):
    k = min(7, shape[1])
    for dtype, tolerance in {torch.float64: 1e-6, torch.float32: 1e-4}.items():
        x = blobs(1, *shape, dtype=dtype)
        weight = (torch.rand(shape[:2], generator=torch.Generator().manual_seed(0)) - 0.2).clamp_min(0)
        for w in (None, weight):
            step = kmeans_step(x, x[:, :k], weight=w, metric=metric)
            same(step, kmeans_step(x, x[:, :k], weight=w, metric=metric, backend="reference"), tolerance)
            assert step.labels.shape == shape[:2]
            assert (step.counts.dtype, step.inertia.dtype, step.sums.dtype) == (torch.float32, torch.float32, dtype)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "options", [{}, {"init": "random", "n_init": 3}, {"init_samples": 20}, {"empty": "keep"}, {"n_iter": 0}]
)
def test_equals_reference_from_the_same_seed(options, metric):
    weight = (torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.2).clamp_min(0)
    x = blobs(2, 2, 64, 6)
    for y, w in ((x, weight.flatten(1)), (x.transpose(1, 2).unflatten(2, (8, 8)), weight), (x, None)):
        a = kmeans(y, 5, seed=3, metric=metric, weight=w, **options)
        same(a, kmeans(y, 5, seed=3, metric=metric, weight=w, backend="reference", **options))
        assert a.labels.shape == (y.shape[:2] if y.dim() == 3 else (2, 8, 8))
    maps = pyramid(2)
    a = kmeans(maps, 5, size=8, seed=3, metric=metric, weight=weight, **options)
    same(a, kmeans(maps, 5, size=(8, 8), seed=3, metric=metric, weight=weight, backend="reference", **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_accumulates_in_float32(dtype):
    x = blobs(3, 2, 90, 6, dtype=dtype)
    low, wide = kmeans(x, 4, seed=1), kmeans(x.float(), 4, seed=1)
    assert low.centroids.dtype == torch.float32
    same(low, wide)
    maps = pyramid(3, dtype=dtype)
    same(kmeans(maps, 4, size=8, seed=1), kmeans([m.float() for m in maps], 4, size=8, seed=1))
    same(kmeans_step(x, x[:, :4]), kmeans_step(x.float(), x[:, :4].float()))


def test_a_large_mean_costs_no_digits():
    x = blobs(4, 300, 6, dtype=torch.float32, offset=1000.0)
    ours, exact = kmeans(x, 5, init=x[:5]), kmeans(x.double(), 5, init=x[:5])
    assert torch.equal(ours.labels, exact.labels)
    torch.testing.assert_close(ours.inertia, exact.inertia, rtol=1e-4, atol=0)


# ---------------------------------------------------------------- invariants


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
def test_levels_of_few_cells_and_many_channels_are_turned_without_a_trace(metric, seed, bad, flat):
    """48 channels of 9 cells are 9 channels inside, cells that are alike (a singular map) and broken ones included."""
    g = torch.Generator().manual_seed(seed)
    deep = torch.randn(2, 48, 3, 3, generator=g, dtype=torch.float64)
    if flat:
        deep[:, :, 1:] = deep[:, :, :1]
    if bad:
        deep[0, 5, 0, 0] = torch.nan
    maps = [deep, torch.randn(2, 3, 6, 6, generator=g, dtype=torch.float64)]
    assert [level.channels for level in Pyramid(maps, (8, 8), closed=True).levels] == [9, 3]
    built = hypercolumns(maps, (8, 8))
    for init in ("k-means++", "random"):
        ours = kmeans(maps, 4, size=8, seed=seed, metric=metric, init=init, n_init=2)
        same(ours, kmeans(built, 4, seed=seed, metric=metric, init=init, n_init=2))
    given = torch.randn(2, 4, 51, generator=g, dtype=torch.float64)  # in no space of the cells
    same(kmeans(maps, 4, size=8, init=given, metric=metric), kmeans(built, 4, init=given, metric=metric))


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_turned_levels_keep_the_digits_of_float32(offset):
    """A mean far from zero costs the turned levels no more than the others."""
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 512, 4, 4, generator=g) + offset]
    wanted = kmeans([m.double() for m in maps], 5, size=8, seed=0)
    turned = kmeans(maps, 5, size=8, seed=0)
    assert torch.equal(turned.labels, wanted.labels)
    error = (turned.centroids - wanted.centroids).abs().max()
    assert error < 16 * torch.finfo(torch.float32).eps * (1 + offset)  # of means of up to 64 numbers of that size


@examples(15)
@given(seed=seeds, height=st.integers(1, 9), width=st.integers(1, 9), rows=st.integers(1, 9), columns=st.integers(1, 9))
def test_pyramid_norms_and_pixels_are_those_of_interpolate(seed, height, width, rows, columns):
    f = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    built = hypercolumns([f], (rows, columns))
    source = Pyramid([f], (rows, columns))
    mu = built.mean(1)
    torch.testing.assert_close(source.squares(None), built.square().sum(2))
    torch.testing.assert_close(source.squares(mu), (built - mu[:, None]).square().sum(2))
    torch.testing.assert_close(source.rows(torch.arange(rows * columns).expand(2, -1)), built)


@pytest.mark.parametrize("metric", METRICS)
@examples(15)
@given(seed=seeds)
def test_batch_equals_loop_and_permutes(metric, seed):
    x, order = blobs(seed, 3, 40, 4), [2, 0, 1]
    together = kmeans(x, 4, seed=7, metric=metric)
    for i in range(3):
        alone = kmeans(x[i], 4, seed=7, metric=metric)
        same(alone, type(alone)(*(value[i] for value in together)))
    moved = kmeans(x[order], 4, seed=7, metric=metric)
    same(moved, type(moved)(*(value[order] for value in together)))


@examples(15)
@given(seed=seeds)
def test_pixels_permute_clusters_rename_and_weights_scale(seed):
    x = blobs(seed, 1, 50, 4)
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(1, 50, generator=g) + 0.1
    pixels, names = torch.randperm(50, generator=g), torch.randperm(4, generator=g)
    init = x[:, :4]
    a = kmeans(x, 4, init=init, weight=weight)
    b = kmeans(x[:, pixels], 4, init=init, weight=weight[:, pixels])
    assert torch.equal(a.labels[:, pixels], b.labels)
    c = kmeans(x, 4, init=init[:, names], weight=weight)
    assert torch.equal(names[c.labels], a.labels)
    d = kmeans(x, 4, init=init, weight=weight * 3)
    assert torch.equal(d.labels, a.labels)
    torch.testing.assert_close(d.inertia, 3 * a.inertia)
    torch.testing.assert_close(d.counts, 3 * a.counts)


@pytest.mark.parametrize("metric", METRICS)
@examples(15)
@given(seed=seeds)
def test_weight_zero_leaves_a_pixel_out_whatever_it_holds(metric, seed):
    x = blobs(seed, 2, 40, 4)
    left_out = torch.rand(2, 40, generator=torch.Generator().manual_seed(seed)) < 0.3
    weight = (~left_out).float()
    dirty = torch.where(left_out[..., None], torch.tensor([math.nan, math.inf, -math.inf, 1e3]), x)
    a, b = (kmeans(y, 3, seed=1, metric=metric, weight=weight) for y in (x, dirty))
    same(a, b)
    assert torch.equal(a.labels == -1, left_out)
    same(*(kmeans_step(y, x[:, :3], metric=metric, weight=weight) for y in (x, dirty)))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_pixel_poisons_its_inertia_alone(metric, value):
    x = blobs(5, 2, 40, 4)
    dirty = x.clone()
    dirty[0, 7, 2] = value
    weight = torch.ones(2, 40)
    weight[0, 7] = 0
    for run in (
        lambda y, w=None: kmeans(y, 3, seed=1, metric=metric, weight=w),
        lambda y, w=None: kmeans_step(y, x[:, 10:13], metric=metric, weight=w),
    ):
        a, clean = run(dirty), run(x, weight)
        assert a.inertia.isnan().tolist() == [True, False]
        assert a.labels[0, 7] == -1
        same(a._replace(inertia=clean.inertia), clean)


@pytest.mark.parametrize("level", [0, 1])
def test_a_non_finite_cell_reaches_the_pixels_that_mix_it(level):
    maps = pyramid(6)
    maps[level] = maps[level].clone()
    maps[level][0, 1, 2, 3] = math.nan
    lost = ~hypercolumns(maps, (8, 8)).isfinite().all(2)
    clean = kmeans(pyramid(6), 3, size=8, seed=1, weight=(~lost).float().view(2, 8, 8))
    a = kmeans(maps, 3, size=8, seed=1)
    assert a.inertia.isnan().tolist() == [True, False]
    same(a._replace(inertia=clean.inertia), clean)


def test_strides_change_nothing():
    x = blobs(7, 2, 8, 6, 5).permute(0, 3, 1, 2)
    a = kmeans(x.contiguous(), 3, seed=0)
    for y in (x, torch.cat([x, x], 3)[..., :6], x.transpose(2, 3).contiguous().transpose(2, 3)):
        same(a, kmeans(y, 3, seed=0))
        same(kmeans_step(x.contiguous(), a.centroids), kmeans_step(y, a.centroids))


def test_tiles_join_without_a_seam(monkeypatch):
    x = blobs(8, 1, 700, 9)
    whole = kmeans(x, 5, seed=0), kmeans_step(x, x[:, :5])
    monkeypatch.setattr("fgfast.pixels.source.PIXEL_TILE", 100)
    monkeypatch.setattr("fgfast.pixels.pyramid.CACHED", 100)
    same(whole[0], kmeans(x, 5, seed=0))
    same(whole[1], kmeans_step(x, x[:, :5]))
    maps = pyramid(8)
    same(kmeans(maps, 4, size=8, seed=0), kmeans(hypercolumns(maps, (8, 8)), 4, seed=0))


@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(metric):
    x = blobs(9, 1, 300, 13, dtype=torch.float32)
    c = x[:, :5]
    step = kmeans_step(x, torch.cat([c, c, c], 1), metric=metric)
    assert (step.labels < 5).all()
    assert (step.counts[:, 5:] == 0).all()


def test_same_seed_same_result_and_seeds_differ():
    x = blobs(10, 2, 200, 4, n_blobs=9)
    a = kmeans(x, 9, seed=5, n_iter=0)
    for b in (kmeans(x, 9, seed=5, n_iter=0), kmeans(x, 9, seed=torch.tensor(5), n_iter=0)):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert not torch.equal(a.centroids, kmeans(x, 9, seed=6, n_iter=0).centroids)
    torch.manual_seed(0)
    c = kmeans(x, 9, n_iter=0).centroids
    torch.manual_seed(0)
    assert torch.equal(c, kmeans(x, 9, n_iter=0).centroids)


@pytest.mark.parametrize("metric", METRICS)
def test_result_is_consistent_after_any_number_of_iterations(metric):
    x = blobs(11, 2, 100, 5)
    before = math.inf
    for n_iter in range(6):
        r = kmeans(x, 6, seed=0, n_iter=n_iter, tol=0, metric=metric)
        step = kmeans_step(x, r.centroids, metric=metric)
        assert torch.equal(r.labels, step.labels)
        torch.testing.assert_close(r.counts, step.counts)
        torch.testing.assert_close(r.inertia, step.inertia)
        assert (r.n_iter <= n_iter).all()
        assert r.inertia.sum().item() <= before + 1e-6
        before = r.inertia.sum().item()


def test_more_runs_are_never_worse():
    x = blobs(12, 4, 100, 3, n_blobs=7)
    runs = [kmeans(x, 7, seed=0, n_init=n, init="random").inertia for n in (1, 3, 6)]
    assert (runs[1] <= runs[0]).all()
    assert (runs[2] <= runs[1]).all()


@pytest.mark.parametrize("empty", ["farthest", "keep"])
def test_duplicate_pixels_and_as_many_clusters_as_pixels(empty):
    same_everywhere = kmeans(torch.ones(1, 5, 2), 3, seed=0, empty=empty)
    assert same_everywhere.inertia.item() == 0
    assert same_everywhere.centroids.isfinite().all()
    x = blobs(13, 1, 6, 3)
    r = kmeans(x, 6, seed=0, empty=empty)
    assert r.inertia.item() == pytest.approx(0, abs=1e-6)
    assert sorted(r.labels[0].tolist()) == list(range(6))


def test_keep_leaves_an_empty_cluster_where_it_was():
    x = blobs(14, 1, 60, 3)
    init = torch.cat([x[:, :2], torch.full((1, 1, 3), 1e3, dtype=x.dtype)], 1)
    r = kmeans(x, 3, init=init, empty="keep")
    assert torch.equal(r.centroids[:, 2], init[:, 2])
    assert r.counts[0, 2] == 0


def test_empty_batch_and_all_pixels_left_out():
    r = kmeans(torch.zeros(0, 9, 3), 2, seed=0)
    assert r.centroids.shape == (0, 2, 3)
    assert r.labels.shape == (0, 9)
    assert kmeans([torch.zeros(0, 2, 4, 4)], 2, size=8, seed=0).labels.shape == (0, 8, 8)
    assert kmeans_step(torch.zeros(0, 9, 3), torch.zeros(0, 2, 3)).inertia.shape == (0,)
    r = kmeans(blobs(0, 1, 9, 3), 2, seed=0, weight=torch.zeros(1, 9))
    assert (r.labels == -1).all()
    assert r.inertia.item() == 0


# ---------------------------------------------------------------- assign_and_pool


@pytest.mark.parametrize("metric", METRICS)
def test_assign_and_pool_is_a_step_and_a_pooling(metric):
    x = blobs(15, 2, 6, 5, 4).permute(0, 3, 1, 2)
    weight = (torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)) - 0.2).clamp_min(0)
    c = x.flatten(2).transpose(1, 2)[:, :3]
    for backend in ("torch", "reference"):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        pooled, area, labels = assign_and_pool(a, c, metric=metric, weight=weight, backend=backend)
        expected = part_pool(b, kmeans_step(x, c, metric=metric, weight=weight).labels, 3, weight=weight)
        assert torch.equal(labels, kmeans_step(x, c, metric=metric, weight=weight).labels)
        torch.testing.assert_close(pooled, expected.pooled)
        torch.testing.assert_close(area, expected.area)
        pooled.square().sum().backward()
        expected.pooled.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)


# ---------------------------------------------------------------- registration


def test_opcheck():
    x, w = blobs(16, 2, 12, 3, dtype=torch.float32), torch.rand(2, 12)
    ops = torch.ops.fgfast
    columns = x.transpose(1, 2)
    opcheck(ops.kmeans_step.default, (columns, x[:, :3], w, "euclidean", "ieee"))
    opcheck(ops.kmeans_step.default, (columns.unflatten(2, (3, 4)), x[:, :3], None, "cosine", "ieee"))
    tail = (64, 2, 1e-4, w, "euclidean", "farthest", torch.tensor(0), "ieee")
    opcheck(ops.kmeans.default, ([columns], 3, None, 5, "k-means++", None, *tail))
    opcheck(ops.kmeans.default, ([columns], 3, None, 5, "given", x[:, :3], *tail))
    maps = [torch.rand(2, 3, 3, 4), torch.rand(2, 2, 2, 2)]
    opcheck(ops.kmeans.default, (maps, 3, [3, 4], 5, "random", None, *tail))
    features = columns.unflatten(2, (3, 4))
    opcheck(ops.assign_and_pool.default, (features.clone().requires_grad_(), x[:, :3], w.view(2, 3, 4), "euclidean"))


def test_compile_gives_the_same_numbers():
    x, maps = blobs(17, 2, 30, 4, dtype=torch.float32), pyramid(17, dtype=torch.float32)

    def run(x, maps):
        r = kmeans(x, 3, seed=1)
        pooled, _, _ = assign_and_pool(x, r.centroids)
        return (*r, pooled, *kmeans_step(x, r.centroids), *kmeans(maps, 3, size=8, seed=1))

    for a, b in zip(run(x, maps), torch.compile(run, fullgraph=True, backend="aot_eager")(x, maps), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck_of_assign_and_pool():
    x = blobs(18, 1, 9, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: assign_and_pool(x, x.detach()[:, :2])[0], x)


def test_outputs_are_constants():
    x = blobs(19, 1, 20, 3).requires_grad_()
    r, step = kmeans(x, 2, seed=0), kmeans_step(x, x[:, :2])
    assert not any(value.requires_grad for value in (*r, *step))


def test_autocast_leaves_float32_alone():
    x = blobs(20, 1, 50, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = kmeans(x, 3, seed=0)
    assert torch.equal(a.centroids, kmeans(x, 3, seed=0).centroids)


# ---------------------------------------------------------------- bad input

X = torch.zeros(2, 9, 3)
MAPS = [torch.zeros(2, 3, 3, 3)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"x": torch.zeros(9)}, ValueError, "x has shape"),
        ({"x": X.long()}, TypeError, "x has dtype"),
        ({"x": []}, ValueError, "empty list"),
        ({"x": MAPS}, ValueError, "size is missing"),
        ({"x": MAPS, "size": 0}, ValueError, "size is"),
        ({"x": [*MAPS, torch.zeros(3, 1, 3, 3)], "size": 4}, ValueError, r"x\[1\]"),
        ({"x": [*MAPS, torch.zeros(2, 1, 3, 3).double()], "size": 4}, TypeError, r"x\[1\]"),
        ({"x": [*MAPS, torch.zeros(2, 1, 3, 3, device="meta")], "size": 4}, ValueError, r"x\[1\]"),
        ({"size": 3}, ValueError, "size"),
        ({"n_clusters": 10}, ValueError, "n_clusters is 10 for 9 pixels"),
        ({"n_clusters": 0}, ValueError, "n_clusters"),
        ({"n_iter": -1}, ValueError, "n_iter"),
        ({"n_init": 0}, ValueError, "n_init"),
        ({"tol": -1.0}, ValueError, "tol"),
        ({"tol": math.nan}, ValueError, "tol"),
        ({"init": "best"}, ValueError, "init"),
        ({"init": torch.zeros(2, 4, 3)}, ValueError, "init holds 4"),
        ({"init": torch.zeros(2, 2, 4)}, ValueError, "init has shape"),
        ({"init": torch.full((2, 2, 3), math.nan)}, ValueError, "init"),
        ({"init_samples": 1}, ValueError, "init_samples"),
        ({"weight": torch.zeros(2, 8)}, ValueError, "weight has shape"),
        ({"weight": -torch.ones(2, 9)}, ValueError, "weight holds"),
        ({"weight": torch.ones(2, 9, device="meta")}, ValueError, "weight is on"),
        ({"metric": "l1"}, ValueError, "metric"),
        ({"empty": "drop"}, ValueError, "empty"),
        ({"precision": "fp8"}, ValueError, "precision"),
        ({"seed": torch.tensor([1])}, ValueError, "seed"),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_bad_input_is_named(change, error, word, backend):
    options = {"x": X, "n_clusters": 2, "seed": 0} | change
    with pytest.raises(error, match=word):
        kmeans(options.pop("x"), options.pop("n_clusters"), backend=backend, **options)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"centroids": torch.zeros(2, 2, 4)}, "centroids has shape"),
        ({"centroids": torch.zeros(0, 3)}, "no centroid"),
        ({"centroids": torch.full((2, 3), math.inf)}, "not finite"),
        ({"weight": torch.ones(9)}, "weight has shape"),
        ({"metric": "l1"}, "metric"),
    ],
)
def test_bad_input_of_a_step_is_named(change, word):
    options = {"centroids": torch.zeros(2, 3)} | change
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match=word):
            kmeans_step(X, **options, backend=backend)
        with pytest.raises(ValueError, match=word):
            assign_and_pool(X, **options, backend=backend)
