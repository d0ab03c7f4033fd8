"""The linear probes by SGD: rates, the classifier of each epoch against a plain loop, resuming, and the best epoch."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from fgfast.config import TrainConfig
from fgfast.data.layouts import open_images
from fgfast.data.loader import make_loader
from fgfast.data.views import Crop, ViewSpec
from fgfast.errors import UserError
from fgfast.evaluate import linear_sgd
from fgfast.evaluate.features import extract
from fgfast.evaluate.linear_sgd import CENTER, LCROptions, LoDiscOptions, SGDOptions, SGDProbe, sgd_probe
from fgfast.models.backbone import Backbone
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = TrainConfig(size=32, threads=1, amp="off")


def encoder() -> Backbone:
    torch.manual_seed(0)
    return Backbone(TINY, size=32)


def probe(drawn: Path, options: SGDOptions, net: Backbone | None = None, state_file: Path | None = None) -> SGDProbe:
    images = open_images(drawn)
    return sgd_probe(
        net or encoder(), images.train_set(), images.test_set(), CONFIG, options, device=CPU, state_file=state_file
    )


def test_rates_are_those_of_the_papers() -> None:
    lcr, lodisc = LCROptions(), LoDiscOptions()
    assert [lcr.rate(epoch) for epoch in (0, 59, 60, 79, 80, 99)] == pytest.approx([30, 30, 3, 3, 0.3, 0.3])
    assert lodisc.rate(0) == 0.5
    assert lodisc.rate(25) == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))
    assert lodisc.rate(50) == pytest.approx(0.25)
    assert replace(lodisc, batch_size=64).rate(0) == pytest.approx(0.125)
    assert (lcr.epochs, lcr.batch_size, lcr.weight_decay, lodisc.epochs, lodisc.batch_size) == (100, 256, 0, 100, 256)


def plain_loop(drawn: Path, options: SGDOptions) -> list[Tensor]:
    """Logits of the test images after every epoch, by SGD with momentum written out."""
    net, images = encoder().eval(), open_images(drawn)
    crop = Crop(size=32, scale=(0.08, 1.0), flip=0.5, jitter=(0, 0, 0, 0), jitter_p=0)
    spec = ViewSpec(crops=(crop,)).with_stats(net.stats)
    loader = make_loader(images.train_set(), spec, options.batch_size, seed=options.seed, threads=1)

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            f = net(x)
        return f / f.norm(dim=1, keepdim=True) if options.normalise else f

    test_x = extract(features, images.test_set(), 32, center=CENTER, threads=1, stats=net.stats)[0]
    torch.manual_seed(options.seed)
    nn.Linear(net.dim, 3)  # its own start is drawn before that of the protocol
    weights = torch.cat([torch.empty(3, net.dim).normal_(std=0.01), torch.zeros(3, 1)], 1)
    velocity, logits = torch.zeros_like(weights), []
    for epoch in range(options.epochs):
        for batch in loader:
            x = torch.cat([features(batch.views[0]), torch.ones(len(batch), 1)], 1)[batch.valid]
            error = (x @ weights.T).softmax(1) - nn.functional.one_hot(batch.target[batch.valid], 3)
            velocity = 0.9 * velocity + error.T @ x / len(x)
            weights = weights - options.rate(epoch) * velocity
        logits.append(torch.cat([test_x, torch.ones(len(test_x), 1)], 1) @ weights.T)
    loader.close()
    return logits


@pytest.mark.parametrize("options", [LCROptions(epochs=3, batch_size=7), LoDiscOptions(epochs=3, batch_size=7, seed=2)])
def test_training_is_that_of_a_plain_loop(drawn: Path, options: SGDOptions) -> None:
    """New views every epoch, an incomplete last batch (18 images in steps of 7), momentum, the rate of each epoch."""
    result = probe(drawn, options)
    expected = plain_loop(drawn, options)[-1]
    assert result.epoch == 3
    assert torch.allclose(result.logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert torch.equal(result.truth, torch.from_numpy(open_images(drawn).test_set().targets))


def test_the_best_epoch_is_the_first_with_the_highest_top_1(drawn: Path) -> None:
    options = LCROptions(epochs=4, batch_size=6, augment=False)
    truth = torch.from_numpy(open_images(drawn).test_set().targets)
    per_epoch = []  # a run of n epochs with the rates of four
    for n in range(1, 5):

        class Cut(LCROptions):
            def rate(self, epoch: int) -> float:
                return options.rate(epoch)

        per_epoch.append((probe(drawn, Cut(epochs=n, batch_size=6, augment=False)).logits.argmax(1) == truth).sum())
    best = probe(drawn, replace(options, report="best"))
    assert best.epoch == 1 + int(torch.stack(per_epoch).argmax())
    assert (best.logits.argmax(1) == truth).sum() == max(per_epoch)
    assert probe(drawn, options).epoch == 4


def test_the_encoder_never_changes(drawn: Path) -> None:
    net = encoder().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    probe(drawn, LCROptions(epochs=1, batch_size=6), net)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("report", ["last", "best"])
def test_an_interrupted_call_resumes(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Literal["last", "best"]
) -> None:
    options, state_file = LoDiscOptions(epochs=3, batch_size=6, report=report), tmp_path / "state.pt"
    expected = probe(drawn, options)
    real, epochs = linear_sgd.train_epoch, []

    def interrupted(*args: Any) -> float:
        if len(epochs) == 2:
            raise KeyboardInterrupt
        epochs.append(1)
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(linear_sgd, "train_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            probe(drawn, options, state_file=state_file)
    assert state_file.is_file()
    epochs.clear()
    monkeypatch.setattr(linear_sgd, "train_epoch", lambda *args: epochs.append(1) or real(*args))
    resumed = probe(drawn, options, state_file=state_file)
    assert len(epochs) == 1
    assert torch.equal(resumed.logits, expected.logits)
    assert resumed.epoch == expected.epoch
    epochs.clear()
    probe(drawn, replace(options, lr=0.1), state_file=state_file)  # the state of other options is ignored
    assert len(epochs) == 3


def test_top_5_counts_the_five_largest_logits() -> None:
    logits = torch.arange(7.0).expand(4, 7)
    assert SGDProbe(logits, torch.tensor([6, 2, 1, 0]), 1).top5() == 0.5
    assert SGDProbe(logits[:, :3], torch.tensor([0, 1, 2, 2]), 1).top5() == 1


def test_a_loss_that_is_not_finite_is_refused(drawn: Path) -> None:
    with pytest.raises(UserError, match="not finite after epoch 1 of the linear probe: lower --lr"):
        probe(drawn, LCROptions(epochs=2, batch_size=6, lr=1e38, augment=False, normalise=False))
