"""contrastive_loss, forward and backward: against the plain formula, lightly and pytorch-metric-learning."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.conftest import Race, Run
from benchmarks.peak import peak_memory
from fgfast import Ids, contrastive_loss, losses


def plain_ntxent(a: Tensor, b: Tensor, temperature: float = 0.5) -> Tensor:
    """The formula in five lines, with the logit matrix in memory."""
    both = F.normalize(torch.cat([a, b]), dim=1)
    logits = both @ both.T / temperature
    logits.fill_diagonal_(-torch.inf)
    n = len(a)
    return F.cross_entropy(logits, torch.arange(2 * n, device=a.device).roll(n))


def ntxent(name: str) -> Callable[..., Tensor]:
    """NT-Xent at temperature 0.5 by name of the contender."""
    if name == "lightly":
        from lightly.loss import NTXentLoss

        return NTXentLoss(temperature=0.5)
    return plain_ntxent if name == "plain" else losses.NTXentLoss(temperature=0.5)


def step(loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Run:
    """Value and gradients of one forward and backward pass."""

    def run() -> Sequence[Tensor]:
        value = loss(*inputs)
        return value.detach(), *torch.autograd.grad(value, inputs)

    return run


def vectors(*shape: int, n: int = 2) -> list[Tensor]:
    """Seeded random inputs on the device of the benchmark."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return [torch.randn(*shape, device=device).requires_grad_() for _ in range(n)]


def ntxent_case(name: str, m: int, d: int) -> Run:
    """NT-Xent of m rows, for the measurement of memory; a small one first imports what is imported late."""
    step(ntxent(name), vectors(300, d))()
    return step(ntxent(name), vectors(m // 2, d))


@pytest.mark.parametrize(
    ("m", "d", "rounds", "names"),
    [
        (48, 128, 30, ["fgfast", "plain", "lightly"]),  # a batch of 24: launches dominate
        (1024, 128, 10, ["fgfast", "plain", "lightly"]),
        (8192, 128, 2, ["fgfast", "plain", "lightly"]),  # SimCLR's batch of 4,096
        (8192, 512, 1, ["fgfast", "lightly"]),
        (16384, 128, 1, ["fgfast", "plain"]),  # lightly would take 5 GB
    ],
)
def test_ntxent(benchmark: Any, race: Race, m: int, d: int, rounds: int, names: list[str]) -> None:
    inputs = vectors(m // 2, d)
    race({name: step(ntxent(name), inputs) for name in names}, names[-1], rounds=rounds)
    if m >= 8192 and d == 128:
        peaks = {name: peak_memory("benchmarks.test_contrast:ntxent_case", name=name, m=m, d=d) for name in names}
        size = sum(x.numel() * x.element_size() for x in inputs)
        benchmark.extra_info["peak_mib"] = {name: round(peak / 2**20, 1) for name, peak in peaks.items()}
        benchmark.extra_info["inputs_mib"] = size / 2**20
        held = peaks["fgfast"] - size  # less the gradients returned, which are as large as the inputs
        if held > 2 * size + 64 * 2**20:
            raise AssertionError(f"fgfast holds {held / 2**20:.0f} MiB, over twice its inputs and 64 MiB.")


@pytest.mark.parametrize(("images", "parts", "d"), [(2, 24, 256), (320, 10, 256)])  # the smallest and PARTICLE's own
def test_detcon(race: Race, images: int, parts: int, d: int) -> None:
    lightly = pytest.importorskip("lightly.loss")
    inputs = vectors(images, parts, d, n=4)
    masks = [torch.stack([torch.randperm(parts + 5)[:parts] for _ in range(images)]) for _ in range(2)]
    masks = [m.to(inputs[0].device) for m in masks]
    contenders = {
        "fgfast": step(lambda *x: losses.DetConBLoss()(*x, *masks), inputs),
        "lightly": step(lambda *x: lightly.DetConBLoss()(*x, *masks), inputs),
    }
    race(contenders, "lightly", rounds=2)


def plain_parts(query: Tensor, key: Tensor, own: Tensor, positive: Tensor, allowed: Tensor) -> Tensor:
    """One positive a row among allowed columns, with the logit matrix and three masks in memory."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.1
    kept = logits.masked_fill(~(allowed | positive) | own, -torch.inf)
    return (kept.logsumexp(1) - logits[positive]).mean()


@pytest.mark.parametrize("negatives", ["all", "other_images", "same_image"])
def test_negatives(race: Race, negatives: str) -> None:
    """PARTICLE's own size: 320 images of 10 parts, each part of one view against those of both."""
    images, parts, d = 320, 10, 256
    query, key = vectors(images * parts, d, n=1)[0], vectors(2 * images * parts, d, n=1)[0]
    n = torch.arange(2 * len(query), device=query.device)
    key_ids = Ids(n % len(query) // parts, n % parts, n // len(query))
    query_ids = Ids(*(x[: len(query)] for x in key_ids))
    image, part, view = (q[:, None] == k[None, :] for q, k in zip(query_ids, key_ids, strict=True))
    own, positive = image & part & view, image & part & ~view
    allowed = {"all": torch.ones_like(image), "other_images": ~image, "same_image": image}[negatives]
    ours = partial(contrastive_loss, query_ids=query_ids, key_ids=key_ids, temperature=0.1, negatives=negatives)
    contenders = {
        "fgfast": step(ours, [query, key]),
        "plain": step(lambda q, k: plain_parts(q, k, own, positive, allowed), [query, key]),
    }
    race(contenders, "plain", rounds=3)


def test_supcon(race: Race) -> None:
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    inputs = vectors(4096, 128, n=1)
    labels = torch.randint(0, 200, (4096,), device=inputs[0].device)
    contenders = {
        "fgfast": step(lambda x: losses.SupConLoss()(x, labels), inputs),
        "pytorch-metric-learning": step(lambda x: pml.SupConLoss()(x, labels), inputs),
    }
    race(contenders, "pytorch-metric-learning", rounds=2)


def test_ntxent_of_metric_learning(race: Race) -> None:
    pml = pytest.importorskip("pytorch_metric_learning.losses")
    inputs = vectors(256, 128)  # at 512 the peer needs 17 GB
    labels = torch.arange(256, device=inputs[0].device).repeat(2)
    peer = pml.NTXentLoss(temperature=0.5)
    contenders = {
        "fgfast": step(losses.NTXentLoss(0.5), inputs),
        "plain": step(plain_ntxent, inputs),
        "pytorch-metric-learning": step(lambda a, b: peer(torch.cat([a, b]), labels), inputs),
    }
    race(contenders, "plain", rounds=1)
