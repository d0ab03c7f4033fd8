"""The pivotal mask of 12 layers of 12 heads over 196 patches; on a GPU the replay of a CUDA graph is timed."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases.common import DTYPES, compiled, generator, ours, sizes
from benchmarks.timing import Answer, Case, Judge, Variant, Verdict
from fgfast import pivotal_mask

KEEP = 0.3


def attention(
    layers: int, batch: int, heads: int, patches: int, dtype: torch.dtype, device: torch.device, seed: int
) -> Tensor:
    """Softmax rows [L, B, heads, P]."""
    logits = torch.randn(layers, batch, heads, patches, device=device, generator=generator(device, seed))
    return logits.softmax(3).to(dtype)


def vectorised(x: Tensor) -> Answer:
    """Mean, log, sum, topk, scatter."""
    score = x.mean(2, dtype=torch.float32).log().sum(0)
    index = score.topk(int(KEEP * x.shape[3] + 1e-9), dim=1).indices
    return [torch.zeros(score.shape, dtype=torch.bool, device=x.device).scatter_(1, index, True)]


def loop(x: Tensor) -> Answer:
    """Image by image and patch by patch, as in the authors' release: a product over layers, sort, compare."""
    masks = []
    for b in range(x.shape[1]):
        product = torch.ones(x.shape[3], device=x.device)
        for layer in x:
            product = product * (layer[b].mean(0) * 1000)
        threshold = product.sort(descending=True).values[int(KEEP * x.shape[3] + 1e-9)]
        masks.append(torch.tensor([bool(score > threshold) for score in product], device=x.device))
    return [torch.stack(masks)]


def fgfast(x: Tensor, backend: str) -> Answer:
    return [pivotal_mask(x, keep=KEEP, backend=backend).mask]


def judge(x: Tensor) -> Judge:
    """By the scores in float64: a mask may lose against the best one only by rounding."""
    score = x.double().mean(2).log2().sum(0)
    kept = int(KEEP * x.shape[3] + 1e-9)
    best = score.topk(kept, dim=1)
    right = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best.indices, True)

    def verdict(answer: Answer) -> Verdict:
        (mask,) = answer
        if mask.shape != right.shape or not bool((mask.sum(1) == kept).all()):
            return Verdict(float("inf"), "the number of patches kept is wrong")
        lost = (best.values.sum(1) - torch.where(mask, score, 0).sum(1)) / best.values.sum(1).abs()
        same = (mask == right).all(1).double().mean()
        return Verdict(float(lost.max()), f"{100 * float(same):.2f}% of masks as in float64")

    return verdict


def case(batch: int, patches: int, dtype: str, device: torch.device, quick: bool, depth: int = 12) -> Case:
    backend, kept = ours(device, native=True), int(KEEP * patches + 1e-9)
    size = depth * batch * depth * patches * DTYPES[dtype].itemsize
    variants = [
        Variant(f"fgfast {backend}", lambda: partial(fgfast, backend=backend)),
        Variant("eager", lambda: vectorised),
        Variant("torch.compile", lambda: compiled(vectorised)),
    ]
    if device.type == "cpu":
        variants += [Variant("fgfast torch", lambda: partial(fgfast, backend="torch")), Variant("loop", lambda: loop)]
    return Case(
        "pivotal_mask", sizes(B=batch, L=depth, heads=depth, P=patches), dtype,
        partial(attention, depth, batch, depth, patches, DTYPES[dtype], device), variants, judge, 1e-5,
        bytes=size + batch * patches + batch * kept * 8, operations=depth * batch * depth * patches, input_bytes=size,
        graph=device.type == "cuda", quick=quick,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        yield case(3, 16, "fp32", device, True, depth=2)
        return
    if device.type == "cpu":
        yield case(64, 196, "fp32", device, True)
        return
    for dtype in ("fp32", "bf16"):
        yield case(1024, 196, dtype, device, True)
    for batch in (64, 4096):
        yield case(batch, 196, "bf16", device, False)
