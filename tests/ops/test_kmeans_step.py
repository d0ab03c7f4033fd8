"""kmeans_step and assign_and_pool: the reference, gradients, errors."""

import math

import pytest
import torch

import fgfast.ops.kmeans.kmeans  # noqa: F401  (registers the operations)
from fgfast import assign_and_pool, kmeans_step, part_pool
from tests.ops.kmeans_data import METRICS, blobs, same


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


def test_gradcheck_of_assign_and_pool():
    x = blobs(18, 1, 9, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: assign_and_pool(x, x.detach()[:, :2])[0], x)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"centroids": torch.zeros(2, 2, 4)}, "centroids: expected shape"),
        ({"centroids": torch.zeros(0, 3)}, "no centroid"),
        ({"centroids": torch.full((2, 3), math.inf)}, "not finite"),
        ({"weight": torch.ones(9)}, "weight: expected shape"),
        ({"metric": "l1"}, "metric"),
    ],
)
def test_bad_input_of_a_step_is_named(change, word):
    options = {"centroids": torch.zeros(2, 3)} | change
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match=word):
            kmeans_step(torch.zeros(2, 9, 3), **options, backend=backend)
        with pytest.raises(ValueError, match=word):
            assign_and_pool(torch.zeros(2, 9, 3), **options, backend=backend)
