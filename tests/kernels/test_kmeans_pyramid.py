"""The Triton kernels of k-means on feature pyramids against the float64 reference on the built hypercolumns."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.library import opcheck

from fgfast import kmeans
from fgfast.reference.kmeans import hypercolumns

pytest.importorskip("triton")
import triton
import triton.language as tl

from fgfast.kernels.common import interpreted
from fgfast.kernels.configs import config
from fgfast.kernels.kmeans.pyramid import Adder, Levels, count_programs
from fgfast.kernels.kmeans.pyramid_cells import taps
from fgfast.kernels.kmeans.pyramid_tiles import score_tile
from tests.examples import examples
from tests.kernels.test_kmeans import same

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ["euclidean", "cosine"]
seeds = st.integers(0, 10**6)
SHAPES = ((3, 8, 8), (7, 4, 4), (5, 2, 3), (2, 11, 1))  # as large as the pixels, smaller, odd, larger along one side

SMALL = ((3, 6, 6), (5, 3, 2))


def pyramid(seed, batch=1, shapes=SHAPES, dtype=torch.float32):
    """Levels of noise around a few values, one of them channels last."""
    g = torch.Generator().manual_seed(seed)
    maps = [
        (torch.randn(batch, *s, generator=g) + 4 * torch.randint(-1, 2, (batch, 1, *s[1:]), generator=g)).to(dtype)
        for s in shapes
    ]
    maps[-1] = maps[-1].contiguous(memory_format=torch.channels_last)
    return [m.to(DEVICE) for m in maps]


def pixel_weights(seed, *shape):
    """Numbers in [0, 0.8), a fifth of them 0."""
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) - 0.2).clamp_min(0).to(DEVICE)


def check(maps, n_clusters, size, tolerance=1e-5, **options):
    """The same random numbers and the same result as the reference in float64."""
    result = kmeans(maps, n_clusters, size=size, backend="triton", **options)
    if isinstance(options.get("init"), torch.Tensor):
        options["init"] = options["init"].double()
    exact = kmeans([m.double() for m in maps], n_clusters, size=size, backend="reference", **options)
    same(result, exact, tolerance)
    return result


def margin(maps, size, centroids, metric):
    """The smallest difference between the distances of a pixel to its two nearest centroids."""
    x, c = hypercolumns([m.double() for m in maps], size), centroids.double()
    if metric == "cosine":
        x, c = (torch.nn.functional.normalize(v, dim=2) for v in (x, c))
    nearest = torch.cdist(x, c).topk(2, largest=False).values
    return (nearest[..., 1] - nearest[..., 0]).min()


def spread(maps, size, n_clusters):
    """Evenly spaced pixels as initial centroids, independent of rounding."""
    height, width = (size, size) if isinstance(size, int) else size
    built = hypercolumns([m.double() for m in maps], (height, width))
    return built[:, :: height * width // n_clusters][:, :n_clusters].to(torch.float32)


# ---------------------------------------------------------------- k-means


@pytest.mark.parametrize(
    ("metric", "weighted", "options"),
    [
        ("euclidean", False, {}),
        ("cosine", False, {}),
        ("euclidean", True, {"init": "random", "n_init": 2}),
        ("cosine", True, {"init_samples": 20}),
    ],
)
def test_equals_reference_from_the_same_seed(metric, weighted, options):
    weight = pixel_weights(2, 1, 6, 6) if weighted else None
    check(pyramid(1, shapes=SMALL), 4, 6, seed=3, metric=metric, weight=weight, n_iter=2, tol=0.0, **options)


@pytest.mark.quick
@examples(4)
@given(
    seed=seeds,
    shapes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    size=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    metric=st.sampled_from(METRICS),
    weighted=st.booleans(),
)
def test_any_levels_at_any_size(seed, shapes, size, metric, weighted):
    maps = pyramid(seed, shapes=shapes)
    weight = pixel_weights(seed, 1, *size) + 0.1 if weighted else None
    start = spread(maps, size, 3)
    options = {"n_iter": 1, "metric": metric, "weight": weight}
    end = kmeans(
        [m.double() for m in maps], 3, size=size, init=start.double(), backend="reference", **options
    ).centroids
    assume(min(margin(maps, size, c, metric) for c in (start, end)) > 1e-3)  # otherwise rounding decides
    check(maps, 3, size, 1e-4, init=start, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    maps = pyramid(4, dtype=dtype)
    a = kmeans(maps, 3, size=8, init=spread(maps, 8, 3), n_iter=2, backend="triton")
    b = kmeans([m.double() for m in maps], 3, size=8, init=spread(maps, 8, 3).double(), n_iter=2, backend="reference")
    slack = 0 if DEVICE == "cpu" else 1e-2  # rounding of centroids, which the interpreter does not do
    assert (a.labels != b.labels).float().mean() <= slack
    assert a.inertia.item() == pytest.approx(b.inertia.item(), rel=1e-5 + slack)


def test_maps_are_read_with_any_strides():
    maps = pyramid(5)
    expected = kmeans(maps, 3, size=8, init=spread(maps, 8, 3), n_iter=1, backend="triton")
    padded = torch.full((1, 9, 6, 12), math.nan, device=DEVICE)
    padded[:, 1:8, 1:5, 1:9:2] = maps[1]
    turned = maps[0].transpose(2, 3).contiguous().transpose(2, 3)
    other = [turned, padded[:, 1:8, 1:5, 1:9:2], maps[2], maps[3].contiguous()]
    got = kmeans(other, 3, size=8, init=spread(maps, 8, 3), n_iter=1, backend="triton")
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_cell_affects_only_pixels_that_interpolate_it(metric, value):
    maps = pyramid(6, batch=2, shapes=SMALL)
    start = spread(maps, 6, 3)
    maps[1][0, 1, 2, 0] = value  # no pixel has weight 0 for it, which would be NaN in the reference
    lost = ~hypercolumns(maps, (6, 6)).isfinite().all(2)
    r = check(maps, 3, 6, init=start, n_iter=1, metric=metric)
    assert torch.equal(r.labels.flatten(1) == -1, lost)
    assert r.inertia.isnan().tolist() == [True, False]


@pytest.mark.parametrize("empty", ["farthest", "keep"])
def test_empty_clusters(empty):
    maps = pyramid(7, shapes=SMALL)
    start = spread(maps, 6, 3)
    init = torch.cat([start[:, :1], start[:, :2] - 1e3, start[:, 1:]], 1)
    for metric in METRICS if empty == "farthest" else METRICS[:1]:
        weight = pixel_weights(4, 1, 6, 6) if metric == "cosine" else None
        r = check(maps, 5, 6, 1e-4, init=init, empty=empty, n_iter=1, metric=metric, weight=weight)
    assert bool((r.counts > 0).all()) == (empty == "farthest")


@pytest.mark.parametrize(("clusters", "size"), [(20, 5), (130, 12)])  # labels of one byte and of two
def test_many_clusters_and_more_samples_than_a_program_draws_from(monkeypatch, clusters, size):
    monkeypatch.setattr("fgfast.kernels.kmeans.pyramid.SAMPLES", 16)
    maps = pyramid(9, shapes=((6, size, size),))  # in which no two candidates leave the same distances
    check(maps, clusters, size, 1e-4, seed=0, n_iter=1)


@pytest.mark.parametrize("metric", METRICS)
def test_wide_tiles_of_scores(metric):
    maps = pyramid(3, shapes=((40, 9, 9), (7, 4, 4)))
    row, narrow = Levels(maps, (9, 9)).row, 32
    assert [score_tile(row, 16, 32, (40, *m.shape[2:]), 4)[0] for m in maps] == [128, narrow]
    check(maps, 3, 9, init=spread(maps, 9, 3), n_iter=1, metric=metric)


def test_tiles_of_scores_are_as_wide_as_registers_and_level_allow():
    """The levels of ResNet-50; a tile reads all channels of the centroids of its level, so few tiles read them."""
    row = config("kmeans_pyramid", torch.device("cpu"), "half")
    sizes = ((256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7))
    for KP, most in ((16, 256), (32, 128), (128, 32)):
        expected = [(most, 32), (most, 32), (most, 32), (min(most, 64), 32)]
        assert [score_tile(row, KP, 64, size, 2) for size in sizes] == expected


def test_no_pixel_of_positive_weight_and_an_empty_batch():
    maps = pyramid(0, shapes=SMALL)
    r = kmeans(maps, 2, size=4, seed=0, n_iter=1, weight=torch.zeros(1, 4, 4, device=DEVICE), backend="triton")
    assert (r.labels == -1).all()
    assert r.inertia.item() == 0
    assert kmeans([m[:0] for m in maps], 2, size=4, seed=0, backend="triton").labels.shape == (0, 4, 4)


@pytest.mark.parametrize("offset", [1e2, -1e4, 1e6])
def test_an_offset_costs_no_digits(offset):
    maps = [m + offset for m in pyramid(5)]
    built = hypercolumns([m.double() for m in maps], (8, 8))
    init = built[:, ::13].float()
    init[:, -1] = 2 * offset  # nearest to no pixel
    options = {"size": 8, "n_iter": 4, "init": init}
    found = kmeans(maps, init.shape[1], backend="triton", **options)
    wide = kmeans([m.double() for m in maps], init.shape[1], backend="reference", **(options | {"init": init.double()}))
    assert torch.equal(found.labels, wide.labels)
    spread = (built - built.mean(1, keepdim=True)).square().sum((1, 2))
    assert ((found.inertia - wide.inertia).abs() <= 1e-6 * (wide.inertia + spread)).all()
    u = torch.finfo(torch.float32).eps
    slack = u * wide.centroids.abs() + 16 * u * spread.sqrt()[:, None, None]
    assert ((found.centroids - wide.centroids).abs() <= slack).all()


def test_two_runs_are_equal_bit_for_bit():
    maps = pyramid(9, shapes=((4, 6, 6), (9, 3, 3)))
    a, b = (kmeans(maps, 3, size=6, init=spread(maps, 6, 3), n_iter=2, backend="triton") for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_refusals_name_the_reason():
    maps = pyramid(0, shapes=((1, 17, 17),))
    with pytest.raises(ValueError, match="in 257 clusters has no backend 'triton'"):
        kmeans(maps, 257, size=17, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        kmeans([m.double() for m in maps], 2, size=17, backend="triton")
    long = torch.zeros(1, 1, 1, (1 << 14) + 1, device=DEVICE)
    with pytest.raises(ValueError, match="too long"):
        kmeans([long], 2, size=2, backend="triton")


# ---------------------------------------------------------------- the parts


@examples(30)
@given(
    sizes=st.lists(st.tuples(st.just(1), st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=4),
    height=st.integers(1, 70),
    rows=st.integers(1, 9),
)
def test_a_strip_waits_for_every_tile_that_it_interpolates(sizes, height, rows):
    """A strip is labelled only after all of its scores are computed."""
    span, cpu = 16, torch.device("cpu")
    for _, h, w in sizes:
        needed = count_programs([(1, h, w)], [span], height, rows, cpu)
        for strip in range(len(needed)):
            mixed = set()
            for row in range(strip * rows, min((strip + 1) * rows, height)):
                twice = max((2 * row + 1) * h - height, 0)
                low, part = divmod(twice, 2 * height)
                mixed |= {low} | ({low + 1} if part and low < h - 1 else set())
            assert needed[strip] >= (max(mixed) * w + w - 1) // span - min(mixed) * w // span + 1
    total = count_programs(sizes, [span] * len(sizes), height, rows, cpu)
    assert torch.equal(total, sum(count_programs([s], [span], height, rows, cpu) for s in sizes))


@examples(4)
@given(seed=seeds, shape=st.tuples(st.integers(1, 40), st.integers(1, 7), st.integers(1, 7)), size=st.integers(1, 9))
def test_norms_and_pixels_are_those_of_interpolate(seed, shape, size):
    maps = pyramid(seed, shapes=(shape,))
    built = hypercolumns([m.double() for m in maps], (size, size))
    levels = Levels(maps, (size, size))
    mu = built.mean(1)
    wide = levels.pad_channels(mu.float())
    assert_near = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close(levels.squares(wide), (built - mu[:, None]).square().sum(2), **assert_near)
    index = torch.arange(size * size, device=DEVICE)[None]
    torch.testing.assert_close(levels.rows(index, wide, torch.float32), built - mu[:, None], **assert_near)
    ones = torch.ones(1, size * size, device=DEVICE)
    torch.testing.assert_close(levels.total(ones, wide, False), built.sum(1), **assert_near)
    torch.testing.assert_close(levels.total(ones, wide, True), built.sum(1) - size**2 * mu, **assert_near)
    torch.testing.assert_close(levels.unpad(wide), mu, **assert_near)


def test_large_levels_are_split_and_small_ones_are_not():
    maps = [torch.empty(1, *shape, device=DEVICE, dtype=torch.bfloat16) for shape in ((256, 56, 56), (2048, 7, 7))]
    adder = Adder(Levels(maps, (64, 64)), 15)
    assert adder.splits[0] > 1
    assert adder.splits[1] == 1
    partial = sum(8 * p.numel() for s, p in zip(adder.splits, adder.parts, strict=True) if s > 1)
    assert partial <= 0.1 * sum(m.nbytes for m in maps)


def test_sums_are_those_of_any_division_of_the_channels(monkeypatch):
    """One program weighs the cells of a level for all channels, or many do for some of them: the bits are the same."""
    from fgfast.kernels.kmeans import pyramid as kernels

    maps = pyramid(2, shapes=((300, 6, 5), (70, 3, 4)))
    labels = torch.arange(30, device=DEVICE)[None].to(torch.int8) % 7
    ones, done = torch.ones(1, 30, device=DEVICE), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    sums = []
    for processors in (1, 1000):
        monkeypatch.setattr(kernels, "processors", lambda _, n=processors: n)
        adder = Adder(Levels(maps, (6, 5)), 7)
        adder.sums(labels, ones, done, True, "ieee", adder.levels.pad_channels(None), False)
        sums.append(torch.cat([part.sum(1) for part in adder.parts], 2))
    assert torch.equal(*sums)
    built = hypercolumns([m.double() for m in maps], (6, 5))
    expected = torch.stack([built[0, labels[0] == k].sum(0) for k in range(7)])[None]
    torch.testing.assert_close(sums[0].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not interpreted(), reason="counts traffic in the interpreter")
def test_a_step_is_two_launches_and_reads_the_levels_twice():
    """Traffic is at most twice the levels plus the predicted traffic of operands, scores, sums and labels.

    m is read by each program of score, and scores are written and read again, 64 bytes per channel and cell; a strip
    reads at most half as many rows again around it.
    """
    from fgfast.kernels.sanitizer import checked

    maps = pyramid(1, shapes=((128, 16, 16), (256, 8, 8)))
    solver = prepared_solver(maps, (16, 16), 8, torch.ones(1, 256, device=DEVICE))
    none = torch.zeros(1, dtype=torch.int32)
    with checked() as traffic:
        solver.score(none)
        solver.sums(none)
    assert traffic.launches == 2
    levels, operand = sum(m.nbytes for m in maps), solver.m.nbytes + 2.5 * solver.scores.nbytes
    small = sum(p.nbytes for p in solver.adder.parts) + 16 * 256 + solver.bias.nbytes
    assert traffic.bytes <= 2 * levels + operand + small


def prepared_solver(maps, size, clusters, w):
    """A solver whose centroids are prepared."""
    from fgfast.kernels.kmeans.pyramid import Solver

    levels = Levels(maps, size)
    mu = levels.pad_channels(None)
    solver = Solver(levels, clusters, None, w, levels.squares(mu), mu, "euclidean", "ieee")
    solver.labels.fill_(-2)
    limit, none = torch.zeros(1), torch.zeros(1, dtype=torch.int32)
    solver.move(spread(maps, size, clusters), limit, none, none.clone(), "farthest", begin=True)
    return solver


# ---------------------------------------------------------------- registration


def test_opcheck():
    maps, w = pyramid(3, shapes=((3, 3, 4), (2, 2, 2))), pixel_weights(0, 1, 12)
    tail = (64, 1, 1e-4, w, "euclidean", "farthest", torch.tensor(0, device=DEVICE), "ieee", True, "triton")
    start = spread(maps, (3, 4), 2)
    tests = "test_schema" if DEVICE == "cpu" else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.fgfast.kmeans.default, (maps, 2, [3, 4], 1, "given", start, *tail), test_utils=tests)


@triton.jit
def taps_kernel(low_ptr, fraction_ptr, length, size, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    low, fraction = taps(at, length, size)
    tl.store(low_ptr + at, low, at < size)
    tl.store(fraction_ptr + at, fraction, at < size)


@pytest.mark.parametrize(("length", "size"), [(7, 64), (32, 56), (56, 32), (3, 1000), (16384, 1000), (1000, 16384)])
def test_taps_are_rounded_once(length, size):
    """The cells and weights are those of exact arithmetic, rounded to float32; on a GPU a plain division is not."""
    low = torch.empty(size, dtype=torch.int32, device=DEVICE)
    fraction = torch.empty(size, device=DEVICE)
    taps_kernel[(1,)](low, fraction, length, size, BLOCK=triton.next_power_of_2(size))
    twice = ((2 * torch.arange(size) + 1) * length - size).clamp_min(0)
    expected = torch.where(twice // (2 * size) < length - 1, twice % (2 * size) / (2.0 * size), 0)
    assert torch.equal(low.cpu().long(), twice // (2 * size))
    assert torch.equal(fraction.cpu(), expected.float())
