"""perturb against plain PyTorch: the same mask and noise by sort, scatter and where. A wrong one has no speed."""

from typing import Any

import pytest
import torch

from benchmarks.cases import perturb as cases
from benchmarks.conftest import Race, Run

SHAPES = {"a batch of ResNet-50's [256, 2048]": (256, 2048), "[64, 128]": (64, 128)}


@pytest.mark.benchmark(group="perturb")
@pytest.mark.parametrize("tight", [False, True], ids=["guard at rest", "guard at work"])
@pytest.mark.parametrize("size", SHAPES)
def test_perturb(race: Race, benchmark: Any, device: torch.device, size: str, tight: bool) -> None:
    """Masks and values must agree with those of the definition by sorting."""
    r = cases.rows(*SHAPES[size], torch.float32, device, 0, low=0.9 if tight else cases.SHARE)
    contenders: dict[str, Run] = {
        "fgfast": lambda: cases.fgfast(r),
        "fgfast, torch backend": lambda: cases.fgfast(r, "torch"),
        "plain": lambda: cases.plain(r),
    }
    race(contenders, "plain", rounds=7)
    benchmark.extra_info["tight"] = tight
