"""Weights that networks of Hugging Face's transformers have stored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.models.foreign import assert_same_features, images, randomise, refused, timm_net

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
PLAIN = SMALL | {"intermediate_size": 64}
OURS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 2, 1]}
CONVNEXT = {"dims": (16, 24, 32, 40), "depths": (1, 1, 2, 1)}


def build(name: str, **config: Any) -> nn.Module:
    """A network with random weights: "ViT" or "ViTForImageClassification"."""
    family = name.partition("For")[0].removesuffix("Model")
    network = getattr(transformers, name if "For" in name else f"{name}Model")
    return randomise(network(getattr(transformers, f"{family}Config")(**config)))


def store(net: nn.Module, folder: Path, how: str) -> Path:
    """The weights of a network as transformers stores them, or as its state dict."""
    if how == "save_pretrained":
        net.save_pretrained(folder / "hf")
        return folder / "hf"
    torch.save(net.state_dict(), folder / "w.bin")
    return folder / "w.bin"


@pytest.mark.parametrize(
    ("theirs", "config", "ours", "args", "message"),
    [
        (
            "ResNet", {"layer_type": "basic", "hidden_sizes": [8] * 4, "depths": [3, 4, 6, 3]},
            "resnet18", {"channels": (8, 8, 8, 8)},
            r"'encoder\.stages\.0\.layers\.2\.layer\.0\.convolution\.weight', .* left over",
        ),
        (
            "ViT", PLAIN | {"num_hidden_layers": 12}, "vit_tiny_patch16_224", OURS | {"depth": 4, "mlp_ratio": 2},
            r"'encoder\.layer\.10\.attention\.attention\.key\.bias', .* left over",
        ),
        (
            "ViT", PLAIN, "vit_tiny_patch16_224", OURS | {"depth": 4, "mlp_ratio": 2},
            r"'encoder\.layer\.2\.layernorm_before\.weight', .* missing",
        ),
        (
            "ViT", PLAIN | {"num_attention_heads": 4, "hidden_size": 64}, "vit_tiny_patch16_224", OURS,
            r"30 of another shape, such as 'embeddings\.cls_token' \[1, 1, 64\] instead of \[1, 1, 32\]",
        ),
        ("ViT", PLAIN, "resnet18", {}, "no layout that is known for resnet18 .*such as 'embeddings.cls_token'"),
    ],
    ids=["more blocks in a stage", "deeper", "shallower", "wider", "another family"],
)  # fmt: skip
def test_another_network_is_refused_by_names_in_the_file(
    tmp_path: Path, theirs: str, config: dict[str, Any], ours: str, args: dict[str, Any], message: str
) -> None:
    refused(timm_net(ours, **args), store(build(theirs, **config), tmp_path, "save_pretrained"), message)


HOW = pytest.mark.parametrize("how", ["save_pretrained", "state_dict"])


@HOW
@torch.no_grad()
@pytest.mark.parametrize(("kind", "name"), [("basic", "resnet18"), ("bottleneck", "resnet50")])
def test_a_resnet_has_the_same_map(tmp_path: Path, how: str, kind: str, name: str) -> None:
    expansion = 1 if kind == "basic" else 4
    widths = [64 * expansion * 2**k for k in range(4)]
    net = build("ResNet", layer_type=kind, hidden_sizes=widths, depths=[1, 2, 1, 1])
    features = net(images(32)).last_hidden_state
    assert_same_features(store(net, tmp_path, how), name, 32, features, layers=(1, 2, 1, 1))


@HOW
@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("ConvNext", "convnext_tiny"), ("ConvNextV2", "convnextv2_tiny"), ("ConvNext", "convnext_atto")],
)
def test_a_convnext_has_the_same_features(tmp_path: Path, how: str, theirs: str, ours: str) -> None:
    """Some of timm's have convolutions where others have linear layers."""
    net = build(theirs, **STAGES)
    pooled = net(images(64)).pooler_output
    assert_same_features(store(net, tmp_path, how), ours, 64, pooled, **CONVNEXT)


@torch.no_grad()
def test_a_dinov3_convnext_has_the_same_features(tmp_path: Path) -> None:
    net = build("DINOv3ConvNext", **STAGES)
    pooled = net(images(64)).pooler_output
    assert_same_features(store(net, tmp_path, "save_pretrained"), "convnext_tiny", 64, pooled, **CONVNEXT)


