"""k-means of ResNet-50 pyramids at 64 x 64 (3,840 channels, K = 15), an image: against peers on the built matrix.

The peers are given the built matrix; fgfast starts from the levels. Start (k-means++; random for faiss, its
own default) and 20 iterations are included. Where labels from a given start differ from scikit-learn's, or inertia from
its own starts is more than 2% above the best peer's, fgfast gets no speed.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Race
from fgfast import kmeans
from fgfast.reference.kmeans import hypercolumns, kmeans_step

K, ITERATIONS, SIZE, SEEDS = 15, 20, (64, 64), 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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


def on_pyramid(seed: int) -> Tensor:
    return kmeans([f.to(DEVICE) for f in pyramid()], K, size=SIZE, n_iter=ITERATIONS, seed=seed).centroids[0]


def on_matrix(seed: int) -> Tensor:
    return kmeans(matrix().to(DEVICE), K, n_iter=ITERATIONS, seed=seed).centroids


def scikit_learn(seed: int) -> Tensor:
    cluster = pytest.importorskip("sklearn.cluster")
    fitted = cluster.KMeans(K, n_init=1, max_iter=ITERATIONS, random_state=seed).fit(matrix().numpy())
    return torch.from_numpy(fitted.cluster_centers_)


def faiss(seed: int, runs: int = 1) -> Tensor:
    module = pytest.importorskip("faiss")
    solver = module.Kmeans(
        len(matrix()[0]), K, niter=ITERATIONS, seed=seed + 1, nredo=runs, max_points_per_centroid=1 << 20
    )
    solver.train(matrix().numpy())
    return torch.from_numpy(np.asarray(solver.centroids))


SOLVERS: dict[str, Callable[[int], Tensor]] = {
    "fgfast, pyramid": on_pyramid,
    "fgfast, matrix": on_matrix,
    "scikit-learn": scikit_learn,
    "faiss": faiss,
    "faiss, best of 3": partial(faiss, runs=3),
}


@lru_cache
def inertia(name: str) -> float:
    """Mean over seeds of the inertia of the centroids returned, by the reference."""
    x = matrix()[None]
    return float(np.mean([kmeans_step(x, SOLVERS[name](s).cpu()[None])[3].item() for s in range(SEEDS)]))


def answer(name: str) -> list[Tensor]:
    """One run, and how good the solver is over the seeds."""
    SOLVERS[name](0)
    return [torch.tensor(inertia(name))]


def test_labels_and_inertia_are_scikit_learns_from_the_same_start(benchmark) -> None:  # type: ignore[no-untyped-def]
    cluster = pytest.importorskip("sklearn.cluster")
    start = matrix()[:: 4096 // K][:K]
    theirs = cluster.KMeans(K, init=start.numpy(), n_init=1, max_iter=ITERATIONS).fit(matrix().numpy())
    for x, size in (([f.to(DEVICE) for f in pyramid()], SIZE), (matrix().to(DEVICE), None)):
        run = partial(kmeans, x, K, size=size, init=start.to(DEVICE), n_iter=ITERATIONS)
        ours = run() if size is None else benchmark.pedantic(run, rounds=1)
        same = ours.labels.flatten().cpu() == torch.from_numpy(theirs.labels_)
        assert float(same.float().mean()) > 0.9999
        assert ours.inertia.item() == pytest.approx(theirs.inertia_, rel=1e-5)


@pytest.mark.benchmark(group="kmeans")
def test_kmeans(benchmark, race: Race) -> None:  # type: ignore[no-untyped-def]
    assert inertia("fgfast, pyramid") <= 1.02 * min(inertia("scikit-learn"), inertia("faiss"))
    benchmark.extra_info["inertia"] = {name: round(inertia(name), 1) for name in SOLVERS}
    race({name: partial(answer, name) for name in SOLVERS}, "scikit-learn", rounds=4, rtol=0.05)
