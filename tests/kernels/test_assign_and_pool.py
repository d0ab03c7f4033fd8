"""assign_and_pool on Triton kernels: nearest labels, means of the pixels of each label, one read of the features."""

import math
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.library import opcheck

pytest.importorskip("triton")

from fgfast import assign_and_pool
from fgfast.ops.assign_and_pool import _assign_and_pool
from fgfast.reference import part_pool as reference
from tests.examples import examples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def distances(x, centroids, metric):
    """Float64 [B, N, K] from x [B, N, D]."""
    x, c = x.double(), centroids.double()
    if metric == "cosine":
        return 1 - torch.nn.functional.normalize(x, dim=2) @ torch.nn.functional.normalize(c, dim=2).mT
    return (x[:, :, None] - c[:, None]).square().sum(3)


@examples(15)
@given(
    st.integers(0, 10**6), st.sampled_from([1, 5, 33, 130]), st.integers(1, 6), st.integers(1, 7),
    st.sampled_from([1, 4, 20]), st.sampled_from(list(UNIT)), st.booleans(), st.sampled_from(["euclidean", "cosine"]),
)  # fmt: skip
def test_equals_the_reference(seed, channels, height, width, n_parts, dtype, weighted, metric):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, height, width, generator=g).to(DEVICE, dtype).requires_grad_()
    centroids = torch.randn(2, n_parts, channels, generator=g).to(DEVICE, dtype)
    weight = None
    if weighted:
        weight = torch.rand(2, height, width, generator=g) * (torch.rand(2, height, width, generator=g) > 0.3)
        weight = weight.to(DEVICE)
    pooled, area, labels = assign_and_pool(x, centroids, metric=metric, weight=weight, backend="triton")

    rows = x.detach().flatten(2).mT
    kept = torch.ones_like(labels, dtype=torch.bool) if weight is None else weight > 0
    assert torch.equal(labels >= 0, kept)
    near = distances(rows, centroids, metric)
    chosen = near.gather(2, labels.flatten(1).clamp_min(0)[..., None])[..., 0]
    # The kernel scores against centroids rounded, less their mean, to the dtype of x: |x| |c| times that, a few times.
    size = rows.double().norm(dim=2) + centroids.double().norm(dim=2).amax(1)[:, None]
    scale = 4 * UNIT[dtype] * (1 if metric == "cosine" else size.square()) + 1e-5
    assert ((chosen - near.amin(2) <= scale) | ~kept.flatten(1)).all()

    w = None if weight is None else weight.flatten(1).double()
    wide = rows.double().requires_grad_()
    exact, sizes = reference.part_pool(wide, labels.flatten(1), n_parts, w)
    # In half precision a weight is split into two bfloat16, which lose 2^-16 of it.
    loss = (height * width + 2) * 2.0**-23 + (2.0**-15 if weighted else 0)
    spread = reference.part_pool(rows.double().abs(), labels.flatten(1), n_parts, w)[0]
    assert ((pooled.double() - exact).abs() <= (loss + UNIT[dtype]) * spread + 1e-7).all()
    torch.testing.assert_close(area.double(), sizes.double(), rtol=1e-5, atol=0)

    (expected,) = torch.autograd.grad(exact.sum(), wide)
    (grad,) = torch.autograd.grad(pooled.sum(), x)
    torch.testing.assert_close(grad.flatten(2).mT.double(), expected, rtol=2 * UNIT[dtype] + 1e-5, atol=1e-7)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_a_pixel_that_is_not_finite_has_no_part(metric):
    x = torch.randn(1, 6, 3, 3, device=DEVICE)
    centroids = torch.randn(4, 6, device=DEVICE)
    dirty = x.clone()
    dirty[0, 2, 1, 1] = math.nan
    pooled, area, labels = assign_and_pool(dirty, centroids, metric=metric, backend="triton")
    expected = assign_and_pool(dirty, centroids, metric=metric, backend="reference")
    assert labels[0, 1, 1] == -1
    assert torch.equal(labels, expected[2])
    torch.testing.assert_close(pooled, expected[0])
    assert torch.equal(area, expected[1])


@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3)], ids=str)
def test_empty_input(shape):
    x, centroids = torch.zeros(shape, device=DEVICE), torch.ones(3, 4, device=DEVICE)
    for a, b in zip(
        assign_and_pool(x, centroids, backend="triton"), assign_and_pool(x, centroids, backend="torch"), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_opcheck():
    x = torch.randn(2, 5, 3, 2, device=DEVICE, requires_grad=True)
    for metric in ("euclidean", "cosine"):
        opcheck(_assign_and_pool.op, (x, torch.randn(2, 3, 5, device=DEVICE), None, metric, "triton"))


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts traffic in the interpreter")
def test_the_features_are_read_once():
    from fgfast.kernels.sanitizer import checked, fewest

    x, centroids = torch.randn(1, 128, 48, 32), torch.randn(1, 9, 128)
    with checked(x) as traffic:
        pooled, area, labels = assign_and_pool(x, centroids, backend="triton")
    # Partial sums take up to 8% of the bytes of the features (PARTIAL_FRACTION), and each program reads the centroids.
    assert traffic.bytes <= 1.15 * fewest(x, centroids, pooled, area, labels)
