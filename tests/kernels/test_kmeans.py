"""The Triton kernels of k-means against the float64 reference: interpreted without a GPU, compiled on one."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

from fgfast import kmeans, kmeans_step

pytest.importorskip("triton")

from fgfast.kernels.common import interpreted
from fgfast.kernels.kmeans.step import Solver
from fgfast.kernels.sanitizer import checked, fewest
from tests.examples import examples

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ["euclidean", "cosine"]
DTYPES = {torch.float32: 2**-24, torch.float16: 2**-12, torch.bfloat16: 2**-9}  # rounding of a centroid
seeds = st.integers(0, 10**6)
in_interpreter = pytest.mark.skipif(not interpreted(), reason="counts launches and traffic in the interpreter")


def blobs(seed, *shape, n_blobs=4, dtype=torch.float32, offset=0.0):
    """Points [*shape, D] around a few centres."""
    g = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(n_blobs, shape[-1], generator=g, dtype=torch.float64)
    which = torch.randint(n_blobs, shape[:-1], generator=g)
    noise = torch.randn(*shape, generator=g, dtype=torch.float64)
    return (centres[which] + noise + offset).to(dtype).to(DEVICE)


def weights(seed, *shape):
    """Numbers in [0, 0.8), a fifth of them 0."""
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=g) - 0.2).clamp_min(0).to(DEVICE)


def check_step(x, centroids, weight=None, metric="euclidean", **options):
    """A step against the definition in float64.

    Labels: the distance to the chosen centroid exceeds the lowest one by at most twice the effect of rounding the
    centroids, relative to their mean m, by u: 2 u |x - m| max |c - m|, as much for their square, and float32 arithmetic
    over D terms. Given those labels: sums within (D + N) 2^-22 of the sum of |w x| (2^-16 where half precision splits
    the weights), inertia within the error of the distances.
    """
    step = kmeans_step(x, centroids, weight=weight, metric=metric, backend="triton", **options)
    x64, c64 = x.double(), centroids.double()
    kept = x64.isfinite().all(2)
    w = torch.ones(x.shape[:2], dtype=torch.float64, device=DEVICE) if weight is None else weight.double()
    poisoned = ((w > 0) & ~kept).any(1)
    kept &= w > 0
    x64 = torch.where(kept[..., None], x64, 0)
    if metric == "cosine":
        x64, c64 = (torch.nn.functional.normalize(v, dim=2, eps=1e-12) for v in (x64, c64))
        distance = 1 - x64 @ c64.transpose(1, 2)
        middle = torch.zeros_like(c64[:, :1])
    else:
        distance = torch.cdist(x64, c64).square()
        middle = c64.mean(1, keepdim=True)
    u = DTYPES[x.dtype] + 2**-22 + x.shape[2] * 2**-24
    reach = (c64 - middle).norm(dim=2).amax(1)
    off = (x64 - middle).norm(dim=2).amax(1)
    left = middle.norm(dim=2)[:, 0] * (x.dtype != torch.float32)  # float32 subtracts the middle first
    apart = x64.norm(dim=2).amax(1) if metric == "cosine" else left
    slack = 8 * u * (off + reach + apart) * (reach + off)
    assert torch.equal(step.labels >= 0, kept)
    assert (step.labels < centroids.shape[1]).all()
    mine = distance.gather(2, step.labels.clamp_min(0)[..., None])[..., 0]
    assert (torch.where(kept, mine - distance.amin(2), 0) <= slack[:, None]).all()
    hot = torch.nn.functional.one_hot(step.labels.clamp_min(0), centroids.shape[1]) * torch.where(kept, w, 0)[..., None]
    expected, size = hot.transpose(1, 2) @ x64, hot.transpose(1, 2) @ x64.abs()
    split = 2**-16 if x.dtype != torch.float32 and (weight is not None or metric == "cosine") else 0
    assert ((step.sums - expected).abs() <= (sum(x.shape[1:]) * 2**-22 + split) * size + 1e-30).all()
    torch.testing.assert_close(step.counts.double(), hot.sum(1), rtol=x.shape[1] * 2**-23, atol=0)
    inertia = torch.where(kept, w * mine, 0).sum(1)
    assert torch.equal(step.inertia.isnan(), poisoned)
    good = ~poisoned
    total = torch.where(kept, w, 0).sum(1)
    assert ((step.inertia - inertia).abs()[good] <= (total * slack + x.shape[1] * 2**-23 * inertia)[good]).all()
    return step


# ---------------------------------------------------------------- one step


@pytest.mark.quick
@examples(12)
@given(
    seed=seeds,
    batch=st.integers(1, 2),
    pixels=st.integers(1, 60),
    channels=st.integers(1, 40),
    clusters=st.integers(1, 20),
    dtype=st.sampled_from(list(DTYPES)),
    metric=st.sampled_from(METRICS),
    weighted=st.booleans(),
)
def test_step_equals_reference(seed, batch, pixels, channels, clusters, dtype, metric, weighted):
    x = blobs(seed, batch, pixels, channels, dtype=dtype)
    c = blobs(seed + 1, batch, clusters, channels, dtype=dtype)
    check_step(x, c, weights(seed, batch, pixels) if weighted else None, metric)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("shape", "clusters"),
    [
        ((1, 50, 300), 3),  # three tiles of channels, the last one partly empty
        ((1, 50, 256), 20),
        ((1, 400, 2), 2),  # several programs per problem, their sums added in order
        ((1, 20, 200), 260),  # more clusters than a tile
        ((1, 40, 1100), 33),  # sums that do not fit the registers: x is read twice
    ],
    ids=str,
)
def test_every_route_equals_reference(shape, clusters, dtype):
    for metric, weighted in (("euclidean", False), ("cosine", True)):
        x, c = blobs(1, *shape, dtype=dtype), blobs(2, shape[0], clusters, shape[2], dtype=dtype)
        check_step(x, c, weights(3, *shape[:2]) if weighted else None, metric)


def test_the_shapes_above_take_different_routes():
    def solver(n, d, k):
        return Solver(torch.empty(1, d, n, device=DEVICE), k, None, "euclidean", "ieee", True)

    assert solver(400, 2, 2).splits > 1
    assert solver(50, 300, 3).tile["HELD"]
    assert not solver(20, 200, 260).tile["HELD"]
    assert not solver(40, 1100, 33).tile["HELD"]


@in_interpreter
@pytest.mark.parametrize(
    ("shape", "clusters", "launches"),
    [
        ((4, 30, 150), 3, 1),  # one program per problem, as for a large batch on a GPU
        ((5, 40, 20), 7, 1),
        ((1, 400, 2), 2, 3),  # several programs per problem: centroids before, sums after
        ((1, 16, 20), 140, 3),  # more clusters than the registers hold: centroids, then two reads of x
    ],
    ids=str,
)
def test_a_step_is_one_launch_with_one_program_per_problem(shape, clusters, launches):
    for metric, weighted in (("euclidean", False), ("cosine", True)):
        dtype = torch.bfloat16 if weighted else torch.float32
        x, c = blobs(1, *shape, dtype=dtype), blobs(2, shape[0], clusters, shape[2], dtype=dtype)
        with checked() as traffic:
            check_step(x, c, weights(3, *shape[:2]) if weighted else None, metric)
        assert traffic.launches == launches


@in_interpreter
@pytest.mark.parametrize("metric", METRICS)
def test_a_step_moves_little_more_than_the_pixels(metric):
    x, c = blobs(1, 4, 600, 64), blobs(2, 4, 5, 64)
    with checked(x, c) as traffic:
        step = kmeans_step(x, c, metric=metric, backend="triton")
    assert traffic.bytes <= 1.1 * fewest(x, c, *step)


@pytest.mark.parametrize("metric", METRICS)
def test_atomics_give_the_same_sums(metric):
    x, w = blobs(4, 1, 400, 3), weights(4, 1, 400)
    step = check_step(x, x[:, :2], w, metric, deterministic=False)
    fixed = check_step(x, x[:, :2], w, metric)
    assert torch.equal(step.labels, fixed.labels)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_input_is_read_with_any_strides(dtype):
    x = blobs(5, 2, 5, 7, 6, dtype=dtype).permute(0, 3, 1, 2)  # [B, D, H, W], channels last
    c = blobs(6, 2, 3, 6, dtype=dtype)
    expected = check_step(x.flatten(2).transpose(1, 2), c)
    padded = torch.full((2, 8, 9, 16), math.nan, dtype=dtype, device=DEVICE)
    padded[:, 1:7, 2:7, 1:15:2] = x
    turned = x.transpose(2, 3).contiguous().transpose(2, 3)
    for y in (x.contiguous(), padded[:, 1:7, 2:7, 1:15:2], turned, x[:1].expand(2, -1, -1, -1)):
        step = kmeans_step(y, c, backend="triton")
        assert step.labels.shape == (2, 5, 7)
        for a, b in zip(step, expected, strict=True):
            assert torch.equal(a[0].flatten(), b[0].flatten())
    assert torch.equal(kmeans_step(x[0].flatten(1).T, c[0], backend="triton").sums, expected.sums[0])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clusters", [3, 70])
def test_a_non_finite_pixel_affects_only_the_inertia(value, metric, clusters):
    channels = 5 if clusters == 3 else 300  # on one read of x, and on two
    x, c = blobs(7, 2, 40, channels), blobs(8, 2, clusters, channels)
    x[0, 7, 2] = value
    step = check_step(x, c, None, metric)
    assert step.labels[0, 7] == -1
    assert step.inertia.isnan().tolist() == [True, False]
    w = torch.ones(2, 40, device=DEVICE)
    w[0, 7] = 0
    assert check_step(x, c, w, metric).inertia.isfinite().all()


@pytest.mark.parametrize("pairs", [3, 40])  # copies of so many centroids: all in one tile, and in four
@pytest.mark.parametrize("metric", METRICS)
def test_ties_go_to_the_lowest_index(metric, pairs):
    x = blobs(9, 1, 60, 256).sign()  # of length 16 and, as the centroids cancel, mean 0: arithmetic is exact
    c = torch.cat([x[:, :pairs], -x[:, :pairs]], 1)
    step = kmeans_step(x, torch.cat([c, c, c], 1), metric=metric, backend="triton")
    assert (step.labels < 2 * pairs).all()
    assert (step.counts[:, 2 * pairs :] == 0).all()


def test_no_pixel_of_positive_weight_and_empty_input():
    step = kmeans_step(blobs(0, 1, 9, 3), blobs(1, 1, 2, 3), weight=torch.zeros(1, 9, device=DEVICE), backend="triton")
    assert (step.labels == -1).all()
    assert step.inertia.item() == step.sums.abs().sum().item() == step.counts.sum().item() == 0
    empty = torch.zeros(0, 9, 3, device=DEVICE)
    assert kmeans_step(empty, empty[:, :2], backend="triton").labels.shape == (0, 9)


def test_refusals_name_the_reason(monkeypatch):
    with pytest.raises(TypeError, match="float64"):
        kmeans_step(blobs(0, 1, 9, 3).double(), blobs(1, 1, 2, 3).double(), backend="triton")
    wide = torch.zeros(1, 2, 8193, device=DEVICE)
    with pytest.raises(ValueError, match="8193 channels"):
        kmeans_step(wide, wide, backend="triton")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(RuntimeError, match="triton"):
            kmeans_step(wide, wide, backend="triton")


# ---------------------------------------------------------------- k-means


def same(a, b, tolerance=1e-5):
    assert torch.equal(a.labels.flatten(), b.labels.flatten())
    assert torch.equal(a.n_iter, b.n_iter)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(
            p.double().flatten(), q.double().flatten(), rtol=tolerance, atol=tolerance, equal_nan=True
        )


def check_kmeans(x, n_clusters, weight=None, **options):
    """The same random numbers and result as the reference in float64, on blobs that rounding does not split."""
    result = kmeans(x, n_clusters, weight=weight, backend="triton", **options)
    init = options.pop("init", "k-means++")
    init = init if isinstance(init, str) else init.double()
    same(result, kmeans(x.double(), n_clusters, weight=weight, init=init, backend="reference", **options))
    return result


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    "options", [{}, {"init": "random", "n_init": 2}, {"init_samples": 20}, {"n_iter": 0}, {"deterministic": False}]
)
def test_kmeans_equals_reference_from_the_same_seed(options, metric):
    check_kmeans(blobs(2, 2, 50, 6), 4, weights(0, 2, 50), seed=3, metric=metric, **options)


@examples(4)
@given(seed=seeds, pixels=st.integers(4, 40), channels=st.integers(1, 20), weighted=st.booleans())
def test_kmeans_equals_reference_at_any_size(seed, pixels, channels, weighted):
    w = weights(seed, 1, pixels) + 0.1 if weighted else None
    check_kmeans(blobs(seed, 1, pixels, channels, dtype=torch.float32), 3, w, seed=seed, n_iter=4, tol=0)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("empty", ["farthest", "keep"])
def test_empty_clusters(empty, metric):
    x = blobs(3, 2, 40, 5)
    far = x[:, :3] - 1e3 * torch.eye(5, device=DEVICE)[:3]  # nearest to no pixel, nor by angle
    init = torch.cat([far[:, :1], x[:, :3], far[:, 1:]], 1)
    r = check_kmeans(x, 6, weights(4, 2, 40) if metric == "cosine" else None, init=init, empty=empty, metric=metric)
    assert bool((r.counts > 0).all()) == (empty == "farthest")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pixels", [40, 320])  # one program per problem, and two
def test_empty_clusters_beside_full_ones(pixels, weighted, metric):
    """One of two problems has clusters without a pixel, the other a pixel that is not finite."""
    x, w = blobs(3, 2, pixels, 5), weights(4, 2, pixels) + 0.1 if weighted else None
    init = x[:, :6].clone()
    init[0, [0, 4]] = x[0, :2] - 1e3 * torch.eye(5, device=DEVICE)[:2]
    if DEVICE == "cpu":
        assert Solver(x.mT, 6, w, metric, "ieee", True).single == (pixels == 40)
    x[1, 9, 1] = math.nan
    with checked() if interpreted() else nullcontext():
        r = kmeans(x, 6, weight=w, init=init, n_iter=5, metric=metric, backend="triton")
    same(r, kmeans(x.double(), 6, weight=w, init=init.double(), n_iter=5, metric=metric, backend="reference"))
    assert (r.counts > 0).all()
    assert r.inertia.isnan().tolist() == [False, True]


@in_interpreter
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("shape", "launches"), [((4, 40, 20), 1), ((1, 400, 2), 3)], ids=str)
def test_an_iteration_is_one_launch_with_one_program_per_problem(shape, launches, metric):
    """Otherwise three launches: the step, the sum of partial results, and the centroids."""
    x, counts = blobs(1, *shape), []
    for n_iter in (2, 3):
        with checked() as traffic:
            check_kmeans(x, 2, seed=0, n_iter=n_iter, tol=0, metric=metric)
        counts.append(traffic.launches)
    assert counts[1] - counts[0] == launches


@pytest.mark.parametrize("pixels", [40, 400])
@pytest.mark.parametrize(
    "options",
    [{"tol": 0.0, "n_iter": 30}, {"tol": 0.0, "n_iter": 1}, {"tol": 1e9, "n_iter": 3}, {"n_iter": 2}],
    ids=str,
)
def test_each_problem_stops_when_it_has_converged(options, pixels):
    x = blobs(6, 2, pixels, 5)
    r = check_kmeans(x, 3, init=x[:, :3], **options)
    assert (r.n_iter <= options["n_iter"]).all()
    assert (r.n_iter == 1).all() == (options["n_iter"] == 1 or options.get("tol") == 1e9)


@in_interpreter
def test_a_problem_that_has_converged_reads_nothing():
    """Iterations after the convergence of all problems read only the flags."""
    x, moved = blobs(2, 4, 40, 20), []
    for n_iter in (20, 24):
        with checked() as traffic:
            r = kmeans(x, 3, seed=0, n_iter=n_iter, backend="triton")
        moved.append(traffic.bytes)
    assert r.n_iter.max() < 20
    assert moved[1] - moved[0] == 4 * 4 * 32  # iterations, problems, a sector


def test_more_pixels_than_are_counted_in_32_bits_are_refused():
    x = torch.zeros(1, 1, 1, device=DEVICE).expand(1, 1, (1 << 30) + 1)
    with pytest.raises(ValueError, match=r"1073741825 pixels .* take 2\^30: choose backend 'torch'"):
        Solver(x, 1, None, "euclidean", "ieee", True)


def test_duplicate_pixels_and_as_many_clusters_as_pixels():
    r = kmeans(torch.ones(1, 5, 2, device=DEVICE), 3, seed=0, backend="triton")
    assert r.inertia.item() == 0
    assert r.centroids.isfinite().all()
    r = kmeans(blobs(13, 1, 6, 3), 6, seed=0, backend="triton")
    assert r.inertia.item() == pytest.approx(0, abs=1e-5)
    assert sorted(r.labels[0].tolist()) == list(range(6))


@pytest.mark.parametrize("metric", METRICS)
def test_kmeans_of_a_non_finite_pixel(metric):
    x = blobs(5, 2, 30, 4)
    x[0, 7, 2] = math.nan
    r = check_kmeans(x, 3, seed=1, metric=metric, init="random", n_init=2)
    assert r.labels[0, 7] == -1
    assert r.inertia.isnan().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strided_input(dtype):
    x = blobs(6, 1, 6, 5, 20, dtype=dtype).permute(0, 3, 1, 2)  # channels last
    a = kmeans(x, 3, seed=2, backend="triton")
    assert a.labels.shape == (1, 6, 5)
    b = kmeans(x.double().contiguous(), 3, seed=2, backend="reference")
    slack = 0 if DEVICE == "cpu" else 1e-2  # rounding of centroids, which the interpreter does not do
    assert (a.labels != b.labels).float().mean() <= slack
    assert a.inertia.item() == pytest.approx(b.inertia.item(), rel=1e-5 + slack)


def test_more_samples_than_a_program_draws_from(monkeypatch):
    monkeypatch.setattr("fgfast.kernels.kmeans.launch.SAMPLES", 16)
    check_kmeans(blobs(9, 1, 30, 4), 3, seed=0, n_iter=1)


def test_many_clusters_take_the_route_of_two_reads():
    check_kmeans(blobs(8, 1, 40, 550), 33, seed=0, n_iter=1)


# ---------------------------------------------------------------- registration


def test_opcheck():
    x, w = blobs(16, 2, 12, 3), weights(16, 2, 12)
    opcheck(torch.ops.fgfast.kmeans_step.default, (x.transpose(1, 2), x[:, :3], w, "cosine", "ieee", True, "triton"))
    tail = (64, 1, 1e-4, w, "euclidean", "farthest", torch.tensor(0, device=DEVICE), "ieee", True, "triton")
    columns = [x.transpose(1, 2)]
    opcheck(torch.ops.fgfast.kmeans.default, (columns, 3, None, 2, "k-means++", None, *tail), test_utils="test_schema")
    opcheck(torch.ops.fgfast.kmeans.default, (columns, 3, None, 2, "given", x[:, :3], *tail))
