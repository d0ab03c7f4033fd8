"""Colourisation: loss, input of the encoder, learning, resuming and evaluation."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgfast.data.imageset import ImageSet
from fgfast.data.layouts import open_images
from fgfast.data.normalise import IMAGENET_MEAN, IMAGENET_STD
from fgfast.data.views import Batch
from fgfast.evaluate.protocols import evaluate
from fgfast.methods.ab_classes import rebalancing_weights
from fgfast.methods.color import Color, ColorConfig
from fgfast.methods.run_folder import load_run_encoder
from fgfast.train.log import read_metrics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.methods.common_checks import check_exact_resume, check_padding

NETS = {"cnn": (TINY, "output_stride=8"), "vit": ("test_vit", "patch_size=8")}


def config_for(net: str = "cnn", **values: object) -> ColorConfig:
    model, args = NETS[net]
    return replace(
        ColorConfig(
            model=model, model_args=args, size=32, batch_size=6, epochs=1, log_every=1, knn_every=0, hidden=16,
            device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def normalised(values: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (values - mean) / std


def batch_of(n: int = 4, side: int = 32) -> Batch:
    g = torch.Generator().manual_seed(0)
    return Batch(
        views=[normalised(torch.rand(n, 3, side, side, generator=g))], index=torch.arange(n),
        target=torch.zeros(n, dtype=torch.int64), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


def test_learns_colours(drawn: Path, tmp_path: Path) -> None:
    """The loss falls on 18 images, held-out accuracy is logged, the prior is stored, evaluation sees grey images."""
    run = tmp_path / "run"
    config = config_for(data=str(drawn), out=str(run), epochs=8, lr=0.02, knn_every=8, uniform=1.0)
    pretrain("color", config)  # equal weights: with few images the weighted loss is noisy
    rows, _ = read_metrics(run / "metrics.jsonl")
    losses = [r["loss"] for r in rows if "loss" in r]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert 0 <= rows[-1]["held_out_accuracy"] <= 1
    stored = json.loads((run / "colours.json").read_text())
    assert (stored["pictures"], sum(stored["prior"])) == (18, pytest.approx(1))
    assert 0 <= evaluate(run, "linear", drawn, device=torch.device("cpu")).top1 <= 1
    assert load_run_encoder(run, "last", torch.device("cpu"))[0].grey


def test_resumed_run_equals_an_uninterrupted_one(drawn: Path, tmp_path: Path) -> None:
    check_exact_resume("color", config_for(data=str(drawn), epochs=2), tmp_path, stop_after=2)


def test_the_prior_is_measured_once(drawn: Path, tmp_path: Path) -> None:
    """A second call reads the file; another size or number of images measures again; the weights follow the prior."""
    images, measured = open_images(drawn).train_set(), []

    class Counting(Color):
        def measure_prior(self, images: ImageSet) -> torch.Tensor:
            measured.append(len(images))
            return super().measure_prior(images)

    for config in (config_for(), config_for(), config_for(size=48), config_for(size=48, prior_pictures=5)):
        method = Counting(config)
        assert method.prepare(images, tmp_path, 0) is None
    assert measured == [18, 18, 5]
    prior = torch.tensor(json.loads((tmp_path / "colours.json").read_text())["prior"], dtype=torch.float64)
    torch.testing.assert_close(method.weights, rebalancing_weights(prior).float())


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edited(content: bytes) -> bytes:
        stored = json.loads(content)
        change(stored)
        return json.dumps(stored).encode()

    return edited


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:100], lambda content: b"[]", lambda content: b"[" * 100_000,
        edit(lambda stored: stored["prior"].__setitem__(0, stored["prior"][0] + 1e-9)),
        edit(lambda stored: stored["prior"].pop()), edit(lambda stored: stored.update(images="others")),
        edit(lambda stored: stored.pop("images")),
    ],
    ids=["cut", "a list", "deep", "another value", "too short", "other images", "no images"],
)  # fmt: skip
def test_a_prior_that_was_changed_is_measured_again(
    drawn: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """Whatever happens to the file, a resumed run has the weights with which it began."""
    images, method = open_images(drawn).train_set(), Color(config_for())
    method.prepare(images, tmp_path, 0)
    weights, file = method.weights, tmp_path / "colours.json"
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    method.weights = torch.ones(309)
    method.prepare(images, tmp_path, 0)
    assert torch.equal(method.weights, weights)
    assert file.read_bytes() == whole


@pytest.mark.parametrize("net", NETS)
def test_loss_is_that_of_the_paper(net: str) -> None:
    """It is the weighted cross-entropy of dense soft labels, averaged over positions."""
    torch.manual_seed(0)
    method, batch = Color(config_for(net)).eval(), batch_of()
    method.weights = torch.rand(309) + 0.5
    batch.valid[1] = False
    log_p = method.logits(batch.views[0]).log_softmax(-1)  # [4, 8, 8, Q]
    index, soft = method.classes.encode(method.colours(batch.views[0]))
    dense = torch.zeros(4 * 64, 309).scatter_(1, index, soft).view(4, 8, 8, 309)
    each = -(dense * log_p).sum(-1) * method.weights[dense.argmax(-1)]
    out = method(batch)
    torch.testing.assert_close(out["loss"], each[batch.valid].mean())
    correct = (log_p.argmax(-1) == dense.argmax(-1))[batch.valid]
    torch.testing.assert_close(out["accuracy"], correct.float().mean())


def test_colours_are_means_of_the_pixels() -> None:
    """An image of four flat quarters has the ab of each in its quarter."""
    from fgfast.data.lab import rgb_to_lab

    quarters = torch.rand(1, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    ab = Color(config_for()).colours(normalised(quarters.repeat_interleave(16, 2).repeat_interleave(16, 3)))
    expected = rgb_to_lab(quarters)[:, 1:].repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(ab.view(1, 8, 8, 2).permute(0, 3, 1, 2), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("net", NETS)
def test_the_encoder_is_blind_to_colour(net: str) -> None:
    """Images of equal lightness have equal features; every weight of the encoder gets a gradient."""
    from fgfast.data.lab import lab_to_rgb

    torch.manual_seed(0)
    method = Color(config_for(net)).eval()
    lab = torch.cat([50 + 10 * torch.rand(1, 1, 32, 32), torch.zeros(1, 2, 32, 32)], 1).repeat(2, 1, 1, 1)
    lab[1, 1:] = torch.tensor([20.0, -10.0]).view(2, 1, 1)
    grey, tinted = normalised(lab_to_rgb(lab)).split(1)
    with torch.no_grad():
        torch.testing.assert_close(method.encoder(grey), method.encoder(tinted), rtol=1e-3, atol=1e-3)
    method(batch_of())["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_padded_images_have_no_effect() -> None:
    check_padding(Color(config_for()), batch_of())


def test_pictures_show_colours() -> None:
    """Each row has the grey, the predicted and the true image; correct predictions give the true one up to the bins."""
    method, batch = Color(config_for()), batch_of()
    batch.views[0][:] = normalised(torch.tensor([0.7, 0.5, 0.4]).view(3, 1, 1))
    index = method.classes.encode(method.colours(batch.views[0]))[0][:, 0]
    logits = 100 * torch.nn.functional.one_hot(index, 309).float().view(4, 8, 8, 309)
    method.logits = lambda images: logits  # type: ignore[method-assign]
    rows = method.pictures(batch)["colours"]
    assert [p.caption for p in rows[0]] == ["grey", "predicted colours", "image"]
    grey, colours, truth = (p.image.astype(int) for p in rows[0])
    assert (grey == grey[:1, :1, :1]).all()
    assert np.abs(colours - truth).max() < 25 < np.abs(grey - truth).max()
