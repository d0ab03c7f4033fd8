"""The libraries whose losses ours replace, and the comparison of values and gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

lightly = pytest.importorskip("lightly.loss")
pml = pytest.importorskip("pytorch_metric_learning.losses")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *vectors: Tensor) -> None:
    """Values and gradients agree to float64, or to float32 where the peer computes parts in it."""
    results = []
    for loss in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in vectors]
        value = loss(*inputs)
        results.append([value.detach().double(), *torch.autograd.grad(value, inputs)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)
