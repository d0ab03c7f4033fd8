"""The operations inside one compiled graph: by PyTorch's own code generator, and traced as on a GPU."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fgfast import (
    DetConBLoss,
    DetConSLoss,
    Ids,
    InfoNCELoss,
    NTXentLoss,
    SupConLoss,
    assign_and_pool,
    backend,
    contrastive_loss,
    kmeans,
    kmeans_step,
    labels_to_grid,
    mask_images,
    part_pool,
    perturb,
    pivotal_mask,
)
from fgfast.losses import PartContrastiveLoss
from fgfast.ops import mask


@pytest.mark.slow
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


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a GPU that is not there: inside FakeTensorMode it has no memory."""
    return torch.empty(shape, dtype=dtype, device="cuda")


def ids_on_gpu(*shape: int) -> Tensor:
    """The same, of integers."""
    return on_gpu(*shape, dtype=torch.int64)


CALLS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]] = {
    "contrast of itself": lambda: (
        lambda q, i: contrastive_loss(q, q, query_ids=Ids(i, i, i), key_ids=Ids(i, i, i)),
        (on_gpu(8, 4), ids_on_gpu(8)),
    ),
    "contrast with everything": lambda: (
        lambda q, i, k, j, b, t: contrastive_loss(
            q, k, query_ids=Ids(i, i, i), key_ids=Ids(j, j, j), bank=b, temperature=t, negatives="same_image"
        ),
        (on_gpu(8, 4), ids_on_gpu(8), on_gpu(6, 4), ids_on_gpu(6), on_gpu(3, 4), on_gpu()),
    ),
    "kmeans": lambda: (lambda x: kmeans(x, 3, metric="cosine").labels, (on_gpu(2, 4, 8, 8),)),
    "kmeans of a pyramid": lambda: (
        lambda x, y: kmeans([x, y], 3, size=(8, 8), n_init=2).labels,
        (on_gpu(2, 4, 8, 8), on_gpu(2, 6, 4, 4)),
    ),
    "kmeans_step": lambda: (lambda x, c: kmeans_step(x, c).sums, (on_gpu(2, 16, 4), on_gpu(2, 3, 4))),
    "part_pool": lambda: (
        lambda x, i, w: part_pool(x, i, 3, weight=w).pooled,
        (on_gpu(2, 4, 8, 8), ids_on_gpu(2, 8, 8), on_gpu(2, 8, 8)),
    ),
    "part_pool of id maps": lambda: (
        lambda x, i, w: part_pool(x, i, 3, weight=w).pooled,
        (on_gpu(2, 4, 8, 8), ids_on_gpu(2, 20, 20), on_gpu(2, 8, 8)),
    ),
    "labels_to_grid": lambda: (lambda i: labels_to_grid(i, (4, 4), 3), (ids_on_gpu(2, 8, 8),)),
    "assign_and_pool": lambda: (lambda x, c: assign_and_pool(x, c)[0], (on_gpu(2, 4, 8, 8), on_gpu(2, 3, 4))),
    "pivotal_mask, drawn": lambda: (
        lambda a, x: pivotal_mask(a, strategy="sample", images=x).images,
        (on_gpu(2, 3, 4, 16), on_gpu(3, 3, 8, 8)),
    ),
    "mask_images": lambda: (mask_images, (on_gpu(3, 3, 8, 8), on_gpu(3, 16, dtype=torch.bool))),
    "perturb": lambda: (lambda x, v: perturb(x, low_variance=v > 0, std=v).features, (on_gpu(8, 4), on_gpu(4))),
    "NTXentLoss": lambda: (NTXentLoss(), (on_gpu(8, 4), on_gpu(8, 4))),
    "SupConLoss": lambda: (SupConLoss(), (on_gpu(8, 4), ids_on_gpu(8))),
    "InfoNCELoss": lambda: (InfoNCELoss(0.2), (on_gpu(8, 4), on_gpu(8, 4))),
    "DetConBLoss": lambda: (DetConBLoss(), (*(on_gpu(3, 5, 4) for _ in range(4)), ids_on_gpu(3, 5), ids_on_gpu(3, 5))),
    "DetConSLoss": lambda: (DetConSLoss(), (*(on_gpu(3, 5, 4) for _ in range(2)), ids_on_gpu(3, 5), ids_on_gpu(3, 5))),
    "PartContrastiveLoss": lambda: (
        PartContrastiveLoss(5, projector=nn.Linear(4, 8, device="cuda"), max_parts=3),
        (on_gpu(2, 4, 8, 8), on_gpu(2, 4, 8, 8), ids_on_gpu(2, 8, 8), ids_on_gpu(2, 8, 8)),
    ),
}


class Traced(Exception):
    """Raised when a call has been traced into one graph."""


@pytest.mark.parametrize("name", CALLS)
def test_a_call_on_a_gpu_is_one_graph(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler reaches the end of every call with tensors of a GPU, where other checks and backends are taken."""
    for module in (backend, mask):
        monkeypatch.setattr(module, "missing", torch.compiler.assume_constant_result(lambda _: None))
    if "mask" in name:
        monkeypatch.setattr(pytest.importorskip("fgfast._native"), "CUDA", True)

    def end(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        ours = [str(node) + str(node.args) for node in graph.graph.nodes if "fgfast" in str(node.target)]
        if ours and all("triton" in call or "native" in call for call in ours):
            raise Traced
        raise AssertionError(f"The kernels are not in the graph: {ours}")

    torch.compiler.reset()
    with FakeTensorMode():
        call, given = CALLS[name]()
        with pytest.raises(Exception, match="Traced"):
            torch.compile(call, fullgraph=True, backend=end)(*given)


def test_the_choice_of_a_backend_is_a_constant() -> None:
    """What looks for packages and devices is not traced."""
    expected = 1.0 if backend.missing("native") is None else 0.0

    def run(x: Tensor) -> Tensor:
        backend.missing("triton")
        return x + (1.0 if backend.missing("native") is None else 0.0)

    assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(())) == expected


@pytest.mark.parametrize("strategy", ["sample", "random"])
def test_a_compiled_mask_is_redrawn(strategy: str) -> None:
    """Without a seed each call of a graph draws its own mask."""
    attention = torch.ones(1, 4, 64)
    run = torch.compile(
        lambda a: pivotal_mask(a, keep=0.5, strategy=strategy).mask,
        fullgraph=True,
        backend="aot_eager",
    )
    assert not torch.equal(run(attention), run(attention))
