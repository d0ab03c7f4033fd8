"""Fine-tuning: which weights move, what an interrupted call goes on from, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fgfast.config import TrainConfig
from fgfast.data.layouts import open_images
from fgfast.errors import UserError
from fgfast.evaluate import finetune as module
from fgfast.evaluate.finetune import FinetuneOptions, finetune, stages_of, unfreeze
from fgfast.models.backbone import Backbone
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = TrainConfig(size=32, threads=1, amp="off")


def encoder(name: str = TINY) -> Backbone:
    torch.manual_seed(0)
    return Backbone(name, size=32)


def tune(drawn: Path, net: Backbone, keep: Path | None = None, **values: Any) -> np.ndarray:
    images = open_images(drawn)
    options = FinetuneOptions(**{"epochs": 1, "lr": 1e-2, "batch_size": 6} | values)
    predicted, truth = finetune(
        net, images.train_set(), images.test_set(), CONFIG, options, device=CPU, keep=keep, start="one"
    )
    assert torch.equal(truth, torch.from_numpy(images.test_set().targets))
    return predicted.numpy()


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        (TINY, 4, "layer1.", "layer4."),
        ("resnet18", 4, "layer1.", "layer4."),
        ("test_vit", 6, "blocks.0.", "norm."),  # the norm behind the blocks moves with the last one
        ("convnext_atto", 4, "stages.0.", "head.norm."),  # timm's patterns do not name this one
        ("mobilenetv3_small_050", 6, "blocks.0.", "conv_head."),
        ("swin_tiny_patch4_window7_224", 4, "layers.0.", "norm."),
    ],
)
def test_stages_of_networks(name: str, count: int, first: str, last: str) -> None:
    import timm

    net = timm.create_model(name, num_classes=0)
    groups = stages_of(net)
    assert len(groups) == count + 1
    assert groups[1][0].startswith(first)
    assert groups[-1][-1].startswith(last)
    assert sorted(name for group in groups for name in group) == sorted(name for name, _ in net.named_parameters())


@pytest.mark.parametrize(
    ("name", "stages", "moving"),
    [
        (TINY, "0", ()), (TINY, "1", ("layer4",)), (TINY, "2", ("layer3", "layer4")),
        (TINY, "all", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("test_vit", "1", ("blocks.5", "norm")),
    ],
)  # fmt: skip
def test_frozen_stages_stay_bit_identical(drawn: Path, name: str, stages: str, moving: tuple[str, ...]) -> None:
    """Weights and BatchNorm's statistics of frozen stages are what they were; every trained tensor has moved."""
    net = encoder(name)
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    tune(drawn, net, stages=stages)
    for key, value in net.net.state_dict().items():
        trains = key.startswith(tuple(f"{m}." for m in moving))
        assert torch.equal(value, before[key]) != trains, key


def test_modules_behind_a_trained_stage_are_in_training_mode() -> None:
    """Dropout and drop path follow their stage."""
    net = Backbone("test_vit", size=32, args={"drop_path_rate": 0.5, "proj_drop_rate": 0.5})
    unfreeze(net, "1")
    drops = {n: m.training for n, m in net.net.named_modules() if "drop" in n and n.startswith("blocks.")}
    assert drops
    assert all(training == name.startswith("blocks.5.") for name, training in drops.items())


@pytest.mark.parametrize("stages", ["5", "99", "-1", "two", ""])
def test_a_number_of_stages_that_is_not_there_is_one_sentence(stages: str) -> None:
    with pytest.raises(UserError, match=r"test_resnet has 4 stages"):
        unfreeze(encoder(), stages)


def test_it_learns(drawn: Path) -> None:
    """On its own training images the whole network does far better than chance (3 classes)."""
    images = open_images(drawn).train_set()
    options = FinetuneOptions(stages="all", epochs=12, lr=3e-3, batch_size=6)
    predicted, truth = finetune(encoder(), images, images, CONFIG, options, device=CPU)
    assert (predicted == truth).float().mean() > 0.6


def test_an_interrupted_call_goes_on_exactly(drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the third epoch: the second call does the third alone, and ends with the weights of an unbroken one."""
    whole = encoder()
    expected = tune(drawn, whole, epochs=3, stages="2")
    epochs: list[int] = []
    real = module._epoch

    def killed(*args: Any) -> float:
        epochs.append(1)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_epoch", killed)
    keep = tmp_path / "keep.pt"
    with pytest.raises(KeyboardInterrupt):
        tune(drawn, encoder(), keep, epochs=3, stages="2")
    assert keep.is_file()
    again = encoder()
    assert np.array_equal(tune(drawn, again, keep, epochs=3, stages="2"), expected)
    assert len(epochs) == 4
    assert not keep.exists()
    for key, value in again.net.state_dict().items():
        assert torch.equal(value, whole.net.state_dict()[key]), key


def test_a_kept_state_of_other_options_is_not_taken_up(
    drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "keep.pt"
    real = module._epoch
    calls: list[int] = []

    def killed(*args: Any) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(module, "_epoch", killed)
    with pytest.raises(KeyboardInterrupt):
        tune(drawn, encoder(), keep, epochs=2)
    tune(drawn, encoder(), keep, epochs=2, lr=1e-3)
    assert len(calls) == 4


def test_a_loss_that_is_not_finite_is_named(drawn: Path) -> None:
    net = encoder()
    torch.nn.init.constant_(next(net.net.parameters()), float("nan"))
    with pytest.raises(UserError, match="not finite after epoch 1"):
        tune(drawn, net)
