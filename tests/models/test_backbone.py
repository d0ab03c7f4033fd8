"""Backbones: maps, pyramids, keys, and errors."""

from typing import Any

import pytest
import torch

from fgfast.errors import UserError
from fgfast.methods.color import Color, ColorConfig
from fgfast.methods.lodisc import LoDisc, LoDiscConfig
from fgfast.methods.particle import PARTICLE, PARTICLEConfig
from fgfast.methods.synthpair import SynthPair, SynthPairConfig
from fgfast.models.backbone import Backbone, parse_model_args
from fgfast.models.heads import MLP, DINOHead, momentum_copy, update_momentum
from tests.conftest import TINY


@pytest.mark.parametrize(("name", "side"), [(TINY, 32), (TINY, 40), ("test_vit", 32), ("test_vit", 48)])
def test_pooled_features_match_the_map(name: str, side: int) -> None:
    """The pooled vector has the channels of the map, and is its mean for a CNN."""
    encoder = Backbone(name, size=32).eval()
    x = torch.randn(2, 3, side, side)
    features = encoder.features(x)
    grid = encoder.to_map(features, (side, side))
    assert encoder(x).shape == (2, encoder.dim)
    assert grid.shape[:2] == (2, encoder.dim)
    if not encoder.is_vit:
        torch.testing.assert_close(encoder(x), grid.mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenetv3_small_050", {}),
        ("lcnet_035", {}),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)}),
    ],
)
def test_dim_is_the_width_of_the_pooled_features(name: str, args: dict[str, object]) -> None:
    """Also of a network that widens its map before it is pooled, and of a transformer of a fixed image size."""
    encoder = Backbone(name, size=64, args=args).eval()
    with torch.no_grad():
        assert encoder(torch.zeros(1, 3, 64, 64)).shape == (1, encoder.dim)


def test_methods_on_maps_take_a_network_that_widens_them_later() -> None:
    """Their layers have the width of the map, and a method that needs both widths to be equal says so."""
    options: dict[str, Any] = {"model": "mobilenetv3_small_050", "size": 64}
    color = Color(ColorConfig(**options, hidden=8))
    assert color.logits(torch.zeros(2, 3, 64, 64)).shape[:3] == (2, 16, 16)
    particle = PARTICLE(PARTICLEConfig(**options, n_parts=3, map_size=8, hidden=8, projection=8))
    maps = particle.encoder.to_map(particle.encoder.features(torch.zeros(2, 3, 64, 64)), (64, 64))
    labels = torch.zeros(2, 64, 64, dtype=torch.int64)
    assert particle.part_loss(maps, maps, labels, labels).isfinite()
    with pytest.raises(UserError, match="widens its feature map"):
        SynthPair(SynthPairConfig(**options))


@pytest.mark.parametrize("name", [TINY, "resnet18", "test_convnext"])
def test_pyramid_runs_from_deep_to_shallow(name: str) -> None:
    """Levels are ordered deepest first, each at least as large as the previous one."""
    maps = Backbone(name, size=64).eval().pyramid(torch.randn(1, 3, 64, 64), levels=3)
    sides = [m.shape[-1] for m in maps]
    assert len(maps) == 3
    assert sides == sorted(sides)


