"""Options of SimCLR for short runs of a small network on the CPU."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgfast.methods.simclr import SimCLRConfig
from tests.conftest import TINY


def simclr_config(data: Path, out: Path, **values: Any) -> SimCLRConfig:
    """Two epochs, of three steps each on the drawn images."""
    config = SimCLRConfig(
        data=str(data), out=str(out), model=TINY, size=32, batch_size=6, epochs=2, log_every=1, knn_every=0, hidden=16,
        projection=8, device="cpu", threads=1, amp="off",
    )  # fmt: skip
    return replace(config, **values)


def statistics(net: nn.Module) -> dict[str, torch.Tensor]:
    """The running statistics of a network, by name."""
    return {name: x for name, x in net.state_dict().items() if "running" in name}
