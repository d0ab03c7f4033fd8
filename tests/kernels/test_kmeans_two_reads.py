"""Float32 k-means whose rows of the table read the pixels twice and make scores of three products on tensor cores."""

import math

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from fgfast import kmeans_step
from fgfast.kernels import configs
from fgfast.kernels.kmeans.step import Solver
from fgfast.kernels.kmeans.tiles import full_product
from tests.examples import examples
from tests.kernels.test_kmeans import DEVICE, METRICS, blobs, check_kmeans, check_step, seeds, weights

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def two_reads():
    with configs.force_row("kmeans_step", configs.TWO_READS):
        yield


@triton.jit
def product_kernel(x_ptr, m_ptr, out_ptr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out_ptr + at, full_product(tl.load(x_ptr + at), tl.load(m_ptr + at), tl.zeros([16, 16], tl.float32)))


@examples(20)
@given(seed=seeds, scale=st.sampled_from([1e-12, 1.0, 1e12]), largest=st.booleans())
def test_a_product_of_three_pieces_keeps_float32s_digits(seed, scale, largest):
    g = torch.Generator().manual_seed(seed)
    x, m = (torch.randn(16, 16, generator=g) * scale for _ in range(2))
    if largest:  # all bits of the second half set, which rounding carries into the first
        x, m = ((v.view(torch.int32) | 0xFFF).view(torch.float32) for v in (x, m))
    x, m, out = x.to(DEVICE), (m / scale).to(DEVICE), torch.empty(16, 16, device=DEVICE)
    product_kernel[(1,)](x, m, out)
    size = x.double().abs() @ m.double().abs()
    assert ((out.double() - x.double() @ m.double()).abs() <= (2**-21 + 16 * 2**-23) * size).all()
    alone = torch.diag(x.diag())  # one term: nothing is rounded in a sum
    product_kernel[(1,)](alone, m, out)
    exact = alone.double() @ m.double()
    assert ((out.double() - exact).abs() <= (2**-21 + 2**-23) * exact.abs()).all()


@pytest.mark.quick
@examples(8)
@given(
    seed=seeds, batch=st.integers(1, 2), pixels=st.integers(1, 150), channels=st.integers(1, 80),
    clusters=st.integers(1, 80), metric=st.sampled_from(METRICS), weighted=st.booleans(),
    precision=st.sampled_from(["ieee", "tf32"]),
)  # fmt: skip
def test_step_equals_reference(seed, batch, pixels, channels, clusters, metric, weighted, precision):
    if precision == "tf32" and DEVICE == "cuda":
        return  # has an error of its own there
    x, c = blobs(seed, batch, pixels, channels), blobs(seed + 1, batch, clusters, channels)
    check_step(x, c, weights(seed, batch, pixels) if weighted else None, metric, precision=precision)


def test_pixels_far_from_the_origin_keep_their_digits():
    check_step(blobs(5, 1, 100, 40, offset=1000.0), blobs(6, 1, 7, 40, offset=1000.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_non_finite_pixel_affects_only_the_inertia(value, metric):
    x, c = blobs(7, 2, 90, 70), blobs(8, 2, 9, 70)
    clean = check_step(x, c, None, metric)
    x[0, 7, 2] = value
    step = check_step(x, c, None, metric)
    assert step.labels[0, 7] == -1
    assert torch.equal(step.sums[1], clean.sums[1])


def test_a_pixel_whose_square_overflows_is_left_out_as_in_one_read(monkeypatch):
    x, c = blobs(7, 2, 90, 70), blobs(8, 2, 9, 70)
    x[0, 7, 2] = 3e38
    step = kmeans_step(x, c, backend="triton")
    row = next(row for row in configs.ROWS["kmeans_step", "default"] if row.kind == "fp32")
    monkeypatch.setitem(configs._forced, "kmeans_step", row)
    assert torch.equal(step.labels, kmeans_step(x, c, backend="triton").labels)
    assert step.labels[0, 7] == -1


@pytest.mark.parametrize("metric", METRICS)
def test_kmeans_equals_reference_from_the_same_seed(metric):
    check_kmeans(blobs(2, 2, 150, 6), 4, weights(0, 2, 150), seed=3, metric=metric)


def test_the_row_is_that_of_aligned_float32_pixels():
    row = configs.choose("kmeans_step", "sm_90", 227, ("fp32 aligned", "fp32"))
    assert row == configs.TWO_READS
    solver = Solver(torch.empty(1, 64, 150, device=DEVICE), 5, None, "euclidean", "ieee", True)
    assert not solver.tile["HELD"]
    assert solver.tile["PIECES"]
    for kinds in (("fp32", "fp32"), ("fp32 gaps", "fp32")):  # would spill
        other = configs.choose("kmeans_step", "sm_90", 227, kinds)
        assert other is not None
        assert other.tiles["HELD"]
