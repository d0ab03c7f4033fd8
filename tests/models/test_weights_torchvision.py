"""Weights that torchvision's networks have stored."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.convnext import CNBlockConfig

from tests.models.foreign import assert_same_features, images, randomise, refused, timm_net

SHALLOW = {"layers": (1, 1, 1, 1)}


def store(net: nn.Module, folder: Path) -> Path:
    """A file of the state dict of a network."""
    torch.save(net.state_dict(), folder / "w.pth")
    return folder / "w.pth"


@torch.no_grad()
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_a_resnet_has_the_same_features(tmp_path: Path, block: str) -> None:
    net = randomise(tv.ResNet(getattr(tv.resnet, block), [1, 1, 1, 1]))
    pooled = nn.Sequential(*list(net.children())[:-1])(images(32)).flatten(1)
    name = "resnet18" if block == "BasicBlock" else "resnet50"
    assert_same_features(store(net, tmp_path), name, 32, pooled, **SHALLOW)


@torch.no_grad()
def test_a_resnext_has_the_same_features(tmp_path: Path) -> None:
    net = randomise(tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], groups=8, width_per_group=4))
    pooled = nn.Sequential(*list(net.children())[:-1])(images(32)).flatten(1)
    assert_same_features(store(net, tmp_path), "resnext50_32x4d", 32, pooled, cardinality=8, **SHALLOW)


@torch.no_grad()
def test_a_densenet_has_the_same_map(tmp_path: Path) -> None:
    small = {"growth_rate": 8, "block_config": (1, 2, 1, 1)}
    net = randomise(tv.DenseNet(num_init_features=16, **small))  # timm: twice the growth rate
    features = nn.functional.relu(net.features(images(32)))
    assert_same_features(store(net, tmp_path), "densenet121", 32, features, **small)


@torch.no_grad()
def test_a_convnext_has_the_same_features(tmp_path: Path) -> None:
    widths = (16, 24, 32, 40)
    settings = [CNBlockConfig(*pair, 2) for pair in zip(widths, (*widths[1:], None), strict=True)]
    net = randomise(tv.ConvNeXt(settings))
    pooled = net.classifier[:2](net.avgpool(net.features(images(64))))
    file = store(net, tmp_path)
    assert_same_features(file, "convnext_tiny", 64, pooled, dims=widths, depths=(2, 2, 2, 2))
    refused(
        timm_net("convnext_tiny", dims=widths, depths=(2, 2, 1, 2)), file,
        r"layout of torchvision's ConvNeXt, \d+ of the \d+ of convnext_tiny: 'features\.5\.1\.layer_scale'.* left over",
    )  # fmt: skip


def small_vit() -> nn.Module:
    return randomise(tv.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64))


VIT = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2}


@torch.no_grad()
@pytest.mark.parametrize("earlier", [False, True])
def test_a_vit_has_the_same_tokens(tmp_path: Path, earlier: bool) -> None:
    """In the files that torchvision offers, the layers of the MLP have the names of its first version."""
    net = small_vit()
    tokens = torch.cat([net.class_token.expand(2, -1, -1), net._process_input(images(32))], 1)
    tokens = net.encoder(tokens)
    file = store(net, tmp_path)
    if earlier:
        state = net.state_dict()
        names = {k: k.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2") for k in state}
        old = {names[k]: v for k, v in state.items()}
        assert not any(net.load_state_dict(old))  # torchvision knows them
        torch.save(old, file)
    assert_same_features(file, "vit_tiny_patch16_224", 32, tokens, img_size=32, **VIT)


@torch.no_grad()
@pytest.mark.parametrize(
    ("theirs", "ours", "args"),
    [
        ("efficientnet_b0", "efficientnet_b0", {}),
        ("mobilenet_v2", "mobilenetv2_100", {}),
        ("mobilenet_v3_small", "mobilenetv3_small_100", {"bn_eps": 1e-3}),
        pytest.param("mobilenet_v3_large", "mobilenetv3_large_100", {"bn_eps": 1e-3}, marks=pytest.mark.slow),
        pytest.param("efficientnet_b5", "efficientnet_b5", {"bn_eps": 1e-3}, marks=pytest.mark.sweep),
        pytest.param("efficientnet_v2_s", "efficientnetv2_s", {"bn_eps": 1e-3}, marks=pytest.mark.sweep),
    ],
)
def test_a_mobile_network_has_the_same_features(tmp_path: Path, theirs: str, ours: str, args: dict[str, float]) -> None:
    net = randomise(getattr(tv, theirs)(weights=None))
    pooled = nn.functional.adaptive_avg_pool2d(net.features(images(64)), 1).flatten(1)
    if theirs.startswith("mobilenet_v3"):
        pooled = net.classifier[:2](pooled)
    assert_same_features(store(net, tmp_path), ours, 64, pooled, **args)


@torch.no_grad()
@pytest.mark.sweep
def test_a_vgg_has_the_same_features(tmp_path: Path) -> None:
    net = randomise(tv.vgg11(weights=None))
    pooled = net.classifier[:5](net.features(images(224)).flatten(1))
    assert_same_features(store(net, tmp_path), "vgg11", 224, pooled)


@pytest.mark.parametrize(
    ("theirs", "ours", "args", "message"),
    [
        (
            "efficientnet_b0", "tf_efficientnet_b0", {},
            "torchvision's EfficientNet, whose convolutions pad by the same on all sides, which those of "
            "tf_efficientnet_b0 do not: give --model efficientnet_b0",
        ),
        (
            "mobilenet_v3_small", "mobilenetv3_small_100", {},
            r"eps 0\.001 where mobilenetv3_small_100 has 1e-05: add bn_eps=0\.001 to --model-args",
        ),
        ("mobilenet_v2", "efficientnet_b0", {}, "are in no layout that is known for efficientnet_b0"),
        ("mobilenet_v2", "resnet18", SHALLOW, "are in no layout that is known for resnet18 .*such as 'features"),
    ],
)  # fmt: skip
def test_a_network_of_another_computation_is_refused(
    tmp_path: Path, theirs: str, ours: str, args: dict[str, object], message: str
) -> None:
    file = store(getattr(tv, theirs)(weights=None), tmp_path)
    refused(timm_net(ours, **args), file, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"conv_proj.bias": s["conv_proj.bias"] * float("nan")}, r"not finite in 'conv_proj\.bias'"),
        (lambda s: s | {"conv_proj.bias": s["conv_proj.bias"].to_sparse()}, r"without values in 'conv_proj\.bias'"),
        (
            lambda s: s | {"conv_proj.bias": torch.zeros(33)},
            r"1 of another shape, such as 'conv_proj\.bias' \[33\] instead of \[32\]\): give its --model and "
            r"--model-args \(torchvision's ViT is vit_\*_patch\*_224 in timm\)\.",
        ),
        (
            lambda s: {k: v for k, v in s.items() if k != "conv_proj.bias"},
            r"\(the file has 31 tensors in the layout of torchvision's ViT, .*: 'conv_proj\.bias' missing",
        ),
        (
            lambda s: s | {"encoder.layers.encoder_layer_2.ln_1.bias": torch.zeros(32)},
            r"'encoder\.layers\.encoder_layer_2\.ln_1\.bias' left over",
        ),
    ],
    ids=["not finite", "sparse", "another shape", "missing", "left over"],
)
@pytest.mark.parametrize("prefix", ["", "backbone.vit."])
def test_what_is_wrong_is_named_as_in_the_file(tmp_path: Path, prefix: str, change: partial, message: str) -> None:
    state = {prefix + k: v for k, v in change(small_vit().state_dict()).items()}
    torch.save({"model": state}, tmp_path / "w.pth")
    message = message.replace("(the file", f"(under 'model.{prefix}' the file")
    refused(timm_net("vit_tiny_patch16_224", img_size=32, **VIT), tmp_path / "w.pth", message)
