"""Any timm network: what it can do is right, and what it cannot is refused in one sentence."""

from typing import Any

import pytest
import timm
import torch
from torch import nn

from fgfast.errors import UserError
from fgfast.methods.color import Color, ColorConfig
from fgfast.methods.lodisc import LoDisc, LoDiscConfig
from fgfast.methods.particle import PARTICLE, PARTICLEConfig
from fgfast.models.backbone import Backbone, is_vit
from tests.conftest import TINY
from tests.models.timm_checks import build_smallest, check_network, compare_with_blocks, in_full, sharpen

NARROW = {"embed_dim": 96, "depth": 2, "num_heads": 3}
FEW = {  # of ten modules, with fewer blocks than the smallest of them
    TINY: {},
    "mobilenetv3_small_050": {},
    "vgg11": {"mlp_ratio": 0.01},
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    "hiera_tiny_224": {"embed_dim": 24},
    "xcit_nano_12_p16_224": {"depth": 2},
    "cait_xxs24_224": {"depth": 2},
    "vit_tiny_patch16_dinov3_qkvb": {"depth": 2},
    "gmlp_ti16_224": {},
    "test_efficientnet": {},
}
VITS = {  # each with something of its own in attention
    "test_vit": {},
    "vit_small_patch16_dinov3": NARROW,  # rotary, registers
    "eva02_tiny_patch14_224": {"depth": 2},  # rotary and position embedding
    "vit_small_patch16_rope_mixed_224": NARROW,  # rotary, learned for each block
    "vit_small_patch14_reg4_dinov2": NARROW,  # registers
    "beit_base_patch16_224": NARROW,  # bias of relative positions
    "vit_relpos_base_patch16_cls_224": NARROW,
    "vit_base_patch16_224": NARROW | {"qk_norm": True},
    "deit_tiny_distilled_patch16_224": {"depth": 2},  # a second token before the patches
}
DROPPING = [name for name in VITS if not name.startswith(("beit", "vit_relpos"))]


def build_vit(name: str) -> Backbone:
    """A ViT of two blocks for a grid of 4 x 4, with sharp attention."""
    torch.manual_seed(0)
    encoder = Backbone(name, size=56 if "patch14" in name else 64, args=VITS[name]).eval()
    sharpen(encoder.net)
    return encoder


def images(encoder: Backbone, sides: tuple[int, int] = (4, 4)) -> torch.Tensor:
    """Random images of a grid of ``sides`` patches."""
    return torch.randn(2, 3, *(n * encoder.patch for n in sides))


@pytest.mark.parametrize("name", FEW)
def test_a_network_is_right_or_says_what_it_lacks(name: str) -> None:
    found = check_network(Backbone(name, size=64, args=FEW[name]).eval())
    assert found["map"] == found["pyramid"] == "right"
    assert found["keys"] == "right" or "has no keys and CLS attention" in found["keys"]
    assert found["dropping"] == "right" or "cannot leave out patches" in found["dropping"]


@pytest.mark.sweep
@pytest.mark.parametrize("module", timm.list_modules())
def test_the_smallest_network_of_a_module_is_right_or_says_what_it_lacks(module: str) -> None:
    encoder = build_smallest(module)
    print(module, encoder.name, encoder.layout, check_network(encoder))


@pytest.mark.parametrize("name", VITS)
def test_keys_and_attention_are_those_of_the_blocks(name: str) -> None:
    """After norms and rotary embeddings, with biases of relative positions; a softmax over all tokens."""
    encoder = build_vit(name)
    x = images(encoder)
    compare_with_blocks(encoder, x)
    assert encoder.attend(x)[1].std(-1).median() > 1e-2


def test_keys_of_another_size_and_stride_have_the_rotation_of_their_place() -> None:
    encoder = build_vit("vit_small_patch16_dinov3")
    x = images(encoder, (3, 5))
    compare_with_blocks(encoder, x)
    found = encoder.keys(x, stride=8)
    assert found.keys.shape[2:] == found.attention.shape[2:] == (5, 9)
    proj = encoder.net.patch_embed.proj
    proj.stride = (8, 8)
    with in_full(encoder.net) as seen, torch.no_grad():
        encoder.net.forward_features(x)
    keys = seen[-1][0][:, :, encoder.layout.prefix :].transpose(2, 3).flatten(1, 2)
    torch.testing.assert_close(found.keys.flatten(2), keys, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DROPPING)
