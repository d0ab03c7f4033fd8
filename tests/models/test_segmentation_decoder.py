"""Segmentation networks: shapes, the order of resizing and convolution, the keys of one head, gradients."""

import pytest
import torch
from torch import nn

from fgfast.errors import UserError
from fgfast.models.backbone import Backbone
from fgfast.models.segmentation import SegmentationDecoder, Segmenter
from tests.conftest import TINY


def segmenter(name: str, n_classes: int = 3) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(Backbone(name, size=32), n_classes, size=32)


@pytest.mark.parametrize("kernels", [(1,), (3, 3)])
@pytest.mark.parametrize("side", [(1, 1), (3, 5), (7, 2)])
def test_the_decoder_enlarges_any_map_eight_times(kernels: tuple[int, ...], side: tuple[int, int]) -> None:
    logits = SegmentationDecoder(6, 4, kernels)(torch.zeros(2, 6, *side))
    assert logits.shape == (2, 4, 8 * side[0], 8 * side[1])


@pytest.mark.parametrize(("kernels", "n_convolutions"), [((1,), 3), ((3, 3), 6)])
def test_the_decoder_has_three_blocks_of_256_128_and_64_channels(kernels: tuple[int, ...], n_convolutions: int) -> None:
    convolutions = [m for m in SegmentationDecoder(6, 4, kernels).modules() if isinstance(m, nn.Conv2d)]
    widths = [width for width in (256, 128, 64) for _ in kernels]
    assert [c.out_channels for c in convolutions] == [*widths, 4]
    assert [c.kernel_size[0] for c in convolutions] == [*kernels * 3, 1]
    assert len(convolutions) == n_convolutions + 1


def test_a_1x1_convolution_may_run_before_the_resizing() -> None:
    """The decoder equals one that resizes first, as it is published, in float64."""
    torch.manual_seed(0)
    decoder = SegmentationDecoder(6, 4).double().eval()
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    layers = list(decoder.layers)
    published = [layer for i in range(0, 12, 4) for layer in (layers[i + 1], layers[i], *layers[i + 2 : i + 4])]
    assert torch.allclose(nn.Sequential(*published, layers[12])(x), decoder(x), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", [TINY, "test_vit"])
@pytest.mark.parametrize("side", [(32, 32), (48, 80)])
def test_logits_have_the_size_of_the_images(name: str, side: tuple[int, int]) -> None:
    assert segmenter(name)(torch.zeros(2, 3, *side)).shape == (2, 3, *side)


def test_a_cnn_takes_images_of_any_size() -> None:
    assert segmenter(TINY)(torch.zeros(2, 3, 45, 33)).shape == (2, 3, 45, 33)


def test_a_vit_gives_the_keys_of_the_first_head_of_its_last_block() -> None:
    """They are rows D .. D + d of the joint projection to queries, keys and values, of patches alone."""
    net = segmenter("test_vit").eval()
    seen: list[torch.Tensor] = []
    net.decoder.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    vit = net.encoder.net
    attention = vit.blocks[-1].attn
    tokens: list[torch.Tensor] = []
    attention.qkv.register_forward_pre_hook(lambda _module, inputs: tokens.append(inputs[0]))
    with torch.no_grad():
        net(torch.randn(2, 3, 32, 32))
        dim, head = attention.qkv.in_features, attention.head_dim
        keys = tokens[-1] @ attention.qkv.weight[dim : dim + head].T + attention.qkv.bias[dim : dim + head]
    expected = attention.k_norm(keys[:, vit.num_prefix_tokens :])  # [B, P, d]
    assert net.width == head
    assert torch.allclose(seen[-1].flatten(2).transpose(1, 2), expected, atol=1e-5)


@pytest.mark.parametrize(("name", "first"), [(TINY, "conv1.0.weight"), ("test_vit", "patch_embed.proj.weight")])
def test_gradients_reach_the_first_layer_of_the_encoder(name: str, first: str) -> None:
    net = segmenter(name)
    net(torch.randn(2, 3, 32, 32)).square().mean().backward()
    weight = net.encoder.net.get_parameter(first)
    assert weight.grad is not None
    assert weight.grad.abs().max() > 0


def test_a_probed_encoder_keeps_its_mode() -> None:
    assert segmenter("test_vit").encoder.training
    assert not Segmenter(Backbone("test_vit", size=32).eval(), 3, size=32).encoder.training


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("test_vit", {"class_token": False, "global_pool": "avg"}, "has no keys and CLS attention"),
        ("crossvit_tiny_240", {}, "has no feature map"),
    ],
)
def test_a_vit_without_keys_and_a_network_without_a_map_are_refused(
    name: str, args: dict[str, object], message: str
) -> None:
    size = 240 if name.endswith("240") else 32
    with pytest.raises(UserError, match=message):
        Segmenter(Backbone(name, size=size, args=args), 3, size=size)
