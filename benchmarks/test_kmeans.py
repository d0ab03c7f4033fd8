"""k-means of ResNet-50 pyramids at 64 x 64 (3,840 channels, K = 15), an image: against peers on the built matrix.

The peers are given the built matrix; fgfast starts from the levels. Start (k-means++; random for faiss, its
own default) and 20 iterations are included. Where labels from a given start differ from scikit-learn's, or inertia from
its own starts is more than 2% above the best peer's, fgfast gets no speed.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fgfast import kmeans
from fgfast.reference.kmeans import hypercolumns, kmeans_step

K, ITERATIONS, SIZE, SEEDS = 15, 20, (64, 64), 2
LEVELS = ((256, 56), (512, 28), (1024, 14), (2048, 7))


@lru_cache
def pyramid() -> list[Tensor]:
    """Maps of one image with 24 regions: each region has a direction in each level, under noise and a ReLU."""
    g = torch.Generator().manual_seed(0)
    seeds = torch.rand(24, 2, generator=g) * 56
    cells = torch.stack(torch.meshgrid(torch.arange(56.0), torch.arange(56.0), indexing="ij"), -1)
    region = torch.cdist(cells.view(-1, 2), seeds).argmin(1)  # [56 * 56]
    hot = F.one_hot(region, 24).T.float().view(1, 24, 56, 56)
    maps = []
    for channels, side in LEVELS:
        share = F.adaptive_avg_pool2d(hot, side).flatten(2)[0]  # [24, side^2]
        f = torch.randn(channels, 24, generator=g) @ share + torch.randn(channels, side * side, generator=g)
        maps.append(f.relu().view(1, channels, side, side))
    return maps


@lru_cache
def matrix() -> Tensor:
    return hypercolumns(pyramid(), SIZE)[0].contiguous()  # [4096, 3840]


def fgfast_pyramid(seed: int) -> Tensor:
    return kmeans(pyramid(), K, size=SIZE, n_iter=ITERATIONS, seed=seed).centroids[0]


def fgfast_matrix(seed: int) -> Tensor:
    return kmeans(matrix(), K, n_iter=ITERATIONS, seed=seed).centroids


def scikit_learn(seed: int) -> Tensor:
    cluster = pytest.importorskip("sklearn.cluster")
    fitted = cluster.KMeans(K, n_init=1, max_iter=ITERATIONS, random_state=seed).fit(matrix().numpy())
    return torch.from_numpy(fitted.cluster_centers_)


def faiss(seed: int) -> Tensor:
    module = pytest.importorskip("faiss")
    solver = module.Kmeans(len(matrix()[0]), K, niter=ITERATIONS, seed=seed + 1, max_points_per_centroid=1 << 20)
    solver.train(matrix().numpy())
    return torch.from_numpy(np.asarray(solver.centroids))


SOLVERS: dict[str, Callable[[int], Tensor]] = {
    "fgfast pyramid": fgfast_pyramid,
    "fgfast matrix": fgfast_matrix,
    "scikit-learn": scikit_learn,
    "faiss": faiss,
}


@lru_cache
def inertia(name: str) -> float:
    """Mean over seeds of the inertia of the centroids returned, by the reference."""
    x = matrix()[None]
    return float(np.mean([kmeans_step(x, SOLVERS[name](s)[None])[3].item() for s in range(SEEDS)]))


@pytest.fixture(scope="module")
def right() -> None:
    """The gate: scikit-learn's labels from the same start, from the pyramid and from the matrix."""
    cluster = pytest.importorskip("sklearn.cluster")
    start = matrix()[:: 4096 // K][:K]
    theirs = cluster.KMeans(K, init=start.numpy(), n_init=1, max_iter=ITERATIONS).fit(matrix().numpy())
    for x, size in ((pyramid(), SIZE), (matrix(), None)):
        ours = kmeans(x, K, size=size, init=start, n_iter=ITERATIONS)
        assert float((ours.labels.flatten() == torch.from_numpy(theirs.labels_)).float().mean()) > 0.9999
        assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)


@pytest.mark.benchmark(group="kmeans: an image, 4,096 pixels x 3,840 channels, K = 15, 20 iterations")
@pytest.mark.parametrize("name", SOLVERS)
def test_kmeans(benchmark, right: None, name: str) -> None:  # type: ignore[no-untyped-def]
    best = min(inertia("scikit-learn"), inertia("faiss"))
    assert not name.startswith("fgfast") or inertia(name) <= 1.02 * best
    benchmark.extra_info["inertia"] = inertia(name)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(SOLVERS[name], args=(0,), rounds=5 if name == "fgfast pyramid" else 2)
