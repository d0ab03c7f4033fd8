"""The libraries whose losses ours replace, and the comparison of values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import Case, Results

lightly = pytest.importorskip("lightly.loss")
pml = pytest.importorskip("pytorch_metric_learning.losses")


def randn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randint(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], *vectors: Tensor) -> None:
    """Values and gradients agree to float64, or to float32 where the peer computes parts in it."""
    results = []
    for loss in (ours, theirs):
        inputs = [x.clone().requires_grad_() for x in vectors]
        value = loss(*inputs)
        results.append([value.detach().double(), *torch.autograd.grad(value, inputs)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


class Cases:
    """The cases of one class and its peer."""

    def __init__(self, ours: type, theirs: type):
        self.classes = (ours, theirs)
        self.all: list[Case] = []

    def add(
        self, name: str, call: Callable[..., Any], *vectors: Tensor, difference: str = "", refused: bool = False,
        rtol: float = 1e-6, atol: float = 1e-8, **options: Any,
    ) -> None:  # fmt: skip
        """Compare ``call(loss, *vectors)`` of losses with these options; ``name`` begins with the argument in question.

        ``call`` returns the value, or a tuple of the value and what else is compared. Gradients are compared, too.
        """

        def run(cls: type) -> Results:
            torch.manual_seed(0)
            inputs = [x.clone().requires_grad_() for x in vectors]
            made = {key: option() if key in ("distance", "reducer") else option for key, option in options.items()}
            value = call(cls(**made).to(vectors[0].dtype), *inputs)
            value, *extra = value if isinstance(value, tuple) else (value,)
            grads = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
            return [value, *extra, *grads]

        ours, theirs = (lambda cls=cls: run(cls) for cls in self.classes)
        self.all.append(Case(name, ours, theirs, name.split()[0], rtol, atol, difference, refused))
