"""Inputs and comparisons that the tests of k-means share."""

import pytest
import torch
from hypothesis import strategies as st

import fgfast.ops.kmeans.kmeans  # noqa: F401  (registers the operations)

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
