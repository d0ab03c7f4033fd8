"""The methods that are one objective each: losses against lightly's, momentum, queue, resuming, presets."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from torch import Tensor

from fgfast.config import TrainConfig, validate
from fgfast.data.views import Batch
from fgfast.methods.base import Progress, method_class
from fgfast.methods.objectives import ObjectiveMethod
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, check_padding

SMALL: dict[str, dict[str, Any]] = {
    "byol": {"hidden": 16, "projection": 8}, "mocov2": {"hidden": 16, "projection": 8, "queue": 10},
    "simsiam": {"hidden": 16, "projection": 8},
}  # fmt: skip


def config_for(name: str, **values: object) -> TrainConfig:
    shared: dict[str, Any] = {
        "model": TINY, "model_args": "output_stride=8", "size": 32, "batch_size": 6, "epochs": 2, "log_every": 1,
        "knn_every": 0, "device": "cpu", "threads": 1, "amp": "off",
    }  # fmt: skip
    return method_class(name).Config(**shared | SMALL[name] | values)


def method_for(name: str, **values: object) -> ObjectiveMethod:
    torch.manual_seed(0)
    method = method_class(name)(config_for(name, **values))
    assert isinstance(method, ObjectiveMethod)
    return method


def batch_of(n: int = 6) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[torch.randn(n, 3, 32, 32, generator=g, dtype=torch.float64) for _ in range(2)], index=torch.arange(n),
        target=torch.zeros(n, dtype=torch.int64), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


def in_float64(name: str) -> tuple[ObjectiveMethod, Any, Batch, Tensor, Tensor]:
    """A method whose momentum copies differ from the online networks, a batch, and the projections of its views."""
    method, batch = method_for(name).eval().double(), batch_of()
    base: Any = method.base
    for copy in ("target", "target_projector"):
        for p in getattr(base, copy, torch.nn.Identity()).parameters():
            p.mul_(1.1)
    z1, z2 = (base.projector(method.encoder(view)) for view in batch.views)
    return method, base, batch, z1, z2


def test_mocov2_is_the_loss_of_lightly() -> None:
    """NTXentLoss of the query of view 1, the key of view 2 and a memory bank; the temperature is in float32."""
    method, base, batch, query, _ = in_float64("mocov2")
    assert method.queue is not None
    theirs = NTXentLoss(0.2, memory_bank_size=(10, 8))
    theirs.memory_bank.bank = method.queue.keys.clone()
    key = base.target_projector(base.target(batch.views[1]))
    torch.testing.assert_close(method(batch)["loss"], theirs(query, key), rtol=1e-7, atol=0)


def test_byol_is_the_loss_of_lightly() -> None:
    """Four plus twice NegativeCosineSimilarity of both directions; in float64 to 1e-12."""
    method, base, batch, z1, z2 = in_float64("byol")
    t1, t2 = (base.target_projector(base.target(view)) for view in batch.views)
    theirs = NegativeCosineSimilarity()
    expected = 4 + 2 * theirs(base.predictor(z1), t2) + 2 * theirs(base.predictor(z2), t1)
    torch.testing.assert_close(method(batch)["loss"], expected, rtol=1e-12, atol=1e-12)


def test_simsiam_is_the_loss_of_lightly() -> None:
    """The mean of NegativeCosineSimilarity of both directions, in value and gradient; in float64 to 1e-12."""
    method, base, batch, z1, z2 = in_float64("simsiam")
    theirs = NegativeCosineSimilarity()
    expected = (theirs(base.predictor(z1), z2.detach()) + theirs(base.predictor(z2), z1.detach())) / 2
    loss = method(batch)["loss"]
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    weights = [*method.encoder.parameters(), *base.projector.parameters()]
    for ours, other in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_a_step_changes_the_copies_and_the_queue(name: str) -> None:
    """The momentum copies by the decay of the method, constant or half a cosine; the newest keys come first."""
    method, batch = method_for(name, momentum=0.9) if name != "simsiam" else method_for(name), batch_of()
    batch.views = [view.float() for view in batch.views]
    batch.valid[4:] = False
    base: Any = method.base
    queue = None if method.queue is None else method.queue.keys.clone()
    method.train()(batch)
    if method.queue is not None:
        assert queue is not None
        with torch.no_grad():
            keys = torch.nn.functional.normalize(base.target_projector(base.target(batch.views[1])), dim=1)
        torch.testing.assert_close(method.queue.keys, torch.cat([keys[:4], queue[:6]]))
    assert (queue is None) == (name != "mocov2")
    if name == "simsiam":
        assert not hasattr(base, "target")
        return
    before = [p.clone() for p in base.target.parameters()]
    with torch.no_grad():
        for p in method.encoder.parameters():
            p.add_(1.0)
    method.after_step(Progress(1, 2))
    decay = {"mocov2": 0.9, "byol": 0.95}[name]
    for old, new, online in zip(before, base.target.parameters(), method.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, decay * old + (1 - decay) * online)
        assert not new.requires_grad


@pytest.mark.parametrize("name", SMALL)
def test_padded_images_have_no_effect(name: str) -> None:
    batch = batch_of()
    batch.views = [view.float() for view in batch.views]
    check_padding(method_for(name), batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_a_resumed_run_equals_an_uninterrupted_one(name: str, drawn: Path, tmp_path: Path) -> None:
    check_exact_resume(name, config_for(name, data=str(drawn)), tmp_path, stop_after=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_the_loss_falls(name: str, drawn: Path, tmp_path: Path) -> None:
    """On a few drawn images in bfloat16; with a queue from the time when it is full of keys of the network."""
    config = config_for(name, data=str(drawn), out=str(tmp_path / "run"), epochs=20, amp="bf16", lr=3e-3)
    rows, _ = read_metrics(pretrain(name, config) / "metrics.jsonl")
    losses = torch.tensor([row["loss"] for row in rows])
    assert losses[-10:].mean() < losses[5:15].mean()


@pytest.mark.parametrize("name", SMALL)
def test_passes_are_those_of_the_encoders(name: str) -> None:
    """Images that went through encoder and copy in a step, per image of the batch."""
    method, batch = method_for(name), batch_of()
    batch.views = [view.float() for view in batch.views]
    seen: list[int] = []
    for encoder in (method.encoder, getattr(method.base, "target", None)):
        if encoder is not None:
            encoder.net.conv1.register_forward_hook(lambda _m, inputs, _o: seen.append(len(inputs[0])))
    method(batch)
    assert sum(seen) / len(batch) == method.passes_per_image


def test_paper_presets() -> None:
    """The authors' settings are valid, and the heads have their widths."""
    moco, byol, simsiam = (method_class(name).paper(None) for name in ("mocov2", "byol", "simsiam"))
    for config in (moco, byol, simsiam):
        validate(replace(config, data="data", out="run"))
        assert (config.model, config.size, config.clip) == ("resnet50", 224, 0.0)
    assert (moco.optimizer, moco.lr, moco.batch_size, moco.epochs) == ("sgd", 0.03, 256, 200)
    assert (byol.optimizer, byol.lr, byol.batch_size, byol.weight_decay) == ("lars", 0.2 * 4096 / 256, 4096, 1.5e-6)
    assert (simsiam.optimizer, simsiam.lr, simsiam.batch_size) == ("sgd", 0.05 * 512 / 256, 512)
    widths = {}
    for name, config in (("mocov2", moco), ("byol", byol), ("simsiam", simsiam)):
        small: Any = replace(config, model=TINY, size=32)
        if name == "mocov2":
            assert small.queue == 65_536
            small = replace(small, queue=4)
        base: Any = method_class(name)(small).base  # type: ignore[attr-defined]
        heads = (getattr(base, "projector", None), getattr(base, "predictor", None))
        widths[name] = [
            [m.out_features for m in head.modules() if isinstance(m, torch.nn.Linear)] for head in heads if head
        ]
    assert widths["mocov2"] == [[2048, 128]]
    assert widths["byol"] == [[4096, 256], [4096, 256]]
    assert widths["simsiam"] == [[2048, 2048, 2048], [512, 2048]]
