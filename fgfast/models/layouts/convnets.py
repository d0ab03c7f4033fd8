"""Tables for ResNet, ConvNeXt and VGG."""

from fgfast.models.layouts.rules import Layout, reshaped, rules

_SEQUENTIAL_RESNET = Layout(
    "nn.Sequential of a ResNet's children", "resnet*, resnext*, wide_resnet*",
    rules({"conv1.*": "0.<1>", "bn1.*": "1.<1>", "layer#.*": "<1+3>.<2>"}),
)  # fmt: skip

_UNIT, _STAGE = "embedder.embedder", "encoder.stages.<1-1>.layers.<2>"
_HUGGING_FACE_RESNET = Layout(
    "Hugging Face's ResNet", "resnet*",
    rules({
        "conv1.weight": f"{_UNIT}.convolution.weight", "bn1.*": f"{_UNIT}.normalization.<1>",
        "layer#.#.conv#.weight": f"{_STAGE}.layer.<3-1>.convolution.weight",
        "layer#.#.bn#.*": f"{_STAGE}.layer.<3-1>.normalization.<4>",
        "layer#.#.downsample.0.weight": f"{_STAGE}.shortcut.convolution.weight",
        "layer#.#.downsample.1.*": f"{_STAGE}.shortcut.normalization.<3>",
    }),
)  # fmt: skip

_TORCHVISION_CONVNEXT = Layout(
    "torchvision's ConvNeXt", "convnext_tiny, convnext_small, convnext_base, convnext_large",
    rules({
        "stem.#.*": "features.0.<1>.<2>", "stages.#.downsample.#.*": "features.<1*2>.<2>.<3>",
        "stages.#.blocks.#.conv_dw.*": "features.<1*2+1>.<2>.block.0.<3>",
        "stages.#.blocks.#.norm.*": "features.<1*2+1>.<2>.block.2.<3>",
        "head.norm.*": "classifier.0.<1>",
    })
    + rules({
        "stages.#.blocks.#.gamma": "features.<1*2+1>.<2>.layer_scale",
        "stages.#.blocks.#.mlp.fc1.*": "features.<1*2+1>.<2>.block.3.<3>",
        "stages.#.blocks.#.mlp.fc2.*": "features.<1*2+1>.<2>.block.5.<3>",
    }, reshaped),
    ignored=r"classifier\.2\..*",
)  # fmt: skip

_BLOCK = "encoder.stages.<1>.layers.<2>"
_HUGGING_FACE_CONVNEXT = Layout(
    "Hugging Face's ConvNeXt", "convnext*, convnextv2*",  # its last norm has eps 1e-12, timm's 1e-6
    rules({
        "stem.0.*": "embeddings.patch_embeddings.<1>", "stem.1.*": "embeddings.layernorm.<1>",
        "stages.#.downsample.#.*": "encoder.stages.<1>.downsampling_layer.<2>.<3>",
        "stages.#.blocks.#.gamma": f"{_BLOCK}.layer_scale_parameter",
        "stages.#.blocks.#.conv_dw.*": f"{_BLOCK}.dwconv.<3>", "stages.#.blocks.#.norm.*": f"{_BLOCK}.layernorm.<3>",
        "head.norm.*": "layernorm.<1>",
    })
    + rules({
        "stages.#.blocks.#.mlp.fc#.*": f"{_BLOCK}.pwconv<3>.<4>", "stages.#.blocks.#.mlp.grn.*": f"{_BLOCK}.grn.<3>",
    }, reshaped),
)  # fmt: skip

_DINOV3_BLOCK = "stages.<1>.layers.<2>"
_HUGGING_FACE_DINOV3_CONVNEXT = Layout(
    "Hugging Face's DINOv3 ConvNeXt", "convnext_tiny, convnext_small, convnext_base, convnext_large",
    rules({
        "stem.#.*": "stages.0.downsample_layers.<1>.<2>",
        "stages.#.downsample.#.*": "stages.<1>.downsample_layers.<2>.<3>",
        "stages.#.blocks.#.gamma": f"{_DINOV3_BLOCK}.gamma",
        "stages.#.blocks.#.conv_dw.*": f"{_DINOV3_BLOCK}.depthwise_conv.<3>",
        "stages.#.blocks.#.norm.*": f"{_DINOV3_BLOCK}.layer_norm.<3>",
        "head.norm.*": "layer_norm.<1>",
    })
    + rules({"stages.#.blocks.#.mlp.fc#.*": f"{_DINOV3_BLOCK}.pointwise_conv<3>.<4>"}, reshaped),
)  # fmt: skip

_TORCHVISION_VGG = Layout(
    "torchvision's VGG", "vgg*",
    rules({"features.*": "features.<1>"})
    + rules({"pre_logits.fc1.*": "classifier.0.<1>", "pre_logits.fc2.*": "classifier.3.<1>"}, reshaped),
    ignored=r"classifier\.6\..*",
)  # fmt: skip

CONVNETS = (
    _SEQUENTIAL_RESNET, _HUGGING_FACE_RESNET, _TORCHVISION_CONVNEXT, _HUGGING_FACE_CONVNEXT,
    _HUGGING_FACE_DINOV3_CONVNEXT, _TORCHVISION_VGG,
)  # fmt: skip
