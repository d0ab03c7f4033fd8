"""Fine-tuning: which weights are trained, resuming, and errors."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from fgfast.config import TrainConfig
from fgfast.data.layouts import open_images
from fgfast.data.loader import Loader
from fgfast.errors import UserError
from fgfast.evaluate.finetune import FinetuneOptions, finetune
from fgfast.evaluate.resume import Progress
from fgfast.models.backbone import Backbone
from fgfast.models.stages import stages_of, unfreeze
from fgfast.run import save_checkpoint
from tests.conftest import TINY

CPU = torch.device("cpu")
CONFIG = TrainConfig(size=32, threads=1, amp="off")


def encoder(name: str = TINY) -> Backbone:
    torch.manual_seed(0)
    return Backbone(name, size=32)


def tune(drawn: Path, net: Backbone, state_file: Path | None = None, **values: Any) -> np.ndarray:
    images = open_images(drawn)
    options = FinetuneOptions(**{"epochs": 1, "lr": 1e-2, "batch_size": 6} | values)
    predicted, truth = finetune(
        net, images.train_set(), images.test_set(), CONFIG, options, device=CPU, state_file=state_file, start="one"
    )
    assert torch.equal(truth, torch.from_numpy(images.test_set().targets))
    return predicted.numpy()


@pytest.mark.parametrize(
    ("name", "count", "first", "last"),
    [
        (TINY, 4, "layer1.", "layer4."),
        ("resnet18", 4, "layer1.", "layer4."),
        ("test_vit", 6, "blocks.0.", "norm."),  # the final norm belongs to the last block
        ("convnext_atto", 4, "stages.0.", "head.norm."),  # timm has no pattern for this one
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
    ("name", "stages", "trained"),
    [
        (TINY, "0", ()), (TINY, "1", ("layer4",)), (TINY, "2", ("layer3", "layer4")),
        (TINY, "all", ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")),
        ("test_vit", "1", ("blocks.5", "norm")),
    ],
)  # fmt: skip
def test_frozen_stages_do_not_change(drawn: Path, name: str, stages: str, trained: tuple[str, ...]) -> None:
    """Weights and BatchNorm statistics of frozen stages are equal before and after; all other tensors change."""
    net = encoder(name)
    before = {k: v.clone() for k, v in net.net.state_dict().items()}
    tune(drawn, net, stages=stages)
    for key, value in net.net.state_dict().items():
        is_trained = key.startswith(tuple(f"{stage}." for stage in trained))
        assert torch.equal(value, before[key]) != is_trained, key


def test_dropout_of_a_trained_stage_is_in_training_mode() -> None:
    """Dropout and drop path have the mode of their stage."""
    net = Backbone("test_vit", size=32, args={"drop_path_rate": 0.5, "proj_drop_rate": 0.5})
    unfreeze(net, "1")
    drops = {n: m.training for n, m in net.net.named_modules() if "drop" in n and n.startswith("blocks.")}
    assert drops
    assert all(training == name.startswith("blocks.5.") for name, training in drops.items())


@pytest.mark.parametrize("stages", ["5", "99", "-1", "two", ""])
def test_an_impossible_number_of_stages_is_refused(stages: str) -> None:
    with pytest.raises(UserError, match=r"test_resnet has 4 stages"):
        unfreeze(encoder(), stages)


def test_it_learns(drawn: Path) -> None:
    """On its training images the fine-tuned network is far better than chance (3 classes)."""
    images = open_images(drawn).train_set()
    options = FinetuneOptions(stages="all", epochs=12, lr=3e-3, batch_size=6)
    predicted, truth = finetune(encoder(), images, images, CONFIG, options, device=CPU)
    assert (predicted == truth).float().mean() > 0.6


STEPS = 3  # per epoch: 18 images in batches of 6


def interrupted_tune(drawn: Path, state_file: Path, after: int, **values: Any) -> None:
    """Fine-tune and interrupt the call after some steps."""
    net = encoder()
    steps: list[int] = []

    def count(*_: object) -> None:
        if len(steps) == after:
            raise KeyboardInterrupt
        steps.append(1)

    net.register_forward_pre_hook(count)
    with pytest.raises(KeyboardInterrupt):
        tune(drawn, net, state_file, **values)


def count_steps(net: Backbone) -> list[int]:
    """A list that grows with each training step of the network."""
    steps: list[int] = []
    net.register_forward_hook(lambda *_: steps.append(1) if torch.is_grad_enabled() else None)
    return steps


def test_an_interrupted_call_resumes(drawn: Path, tmp_path: Path) -> None:
    """After an interruption in the third epoch only that one is repeated, and the weights are the same."""
    uninterrupted, resumed, state_file = encoder(), encoder(), tmp_path / "state.pt"
    expected = tune(drawn, uninterrupted, epochs=3, stages="2")
    interrupted_tune(drawn, state_file, after=2 * STEPS, epochs=3, stages="2")
    assert state_file.is_file()
    steps = count_steps(resumed)
    assert np.array_equal(tune(drawn, resumed, state_file, epochs=3, stages="2"), expected)
    assert len(steps) == STEPS
    for key, value in resumed.net.state_dict().items():
        assert torch.equal(value, uninterrupted.net.state_dict()[key]), key


def test_the_state_of_other_options_is_ignored(drawn: Path, tmp_path: Path) -> None:
    net, state_file = encoder(), tmp_path / "state.pt"
    interrupted_tune(drawn, state_file, after=STEPS, epochs=2)
    assert state_file.is_file()
    steps = count_steps(net)
    tune(drawn, net, state_file, epochs=2, lr=1e-3)
    assert len(steps) == 2 * STEPS


def test_a_damaged_state_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state_file = tmp_path / "state.pt"
    save_checkpoint(state_file, {"what": {}, "epoch": 3})
    state_file.write_bytes(state_file.read_bytes()[:-100])
    net = torch.nn.Linear(1, 1)
    progress = Progress(state_file, {}, net, torch.optim.Adam(net.parameters()), cast(Loader, None))
    assert progress.load()["epoch"] == 0
    assert caplog.messages == [f"{state_file} is cut or damaged: training starts from the beginning."]


def test_a_loss_that_is_not_finite_is_refused(drawn: Path) -> None:
    net = encoder()
    torch.nn.init.constant_(next(net.net.parameters()), float("nan"))
    with pytest.raises(UserError, match="not finite after epoch 1"):
        tune(drawn, net)
