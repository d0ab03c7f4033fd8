"""perturb against plain PyTorch: the same mask and noise by sort, scatter and where. A wrong one has no speed."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Race, Run
from fgfast import perturb

SHAPES = {"a batch of ResNet-50's [256, 2048]": (256, 2048), "[64, 128]": (64, 128)}
SHARE = 0.3


def plain(x: Tensor, w: Tensor, low: Tensor, std: Tensor, noise: Tensor) -> list[Tensor]:
    """The lowest |w x| by topk, the union, the guard by a sort and a cumulative sum, noise where the mask says so."""
    index = (w * x).abs().topk(int(SHARE * x.shape[1]), dim=1, largest=False).indices
    mask = torch.zeros_like(x, dtype=torch.bool).scatter_(1, index, True) | low
    square = x.square()
    order = torch.where(mask, square, torch.inf).sort(1)
    kept = order.values.cumsum(1) <= 0.5 * square.sum(1, keepdim=True)
    mask &= torch.zeros_like(mask).scatter_(1, order.indices, kept)
    changed = torch.where(mask, x + x.norm(dim=1, keepdim=True) * std * noise, x)
    return [changed, mask.float()]


@pytest.mark.benchmark(group="perturb")
@pytest.mark.parametrize("tight", [False, True], ids=["guard at rest", "guard at work"])
@pytest.mark.parametrize("size", SHAPES)
def test_perturb(race: Race, benchmark: Any, device: torch.device, size: str, tight: bool) -> None:
    """Masks and values must agree with those of the definition by sorting."""
    g = torch.Generator().manual_seed(0)
    x, w, noise = (torch.randn(SHAPES[size], generator=g).to(device) for _ in range(3))
    std = torch.rand(x.shape[1], generator=g).to(device)
    low = (torch.rand(x.shape[1], generator=g) < (0.9 if tight else SHARE)).to(device)

    def ours(backend: str | None = None) -> list[Tensor]:
        out = perturb(x, w, low_variance=low, std=std, lowest=SHARE, noise=noise, backend=backend)
        return [out.features, out.mask.float()]

    contenders: dict[str, Run] = {
        "fgfast": ours,
        "fgfast, torch backend": lambda: ours("torch"),
        "plain": lambda: plain(x, w, low, std, noise),
    }
    race(contenders, "plain", rounds=7)
    benchmark.extra_info["tight"] = tight
