"""k-means by Triton kernels keeps its digits, and finds a few far pixels."""

import pytest
import torch

from fgfast import kmeans, kmeans_step
from tests.kernels.test_kmeans import DEVICE, blobs

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("offset", [1e2, -1e4, 1e6])
@pytest.mark.parametrize(("pixels", "clusters"), [(70, 4), (70, 140), (3, 2)])
def test_an_offset_costs_no_digits(offset, pixels, clusters):
    """In one launch, in two reads, and with repaired clusters: labels of float64, inertia to its documented bound."""
    x = blobs(7, 2, pixels, 6, offset=offset)
    clusters = min(clusters, pixels)
    init = x[:, :clusters].clone()
    init[0, -1] = 2 * offset  # nearest to no pixel
    found = kmeans(x, clusters, init=init, n_iter=4, backend="triton")
    wide = kmeans(x.double(), clusters, init=init.double(), n_iter=4, backend="reference")
    assert torch.equal(found.labels, wide.labels)
    spread = (x.double() - x.double().mean(1, keepdim=True)).square().sum((1, 2))
    assert ((found.inertia - wide.inertia).abs() <= 1e-6 * (wide.inertia + spread)).all()
    u = torch.finfo(torch.float32).eps
    slack = u * wide.centroids.abs() + 16 * u * spread.sqrt()[:, None, None]
    assert ((found.centroids - wide.centroids).abs() <= slack).all()
    step = kmeans_step(x, init[:, :2], backend="triton")
    assert torch.equal(step.labels, kmeans_step(x.double(), init[:, :2].double()).labels)


def test_a_rare_far_cluster_is_found():
    """Of 300 pixels 3 lie far away; k-means++ draws from 16."""
    far = torch.full((1, 3, 2), 300.0, device=DEVICE) + blobs(1, 1, 3, 2)
    x = torch.cat([blobs(0, 1, 300, 2), far], 1)
    for seed in range(4):
        found = kmeans(x, 3, seed=seed, init_samples=16, n_iter=1, backend="triton")
        assert (found.counts == 3).any()
