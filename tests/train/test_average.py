"""What is evaluated in place of the trained weights: their moving average, and statistics of clean images."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fgfast.data.splits import training_images
from fgfast.methods.base import method_class
from fgfast.methods.lcr import LCR, LCRConfig
from fgfast.methods.run_folder import load_run_encoder
from fgfast.models.rationale import RationaleEncoder
from fgfast.ranks import Ranks
from fgfast.run import load_checkpoint
from fgfast.train.average import WeightAverage, take_clean_statistics
from fgfast.train.loop import pretrain
from tests.conftest import TINY
from tests.train.short_runs import simclr_config, statistics

CPU = torch.device("cpu")


def test_the_average_follows_its_recurrence() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(net, 0.9)
    expected = net[0].weight.detach().clone()
    for _ in range(3):
        with torch.no_grad():
            net[0].weight.add_(1)
        average.update()
        expected = 0.9 * expected + 0.1 * net[0].weight.detach()
    own = net[0].weight.detach().clone()
    with average.in_use():
        torch.testing.assert_close(net[0].weight.detach(), expected)
    assert torch.equal(net[0].weight, own)


def test_the_average_is_what_is_evaluated_and_exported(drawn: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", average=0.9))
    state = load_checkpoint(run / "last.pt", "simclr")
    net = load_run_encoder(run, "last", CPU)[0].net
    name = "conv1.0.weight"
    assert torch.equal(net.state_dict()[name], state["average"][name])
    assert not torch.equal(state["method"][f"encoder.net.{name}"], state["average"][name])
    from safetensors.torch import load_file

    assert torch.equal(load_file(run / "encoder.safetensors")[name], state["average"][name])


def test_the_average_is_what_lcr_evaluates() -> None:
    method = LCR(LCRConfig(model=TINY, size=64, base="byol", hidden=16, projection=8))
    average = {name: x + 1 for name, x in method.encoder.net.state_dict().items()}
    checkpoint = {"name": "lcr", "step": 1, "method": method.state_dict(), "average": average}
    stored = method.stored_encoder(method.config, checkpoint)
    torch.testing.assert_close(stored.net.state_dict(), average)


def test_clean_statistics_of_single_images_change_nothing(drawn: Path, tmp_path: Path) -> None:
    config = simclr_config(drawn, tmp_path / "run", clean_stats=3)
    encoder = method_class("simclr")(config).encoder
    before = {name: x.clone() for name, x in statistics(encoder.net).items()}
    assert take_clean_statistics(encoder, training_images(config)[0], replace(config, batch_size=1), Ranks()) == 0
    assert all(torch.equal(x, before[name]) for name, x in statistics(encoder.net).items())


@pytest.mark.parametrize("weighted", [True, False])
def test_clean_statistics_of_attention_are_new_only_where_it_is_used(
    weighted: bool, drawn: Path, tmp_path: Path
) -> None:
    encoder = RationaleEncoder(TINY, size=64, weighted=weighted)
    norm = encoder.rationale[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean.fill_(9.0)
    config = simclr_config(drawn, tmp_path / "run", clean_stats=4, size=64)
    assert take_clean_statistics(encoder, training_images(config)[0], config, Ranks()) > 0
    assert bool((norm.running_mean == 9.0).all()) != weighted
    assert bool(norm.running_mean.any())


def test_clean_statistics_are_those_of_whole_images(drawn: Path, tmp_path: Path) -> None:
    run = pretrain("simclr", simclr_config(drawn, tmp_path / "run", clean_stats=12, batch_size=6))
    encoder, config = load_run_encoder(run, "last", CPU)
    found = {name: x.clone() for name, x in statistics(encoder.net).items()}
    assert take_clean_statistics(encoder, training_images(config)[0], config, Ranks()) > 0
    for name, value in statistics(encoder.net).items():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-5)
    first = next(m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))
    assert first.momentum == 0.1
    assert not first.training
