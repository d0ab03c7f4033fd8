"""Weights of another image size, and exports that name theirs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.weights import load_encoder, load_tensors
from fgfast.run import save_encoder
from tests.models.foreign import error, images, randomise, refused, timm_net


def store(backbone: Backbone, folder: Path, **more: Tensor) -> Path:
    """A file of the state dict of a network."""
    torch.save({"model": backbone.net.state_dict() | more}, folder / "w.pth")
    return folder / "w.pth"


def make(name: str = "test_vit", size: int = 64, **args: Any) -> Backbone:
    backbone = Backbone(name, size=size, args=args)
    randomise(backbone.net)
    return backbone


@pytest.mark.parametrize("args", [{}, {"reg_tokens": 2}, {"reg_tokens": 4, "no_embed_class": True}])
@pytest.mark.parametrize(("before", "after"), [(224, 64), (64, 160)])
def test_position_embeddings_of_another_size_are_resampled_as_timm_does(
    tmp_path: Path, args: dict[str, Any], before: int, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = make(size=before, **args), make(size=after, **args)
    load_encoder(target.net, store(source, tmp_path))
    prefix = 0 if "no_embed_class" in args else 1 + args.get("reg_tokens", 0)
    expected = resample_abs_pos_embed(source.net.pos_embed, [after // 16] * 2, num_prefix_tokens=prefix)
    assert torch.equal(target.net.pos_embed, expected)
    assert [record.getMessage() for record in caplog.records] == [
        f"The weights {tmp_path / 'w.pth'}: position embeddings are resampled from {before // 16} x {before // 16} to "
        f"{after // 16} x {after // 16} patches."
    ]


@torch.no_grad()
def test_a_vit_of_224_pixels_gives_at_64_what_timm_gives_there(tmp_path: Path) -> None:
    """A network built for 224 pixels resamples for each image of another size."""
    source, target = make(size=224), make(size=64)
    load_encoder(target.net, store(source, tmp_path))
    assert error(target.eval()(images(64)), source.eval()(images(64))) < 1e-5


def test_weights_of_the_same_size_stay_as_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, target = make(), make()
    load_encoder(target.net, store(source, tmp_path))
    assert torch.equal(target.net.pos_embed, source.net.pos_embed)
    assert not caplog.records


def test_the_checkpoint_of_a_run_is_never_resampled() -> None:
    before = make(size=64)
    with pytest.raises(UserError, match="give --size 224"):
        load_tensors(before.net, make(size=224).net.state_dict(), "The weights of the checkpoint")


@pytest.mark.parametrize("tokens", [11, 51])
def test_position_embeddings_that_are_of_no_square_are_refused(tmp_path: Path, tokens: int) -> None:
    file = store(make(), tmp_path, pos_embed=torch.zeros(1, tokens, 64))
    refused(make().net, file, rf"'pos_embed' \[1, {tokens}, 64\] instead of \[1, 17, 64\]")


@pytest.mark.parametrize("shape", [(17,), (17, 64), (1, 17, 65), (2, 17, 64), ()])
def test_position_embeddings_of_another_form_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    refused(
        make().net, store(make(), tmp_path, pos_embed=torch.zeros(shape)), "1 of another shape, such as 'pos_embed'"
    )


SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


def test_tables_of_relative_positions_are_not_resampled(tmp_path: Path) -> None:
    """A window that the image does not fill is smaller, and so is its table."""
    torch.save(timm_net("swin_tiny_patch4_window7_224", img_size=64, **SWIN).state_dict(), tmp_path / "w.pth")
    refused(
        timm_net("swin_tiny_patch4_window7_224", img_size=16, **SWIN), tmp_path / "w.pth",
        r"relative_position_bias_table' \[49, 2\] instead of \[9, 2\]\): give the --size that they were trained at",
    )  # fmt: skip


@torch.no_grad()
def test_a_rotary_network_takes_weights_of_another_size(tmp_path: Path) -> None:
    """DINOv3 has no positions to resample, and its angles follow the image."""
    args = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    source, target = (make("vit_small_patch16_dinov3_qkvb", size, **args) for size in (96, 64))
    load_encoder(target.net, store(source, tmp_path))
    assert error(target.eval()(images(64)), source.eval()(images(64))) < 1e-5


def read_args(file: Path) -> tuple[str, dict[str, Any]]:
    """What an export says of its network."""
    with safe_open(file, "pt") as opened:
        texts = opened.metadata()
    return texts["timm_model"], json.loads(texts["timm_args"])


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [("test_vit", {}), ("test_vit", {"depth": 2, "reg_tokens": 1}), ("resnet18", {"channels": (8, 8, 8, 8)})],
)
def test_an_export_loads_in_plain_timm_with_the_arguments_that_it_names(
    tmp_path: Path, name: str, args: dict[str, Any]
) -> None:
    backbone, file = make(name, **args).eval(), tmp_path / "encoder.safetensors"
    save_encoder(file, backbone.net, name)
    model, options = read_args(file)
    assert options.get("img_size") == (64 if name == "test_vit" else None)
    net = timm_net(model, **{key: value for key, value in options.items() if key != "num_classes"})
    net.load_state_dict(load_file(file), strict=True)
    assert torch.equal(net(images(64)), backbone.net(images(64)))


def test_an_export_without_its_arguments_still_loads(tmp_path: Path) -> None:
    """As earlier versions wrote it."""
    source, target = make(), make()
    save_file(source.net.state_dict(), tmp_path / "encoder.safetensors", {"format": "pt", "timm_model": "test_vit"})
    load_encoder(target.net, tmp_path)
    assert all(torch.equal(v, source.net.state_dict()[k]) for k, v in target.net.state_dict().items())
