"""Features of a set: order, broken images, mode of the network, and part features."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fgfast.data.layouts import ImageSet, open_images
from fgfast.errors import UserError
from fgfast.evaluate.features import PartFeatures, extract
from fgfast.evaluate.protocols import online_knn
from fgfast.methods.color import Color, ColorConfig
from fgfast.models.backbone import Backbone
from tests.conftest import TINY


@pytest.fixture(scope="module")
def greys(tmp_path_factory) -> ImageSet:
    """Twenty-three flat images in two classes; the grey level of image i is 10 i."""
    root = tmp_path_factory.mktemp("greys")
    for i in range(23):
        folder = root / ("a" if i < 15 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 30), (10 * i,) * 3).save(folder / f"{i:02d}.png")
    return open_images(root)


@pytest.fixture(autouse=True)
def separate_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FGFAST_CACHE", str(tmp_path / "cache"))


class Mean(torch.nn.Module):
    """The mean colour of an image; records the mode in which it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.modes: set[bool] = set()

    def forward(self, x):
        self.modes.add(self.training)
        return x.mean(dim=(2, 3))


@pytest.mark.parametrize("loader", ["auto", "torchvision"])
def test_rows_have_the_order_of_the_set_and_no_padding(greys, loader):
    features, targets = extract(Mean(), greys, 16, batch_size=5, threads=1, loader=loader)
    assert (features.shape, features.dtype, targets.dtype) == ((23, 3), torch.float32, torch.int64)
    assert np.array_equal(targets.numpy(), greys.targets)
    assert (features[:, 0].diff() > 0).all()


def test_the_network_runs_in_evaluation_mode_and_returns_to_its_own(greys):
    encoder = Mean().train()
    extract(encoder, greys, 16, threads=1)
    assert encoder.modes == {False}
    assert encoder.training
    assert not extract(encoder.eval(), greys, 16, threads=1)[0].requires_grad
    assert not encoder.training
    partly = torch.nn.Sequential(encoder, torch.nn.Identity()).train()
    encoder.eval()  # a part that is frozen
    extract(partly, greys, 16, threads=1)
    assert [module.training for module in partly.modules()] == [True, False, True]


def test_a_broken_image_has_no_row(greys, tmp_path):
    for path in greys.paths:
        copy = tmp_path / "set" / path
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((greys.root / path).read_bytes())
    (tmp_path / "set" / greys.paths[4]).write_bytes(b"no image")
    images = replace(greys, root=tmp_path / "set")
    features, targets = extract(Mean(), images, 16, batch_size=5, threads=1)
    expected, _ = extract(Mean(), greys, 16, batch_size=5, threads=1)
    readable = [i for i in range(23) if i != 4]
    assert torch.allclose(features, expected[readable])
    assert np.array_equal(targets.numpy(), greys.targets[readable])


def test_features_that_are_not_finite_are_refused(greys):
    with pytest.raises(UserError, match="not finite"):
        extract(lambda x: x.mean(dim=(2, 3)) / 0, greys, 16, threads=1)


def test_part_features_are_concatenated_means_over_each_part():
    """They equal means of the feature map; an absent part is zero, and -1 is no part."""
    torch.manual_seed(0)
    encoder = Backbone("test_resnet", size=32, args={"output_stride": 8}).eval()
    images, labels = torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), -1)
    labels[:, :16], labels[1, 16:, 16:] = 2, 0  # complete cells of the 4 x 4 map
    with torch.no_grad():
        pooled = PartFeatures(encoder, 3)(images, labels).view(2, 3, -1)
        features = encoder.to_map(encoder.features(images), (32, 32))
    assert features.shape[-2:] == (4, 4)
    torch.testing.assert_close(pooled[:, 2], features[:, :, :2].mean((2, 3)))
    torch.testing.assert_close(pooled[1, 0], features[1, :, 2:, 2:].mean((1, 2)))
    assert not pooled[0, 0].any()
    assert not pooled[:, 1].any()


def _lose_images(root, data):
    """A copy of a set without one test image of its lists, and with another one cut."""
    shutil.copytree(data, root)
    images = open_images(root)
    test = [file for file, train in zip(images.files(), images.train, strict=True) if not train]
    Path(test[0]).unlink()
    Path(test[1]).write_bytes(Path(test[1]).read_bytes()[:50])
    return root, len(test)


def test_lost_images_are_left_out_of_scores_in_training_and_refused_in_eval(drawn, tmp_path):
    """A vanished and a cut test image end no run, and no score of fgfast eval is of fewer images."""
    data, n_test = _lose_images(tmp_path / "set", drawn)
    images = open_images(data).test_set()
    with pytest.raises(UserError, match="is listed but missing"):
        extract(Mean(), images, 16, threads=1)
    assert len(extract(Mean(), images, 16, threads=1, lenient=True)[0]) == n_test - 2
    config = ColorConfig(data=str(data), model=TINY, size=32, hidden=8, batch_size=8, threads=1, amp="off")
    method = Color(config)
    state = torch.get_rng_state()
    assert 0 <= online_knn(method.encoder, config, torch.device("cpu")) <= 1
    assert 0 <= method.scores(torch.device("cpu"))["held_out_accuracy"] <= 1
    assert torch.equal(torch.get_rng_state(), state)
    assert method.training


def test_a_set_that_is_gone_ends_no_run(tmp_path, caplog):
    """The scores are left out, with one line however often they are asked for."""
    config = ColorConfig(data=str(tmp_path / "gone"), model=TINY, size=32, hidden=8, threads=1)
    method = Color(config)
    for _ in range(2):
        assert online_knn(method.encoder, config, torch.device("cpu")) is None
        assert method.scores(torch.device("cpu")) == {}
    assert [r.message.partition(":")[0] for r in caplog.records] == [
        "The online kNN is left out", "The online scores of color are left out",
    ]  # fmt: skip
