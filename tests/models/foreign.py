"""Networks of other libraries with random weights, and the comparison with timm's after loading their files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fgfast.errors import UserError
from fgfast.models.weights import load_encoder


def randomise(net: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights and statistics at which no layer is close to the identity, in eval mode."""
    rng = torch.Generator().manual_seed(seed)
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.3, generator=rng)
        elif value.dim() <= 1 or "token" in name or "pos" in name or value.shape[0] == 1 or "scale" in name:
            value.uniform_(0.5, 1.5, generator=rng) if value.is_floating_point() else None
        else:
            value.normal_(0, value[0].numel() ** -0.5, generator=rng)
    return net.eval()


def images(size: int) -> Tensor:
    """Two images."""
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def timm_net(name: str, **args: Any) -> nn.Module:
    """A timm network in eval mode, as an encoder is built."""
    import timm

    return timm.create_model(name, num_classes=0, **args).eval()


def error(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, as a fraction of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def assert_same_features(file: Path, name: str, size: int, theirs: Tensor, **args: Any) -> None:
    """A timm network with the weights of a file has the features of the library that wrote it.

    Args:
        file: the file.
        name: the network's name in timm.
        size: side of :func:`images`.
        theirs: pooled features [2, D], a map [2, D, h, w] or tokens [2, T, D] of the library.
        args: further arguments of timm.
    """
    net = timm_net(name, **args)
    load_encoder(net, file)
    features = net.forward_features(images(size))
    ours = net.forward_head(features, pre_logits=True) if theirs.dim() == 2 else features
    assert theirs.std() > 1e-3
    assert error(ours, theirs) < 1e-5


def refused(net: nn.Module, file: Path, message: str) -> None:
    """Assert that weights are refused with a message that matches, and that the network keeps its own."""
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_encoder(net, file)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
