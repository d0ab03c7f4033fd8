"""The Triton kernels of part_pool and labels_to_grid: under the interpreter, or on a GPU where there is one.

Bounds: a mean is a convex combination, so its float32 sum of n terms, plain or by tensor cores, is within
(n + 2) 2^-23 of the mean of |x| from the exact one, then one rounding to the dtype of the features. Sums likewise,
times the area. A gradient is one quotient and one product: three roundings.
"""

import math
import os
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")

import fgfast
from fgfast import labels_to_grid, part_pool
from fgfast.ops.part_pool.grid import _labels_to_grid
from fgfast.ops.part_pool.part_pool import _part_pool, _part_pool_map, part_pool_backward
from fgfast.reference import part_pool as reference
from tests.examples import examples

pytestmark = pytest.mark.slow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}  # half a step at 1
TINY = {torch.float32: 0.0, torch.float16: 2.0**-25, torch.bfloat16: 0.0}  # half a step among the subnormals
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts traffic in the interpreter")

ORDERS = ("rows", "channels", "sliced", "transposed")


def ordered(x, order):
    """The same [B, D, h, w] values in other memory orders, with gaps between them where sliced."""
    batch, channels, height, width = x.shape
    if order == "channels":
        return x.contiguous(memory_format=torch.channels_last)
    if order == "sliced":
        return x.new_full((batch, channels + 1, height + 2, width + 3), math.nan)[:, 1:, 1:-1, 1:-2].copy_(x)
    if order == "transposed":
        return x.transpose(2, 3).contiguous().transpose(2, 3)
    return x.contiguous()


@st.composite
def problems(draw, maps=False):
    """Features, labels, weight, K, reduce: odd sizes, empty parts, one part, one image, all pixels excluded.

    ``maps``: labels are id maps of any size and integer dtype.
    """
    batch, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 16, 33, 150]))
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    n_parts = draw(st.sampled_from([1, 2, 7, 16, 33, 70]))
    dtype = draw(st.sampled_from(list(UNIT)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = ordered(torch.randn(batch, channels, height, width, generator=g).to(dtype), draw(st.sampled_from(ORDERS)))
    size = (draw(st.integers(1, 40)), draw(st.integers(1, 40))) if maps else (height, width)
    labels = torch.randint(-1, n_parts, (batch, *size), generator=g)
    if draw(st.booleans()):
        labels[0] = -1
    if draw(st.booleans()):
        labels = ordered(labels[:, None].float(), "sliced").nan_to_num(-1).long()[:, 0]
    if maps:  # -1 is 255 in uint8
        labels = labels.to(draw(st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64])))
        labels = labels.mT.contiguous().mT if draw(st.booleans()) else labels
    weight = None
    if draw(st.booleans()):
        weight = torch.rand(batch, height, width, generator=g) * (torch.rand(batch, height, width, generator=g) > 0.3)
        weight = weight.to(draw(st.sampled_from([torch.float32, dtype])))
    reduce = draw(st.sampled_from(["mean", "sum"]))
    weight = None if weight is None else weight.to(DEVICE)
    return x.to(DEVICE), labels.to(DEVICE), weight, n_parts, reduce


def truth(x, labels, n_parts, weight, reduce):
    """Pooled and area in float64, and the same of |x|: the scale of the error."""
    if labels.shape[1:] != x.shape[2:]:
        labels = reference.labels_to_grid(labels, tuple(x.shape[2:]), n_parts)
    w = None if weight is None else weight.flatten(1).double()
    flat = x.double().flatten(2).transpose(1, 2)
    pooled, area = reference.part_pool(flat, labels.flatten(1), n_parts, w, reduce)
    return pooled, area, reference.part_pool(flat.abs(), labels.flatten(1), n_parts, w, reduce)[0]


def within(actual, exact, bound):
    assert ((actual.double() - exact).abs() <= bound).all(), float(((actual.double() - exact).abs() - bound).max())


