"""PARTICLE with every source of parts, on a CNN and a ViT."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fgfast.data.layouts import open_images
from fgfast.data.maps import map_path, read_map, read_maps_info, save_maps, write_maps_info
from fgfast.data.views import Batch
from fgfast.errors import UserError
from fgfast.methods.base import Progress
from fgfast.methods.particle import PARTICLE, PARTICLEConfig
from fgfast.train.loop import pretrain
from tests.conftest import TINY

SOURCES = ("discovered", "online", "truth", "keypoints", "felzenszwalb", "saliency", "grid", "random")


def config_for(data: Path, out: Path, **values: object) -> PARTICLEConfig:
    return replace(
        PARTICLEConfig(
            data=str(data), out=str(out), model=TINY, model_args="output_stride=8", size=32, batch_size=6, epochs=1,
            log_every=1, knn_every=0, n_parts=4, max_parts=3, map_size=16, hidden=16, projection=8, prototypes=32,
            device="cpu", threads=1, amp="off",
        ),
        **values,  # type: ignore[arg-type]
    )  # fmt: skip


def batch_of(n: int = 4, side: int = 32, whole: int = 64) -> Batch:
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor([[[0.0, 0.0, 1.0, 1.0, 0.0], [0.25, 0.25, 0.5, 0.5, 1.0]]]).repeat(n, 1, 1)
    return Batch(
        views=[torch.randn(n, 3, side, side, generator=g) for _ in range(2)], boxes=boxes,
        labels=[torch.randint(-1, 4, (n, side, side), generator=g) for _ in range(2)],
        whole=torch.randn(n, 3, whole, whole, generator=g), target=torch.zeros(n, dtype=torch.int64),
        index=torch.arange(n), valid=torch.ones(n, dtype=torch.bool),
    )  # fmt: skip


@pytest.mark.parametrize("parts", SOURCES)
def test_cnn_trains_with_every_source(drawn: Path, tmp_path: Path, parts: str) -> None:
    """A run with each source of parts has positive finite losses and changes encoder and momentum encoder."""
    out = pretrain("particle", config_for(drawn, tmp_path / "run", parts=parts))
    init, last = (torch.load(out / f"{n}.pt", weights_only=True)["method"] for n in ("init", "last"))
    for part in ("encoder.", "target."):
        assert any(k.startswith(part) and k.endswith("weight") and not torch.equal(init[k], last[k]) for k in init)
    from fgfast.train.log import read_metrics

    losses = [r["loss"] for r in read_metrics(out / "metrics.jsonl")[0] if "loss" in r]
    assert len(losses) == 3
    assert all(np.isfinite(losses))
    assert min(losses) > 0


@pytest.mark.parametrize("parts", [s for s in SOURCES if s != "truth"])
def test_vit_trains_with_every_source(drawn: Path, tmp_path: Path, parts: str) -> None:
    """A ViT adds DINO, and the metrics have both terms."""
    config = config_for(drawn, tmp_path / "run", parts=parts, model="test_vit", model_args="", n_parts=3)
    out = pretrain("particle", config)
    from fgfast.train.log import read_metrics

    row = read_metrics(out / "metrics.jsonl")[0][-1]
    assert row["loss"] == pytest.approx(row["part"] + row["dino"], rel=1e-4)


def test_each_round_discovers_parts_with_the_trained_network(drawn: Path, tmp_path: Path) -> None:
    """Two rounds write two folders of maps, of every training image, that differ."""
    out = pretrain("particle", config_for(drawn, tmp_path / "run", rounds=2, epochs=4, lr=0.01))
    images = open_images(drawn).train_set()
    first, second = (
        np.stack([read_map(out / f"parts_{r}", p) for p in images.paths]) for r in (0, 1)
    )  # fmt: skip
    assert first.shape == (18, 16, 16)
    assert read_maps_info(out / "parts_1")["n_parts"] == 4
    assert set(np.unique(first)) <= set(range(4))
    assert (first != second).any()


def test_training_uses_maps_of_discover(drawn: Path, tmp_path: Path) -> None:
    """--maps takes a folder written by fgfast discover, with its number of parts; the message names a missing map."""
    images = open_images(drawn)
    labels = np.random.default_rng(0).integers(0, 6, (len(images), 8, 8), dtype=np.uint8)
    save_maps(tmp_path / "maps", images.paths, labels)
    write_maps_info(tmp_path / "maps", n_parts=6, size=(8, 8), run="test")
    config = config_for(drawn, tmp_path / "run", maps=str(tmp_path / "maps"))
    assert PARTICLE(config).n_parts == 6
    pretrain("particle", config)
    assert not list((tmp_path / "run").glob("parts_*"))
    missing = images.train_set().paths[3]
    map_path(tmp_path / "maps", missing).unlink()
    with pytest.raises(UserError, match=missing):
        pretrain("particle", config_for(drawn, tmp_path / "two", maps=str(tmp_path / "maps")))


def test_coordinates_need_the_euclidean_metric(drawn: Path, tmp_path: Path) -> None:
    """The direction of a coordinate vector means nothing."""
    with pytest.raises(UserError, match="--metric euclidean"):
        PARTICLE(config_for(drawn, tmp_path, position=1.0, metric="cosine"))


@pytest.mark.parametrize("parts", ["discovered", "online"])
def test_a_border_removes_background_from_the_contrast(drawn: Path, tmp_path: Path, parts: str) -> None:
    """With a border some clusters become background, and the maps record the setting."""
    config = config_for(drawn, tmp_path / "run", parts=parts, metric="cosine", border=0.5)
    out = pretrain("particle", config)
    if parts == "online":
        assert (PARTICLE(config).cluster(batch_of().whole, 8) == -1).any()
        return
    info = read_maps_info(out / "parts_0")
    assert info["run"].endswith("cosine, border 0.5")
    assert np.mean([(read_map(out / "parts_0", p) == 255).mean() for p in open_images(drawn).train_set().paths]) > 0.1


def test_padded_images_have_no_effect(drawn: Path, tmp_path: Path) -> None:
    """The content of a padded slot affects neither loss nor gradients (BatchNorm in evaluation mode)."""
    torch.manual_seed(0)
    method = PARTICLE(config_for(drawn, tmp_path, max_parts=0)).eval()
    batch = batch_of()
    batch.valid[3] = False
    results = []
    for fill in (0.0, 100.0):
        for view in batch.views:
            view[3] = fill
        method.zero_grad()
        loss = method(batch)["loss"]
        loss.backward()
        results.append((loss.detach(), next(method.encoder.parameters()).grad.clone()))
    torch.testing.assert_close(results[0], results[1])


def test_grid_parts_follow_the_window(drawn: Path, tmp_path: Path) -> None:
    """A view of the upper left quarter has only the cells of that quarter."""
    method = PARTICLE(config_for(drawn, tmp_path, parts="grid", grid=4))
    batch = batch_of()
    batch.boxes[:, 0] = torch.tensor([0.0, 0.0, 0.5, 0.5, 0.0])
    assert method.n_parts == 16
    assert set(method.labels(batch)[0].unique().tolist()) == {0, 1, 4, 5}


def test_online_parts_agree_in_both_views(drawn: Path, tmp_path: Path) -> None:
    """Both views share a clustering: the flipped full image has the flipped ids."""
    method = PARTICLE(config_for(drawn, tmp_path, parts="online"))
    batch = batch_of()
    batch.boxes[:, 1] = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0])
    first, second = method.labels(batch)
    assert torch.equal(first, second.flip(-1))


def test_momentum_encoder_follows_slowly(drawn: Path, tmp_path: Path) -> None:
    """After a step the copy is momentum x old + (1 - momentum) x online; at the end it does not change."""
    method = PARTICLE(config_for(drawn, tmp_path, momentum=0.9))
    online, target = next(method.encoder.parameters()), next(method.target.parameters())
    old = target.clone()
    with torch.no_grad():
        online.add_(1.0)
    method.after_step(Progress(0, 10))
    torch.testing.assert_close(target.detach(), old.detach() + 0.1)
    before = target.clone()
    method.after_step(Progress(10, 10))
    assert torch.equal(target, before)


@pytest.mark.parametrize("parts", ["truth", "online"])
def test_the_network_can_be_its_own_target(drawn: Path, tmp_path: Path, parts: str) -> None:
    """--target self has no copy, costs two passes per image less, and gives keys a gradient."""
    config = config_for(drawn, tmp_path / "run", parts=parts, target="self")
    method, with_copy = PARTICLE(config), PARTICLE(replace(config, target="momentum"))
    assert method.passes_per_image == with_copy.passes_per_image - 2
    assert not [name for name in method.state_dict() if "target" in name or "predictor" in name]
    batch = batch_of(whole=64)
    method(batch)["loss"].backward()
    first, weight = next(iter(method.encoder.named_parameters()))
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0
    out = pretrain("particle", config)
    init, last = (torch.load(out / f"{n}.pt", weights_only=True)["method"] for n in ("init", "last"))
    assert not torch.equal(init[f"encoder.{first}"], last[f"encoder.{first}"])


def test_complete_views_can_be_contrasted_too(drawn: Path, tmp_path: Path) -> None:
    """The loss is that of the parts plus a weighted term of the views, which trains its own head."""
    from fgfast.train.log import read_metrics

    out = pretrain("particle", config_for(drawn, tmp_path / "run", parts="grid", image_weight=0.5))
    rows = [r for r in read_metrics(out / "metrics.jsonl")[0] if "loss" in r]
    for row in rows:
        assert row["loss"] == pytest.approx(row["part"] + 0.5 * row["image"], rel=1e-4)
    init, last = (torch.load(out / f"{n}.pt", weights_only=True)["method"] for n in ("init", "last"))
    assert not torch.equal(init["image_projector.layers.0.weight"], last["image_projector.layers.0.weight"])


@pytest.mark.parametrize(
    ("values", "remedy"), [({"target": "self"}, "--target self"), ({"image_weight": 1.0}, "--image")]
)
def test_a_vit_uses_dino_for_complete_views(drawn: Path, tmp_path: Path, values: dict, remedy: str) -> None:
    """DINO contrasts complete views and needs the momentum copy, so a ViT takes neither switch."""
    with pytest.raises(UserError, match=f"leave {remedy}"):
        PARTICLE(config_for(drawn, tmp_path, model="test_vit", model_args="", **values))


def test_pictures_show_parts_and_views(drawn: Path, tmp_path: Path) -> None:
    """Images and views are shown beside their parts."""
    figures = PARTICLE(config_for(drawn, tmp_path)).eval().pictures(batch_of())
    assert set(figures) == {"parts", "views"}
    assert len(figures["views"]) == 4
    assert len(figures["views"][0]) == 4


def test_truth_needs_masks(tmp_path: Path) -> None:
    """A data set without part masks is refused."""
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / f"set/{name}/0.png")
    with pytest.raises(UserError, match="no part masks"):
        PARTICLE(config_for(tmp_path / "set", tmp_path, parts="truth"))