def test_keys_are_those_of_the_last_block() -> None:
    """Attention of CLS sums to at most one over the patches, and keys equal the output of the projection."""
    encoder = Backbone("test_vit", size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    found = encoder.keys(x)
    tokens = encoder.net.patch_embed(x)
    assert found.keys.shape[2:] == found.attention.shape[2:] == (2, 2)
    assert tokens.shape[0] == 2
    total = found.attention.sum((2, 3))
    assert ((total > 0) & (total <= 1 + 1e-6)).all()
    block = encoder.net.blocks[-1]
    seen: list[torch.Tensor] = []
    hook = block.norm1.register_forward_hook(lambda _m, _i, out: seen.append(out))
    encoder.net.forward_features(x)
    hook.remove()
    weight, bias = block.attn.qkv.weight.chunk(3)[1], block.attn.qkv.bias.chunk(3)[1]
    expected = (seen[0] @ weight.T + bias)[:, encoder.net.num_prefix_tokens :]
    torch.testing.assert_close(found.keys.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)


def test_smaller_patch_stride_gives_a_finer_grid_and_is_restored() -> None:
    """Half the stride gives 2n - 1 cells per side; afterwards the network is unchanged."""
    encoder = Backbone("test_vit", size=64).eval()
    x = torch.randn(1, 3, 64, 64)
    patch = encoder.net.patch_embed.patch_size[0]
    before = encoder(x)
    n = 64 // patch
    assert encoder.keys(x, stride=patch // 2).keys.shape[-1] == 2 * n - 1
    torch.testing.assert_close(encoder(x), before)


def test_errors_name_unknown_models_and_invalid_arguments() -> None:
    """An unknown model suggests others; invalid arguments are reported; a CNN has no keys."""
    with pytest.raises(UserError, match=r"no model 'resnet81'.*resnet"):
        Backbone("resnet81")
    with pytest.raises(UserError, match=r"no model 'qqqqqq': timm\.list_models"):
        Backbone("qqqqqq")
    with pytest.raises(UserError, match="could not build"):
        Backbone("resnet18", args={"nosuch": 1})
    with pytest.raises(UserError, match="no keys"):
        Backbone(TINY).keys(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        ({"output_stride": 5}, "AssertionError"), ({"channels": ()}, "index out of range"),
        ({"features_only": True}, "no attribute 'forward_features'"), ({"in_chans": 1}, "to have 1 channels"),
        ({"global_pool": ""}, r"features of shape \[1, 96, 2, 2\] instead of \[1, 96\]"),
    ],
)  # fmt: skip
def test_arguments_that_timm_or_the_features_refuse_give_the_reason_and_remedy(
    args: dict[str, object], reason: str
) -> None:
    with pytest.raises(
        UserError,
        match=rf"could not build 'test_resnet' .*{reason}.*\): correct --model-args, or choose another --size\.",
    ):
        Backbone(TINY, args=args)


def test_weights_that_cannot_be_downloaded_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an internet connection --init timm fails with one sentence that names the alternative."""
    import timm

    def offline(*_args: object, **_options: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="give --init a file"):
        Backbone("resnet18", pretrained=True)


@pytest.mark.parametrize(
    "text",
    [
        "channels=", "1,2", "a=b", "a=__import__('os')", "x=(1", "a=1,a=2", "a={[]: 1}", "**{'a': 1}", "a=1)(b=2",
        "a=1).g(b=2", "a=" + "(" * 3000, "a=" + "-" * 3000 + "1", "a=" + "9" * 5000, "a=" + "[]," * 9000,
        "a=\0", "a=\udcff",
    ],
    ids=lambda text: ascii(text[:20]),
)  # fmt: skip
def test_model_args_are_literals_only(text: str) -> None:
    """Only name=literal is accepted."""
    with pytest.raises(UserError, match="name=value"):
        parse_model_args(text)
    assert parse_model_args("") == {}


def test_momentum_updates_only_parameters() -> None:
    """Parameters move by 1 - momentum; batch norm statistics of the target are unchanged."""
    online = MLP((3, 4, 2))
    target = momentum_copy(online)
    assert not any(p.requires_grad for p in target.parameters())
    with torch.no_grad():
        for p in online.parameters():
            p.add_(1.0)
    before = [p.clone() for p in target.parameters()]
    online(torch.randn(8, 3))
    update_momentum(target, online, 0.75)
    for old, new in zip(before, target.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25)
    assert all(float(b.abs().sum()) in (0.0, 4.0) for b in target.buffers())


def test_dino_head_is_weight_normalised() -> None:
    """Every prototype has norm one: logits are cosines."""
    head = DINOHead(8, prototypes=16, hidden=12, bottleneck=6)
    out = head(torch.randn(32, 8))
    assert out.shape == (32, 16)
    assert out.abs().max() <= 1 + 1e-5


def test_a_vit_refuses_a_size_that_its_patches_do_not_divide() -> None:
    with pytest.raises(UserError, match="--size is 34: test_vit takes multiples"):
        Backbone("test_vit", size=34)


def test_lodisc_refuses_a_map_of_which_it_would_keep_nothing() -> None:
    with pytest.raises(UserError, match=r"--keep is 0\.3 of 1 patches: give at least 1"):
        LoDisc(LoDiscConfig(model=TINY, size=32))
