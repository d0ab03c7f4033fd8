"""Tables for networks of inverted bottlenecks: EfficientNet, MobileNet V2 and V3.

In timm a block that widens its input is an InvertedResidual, or an EdgeResidual if one convolution widens it and looks
at neighbours; one that keeps its width is a DepthwiseSeparableConv; a single convolution is a ConvBnAct. In their names
on the left <1> is the stage, <2> the block of the stage, <3> the block of all stages, and <4> the rest.
"""

from fgfast.models.layouts.rules import Layout, reshaped, rules

_SQUEEZE = ("se.conv_reduce", "se.conv_expand")
_PARTS: dict[str, tuple[tuple[str, str], ...]] = {  # pairs of a convolution and its norm, in their order
    "InvertedResidual": (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")),
    "InvertedResidual+se": (("conv_pw", "bn1"), ("conv_dw", "bn2"), _SQUEEZE, ("conv_pwl", "bn3")),
    "DepthwiseSeparableConv": (("conv_dw", "bn1"), ("conv_pw", "bn2")),
    "DepthwiseSeparableConv+se": (("conv_dw", "bn1"), _SQUEEZE, ("conv_pw", "bn2")),
    "EdgeResidual": (("conv_exp", "bn1"), ("conv_pwl", "bn2")),
    "ConvBnAct": (("conv", "bn1"),),
}


def _blocks(kind: str, *names: tuple[str, str]) -> dict[str, str]:
    """A table for a kind of block, from names in the file for each of its pairs."""
    return {
        f"blocks/#/#/#/{kind}/{own}.*": f"{file}.<4>"
        for owns, files in zip(_PARTS[kind], names, strict=True)
        for own, file in zip(owns, files, strict=True)
    }


_B = "_blocks.<3>."
_EXPAND, _PROJECT = (f"{_B}_expand_conv", f"{_B}_bn0"), (f"{_B}_project_conv", f"{_B}_bn2")
_DEPTHWISE, _SE = (f"{_B}_depthwise_conv", f"{_B}_bn1"), (f"{_B}_se_reduce", f"{_B}_se_expand")
_EFFICIENTNET_PYTORCH = Layout(
    "efficientnet_pytorch", "tf_efficientnet_b*, tf_efficientnet_lite*",
    rules({
        "conv_stem.*": "_conv_stem.<1>", "bn1.*": "_bn0.<1>",
        "conv_head/#/#/*": "_conv_head.<3>", "bn2/#/#/*": "_bn1.<3>",
        **_blocks("InvertedResidual", _EXPAND, _DEPTHWISE, _PROJECT),
        **_blocks("InvertedResidual+se", _EXPAND, _DEPTHWISE, _SE, _PROJECT),
        **_blocks("DepthwiseSeparableConv", _DEPTHWISE, _PROJECT),
        **_blocks("DepthwiseSeparableConv+se", _DEPTHWISE, _SE, _PROJECT),
    }),
    same_padding=True, eps=lambda blocks: 1e-3,
)  # fmt: skip


def _counted(block: str) -> dict[str, str]:
    """Names for blocks as torchvision counts their parts, squeeze-excitation among them."""
    table: dict[str, str] = {}
    for kind, parts in _PARTS.items():
        ends = [("fc1", "fc2") if part is _SQUEEZE else ("0", "1") for part in parts]
        table |= _blocks(kind, *((f"{block}.{k}.{a}", f"{block}.{k}.{b}") for k, (a, b) in enumerate(ends)))
    return table


_STEM = {"conv_stem.*": "features.0.0.<1>", "bn1.*": "features.0.1.<1>"}
_TORCHVISION_EFFICIENTNET = Layout(
    "torchvision's EfficientNet", "efficientnet_b0 to b4; with bn_eps=0.001 b5 to b7 and efficientnetv2_s, m, l",
    rules({
        **_STEM, **_counted("features.<1+1>.<2>.block"),
        "conv_head/#/#/*": "features.<1+1>.0.<3>", "bn2/#/#/*": "features.<1+1>.1.<3>",
    }),
    same_padding=False, eps=lambda blocks: 1e-5 if blocks < 39 else 1e-3,  # b4 has 32 blocks, b5 39, v2_s 40
)  # fmt: skip

_TORCHVISION_MOBILENETV3 = Layout(
    "torchvision's MobileNetV3", "mobilenetv3_small_100, mobilenetv3_large_100, with bn_eps=0.001",
    rules({
        **_STEM, **_counted("features.<3+1>.block"),
        **_blocks("ConvBnAct", ("features.<3+1>.0", "features.<3+1>.1")),
    })
    + rules({"conv_head/#/#/*": "classifier.0.<3>"}, reshaped),
    ignored=r"classifier\.3\..*", same_padding=False, eps=lambda blocks: 1e-3,
)  # fmt: skip

_C = "features.<3+1>.conv."
_TORCHVISION_MOBILENETV2 = Layout(
    "torchvision's MobileNetV2", "mobilenetv2_100",
    rules({
        **_STEM,
        **_blocks("InvertedResidual", (f"{_C}0.0", f"{_C}0.1"), (f"{_C}1.0", f"{_C}1.1"), (f"{_C}2", f"{_C}3")),
        **_blocks("DepthwiseSeparableConv", (f"{_C}0.0", f"{_C}0.1"), (f"{_C}1", f"{_C}2")),
        "conv_head/#/#/*": "features.<2+1>.0.<3>", "bn2/#/#/*": "features.<2+1>.1.<3>",
    }),
    same_padding=False, eps=lambda blocks: 1e-5,
)  # fmt: skip

MOBILE = (_EFFICIENTNET_PYTORCH, _TORCHVISION_EFFICIENTNET, _TORCHVISION_MOBILENETV3, _TORCHVISION_MOBILENETV2)