@HOW
@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("ViT", "vit_tiny_patch16_224"), ("ViTMSN", "vit_tiny_patch16_224"),
     ("DeiT", "deit_tiny_distilled_patch16_224"), ("ViTForImageClassification", "vit_tiny_patch16_224")],
)  # fmt: skip
def test_a_vit_has_the_same_tokens(tmp_path: Path, how: str, theirs: str, ours: str) -> None:
    net = build(theirs, **PLAIN)
    body = net.vit if "For" in theirs else net
    tokens = body(images(32)).last_hidden_state
    assert_same_features(store(net, tmp_path, how), ours, 32, tokens, mlp_ratio=2, **OURS)


@HOW
@torch.no_grad()
def test_a_masked_autoencoder_has_the_same_tokens(tmp_path: Path, how: str) -> None:
    net = build(
        "ViTMAEForPreTraining", **PLAIN, mask_ratio=0.0, decoder_hidden_size=32, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    )  # fmt: skip
    noise = torch.arange(16.0).expand(2, -1)  # which keeps the order of the patches
    tokens = net.vit(images(32), noise=noise).last_hidden_state
    assert_same_features(store(net, tmp_path, how), "vit_tiny_patch16_224", 32, tokens, mlp_ratio=2, **OURS)


@HOW
@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_a_dinov2_has_the_same_features(tmp_path: Path, how: str, gated: bool, registers: int) -> None:
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    net = build(name, **SMALL, use_swiglu_ffn=gated, **more)
    tokens = net(images(32)).last_hidden_state
    ours = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    options: dict[str, Any] = {"reg_tokens": registers} if registers else {}
    if gated:
        from timm.layers import SwiGLUPacked

        # transformers takes 2 / 3 of 4 * 32, rounded up to a multiple of 8: 88, for the gates and for the values
        options |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.5}
    assert_same_features(store(net, tmp_path, how), ours, 32, tokens, **OURS, **options)


DINOV3 = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}


@HOW
@torch.no_grad()
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_dinov3_vit_has_the_same_tokens(tmp_path: Path, how: str, gated: bool, bias: bool) -> None:
    """Biases of queries and values that are all 0 may be left out, as in the networks that Meta distilled."""
    act = "silu" if gated else "gelu"
    net = build("DINOv3ViT", **PLAIN, num_register_tokens=4, use_gated_mlp=gated, hidden_act=act)
    if not bias:
        for layer in (net.model if hasattr(net, "model") else net).layer:
            layer.attention.q_proj.bias.zero_()
            layer.attention.v_proj.bias.zero_()
    tokens = net(images(32)).last_hidden_state
    name = f"vit_small_{'plus_' if gated else ''}patch16_dinov3{'_qkvb' if bias else ''}"
    assert_same_features(store(net, tmp_path, how), name, 32, tokens, **DINOV3)
    if bias:
        refused(
            timm_net(name.removesuffix("_qkvb"), **DINOV3), store(net, tmp_path, how),
            r"\.0\.attention\.q_proj\.bias', .* left over",
        )  # fmt: skip


@torch.no_grad()
def test_parts_of_a_tensor_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    """Even where the first of them has the shape of the whole."""
    state, layer = build("ViT", **PLAIN).state_dict(), "layers.0.attention."
    state |= {f"{layer}q_proj.weight": torch.zeros(96, 32), f"{layer}k_proj.weight": torch.zeros(5)}
    torch.save(state, tmp_path / "w.bin")
    refused(
        timm_net("vit_tiny_patch16_224", mlp_ratio=2, **OURS), tmp_path / "w.bin",
        r"1 of another shape, such as 'layers\.0\.attention\.q_proj\.weight' \+ 'layers\.0\.attention\.k_proj\.weight'"
        r" \+ 'layers\.0\.attention\.v_proj\.weight' \[96, 32\] \+ \[5\] \+ \[32, 32\] instead of \[96, 32\]",
    )  # fmt: skip


@torch.no_grad()
def test_a_network_stored_in_several_files_has_the_same_tokens(tmp_path: Path) -> None:
    net = build("ViT", **PLAIN)
    tokens = net(images(32)).last_hidden_state
    net.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        assert_same_features(path, "vit_tiny_patch16_224", 32, tokens, mlp_ratio=2, **OURS)
