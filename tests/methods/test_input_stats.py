"""Input statistics of configurations and of methods: whose they are, and that everything that sees images follows."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fgfast.config import TrainConfig
from fgfast.data.lab import lightness
from fgfast.data.layouts import open_images
from fgfast.data.normalise import IMAGENET, InputStats, denormalise, normalise
from fgfast.data.panels import to_pixels
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.evaluate.features import PartFeatures, extract, stats_of
from fgfast.methods.base import Method
from fgfast.methods.color import Color
from fgfast.methods.input_stats import input_stats
from fgfast.methods.jigsaw import Jigsaw
from fgfast.methods.run_folder import resolve_stats
from fgfast.methods.srgan import SRGAN, load_perceptual_network
from fgfast.models.backbone import Backbone
from fgfast.parts.clustering import ClusteringConfig
from fgfast.parts.clusters import Clusters
from fgfast.parts.sources import DiscoveryConfig
from fgfast.run import save_encoder
from tests.conftest import TINY
from tests.methods.method_cases import CASES, IMAGES, build, joined_batch

HALF = InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
UNEVEN = InputStats((0.1, 0.5, 0.9), (0.2, 0.4, 1.5), "bicubic")
LITE = "tf_efficientnet_lite0"


def test_random_weights_get_imagenets_whatever_the_network() -> None:
    assert input_stats(TrainConfig(model=LITE)) == IMAGENET
    config, note = resolve_stats(TrainConfig(model=LITE))
    assert (config.mean, config.std, config.interpolation) == ("0.485,0.456,0.406", "0.229,0.224,0.225", "bilinear")
    assert note == ""


@pytest.mark.parametrize(
    ("model", "args", "stats", "whose"),
    [
        (LITE, "", HALF, "tf_efficientnet_lite0.in1k"),
        ("resnet18", "", IMAGENET._replace(interpolation="bicubic"), "resnet18.a1_in1k"),
        ("vit_small_patch16_224", "", HALF, "augreg_in21k_ft_in1k"),
        ("vit_small_patch16_224.dino", "", IMAGENET._replace(interpolation="bicubic"), "dino"),
        ("vit_small_patch16_224", "pretrained_cfg='dino'", IMAGENET._replace(interpolation="bicubic"), "dino"),
    ],
)
def test_timms_weights_bring_timms(model: str, args: str, stats: InputStats, whose: str) -> None:
    config = TrainConfig(model=model, model_args=args, init="timm")
    assert input_stats(config) == stats
    resolved, note = resolve_stats(config)
    assert input_stats(resolved) == stats
    assert note == f"input statistics: {stats} (timm's {whose if '.' in whose else f'{model[:21]}.{whose}'} has them)"


def test_weights_with_imagenets_statistics_need_no_line() -> None:
    assert resolve_stats(TrainConfig(model="vgg19", init="timm"))[1] == ""


def test_an_export_brings_its_own_and_another_file_those_of_its_network(tmp_path: Path) -> None:
    net = Backbone("test_vit", size=32).net
    save_encoder(tmp_path / "w.safetensors", net, "test_vit", stats=UNEVEN)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    named, other = (TrainConfig(model="test_vit", init=str(tmp_path / name)) for name in ("w.safetensors", "w.pth"))
    assert input_stats(named) == UNEVEN
    assert input_stats(other) == HALF
    assert resolve_stats(named)[1].endswith("w.safetensors names them)")
    assert resolve_stats(other)[1].endswith("w.pth names none and timm's test_vit.r160_in1k has them)")


def test_options_come_before_the_weights_and_the_log_says_so() -> None:
    config = TrainConfig(model=LITE, init="timm", mean="0, .25,1")
    assert input_stats(config) == HALF._replace(mean=(0.0, 0.25, 1.0))
    resolved, note = resolve_stats(config)
    assert resolved.mean == "0.0,0.25,1.0"
    assert "as given: mean 0,0.25,1, std 0.5,0.5,0.5, bicubic, where the weights had mean 0.5,0.5,0.5" in note
    assert resolve_stats(TrainConfig(model=LITE, mean="0,0,0"))[1] == ""  # random weights had none


@pytest.mark.parametrize("given", [{"mean": "1"}, {"std": "1,1,0"}, {"interpolation": "area"}])
def test_impossible_options_are_refused_before_weights_are_read(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--(mean|std|interpolation)"):
        input_stats(TrainConfig(model=LITE, init="timm", **given))


def build_with(case: str, stats: InputStats, monkeypatch: pytest.MonkeyPatch) -> Method:
    """The method of a case for images with other statistics."""
    monkeypatch.setitem(CASES, case, CASES[case] | stats.texts())
    return build(case).eval()


def batch_of(pixels: dict[str, Any], step: int, stats: InputStats) -> Batch:
    """A batch with the given pixels in [0, 1] in its views and its full images."""
    batch = joined_batch(step, len(pixels["views"]) - 2)
    batch.views = [normalise(x, stats) for x in pixels["views"]]
    batch.whole = normalise(pixels["whole"], stats)
    return batch


def draw_pixels(method: Method) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    sides = [crop.size for crop in method.views().crops] or [32]
    sides += [32] * (2 - len(sides))
    return {
        "views": [torch.rand(IMAGES, 3, s, s, generator=g) for s in sides],
        "whole": torch.rand(IMAGES, 3, 64, 64, generator=g),
    }


@pytest.mark.parametrize("case", CASES)
def test_views_and_figures_of_a_method_follow(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loaders get its statistics, and every row of its figures shows an image in its own colours."""
    method = build_with(case, UNEVEN, monkeypatch)
    assert method.encoder.stats == UNEVEN
    assert method.normalised_views() == method.views().with_stats(UNEVEN)
    pixels = draw_pixels(method)
    batch = batch_of(pixels, 0, UNEVEN)
    assert batch.patch is not None
    with torch.no_grad():
        figures = method.pictures(batch)
    images = [to_pixels(x) for images in (*pixels["views"], pixels["whole"], batch.patch) for x in images]
    for title, rows in figures.items():
        for row in rows:
            panels = [panel.image.astype(int) for panel in row]
            assert any(x.shape == y.shape and np.abs(x - y).max() <= 1 for x in panels for y in images), title


