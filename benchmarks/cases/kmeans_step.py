"""kmeans_step of many images: against cdist and scatter, two products, and flash-kmeans.

An answer is judged in float64 by the larger of two numbers: the excess inertia of its labels over the nearest
centroids, and the distance of its means from the means of its own labels. Bytes: pixels, centroids, labels and sums;
operations: two products.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import DTYPES, TOLERANCES, compiled, generator, need_gpu, ours, peer, precision, sizes
from benchmarks.timing import Answer, Case, Judge, Run, Variant, Verdict, distance
from fgfast import kmeans_step
from fgfast.tensors import exact

SPREAD = 0.1  # of the centres, in units of the noise of a channel: clusters overlap


class Pixels(NamedTuple):
    x: Tensor  # [B, N, D]
    centroids: Tensor  # float32 [B, K, D]
    squares: Tensor  # |x|^2, which flash-kmeans computes once per run


def pixels(b: int, n: int, d: int, k: int, dtype: torch.dtype, device: torch.device, seed: int) -> Pixels:
    g = generator(device, seed)
    centres = SPREAD * torch.randn(b, k, d, device=device, generator=g)
    which = torch.randint(0, k, (b, n), device=device, generator=g)
    x = torch.empty(b, n, d, device=device, dtype=dtype)
    for i in range(b):  # image by image: float32 noise of all of them may not fit
        x[i] = centres[i, which[i]] + torch.randn(n, d, device=device, generator=g)
    near = centres + SPREAD / 4 * torch.randn(b, k, d, device=device, generator=g)
    return Pixels(x, near, torch.stack([image.float().square().sum(1) for image in x]).to(dtype))


def fgfast(p: Pixels, backend: str, precision: str, deterministic: bool = True) -> Answer:
    s = kmeans_step(p.x, p.centroids, precision=precision, deterministic=deterministic, backend=backend)
    return [s.labels, s.sums, s.counts]


def distances(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cdist, argmin, index_add."""
    b, k, d = centroids.shape
    labels = torch.cdist(x.float(), centroids).argmin(2)
    slot = (labels + k * torch.arange(b, device=x.device)[:, None]).flatten()
    sums = x.new_zeros(b * k, d, dtype=torch.float32).index_add(0, slot, x.flatten(0, 1).float())
    counts = x.new_zeros(b * k, dtype=torch.float32).index_add(0, slot, torch.ones_like(slot, dtype=torch.float32))
    return labels, sums.view(b, k, d), counts.view(b, k)


def products(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and sums as two batched products in the dtype of x."""
    scores = centroids.square().sum(2)[:, None] - 2 * (x @ centroids.to(x.dtype).mT).float()
    labels = scores.argmin(2)
    hot = F.one_hot(labels, centroids.shape[1]).to(x.dtype)
    return labels, (hot.mT @ x).float(), hot.sum(1, dtype=torch.float32)


def plain(p: Pixels, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]], precision: str) -> Answer:
    with exact(p.x.device, precision):
        return step(p.x, p.centroids)


def flash_kmeans(device: torch.device) -> Run:
    """Its two kernels of a Lloyd step; the squares of the pixels are given."""
    need_gpu(device, "flash-kmeans")
    assign = peer("flash_kmeans.assign_euclid_triton", "flash-kmeans").euclid_assign_triton
    update = peer("flash_kmeans.centroid_update_triton", "flash-kmeans").triton_centroid_update_sorted_euclid

    def run(p: Pixels) -> Answer:
        centroids = p.centroids.to(p.x.dtype)
        labels = assign(p.x, centroids, p.squares)
        return [labels, update(p.x, labels, centroids)]

    return run


def squared(x: Tensor, centroids: Tensor) -> Tensor:
    """[N, K] squared distances in float64."""
    x, c = x.double(), centroids.double()
    return (x.square().sum(1)[:, None] + c.square().sum(1) - 2 * x @ c.T).clamp_min(0)


def judge(p: Pixels) -> Judge:
    k = p.centroids.shape[1]

    def verdict(answer: Answer) -> Verdict:
        labels, centres, *counts = answer
        if labels.shape != p.x.shape[:2] or bool(((labels < 0) | (labels >= k)).any()):
            return Verdict(float("inf"), "labels are outside 0..K-1")
        means = centres.double() / counts[0].double().clamp_min(1)[..., None] if counts else centres.double()
        right, own, best, same = torch.zeros_like(means), 0.0, 0.0, 0
        for i, (x, c) in enumerate(zip(p.x, p.centroids, strict=True)):
            near = squared(x, c)
            least, exact_labels = near.min(1)
            own += float(near.gather(1, labels[i, :, None].long()).sum())
            best += float(least.sum())
            same += int((exact_labels == labels[i]).sum())
            hot = F.one_hot(labels[i].long(), k).double()
            size = hot.sum(0)
            right[i] = hot.T @ x.double() / size.clamp_min(1)[:, None]
            means[i] = torch.where((size > 0)[:, None], means[i], right[i])  # the mean of no pixel may be anything
        more = max(0.0, own / best - 1)
        note = f"{100 * same / labels.numel():.3f}% of labels as in float64, inertia +{more:.1e}"
        return Verdict(max(more, distance([means], [right])), note)

    return verdict


def case(b: int, n: int, d: int, k: int, dtype: str, device: torch.device, quick: bool) -> Case:
    backend, p, itemsize = ours(device), precision(dtype), DTYPES[dtype].itemsize
    variants = [
        Variant(f"fgfast {backend}", lambda: partial(fgfast, backend=backend, precision=p)),
        Variant("eager cdist", lambda: partial(plain, step=distances, precision=p)),
        Variant("eager products", lambda: partial(plain, step=products, precision=p)),
        Variant("torch.compile products", lambda: partial(plain, step=compiled(products), precision=p)),
        Variant("flash-kmeans", lambda: flash_kmeans(device)),
    ]
    if backend == "triton":
        loose = partial(fgfast, backend=backend, precision=p, deterministic=False)
        variants.insert(1, Variant("fgfast triton, atomics", lambda: loose))
    x = b * n * d * itemsize
    return Case(
        "kmeans_step", sizes(B=b, N=n, D=d, K=k), dtype, partial(pixels, b, n, d, k, DTYPES[dtype], device), variants,
        judge, TOLERANCES[dtype], bytes=x + b * (2 * 4 * k * d + 8 * n + 4 * k + 4), operations=4 * b * n * d * k,
        input_bytes=x, quick=quick,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        for dtype in ("fp32", "bf16"):
            yield case(2, 40, 8, 3, dtype, device, True)
        return
    if device.type == "cpu":
        yield case(8, 3136, 384, 25, "fp32", device, True)
        return
    for dtype in ("bf16", "fp16", "tf32", "fp32"):
        yield case(128, 3136, 768, 25, dtype, device, dtype == "bf16")
    for n in (784, 12544):
        yield case(128, n, 768, 25, "bf16", device, False)
    for d in (128, 384, 1024, 2048):
        yield case(128, 3136, d, 25, "bf16", device, False)
    for k in (8, 64, 256):
        yield case(128, 3136, 768, k, "bf16", device, False)
    yield case(1, 196, 768, 25, "bf16", device, False)
