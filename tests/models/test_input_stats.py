"""The statistics that weights were trained with: timm's, those that files name or imply, and those that they do not."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from fgfast.data.normalise import IMAGENET, InputStats
from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.checkpoints import inspect_checkpoint
from fgfast.models.input_stats import stats_from_texts, stats_of_file, stats_of_timm
from fgfast.run import save_checkpoint, save_encoder
from tests.conftest import TINY

HALF = InputStats((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic")
OTHER = InputStats((0.1, 1 / 3, 0.9), (0.2, 1e-3, 7.0), "bicubic")


@pytest.mark.parametrize(
    "name", [TINY, "tf_efficientnet_lite0", "vit_small_patch16_224.dino", "vit_base_patch16_siglip_224"]
)
def test_timms_statistics_are_those_of_its_own_transform(name: str) -> None:
    found = stats_of_timm(name)
    assert found is not None
    config = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    assert found[0] == (tuple(config["mean"]), tuple(config["std"]), config["interpolation"])


@pytest.mark.sweep
def test_every_network_of_timm_has_statistics_that_can_be_used() -> None:
    for name in timm.list_models():
        found = stats_of_timm(name)
        assert found is not None
        assert found[0] == found[0].check()


def test_a_network_that_timm_lacks_has_none() -> None:
    assert stats_of_timm("srgan") is None


def test_a_backbone_has_the_statistics_that_it_is_given_or_imagenets() -> None:
    assert Backbone(TINY, size=32).stats == IMAGENET
    assert Backbone(TINY, size=32, stats=OTHER).stats == OTHER
    with pytest.raises(ValueError, match="mean is"):
        Backbone(TINY, size=32, stats=InputStats((2.0, 0.0, 0.0)))


def test_pretrained_weights_bring_their_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr("timm.create_model", lambda name, **options: create(name, **options | {"pretrained": False}))
    assert Backbone("test_vit", size=32, pretrained=True).stats == HALF


@pytest.mark.parametrize("stats", [IMAGENET, HALF, OTHER])
def test_exports_and_checkpoints_name_theirs_to_the_last_bit(tmp_path: Path, stats: InputStats) -> None:
    net = Backbone(TINY, size=32).net
    save_encoder(tmp_path / "encoder.safetensors", net, TINY, stats=stats)
    save_checkpoint(tmp_path / "last.pt", {"name": "simclr", "method": net.state_dict(), "input": stats.texts()})
    for path in (tmp_path, tmp_path / "encoder.safetensors", tmp_path / "last.pt"):
        found = stats_of_file(path)
        assert found is not None
        assert found[0] == stats
        assert found[1].endswith("names them")


def test_files_of_earlier_versions_imply_imagenets(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "encoder.safetensors", {"format": "pt", "timm_model": TINY})
    torch.save({"name": "simclr", "step": 0, "method": {"encoder.net.w": torch.zeros(1)}}, tmp_path / "init.pt")
    for path in (tmp_path, tmp_path / "init.pt"):
        found = stats_of_file(path)
        assert found is not None
        assert found[0] == IMAGENET
        assert "version of fgfast" in found[1]


W = torch.zeros(1)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"module.encoder_q.conv1.weight": W}},  # MoCo v2
        {"state_dict": {"module.base_encoder.patch_embed.proj.weight": W}},  # MoCo v3
        {"student": {"module.backbone.cls_token": W}, "teacher": {"backbone.cls_token": W}},  # DINO
        {"module.online_network.encoder.conv1.weight": W},  # DetCon
        {"state_dict": {"student_backbone.cls_token": W}},  # lightly
        {"query_backbone.cls_token": W, "key_backbone.cls_token": W},
        {"backbone.cls_token": W, "backbone_momentum.cls_token": W},
        {"online_encoder.0.weight": W},
        {"state_dict": {"backbone.cls_token": W, "momentum_backbone.cls_token": W}},  # solo-learn
        {"classy_state_dict": {"base_model": {"model": {"trunk": {"_feature_blocks.conv1.weight": W}}}}},  # VISSL
        {"model": {"teacher.backbone.cls_token": W}},  # DINOv2 in training
    ],
)
def test_self_supervised_releases_imply_imagenets(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "w.pth")
    found = stats_of_file(tmp_path / "w.pth")
    assert found is not None
    assert found[0] == IMAGENET._replace(interpolation="bicubic")


def test_a_vit_of_torchvision_implies_imagenets_where_timms_wants_others(tmp_path: Path) -> None:
    from torchvision.models import VisionTransformer

    torch.save({"model": VisionTransformer(32, 16, 1, 1, 8, 8).state_dict()}, tmp_path / "w.pth")
    found, of_timm = stats_of_file(tmp_path / "w.pth"), stats_of_timm("vit_tiny_patch16_224")
    assert found is not None
    assert of_timm is not None
    assert found[0] == IMAGENET
    assert of_timm[0] == HALF


@pytest.mark.parametrize(
    "content",
    [
        {"conv1.weight": W},
        {"state_dict": {"module.conv1.weight": W}},
        {"model": {"a": W}},
        {"encoder.layer.0.attention.attention.query.weight": W},  # a layer of this name is no network
    ],
)
def test_other_files_name_none(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "w.pth")
    assert stats_of_file(tmp_path / "w.pth") is None


@pytest.mark.parametrize(
    ("name", "described", "expected"),
    [
        ("config.json", {"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}}, HALF),
        ("config.json", {"architectures": ["ViTModel"]}, None),
        ("preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}, HALF),
        ("preprocessor_config.json", {"resample": 2}, IMAGENET),
    ],
)
def test_descriptions_beside_weights_from_a_hub_are_read(
    tmp_path: Path, name: str, described: dict[str, Any], expected: InputStats | None
) -> None:
    save_file({"w": W}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / name).write_text(json.dumps(described))
    found = stats_of_file(tmp_path / "model.safetensors")
    assert (found and found[0]) == expected
    save_file({"w": W}, tmp_path / "another.safetensors", {"format": "pt"})  # they may describe other weights
    assert stats_of_file(tmp_path / "another.safetensors") is None


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_tensors_and_checksums_are_left_to_the_loading_of_the_weights(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file is read once: here its tensors are lazy, and its checksum is not computed."""
    file, state = tmp_path / name, {"encoder_q.weight": torch.arange(4.0)}
    save_file(state, file) if name.endswith("safetensors") else torch.save(state, file)
    monkeypatch.setattr("fgfast.models.checkpoints.verify", None)
    content, _ = inspect_checkpoint(file)
    assert stats_of_file(file) is not None
    with file.open("rb+") as stored:  # in place, so that tensors that are mapped change too
        stored.seek(file.read_bytes().index(state["encoder_q.weight"].numpy().tobytes()))
        stored.write(torch.full((4,), 7.0).numpy().tobytes())
    assert content["encoder_q.weight"].tolist() == [7.0] * 4


