"""kmeans end to end, 20 steps, start included: against flash-kmeans, fastkmeans and a loop of two products per step.

On a CPU the pixels of one image are those of a ResNet-50 pyramid at 64 x 64 (3,840 channels): fgfast starts from the
levels, scikit-learn and faiss from the built matrix. An answer is judged by the inertia of its centroids, in float64,
relative to that of the reference with its own start. Peers start from random pixels, so theirs may be up to half as
large again and they are timed all the same; the note has the ratio. Bytes: the pixels once per step and once for the
last assignment; operations: two products per step. A warm start, as in training, has the centroids of the step before,
whose pixels differed a little, and takes 2 steps.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import DTYPES, compiled, generator, need_gpu, ours, peer, precision, sizes
from benchmarks.cases.kmeans_step import Pixels, pixels, products, squared
from benchmarks.timing import Answer, Case, Judge, Run, Variant, Verdict
from fgfast import kmeans
from fgfast.reference.kmeans import hypercolumns
from fgfast.tensors import exact

STEPS, JUDGED = 20, 4  # Lloyd steps; images that are judged
LEVELS, REGIONS = ((256, 56), (512, 28), (1024, 14), (2048, 7)), 24  # channels and side of each map; of an image
TOLERANCE, PEERS = 0.02, 25.0
WARM, DRIFT = 2, 0.1  # steps after a warm start; change of the pixels since the step before, in units of their noise


def fgfast(p: Pixels, backend: str, precision: str, given: bool = False, steps: int = STEPS) -> Answer:
    init = p.centroids if given else "k-means++"
    k = p.centroids.shape[1]
    return [kmeans(p.x, k, n_iter=steps, init=init, tol=0.0, seed=0, precision=precision, backend=backend).centroids]


def loop(p: Pixels, step: Callable[[Tensor, Tensor], Any], precision: str, warm: bool = False) -> Answer:
    """Random pixels or, ``warm``, the given centroids as a start, then two products per step."""
    b, n, _ = p.x.shape
    chosen = torch.rand(b, n, device=p.x.device).topk(p.centroids.shape[1], dim=1).indices
    centroids = p.centroids if warm else p.x.take_along_dim(chosen[..., None], 1).float()
    with exact(p.x.device, precision):
        for _ in range(WARM if warm else STEPS):
            _, sums, counts = step(p.x, centroids)
            centroids = torch.where(counts[..., None] > 0, sums / counts.clamp_min(1)[..., None], centroids)
    return [centroids]


def flash_kmeans(device: torch.device) -> Run:
    need_gpu(device, "flash-kmeans")
    solve = peer("flash_kmeans", "flash-kmeans").batch_kmeans_Euclid
    return lambda p: [solve(p.x, p.centroids.shape[1], max_iters=STEPS, tol=0.0)[1]]


def fastkmeans(device: torch.device) -> Run:
    """Image by image from host memory, as its interface requires."""
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


class Pyramid(NamedTuple):
    x: Tensor  # [1, side^2, D], the built matrix
    centroids: Tensor  # [1, K, D], random pixels
    maps: list[Tensor]


def pyramid(levels: tuple[tuple[int, int], ...], side: int, k: int, seed: int) -> Pyramid:
    """Maps of one image with 24 regions: each region has a direction in each level, under noise and a ReLU."""
    g = torch.Generator().manual_seed(seed)
    region = torch.randint(REGIONS, (1, 8, 8), generator=g)
    maps = []
    for channels, size in levels:
        fractions = F.interpolate(F.one_hot(region, REGIONS).permute(0, 3, 1, 2).float(), size, mode="bilinear")
        values = torch.einsum("cr,brhw->bchw", torch.randn(channels, REGIONS, generator=g), fractions)
        maps.append((values + torch.randn(values.shape, generator=g)).relu())
    x = hypercolumns(maps, (side, side)).contiguous()
    return Pyramid(x, x[:, torch.randperm(x.shape[1], generator=g)[:k]], maps)


def fgfast_pyramid(p: Pyramid, side: int, backend: str, given: bool = False) -> Answer:
    k, init = p.centroids.shape[1], p.centroids if given else "k-means++"
    return [kmeans(p.maps, k, size=(side, side), n_iter=STEPS, init=init, tol=0.0, seed=0, backend=backend).centroids]


def scikit_learn(given: bool = False) -> Run:
    solver = peer("sklearn.cluster", "scikit-learn").KMeans

    def run(p: Pyramid) -> Answer:
        init = p.centroids[0].numpy() if given else "k-means++"
        fitted = solver(p.centroids.shape[1], init=init, n_init=1, max_iter=STEPS, tol=0, random_state=0)
        fitted.fit(p.x[0].numpy())
        return [torch.from_numpy(fitted.cluster_centers_)[None]]

    return run


def faiss(starts: int) -> Run:
    solver = peer("faiss", "faiss").Kmeans

    def run(p: Pyramid) -> Answer:
        _, k, d = p.centroids.shape
        model = solver(d, k, niter=STEPS, seed=1, nredo=starts, max_points_per_centroid=1 << 20)
        model.train(p.x[0].numpy())
        return [torch.as_tensor(model.centroids)[None]]

    return run


def inertia(x: Tensor, centroids: Tensor) -> float:
    """Of the first images, in float64."""
    pairs = zip(x[:JUDGED], centroids[:JUDGED], strict=True)
    return sum(float(squared(image, c).min(1).values.sum()) for image, c in pairs)


def judge(p: Pixels | Pyramid) -> Judge:
    first = p.x[:JUDGED].double()
    result = kmeans(first, p.centroids.shape[1], n_iter=STEPS, tol=0.0, seed=0, backend="reference")
    right = inertia(p.x, result.centroids)

    def verdict(answer: Answer) -> Verdict:
        (centroids,) = answer
        if centroids.shape != p.centroids.shape or not bool(centroids.isfinite().all()):
            return Verdict(float("inf"), "centroids are not finite or have a wrong shape")
        relative = inertia(p.x, centroids) / right
        return Verdict(max(0.0, relative - 1), f"inertia x {relative:.4f}")

    return verdict


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


def warm_pixels(b: int, n: int, d: int, k: int, dtype: torch.dtype, device: torch.device, seed: int) -> Pixels:
    """Pixels with the centroids of a run on slightly different ones."""
    p = pixels(b, n, d, k, dtype, device, seed)
    before = p.x + DRIFT * torch.randn(p.x.shape, dtype=dtype, device=device, generator=generator(device, seed + 1))
    return p._replace(centroids=kmeans(before, k, n_iter=STEPS, tol=0.0, seed=0).centroids)


def warm_case(b: int, n: int, d: int, k: int, dtype: str, device: torch.device, quick: bool) -> Case:
    backend, p, itemsize = ours(device), precision(dtype), DTYPES[dtype].itemsize
    ours_warm = partial(fgfast, backend=backend, precision=p, given=True, steps=WARM)
    products_warm = partial(loop, precision=p, warm=True)
    variants = (
        Variant(f"fgfast {backend}", lambda: ours_warm, PEERS),
        Variant("eager products", lambda: partial(products_warm, step=products), PEERS),
        Variant(
            "torch.compile products", lambda: partial(loop, step=compiled(products), precision=p, warm=True), PEERS
        ),
    )
    x = b * n * d * itemsize
    return Case(
        "kmeans", f"warm start {sizes(B=b, N=n, D=d, K=k)}", dtype,
        partial(warm_pixels, b, n, d, k, DTYPES[dtype], device), variants, judge, TOLERANCE,
        bytes=(WARM + 1) * x + b * (4 * k * d + 8 * n), operations=WARM * 4 * b * n * d * k, input_bytes=x, quick=quick,
    )  # fmt: skip


def pyramid_case(levels: tuple[tuple[int, int], ...], side: int, k: int, device: torch.device, weigh: bool) -> Case:
    backend = ours(device, native=device.type == "cpu")
    maps = partial(fgfast_pyramid, side=side, backend=backend)
    variants = (
        Variant(f"fgfast {backend}", lambda: maps),
        Variant(f"fgfast {backend}, start given", lambda: partial(maps, given=True), PEERS),
        Variant("fgfast, built matrix", lambda: partial(fgfast, backend=ours(device), precision="ieee")),
        Variant("scikit-learn", scikit_learn, PEERS),
        Variant("scikit-learn, start given", lambda: scikit_learn(given=True), PEERS),
        Variant("faiss", lambda: faiss(1), PEERS),
        Variant("faiss, best of 3", lambda: faiss(3), PEERS),
    )
    words = f"pyramid {sizes(N=side**2, D=sum(channels for channels, _ in levels), K=k)}"
    make = partial(pyramid, levels, side, k)
    return Case("kmeans", words, "fp32", make, variants, judge, TOLERANCE, quick=True, weigh=weigh)


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        for dtype in ("fp32", "bf16"):
            yield case(2, 60, 6, 3, dtype, device, True)
            yield warm_case(2, 60, 6, 3, dtype, device, True)
        yield pyramid_case(((4, 8), (6, 4)), 8, 3, device, False)
        return
    if device.type == "cpu":
        yield pyramid_case(LEVELS, 64, 15, device, True)
        return
    for dtype in ("bf16", "fp32"):
        yield case(32, 3136, 768, 25, dtype, device, dtype == "bf16")
    yield case(128, 3136, 768, 25, "bf16", device, False)
    yield warm_case(128, 3136, 768, 25, "bf16", device, True)
