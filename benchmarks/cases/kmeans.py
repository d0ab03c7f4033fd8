"""kmeans end to end, 20 steps, start included: against flash-kmeans, fastkmeans and a loop of two products a step.

An answer is judged by the inertia of its centroids, in float64, over that of the reference with its own start. Peers
start from random pixels, so they may be worse by up to half and keep their speed: the note says by how much. Bytes: the
pixels once a step and once for the last assignment; operations: two products a step.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.common import DTYPES, compiled, need_gpu, ours, peer, precision, sizes
from benchmarks.cases.kmeans_step import Pixels, pixels, products, squared
from benchmarks.timing import Answer, Case, Judge, Judged, Run, Variant
from fgfast import kmeans
from fgfast.tensors import exact

STEPS, JUDGED = 20, 4  # steps of Lloyd; images that are judged
TOLERANCE, PEERS = 0.02, 25.0


def fgfast(p: Pixels, backend: str, precision: str, given: bool = False) -> Answer:
    init = p.centroids if given else "k-means++"
    k = p.centroids.shape[1]
    return [kmeans(p.x, k, n_iter=STEPS, init=init, tol=0.0, seed=0, precision=precision, backend=backend).centroids]


def loop(p: Pixels, step: Callable[[Tensor, Tensor], Any], precision: str) -> Answer:
    """Random pixels as a start, then two products a step."""
    b, n, _ = p.x.shape
    chosen = torch.rand(b, n, device=p.x.device).topk(p.centroids.shape[1], dim=1).indices
    centroids = p.x.take_along_dim(chosen[..., None], 1).float()
    with exact(p.x.device, precision):
        for _ in range(STEPS):
            _, sums, counts = step(p.x, centroids)
            centroids = torch.where(counts[..., None] > 0, sums / counts.clamp_min(1)[..., None], centroids)
    return [centroids]


def flash_kmeans(device: torch.device) -> Run:
    need_gpu(device, "flash-kmeans")
    solve = peer("flash_kmeans", "flash-kmeans").batch_kmeans_Euclid
    return lambda p: [solve(p.x, p.centroids.shape[1], max_iters=STEPS, tol=0.0)[1]]


def fastkmeans(device: torch.device) -> Run:
    """Image by image from the host's memory, as its interface wants them."""
    need_gpu(device, "fastkmeans")
    solver = peer("fastkmeans", "fastkmeans").FastKMeans

    def run(p: Pixels) -> Answer:
        found = []
        for image in p.x:
            model = solver(p.x.shape[2], p.centroids.shape[1], niter=STEPS, gpu=True, max_points_per_centroid=1 << 30)
            model.train(image.float().cpu().numpy())
            found.append(torch.as_tensor(model.centroids))
        return [torch.stack(found).to(p.x.device)]

    return run


def inertia(x: Tensor, centroids: Tensor) -> float:
    """Of the first images, in float64."""
    pairs = zip(x[:JUDGED], centroids[:JUDGED], strict=True)
    return sum(float(squared(image, c).min(1).values.sum()) for image, c in pairs)


def judge(p: Pixels) -> Judge:
    first = p.x[:JUDGED].double()
    result = kmeans(first, p.centroids.shape[1], n_iter=STEPS, tol=0.0, seed=0, backend="reference")
    right = inertia(p.x, result.centroids)

    def judged(answer: Answer) -> Judged:
        (centroids,) = answer
        if centroids.shape != p.centroids.shape or not bool(centroids.isfinite().all()):
            return Judged(float("inf"), "centroids are not finite or have a wrong shape")
        relative = inertia(p.x, centroids) / right
        return Judged(max(0.0, relative - 1), f"inertia x {relative:.4f}")

    return judged


def case(b: int, n: int, d: int, k: int, dtype: str, device: torch.device, quick: bool) -> Case:
    backend, p, itemsize = ours(device), precision(dtype), DTYPES[dtype].itemsize
    variants = (
        Variant(f"fgfast {backend}", lambda: partial(fgfast, backend=backend, precision=p)),
        Variant(f"fgfast {backend}, start given", lambda: partial(fgfast, backend=backend, precision=p, given=True)),
        Variant("eager products", lambda: partial(loop, step=products, precision=p), PEERS),
        Variant("torch.compile products", lambda: partial(loop, step=compiled(products), precision=p), PEERS),
        Variant("flash-kmeans", lambda: flash_kmeans(device), PEERS),
        Variant("fastkmeans", lambda: fastkmeans(device), PEERS),
    )
    x = b * n * d * itemsize
    return Case(
        "kmeans", sizes(B=b, N=n, D=d, K=k), dtype, partial(pixels, b, n, d, k, DTYPES[dtype], device), variants, judge,
        TOLERANCE, bytes=(STEPS + 1) * x + b * (4 * k * d + 8 * n), operations=STEPS * 4 * b * n * d * k,
        input_bytes=x, quick=quick,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        for dtype in ("fp32", "bf16"):
            yield case(2, 60, 6, 3, dtype, device, True)
        return
    for dtype in ("bf16", "fp32"):
        yield case(32, 3136, 768, 25, dtype, device, dtype == "bf16")
    yield case(128, 3136, 768, 25, "bf16", device, False)