def test_a_grey_network_sees_the_lightness_under_any_statistics() -> None:
    plain = Backbone(TINY, size=32, stats=UNEVEN).eval()
    grey = Backbone(TINY, size=32, stats=UNEVEN, grey=True).eval()
    grey.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    seen = normalise((lightness(x) / 100).expand(-1, 3, -1, -1), UNEVEN)
    with torch.no_grad():
        torch.testing.assert_close(grey(normalise(x, UNEVEN)), plain(seen), rtol=1e-4, atol=1e-5)


def test_puzzles_and_colours_are_those_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jigsaw's brightness and the target colours of colourisation do not depend on the statistics."""
    puzzles, colours = [], []
    for stats in (IMAGENET, UNEVEN):
        jigsaw, color = (build_with(case, stats, monkeypatch) for case in ("jigsaw", "color"))
        assert isinstance(jigsaw, Jigsaw)
        assert isinstance(color, Color)
        batch = batch_of(draw_pixels(jigsaw), 0, stats)
        tiles, label = jigsaw.puzzles(batch)
        puzzles.append((denormalise(tiles, stats), label))
        colours.append(color.colours(batch.views[0]))
    assert torch.equal(puzzles[0][1], puzzles[1][1])
    torch.testing.assert_close(puzzles[0][0], puzzles[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(colours[0], colours[1], rtol=1e-3, atol=1e-3)  # units of Lab, of about 100


def test_networks_of_srgan_see_values_from_0_to_1(monkeypatch: pytest.MonkeyPatch) -> None:
    x, features = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), []
    for stats in (IMAGENET, UNEVEN):
        method = build_with("srgan", stats, monkeypatch)
        assert isinstance(method, SRGAN)
        with torch.no_grad():
            features.append(method.encoder(normalise(x, stats)))
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-5)


def test_a_perceptual_network_keeps_its_own(tmp_path: Path) -> None:
    """Those of the weights that it is given, whatever the run has."""
    save_encoder(tmp_path / "w.safetensors", Backbone(TINY, size=32).net, TINY, stats=UNEVEN)
    assert load_perceptual_network(f"{TINY}={tmp_path / 'w.safetensors'}", 32).stats == UNEVEN
    torch.save(Backbone(TINY, size=32).net.state_dict(), tmp_path / "w.pth")
    assert load_perceptual_network(f"{TINY}={tmp_path / 'w.pth'}", 32).stats == HALF._replace(interpolation="bilinear")


def test_features_find_the_statistics_inside_a_module() -> None:
    backbone = Backbone(TINY, size=32, stats=UNEVEN)
    for module in (backbone, torch.nn.Sequential(backbone, torch.nn.Linear(2, 2)), PartFeatures(backbone, 3)):
        assert stats_of(module) == UNEVEN
    assert stats_of(torch.nn.Identity()) == stats_of(lambda x: x) == IMAGENET


def test_parts_of_other_statistics_are_of_another_origin(drawn: Path) -> None:
    """Maps that were found with ImageNet's keep the digest that they had before there were others."""
    images, config = open_images(drawn), DiscoveryConfig(image_size=32, map_size=8, run="r")
    encoder, digests = Backbone(TINY, size=32, args={"output_stride": 8}), []
    for stats in (IMAGENET, HALF, UNEVEN, IMAGENET):
        encoder.stats = stats
        digests.append(Clusters(encoder, ClusteringConfig(n_parts=3), config).origin(images).digest)
    assert digests[0] == digests[3]
    assert len(set(digests)) == 3


@pytest.fixture(scope="module")
def lite() -> Backbone:
    """EfficientNet-Lite with random weights, for images as its pretrained weights want them."""
    torch.manual_seed(0)
    return Backbone(LITE, size=64, stats=input_stats(TrainConfig(model=LITE, init="timm"))).eval()


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    """A folder with one smooth square image, and one more so that there are two classes."""
    rng = np.random.default_rng(0)
    for i in range(2):
        path = tmp_path / "set" / f"c{i}" / "a.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((150, 150), 3).save(path)
    return tmp_path / "set"


@pytest.mark.parametrize("loader", ["torchvision", "dali"])
def test_features_are_those_of_timms_own_transform(lite: Backbone, photograph: Path, loader: str) -> None:
    """EfficientNet-Lite, whose statistics are 0.5 and bicubic, on one image: timm's transform and network.

    The loaders' pixels differ from PIL's by at most 1 of 255 (DALI's at the border by a few), which are 0.008 here: the
    features agree to 2% of their norm. With ImageNet's statistics they are five times as far away.
    """
    pytest.importorskip("nvidia.dali" if loader == "dali" else "torchvision")
    size, images = 64, open_images(photograph)
    config = timm.data.resolve_model_data_config(lite.net) | {"input_size": (3, size, size), "crop_pct": 1.0}
    transform = timm.data.create_transform(**config, is_training=False)
    with torch.no_grad():
        truth = lite.net(torch.stack([transform(Image.open(file)) for file in images.files()]))
    features = extract(lite, images, size, loader=loader, threads=1)[0]
    wrong = extract(lite, images, size, loader=loader, threads=1, stats=IMAGENET)[0]
    assert (features - truth).norm() < 0.02 * truth.norm()
    assert (wrong - truth).norm() > 0.1 * truth.norm()
