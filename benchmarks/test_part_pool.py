"""part_pool forward and backward against scatter_reduce: DetCon's size and a larger map. A wrong one has no speed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fgfast import part_pool
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
    if x.is_cuda:
        torch.cuda.synchronize()
    return y.grad


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("run", [fgfast, scatter], ids=["fgfast", "scatter_reduce"])
def test_part_pool(benchmark, run: Callable[[Tensor, Tensor], Tensor], size: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.group = f"part_pool forward + backward, {size}, K = {K}"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    g = torch.Generator().manual_seed(0)
    x = torch.randn(SHAPES[size], generator=g).to(device)
    labels = torch.randint(-1, K, (x.shape[0], *x.shape[2:]), generator=g).to(device)
    grad = torch.randn(x.shape[0], K, x.shape[1], generator=g).to(device)
    few = x[:8].flatten(2).transpose(1, 2).double().requires_grad_()
    pooled, _ = reference.part_pool(few, labels[:8].flatten(1), K)
    pooled.backward(grad[:8].double())
    assert few.grad is not None
    torch.testing.assert_close(run(x, labels)[:8].double(), pooled, rtol=1e-5, atol=1e-5)
    found = forward_backward(run, x, labels, grad)[:8].flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.double(), few.grad, rtol=1e-5, atol=1e-5)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    benchmark.pedantic(forward_backward, args=(run, x, labels, grad), rounds=3, warmup_rounds=1)
