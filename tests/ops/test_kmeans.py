"""kmeans: scikit-learn, the reference, invariants, registration, errors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from torch.library import opcheck

import fgfast.ops.kmeans.kmeans  # noqa: F401  (registers the operations)
from fgfast import assign_and_pool, kmeans, kmeans_step
from fgfast.reference.kmeans import hypercolumns
from tests.examples import examples
from tests.ops.kmeans_data import METRICS, blobs, pyramid, same, seeds, sklearn


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


def test_kmeans_plus_plus_is_as_good_as_scikit_learns():
    x = blobs(0, 400, 8, n_blobs=8)
    ours = np.mean([kmeans(x, 8, seed=s).inertia.item() for s in range(20)])
    cluster = pytest.importorskip("sklearn.cluster")
    theirs = np.mean([cluster.KMeans(8, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(20)])
    assert ours < 1.1 * theirs


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


def test_a_large_mean_costs_no_precision():
    x = blobs(4, 300, 6, dtype=torch.float32, offset=1000.0)
    ours, exact = kmeans(x, 5, init=x[:5]), kmeans(x.double(), 5, init=x[:5])
    assert torch.equal(ours.labels, exact.labels)
    torch.testing.assert_close(ours.inertia, exact.inertia, rtol=1e-4, atol=0)


@pytest.mark.parametrize("metric", METRICS)
@examples(15)
@given(seed=seeds)
def test_batch_equals_loop_and_permutes(metric, seed):
    x, order = blobs(seed, 3, 40, 4), [2, 0, 1]
    together = kmeans(x, 4, seed=7, metric=metric)
    for i in range(3):
        single = kmeans(x[i], 4, seed=7, metric=metric)
        same(single, type(single)(*(value[i] for value in together)))
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
def test_a_non_finite_pixel_makes_only_its_inertia_nan(metric, value):
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


def test_strides_change_nothing():
    x = blobs(7, 2, 8, 6, 5).permute(0, 3, 1, 2)
    a = kmeans(x.contiguous(), 3, seed=0)
    for y in (x, torch.cat([x, x], 3)[..., :6], x.transpose(2, 3).contiguous().transpose(2, 3)):
        same(a, kmeans(y, 3, seed=0))
        same(kmeans_step(x.contiguous(), a.centroids), kmeans_step(y, a.centroids))


def test_tiles_give_the_result_of_a_single_one(monkeypatch):
    x = blobs(8, 1, 700, 9)
    whole = kmeans(x, 5, seed=0), kmeans_step(x, x[:, :5])
    monkeypatch.setattr("fgfast.pixels.source.PIXEL_TILE", 100)
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


def test_outputs_are_constants():
    x = blobs(19, 1, 20, 3).requires_grad_()
    r, step = kmeans(x, 2, seed=0), kmeans_step(x, x[:, :2])
    assert not any(value.requires_grad for value in (*r, *step))


def test_autocast_leaves_float32_single():
    x = blobs(20, 1, 50, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a = kmeans(x, 3, seed=0)
    assert torch.equal(a.centroids, kmeans(x, 3, seed=0).centroids)


X = torch.zeros(2, 9, 3)
MAPS = [torch.zeros(2, 3, 3, 3)]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("change", "error", "word"),
    [
        ({"x": torch.zeros(9)}, ValueError, "x: expected shape"),
        ({"x": X + 1j}, TypeError, "x has dtype"),
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
        ({"init": torch.zeros(2, 2, 4)}, ValueError, "init: expected shape"),
        ({"init": torch.full((2, 2, 3), math.nan)}, ValueError, "init"),
        ({"init_samples": 1}, ValueError, "init_samples"),
        ({"weight": torch.zeros(2, 8)}, ValueError, "weight: expected shape"),
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


def test_results_are_constants_of_every_transform():
    """Vmap runs problem by problem; derivatives of all orders and directions are those of what lies around k-means."""
    x = blobs(3, 2, 30, 4)
    init = x[:, :3]
    alone = torch.stack([kmeans(x[i], 3, init=init[i]).centroids for i in range(2)])
    assert torch.equal(torch.func.vmap(lambda x, c: kmeans(x, 3, init=c).centroids)(x, init), alone)
    steps = torch.func.vmap(lambda x, c: kmeans_step(x, c).sums)(x, init)
    assert torch.equal(steps, kmeans_step(x, init).sums)

    def spread(x):
        return (x - kmeans(x, 3, init=init).centroids.sum(1, keepdim=True)).square().sum()

    residual = 2 * (x - alone.sum(1, keepdim=True))
    torch.testing.assert_close(torch.func.grad(spread)(x), residual)
    torch.testing.assert_close(torch.func.jvp(spread, (x,), (torch.ones_like(x),))[1], residual.sum())
    torch.testing.assert_close(
        torch.func.vmap(torch.func.grad(lambda x: kmeans(x, 3, seed=0).inertia + x.sum()))(x), torch.ones_like(x)
    )