def test_kept_patches_are_processed_as_if_the_others_were_masked_out(name: str) -> None:
    """Each at its own place: the full network with a mask over the keys gives the same tokens."""
    encoder = build_vit(name)
    x, prefix = images(encoder), encoder.layout.prefix
    index = torch.stack([torch.randperm(16)[:5].sort().values for _ in range(2)])
    tokens = torch.cat([torch.arange(prefix).expand(2, -1), index + prefix], 1)
    mask = torch.zeros(2, 1, 1, prefix + 16, dtype=torch.bool)
    mask[:, 0, 0].scatter_(1, tokens, value=True)
    mask = mask.expand(-1, -1, prefix + 16, -1)
    with torch.no_grad():
        full = encoder.net.forward_features(x, attn_mask=mask)
        expected = full.gather(1, tokens[..., None].expand(-1, -1, full.shape[2]))
        torch.testing.assert_close(encoder.kept_features(x, index), expected, rtol=1e-5, atol=1e-5)
        complete = encoder.kept_features(x, torch.arange(16).expand(2, -1))
    torch.testing.assert_close(complete, encoder.features(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["test_vit", "vit_small_patch16_dinov3"])
def test_a_network_is_as_before_after_its_attention_is_read_or_patches_are_dropped(name: str) -> None:
    encoder = build_vit(name)
    encoder.net.blocks[0].attn.fused_attn = False
    x = images(encoder)
    before, drop = encoder(x), encoder.net.patch_drop
    encoder.keys(x, stride=8)
    encoder.kept_features(x, torch.tensor([[1, 2], [0, 7]]))
    assert torch.equal(encoder(x), before)
    assert encoder.net.patch_drop is drop
    assert [block.attn.fused_attn for block in encoder.net.blocks] == [False] + [True] * (len(encoder.net.blocks) - 1)


@pytest.mark.parametrize(
    ("name", "args", "lacks"),
    [
        (TINY, {}, "its features are not tokens"),
        ("test_vit4", {}, "it has no CLS token"),  # its first token is a register
        ("vit_base_patch16_siglip_224", NARROW, "it has no CLS token"),
        ("cait_xxs24_224", {"depth": 2}, "its blocks do not compute plain attention over all tokens"),
        ("xcit_nano_12_p16_224", {"depth": 2}, "its blocks do not compute plain attention over all tokens"),
    ],
)
def test_a_network_without_attention_of_cls_says_why(name: str, args: dict[str, Any], lacks: str) -> None:
    encoder = Backbone(name, size=64, args=args)
    with pytest.raises(UserError, match=rf"{name} has no keys and CLS attention \({lacks}\): choose a plain ViT"):
        encoder.keys(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("name", "args", "lacks"),
    [
        (TINY, {}, "it has no tokens to drop"),
        ("cait_xxs24_224", {"depth": 2}, "its blocks take all patches"),
        ("beit_base_patch16_224", NARROW, "its blocks take all patches"),
        ("naflexvit_base_patch16_gap", NARROW, "its blocks take all patches"),  # it drops patches in training alone
    ],
)
def test_a_network_that_takes_all_patches_says_so(name: str, args: dict[str, Any], lacks: str) -> None:
    encoder = Backbone(name, size=64, args=args)
    with pytest.raises(UserError, match=rf"{name} cannot leave out patches \({lacks}\): leave out --drop-tokens"):
        encoder.kept_features(torch.zeros(1, 3, 64, 64), torch.tensor([[0, 3]]))


def test_patches_that_cannot_overlap_are_refused() -> None:
    """A grid of relative positions has one size: such a network is clustered with a stride of whole patches."""
    encoder = build_vit("beit_base_patch16_224")
    assert encoder.key_stride == encoder.patch == 16
    with pytest.raises(UserError, match="cannot overlap"):
        encoder.keys(images(encoder), stride=8)


@pytest.mark.parametrize(
    ("name", "size", "match"),
    [
        ("test_vit", 40, "test_vit takes multiples of its patches of 16 pixels"),
        ("beit_base_patch16_224", 40, "beit_base_patch16_224 takes multiples of its patches of 16 pixels"),
        ("efficientformer_l1", 64, "does not take images of 64 x 64 pixels .*: choose another --size, such as 224, or"),
        ("inception_v3", 64, "does not take images of 64 x 64 pixels .*: choose another --size, such as 299, or"),
    ],
)
def test_sizes_that_a_network_does_not_take_are_refused(name: str, size: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Backbone(name, size=size, args=VITS.get(name))


@pytest.mark.parametrize("name", ["test_vit", "beit_base_patch16_224", "gmlp_ti16_224"])
def test_images_of_another_size_are_refused_in_a_sentence(name: str) -> None:
    encoder = Backbone(name, size=64, args=VITS.get(name, {}))
    x = torch.zeros(1, 3, 40, 40)
    for call in (encoder.features, encoder.pyramid):
        with pytest.raises(UserError, match="does not take images of 40 x 40 pixels"):
            call(x)


def test_a_network_of_one_grid_says_that_another_image_has_none() -> None:
    """A crossvit has two grids, and no map; it can still be pooled."""
    encoder = Backbone("crossvit_9_240", size=64, args={"depth": ((1, 1, 0), (1, 1, 0), (1, 1, 0))})
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.dim)
    with pytest.raises(UserError, match=r"has no feature map \(it gives several maps\): choose another --model"):
        encoder.map_side(64)
    with pytest.raises(UserError, match="has no feature map"):
        assert encoder.map_dim


@pytest.mark.parametrize("name", [TINY, "test_vit", "swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_the_probe_leaves_no_trace(name: str) -> None:
    """Weights and random state are those of one construction by timm, and no statistics are updated."""
    args = VITS.get(name) or FEW.get(name) or {}
    torch.manual_seed(0)
    encoder = Backbone(name, size=64, args=args)
    after = torch.get_rng_state()
    fixed = {} if name == TINY else {"img_size": 64}
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=0, **fixed, **args)
    assert torch.equal(after, torch.get_rng_state())
    assert encoder.net.state_dict().keys() == plain.state_dict().keys()
    assert all(torch.equal(v, plain.state_dict()[k]) for k, v in encoder.net.state_dict().items())
    assert all(module.training for module in encoder.modules())
    assert not any(m.num_batches_tracked for m in encoder.modules() if isinstance(m, nn.BatchNorm2d))


def test_trying_a_new_size_leaves_the_modes_of_modules() -> None:
    encoder = Backbone(TINY, size=64)
    encoder.net.layer1.eval()
    modes = [m.training for m in encoder.modules()]
    encoder.map_side(96)
    encoder.eval().features(torch.zeros(1, 3, 48, 48))
    encoder.train()
    encoder.net.layer1.eval()
    assert [m.training for m in encoder.modules()] == modes


@pytest.mark.parametrize(
    ("name", "expected"),
    [("vit_small_patch8_224", True), ("eva02_tiny_patch14_224", True), ("resnet50", False), ("mixer_s16_224", False)],
)
def test_a_name_is_that_of_a_vit_if_the_network_is(name: str, expected: bool) -> None:
    state = torch.get_rng_state()
    assert is_vit(name) is expected
    assert torch.equal(state, torch.get_rng_state())


def test_attention_is_read_past_a_compiled_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled one would run without the recorder."""
    encoder = build_vit("test_vit")
    x = images(encoder)
    expected = encoder.keys(x).keys
    monkeypatch.setattr(encoder.net, "forward_features", None)
    torch.testing.assert_close(encoder.keys(x).keys, expected)
    encoder.attend(x)
    encoder.kept_features(x, torch.tensor([[1, 2], [0, 7]]))


NARROW_ARGS = ",".join(f"{key}={value}" for key, value in NARROW.items())


@pytest.mark.parametrize("parts", ["discovered", "online"])
def test_particle_refuses_a_vit_whose_keys_it_cannot_read(parts: str) -> None:
    options: dict[str, Any] = {"model": "cait_xxs24_224", "model_args": "depth=2", "size": 64, "parts": parts}
    with pytest.raises(UserError, match="cait_xxs24_224 has no keys"):
        PARTICLE(PARTICLEConfig(**options))


def test_particle_names_the_size_for_discovery_that_a_network_does_not_take() -> None:
    """The default is twice the size of training, for which a network with a bias of relative positions is not built."""
    options: dict[str, Any] = {"model": "beit_base_patch16_224", "model_args": NARROW_ARGS, "size": 64}
    with pytest.raises(UserError, match=r"--discover-size is 128 pixels, which beit_base_patch16_224 does not take"):
        PARTICLE(PARTICLEConfig(**options))
    PARTICLE(PARTICLEConfig(**options, discover_size=64, hidden=8, projection=8, prototypes=8))


def test_lodisc_refuses_a_vit_without_attention_or_with_one_grid() -> None:
    with pytest.raises(UserError, match="test_vit4 has no keys and CLS attention"):
        LoDisc(LoDiscConfig(model="test_vit4", size=64))
    with pytest.raises(UserError, match="beit_base_patch16_224 cannot leave out patches"):
        LoDisc(LoDiscConfig(model="beit_base_patch16_224", model_args=NARROW_ARGS, size=64, drop_tokens=True))


@pytest.mark.parametrize("drop_tokens", [False, True])
def test_lodisc_takes_a_vit_with_rotary_embedding(drop_tokens: bool) -> None:
    options: dict[str, Any] = {"model": "vit_small_patch16_dinov3", "model_args": NARROW_ARGS, "size": 64}
    lodisc = LoDisc(LoDiscConfig(**options, hidden=8, projection=8, drop_tokens=drop_tokens))
    features, pivotal = lodisc.pivots(torch.randn(4, 3, 64, 64))
    assert features.shape == (4, 96)
    assert pivotal.mask.shape == (4, 16)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "xcit_nano_12_p16_224"])
def test_methods_on_maps_take_maps_of_any_layout(name: str) -> None:
    """Every weight of the encoder that evaluation uses is trained."""
    args = ",".join(f"{key}={value}" for key, value in FEW[name].items())
    color = Color(ColorConfig(model=name, model_args=args, size=64, hidden=8))
    logits = color.logits(torch.randn(2, 3, 64, 64))
    assert logits.shape[:3] == (2, 16, 16)
    logits.square().mean().backward()
    without = [name for name, p in color.encoder.net.named_parameters() if p.grad is None]
    assert all(name.startswith(("head", "norm")) for name in without), without
