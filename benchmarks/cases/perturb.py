"""perturb with both criteria and given noise: against sort, cumulative sum and where."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.cases.common import DTYPES, TOLERANCES, compiled, generator, judge_by, ours, sizes
from benchmarks.timing import Answer, Case, Variant
from fgfast import perturb

FRACTION = 0.3  # of the dimensions that each criterion selects


class Rows(NamedTuple):
    features: Tensor
    gradient: Tensor
    low: Tensor
    std: Tensor
    noise: Tensor


def rows(b: int, d: int, dtype: torch.dtype, device: torch.device, seed: int, low: float) -> Rows:
    """Random rows; ``low`` is the fraction of dimensions with low variance: above about 0.7 the guard acts."""
    g = generator(device, seed)
    x, w, noise = (torch.randn(b, d, device=device, generator=g).to(dtype) for _ in range(3))
    std = torch.rand(d, device=device, generator=g)
    return Rows(x, w, torch.rand(d, device=device, generator=g) < low, std, noise)


def plain(r: Rows) -> Answer:
    """The lowest |w x| by topk, the union, the guard by a sort and a cumulative sum, noise where the mask is set."""
    x, w = r.features.float(), r.gradient.float()
    index = (w * x).abs().topk(int(FRACTION * x.shape[1]), dim=1, largest=False).indices
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(1, index, True) | r.low
    square = x.square()
    order = torch.where(mask, square, torch.inf).sort(1)
    kept = order.values.cumsum(1) <= 0.5 * square.sum(1, keepdim=True)
    mask &= torch.zeros_like(mask).scatter_(1, order.indices, kept)
    changed = torch.where(mask, x + x.norm(dim=1, keepdim=True) * r.std * r.noise, x)
    return [changed.to(r.features.dtype), mask.float()]


def fgfast(r: Rows, backend: str | None = None) -> Answer:
    """The operation, its mask as numbers."""
    options = {"low_variance": r.low, "std": r.std, "fraction": FRACTION, "noise": r.noise}
    out = perturb(r.features, r.gradient, **options, backend=backend)  # type: ignore[arg-type]
    return [out.features, out.mask.float()]


def case(b: int, d: int, dtype: str, device: torch.device, quick: bool, guard: bool = False) -> Case:
    backend, itemsize = ours(device), DTYPES[dtype].itemsize
    run: Callable[[Rows], Answer] = partial(fgfast, backend=backend)
    variants = (
        Variant(f"fgfast {backend}", lambda: run),
        Variant("eager sort", lambda: plain),
        Variant("torch.compile sort", lambda: compiled(plain)),
    )
    return Case(
        "perturb", ("guard acts " if guard else "") + sizes(B=b, D=d), dtype,
        partial(rows, b, d, DTYPES[dtype], device, low=0.9 if guard else FRACTION), variants,
        judge_by(partial(fgfast, backend="reference")), TOLERANCES[dtype], bytes=b * d * (4 * itemsize + 1) + 5 * d,
        operations=b * d, input_bytes=3 * b * d * itemsize, quick=quick,
    )  # fmt: skip


def cases(device: torch.device, tiny: bool = False) -> Iterator[Case]:
    if tiny:
        yield case(3, 32, "fp32", device, True)
        return
    if device.type == "cpu":
        for guard in (False, True):
            yield case(256, 2048, "fp32", device, True, guard)
            yield case(64, 128, "fp32", device, True, guard)
        return
    for dtype in ("bf16", "fp32"):
        yield case(4096, 2048, dtype, device, dtype == "bf16")
    yield case(256, 512, "bf16", device, False)