@pytest.mark.quick
@examples(60)
@given(problems() | problems(maps=True))
def test_forward_and_backward_equal_the_reference(problem):
    x, labels, weight, n_parts, reduce = problem
    wide = x.double().requires_grad_()
    pooled, area, size = truth(wide, labels, n_parts, weight, reduce)
    x = x.detach().requires_grad_()
    out = part_pool(x, labels, n_parts, weight=weight, reduce=reduce, backend="triton")
    assert out.pooled.dtype == x.dtype
    pixels, unit = x[0, 0].numel(), UNIT[x.dtype]
    summed = (pixels + 2) * 2.0**-23 * size
    within(out.pooled, pooled, summed + unit * (pooled.abs() + summed) + TINY[x.dtype])
    within(out.area, area.double(), (pixels + 2) * 2.0**-23 * area.double())

    g = torch.randn(pooled.shape, dtype=torch.float32).to(x.device, x.dtype)
    (expected,) = torch.autograd.grad(pooled, wide, g.double())
    (grad,) = torch.autograd.grad(out.pooled, x, g)
    assert grad.dtype == x.dtype
    # The area in the quotient is a sum with the error above.
    within(grad, expected, ((pixels + 5) * 2.0**-23 + unit) * expected.abs() + TINY[x.dtype])


@examples(30)
@given(problems() | problems(maps=True), st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 10**6))
def test_a_non_finite_pixel_affects_only_its_own_part(problem, value, seed):
    x, labels, weight, n_parts, reduce = problem
    g = torch.Generator().manual_seed(seed)
    bad = (torch.rand(x.shape, generator=g) < 0.05).to(x.device)
    dirty = torch.where(bad, value, x)
    out = part_pool(dirty, labels, n_parts, weight=weight, reduce=reduce, backend="triton")
    clean = part_pool(torch.where(bad, 0, x), labels, n_parts, weight=weight, reduce=reduce, backend="triton")
    reached, *_ = truth(bad.double(), labels, n_parts, weight, "sum")
    assert torch.equal(out.pooled.isnan(), reached > 0)
    assert torch.equal(out.area, clean.area)
    torch.testing.assert_close(out.pooled[reached == 0], clean.pooled[reached == 0], rtol=1e-2, atol=1e-5)


@st.composite
def small_maps(draw):
    """Features [B, D, h, w] of which every channel has another alignment, labels or id maps, weight."""
    batch, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 5, 33]))
    height, width = draw(st.integers(1, 8)), draw(st.sampled_from([1, 3, 5, 7]))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    x = torch.randn(batch, 8 * groups, height, width, generator=g).to(draw(st.sampled_from(list(UNIT))))
    if draw(st.booleans()):  # images of one tensor after another, with a gap between them
        x = torch.cat([x, x[:, :8]], 1)[:, : x.shape[1]]
    scale = draw(st.sampled_from([1, 1, 2]))
    labels = torch.randint(-1, 9, (batch, scale * height, scale * width), generator=g)
    weight = torch.rand(batch, height, width, generator=g) if draw(st.booleans()) else None
    return x.to(DEVICE), labels.to(DEVICE), None if weight is None else weight.to(DEVICE)