def test_files_that_cannot_be_mapped_are_read(tmp_path: Path) -> None:
    """Of an early version of torch, and compressed afterwards, which torch.load takes too."""
    state = {"encoder_q.weight": torch.arange(1000.0)}
    torch.save(state, tmp_path / "early.pth", _use_new_zipfile_serialization=False)
    torch.save(state, tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as archive,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in archive.namelist():
            small.writestr(name, archive.read(name))
    for name in ("early.pth", "small.pth"):
        assert torch.equal(inspect_checkpoint(tmp_path / name)[0]["encoder_q.weight"], state["encoder_q.weight"])


def _with_texts(path: Path, texts: dict[str, str]) -> None:
    tensors: dict[str, Tensor] = {"w": W}
    save_file(tensors, path, {"format": "pt", "timm_model": TINY, **texts})


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"mean": "0.5,0.5"}, r"In .*w\.safetensors mean is '0.5,0.5': give three numbers"),
        ({"mean": "0.5,0.5,x"}, "give three numbers"),
        ({"mean": ""}, "mean is '': give three numbers"),
        ({"mean": "0.5,0.5,2"}, "give at least 0 and at most 1"),
        ({"mean": "0.5,0.5,0.5", "std": "1,1,0"}, "give more than 0"),
        ({"mean": "0.5,0.5,0.5", "interpolation": "cubic"}, "choose one of bilinear, bicubic"),
    ],
)
def test_impossible_statistics_in_a_file_are_refused(tmp_path: Path, texts: dict[str, str], message: str) -> None:
    _with_texts(tmp_path / "w.safetensors", texts)
    with pytest.raises(UserError, match=message):
        stats_of_file(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    "values", [{"mean": [0.5], "std": [0.5]}, {"mean": 3, "std": None}, {"mean": "abc", "std": "abc"}]
)
def test_impossible_statistics_in_a_description_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    save_file({"w": W}, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": values}))
    with pytest.raises(UserError, match=r"config\.json cannot be used \(.*\): give --mean and --std"):
        stats_of_file(tmp_path / "model.safetensors")


def test_missing_texts_are_taken_from_the_default() -> None:
    assert stats_from_texts({}, "--", OTHER) == OTHER
    assert stats_from_texts({"mean": "auto", "std": "1,1,1", "interpolation": "auto"}, "--", OTHER) == OTHER._replace(
        std=(1.0, 1.0, 1.0)
    )
    assert stats_from_texts(OTHER.texts(), "--") == OTHER
