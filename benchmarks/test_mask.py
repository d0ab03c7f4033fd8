"""The pivotal mask of 12 layers of 12 heads over 196 patches: against a loop over patches, and vectorised PyTorch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Race, Run
from fgfast import pivotal_mask

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS, HEADS, PATCHES, KEEP = 12, 12, 196, 0.3
KEPT = int(KEEP * PATCHES)
BATCH = {"cpu": 64, "cuda": 1024}[DEVICE]


def attention() -> Tensor:
    """Softmax rows [L, B, heads, P]."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(LAYERS, BATCH, HEADS, PATCHES, generator=g).softmax(3).to(DEVICE)


def loop(x: Tensor) -> list[Tensor]:
    """Image by image and patch by patch, as the method was released: a product over layers, sort, compare."""
    masks = []
    for b in range(x.shape[1]):
        product = torch.ones(x.shape[3], device=x.device)
        for layer in x:
            product = product * (layer[b].mean(0) * 1000)
        threshold = product.sort(descending=True).values[KEPT]
        masks.append(torch.tensor([bool(product[p] > threshold) for p in range(x.shape[3])], device=x.device))
    return [torch.stack(masks).float()]


def vectorised(x: Tensor) -> list[Tensor]:
    """Mean, log, sum, topk, scatter."""
    score = x.mean(2).log().sum(0)
    index = score.topk(KEPT, dim=1).indices
    return [torch.zeros(score.shape, dtype=torch.bool, device=x.device).scatter_(1, index, True).float()]


@pytest.mark.benchmark(group="pivotal mask, 12 layers x 12 heads x 196 patches")
@pytest.mark.parametrize("warm", [0, 5], ids=["caches cold", "caches warm"])
def test_pivotal_mask(race: Race, benchmark: Any, warm: int) -> None:
    """Masks must be equal, or there is no speed."""
    x = attention()
    contenders: dict[str, Run] = {
        "fgfast": lambda: [pivotal_mask(x, keep=KEEP).mask.float()],
        "fgfast, torch backend": lambda: [pivotal_mask(x, keep=KEEP, backend="torch").mask.float()],
        "vectorised": lambda: vectorised(x),
        "loop": lambda: loop(x),
    }
    race(contenders, "vectorised", rounds=9, rtol=0, warm=warm)
    benchmark.extra_info["batch"] = BATCH