@examples(40)
@given(small_maps(), st.booleans())
def test_small_maps_read_in_runs_give_the_numbers_of_any_layout(problem, dirty):
    x, labels, weight = problem
    if dirty:
        x[torch.rand(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.02] = math.nan
    out, expected = (part_pool(m, labels, 9, weight=weight, backend="triton") for m in (x, ordered(x, "sliced")))
    torch.testing.assert_close(out.area, expected.area)
    torch.testing.assert_close(out.pooled, expected.pooled, equal_nan=True)


@examples(40)
@given(small_maps(), st.booleans(), st.booleans())
def test_gradients_of_small_maps_written_in_runs_are_those_of_any_layout(problem, dirty, mean):
    from fgfast.kernels.part_pool import launch as kernels

    x, labels, _ = problem
    upstream = torch.randn(len(x), 9, x.shape[1], generator=torch.Generator().manual_seed(1)).to(x)
    if dirty:
        upstream[torch.rand(upstream.shape, generator=torch.Generator().manual_seed(0)).to(x.device) < 0.02] = math.nan
    grid = labels_to_grid(labels, (x.shape[2], x.shape[3]), 9)
    area = part_pool(x, labels, 9).area
    images = x.new_full((len(x), x.shape[1] + 8, *x.shape[2:]), 7)  # with a gap after each
    out, expected = (
        kernels.pool_backward(upstream, grid, None, area, mean, like) for like in (images[:, :-8], ordered(x, "sliced"))
    )
    assert (images[:, -8:] == 7).all()
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(x.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("n_parts", [3, 80])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_gradient_affects_only_its_own_part(n_parts, value):
    x = torch.randn(1, 5, 4, 4, device=DEVICE, requires_grad=True)
    labels = (torch.arange(16, device=DEVICE) % 3).view(1, 4, 4)
    g = torch.ones(1, n_parts, 5, device=DEVICE)
    g[0, 1, 2] = value
    (grad,) = torch.autograd.grad(part_pool(x, labels, n_parts, backend="triton").pooled, x, g)
    assert torch.equal(grad.isfinite().logical_not().nonzero()[:, 1].unique(), torch.tensor([2], device=DEVICE))
    assert torch.equal(grad[0, 2].isfinite(), labels[0] != 1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype_and_ids_outside_the_parts(dtype):
    x = torch.randn(2, 5, 6, 4, device=DEVICE)
    labels = torch.randint(-1, 4, (2, 6, 4), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    strange = {torch.uint8: 255, torch.int8: -128, torch.int64: 2**32 + 1}.get(dtype, -7)  # narrowed: part 1
    odd = torch.where(labels < 0, strange, labels).to(dtype)
    run = torch.ops.fgfast.part_pool
    for a, b in zip(
        run(x, odd, 4, None, True, "triton"), run(x, labels.to(torch.int16), 4, None, True, "triton"), strict=True
    ):
        assert torch.equal(a, b)
    grid = torch.ops.fgfast.labels_to_grid
    assert torch.equal(grid(odd, 3, 3, 4, "triton"), grid(labels, 3, 3, 4))
    for a, b in zip(
        torch.ops.fgfast.part_pool_map(x[:, :, :3, :3], odd, 4, None, True, "triton"),
        torch.ops.fgfast.part_pool_map(x[:, :, :3, :3], labels, 4, None, True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_pixels_split_among_programs_give_the_same_sums(monkeypatch, reduce):
    from fgfast.kernels.part_pool import launch as kernels

    monkeypatch.setattr(kernels, "processors", lambda device: 100)  # two splits forward, six backward
    g = torch.Generator().manual_seed(0)
    x, labels = torch.randn(1, 20, 50, 43, generator=g), torch.randint(-1, 5, (1, 50, 43), generator=g)
    x, labels = x.to(DEVICE).requires_grad_(), labels.to(DEVICE)
    results = []
    for backend in ("torch", "triton"):
        out = part_pool(x, labels, 5, reduce=reduce, backend=backend)
        results.append((*out, *torch.autograd.grad(out.pooled.square().sum(), x)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_offsets_of_64_bits_give_the_same_numbers(monkeypatch):
    from fgfast.kernels.part_pool import launch as kernels

    assert kernels.wide(torch.empty_strided((1, 2, 3, 3), (0, 2**31, 3, 1), device="meta"))
    x = torch.randn(2, 21, 7, 5, device=DEVICE)
    results = []
    for wide in (False, True):
        monkeypatch.setattr(kernels, "wide", lambda *_, wide=wide: wide)
        for y, scale in product((x.clone(), x.mT.contiguous().mT), (1, 2)):
            labels = torch.arange(70 * scale**2, device=DEVICE).view(2, 7 * scale, 5 * scale) % 7 - 1
            out = part_pool(y.requires_grad_(), labels.clamp(max=4), 5, backend="triton")
            results.append((*out, *torch.autograd.grad(out.pooled.square().sum(), y)))
    for a, b in zip(results[:4], results[4:], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_two_runs_agree_to_the_bit():
    x = torch.randn(2, 40, 30, 30, device=DEVICE, requires_grad=True)
    for size in ((2, 30, 30), (2, 60, 60)):
        labels = torch.randint(-1, 9, size, device=DEVICE)
        a, b = (part_pool(x, labels, 9, backend="triton") for _ in range(2))
        assert torch.equal(a.pooled, b.pooled)
        assert torch.equal(*(torch.autograd.grad(y.pooled.square().sum(), x)[0] for y in (a, b)))


@pytest.mark.parametrize("size", [None, (8, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 0, 3, 3)], ids=str)
def test_empty_input(shape, size):
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    labels = torch.zeros(shape[0], *(size or shape[2:]), dtype=torch.int64, device=DEVICE)
    out = part_pool(x, labels, 3, backend="triton")
    expected = part_pool(x, labels, 3, backend="torch")
    assert torch.equal(out.pooled, expected.pooled)
    assert torch.equal(out.area, expected.area)
    out.pooled.sum().backward()
    assert x.grad.shape == shape


def test_an_empty_id_map_has_no_part():
    x, labels = torch.ones(2, 4, 3, 3, device=DEVICE), torch.zeros(2, 0, 5, dtype=torch.int64, device=DEVICE)
    out = part_pool(x, labels, 3, backend="triton")
    assert out.pooled.abs().sum() == out.area.sum() == 0


@examples(25)
@given(
    st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9),
    st.sampled_from([1, 3, 70]), st.booleans(),
)  # fmt: skip
def test_grid_equals_the_reference_at_any_size(seed, height, width, rows, columns, n_parts, transposed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, n_parts, (2, height, width), generator=g).to(DEVICE)
    labels = labels.mT.contiguous().mT if transposed else labels
    grid = labels_to_grid(labels, (rows, columns), n_parts, backend="triton")
    assert torch.equal(grid, reference.labels_to_grid(labels, (rows, columns), n_parts))


def test_grid_without_labels():
    labels = torch.full((2, 4, 4), -1, device=DEVICE)
    assert (labels_to_grid(labels, 2, 3, backend="triton") == -1).all()
    assert labels_to_grid(labels[:0], 2, 3, backend="triton").shape == (0, 2, 2)
    assert (labels_to_grid(labels[:, :0], 2, 3, backend="triton") == -1).all()


def test_opcheck():
    x, labels = torch.randn(2, 3, 3, 2, device=DEVICE), torch.randint(-1, 3, (2, 3, 2), device=DEVICE)
    weight = torch.rand(2, 3, 2, device=DEVICE)
    for y in (x, x.contiguous(memory_format=torch.channels_last)):
        opcheck(_part_pool.op, (y.requires_grad_(), labels, 3, weight, True, "triton"))
        opcheck(_part_pool_map.op, (y, labels.repeat(1, 2, 3), 3, weight, True, "triton"))
        opcheck(_part_pool_map.op, (y, labels[:, :2], 80, None, False, "triton"))
    grad, area = torch.randn(2, 3, 3, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    for pixel_major in (False, True):
        opcheck(part_pool_backward.op, (grad, labels, weight, area, True, pixel_major, "triton"))
    opcheck(_labels_to_grid.op, (labels, 2, 2, 3, "triton"))


def test_compile_gives_the_same_numbers():
    x = torch.randn(2, 5, 6, 4, device=DEVICE, requires_grad=True)
    labels = torch.randint(-1, 3, (2, 6, 4), device=DEVICE)

    def run(x):
        pooled = part_pool(x, labels_to_grid(labels, (6, 4), 3, backend="triton"), 3, backend="triton").pooled
        return pooled.square() + part_pool(x, labels.repeat(1, 2, 2), 3, backend="triton").pooled

    eager, compiled = run(x), torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(eager, compiled)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (eager, compiled)))


def test_backward_uses_the_backend_of_the_forward_pass():
    x = torch.randn(1, 4, 3, 3, device=DEVICE, requires_grad=True)
    labels = torch.zeros(1, 3, 3, dtype=torch.int64, device=DEVICE)
    with fgfast.use_backend("triton"):
        out = part_pool(x, labels, 1)
    assert out.pooled.grad_fn is not None
    out.pooled.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 9))


@pytest.mark.parametrize(
    ("call", "error", "word"),
    [
        (lambda x, y: part_pool(x.double(), y, 2, backend="triton"), TypeError, "float64"),
        (lambda x, y: part_pool(x, y, 2, backend="triton"), RuntimeError, "triton|cpu"),
        (lambda x, y: labels_to_grid(y, 2, 2, backend="triton"), RuntimeError, "triton|cpu"),
    ],
)
def test_unsupported_input_is_named_in_the_error(call, error, word, monkeypatch):
    if error is RuntimeError:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(error, match=word):
        call(torch.ones(1, 4, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
