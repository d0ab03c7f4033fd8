"""part_pool forward and backward against scatter_reduce: DetCon's size and a larger map. A wrong one has no speed."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.conftest import Race, Run, check
from fgfast import labels_to_grid, part_pool
from fgfast.reference import part_pool as reference

K = 15
SHAPES = {"DetCon's [320, 2048, 7, 7]": (320, 2048, 7, 7), "[8, 256, 56, 56]": (8, 256, 56, 56)}


def scatter(x: Tensor, labels: Tensor) -> Tensor:
    """Mean pooling by scatter_reduce; a further part takes the ignored pixels."""
    slot = torch.where(labels < 0, K, labels).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    sums = x.new_zeros(len(x), x.shape[1], K + 1).scatter_reduce(2, slot, x.flatten(2), "mean", include_self=False)
    return sums[..., :K].transpose(1, 2)


def fgfast(x: Tensor, labels: Tensor) -> Tensor:
    return part_pool(x, labels, K).pooled


def forward_backward(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor, grad: Tensor) -> Tensor:
    y = x.detach().requires_grad_()
    run(y, labels).backward(grad)
    assert y.grad is not None
    return y.grad


def step(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor, grad: Tensor) -> list[Tensor]:
    return [forward_backward(run, x, labels, grad)]


def double(x: Tensor, labels: Tensor) -> Tensor:
    return reference.part_pool(x.double().flatten(2).transpose(1, 2), labels.flatten(1), K)[0]


@pytest.mark.benchmark(group="part_pool")
@pytest.mark.parametrize("size", SHAPES)
def test_part_pool(race: Race, device: torch.device, size: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[size], generator=g).to(device)
    labels = torch.randint(-1, K, (x.shape[0], *x.shape[2:]), generator=g).to(device)
    grad = torch.randn(x.shape[0], K, x.shape[1], generator=g).to(device)
    few = slice(0, 8)
    expected = forward_backward(double, x[few], labels[few], grad[few].double())
    for run in (fgfast, scatter):
        check(run.__name__, [forward_backward(run, x[few], labels[few], grad[few])], [expected], 1e-5)
        check(run.__name__, [run(x[few], labels[few])], [double(x[few], labels[few])], 1e-5)
    contenders: dict[str, Run] = {run.__name__: partial(step, run, x, labels, grad) for run in (fgfast, scatter)}
    race(contenders, "scatter", rounds=5)


def by_grid(x: Tensor, labels: Tensor) -> Tensor:
    return part_pool(x, labels_to_grid(labels, (x.shape[2], x.shape[3]), K), K).pooled


def forward(run: Callable[[Tensor, Tensor], Tensor], x: Tensor, labels: Tensor) -> list[Tensor]:
    return [run(x, labels)]


@pytest.mark.benchmark(group="part_pool of id maps")
@pytest.mark.parametrize("side", [56, 224])
def test_part_pool_of_id_maps(race: Race, device: torch.device, side: int) -> None:
    """Pooling by full-resolution maps against the grid first: DetCon's size."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(320, 2048, 7, 7, generator=g).to(device)
    labels = torch.randint(0, K, (320, side, side), generator=g, dtype=torch.uint8).to(device)
    few = slice(0, 8)
    expected = double(x[few], reference.labels_to_grid(labels[few], (7, 7), K))
    for run in (fgfast, by_grid):
        check(run.__name__, [run(x[few], labels[few])], [expected], 1e-5)
    contenders: dict[str, Run] = {run.__name__: partial(forward, run, x, labels) for run in (fgfast, by_grid)}
    race(contenders, "by_grid", rounds=5)
