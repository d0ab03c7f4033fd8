"""The operations together inside one compiled graph, by PyTorch's own code generator."""

import shutil

import pytest
import torch
from torch import Tensor, nn

from fgfast import assign_and_pool, kmeans, kmeans_step
from fgfast.losses import PartContrastiveLoss


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_gives_the_same_numbers() -> None:
    """Clustering, pooling and contrast behind a layer that the code generator lays out as it likes."""
    torch.manual_seed(0)
    layer, loss = nn.Linear(8, 16), PartContrastiveLoss(5, projector=nn.Linear(16, 8))
    x = [torch.randn(3, 8, 7, 7) for _ in range(2)]
    ids = [torch.randint(0, 5, (3, 28, 28)) for _ in range(2)]

    def step(x: list[Tensor], ids: list[Tensor]) -> Tensor:
        first, second = (layer(v.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for v in x)
        found = kmeans(first, 4, n_iter=3, seed=0)
        pooled, _, _ = assign_and_pool(first, found.centroids)
        return loss(first, second, *ids) + pooled.square().mean() + kmeans_step(second, found.centroids).inertia.mean()

    ends = []
    for run in (step, torch.compile(step, fullgraph=True)):
        layer.zero_grad()
        value = run(x, ids)
        value.backward()
        assert layer.weight.grad is not None
        ends.append((value.detach(), layer.weight.grad.clone()))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
