"""part_pool, forward and backward, mean: against scatter_reduce and the product with a one-hot matrix."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.common import DTYPES, TOLERANCES, compiled, generator, judge_by, ours, sizes
from benchmarks.timing import Answer, Case, Variant
from fgfast import labels_to_grid, part_pool
from fgfast.reference import part_pool as reference

K = 15
ELEMENTS = 1 << 24  # feature values that the reference takes at a time

Pool = Callable[[Tensor, Tensor], Tensor]  # features [B, D, h, w] and labels [B, h, w] or [B, H, W] to pooled [B, K, D]


class Maps(NamedTuple):
    features: Tensor
    labels: Tensor
    grad: Tensor


def maps(
    b: int, d: int, side: int, dtype: torch.dtype, device: torch.device, seed: int, ids: int | None = None
) -> Maps:
    """``ids`` is the side of id maps of one byte; without it labels have the resolution of the features."""
    g = generator(device, seed)
    x = torch.randn(b, d, side, side, device=device, generator=g).to(dtype).requires_grad_()
    if ids is None:
        labels = torch.randint(-1, K, (b, side, side), device=device, generator=g)
    else:
        labels = torch.randint(0, K, (b, ids, ids), device=device, generator=g, dtype=torch.uint8)
    return Maps(x, labels, torch.randn(b, K, d, device=device, generator=g).to(dtype))


def scatter(x: Tensor, labels: Tensor) -> Tensor:
    """An extra part takes the ignored pixels."""
    slot = torch.where(labels < 0, K, labels).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    sums = x.new_zeros(len(x), x.shape[1], K + 1).scatter_reduce(2, slot, x.flatten(2), "mean", include_self=False)
    return sums[..., :K].transpose(1, 2)


def one_hot(x: Tensor, labels: Tensor) -> Tensor:
    hot = F.one_hot(labels.flatten(1) + 1, K + 1)[..., 1:].to(x.dtype)  # [B, P, K]
    return hot.mT @ x.flatten(2).mT / hot.sum(1, dtype=torch.float32).clamp(min=1)[..., None].to(x.dtype)


def step(m: Maps, pool: Pool) -> Answer:
    pooled = pool(m.features, m.labels)
    return [pooled.detach(), *torch.autograd.grad(pooled, m.features, m.grad)]


def fgfast(backend: str) -> Pool:
    return lambda x, labels: part_pool(x, labels, K, backend=backend).pooled


def by_grid(x: Tensor, labels: Tensor, backend: str) -> Tensor:
    size = (x.shape[2], x.shape[3])
    return part_pool(x, labels_to_grid(labels, size, K, backend=backend), K, backend=backend).pooled


def eager_by_grid(x: Tensor, labels: Tensor) -> Tensor:
    """One-hot, average pool, argmax, as DetCon does; every cell has votes."""
    hot = F.one_hot(labels.long(), K).permute(0, 3, 1, 2).to(x.dtype)
    return one_hot(x, F.adaptive_avg_pool2d(hot, (x.shape[2], x.shape[3])).argmax(1))


def expected(m: Maps) -> Answer:
    """The reference in float64, images at a time."""
    size = (m.features.shape[2], m.features.shape[3])
    if m.labels.shape[1:] != size:
        m = m._replace(labels=labels_to_grid(m.labels, size, K, backend="torch"))
    found = []
    step = max(1, ELEMENTS // m.features[:1].numel())
    for b in (slice(i, i + step) for i in range(0, len(m.features), step)):
        x = m.features[b].detach().double().requires_grad_()
        pooled, _ = reference.part_pool(x.flatten(2).mT, m.labels[b].flatten(1), K)
        found.append((pooled.detach(), *torch.autograd.grad(pooled, x, m.grad[b].double())))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def case(b: int, d: int, side: int, dtype: str, device: torch.device, quick: bool, weigh: bool = False) -> Case:
    backend, itemsize = ours(device), DTYPES[dtype].itemsize
    features, labels, pooled = b * d * side**2 * itemsize, b * side**2 * 8, b * K * d * itemsize
    variants = (
        Variant(f"fgfast {backend}", lambda: partial(step, pool=fgfast(backend))),
        Variant("eager scatter_reduce", lambda: partial(step, pool=scatter)),
        Variant("eager one-hot", lambda: partial(step, pool=one_hot)),
        Variant("torch.compile one-hot", lambda: partial(step, pool=compiled(one_hot))),
        Variant("torch.compile scatter_reduce", lambda: partial(step, pool=compiled(scatter))),
    )
    return Case(
        "part_pool", sizes(B=b, D=d, N=side**2, K=K), dtype, partial(maps, b, d, side, DTYPES[dtype], device), variants,
        judge_by(expected), TOLERANCES[dtype], bytes=2 * (features + labels + pooled) + b * K * 8,
        operations=4 * b * d * side**2, input_bytes=features, quick=quick, weigh=weigh,
    )  # fmt: skip


def map_case(b: int, d: int, side: int, ids: int, dtype: str, device: torch.device) -> Case:
    """From full-resolution id maps: votes in the same launch where they are few, against a separate grid first."""
    backend, itemsize = ours(device), DTYPES[dtype].itemsize
    features, pooled = b * d * side**2 * itemsize, b * K * d * itemsize
    variants = (
        Variant(f"fgfast {backend}", lambda: partial(step, pool=fgfast(backend))),
        Variant(f"fgfast {backend}, grid first", lambda: partial(step, pool=partial(by_grid, backend=backend))),
        Variant("eager one-hot, grid first", lambda: partial(step, pool=eager_by_grid)),
    )
    return Case(
        "part_pool", sizes(B=b, D=d, N=side**2, H=ids, W=ids, K=K), dtype,
        partial(maps, b, d, side, DTYPES[dtype], device, ids=ids), variants, judge_by(expected), TOLERANCES[dtype],
        bytes=2 * (features + pooled) + b * ids**2 + b * side**2 * 8 + b * K * 8, operations=4 * b * d * side**2,
        input_bytes=features, quick=False,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        for dtype in ("fp32", "bf16"):
            yield case(2, 8, 5, dtype, device, True)
        yield map_case(2, 8, 5, 20, "fp32", device)
        return
    if device.type == "cpu":
        yield case(320, 2048, 7, "fp32", device, True, weigh=True)
        yield case(8, 256, 56, "fp32", device, True)
        yield map_case(320, 2048, 7, 56, "fp32", device)
        return
    for ids in (56, 224):
        yield map_case(320, 2048, 7, ids, "bf16", device)
    for dtype in ("bf16", "fp16", "fp32"):
        yield case(320, 2048, 7, dtype, device, dtype != "fp16")
        yield case(64, 1024, 56, dtype, device, dtype == "bf16")
    for side in (14, 28, 112):
        yield case(64, 512, side, "bf16", device, False)
