"""The operations inside one compiled graph: by PyTorch's own code generator, and traced as on a GPU."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fgfast import (
    CLIPLoss,
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


device = "cuda"  # of the tensors below


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of a GPU that is not there: inside FakeTensorMode it has no memory."""
    return torch.ones(shape, dtype=dtype, device=device)


def ids(*shape: int) -> Tensor:
    """The same, of integers."""
    return floats(*shape, dtype=torch.int64)


CALLS: dict[str, Callable[[], tuple[Callable[..., Any], tuple[Tensor, ...]]]] = {
    "contrast of itself": lambda: (
        lambda q, i: contrastive_loss(q, q, query_ids=Ids(i, i, i), key_ids=Ids(i, i, i)),
        (floats(8, 4), ids(8)),
    ),
    "contrast with everything": lambda: (
        lambda q, i, k, j, b, t: contrastive_loss(
            q, k, query_ids=Ids(i, i, i), key_ids=Ids(j, j, j), bank=b, temperature=t, negatives="same_image"
        ),
        (floats(8, 4), ids(8), floats(6, 4), ids(6), floats(3, 4), floats()),
    ),
    "kmeans": lambda: (lambda x: kmeans(x, 3, metric="cosine").labels, (floats(2, 4, 8, 8),)),
    "kmeans of a pyramid": lambda: (
        lambda x, y: kmeans([x, y], 3, size=(8, 8), n_init=2).labels,
        (floats(2, 4, 8, 8), floats(2, 6, 4, 4)),
    ),
    "kmeans_step": lambda: (lambda x, c: kmeans_step(x, c).sums, (floats(2, 16, 4), floats(2, 3, 4))),
    "part_pool": lambda: (
        lambda x, i, w: part_pool(x, i, 3, weight=w).pooled,
        (floats(2, 4, 8, 8), ids(2, 8, 8), floats(2, 8, 8)),
    ),
    "part_pool of id maps": lambda: (
        lambda x, i, w: part_pool(x, i, 3, weight=w).pooled,
        (floats(2, 4, 8, 8), ids(2, 20, 20), floats(2, 8, 8)),
    ),
    "labels_to_grid": lambda: (lambda i: labels_to_grid(i, (4, 4), 3), (ids(2, 8, 8),)),
    "assign_and_pool": lambda: (lambda x, c: assign_and_pool(x, c)[0], (floats(2, 4, 8, 8), floats(2, 3, 4))),
    "pivotal_mask, drawn": lambda: (
        lambda a, x: pivotal_mask(a, strategy="sample", images=x).images,
        (floats(2, 3, 4, 16), floats(3, 3, 8, 8)),
    ),
    "mask_images": lambda: (mask_images, (floats(3, 3, 8, 8), floats(3, 16, dtype=torch.bool))),
    "perturb": lambda: (lambda x, v: perturb(x, low_variance=v > 0, std=v).features, (floats(8, 4), floats(4))),
    "NTXentLoss": lambda: (NTXentLoss(), (floats(8, 4), floats(8, 4))),
    "SupConLoss": lambda: (SupConLoss(), (floats(8, 4), ids(8))),
    "InfoNCELoss": lambda: (InfoNCELoss(0.2), (floats(8, 4), floats(8, 4))),
    "CLIPLoss": lambda: (CLIPLoss(), (floats(8, 4), floats(8, 4), floats())),
    "DetConBLoss": lambda: (DetConBLoss(), (*(floats(3, 5, 4) for _ in range(4)), ids(3, 5), ids(3, 5))),
    "DetConSLoss": lambda: (DetConSLoss(), (*(floats(3, 5, 4) for _ in range(2)), ids(3, 5), ids(3, 5))),
    "PartContrastiveLoss": lambda: (
        PartContrastiveLoss(5, projector=nn.Linear(4, 8, device=device), max_parts=3),
        (floats(2, 4, 8, 8), floats(2, 4, 8, 8), ids(2, 8, 8), ids(2, 8, 8)),
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


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_a_call_of_shapes_alone_gives_the_shape_of_its_result(
    name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the device "meta", and those of FakeTensorMode, have no values to look at."""
    monkeypatch.setattr(f"{__name__}.device", "cpu")
    call, given = CALLS[name]()
    expected = call(*given)
    monkeypatch.setattr(f"{__name__}.device", "meta" if kind == "meta" else "cpu")
    with FakeTensorMode() if kind == "fake" else nullcontext():
        call, given = CALLS[name]()
        found = call(*given)
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, device)


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
